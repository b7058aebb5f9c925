"""One look for every figure and table, and files that come out the same each time.

figures/ holds what is drawn from records and exact values alone: the same on every machine, at every scale
and seed. What a run trained or drew at random itself goes to figures/fresh/, which git ignores: `save` and
`save_table` with `fresh=True`, or `both` for a picture of either kind. Numbers that depend on the machine are
shown through `about`.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replicate import paths
from replicate.files import write_atomic
from replicate.presets import SPARSITY_PRESETS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every common colour blindness and in grey.
PALETTE: dict[str, str] = {
    "dense": "#333333",
    "2:4 weights": "#0072B2",
    "2:4 activations": "#009E73",
    "venom": "#E69F00",
    "recipe": "#D55E00",
    "control": "#56B4E9",
    "paper": "#CC79A7",
}
MARKERS: dict[str, str] = dict(zip(PALETTE, "osD^vXP", strict=True))
LINES = ("-", "--", ":", "-.")

DPI = 150
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def theme() -> None:
    """Set seaborn's and matplotlib's look; idempotent."""
    import matplotlib as mpl
    import seaborn as sns

    sns.set_theme(context="notebook", style="whitegrid", palette=list(PALETTE.values()))
    mpl.rcParams.update(
        {
            "figure.figsize": (7.0, 4.2),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "savefig.dpi": DPI,
            "font.family": "DejaVu Sans",  # ships with matplotlib, so text has the same size anywhere
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "svg.hashsalt": "replicate",  # else every SVG has new random ids
            "svg.fonttype": "none",
        }
    )


def family(arm: str) -> str:
    """The palette's entry for a sparsity preset or a palette name: family("w1+w2") == "2:4 weights".

    Raises ValueError for other names.
    """
    if arm in PALETTE:
        return arm
    if arm not in SPARSITY_PRESETS:
        known = ", ".join([*PALETTE, *SPARSITY_PRESETS])
        raise ValueError(f"{arm!r} has no colour; known: {known}")
    config = SPARSITY_PRESETS[arm]
    if config.activation == "venom" and (config.routing != "token" or config.outputs == "selected"):
        return "control"
    if config.activation == "24":
        return "2:4 activations" if config.mask_reuse else "control"
    if config.activation == "venom":
        return "recipe" if config.w1 or config.w2_t else "venom"
    return "2:4 weights" if config.any else "dense"


def style(arm: str) -> dict[str, str]:
    """Keyword arguments for `ax.plot`: colour and marker of the family, line by place within it."""
    name = family(arm)
    siblings = [known for known in SPARSITY_PRESETS if family(known) == name]
    place = siblings.index(arm) if arm in siblings else 0
    return {"color": PALETTE[name], "marker": MARKERS[name], "linestyle": LINES[place % len(LINES)]}


def about(value: float | None, digits: int = 3, spread: float | None = None) -> str:
    """A measured number for a notebook's output: about(2.7581) == "≈2.76".

    The sign says that the digits may differ on another machine; the notebook tests mask exactly
    these numbers. `digits` are significant digits; None gives "not run".
    """
    if value is None:
        return "not run"
    text = f"≈{value:.{digits}g}"
    return text if spread is None else f"{text} ± {spread:.2g}"


def save(fig: Figure, name: str, *, fresh: bool = False) -> None:
    """Write <name>.png and .svg: the same bytes for the same figure.

    A picture in figures/ that looks the same already, or that other versions of the drawing libraries than
    the pinned ones would replace, is left as it is.

    Args:
        fig: the matplotlib figure.
        name: lower-case letters, digits, - and _, like "03_natural_sparsity".
        fresh: it shows what this run trained or drew at random: write to figures/fresh/.
    Raises ValueError for other names.
    """
    stem = _stem(name, fresh)
    nothing = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    for kind, metadata in nothing.items():
        buffer = io.BytesIO()
        fig.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
        path, content = stem.with_name(f"{name}.{kind}"), buffer.getvalue()
        if kind == "png" and path.exists() and (_looks_alike(path.read_bytes(), content) or not _pinned()):
            os.utime(path)  # it belongs to this run
        else:
            write_atomic(path, content)


def both(
    draw: Callable[[Mapping[str, Any]], Figure],
    name: str,
    *,
    recorded: Mapping[str, Any],
    fresh: Mapping[str, Any],
) -> None:
    """Draw, save and show a figure twice: of what is recorded, and of what this run has trained.

    Args:
        draw: makes the figure of a mapping scale -> runs.
        name: as for `save`.
        recorded: the recorded scales, for figures/. fresh: this run's, for figures/fresh/. An empty one is
            left out.
    """
    import matplotlib.pyplot as plt

    for studies, ours in ((recorded, False), (fresh, True)):
        if studies:
            save(draw(studies), name, fresh=ours)
            plt.show()


def save_table(
    df: pd.DataFrame,
    name: str,
    *,
    digits: int = 4,
    columns: dict[str, Callable] | None = None,
    fresh: bool = False,
) -> None:
    """Write <name>.csv (12 digits) and .md (`digits` significant digits).

    Args:
        df: the table; its index is written where it has a name.
        name: as for `save`.
        digits: significant digits of floats in the Markdown table.
        columns: column -> function that formats its values in the Markdown table.
        fresh: as for `save`.
    """
    stem = _stem(name, fresh)
    if any(level is not None for level in df.index.names):
        df = df.reset_index()
    write_atomic(
        stem.with_name(f"{name}.csv"),
        df.to_csv(index=False, lineterminator="\n", float_format="%.12g").encode(),
    )
    write_atomic(stem.with_name(f"{name}.md"), markdown(df, digits=digits, columns=columns).encode())


def markdown(df: pd.DataFrame, *, digits: int = 4, columns: dict[str, Callable] | None = None) -> str:
    """The table in Markdown: floats with `digits` significant digits, an empty cell for None and NaN."""
    import pandas as pd

    def cell(column: str, value: object) -> str:
        if pd.isna(value):
            return ""
        if columns and column in columns:
            return columns[column](value)
        return f"{value:.{digits}g}" if isinstance(value, float) else str(value)

    shown = pd.DataFrame({c: [cell(c, v).replace("|", "\\|") for v in df[c]] for c in df.columns})
    align = ["right" if df[c].dtype.kind in "iuf" else "left" for c in df.columns]
    return shown.to_markdown(index=False, disable_numparse=True, colalign=align) + "\n"


def _stem(name: str, fresh: bool) -> Path:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no figure name; use lower-case letters, digits, - and _")
    return paths.figures_dir() / ("fresh" if fresh else "") / name


def _looks_alike(one: bytes, other: bytes) -> bool:
    """True if two PNGs differ by rounding at most: other processors may move a shade by one or two of 255."""
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), dtype=np.int16) for png in (one, other))
    return a.shape == b.shape and int(np.abs(a - b).max()) <= 3


@lru_cache(maxsize=1)
def _pinned() -> bool:
    """True if the libraries that draw have the versions of requirements.txt."""
    pins = paths.ROOT / "requirements.txt"
    text = pins.read_text(encoding="utf-8") if pins.exists() else ""
    return all(
        importlib.metadata.version(package) in re.findall(rf"^{package}==([^\s;]+)", text, re.MULTILINE)
        for package in ("matplotlib", "pillow", "seaborn")
    )
