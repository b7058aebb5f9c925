"""Pictures of runs that mix sparse and dense steps: phases, switches, recovery, endings, figure 5."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from replicate import figures, paper, schedule
from replicate.report import mix_tables
from replicate.report.layer_plots import OPAQUE
from replicate.report.mix_tables import FIRST, MIXES, READINGS
from replicate.study import plans, results
from replicate.training.flops import param_count

_COLOURS = {  # of a mix
    "50 %": figures.PALETTE["2:4 weights"],
    "67 %": figures.PALETTE["2:4 activations"],
    "83 %": figures.PALETTE["venom"],
    "100 %": figures.PALETTE["recipe"],
    "50 %, at the end": figures.PALETTE["paper"],
}
_READINGS = {  # colour, marker, shift within a row; as in chapter 08
    "recipe": ("#D55E00", "s", -0.15),
    "recipe, same": ("#0072B2", "o", 0.15),
}
_ON = {  # arm -> label, colour, line; the highest first
    "recipe, same": ("recipe, backward reads what forward read", "#0072B2", "-"),
    "recipe": ("recipe, as printed", "#D55E00", "-"),
    "recipe, scaled": ("recipe, soft but scaled back", "#009E73", "--"),
    "recipe, hard": ("recipe, hard pruning", "#CC79A7", "--"),
    "venom16": ("Venom alone, whole weights", "#E69F00", ":"),
    "dense": ("dense", "#333333", ":"),
}
_WAYS = {
    "the paper's count": ("paper", "o-"),
    "complete count": ("control", "s--"),
    "measured": ("dense", "D:"),
}


def phases() -> Figure:
    """The dense and the sparse steps of every mix, and the learning rate above them."""
    fig, (top, ax) = plt.subplots(2, 1, figsize=(9, 4.2), sharex=True, height_ratios=(1, 3.2))
    plan = plans.everything("gpu", (1,))
    dense = plan["dense"][0]
    rates = [schedule.learning_rate(step, dense) for step in range(dense.steps)]
    top.plot(np.array(rates) / dense.lr, color="0.25")
    top.set(ylabel="rate / peak", ylim=(0, 1.08), yticks=(0, 1))
    for y, end in enumerate(MIXES.values()):
        config = plan["recipe" + end][0]
        for phase, start, stop in schedule.phase_plan(config):
            colour = figures.PALETTE["recipe"] if phase == "sparse" else "0.82"
            ax.barh(y, stop - start, left=start, color=colour, lw=0)
            if stop - start > 150:
                ink = "white" if phase == "sparse" else "black"
                ax.text((start + stop) / 2, y, phase, ha="center", va="center", fontsize=9, color=ink)
        ax.text(config.steps * 1.01, y, f"{schedule.sparse_steps(config):,} sparse", va="center", fontsize=9)
    ax.set(yticks=range(len(MIXES)), yticklabels=list(MIXES), xlabel="step", xlim=(0, dense.steps))
    ax.set(ylabel="sparse steps", ylim=(len(MIXES) - 0.5, -0.5))
    ax.grid(False)
    top.set_title("Learning rate, and the mixes at scale gpu: a dense warm-up first, always")
    return fig


def switches(scale: str, runs: pd.DataFrame) -> Figure:
    """Both switches, step by step: training loss where the recipe begins, and above dense where it ends."""
    fig, (on, off) = plt.subplots(1, 2, figsize=(12, 4.4))
    for arm, (label, colour, line) in _ON.items():
        steps, losses = mix_tables.switch_on(scale, arm)
        on.plot(steps, losses, line, color=colour, label=label, lw=1.6)
    on.set(xlabel="steps after the switch", ylabel="training loss (nats a token)", ylim=(2.5, 8.2))
    on.set_title("Sparsity is switched on: most of the jump is the weights'")
    on.legend(fontsize=9, loc="upper right", **OPAQUE)
    for name in FIRST:
        start, gap = mix_tables.switch_off(scale, runs, "recipe" + MIXES[name])
        stop = min(len(gap), start + 350)
        label = f"{name} sparse: {len(gap) - start:,} dense steps to the end"
        off.plot(range(-50, stop - start), gap[start - 50 : stop], color=_COLOURS[name], label=label)
    off.axhline(0, color="0.5", lw=0.8)
    off.set(xlabel="steps after the switch", ylabel="training loss above dense (nats)")
    off.set_title("Sparsity is switched off: the loss jumps again")
    off.legend(fontsize=9, loc="upper right", **OPAQUE)
    for ax in (on, off):
        ax.axvline(0, color="0.4", lw=1, ls="--")
    size = param_count(plans.everything(scale, (1,))["dense"][0].model)["non_embedding"] / 1e6
    fig.suptitle(f"Scale {scale}, {size:.1f}M parameters, means over the seeds", fontsize=10)
    return fig


def recovery(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Training loss above dense over a run: a panel for each scale and each reading that has a mix."""
    panels = [(b, s) for b in READINGS for s in studies if b + MIXES["50 %"] in set(studies[s]["arm"])]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    fig = plt.figure(figsize=(max(6.5, 5.5 * columns), 0.7 + 3.4 * rows))
    for i, (base, scale) in enumerate(panels):
        ax = fig.add_subplot(rows, columns, i + 1)
        _draw_recovery(ax, scale, studies[scale], base)
        ax.set_title(f"{scale}: {READINGS[base]}", fontsize=10)
        ax.set(xlabel="step", ylabel="" if i % columns else "training loss above dense (nats)")
    known = {name: line for ax in fig.axes for line, name in zip(*ax.get_legend_handles_labels())}
    look = {"title": "sparse steps; dashed: back to dense", "fontsize": 9, "title_fontsize": 9, "ncols": 5}
    fig.legend(known.values(), known.keys(), loc="outside lower center", **look)
    return fig


