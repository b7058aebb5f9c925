"""Pictures of the kernels: times and speed-ups, a roofline, cuSPARSELt's metadata layout, a kernel's text."""

import inspect
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from replicate.figures import PALETTE
from replicate.kernels.two_four.compressed24 import TILE, metadata_position
from replicate.report import kernel_tables
from replicate.study.records import Record

# Data sheet of the H100 and H200 SXM, TFLOP/s of bf16 products; a sparse operand doubles it.
PEAK_DENSE, PEAK_SPARSE = 989.0, 1979.0
KINDS = {  # of a roofline's points: label, colour, marker
    "dense": ("cuBLAS product", PALETTE["dense"], "o"),
    "2:4": ("2:4 product (FLOPs of the dense one)", PALETTE["2:4 weights"], "s"),
    "pass": ("our pass over memory", PALETTE["2:4 activations"], "D"),
    "torch": ("copies, torch's eager relu^2", PALETTE["control"], "o"),
    "compressor": ("torch's compressor", PALETTE["recipe"], "X"),
}
STAGES = ("2:4 weights", "control", "2:4 activations", "venom", "recipe", "paper")
STAGE_COLOURS = [PALETTE[name] for name in STAGES]
LAYER_COLOURS = {  # of `ffn_bench.STAGES`, in their order
    "weight refresh": PALETTE["2:4 activations"],
    "routing and lists": PALETTE["paper"],
    "FP8 rounding": PALETTE["venom"],
    "Venom products": PALETTE["recipe"],
    "2:4 products": PALETTE["2:4 weights"],
    "dense products": PALETTE["dense"],
    "element-wise": PALETTE["control"],
}


def excerpt(kernel: Any, start: str | None = None, stop: str | None = None) -> str:
    """Lines of a function's or kernel's own source as Markdown: from the first with `start` to the next with
    `stop`; None is the beginning, or the end. Raises ValueError if a text is not there.
    """
    lines = inspect.getsource(getattr(kernel, "fn", kernel)).rstrip().splitlines()

    def find(text: str, first: int) -> int:
        for i, line in enumerate(lines[first:], first):
            if text in line:
                return i
        raise ValueError(f"no line from {first} on has {text!r}")

    first = find(start, 0) if start else 0
    last = find(stop, first) if stop else len(lines) - 1
    return "```python\n" + textwrap.dedent("\n".join(lines[first : last + 1])) + "\n```"


def figure6(row: pd.Series) -> Figure:
    """Figure 6's product: dense, and in 2:4 with four ways to pay for the conversion."""
    ways = {"dense, by cuBLAS": {"product": row["dense_ms"], "conversion": 0.0}}
    conversions = {
        "torch's conversion": row["eager_ms"],
        "our conversion": row["convert_ms"],
        "ours, shared by 8 products": row["convert_ms"] / 8,
        "no conversion": 0.0,
    }
    for how, ms in conversions.items():
        ways[f"2:4, {how}"] = {"product": row["sparse_ms"], "conversion": ms}
    fig, ax = plt.subplots(figsize=(9, 3.3))
    draw_stacks(ax, ways, [PALETTE["2:4 weights"], PALETTE["recipe"]], least=0.05)
    ax.axvline(row["dense_ms"] / 1.5, color=PALETTE["paper"], ls="--", lw=2, label="the paper's 1.5x")
    ax.set_title("Figure 6, (m, n, k) = (4096, 16384, 4096): the conversion decides")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return fig


def roofline(record: Record) -> Figure:
    """Every recorded product and pass under the roof: a copy's bandwidth and the data sheet's peaks."""
    points, bandwidth = kernel_tables.intensities(record), kernel_tables.bandwidth(record)
    fig, ax = plt.subplots(figsize=(8.5, 4.3))
    x = np.geomspace(0.5, 8000, 400)
    for peak, name, style in ((PEAK_DENSE, "dense", "-"), (PEAK_SPARSE, "2:4", "--")):
        ax.loglog(x, np.minimum(peak, bandwidth * x), style, color="0.55", lw=1.4)
        ax.text(8600, peak, f"{name}: {peak:.0f}", va="center", fontsize=8, color="0.35")
    ax.text(1.3, 9.5, f"copy: {bandwidth:.2f} TB/s", rotation=33, fontsize=8, color="0.35")
    for kind, (label, colour, marker) in KINDS.items():
        x, y = zip(*((p["x"], p["y"]) for p in points if p["kind"] == kind), strict=True)
        ax.plot(x, y, marker, color=colour, ms=6, alpha=0.8, label=label)
    ridge = PEAK_DENSE / bandwidth
    ax.axvline(ridge, color="0.8", lw=1)
    for place, side, word in ((0.9, "right", "memory"), (1.1, "left", "compute")):
        ax.text(ridge * place, 0.13, f"{word}-bound", ha=side, fontsize=9, color="0.35")
    ax.set(xlabel="FLOPs for each byte that must move", ylabel="TFLOP/s", xlim=(0.5, 8000), ylim=(0.08, 4000))
    ax.legend(loc="center right", bbox_to_anchor=(1, 0.42), fontsize=8)
    ax.set_title("Passes are limited by memory, products by arithmetic")
    return fig


