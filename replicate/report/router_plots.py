"""Pictures of the router: figure 4, what a choice of clusters costs, how evenly tokens spread."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from replicate import figures
from replicate.report import study_plots
from replicate.router import TokenLists
from replicate.study import results, statistics

_LOOKS = {  # of a choice in `untrained`: line, palette entry
    "fixed": ("o--", "control"),
    "router, neighbours": ("P--", "dense"),
    "router, clusters": ("s-", "venom"),
    "router, clusters, L2": ("^:", "2:4 weights"),
    "router, clusters, cosine": ("v:", "paper"),
    "own activations": ("D-", "2:4 activations"),
}
_ARMS = {  # -> what it is called in a figure
    "static16": "fixed",
    "venom16, 64 clusters": "router, 16 of 64 clusters",
    "active16": "own activations, 4 of 16",
    "active16x32": "own activations, 8 of 32",
    "dense": "dense",
}


def figure4(y: Tensor, own: Tensor, choice: Tensor, lists: TokenLists, n: int) -> Figure:
    """The paper's figure 4: from scattered activations to the blocks that are multiplied.

    Args:
        y: [T, F] activations, neurons by cluster. own: the same with only the chosen cluster's.
        choice: [T] each token's cluster. lists: tokens by cluster. n: number of clusters.
    """
    width, order = y.shape[1] // n, lists.tokens
    panels = {
        "4a. every token, every neuron": (y, choice),
        "4b. only the token's cluster": (own, choice),
        "4c. tokens sorted by cluster": (own[order], choice[order]),
        "4d. only these blocks are multiplied": (own[order], choice[order]),
    }
    fig, axes = plt.subplots(1, 4, figsize=(14, 4.4))
    for ax, (title, (matrix, labels)) in zip(axes, panels.items(), strict=True):
        shade = matrix.clamp_max(y.quantile(0.99))
        study_plots.draw_matrix(ax, shade, m=width, title=title, row_labels=labels.tolist())
        ax.set_xlabel("neurons, by cluster")
    axes[0].set_ylabel("tokens", labelpad=18)
    study_plots.draw_blocks(axes[3], lists.offsets.tolist(), width)
    return fig


def untrained(cost: pd.DataFrame, n: int, title: str) -> Figure:
    """Held-out loss above dense over the share of neurons kept; cost: choice x clusters kept of n."""
    shares = [100 * k / n for k in cost.columns]
    fig, ax = plt.subplots(figsize=(7.5, 4))
    for name, row in cost.iterrows():
        line, colour = _LOOKS[name]
        ax.plot(shares, row, line, color=figures.PALETTE[colour], label=name)
    ax.set_xscale("log", base=2)
    ax.set_xticks(shares, [f"{share:g} %" for share in shares])
    ax.set(xlabel="neurons kept for each token", ylabel="held-out loss above dense (nats)", title=title)
    ax.legend()
    return fig


def gaps(runs: pd.DataFrame) -> dict[str, statistics.Stats]:
    """Each choice's held-out loss above that of the router with 16 clusters, by arm."""
    arms = [name for name in _ARMS if name in set(runs["arm"])]
    return results.differences(runs, base="venom16", arms=arms)


def above_router(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """`gaps` with their intervals, a panel for each scale."""
    fig, axes = plt.subplots(1, len(studies), figsize=(max(6.5, 4.3 * len(studies)), 2.6), squeeze=False)
    for ax, (scale, runs) in zip(axes[0], studies.items(), strict=True):
        found = gaps(runs)
        rows = {label: found.get(arm) for arm, label in _ARMS.items()}
        xlabel = "held-out loss above the router's (nats)"
        study_plots.draw_intervals(ax, rows, colour=figures.PALETTE["venom"], xlabel=xlabel)
        ax.locator_params(axis="x", nbins=4)
        ax.set_title(f"{scale} scale")
    for ax in axes[0][1:]:
        ax.set_yticklabels([])
    fig.suptitle("Left of zero is better than the router with 4 of 16 clusters", fontsize=11)
    return fig


def loads(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """The share of the choices each cluster gets, busiest first; one `router.load_stats` a layer."""
    fig, ax = plt.subplots(figsize=(7.5, 3))
    for index, (load, look) in enumerate(zip(layers, figures.LINES * len(layers), strict=False)):
        share = sorted((100 * value for value in load["load"]), reverse=True)
        label = f"layer {index}: busiest {load['max_over_mean']:.1f} x the mean"
        ax.plot(range(1, len(share) + 1), share, f"o{look}", label=label)
    ax.axhline(100 / len(share), color="0.4", ls="--", lw=1, label="even")
    ax.set(xlabel="cluster, busiest first", ylabel="share of the choices (%)")
    ax.set_title("How evenly tokens use the clusters, on held-out text")
    ax.legend()
    return fig
