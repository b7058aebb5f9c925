"""Pictures of the measured training step: depths, parts, Amdahl's law, accounts of a run, loss and speed."""

from collections.abc import Collection, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from replicate import paper
from replicate.bench import step
from replicate.figures import PALETTE, family, style
from replicate.report import step_table
from replicate.report.layer_plots import OPAQUE
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
    gaps = [[y - 0.65, y - 0.35, np.nan] for y in range(1, len(arms) + 2)]  # between bars, not over numbers
    ax.plot([free] * np.size(gaps), np.ravel(gaps), color="0.1", lw=2, label="were the FFN free")
    ax.set_yticks(range(len(arms) + 1), ["dense", *(NAMES[arm] for arm in arms)])
    ax.set(ylim=(len(arms) + 0.65, -0.5), xlim=(0, 1.14 * whole), xlabel="milliseconds a step", ylabel="")
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
        ax.annotate(f"{name}: r = {r:.2f}", end, xytext=(5, 0), **look)
    for name, found in points.items():
        for arm, at in found.items():
            ax.plot(*at, markers[name], color=PALETTE[family(arm)], ms=8, mec="white", zorder=3)
    ax.set(xscale="log", xlim=(1, ticks[-1]), ylim=(1, None))
    ax.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
    ax.set_xticks([], minor=True)
    ax.set(xlabel="the FFN layer: times as fast as dense (logarithmic)", ylabel=STEP_AXIS)


def draw_frontier(
    ax: Axes,
    points: Mapping[str, tuple[float, Stats, str]],
    early: tuple[np.ndarray, np.ndarray],
    ranges: Mapping[str, tuple[float, float]] | None = None,
    left: Collection[str] = (),
) -> None:
    """Loss above dense over a run's speed-up, with the line of a dense run that is stopped early.

    Args:
        points: label -> (times as fast, loss above dense, sparsity preset). early: from `stopped_early`.
        ranges: label -> least and greatest times as fast, the timing's error, as a horizontal bar.
        left: labels that stand left of their point.
    """
    ax.plot(*early, "-", color=PALETTE["dense"], lw=1.6, label="dense, stopped early")
    for label, (speed, gap, preset) in points.items():
        look = style(preset)
        low, high = (ranges or {}).get(label, (speed, speed))
        bars = {"yerr": gap.half, "xerr": [[speed - low], [high - speed]] if ranges else None}
        ax.errorbar(speed, gap.mean, **bars, fmt=look["marker"], color=look["color"], ms=7, capsize=3)
        box = {"fc": "white", "ec": "none", "pad": 0.6, "alpha": 0.85}
        at = {"xytext": (-8, -3), "ha": "right"} if label in left else {"xytext": (8, -3)}
        at |= {"textcoords": "offset points", "fontsize": 9}
        place = low if label in left else high
        ax.annotate(label, (place, gap.mean), **at, bbox=box, zorder=1)
    ax.plot(1, 0, "o", color=PALETTE["dense"], ms=7)
    fastest, highest = (max(x) for x in zip(*((speed, gap.high) for speed, gap, _ in points.values())))
    ax.set(xlim=(0.98, 1.02 + 1.28 * (fastest - 1)), ylim=(-0.02 * highest / 0.15, 1.12 * highest))
    ax.set_xlabel("a run: times as fast as dense, measured")


def steps(records: Mapping[str, Record]) -> Figure:
    """The 7B model's step by depth, and the speed of every sparse step; records: "1B" and "7B" -> step."""
    fig, (depths, speeds) = plt.subplots(1, 2, figsize=(13, 4.8), width_ratios=(1, 1.3))
    draw_depths(depths, records["7B"], ("dense", "recipe", "venom16", "venom64"))
    depths.set_title("7B: a straight line in the depth")
    depths.legend(fontsize=9, loc="lower right", **OPAQUE)
    colours = {"1B": PALETTE["control"], "7B": PALETTE["2:4 weights"]}
    draw_speeds(speeds, step_table.sparse_speeds(records), colours)
    text = paper.number("step_speedup_text")
    speeds.axvspan(*paper.number("headline"), color=PALETTE["paper"], alpha=0.25, lw=0, zorder=0)
    speeds.axvline(text, color=PALETTE["paper"], ls="--")
    look = {"fontsize": 9, "color": "0.25", "va": "bottom"}
    speeds.text(1.55, 6.9, "the paper:\na whole run", ha="center", **look)
    speeds.text(text - 0.01, 6.9, f"the paper:\na sparse step, {text}", ha="right", **look)
    speeds.set(xlim=(1, 2.45), title=f"A sparse step, measured: {text} is far")
    speeds.legend(fontsize=9, loc="lower right", **OPAQUE)
    return fig


def parts(records: Mapping[str, Record]) -> Figure:
    """The parts of a dense step and of three sparse ones, model by model."""
    fig, axes = plt.subplots(len(records), 1, figsize=(11, 5.8))
    for ax, (label, record) in zip(axes, records.items(), strict=True):
        draw_parts(ax, record, ("recipe", "venom16", "venom64"))
        dense = next(part for part in step_table.parts(record) if part["arm"] == "dense")
        left = dense["step"] - dense["ffn"]
        ax.set_title(f"{label}: a dense step whose FFN took no time would still take {left:.0f} ms")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return fig


