"""Pictures of the formats: matrices in 2:4 and V:N:M, and how a weight enters and leaves them."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from replicate import figures
from replicate.report.study_plots import draw_matrix
from replicate.sparsity import prune24, soft_threshold24, sparsity, venom_mask


def matrices(
    named: Mapping[str, Tensor],
    *,
    m: int,
    v: int | None = None,
    axes: tuple[str, str] = ("", ""),
    below: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """Matrices [R, C] side by side, zeros white, cut into blocks of v rows x m columns.

    Args:
        named: title -> matrix. axes: what R and C are, for the first. below: a line under each.
        title: of the figure.
    """
    fig, places = plt.subplots(1, len(named), figsize=(12, 3.3), squeeze=False)
    rows, columns = axes
    for i, (ax, (name, matrix)) in enumerate(zip(places[0], named.items(), strict=True)):
        draw_matrix(ax, matrix, v=v, m=m, title=name)
        named_axis = [columns if i == 0 else ""] if columns else []
        ax.set_xlabel("\n".join([*named_axis, *below[i : i + 1]]), fontsize=10)
    places[0, 0].set_ylabel(rows, fontsize=10)
    if title:
        fig.suptitle(title)
    return fig


def try_venom(x: Tensor, v: int, n: int, m: int) -> None:
    """Draw x [R, C] beside its V:N:M form; for sliders."""
    pruned = x * venom_mask(x, v, m, n)
    kept = (pruned.abs().sum() / x.abs().sum()).item()
    below = ["dense", f"{sparsity(pruned):.1%} zeros, {kept:.0%} of the magnitude kept"]
    matrices({"x": x, f"V:N:M = {v}:{n}:{m}": pruned}, v=v, m=m, below=below)


def travelling_weight(path: Tensor, results: Mapping[str, Tensor], neighbours: Sequence[float]) -> Figure:
    """What a product reads of a group of four while its first weight moves along `path` [P].

    Args:
        results: title -> values [P, 4] after pruning. neighbours: the three weights that stay.
    """
    fig, axes = plt.subplots(1, len(results), figsize=(11, 3.4), sharey=True)
    names = ["the moving weight", *(f"neighbour {value:+}" for value in neighbours)]
    for ax, (title, values) in zip(axes, results.items(), strict=True):
        for k, name in enumerate(names):
            shown = values[:, k].clone()
            shown[1:][values[:, k].diff().abs() > 0.3] = np.nan  # a jump is a gap
            ax.plot(path, shown, figures.LINES[k], lw=2.6 if k == 0 else 1.8, label=name)
        ax.set(title=title, xlabel="the moving weight")
    axes[0].set_ylabel("value that the product reads")
    axes[-1].legend(loc="upper left", fontsize=10)
    return fig


def one_group(weights: Sequence[float]) -> None:
    """Draw four weights as stored, after hard and after soft pruning; for sliders."""
    group = torch.tensor([weights])
    bars = {"stored": group, "hard": prune24(group), "soft": soft_threshold24(group)}
    names = ["the moving weight", *(f"neighbour {value:+}" for value in weights[1:])]
    pd.DataFrame({name: row[0].tolist() for name, row in bars.items()}, index=names).plot.bar(
        rot=0, ylim=(-3.1, 3.1), figsize=(8, 3), color=["0.75", *_HARD_AND_SOFT.values()]
    )


def continuity(sizes: Sequence[float], change: Mapping[str, Sequence[float]]) -> Figure:
    """The largest change of the pruned weights over the size of a move across the border of a mask.

    Args:
        change: "hard" and "soft" -> one number a size.
    """
    fig, ax = plt.subplots(figsize=(6.5, 3.6))
    labels = {"hard": ("o-", "hard: stays large"), "soft": ("s-", "soft: shrinks with h")}
    for name, (look, label) in labels.items():
        ax.loglog(sizes, change[name], look, label=label, color=_HARD_AND_SOFT[name])
    ax.loglog(sizes, [2 * h for h in sizes], "--", color="0.4", label="2h, the bound")
    ax.set(xlabel="size h of the move", ylabel="largest change of a pruned weight")
    ax.set_title("Only soft thresholding is continuous")
    ax.legend()
    return fig


_HARD_AND_SOFT = {"hard": figures.PALETTE["dense"], "soft": figures.PALETTE["2:4 weights"]}