def bounds(m: int, n: int, k: int, bandwidth: float) -> Figure:
    """The least time that a product's FLOPs and its bytes take, dense and with a 2:4 operand, as bars."""
    fig, ax = plt.subplots(figsize=(8, 2.8))
    sides = {"dense": (PEAK_DENSE, False), "2:4": (PEAK_SPARSE, True)}
    bars, least = {}, {}
    for side, (peak, sparse) in sides.items():
        flops, moved = kernel_tables.work(m, n, k, sparse=sparse)
        bars[f"{side}: compute"] = 1e6 * flops / (1e12 * peak)
        bars[f"{side}: move bytes"] = 1e6 * moved / (1e12 * bandwidth)
        least[side] = max(list(bars.values())[-2:])
    dense_flops, dense_bytes = kernel_tables.work(m, n, k)
    colours = [PALETTE["2:4 weights"], PALETTE["venom"]] * 2
    ax.bar_label(ax.barh(list(bars), list(bars.values()), color=colours), fmt="{:,.3g} µs", padding=3)
    ax.set(ylim=(3.5, -0.5), xlim=(0, 1.18 * max(bars.values())), xlabel="least time (µs)")
    gain = least["dense"] / least["2:4"]
    title = f"[{m}, {k}] x [{k}, {n}]: {dense_flops / dense_bytes:,.0f} FLOPs a byte"
    ax.set_title(f"{title},\n2:4 at most {gain:.2f} times as fast")
    ax.grid(False, axis="y")
    return fig


def metadata() -> Figure:
    """cuSPARSELt's metadata on Hopper, from a group of four to a tile of 64 x 64."""
    layout = [["tile", "group"], ["tile", "word"]]
    fig, axes = plt.subplot_mosaic(layout, figsize=(11, 7.4), width_ratios=[1, 1.8], height_ratios=[0.8, 1])
    draw_metadata_tile(axes["tile"])
    draw_group(axes["group"], [3, -1, 2, -4])
    draw_metadata_word(axes["word"])
    return fig


def tiles(tile: np.ndarray, by_rows: np.ndarray, by_tile: np.ndarray) -> Figure:
    """A 4 x 4 tile with what two of each row keep, and what two of each row and column keep."""
    fig, axes = plt.subplots(1, 2, figsize=(7.5, 3.3))
    titles = ("two of each row", "two of each row and column")
    for ax, kept, title in zip(axes, (by_rows, by_tile), titles, strict=True):
        draw_tile(ax, tile, kept)
        ax.set_title(f"{title}:\nkept sum: {tile[kept].sum():g} of {tile.sum():g}")
    return fig


