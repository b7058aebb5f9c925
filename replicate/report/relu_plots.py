"""Pictures of squared ReLU: its shape, the zeros it makes, what it and the dense warm-up do to the loss."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from replicate import figures
from replicate.report import study_plots
from replicate.settings.text import from_dict
from replicate.study import results
from replicate.training.flops import param_count

_GREEN, _BLUE, _RED = (figures.PALETTE[name] for name in ("2:4 activations", "2:4 weights", "recipe"))
_ACTIVATIONS = {"GELU": ("GELU", "dense"), "SwiGLU": ("SwiGLU", "dense")}  # name -> (arm, above this one)
WARMUPS = {"the recipe": ("recipe, no warm-up", "recipe"), "2:4 activations": ("act24, no warm-up", "act24")}


def activations(functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Figure:
    """Three activation functions by name, and their derivatives."""
    grid = torch.linspace(-3, 2, 501, dtype=torch.float64, requires_grad=True)
    fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.2))
    for (name, function), colour, line in zip(functions.items(), (_GREEN, _BLUE, _RED), ("-", "--", ":")):
        y2 = function(grid)
        (slope,) = torch.autograd.grad(y2.sum(), grid)
        for ax, curve in zip(axes, (y2, slope), strict=True):
            ax.plot(grid.detach(), curve.detach(), line, color=colour, label=name, lw=2.2)
    axes[0].set(title="Only squared ReLU is exactly zero on the left", xlabel="y1", ylabel="y2")
    axes[1].set(title="Only its derivative is exactly zero there", xlabel="y1", ylabel="slope of y2 by y1")
    for ax in axes:
        ax.axvspan(-3, 0, color="0.9", zorder=0)
    axes[0].legend(loc="upper left")
    return fig


def activation_losses(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Training loss of GELU and SwiGLU above squared ReLU over the steps; studies: scale -> runs."""
    fig = _gaps(studies, _ACTIVATIONS, (_BLUE, _RED), marks_warmup=False)
    fig.axes[0].set_ylabel("training loss above\nsquared ReLU (nats)")
    told = "The gap to squared ReLU is large in short runs, small in long ones"
    fig.suptitle(told if len(fig.axes) > 1 else "Above zero: squared ReLU ends lower")
    return fig


