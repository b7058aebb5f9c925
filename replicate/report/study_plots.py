"""Pictures that several notebooks share: sparse matrices, groups along a line, arms with their spread."""

import itertools
import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from replicate import figures, study
from replicate.study import statistics

FONT = 9  # size of labels


def draw_matrix(
    ax: Axes, x: Tensor, *, v: int | None = None, m: int = 4, title: str = "", row_labels: Sequence[int] = ()
) -> None:
    """Draw a matrix with zeros white and magnitudes shaded, cut into blocks of v rows x m columns.

    Args:
        x: [R, C]. v: None draws only the column groups.
        row_labels: one number a row, coloured at the left edge, such as the token's cluster.
    """
    rows, cols = x.shape
    shade = x.detach().abs().float().numpy()
    image = np.where(shade == 0, 0.0, 0.25 + 0.75 * shade / (shade.max() or 1.0))
    ax.imshow(image, cmap="Blues", vmin=0, vmax=1.1, aspect="auto", interpolation="nearest")
    for c in range(0, cols + 1, m):
        ax.axvline(c - 0.5, color="0.25", lw=0.8)
    for r in range(0, rows + 1, v or rows):
        ax.axhline(r - 0.5, color="0.25", lw=0.8)
    width = max(1.0, cols / 40)
    for r, label in enumerate(row_labels):
        corner = (-0.5 - 1.4 * width, r - 0.5)
        ax.add_patch(Rectangle(corner, width, 1, color=cluster_colour(label), lw=0, clip_on=False))
    ax.set(xticks=[], yticks=[], title=title)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def draw_blocks(ax: Axes, offsets: Sequence[int], width: int) -> None:
    """Tint what is multiplied: rows offsets[e] to offsets[e + 1] x the `width` columns of each cluster e."""
    for cluster, (start, stop) in enumerate(itertools.pairwise(offsets)):
        corner, colour = (cluster * width - 0.5, start - 0.5), cluster_colour(cluster)
        ax.add_patch(Rectangle(corner, width, stop - start, color=colour, alpha=0.45, lw=0))


def cluster_colour(cluster: int) -> str:
    """A colour for a cluster: six take turns, so that neighbours differ to every eye."""
    return list(figures.PALETTE.values())[1:][cluster % 6]


def draw_intervals(
    ax: Axes,
    rows: Mapping[str, statistics.Stats | None],
    *,
    colour: str | Mapping[str, str] = "C0",
    xlabel: str = "",
    shift: float = 0.0,
    label: str = "ours",
) -> None:
    """One horizontal line a row, first row on top: a dot at the mean, a bar of the interval, empty for None.

    A hollow dot has fewer than three seeds.

    Args:
        colour: of the dots, one for all or one a row. label: of the dots in a legend.
        shift: down, in rows, to draw a second set of numbers for the same rows.
    """
    for i, (name, stats) in enumerate(rows.items()):
        mean, half = (stats.mean, stats.half) if stats else (math.nan, 0)
        c = colour if isinstance(colour, str) else colour[name]
        look = {"fmt": "o", "color": c, "mfc": "w" if stats and stats.n < 3 else c, "capsize": 3, "ms": 6}
        ax.errorbar(mean, i + shift, xerr=half, label=None if i else label, **look)
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))


