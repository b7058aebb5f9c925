"""Pictures of chapter 12: what a choice by activations keeps, costs and gains; what the paper leaves open."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from replicate import evaluate, figures, schedule, study
from replicate.gpt import GPT
from replicate.report import kernel_tables, layer_tables, step_table, study_tables
from replicate.report import study_plots as plots
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.settings.text import from_dict
from replicate.study import results
from replicate.study.statistics import Stats
from replicate.study.transplant import with_sparsity
from replicate.training import flops

ARMS = {  # with 87.5 % zeros -> what it is called
    "venom16": "router, 4 of 16",
    "venom16, 32 clusters": "router, 8 of 32",
    "venom16, 64 clusters": "router, 16 of 64",
    "active16": "by activations, 4 of 16",
    "active16x32": "by activations, 8 of 32",
    "active16, 64 clusters": "by activations, 16 of 64",
    "recipe": "algorithms 1, 2, 4 of 16",
}
SAME_NUMBER = {  # clusters -> (by activations, by the router)
    16: ("active16", "venom16"),
    32: ("active16x32", "venom16, 32 clusters"),
    64: ("active16, 64 clusters", "venom16, 64 clusters"),
}
SWITCHES = {  # -> what it is called, entry of the palette
    "recipe, 50% sparse first": ("recipe", "recipe"),
    "recipe, folded, 50% sparse first": ("recipe, folded", "2:4 weights"),
    "active16x32, 50% sparse first": ("by activations, 8 of 32", "control"),
}
SIZED = {  # -> what it is called, entry of the palette
    "recipe": ("recipe, as printed", "recipe"),
    "active16, 64 clusters": ("by activations, 16 of 64", "control"),
    "experts x4, 8 of 64": ("mixture: experts x4, 8 of 64", "mixture"),
}
Answer = tuple[str, str, str, Mapping[str, Any]]  # one of `results.open_questions`
_SCALES = {"laptop": "venom", "gpu": "2:4 activations", "gpu40m": "recipe"}


@torch.no_grad()
def kept_shares(model: GPT, text: Tensor, counts: Sequence[int], seed: int) -> pd.DataFrame:
    """Share of the sum of y2 that a quarter of the neurons keeps, mean over layers, by number of clusters.

    Columns: "router" and "own activations" choose n / 4 of n clusters, "best" the single neurons.

    Args:
        model: dense, on the CPU. text: token ids [B, S]. counts: numbers n of clusters. seed: of clustering.
    """
    inputs, rows = [x.flatten(0, 1) for x in evaluate.ffn_inputs(model, text)], {}
    for n in counts:
        formats = replace(SPARSITY_PRESETS["active16"], n_clusters=n, top_k=n // 4, inner=False)
        kept: dict[str, list[float]] = {"router": [], "own activations": [], "best": []}
        for ffn, x in zip(with_sparsity(model, formats, text, seed).ffns(), inputs, strict=True):
            y2 = (x @ ffn.w1).relu().square()
            by_cluster = y2.unflatten(1, (n, -1)).sum(2)
            for name, routing in (("router", "token"), ("own activations", "activation")):
                ffn.config = replace(formats, routing=routing)
                kept[name].append((by_cluster.gather(1, ffn.clusters(x)).sum() / y2.sum()).item())
            kept["best"].append((y2.topk(y2.shape[1] // 4).values.sum() / y2.sum()).item())
        rows[n] = {name: sum(shares) / len(shares) for name, shares in kept.items()}
    return pd.DataFrame(rows).T.rename_axis("clusters")


def kept(shares: pd.DataFrame, title: str) -> Figure:
    """`kept_shares` over the number of clusters."""
    fig, ax = plt.subplots(figsize=(7.5, 3.6))
    looks = {"own activations": ("X-", "control"), "router": ("^-", "venom"), "best": ("--", "dense")}
    for name, (line, entry) in looks.items():
        label = "each token's best neurons, one by one" if name == "best" else name
        ax.plot(shares.index, 100 * shares[name], line, color=figures.PALETTE[entry], label=label)
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(shares.index), [str(n) for n in shares.index], minor=False)
    ax.set(xlabel="clusters, of which a token keeps a quarter", ylim=(0, 103), title=title)
    ax.set_ylabel("activations kept (%)")
    ax.legend(loc="lower right")
    return fig


def costs(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Training loss above dense of ARMS, mean and 95 % interval, a panel for each scale."""
    ran = {arm for part in studies.values() for arm in part["arm"]}
    names, limit = [arm for arm in ARMS if arm in ran], study_tables.paper_costs()["venom16"]
    size = (2 + 4.5 * len(studies), 0.36 * len(names) + 1.6)
    fig, axes = plt.subplots(1, len(studies), figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax, (scale, part) in zip(axes[0], studies.items(), strict=True):
        found = results.differences(part, column="final_loss")
        rows = {ARMS[arm]: found.get(arm) for arm in names}
        colour = {ARMS[arm]: figures.PALETTE[figures.family(arm.split(",")[0])] for arm in names}
        xlabel, label = "training loss above dense (nats)", "ours, 95 % interval"
        plots.draw_intervals(ax, rows, colour=colour, xlabel=xlabel, label=label)
        ax.axvline(limit, color=figures.PALETTE["paper"], ls="--", label=f"the paper's Venom, {limit:+.3f}")
        ax.set_title(f"{scale} scale")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def speeds() -> pd.DataFrame:
    """Layer, whole step and memory of every Venom format that was timed, over dense, on `step_table.CARD`."""
    formats = {arm: SPARSITY_PRESETS[arm] for arm in layer_tables.NAMES if arm in SPARSITY_PRESETS}
    names = [arm for arm, format in formats.items() if format.activation == "venom" and not format.fp8]
    over_dense = partial(layer_tables.over_dense, device=step_table.CARD)
    shapes = {model: d_model for model, (_, d_model) in step_table.MODELS.items()}
    columns = {f"layer, {model}": over_dense(d_model) for model, d_model in shapes.items()}
    columns["by the formula"] = {arm: kernel_tables.arithmetic(arm) for arm in names}
    columns["step, 1B"] = step_table.speeds("llama1b")
    columns |= {f"memory, {model}": over_dense(d_model, "memory") for model, d_model in shapes.items()}
    return layer_tables.by_name(pd.DataFrame(columns).loc[names], "format")


def switch(scale: str, runs: pd.DataFrame) -> Figure:
    """Training loss above dense around the switch to dense steps, mean and range of the seeds."""
    fig, ax = plt.subplots(figsize=(10, 3.8))
    ends, config = {}, study.arms(scale, ["dense"])[0]
    for arm, (label, entry) in SWITCHES.items():
        (steps, curve), colour = results.gap_curve(runs, arm, window=40), figures.PALETTE[entry]
        ax.plot(steps, curve.mean(0), color=colour)
        ax.fill_between(steps, curve.min(0), curve.max(0), color=colour, alpha=0.15, lw=0)
        ends[label] = steps[-1], curve.mean(0)[-1], colour
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # a curve may pass behind the words
    for step, phase in zip(switch_steps(runs), ("zeros", "dense"), strict=True):
        ax.axvline(step, color="0.4", ls="--", lw=1)
        place = {"transform": ax.get_xaxis_transform(), "va": "top", "fontsize": 9, "bbox": plain}
        ax.text(step + config.steps / 200, 0.97, f"{phase} from here", **place)
    ax.axhline(0, color="0.5", lw=0.8)
    ax.set(xlim=(0, config.steps), ylim=(-0.02, 0.36), title=f"{scale} scale, running mean of 40 steps")
    ax.set(xlabel="step", ylabel="training loss above dense (nats)")
    plots.label_ends(ax, ends)
    return fig


def switch_steps(runs: pd.DataFrame) -> tuple[int, int]:
    """The steps from which the arms of SWITCHES are sparse, and from which they are dense to the end."""
    record = runs.loc[runs["arm"] == next(iter(SWITCHES)), "record"].iloc[0]
    _, (_, sparse, _), (_, dense, _) = schedule.phase_plan(from_dict(record.config))
    return sparse, dense


def telling(answers: Sequence[Answer]) -> list[Answer]:
    """The answers that some scale tells from zero: a 95 % interval of three seeds or more without it.

    Dearest first, by the mean at the largest scale. Without the questions of chapter 08.
    """
    others = [answer for answer in answers if answer[0] not in ("threshold", "backward reads")]
    clear = [a for a in others if any(s.n > 2 and s.low * s.high > 0 for s in a[3].values())]
    return sorted(clear, key=lambda answer: -list(answer[3].values())[-1].mean)


def _in_words(arm: str) -> str:
    words = {"no-mask-reuse": "act24, no mask reuse", "venom16": "Venom", "static16": "fixed clusters"}
    for name, text in (words | {"act24": "2:4 activations"}).items():
        arm = arm.replace(name, text)
    return arm


def open_questions(answers: Sequence[Answer]) -> Figure:
    """What one change to an arm costs in training loss, at each scale; answers: `results.open_questions`.

    The axis is linear between the dotted lines and logarithmic beyond.
    """
    fig, ax = plt.subplots(figsize=(10.5, 0.3 * len(answers) + 1.4))
    scales = [scale for scale in _SCALES if any(scale in found for *_, found in answers)]
    for place, scale in enumerate(scales):
        rows = {f"{question}: {_in_words(arm)}": found.get(scale) for question, arm, _, found in answers}
        colour, label = figures.PALETTE[_SCALES[scale]], f"{scale} scale"
        plots.draw_intervals(ax, rows, colour=colour, shift=0.24 * (place - 1), label=label)
    ax.set_xscale("symlog", linthresh=0.02)
    for edge in (-0.02, 0.02):
        ax.axvline(edge, color="0.6", lw=0.8, ls=":")
    ticks = [-0.6, -0.2, -0.02, 0, 0.02, 0.1, 0.3, 1, 3]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    ax.set_xticks([], minor=True)
    ax.set(xlim=(-1.2, 5), xlabel="training loss above the arm without the change (nats)")
    ax.tick_params(axis="y", labelsize=9)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=len(scales))
    return fig