def warmup(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Training loss without minus with the dense warm-up over the steps; studies: scale -> runs."""
    fig = _gaps(studies, WARMUPS, (_RED, _GREEN), marks_warmup=True)
    fig.axes[0].set_ylabel("training loss without\nminus with warm-up (nats)")
    told = "2:4 activations can start sparse; the recipe needs a warm-up or a long run"
    fig.suptitle(told if len(fig.axes) > 1 else "Above zero: leaving out the warm-up costs")
    return fig


def _gaps(
    studies: Mapping[str, pd.DataFrame],
    pairs: Mapping[str, tuple[str, str]],
    colours: Sequence[str],
    marks_warmup: bool,
) -> Figure:
    """A panel for each scale that has all arms, a line for each pair: mean over seeds, their range shaded."""
    wanted = {arm for pair in pairs.values() for arm in pair}
    there = {scale: runs for scale, runs in studies.items() if wanted <= set(runs["arm"])}
    fig, axes = plt.subplots(1, len(there), figsize=(10.5 if len(there) > 1 else 7.5, 3.5), squeeze=False)
    for ax, (scale, runs) in zip(axes[0], there.items(), strict=True):
        config = from_dict(runs["record"].iloc[0].config)
        for (name, pair), colour, line in zip(pairs.items(), colours, ("-", "--"), strict=True):
            steps, curves = results.gap_curve(runs, *pair, window=config.steps // 25)
            ax.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)
            ax.plot(steps, curves.mean(0), line, color=colour, label=name)
        ax.axhline(0, color="0.4", lw=1)
        if marks_warmup:
            waits = max(from_dict(record.config).dense_warmup for record in runs["record"])
            ax.axvline(waits, color="0.5", ls=":", lw=1.2, label="end of the warm-up")
        ax.set(xlabel="step", title=f"{scale} scale, n = {len(curves)}")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def zeros(runs: pd.DataFrame) -> tuple[list[int], np.ndarray]:
    """Steps, and shares of zeros in y2 [seed, step, layer], in dense training."""
    stored = runs.loc[runs["arm"] == "dense", "record"]
    shares = [[row["y2_sparsity"] for row in record.results["stats"]] for record in stored]
    return [row["step"] for row in stored.iloc[0].results["stats"]], np.array(shares)


def natural_sparsity(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Share of zeros in y2 of each layer over dense training, mean over seeds; studies: scale -> runs."""
    width = 11 if len(studies) > 1 else 7.5
    fig, axes = plt.subplots(1, len(studies), figsize=(width, 3.6), sharey=True, squeeze=False)
    for ax, (scale, runs) in zip(axes[0], studies.items(), strict=True):
        steps, shares = zeros(runs)
        layers = shares.mean(0).T
        for layer in layers[1:-1]:
            ax.plot(steps, layer, color=figures.PALETTE["control"], lw=1.4, label="layers between")
        ax.plot(steps, layers[0], "o-", color=figures.PALETTE["dense"], ms=4, label="first layer")
        ax.plot(steps, layers[-1], "s--", color=_RED, ms=4, label="last layer")
        ax.axhline(0.9, color=figures.PALETTE["paper"], ls="-.", label="the paper: above 90 %")
        ax.axhline(0.5, color="0.4", ls=":", label="half: y1 is symmetric")
        size = param_count(from_dict(runs["record"].iloc[0].config).model)["non_embedding"] / 1e6
        ax.set(xlabel="step", ylim=(0.3, 1), title=f"{scale} scale\n{size:.1f}M parameters")
    axes[0][0].set_ylabel("share of zeros in y2")
    handles, labels = axes[0][0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    fig.legend(once.values(), once.keys(), loc="outside lower center", ncols=len(once) if width > 8 else 3)
    fig.suptitle("Zeros start at half and grow; the first layer has the fewest")
    return fig


def preactivations(before: Sequence[Tensor], after: Sequence[Tensor], title: str) -> Figure:
    """How y1 is distributed in each layer ([tokens, F] each), before and after training."""
    fig, axes = plt.subplots(1, len(after), figsize=(10.5, 3), sharey=True)
    looks = (("before training", before, _BLUE, "--"), ("after", after, figures.PALETTE["dense"], "-"))
    for layer, ax in enumerate(axes):
        for name, y1, colour, line in looks:
            scaled = (y1[layer] / y1[layer].std()).numpy()
            density, edges = np.histogram(scaled, bins=100, range=(-4, 4), density=True)
            ax.stairs(density, edges, color=colour, ls=line, lw=1.8, label=name)
        ax.axvspan(-4, 0, color="0.93", zorder=0)
        ax.set(title=f"layer {layer}", xlabel="y1 / its standard deviation")
    axes[0].set_ylabel("density")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    fig.suptitle(title)
    return fig


def same_zeros(y2: Tensor, dy1: Tensor) -> Figure:
    """y2 and dy1 [tokens, neurons] side by side, their zeros white."""
    fig, axes = plt.subplots(1, 2, figsize=(10.5, 3))
    for ax, matrix, title in zip(axes, (y2, dy1), ("y2, forward", "dy1, backward: the same zeros")):
        shade = matrix.abs()
        study_plots.draw_matrix(ax, shade.clamp_max(shade.quantile(0.98)), title=title)
        ax.set_xlabel(f"{matrix.shape[1]} neurons, in groups of four")
    axes[0].set_ylabel(f"{len(y2)} tokens")
    return fig


def energy_kept(energy: pd.DataFrame, expected: float, waits: int, title: str) -> Figure:
    """Share of y2's energy that a format keeps of a dense model, over its training.

    Args:
        energy: steps x three formats. expected: of 2 of 4, for random y1. waits: steps of the warm-up.
    """
    fig, ax = plt.subplots(figsize=(9.5, 3.6))
    looks = (("D-", _GREEN), ("s-", figures.PALETTE["venom"]), ("o--", figures.PALETTE["control"]))
    for name, (line, colour) in zip(energy, looks, strict=True):
        ax.plot(energy.index, energy[name], line, color=colour, label=name)
    ax.axhline(expected, color="0.3", ls=":", lw=1.2, label="2 of 4, random y1")
    ax.axhline(0.25, color="0.5", ls="-.", lw=1.2, label="a random quarter of the neurons")
    ax.axvline(waits, color="0.5", ls="--", lw=1, label="end of the warm-up")
    ax.set(xlabel="dense steps so far", ylabel="share of y2's energy kept", ylim=(0, 1.03), title=title)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig
