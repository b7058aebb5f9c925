"""Pictures of the paper's arithmetic: where FLOPs go, Amdahl's law, what is printed and what follows."""

import math
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from replicate import figures
from replicate.training import flops

_PAPER, _OURS = figures.PALETTE["paper"], figures.PALETTE["recipe"]
_PARTS = {  # of a step: colour, ink on it
    "ffn": (_OURS, "white"),
    "projections": (figures.PALETTE["2:4 weights"], "white"),
    "scores": (figures.PALETTE["control"], "black"),
    "head": ("0.75", "black"),
}
_TIMES = {  # of a step, by speed: colour, ink on it
    "all that is not FFN": ("0.75", "black"),
    "FFN: two products, 2:4 when sparse": (figures.PALETTE["2:4 weights"], "white"),
    "FFN: four products, Venom when sparse": (figures.PALETTE["venom"], "black"),
}


def shares(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Figure 1: stacked bars of each part's share of the FLOPs; panels: title -> shares, part x model."""
    fig, axes = plt.subplots(1, len(panels), figsize=(9.5, 3.9), sharey=True, squeeze=False)
    for ax, (title, frame) in zip(axes[0], panels.items(), strict=True):
        bottom = np.zeros(frame.shape[1])
        for part, (colour, ink) in _PARTS.items():
            height = 100 * frame.loc[part].to_numpy()
            bars = ax.bar(frame.columns, height, 0.65, bottom, color=colour, label=flops.LABELS[part])
            labels = [f"{h:.0f}" if h > 4 else "" for h in height]
            ax.bar_label(bars, labels, label_type="center", color=ink, fontweight="bold")
            bottom += height
        ax.set(title=title, xlabel="model")
        ax.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("share of a step's FLOPs (%)")
    handles, labels = axes[0, -1].get_legend_handles_labels()
    fig.legend(handles[::-1], labels[::-1], loc="outside right center")
    fig.suptitle("By the complete count the FFN's share is smaller, and grows with each model")
    return fig


def over_length(curves: pd.DataFrame, length: int) -> Figure:
    """The FFN's share over the sequence length; curves: length x model. length: the paper's."""
    fig, ax = plt.subplots(figsize=(7, 3.6))
    for look, (model, curve) in zip(("o-", "s--", "^:"), curves.items(), strict=False):
        ax.plot(curves.index, 100 * curve, look, color=_OURS, label=model)
    ax.axvline(length, color="0.4", lw=1)
    ax.text(length * 1.06, 76, f"the paper's {length}", color="0.3")
    ax.set_xscale("log", base=2)
    ax.set_xticks(curves.index, [f"{n // 1024}k" for n in curves.index])
    ax.set(xlabel="sequence length T (tokens)", ylabel="FFN's share of the FLOPs (%)", ylim=(0, 82))
    ax.set_title("Longer sequences leave the FFN less to speed up")
    ax.legend(title="model", loc="lower left")
    return fig


def times(r: float, v: float, p: float, title: str = "") -> Figure:
    """Amdahl's law in bars: what a dense step, a sparse step and a step of the run take, part by part.

    Args:
        r: FFN's share of a dense step. v: speed-up of a Venom product. p: share of sparse steps.
    """
    dense = np.array([1 - r, r / 3, 2 * r / 3])
    sparse = dense / (1, flops.TWO_FOUR, v)
    rows = {"dense step": dense, "sparse step": sparse, "run, mean step": p * sparse + (1 - p) * dense}
    fig, ax = plt.subplots(figsize=(9, 2.7))
    left = np.zeros(len(rows))
    for (name, (colour, ink)), width in zip(_TIMES.items(), np.array(list(rows.values())).T, strict=True):
        bars = ax.barh(list(rows), width, 0.7, left, color=colour, label=name)
        ax.bar_label(bars, [f"{w:.2f}" if w > 0.05 else "" for w in width], label_type="center", color=ink)
        left += width
    for y, whole in enumerate(left):
        ax.text(whole + 0.01, y, f"{1 / whole:.2f}x", va="center", fontweight="bold")
    ax.axvline(1 - r, color="0.1", ls="--", lw=1.3, label="were the FFN free")
    ax.set(xlim=(0, 1.1), ylim=(2.5, -0.5), xlabel="time, a dense step = 1")
    ax.set_title(title or f"r = {r:.2f}, v = {v:g}, p = {p:.2f}: the FFN {flops.ffn_speedup(v):.2f}x")
    ax.grid(False, axis="y")
    fig.legend(loc="outside lower center", ncols=2)
    return fig


def ceilings(
    shares: Mapping[str, float],
    v: float,
    steps: Mapping[str, tuple[float, float]],
    runs: Mapping[str, tuple[float, float]],
) -> Figure:
    """The speed-up of a step over v, and of a run over p, with what the paper prints.

    Args:
        shares: count -> r, the paper's first. v: of the right panel.
        steps: place in the paper -> (v, step). runs: place in the paper -> (p, run).
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2))
    speeds, parts = np.linspace(1, 16, 200), np.linspace(0, 1, 200)
    for line, (name, r) in zip(figures.LINES, shares.items(), strict=False):
        look = {"color": _PAPER if line == "-" else _OURS, "ls": line}
        left.plot(speeds, [flops.step_speedup(r, x) for x in speeds], **look, label=f"{name}, r = {r:.2f}")
        limit = flops.step_speedup(r, math.inf)
        left.axhline(limit, color=look["color"], lw=0.8)
        left.text(16, limit + 0.01, f"{name}: at most {limit:.2f}", ha="right", va="bottom", fontsize=9)
        step = flops.step_speedup(r, v)
        label = f"{name}: steps {step:.2f}x"
        right.plot(parts, [flops.run_speedup(x, step) for x in parts], **look, label=label)
    free = [min(flops.run_speedup(x, math.inf), 5) for x in parts]
    right.plot(parts, free, "0.3", lw=1.2, ls=(0, (1, 1)), label="sparse steps take no time")
    for ax, points, marks in ((left, steps, "XP"), (right, runs, "ds")):
        for mark, (name, (x, y)) in zip(marks, points.items(), strict=False):
            ax.plot(x, y, mark, color=_PAPER, ms=10, mec="black", ls="none", label=name)
    left.set(xlabel="speed-up v of a Venom product", ylabel="speed-up of a sparse step", ylim=(0.9, 2.55))
    left.set_title("A step has a ceiling, however fast Venom is")
    right.set(xlabel="share p of sparse steps", ylabel="speed-up of the run", ylim=(0.97, 2.3))
    right.set_title(f"Runs, v = {v:g}: Table 2 has 7B above the limit")
    for ax in (left, right):
        ax.legend(loc="upper left" if ax is right else "lower right", fontsize=9)
    return fig


def averages(table: pd.DataFrame) -> Figure:
    """Table 4's printed and recomputed averages; table: rows with "sparse steps", "printed", "recomputed"."""
    fig, ax = plt.subplots(figsize=(7, 3.2))
    steps = table["sparse steps"] / 1000
    ax.plot(steps, table["recomputed"], "o-", color=figures.PALETTE["dense"], label="mean of the six scores")
    ring = {"fillstyle": "none", "ms": 11, "mew": 2}
    ax.plot(steps, table["printed"], "D", color=_PAPER, **ring, label="printed average")
    ax.set(xlabel="sparse steps out of 60k (thousands)", ylabel="average accuracy", ylim=(0.46, 0.535))
    ax.set_title("The cliff at 60k is in the arithmetic, not in the model")
    ax.legend(loc="lower left")
    return fig


def run_map(
    printed: Mapping[str, float],
    inputs: Mapping[str, tuple[float, float]],
    complete: Mapping[str, tuple[float, float]],
) -> Figure:
    """The speed-up of a run with half of its steps sparse, over all r and v.

    Args:
        printed: label -> speed-up that the paper prints, a line each.
        inputs, complete: label -> (r, v) as the paper has them, and by the complete count.
    """
    r_axis, v_axis = np.linspace(0.35, 0.9, 111), np.linspace(2, 14, 121)
    gain = np.array([[flops.run_speedup(0.5, flops.step_speedup(r, v)) for v in v_axis] for r in r_axis])
    fig, ax = plt.subplots(figsize=(9.5, 4.2))
    levels = [1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.45]
    faint = ax.contour(v_axis, r_axis, gain, levels=levels, colors="0.55", linewidths=0.7)
    ax.clabel(faint, fmt="%.2fx", fontsize=9)
    for line, (label, level) in zip(figures.LINES, printed.items(), strict=False):
        ax.contour(v_axis, r_axis, gain, levels=[level], colors=_PAPER, linewidths=2, linestyles=line)
        ax.plot([], [], line, color=_PAPER, lw=2, label=label)
    marks = iter("XPos")
    for points, colour in ((inputs, _PAPER), (complete, _OURS)):
        for label, (r, v) in points.items():
            ax.plot(v, r, next(marks), color=colour, mec="black", ms=10, ls="none", label=label)
    ax.set(xlabel="speed-up v of a Venom product", ylabel="FFN's share r of the FLOPs")
    ax.set_title("A run, half of its steps sparse: each printed speed-up needs other inputs")
    ax.grid(False)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return fig


def counts(shares: pd.DataFrame, steps: pd.DataFrame, v: float) -> Figure:
    """The FFN's share of the FLOPs and a step's speed-up at v under each way of counting; count x model."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
    names = ["formula", "2 matrices", "+ causal\nattention", "+ vocabulary\nhead"]
    for ax, frame, form in ((left, 100 * shares, "%.0f"), (right, steps, "%.2f")):
        for shift, hatch, (model, values) in zip((-0.19, 0.19), ("", "//"), frame.items(), strict=True):
            colours = [_PAPER, *[_OURS] * (len(values) - 1)]
            places = np.arange(len(values)) + shift
            bars = ax.bar(places, values, 0.36, color=colours, hatch=hatch, ec="white", label=model)
            ax.bar_label(bars, fmt=form, fontsize=9)
        ax.set_xticks(range(len(names)), names)
        ax.grid(axis="x", visible=False)
    left.set(ylabel="FFN's share of the FLOPs (%)", title="Each omission inflates the share", ylim=(0, 88))
    right.set(ylabel=f"speed-up of a step, v = {v:g}", title="and with it the speed-up", ylim=(1, 2.2))
    right.legend(labels=["1B (plain)", "7B (hatched)"], handlelength=1.2)
    return fig


def noise(moves: pd.DataFrame) -> Figure:
    """Sparse minus dense accuracy with its 95 % interval; moves: rows of `audit.accuracy_moves`.

    Args:
        moves: with a column "95 % interval" more, half of its width.
    """
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True, sharex=True)
    for ax, (size, group) in zip(axes, moves.groupby("model"), strict=True):
        names = [f"{name} ({n})" for name, n in zip(group["benchmark"], group["items"], strict=True)]
        look = {"color": _PAPER, "ecolor": "0.45", "capsize": 3, "ms": 7}
        ax.errorbar(100 * group["move"], names, xerr=100 * group["95 % interval"], fmt="D", **look)
        ax.axvline(0, color="0.3", lw=1)
        ax.set(title=size, xlabel="accuracy, sparse minus dense (points)")
    axes[0].invert_yaxis()
    axes[0].set_ylabel("benchmark (test items)")
    fig.suptitle("Every 95 % interval contains zero: no benchmark in Table 2 tells sparse from dense")
    return fig
