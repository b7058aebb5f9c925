"""Pictures of the routed FFN: blocks of rows, its products, stages and memory, and the whole layer."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from replicate.figures import PALETTE
from replicate.report import kernel_tables, layer_tables
from replicate.report.kernel_plots import LAYER_COLOURS, STAGE_COLOURS, draw_bars, draw_rows, draw_stacks
from replicate.study.records import Record

_FORMATS = {"4 of 16": PALETTE["venom"], "4 of 32": PALETTE["recipe"], "4 of 64": PALETTE["2:4 weights"]}
GATHER = {  # column of `kernel_tables.venom_formats` -> colour: product 2 in two forms
    "gather, V = 64": PALETTE["control"],
    "gather, V = 128": PALETTE["2:4 weights"],
    "clusters, y3 summed": PALETTE["venom"],
    "clusters, y3": PALETTE["recipe"],
}
PEERS = {  # likewise: products alone and the whole FFN, ours and a mixture of experts
    "clusters": PALETTE["venom"],
    "grouped products": PALETTE["control"],
    "FFN": PALETTE["recipe"],
    "grouped FFN": PALETTE["2:4 weights"],
}
OPAQUE = {"frameon": True, "facecolor": "white", "edgecolor": "none", "framealpha": 1}  # of a legend
_BLOCK = 128  # rows that a kernel multiplies at a time


def blocks(tokens: int, clusters: int, k: int) -> Figure:
    """Rows of each cluster if every token chooses k at random, and the padding that fills their last blocks.

    Raises ValueError if there are fewer than k clusters.
    """
    if k > clusters:
        raise ValueError(f"only {clusters} clusters for k = {k}")
    scores = np.random.default_rng(0).standard_normal((tokens, clusters))
    rows = np.bincount(scores.argsort(axis=1)[:, :k].flatten(), minlength=clusters)
    filled = -(-rows // _BLOCK) * _BLOCK
    fig, ax = plt.subplots(figsize=(9, 2.9))
    look = {"width": 0.85, "linewidth": 0}
    ax.bar(range(clusters), rows, color=PALETTE["venom"], label="a token's row", **look)
    ax.bar(range(clusters), filled - rows, bottom=rows, color=PALETTE["dense"], label="padding", **look)
    ticks = range(0, filled.max() + 1, _BLOCK * max(1, filled.max() // _BLOCK // 6))
    ax.set(yticks=ticks, xlabel="cluster", ylabel="rows", xlim=(-0.6, clusters - 0.4))
    if clusters <= 32:
        ax.set_xticks(range(clusters))
    ax.grid(False, axis="x")
    share, bound = 1 - rows.sum() / filled.sum(), tokens * clusters / filled.sum()
    ax.set_title(
        f"{tokens} tokens, {k} of {clusters} clusters: {share:.0%} of the rows are padding,\n"
        f"products at most {bound:.3g} times as fast as dense; parts to sum for each token: {k}"
    )
    fig.legend(loc="outside right center", fontsize=9)
    return fig


def try_blocks(tokens: int, clusters: int, k: int) -> None:
    """`blocks`, or why not; for sliders."""
    try:
        blocks(tokens, clusters, k)
    except ValueError as error:
        print(error)


def figure7(record: Record) -> Figure:
    """Speed-up of each of the six products over cuBLAS, for both FFN shapes, with the paper's 6 to 8."""
    fig, axes = plt.subplots(2, 1, figsize=(10.5, 6.4), sharey=True)
    for ax, (d_model, name) in zip(axes, kernel_tables.MODELS.items(), strict=True):
        table = kernel_tables.venom_products(record, d_model).set_index("product").drop(columns="dense ms")
        table.index = [name.replace(" ", "\n", 1).replace("^T", "$^T$") for name in table.index]
        ax.axhspan(6, 8, color=PALETTE["paper"], alpha=0.25, lw=0, label="the paper: 6 to 8")
        draw_bars(ax, table.T.to_dict(), _FORMATS)
        ax.set(ylabel="times as fast as cuBLAS", ylim=(0, 15.5), yticks=range(0, 16, 4))
        ax.set_title(f"{name}: six products in the chosen blocks")
    axes[0].legend(loc="upper left", ncols=4, fontsize=9, **OPAQUE)
    return fig


