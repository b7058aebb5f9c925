"""Pictures of `python -m replicate diffusion`: losses by arm, samples beside samples, clips that move."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from replicate import figures
from replicate.diffusion.model import between
from replicate.diffusion.score import unpack
from replicate.diffusion.train import ARMS, CHOSEN_TOGETHER, config_of
from replicate.settings.text import config_hash
from replicate.study.records import Record, RecordStore
from replicate.study.statistics import Stats, paired

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.figure import Figure

LABELS = {
    "dense": "dense, squared ReLU",
    "gelu": "dense, GELU",
    "act24": "2:4 activations",
    "act24+tile": "2:4 activations, weight gradients too",
    "venom16": "Venom by the router",
    "active16": "Venom by activations",
    "block16": "Venom by votes of 64 tokens",
    "tile24": "2:4 tiles of tokens and neurons",
}
LOSS = "held-out squared error"
NAMES = 115  # columns left of a film, in pixels of a clip
SPLITS = {"poses": "new poses of trained fonts", "fonts": "fonts never trained on"}


def runs(
    kind: str, store: RecordStore | None = None, profile: str = "gpu", **changes: Any
) -> dict[str, dict[int, Record]]:
    """The shipped runs of a kind ("image" or "video") by arm, in the order of ARMS, and seed.

    Args:
        profile: whose settings they must have. changes: of these, such as `{"model.qk_norm": False}`.
    """
    found: dict[str, dict[int, Record]] = {arm: {} for arm in ARMS}
    for record, origin in (store or RecordStore()).all("diffusion"):
        arm, seed = record.results["arm"], record.seed
        if origin == "recorded" and record.config_hash == config_hash(
            config_of(kind, profile, arm, seed, **changes)
        ):
            found[arm][seed] = record
    return {arm: dict(sorted(by_seed.items())) for arm, by_seed in found.items() if by_seed}


def loss(record: Record, split: str) -> float:
    """A run's held-out loss on a split of SPLITS."""
    return record.results["valid"][split]["loss"]


def losses(by_arm: dict[str, dict[int, Record]]) -> pd.DataFrame:
    """A row an arm: held-out losses, their difference from dense over shared seeds, scores; means of seeds.

    Raises ValueError without dense runs.
    """
    if "dense" not in by_arm:
        raise ValueError("there is no dense run to compare with; record arm 'dense'")
    rows = []
    for arm, by_seed in by_arm.items():
        shared = sorted(by_seed.keys() & by_arm["dense"].keys())
        row = {"arm": arm, "seeds": len(by_seed)}
        for split in SPLITS:
            row[split] = float(np.mean([loss(record, split) for record in by_seed.values()]))
            if shared:
                pairs = [[loss(by_arm[a][seed], split) for seed in shared] for a in (arm, "dense")]
                row[f"{split} over dense"] = paired(*pairs)
        for name in ("accuracy", "frechet"):
            row[name] = float(np.mean([r.results["score"][name] for r in by_seed.values()]))
        if shared:
            read = [[by_arm[a][s].results["score"]["accuracy"] for s in shared] for a in (arm, "dense")]
            row["accuracy over dense"] = paired(*read)
        rows.append(row)
    return pd.DataFrame(rows).set_index("arm")