def by_size(found: Mapping[str, Mapping[str, Stats]]) -> Figure:
    """Loss minus dense over the parameters of dense, an arm of SIZED a line; one seed is a hollow mark.

    Args:
        found: arm -> scale -> loss minus dense, see `study_tables.by_size`.
    """
    fig, ax = plt.subplots(figsize=(9, 2.8))
    scales = list(dict.fromkeys(scale for each in found.values() for scale in each))
    sizes = {s: flops.param_count(study.arms(s, ["dense"])[0].model)["non_embedding"] for s in scales}
    for arm, each in found.items():
        name, entry = SIZED[arm]
        colour = figures.PALETTE[entry]
        line = [(sizes[scale], x.mean) for scale, x in each.items() if x.n > 1]
        ax.plot(*zip(*line), color=colour, lw=1, alpha=0.6)
        for scale, x in each.items():
            mark = {"fmt": figures.MARKERS[entry], "ms": 7, "mfc": colour if x.n > 1 else "white"}
            ax.errorbar(sizes[scale], x.mean, yerr=x.half, color=colour, capsize=3, label=name, **mark)
            name = None  # one entry of the legend
    ax.axhline(0, color=figures.PALETTE["dense"], lw=1.4, label="dense")
    ticks = [f"{size / 1e6:.0f} million\n({scale})" for scale, size in sizes.items()]
    ax.set(xscale="log", xlabel="parameters of the dense model, without embedding (scale)")
    ax.set_ylabel("held-out loss\nminus dense (nats)")
    ax.set_xticks(list(sizes.values()), ticks)
    ax.set_xticks([], minor=True)
    ax.set_title("The recipe costs most; the mixture ends below dense on average (hollow: one seed)")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig
