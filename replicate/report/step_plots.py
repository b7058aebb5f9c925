"""Pictures of the measured training step: depths, parts, Amdahl's law, and loss against speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from replicate.bench import step
from replicate.figures import PALETTE, family, style
from replicate.report import step_table
from replicate.report.layer_tables import NAMES
from replicate.study.records import Record
from replicate.study.statistics import Stats
from replicate.training import flops

PART_COLOURS = {
    "attention": PALETTE["2:4 weights"],
    "ffn": PALETTE["recipe"],
    "head and loss": PALETTE["2:4 activations"],
    "optimiser": "#7a5195",
    "rest": "0.45",
}
STEP_AXIS = "a step: times as fast as dense"


def draw_depths(ax: Axes, record: Record, arms: Sequence[str]) -> None:
    """Milliseconds of a step at the depths that were timed, with the line that composes the whole model.

    Raises ValueError for a record of the whole model, which has no line.
    """
    layers, times = record.config["layers"], step.step_times(record)
    if "layer_ms" not in times[arms[0]]:
        preset = record.config["preset"]
        raise ValueError(f"{preset} was timed whole, at {layers} layers; nothing is composed")
    ends = np.array([0, max(layers) + 1])
    for arm in arms:
        look, row = style(arm), times[arm]
        ms = [record.results["depths"][str(depth)]["ms"][arm]["ms"] for depth in layers]
        ax.plot(ends, row["base_ms"] + row["layer_ms"] * ends, **{**look, "marker": ""}, lw=1.2)
        ax.plot(layers, ms, look["marker"], color=look["color"], ms=7)
        ax.plot([], [], **look, ms=7, lw=1.2, label=NAMES[arm])
    ax.set(xlabel="layers", ylabel="ms a step", ylim=(0, None), xlim=(0, ends[-1]))


def draw_speeds(ax: Axes, speeds: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> None:
    """Horizontal bars from 1 (dense) to how many times as fast a step is: model -> arm -> times as fast."""
    height = 0.8 / len(speeds)
    names = list(next(iter(speeds.values())))
    for i, (model, found) in enumerate(speeds.items()):
        at = np.arange(len(names)) + (i - (len(speeds) - 1) / 2) * height
        gains = np.array([found[name] - 1 for name in names])
        ax.barh(at, gains, height * 0.9, left=1, color=colours[model], label=model, zorder=2)
        for y, gain in zip(at, gains, strict=True):
            box = {"fc": "white", "ec": "none", "pad": 0.8, "alpha": 0.8}
            ax.text(1.012 + max(gain, 0), y, f"{1 + gain:.2f}", va="center", fontsize=9, bbox=box, zorder=3)
    ax.set_yticks(range(len(names)), [NAMES[name] for name in names])
    ax.set(ylim=(len(names) - 0.5, -0.5), xlabel=STEP_AXIS)
    ax.grid(False, axis="y")


def draw_widths(ax: Axes, found: pd.DataFrame, arms: Sequence[str]) -> None:
    """`step_table.widths`: times as fast as dense by d_model, as one CUDA graph and, faint, as launched."""
    for arm in arms:
        part, look = found[found["arm"] == arm], style(arm)
        ax.plot(part["d_model"], part["x"], **look, ms=7, lw=1.6, label=NAMES[arm])
        ax.plot(part["d_model"], part["x launched"], look["marker"], ls=":", color=look["color"], alpha=0.45)
    ax.axhline(1, color=PALETTE["dense"], lw=1.2)
    ax.plot([], [], ":", color="0.5", label="launched kernel by kernel")
    sizes = found.drop_duplicates("d_model")
    labels = [f"{row.d_model}\n{step_table.size(row.parameters)}" for row in sizes.itertuples()]
    ax.set(xscale="log", xlabel="d_model, and parameters of the model", ylabel=STEP_AXIS)
    ax.set_xticks(sizes["d_model"], labels, minor=False)
    ax.set_xticks([], minor=True)


def draw_parts(ax: Axes, record: Record, arms: Sequence[str]) -> None:
    """A step of the dense model and of sparse arms in their parts, and a line: an FFN that costs nothing.

    Parts shorter than 4.5 % of their step get no number.
    """
    found = pd.DataFrame(step_table.parts(record)).set_index("arm").loc[["dense", *arms]]
    steps, whole = found["step"], found.loc["dense", "step"]
    parts = found[list(PART_COLOURS)].clip(lower=0).rename(columns={"ffn": "FFN"})
    parts.plot.barh(ax=ax, stacked=True, width=0.7, color=list(PART_COLOURS.values()), legend=False)
    for bars, part in zip(ax.containers, parts, strict=True):
        shares = [f"{x:.0%}" if x >= 0.045 else "" for x in parts[part] / steps]
        ax.bar_label(bars, shares, label_type="center", color="white", fontsize=9)
    for y, end in enumerate(parts.sum(axis=1)):
        ax.text(end + 0.01 * whole, y, f"{steps.iloc[y]:.0f} ms", va="center", fontsize=9)
    free = whole - found.loc["dense", "ffn"]
    ax.plot([free, free], [0.4, len(arms) + 0.5], "--", color="0.1", lw=1.3, label="were the FFN free")
    ax.set_yticks(range(len(arms) + 1), ["dense", *(NAMES[arm] for arm in arms)])
    ax.set(ylim=(len(arms) + 0.5, -0.5), xlim=(0, 1.14 * whole), xlabel="milliseconds a step", ylabel="")
    ax.grid(False, axis="y")


def draw_amdahl(
    ax: Axes,
    shares: Mapping[str, float],
    points: Mapping[str, Mapping[str, tuple[float, float]]],
    markers: Mapping[str, str],
) -> None:
    """Amdahl's law, step = 1 / (1 - r + r / s), a curve a share r, with measured layers and steps on it.

    Args:
        shares: curve's name -> r. points: name -> arm -> (layer, step), times as fast as dense.
        markers: by name; a curve without one is the paper's.
    """
    ticks = (1, 1.5, 2, 3, 4, 6, 8, 12)
    s = np.geomspace(1, ticks[-1], 200)
    for name, r in shares.items():
        line, colour = ("-", "0.25") if name in markers else ("--", PALETTE["paper"])
        ax.plot(s, [flops.run_speedup(r, x) for x in s], line, color=colour, lw=1.3, zorder=1)
        end = (ticks[-1], flops.run_speedup(r, ticks[-1]))
        look = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": colour}
        ax.annotate(f"{name}\nr = {r:.2f}", end, xytext=(5, 0), **look)
    for name, found in points.items():
        for arm, at in found.items():
            ax.plot(*at, markers[name], color=PALETTE[family(arm)], ms=8, mec="white", zorder=3)
    ax.set(xscale="log", xlim=(1, ticks[-1]), ylim=(1, None))
    ax.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
    ax.set_xticks([], minor=True)
    ax.set(xlabel="the FFN layer: times as fast as dense", ylabel=STEP_AXIS)


def draw_frontier(
    ax: Axes,
    points: Mapping[str, tuple[float, Stats, str]],
    early: tuple[np.ndarray, np.ndarray],
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Loss above dense over a run's speed-up, with the line of a dense run that is stopped early.

    Args:
        points: label -> (times as fast, loss above dense, sparsity preset). early: from `stopped_early`.
        ranges: label -> least and greatest times as fast, the timing's error, as a horizontal bar.
    """
    ax.plot(*early, "-", color=PALETTE["dense"], lw=1.6, label="dense, stopped early")
    for label, (speed, gap, preset) in points.items():
        look, half = style(preset), (gap.high - gap.low) / 2
        low, high = (ranges or {}).get(label, (speed, speed))
        bars = {"yerr": half, "xerr": [[speed - low], [high - speed]] if ranges else None}
        ax.errorbar(speed, gap.mean, **bars, fmt=look["marker"], color=look["color"], ms=7, capsize=3)
        box = {"fc": "white", "ec": "none", "pad": 0.6, "alpha": 0.85}
        at = {"xytext": (8, -3), "textcoords": "offset points", "fontsize": 9}
        ax.annotate(label, (high, gap.mean), **at, bbox=box, zorder=1)
    ax.plot(1, 0, "o", color=PALETTE["dense"], ms=7)
    fastest, highest = (max(x) for x in zip(*((speed, gap.high) for speed, gap, _ in points.values())))
    ax.set(xlim=(0.98, 1.02 + 1.28 * (fastest - 1)), ylim=(-0.02 * highest / 0.15, 1.12 * highest))
    ax.set_xlabel("a run: times as fast as dense, measured")