def path(x0: Tensor, noise: Tensor, patch: int, times: Sequence[float] = (0, 0.25, 0.5, 0.75, 1)) -> Figure:
    """A picture [1, H, W] cut into patches, and the straight path to noise at some times."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(times) + 1, figsize=(9.5, 1.9))
    for ax, t in zip(axes, (0, *times), strict=True):
        x = between(x0[None], noise[None], torch.tensor([float(t)]))[0, 0]
        ax.imshow(x, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"t = {t:g}" if ax is not axes[0] else "tokens", fontsize=9)
    side = x0.shape[-1]
    for edge in range(patch, side, patch):
        axes[0].axhline(edge - 0.5, color=figures.PALETTE["control"], lw=0.8)
        axes[0].axvline(edge - 0.5, color=figures.PALETTE["control"], lw=0.8)
    return fig


def gaps(
    by_arm: dict[str, dict[int, Record]], above: Callable[..., dict[str, Stats]], message: str = ""
) -> Figure:
    """Held-out loss minus dense by arm, a panel a split: each seed a dot, their mean a bar.

    A thin line is its interval. Hollow: tokens choose together, which a text would forbid.

    Args:
        above: `diffusion_values.above`, which makes the intervals. message: what the figure shows.
    """
    import matplotlib.pyplot as plt

    losses(by_arm)
    arms = [arm for arm in by_arm if arm != "dense"]
    fig, axes = plt.subplots(1, len(SPLITS), figsize=(9.5, 0.9 + 0.42 * len(arms)), sharex=True, sharey=True)
    for ax, (split, title) in zip(axes, SPLITS.items(), strict=True):
        found = above(by_arm, split)
        for y, arm in enumerate(arms):
            shared = by_arm[arm].keys() & by_arm["dense"].keys()
            ours = [loss(by_arm[arm][s], split) - loss(by_arm["dense"][s], split) for s in sorted(shared)]
            colour = figures.PALETTE[figures.family(arm) if arm != "gelu" else "paper"]
            face = "none" if arm in CHOSEN_TOGETHER else colour
            ax.plot(ours, [y] * len(ours), "o", color=colour, mfc=face, ms=6)
            if ours:
                ax.vlines(np.mean(ours), y - 0.3, y + 0.3, color=colour, lw=2)
            if len(ours) > 1:
                ax.hlines(y, found[arm].low, found[arm].high, color=colour, lw=1)
        ax.axvline(0, color=figures.PALETTE["dense"], lw=1)
        ax.set(title=title, xlabel=f"{LOSS} minus dense", yticks=range(len(arms)))
        ax.margins(y=0.12)
        ax.xaxis.set_major_locator(plt.MaxNLocator(4))
    axes[0].set_yticklabels([LABELS[arm] for arm in arms])
    axes[0].invert_yaxis()
    if message:
        fig.suptitle(message)
    return fig


def apart(by_arm: dict[str, dict[int, Record]], split: str = "poses") -> pd.DataFrame:
    """Held-out loss minus dense, `Stats` of shared seeds: a row an arm, a column a stretch of t, its middle.

    Raises ValueError without dense runs.
    """
    losses(by_arm)
    rows = {}
    for arm, by_seed in by_arm.items():
        if arm != "dense" and (shared := sorted(by_seed.keys() & by_arm["dense"].keys())):
            ours, dense = (zip(*(_curve(by_arm[a][s], split) for s in shared)) for a in (arm, "dense"))
            rows[arm] = [paired(*pair) for pair in zip(ours, dense, strict=True)]
    frame = pd.DataFrame(rows).T
    return frame.set_axis((frame.columns + 0.5) / len(frame.columns), axis=1)


def by_time(
    by_arm: dict[str, dict[int, Record]],
    split: str = "poses",
    message: str = "",
    bands: Sequence[str] = ("venom16", "act24"),
) -> Figure:
    """`apart` as curves: where on the flow's way an arm loses. Hollow: tokens choose together.

    Args:
        message: what the figure shows; it stands above the split's name. bands: arms with their intervals.
    """
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(9.5, 3.5))
    for arm, row in apart(by_arm, split).iterrows():
        look = figures.style(arm) if arm != "gelu" else {"color": figures.PALETTE["paper"], "marker": "P"}
        if arm in CHOSEN_TOGETHER:
            look |= {"mfc": "white", "linestyle": "--"}
        ax.plot(row.index, [gap.mean for gap in row], **({"ms": 5} | look), label=LABELS[arm])
        if arm in bands and row.iloc[0].n > 1:
            ends = zip(*((gap.low, gap.high) for gap in row), strict=True)
            ax.fill_between(row.index, *ends, color=look["color"], alpha=0.15, lw=0)
    ax.axhline(0, color=figures.PALETTE["dense"], lw=1)
    ax.set(xlabel="t, from picture (0) to noise (1)", ylabel=f"{LOSS} minus dense")
    ax.set_title("\n".join(filter(None, (message, SPLITS[split]))))
    fig.legend(loc="outside right upper", fontsize=8)
    return fig


def training(curves: dict[str, Record], message: str = "") -> Figure:
    """Training loss over the steps, a line a record under its name, each point the mean of a stretch.

    Args:
        message: what the figure shows.
    """
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 2.6))
    colours = [figures.PALETTE[name] for name in ("recipe", "dense", "venom", "control")]
    for (name, record), line, colour in zip(curves.items(), figures.LINES, colours, strict=False):
        means = record.results["losses"]
        middles = (np.arange(len(means)) + 0.5) / len(means) * record.config["steps"]
        ax.plot(middles, means, label=name, color=colour, linestyle=line)
    ax.set(xlabel="step", ylabel="training loss (log scale)", yscale="log", title=message)
    low, high = ax.get_ylim()
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2) if low < tick < high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_yticks([], minor=True)
    ax.legend()
    return fig


def samples(records: Sequence[Record], columns: int = 18) -> Figure:
    """The first samples of each record in a row, of equal classes and noise; of clips the middle frame."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(len(records), 1, figsize=(9.5, 0.55 * len(records)), squeeze=False)
    for ax, record in zip(axes[:, 0], records, strict=True):
        pictures = unpack(record.results["samples"])[:columns, 0]
        if pictures.ndim == 4:
            pictures = pictures[:, pictures.shape[1] // 2]
        ax.imshow(np.concatenate(list(pictures), 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(
            LABELS[record.results["arm"]], rotation=0, ha="right", va="center", fontsize=8, labelpad=6
        )
    return fig


def moving(records: Sequence[Record], columns: int = 8, fps: int = 6) -> bytes:
    """An animated GIF, two pixels for one: the clips of each record in a row, after its arm's name.

    Raises ValueError for pictures.
    """
    import tempfile
    from pathlib import Path

    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter

    clips = [unpack(record.results["samples"])[:columns, 0] for record in records]
    if any(clip.ndim != 4 for clip in clips):
        raise ValueError("these records have pictures, which do not move; take records of kind 'video'")
    frames = [
        np.concatenate([np.concatenate(list(c[:, i]), 1) for c in clips], 0) for i in range(clips[0].shape[1])
    ]
    height, width = frames[0].shape
    with plt.rc_context({"figure.constrained_layout.use": False}), tempfile.TemporaryDirectory() as folder:
        fig = plt.figure(figsize=((width + NAMES) / 50, height / 50))
        ax = fig.add_axes((NAMES / (width + NAMES), 0, width / (width + NAMES), 1))
        image = ax.imshow(frames[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.set_axis_off()
        for row, record in enumerate(records):
            at = (NAMES - 3) / (width + NAMES), 1 - (row + 0.5) / len(records)
            fig.text(*at, LABELS[record.results["arm"]], ha="right", va="center", fontsize=8)
        film = FuncAnimation(fig, lambda i: image.set_data(frames[i]), frames=len(frames))
        path = Path(folder) / "clips.gif"
        film.save(path, writer=PillowWriter(fps=fps), dpi=100)
        plt.close(fig)
        return path.read_bytes()


def film(records: Sequence[Record], alt: str, columns: int = 8) -> HTML:
    """The GIF of `moving` for a notebook, also one that is exported; `alt` says it in words.

    Raises ValueError for pictures.
    """
    from html import escape

    from IPython.display import HTML

    data = base64.b64encode(moving(records, columns)).decode()
    return HTML(f'<img alt="{escape(alt)}" src="data:image/gif;base64,{data}">')


def _curve(record: Record, split: str) -> list[float]:
    return record.results["valid"][split]["by_time"]
