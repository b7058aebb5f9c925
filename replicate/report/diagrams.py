"""Drawings of the FFN's six products: the block diagram of one recipe, a grid of several."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from replicate.config import SparsityConfig
from replicate.figures import PALETTE

GREY = "#d9d9d9"  # a dense product
# (column, row) of the products in the paper's order: forward on top, then inputs, then weights.
_PLACES = ((1, 2), (3, 2), (3, 1), (3, 0), (1, 1), (1, 0))
_DX, _DY = 2.7, 1.7


def draw_products(ax: Axes, sparsity: SparsityConfig, title: str = "") -> None:
    """Draw algorithms 1 and 2 as a block diagram: each product's box says its sparse operand and format."""
    for (column, row), (text, operand, kind) in zip(_PLACES, sparsity.products(), strict=True):
        fill, ink = _colours(operand, kind)
        corner = (_DX * column - 0.95, _DY * row - 0.45)
        ax.add_patch(FancyBboxPatch(corner, 1.9, 0.9, boxstyle="round,pad=0.03", fc=fill, ec="none"))
        _write(ax, column, row, f"{_pretty(text)}\n{_format(operand, kind)}", color=ink, fontweight="bold")
    _write(ax, 2, 2, "y2 = relu(y1)²" + ("\nthen masked" if sparsity.activation != "dense" else ""))
    again = "\nsame mask" if sparsity.activation != "dense" and sparsity.mask_reuse else ""
    _write(ax, 2, 1, f"dy1 = 2 dy2 relu(y1){again}")
    for column, row, text in ((0.1, 2, "x"), (3.9, 2, "y3"), (3.9, 1, "dy3"), (0.1, 1, "dx")):
        _write(ax, column, row, text, fontsize=12)
    for row, way in ((2, 1), (1, -1)):
        for start, stop in ((0.6, 1.66), (3.7, 4.4), (6.4, 7.05), (9.1, 10.2)):
            _arrow(ax, (start, _DY * row), (stop, _DY * row), way)
    for column, text in ((3, "y2, dy3"), (1, "x, dy1")):
        _arrow(ax, (_DX * column, _DY - 0.5), (_DX * column, 0.5), 1)
        ax.text(_DX * column + 0.12, _DY / 2, text, va="center", fontsize=9)
    for row, text in ((2, "forward"), (1, "backward:\ninputs"), (0, "backward:\nweights")):
        _write(ax, -0.55, row, text, color="0.35", style="italic")
    ax.set(xlim=(-2.3, 10.9), ylim=(-0.6, 4.0), title=title)
    ax.axis("off")


def formats(recipes: Mapping[str, SparsityConfig]) -> Figure:
    """`draw_formats` as a figure of its own."""
    fig, ax = plt.subplots(figsize=(11, 0.36 * len(recipes) + 0.6))
    draw_formats(ax, recipes)
    return fig


def draw_formats(ax: Axes, recipes: Mapping[str, SparsityConfig], title: str = "") -> None:
    """Draw a grid, one recipe a row and one product a column; its cell says the sparse operand and format.

    Where a product reads a pruned weight that is not its sparse operand, the cell says which.
    """
    said = in_words(recipes)
    for y, (name, sparsity) in enumerate(recipes.items()):
        for x, (_, operand, kind) in enumerate(sparsity.products()):
            fill, ink = _colours(operand, kind)
            ax.add_patch(Rectangle((x - 0.47, y - 0.44), 0.94, 0.88, fc=fill, ec="none"))
            words = said.loc[name].iloc[x].replace(", ", "\n")
            ax.text(x, y, words, ha="center", va="center", color=ink, fontsize=8.5)
    ax.set(xlim=(-0.5, 5.5), ylim=(len(recipes) - 0.5, -0.5), title=title)
    ax.set_xticks(range(6), said.columns, fontsize=9)
    ax.set_yticks(range(len(recipes)), [_pretty(name) for name in recipes])
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def in_words(recipes: Mapping[str, SparsityConfig]) -> pd.DataFrame:
    """The cells of `draw_formats`: a row a recipe, by its name, and a column a product."""
    usual, rows = [text for text, _, _ in SparsityConfig().products()], {}
    for name, sparsity in recipes.items():
        rows[name] = [
            _format(operand, kind) + ("" if text == plain else f", reads {_pretty(text.split()[-1])}")
            for plain, (text, operand, kind) in zip(usual, sparsity.products(), strict=True)
        ]
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*map(_pretty, usual)]).rename_axis("arm")


def _colours(operand: str, kind: str) -> tuple[str, str]:
    """Fill and ink of a product with this sparse operand in this format."""
    if kind == "2:4":
        return PALETTE["2:4 weights" if operand.startswith("W") else "2:4 activations"], "white"
    return {"venom": PALETTE["venom"], "sampled": PALETTE["control"], "dense": GREY}[kind], "black"


def _format(operand: str, kind: str) -> str:
    name = {"venom": "Venom", "sampled": "some outputs"}.get(kind, kind)
    return name if kind == "dense" else f"{_pretty(operand)}: {name}"


def _pretty(text: str) -> str:
    return text.replace("^T", "ᵀ")


def _write(ax: Axes, column: float, row: float, text: str, **style: object) -> None:
    ax.text(_DX * column, _DY * row, text, ha="center", va="center", **{"fontsize": 9.5, **style})


def _arrow(ax: Axes, start: tuple[float, float], stop: tuple[float, float], way: int) -> None:
    tail, head = (start, stop) if way > 0 else (stop, start)
    ax.annotate("", head, tail, arrowprops={"arrowstyle": "-|>", "color": "0.3", "lw": 1.4})