def compared(record: Record, colours: Mapping[str, str], title: str, over: str = "cuBLAS") -> Figure:
    """Speed-ups by format, side by side for both shapes, and `over` what; colours: `GATHER` or `PEERS`."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.7), sharey=True)
    for ax, (d_model, name) in zip(axes, kernel_tables.MODELS.items(), strict=True):
        table = kernel_tables.venom_formats(record, d_model).set_index("format")[list(colours)]
        shown = {"clusters": "products"}
        bars = {shown.get(column, column): colour for column, colour in colours.items()}
        draw_bars(ax, table.rename(columns=shown).T.to_dict(), bars)
        ax.set(title=f"{name}: {title}", ylim=(0, 14.5))
    axes[0].set_ylabel(f"times as fast as\n{over}")
    axes[0].legend(loc="upper left", fontsize=9, **OPAQUE)
    return fig


def breakdown(record: Record) -> Figure:
    """Milliseconds of each stage of the routed FFN, forward and backward, by format, for both shapes."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.7), sharey=True)
    for ax, (d_model, name) in zip(axes, kernel_tables.MODELS.items(), strict=True):
        stages = kernel_tables.stages(record, d_model)
        dense = sum(stages.pop("dense").values())
        draw_stacks(ax, stages, STAGE_COLOURS, least=0.085)
        ax.set_title(f"{name}: mostly products\n(six dense products: {kernel_tables.digits3(dense)} ms)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return fig


def memory(record: Record) -> Figure:
    """Peak memory of a forward and backward pass of the routed FFN, beyond weights and input."""
    fig, ax = plt.subplots(figsize=(8, 2.9))
    peaks = {
        name[:2]: kernel_tables.shape_of(record, d_model)["peak_bytes"]
        for d_model, name in kernel_tables.MODELS.items()
    }
    table = pd.DataFrame(peaks).rename(index=kernel_tables.FORMATS) / 2**30
    draw_bars(ax, table.to_dict(), {"dense": PALETTE["dense"], **_FORMATS})
    ax.set(title="Peak memory of one FFN, beyond weights and input", ylabel="GiB", xlabel="FFN shape")
    ax.margins(y=0.1)
    ax.legend(loc="upper right", fontsize=9, **OPAQUE)
    return fig


def layer(record: Record) -> Figure:
    """Speed and peak memory of `SparseFFN` over the dense layer, and the paper's arithmetic."""
    tables = {name: layer_tables.layer(record, d_model) for d_model, name in kernel_tables.MODELS.items()}
    by_shape = {name: table.set_index("arm") for name, table in tables.items()}
    arms = [arm for arm in next(iter(by_shape.values())).index if not arm.startswith("dense")]
    shades = dict(zip(by_shape, (PALETTE["2:4 weights"], PALETTE["venom"]), strict=True))
    fig, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, width_ratios=[1.6, 1])
    for ax, column in zip(axes, ("x", "memory"), strict=True):
        by_arm = pd.DataFrame({name: frame.loc[arms, column] for name, frame in by_shape.items()})
        rows = by_arm.rename(index=layer_tables.NAMES).T.to_dict()
        theirs = {layer_tables.NAMES[arm]: kernel_tables.arithmetic(arm) for arm in arms}
        draw_rows(ax, rows, shades, marks=theirs if column == "x" else {}, mark="the paper's arithmetic")
        ax.axvline(1, color=PALETTE["dense"], lw=1.2, ls="--", label="dense")
    axes[0].set(xlabel="times as fast as dense", title="Speed, everything counted")
    axes[1].set(xlabel="times the compiled dense layer's", title="Peak memory: less is better")
    axes[0].legend(loc="lower right", fontsize=9)
    return fig


def layer_stages(record: Record) -> Figure:
    """Milliseconds of the kernels of one layer, by kind, for dense and sparse layers and both shapes."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True)
    fig.suptitle("Kernels in a profile of separate calls: they add up to less than the step", fontsize=11)
    for ax, (d_model, name) in zip(axes, kernel_tables.MODELS.items(), strict=True):
        split = layer_tables.stages(record, d_model).set_index("stage, ms").drop(columns="dense, eager")
        colours = [LAYER_COLOURS[stage] for stage in split.index]
        draw_stacks(ax, split.to_dict(), colours, least=0.09)
        ax.set_title(name)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    return fig