def _draw_recovery(ax: Axes, scale: str, runs: pd.DataFrame, base: str) -> None:
    """Running means over a fortieth of the run, with the range of the seeds."""
    highest = 0.1
    for name, colour in _COLOURS.items():
        arm = base + MIXES[name]
        if arm not in set(runs["arm"]):
            continue
        config = plans.everything(scale, (1,))[arm][0]
        steps, gap = results.gap_curve(runs, arm, window=max(3, config.steps // 40))
        ax.plot(steps, gap.mean(0), ":" if "end" in name else "-", color=colour, label=name)
        ax.fill_between(steps, gap.min(0), gap.max(0), color=colour, alpha=0.15, lw=0)
        if name in FIRST:
            ax.axvline(schedule.phase_plan(config)[-1][1], color=colour, lw=1, ls="--")
        highest = max(highest, gap.mean(0)[len(steps) // 2 :].max())
    ax.axhline(0, color="0.5", lw=0.8)
    ax.set_ylim(-0.1 * highest, 1.3 * highest)


def endings(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Held-out loss above dense at the end of every mix, under either reading, a panel for each scale."""
    ran = {arm for part in studies.values() for arm in part["arm"]}
    rows = [name for name, end in MIXES.items() if {base + end for base in READINGS} & ran]
    size = (max(6.5, 4.2 * len(studies)), 1.2 + 0.4 * len(rows))
    fig, axes = plt.subplots(1, len(studies), figsize=size, squeeze=False, sharey=True)
    for ax, (scale, runs) in zip(axes[0], studies.items(), strict=True):
        for base, (colour, marker, shift) in _READINGS.items():
            for y, name in enumerate(rows):
                if found := mix_tables.above(runs, base + MIXES[name]):
                    look = {"fmt": marker, "color": colour, "capsize": 3, "ms": 6}
                    ax.errorbar(found.mean, y + shift, xerr=found.half, **look)
        ax.axvline(0, color="0.5", lw=0.8)
        ax.set(xlabel="held-out loss above dense (nats)", title=f"{scale} scale")
        ax.locator_params(axis="x", nbins=5)
    axes[0][0].set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
    axes[0][0].set_ylabel("sparse steps")
    for base, (colour, marker, _) in _READINGS.items():
        axes[0][0].plot([], [], marker, color=colour, label=READINGS[base])
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return fig


def figure5(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Quality over the speed-up of a run: the paper's, and ours where all of Table 4's shares ran."""
    shares = mix_tables.shares()
    whole = {scale: part for scale, part in studies.items() if {*shares} <= {*part["arm"]}}
    fig, (first, *others) = plt.subplots(1, 1 + len(whole), figsize=(4.3 * (1 + len(whole)), 4.2))
    _draw_quality(first, mix_tables.averages())
    first.set(title="The paper, 1B (Table 4)", ylabel="average accuracy on six benchmarks")
    printed = (mix_tables.speeds()["the paper's count"]["recipe"], paper.rows(4)[-1]["avg"])
    first.plot(*printed, "X", color="0.2", ms=8, ls="none", label="100 % as printed")
    first.legend(fontsize=9, loc="lower left")
    for ax, (scale, part) in zip(others, whole.items(), strict=True):
        _draw_quality(ax, part[part["arm"].isin(shares)].groupby("arm")["valid_loss"].mean().to_dict())
        ax.set(title=f"Ours, {scale} scale", ylabel="held-out loss (nats), lowest on top")
        ax.invert_yaxis()
    return fig


def _draw_quality(ax: Axes, values: Mapping[str, float]) -> None:
    """Values by arm of Table 4 over each of the three speed-ups; the shares of sparse steps stand once."""
    shares = mix_tables.shares()
    for way, found in mix_tables.speeds().items():
        name, look = _WAYS[way]
        at = [found[arm] for arm in shares]
        ax.plot(at, [values[arm] for arm in shares], look, color=figures.PALETTE[name], label=way)
    for arm, share in shares.items():
        at = (mix_tables.speeds()["the paper's count"][arm], values[arm])
        name = f"{100 * share:.0f} %"
        beside = (-24, -13) if name == "83 %" else (7, 5)
        ax.annotate(name, at, textcoords="offset points", xytext=beside, fontsize=9)
    ax.set_xlabel("a 1B run: times as fast as dense")
    ax.margins(0.2, 0.14)