def amdahl(records: Mapping[str, Record]) -> Figure:
    """Amdahl's law by the paper's share and the measured ones, and every format's layer and step on it."""
    shares = {label: row["time, measured"] for label, row in step_table.shares(records).iterrows()}
    shares = {"the paper": step_table.shares(records).iloc[0, 0]} | shares
    speeds, layers = step_table.sparse_speeds(records), step_table.layer_speeds(records)
    points = {}
    for model, found in speeds.items():  # algorithms 1, 2 last: over the others
        arms = sorted(found, key=lambda arm: arm.startswith("recipe"))
        points[model] = {arm: (layers[model][arm], found[arm]) for arm in arms}
    markers = dict(zip(records, "os", strict=True))
    fig, ax = plt.subplots(figsize=(9.5, 5))
    draw_amdahl(ax, shares, points, markers)
    for label, marker in markers.items():
        ax.plot([], [], marker, color="0.4", label=f"measured, {label} shapes")
    kinds = {"venom": "figure 4d (4 of 16, 32, 64)", "recipe": "algorithms 1, 2 (the same)"}
    kinds |= {"2:4 activations": "2:4 activations", family("active16"): "clusters by activations"}
    for kind, name in kinds.items():
        ax.plot([], [], "P", color=PALETTE[kind], label=name)
    far, near = points["7B"]["venom64"]
    ax.set_title(f"A layer {far:.1f} times as fast makes a step {near:.1f} times as fast")
    ax.legend(fontsize=9, loc="upper left", **OPAQUE)
    return fig


def three_ways(records: Mapping[str, Record]) -> Figure:
    """A run's speed-up over its share of sparse steps, by the paper, corrected and measured."""
    looks = {  # format, way -> colour, marker and line
        ("recipe", "paper"): (PALETTE["paper"], "o--"),
        ("recipe", "corrected"): (PALETTE["control"], "s-."),
        ("recipe", "measured"): (PALETTE["recipe"], "D-"),
        ("venom16", "measured"): (PALETTE["venom"], "^:"),
    }
    mixes, table4 = step_table.mixes(), step_table.table4_mixes()
    fig, axes = plt.subplots(1, len(records), figsize=(12, 4.6), sharey=True)
    for ax, (label, record) in zip(axes, records.items(), strict=True):
        runs = {(row["arm"], row["way"]): row for row in step_table.runs(record)}
        for (arm, way), (colour, look) in looks.items():
            values = [1, *(runs[arm, way][mix] for mix in table4)]
            name = way if arm == "recipe" else f"{way}, figure 4d"
            ax.plot([0, *(100 * mixes[mix] for mix in table4)], values, look, color=colour, label=name)
        ax.axhspan(*paper.number("headline"), color=PALETTE["paper"], alpha=0.2, lw=0, zorder=0)
        ax.set(title=f"{label}: the clock says less than either count", xlabel="sparse steps (%)")
        ax.set_xticks([0, *(round(100 * mixes[mix]) for mix in table4)])
    axes[0].set_ylabel("a run: times as fast as dense")
    axes[-1].text(2, 1.66, "the abstract: {} to {}".format(*paper.number("headline")), fontsize=9, va="top")
    title = "algorithms 1, 2, 4 of 16, by"
    axes[0].legend(fontsize=9, loc="upper left", title=title, title_fontsize=9, **OPAQUE)
    return fig


def loss_and_time(
    panels: Mapping[str, Mapping[str, tuple[float, Stats, str]]],
    early: tuple[np.ndarray, np.ndarray],
    model: str,
    ranges: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> Figure:
    """`draw_frontier` at the speeds of each model (label -> points); model: whose losses they are.

    ranges: by model, see `time_to_loss.ranges`.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(13, 4.8), sharey=True)
    for ax, (label, points) in zip(axes, panels.items(), strict=True):
        above = [name for name, (x, gap, _) in points.items() if gap.mean > np.interp(x, *early)]
        draw_frontier(ax, points, early, (ranges or {}).get(label), above)
        ax.set_xlim(0.94, None)
        ax.set_title(f"{label} speeds: below the line is better than stopping early")
    axes[0].set_ylabel(f"held-out loss above dense (nats)\n{model} model")
    axes[0].legend(fontsize=9, loc="upper left", **OPAQUE)
    return fig


def widths(found: pd.DataFrame) -> Figure:
    """`step_table.widths`: times as fast as dense by d_model, as one CUDA graph and, faint, as launched."""
    fig, ax = plt.subplots(figsize=(9.5, 4.8))
    for arm in step_table.AT_WIDTHS:
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
    graph = max(step_table.pays_from(found, arm) for arm in step_table.AT_WIDTHS)
    launched = [step_table.pays_from(found, arm, "x launched") for arm in step_table.AT_WIDTHS]
    low, high = min(launched), max(launched)
    ax.set_title(f"A sparse step pays from d_model {graph} on; launched, from {low} or {high}")
    ax.legend(fontsize=9, loc="upper left", **OPAQUE)
    return fig
