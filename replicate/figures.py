"""One look for every figure and table, and files that come out the same each time.

`theme()` once at the top of a notebook, colours by what is drawn and never by order, `save` and
`save_table` to write. Numbers that depend on the machine are shown through `about`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

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


def save(fig: Figure, name: str) -> None:
    """Write figures/<name>.png and .svg, the same bytes for the same figure.

    Args:
        fig: the matplotlib figure.
        name: lower-case letters, digits, - and _, like "03_natural_sparsity".
    Raises ValueError for other names.
    """
    stem = _stem(name)
    nothing = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    for kind, metadata in nothing.items():
        buffer = io.BytesIO()
        fig.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
        write_atomic(stem.with_name(f"{name}.{kind}"), buffer.getvalue())


def save_table(
    df: pd.DataFrame, name: str, *, digits: int = 4, columns: dict[str, Callable] | None = None
) -> None:
    """Write figures/<name>.csv (full precision) and .md (`digits` significant digits).

    Args:
        df: the table; its index is written where it has a name.
        name: as for `save`.
        digits: significant digits of floats in the Markdown table.
        columns: column -> function that formats its values in the Markdown table.
    """
    stem = _stem(name)
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


def _stem(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no figure name; use lower-case letters, digits, - and _")
    return paths.figures_dir() / name
