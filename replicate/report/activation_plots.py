"""Pictures of the neuron-level activation: how neurons are chosen, and the mask of the backward pass."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from replicate import figures
from replicate.report import study_plots
from replicate.settings.text import from_dict
from replicate.study import results

# Ways to choose two of four neurons -> arm; "magnitude" is act24
CHOICES = {"soft": "act24, soft", "learned": "act24, learned", "static": "act24, static"}
# Format -> arms with and without reuse of the forward's mask
FORGOTTEN = {"2:4": ("act24", "no-mask-reuse"), "Venom": ("venom16", "venom16, no mask reuse")}
_COLOURS = {"2:4": figures.PALETTE["2:4 activations"], "Venom": figures.PALETTE["venom"]}


def selection_losses(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Held-out loss of each of CHOICES above selection by magnitude; studies: scale -> runs."""
    gaps = {s: results.differences(runs, "act24", arms=list(CHOICES.values())) for s, runs in studies.items()}
    rows = {f"{name}, {scale}": gaps[scale][arm] for name, arm in CHOICES.items() for scale in studies}
    fig, ax = plt.subplots(figsize=(8, 0.36 * len(rows) + 1.2))
    study_plots.draw_intervals(ax, rows, colour=_COLOURS["2:4"])
    ax.set_xlabel("held-out loss above selection by magnitude (nats), 95 % intervals")
    ax.set_title("Right of zero is worse than the choice by magnitude")
    return fig


def overlaps(y2: Tensor, gradients: Mapping[str, Tensor], below: Sequence[str]) -> Figure:
    """Where y2 [T, F] and some gradients dy1 [T, F] are not zero, in groups of four; below: captions."""
    colours = {"y2 and dy1": "#9a9a9a", "only y2": "#0072B2", "only dy1": "#D55E00"}
    fig, axes = plt.subplots(1, len(gradients), figsize=(13, 3.4))
    for ax, (name, gradient), line in zip(axes, gradients.items(), below, strict=True):
        a, b = (y2 != 0).numpy(), (gradient != 0).numpy()
        shade = ListedColormap(["white", *colours.values()])
        ax.imshow(np.select([a & b, a, b], [1, 2, 3]), cmap=shade, vmin=0, vmax=3, aspect="auto")
        for c in range(0, a.shape[1] + 1, 4):
            ax.axvline(c - 0.5, color="0.25", lw=0.6)
        ax.set(xticks=[], yticks=[], title=name)
        ax.grid(False)
        ax.set_xlabel(line, fontsize=10)
    axes[0].set_ylabel(f"{len(y2)} tokens")
    handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    fig.suptitle(f"Not zero: y2 of the forward pass and dy1 of the backward pass, {y2.shape[1]} neurons")
    return fig


def directions(cosines: Mapping[tuple[str, str], Sequence[float]], title: str) -> Figure:
    """Cosine to the true gradient of W1 by layer; cosines: (format, state of the model) -> one a layer."""
    fig, ax = plt.subplots(figsize=(7.5, 3.4))
    for (name, state), values in cosines.items():
        line = "o:" if state == "before training" else "s-"
        ax.plot(range(len(values)), values, line, color=_COLOURS[name], label=f"{name}, {state}")
    ax.axhline(1, color="0.4", lw=1)
    ax.set(xlabel="layer", xticks=range(len(values)), ylim=(0, 1.05), title=title)
    ax.set_ylabel("cosine to the true gradient")
    ax.legend()
    return fig


def mask_reuse(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Training loss without minus with mask reuse over the steps, a line a seed; studies: scale -> runs."""
    n = len(studies)
    size, shared = (max(7.5, 5.2 * n), 5.4), {"sharey": "row", "sharex": "col"}
    fig, axes = plt.subplots(2, n, figsize=size, squeeze=False, **shared)
    for row, (name, (base, arm)) in zip(axes, FORGOTTEN.items(), strict=True):
        for ax, (scale, runs) in zip(row, studies.items(), strict=True):
            config = from_dict(runs["record"].iloc[0].config)
            steps, curves = results.gap_curve(runs, arm, base, window=config.steps // 10)
            seeds = set.intersection(*(set(runs.loc[runs["arm"] == a, "seed"]) for a in (base, arm)))
            for seed, line, curve in zip(sorted(seeds), figures.LINES, curves, strict=False):
                ax.plot(steps, curve, line, color=_COLOURS[name], label=f"seed {seed}")
            ax.axhline(0, color="0.4", lw=1)
            ax.axvline(config.dense_warmup, color="0.5", ls=":", lw=1.2, label="sparse steps begin")
            cost = results.differences(runs, base, "final_loss", [arm])[arm]
            last = f"mean of the last {config.final_window} steps {cost.mean:+.2g} nats"
            ax.set_title(f"{name}, {scale} scale, n = {cost.n}\n{last}")
        row[0].legend()
    for ax in axes[-1]:
        ax.set_xlabel("step")
    fig.supylabel("training loss without minus with mask reuse (nats)", fontsize=12)
    return fig