def where_it_pays(record: Record) -> Figure:
    """Speed-up of 2:4 over the size of a product, and over how many products share one conversion."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    frame, row = kernel_tables.sweep(record), kernel_tables.figure6(record)
    series = {
        "speedup": ("product alone", "2:4 weights", "s"),
        "speedup_with_conversion": ("with our conversion", "2:4 activations", "D"),
        "with eager conversion": ("with torch's conversion", "recipe", "X"),
    }
    for column, (label, colour, marker) in series.items():
        left.plot(range(len(frame)), frame[column], color=PALETTE[colour], marker=marker, label=label)
        text = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": PALETTE[colour]}
        for x, value in enumerate(frame[column]):
            left.annotate(f"{value:.2f}", (x, value), (0, 6 if column == "speedup" else -13), **text)
    left.axhline(1, color=PALETTE["dense"], lw=1)
    labels = [f"{m}\n{n}\n{k}" for m, n, k in zip(frame["m"], frame["n"], frame["k"], strict=True)]
    left.set_xticks(range(len(frame)), labels)
    left.set(xlabel="m, n, k (least work first)", ylabel="speed-up over cuBLAS")
    left.set(title="Larger products gain more", xlim=(-0.4, len(frame) - 0.6), ylim=(0.1, 1.95))
    left.legend(loc="upper left", ncols=2, fontsize=8.5)
    times = np.arange(1, 65)
    arms = {"convert_ms": ("our pass", "2:4 activations"), "eager_ms": ("torch, eager", "recipe")}
    for key, (label, colour) in arms.items():
        gains = kernel_tables.amortised(row, key, times)
        right.semilogx(times, gains, color=PALETTE[colour], label=f"conversion by {label}", base=2)
    right.axhline(row["speedup"], color=PALETTE["2:4 weights"], ls=":", label="product alone")
    right.axhline(1, color=PALETTE["dense"], lw=1)
    right.set(xlabel="products that share one conversion", ylabel="speed-up over cuBLAS")
    right.set_xticks(2 ** np.arange(7), [str(2**i) for i in range(7)])
    right.set_title("Figure 6's product: sharing a conversion")
    right.legend(loc="lower right", fontsize=8.5)
    return fig


def draw_bars(ax: Axes, groups: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> None:
    """Grouped bars with their numbers on top: group (a place on the x-axis) -> series -> height."""
    width = 0.84 / len(colours)
    for i, (series, colour) in enumerate(colours.items()):
        at = np.arange(len(groups)) + (i - (len(colours) - 1) / 2) * width
        heights = [group.get(series, np.nan) for group in groups.values()]
        bars = ax.bar(at, heights, width * 0.92, color=colour, label=series, edgecolor="white")
        numbers = ["" if np.isnan(height) else kernel_tables.digits3(height) for height in heights]
        ax.bar_label(bars, numbers, fontsize=8, padding=1)
    ax.set_xticks(range(len(groups)), list(groups))
    ax.grid(False, axis="x")


def draw_stacks(
    ax: Axes, stacks: Mapping[str, Mapping[str, float]], colours: Sequence[str], *, least: float = 0.0
) -> None:
    """Horizontal stacked bars, bar -> stage -> milliseconds, first bar on top.

    Args:
        least: stages shorter than this share of the longest bar get no number.
    """
    frame = pd.DataFrame(stacks).T
    totals = frame.sum(axis=1)
    longest = totals.max()
    look = {"stacked": True, "width": 0.62, "edgecolor": "white", "legend": False}
    frame.plot.barh(ax=ax, color=list(colours)[: len(frame.columns)], **look)
    for bars, stage, colour in zip(ax.containers, frame.columns, colours, strict=False):
        numbers = [kernel_tables.digits3(ms) if ms > least * longest else "" for ms in frame[stage]]
        ink = "black" if np.dot(to_rgb(colour), (0.3, 0.59, 0.11)) > 0.5 else "white"
        ax.bar_label(bars, numbers, label_type="center", color=ink, fontsize=9)
    for y, total in enumerate(totals):
        ax.text(total + 0.025 * longest, y, f"{kernel_tables.digits3(total)} ms", va="center", fontsize=9)
    ax.set(xlabel="milliseconds", xlim=(0, 1.15 * longest), ylim=(len(stacks) - 0.5, -0.5))
    ax.grid(False, axis="y")


def draw_rows(
    ax: Axes,
    rows: Mapping[str, Mapping[str, float]],
    colours: Mapping[str, str],
    marks: Mapping[str, float],
    mark: str,
) -> None:
    """Grouped horizontal bars, row -> series -> length, with their numbers, first row on top.

    Args:
        marks: row -> a number to compare with, drawn as a diamond; `mark` is its name in the legend.
    """
    height = 0.8 / len(colours)
    longest = max(*marks.values(), *(max(row.values()) for row in rows.values()))
    for i, (series, colour) in enumerate(colours.items()):
        at = np.arange(len(rows)) + (i - (len(colours) - 1) / 2) * height
        lengths = [row[series] for row in rows.values()]
        ax.barh(at, lengths, height * 0.92, color=colour, label=series)
        for y, length, row in zip(at, lengths, rows, strict=True):
            other = marks.get(row, 0)
            hidden = -0.02 < (other - length) / longest < 0.08  # the number would be under the diamond
            text = {"va": "center", "fontsize": 9, "bbox": {"fc": "white", "ec": "none", "pad": 0.6}}
            ax.text(max(length, hidden * other) + 0.015 * longest, y, f"{length:.2f}", **text)
    if at := [y for y, row in enumerate(rows) if row in marks]:
        style = {"color": PALETTE["paper"], "edgecolor": "black", "lw": 0.6, "zorder": 3}
        ax.scatter([marks[row] for row in rows if row in marks], at, 55, marker="D", label=mark, **style)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(ylim=(len(rows) - 0.45, -0.55), xlim=(0, 1.12 * longest))
    ax.grid(False, axis="y")


def _cell(ax: Axes, x: float, y: float, height: float, colour: str, text: str, **look: str) -> None:
    ax.add_patch(Rectangle((x, y), 0.94, height, color=colour, alpha=0.6, lw=0))
    ax.text(x + 0.47, y + height / 2, text, ha="center", va="center", fontsize=11, **look)


def draw_tile(ax: Axes, values: np.ndarray, kept: np.ndarray) -> None:
    """A small matrix, its kept elements coloured, with how many are kept of each row and column."""
    rows, cols = values.shape
    for r, c in np.ndindex(rows, cols):
        colour = PALETTE["2:4 activations"] if kept[r, c] else "0.85"
        _cell(ax, c, r, 0.94, colour, f"{values[r, c]:g}")
    places = [(cols + 0.4, r + 0.47) for r in range(rows)] + [(c + 0.47, rows + 0.4) for c in range(cols)]
    for place, n in zip(places, [*kept.sum(1), *kept.sum(0)], strict=True):
        look = {"color": "0.35", "fontsize": 10, "weight": "normal" if n <= 2 else "bold"}
        ax.text(*place, str(n), ha="center", va="center", **look)
    ax.set(xlim=(-0.1, cols + 0.8), ylim=(rows + 0.8, -0.1), aspect="equal")
    ax.axis("off")


def draw_metadata_tile(ax: Axes) -> None:
    """One metadata tile, 64 rows x 16 groups: the order of its 64-bit words, by colour and number."""
    word = (metadata_position(TILE, TILE) // 16).numpy()
    ax.imshow(word, cmap="viridis", aspect="auto", interpolation="nearest", vmin=0, vmax=63)
    for r, half in itertools.product(range(TILE), (0, 8)):
        look = {"fontsize": 6.5, "color": "white" if word[r, half] < 40 else "black"}
        ax.text(half + 3.5, r, str(word[r, half]), ha="center", va="center_baseline", **look)
    for r in range(0, TILE, 8):
        ax.axhline(r - 0.5, color="white", lw=1.6 if r % 16 == 0 else 0.5)
    ax.axvline(7.5, color="white", lw=1.6)
    ax.set(xlabel="group of four columns", ylabel="row", xticks=range(0, 16, 2), yticks=range(0, TILE, 8))
    ax.set_title("a tile of 64 rows x 64 columns:\nwhich 64-bit word holds which groups")
    ax.grid(False)


def draw_metadata_word(ax: Axes) -> None:
    """One 64-bit word: rows r and r + 8, eight groups; the byte and the nibble of each group."""
    place = metadata_position(TILE, TILE).numpy()[[0, 8], :8]
    colours = [*STAGE_COLOURS, "#7f7f7f", "#b08d57"]
    for (i, g), nibble in np.ndenumerate(place):
        byte, high = divmod(int(nibble), 2)
        ax.add_patch(Rectangle((g - 0.5, i - 0.5), 1, 1, color=colours[byte], alpha=0.45, lw=0))
        ax.add_patch(Rectangle((g - 0.5, i - 0.5), 1, 1, fill=False, ec="white", lw=2))
        ax.text(g, i, f"byte {byte}\n{('low', 'high')[high]}", ha="center", va="center", fontsize=8.5)
    ax.set(xlim=(-0.5, 7.5), ylim=(1.5, -0.5), xticks=range(8), xlabel="group of four columns")
    ax.set_yticks([0, 1], ["row r", "row r+8"])
    ax.set_title("one word: 16 nibbles; the two rows share bytes")
    ax.grid(False)
    ax.spines[:].set_visible(False)


def draw_group(ax: Axes, group: Sequence[float]) -> None:
    """One group of four: the two kept values, their positions i0 < i1, and the nibble i0 | i1 << 2."""
    order = sorted(sorted(range(4), key=lambda i: -abs(group[i]))[:2])
    colours = dict(zip(order, (PALETTE["2:4 weights"], PALETTE["venom"])))
    for i, value in enumerate(group):
        _cell(ax, i, 0, 0.9, colours.get(i, "0.88"), f"{value:g}")
        ax.text(i + 0.47, -0.12, f"{i} = {i:02b}", ha="center", va="top", fontsize=8, color="0.35")
    for x, i in ((5.2, order[0]), (6.2, order[1])):
        _cell(ax, x, 0, 0.9, colours[i], f"{group[i]:g}")
    for x, i in ((8.4, order[1]), (9.4, order[0])):
        _cell(ax, x, 0, 0.9, colours[i], f"{i:02b}", family="monospace")
    ax.annotate("", (5.1, 0.45), (4.1, 0.45), arrowprops={"arrowstyle": "->"})
    heads = {2: "a group of four", 6.2: "stored values", 9.35: f"nibble i1, i0 = {order[0] | order[1] << 2}"}
    for x, text in heads.items():
        ax.text(x, 1.05, text, ha="center", fontsize=9)
    ax.set(xlim=(-0.1, 10.5), ylim=(-0.5, 1.5))
    ax.set_title("one group: two values and one nibble")
    ax.axis("off")
