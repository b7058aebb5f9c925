"""Pictures of chapter 13: the least time of a token's FFN, the clusters that texts touch, what was gained."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from replicate.bench import generate
from replicate.figures import PALETTE
from replicate.report import decode_tables, decoding
from replicate.report.kernel_plots import PEAK_DENSE
from replicate.report.layer_plots import OPAQUE
from replicate.report.layer_tables import NAMES
from replicate.settings.presets import train_preset

_SHAPES = {"7B": PALETTE["2:4 weights"], "1B": PALETTE["recipe"]}
_ARMS = {"venom16": PALETTE["venom"], "active16": PALETTE["control"], "recipe, same": PALETTE["recipe"]}
MEASURED = {  # column of `generate.rows` -> its name in a picture
    "x": "one token:\nFFN",
    "x step": "one token:\nwhole model",
    "x prefill FFN": "prompt:\nFFN",
    "x prefill": "prompt:\nwhole model",
}


def dense_times(model: str) -> dict[int, float]:
    """Microseconds of the fastest recorded dense FFN of "7B" or "1B" by tokens at once."""
    record = decode_tables.recorded(model)
    found = {}
    for batch, ffn in record.results["ffn"].items():
        found[int(batch)] = 1e3 * generate.fastest(ffn["decode"])
        found[int(batch) * record.config["prompt"]] = 1e3 * generate.fastest(ffn["prefill"])
    return dict(sorted(found.items()))


def least_times() -> Figure:
    """Least time of a dense FFN over the tokens at once, by bytes and by FLOPs, and what was measured."""
    fig, ax = plt.subplots(figsize=(9.5, 4.6))
    tokens = np.geomspace(1, 2**17, 200)
    for model, colour in _SHAPES.items():
        shape, record = train_preset(decode_tables.MODELS[model]).model, decode_tables.recorded(model)
        bandwidth = record.results["bandwidth"]
        both = [decoding.ffn_cost(shape.d_model, shape.d_ff, t).microseconds(bandwidth) for t in tokens]
        by_bytes, by_flops = map(np.array, zip(*both, strict=True))
        ax.plot(tokens, np.maximum(by_bytes, by_flops), color=colour, label=f"{model}: least time")
        measured = dense_times(model)
        ax.plot(*zip(*measured.items(), strict=True), "o", color=colour, ms=7, label=f"{model}: measured")
    ridge = 1e12 * PEAK_DENSE / bandwidth
    ax.axvline(ridge, color="0.6", lw=1, ls="--")
    for place, side, word in ((0.88, "right", "memory-bound"), (1.14, "left", "compute-bound")):
        ax.text(ridge * place, 4e4, word, ha=side, fontsize=10, color="0.35")
    ax.set(
        xscale="log", yscale="log", xlabel="tokens multiplied at once", ylabel="time of one dense FFN (µs)"
    )
    ax.set_xticks([1, 8, 64, 512, 2048, 16384, 131072], ["1", "8", "64", "512", "2048", "16,384", "131,072"])
    ax.minorticks_off()
    ax.set_title("64 tokens take little longer than one: the weights are read once in any case")
    ax.legend(loc="upper left", fontsize=9, **OPAQUE)
    return fig


def touched(texts: int, clusters: int, k: int) -> Figure:
    """Which clusters each of some texts uses if all choose k at random, and which are read for any of them.

    Raises ValueError if there are fewer than k clusters.
    """
    expected = decoding.share_touched(k, clusters, texts)
    scores = np.random.default_rng(0).standard_normal((texts, clusters))
    used = scores >= np.sort(scores, axis=1)[:, -k, None]
    fig, (each, together) = plt.subplots(
        2, 1, figsize=(9, 3.3), height_ratios=[max(3, texts**0.5 * 1.5), 1], sharex=True
    )
    for ax, grid, colour in ((each, used, PALETTE["venom"]), (together, used.any(0)[None], PALETTE["dense"])):
        ax.pcolormesh(grid, cmap=ListedColormap(["white", colour]), edgecolors="0.8", lw=0.6, vmin=0, vmax=1)
        ax.set(ylim=(len(grid), 0), yticks=[])
        ax.grid(False)
    each.set_ylabel(f"{texts} {'text' if texts == 1 else 'texts'}")
    together.set(ylabel="read", xlabel="cluster")
    if clusters <= 32:
        together.set_xticks(np.arange(clusters) + 0.5, range(clusters))
    share = used.any(0).mean()
    each.set_title(
        f"A text uses {k} of {clusters} clusters, so {k / clusters:.0%} of the weights.\n"
        f"All together read {share:.0%} (expected: {expected:.0%})"
    )
    return fig


def try_touched(texts: int, clusters: int, k: int) -> None:
    """`touched`, or why not; for sliders."""
    try:
        touched(texts, clusters, k)
    except ValueError as error:
        print(error)


def batches() -> Figure:
    """Over texts at a time: the share of clusters touched, and how many times as fast the FFN is as dense."""
    fig, (share, gain) = plt.subplots(1, 2, figsize=(11, 4.1))
    config, texts = generate.ARMS[decode_tables.WHOLE], np.geomspace(1, 64, 100)
    expected = np.array([decoding.share_touched(config.top_k, config.n_clusters, t) for t in texts])
    share.plot(texts, 100 * expected, color=PALETTE["dense"], label="$1 - (1 - k/C)^B$")
    gain.plot(texts, 1 / expected, color=PALETTE["dense"], label="what the bytes allow")
    for (model, colour), marker, size in zip(_SHAPES.items(), "os", (11, 6), strict=True):
        rows = decode_tables.numbers(model).xs(decode_tables.WHOLE, level="arm")
        look = {"color": colour, "ms": size, "label": f"{model}, recorded"}
        share.plot(rows.index, 100 * rows["used"], marker, **look)
        gain.plot(rows.index, rows["x"], f"{marker}:", **look)
    gain.axhline(1, color="0.5", lw=1.2, ls="--")
    gain.text(64, 1.04, "dense", ha="right", va="bottom", fontsize=9, color="0.35")
    for ax, top in ((share, 105), (gain, 4.3)):
        ax.set(xscale="log", xlabel="texts at a time, B", ylim=(0, top))
        ax.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
        ax.minorticks_off()
    share.set(ylabel="clusters read (%)", title="Eight texts touch nearly all of 16 clusters")
    gain.set(ylabel="FFN, times as fast as dense", title="So with eight texts the gain is gone")
    share.legend(loc="lower right", fontsize=9)
    gain.legend(loc="upper right", fontsize=9)
    return fig


def gains() -> Figure:
    """Times as fast as dense of a generated token and of the prompt, FFN and whole model, and the aims."""
    fig, axes = plt.subplots(2, 3, figsize=(12, 6.6), sharey=True)
    for line, model in zip(axes, decode_tables.MODELS, strict=True):
        at = decode_tables.numbers(model)
        for ax, batch in zip(line, decode_tables.recorded(model).config["batches"], strict=True):
            found = {arm: at.loc[(batch, arm), list(MEASURED)] for arm in _ARMS}
            names = {arm: NAMES[arm.removesuffix(", same")] for arm in _ARMS}
            frame = pd.DataFrame(found).rename(columns=names)
            frame.plot.bar(ax=ax, color=list(_ARMS.values()), width=0.86, edgecolor="white", legend=False)
            for bars, ink in zip(ax.containers, ("black", "white", "white"), strict=True):
                for bar in bars:
                    middle, height = bar.get_x() + bar.get_width() / 2, bar.get_height()
                    y, colour = (0.06, ink) if height > 0.6 else (height + 0.06, "black")
                    look = {"ha": "center", "va": "bottom", "rotation": 90, "fontsize": 9}
                    ax.text(middle, y, f"{height:.2f}", color=colour, **look)
            ax.set_xticks(range(len(MEASURED)), list(MEASURED.values()), rotation=0)
            ax.axhline(1, color=PALETTE["dense"], lw=1.2, ls="--", label="dense")
            if batch == 1:
                draw_aims(ax, {"decode": 0, "prefill": 2})
            ax.set(title=f"{model}, {batch} {'text' if batch == 1 else 'texts'} at a time", ylim=(0, 3.9))
            ax.tick_params(axis="x", labelsize=8)
            ax.grid(False, axis="x")
        line[0].set_ylabel("times as fast as dense")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=10)
    return fig


def draw_aims(ax: Axes, places: Mapping[str, int]) -> None:
    """A short line at each of `generate.AIMS` above the group of bars where it belongs."""
    for i, (_, what, aim) in enumerate(generate.AIMS):
        label = "our aim" if not i else None
        ax.hlines(aim, places[what] - 0.45, places[what] + 0.45, color=PALETTE["paper"], lw=3, label=label)