def label_ends(ax: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """A line's name beside its end, name -> (x, y, colour), as high as it is, but apart from the others'.

    Call it when the axes' limits and scale are final.
    """
    ax.figure.draw_without_rendering()  # else the layout is not done
    low, high = ax.get_ylim()
    turn = ax.transData + ax.transAxes.inverted()
    inside = {name: (x, min(max(y, low), high)) for name, (x, y, _) in ends.items()}
    heights = {name: float(turn.transform(point)[1]) for name, point in inside.items()}
    apart = 1.25 * FONT / 72 / (ax.bbox.height / ax.figure.dpi)
    order = sorted(heights, key=heights.__getitem__)
    places = [heights[name] for name in order]
    for _ in range(100):  # push neighbours apart until none overlap
        for i in range(1, len(places)):
            if (short := apart - (places[i] - places[i - 1])) > 1e-9:
                places[i - 1], places[i] = places[i - 1] - short / 2, places[i] + short / 2
    at = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    for name, place in zip(order, places, strict=True):
        look = {"va": "center", "fontsize": FONT, "color": ends[name][2]}
        ax.annotate(name, (1, place), (4, 0), **at, **look)


def label_points(
    ax: Axes, points: Sequence[tuple[str, float, float]], *, avoid: Sequence[Sequence[Sequence[float]]] = ()
) -> None:
    """A name beside each point (name, x, y), where it covers no other name, no point and no line, if it can.

    Call it when the axes' limits and scale are final. avoid: lines, each by its corners (x, y).
    """
    ax.figure.draw_without_rendering()  # else the layout is not done
    size = np.array([ax.bbox.width, ax.bbox.height]) / ax.figure.dpi * 72
    turn = ax.transData + ax.transAxes.inverted()
    at = [turn.transform(point) * size for _, *point in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in at]
    for line in avoid:
        for one, other in itertools.pairwise(turn.transform(point) * size for point in line):
            for x, y in np.linspace(one, other, 60):
                taken.append((x - 1, y - 1, x + 1, y + 1))
    for (name, *point), (x, y) in zip(points, at, strict=True):
        long, options = 0.56 * FONT * len(name), []
        for dy, dx in itertools.product((3, -5, -14, 14, -24, 25, -35), (7, -7 - long)):
            box = (x + dx, y + dy, x + dx + long, y + dy + FONT)
            outside = _overlap(box, box) - _overlap(box, (0, 0, *size))
            cost = 2 * abs(dy) + 5 * (outside + sum(_overlap(box, other) for other in taken))
            options.append((cost, (dx, dy), box))
        _, place, box = min(options)
        taken.append(box)
        ax.annotate(name, point, place, textcoords="offset points", va="bottom", fontsize=FONT)


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """The area that two boxes (left, bottom, right, top) share."""
    sides = [min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    return max(0.0, sides[0]) * max(0.0, sides[1])


# Table 3's rows, and the arms that may be meant by one, by what the backward pass reads of a 2:4 weight
ROWS: dict[str, dict[str, str]] = {
    "W1": {"whole": "w1", "same": "w1, same"},
    "W1 + W1ᵀ": {"own": "w1+w1t"},
    "W2": {"whole": "w2", "same": "w2, same"},
    "W2 + W2ᵀ": {"own": "w2+w2t"},
    "W1, W2": {"whole": "w1+w2", "same": "w1+w2, same", "own": "w1+w2+t"},
    "2:4 activations": {"own": "act24"},
    "Venom": {"own": "venom16"},
    "the recipe (no row)": {"whole": "recipe", "same": "recipe, same"},
}
_LOOKS = {  # colour, marker, shift within the row, what the legend says
    "whole": ("#D55E00", "s", -0.22, "backward reads the weight whole, as printed"),
    "same": ("#0072B2", "o", 0.0, "backward reads what forward read"),
    "own": ("#444444", "^", 0.22, "nothing to choose (for W1, W2: with transposes)"),
}


def draw_readings(
    ax: Axes, costs: Mapping[str, statistics.Stats], paper: Mapping[str, float], title: str = ""
) -> None:
    """Table 3's rows, each with every arm it may mean: loss above dense, 95 % interval, the paper's number.

    Args:
        costs: arm -> its loss above dense in nats, of what ran. paper: by the first arm of a row.
    """
    for y, arms in enumerate(ROWS.values()):
        for reading, arm in arms.items():
            if arm in costs:
                s, (colour, marker, shift, _) = costs[arm], _LOOKS[reading]
                ax.errorbar(s.mean, y + shift, xerr=s.half, fmt=marker, color=colour, capsize=3, ms=6)
        first = next(iter(arms.values()))
        if first in paper:
            ax.plot([paper[first]] * 2, [y - 0.38, y + 0.38], color="0.1", lw=2.5)
    for colour, marker, _, label in _LOOKS.values():
        ax.plot([], [], marker, color=colour, label=label)
    ax.plot([], [], color="0.1", lw=2.5, label="the paper's Table 3")
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set_xscale("symlog", linthresh=0.02)
    ticks = [0, 0.02, 0.1, 0.5]
    ax.set_xticks(ticks, [f"{tick:g}".lstrip("0") or "0" for tick in ticks], minor=False)
    ax.set_xticks([], minor=True)
    ax.set(yticks=range(len(ROWS)), yticklabels=list(ROWS), ylim=(len(ROWS) - 0.5, -0.5), title=title)


def first_curves(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Training loss of every run (scale -> runs of one seed), a panel for each scale."""
    fig, axes = plt.subplots(1, len(studies), figsize=(max(6.5, 4 * len(studies)), 3), squeeze=False)
    for ax, (scale, runs) in zip(axes[0], studies.items(), strict=True):
        config = study.arms(scale, ["dense"])[0]
        for _, run in runs.iterrows():
            losses = (
                pd.Series(run["record"].results["steps"]["loss"]).rolling(max(5, config.steps // 30)).mean()
            )
            ax.plot(losses.index + 1, losses, color=figures.PALETTE[run["arm"]], label=run["arm"])
        ax.axvline(config.dense_warmup, color="0.5", ls="--", lw=1, label="sparse steps start")
        ax.set(xlabel="step", title=f"{scale} scale, one seed")
    axes[0][0].set_ylabel("training loss (nats a token)")
    axes[0][0].legend()
    return fig
