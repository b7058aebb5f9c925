"""One look for every figure and table, and files that come out the same each time.

figures/ holds what is drawn from records and exact values alone: the same on every machine, at every scale
and seed. What a run trained or drew at random itself goes to figures/fresh/, which git ignores: `fresh=True`,
or `both` for a picture of either kind. Numbers that depend on the machine are shown through `about`.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replicate.settings.presets import SPARSITY_PRESETS
from replicate.system import paths
from replicate.system.files import write_atomic

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
    "mixture": "#6A3D9A",  # of experts
}
MARKERS: dict[str, str] = dict(zip(PALETTE, "osD^vXPp", strict=True))
LINES = ("-", "--", ":", "-.")

Formats = Mapping[str, Callable[[Any], str]]  # by column
DPI = 150
SHOWN = 100  # pixels an inch in a notebook
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def theme() -> None:
    """Set seaborn's and matplotlib's look; idempotent."""
    import seaborn as sns

    look = {
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
    sns.set_theme(context="notebook", style="whitegrid", palette=list(PALETTE.values()), rc=look)


def family(arm: str) -> str:
    """The palette's entry for a sparsity preset or a palette name: family("w1+w2") == "2:4 weights".

    Raises ValueError for other names.
    """
    if arm in PALETTE:
        return arm
    if arm not in SPARSITY_PRESETS:
        raise ValueError(f"{arm!r} has no colour; known: {', '.join([*PALETTE, *SPARSITY_PRESETS])}")
    config = SPARSITY_PRESETS[arm]
    if config.activation == "venom" and config.routing != "token":
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
    """A measured number with `digits` significant digits: about(2.7581) == "≈2.76"; None is "not run".

    The sign says that the digits may differ on another machine; the notebook tests mask these numbers.
    """
    if value is None:
        return "not run"
    text = f"≈{value:.{digits}g}"
    return text if spread is None else f"{text} ± {spread:.2g}"


def save(fig: Figure, name: str, *, fresh: bool = False) -> None:
    """Write <name>.png and .svg, with the same bytes for the same figure.

    A PNG that looks the same already is left as it is. Raises ValueError for a bad name, see `_stem`.
    """
    stem = _stem(name, fresh)
    for kind, metadata in {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}.items():
        buffer = io.BytesIO()
        fig.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
        path, content = stem.with_suffix(f".{kind}"), buffer.getvalue()
        if kind == "png" and path.exists() and _looks_alike(path.read_bytes(), content):
            os.utime(path)  # it belongs to this run
        else:
            write_atomic(path, content)


def show(fig: Figure, name: str, *, alt: str, fresh: bool = False) -> None:
    """`save` a figure and show its PNG in a notebook; `alt` says in words what is to be seen."""
    import matplotlib.pyplot as plt
    from IPython.display import Image, display

    save(fig, name, fresh=fresh)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(fig)
    png = few_colours(buffer.getvalue())
    display(Image(png, format="png", width=round(fig.get_figwidth() * SHOWN), alt=alt))


def few_colours(png: bytes) -> bytes:
    """The picture in 256 colours, a third of the bytes, for a notebook's file."""
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def both(
    draw: Callable[..., Figure], name: str, *, recorded: Mapping[str, Any], fresh: Mapping[str, Any], alt: str
) -> None:
    """Draw, `show` and save a figure twice: of the recorded scales, and of those that this run has trained.

    `draw` makes the figure of a mapping scale -> runs; an empty mapping is left out. `alt` is for both.
    """
    for scales, ours in ((recorded, False), (fresh, True)):
        if scales:
            show(draw(scales), name, alt=alt, fresh=ours)


def save_table(
    df: pd.DataFrame, name: str, *, digits: int = 4, columns: Formats | None = None, fresh: bool = False
) -> None:
    """Write <name>.csv (12 digits) and .md, see `markdown`; the index is written where it has a name."""
    stem = _stem(name, fresh)
    if any(level is not None for level in df.index.names):
        df = df.reset_index()
    csv = df.to_csv(index=False, lineterminator="\n", float_format="%.12g")
    write_atomic(stem.with_suffix(".csv"), csv.encode())
    write_atomic(stem.with_suffix(".md"), markdown(df, digits=digits, columns=columns).encode())


def markdown(df: pd.DataFrame, *, digits: int = 4, columns: Formats | None = None) -> str:
    """The table in Markdown: floats with `digits` significant digits or by `columns`; nothing for NaN."""
    import pandas as pd

    def cell(value: object, how: Callable[[Any], str] | None) -> str:
        if pd.isna(value):
            return ""
        text = how(value) if how else f"{value:.{digits}g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|")

    shown = pd.DataFrame({c: [cell(value, (columns or {}).get(c)) for value in df[c]] for c in df})
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
