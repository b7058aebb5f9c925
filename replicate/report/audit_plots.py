"""Pictures of the audit: what the paper prints beside what follows from its own numbers."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from replicate import figures
from replicate.training import flops

_PAPER, _OURS = figures.PALETTE["paper"], figures.PALETTE["recipe"]


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
