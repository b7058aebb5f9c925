"""Pictures of chapter 08: what each sparse operand costs, and what the backward pass reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from replicate import figures, study
from replicate.report import study_plots as plots
from replicate.report import study_tables
from replicate.sparsity import flip_rate, mask24, prune24, soft_threshold24
from replicate.study import gradients, results

WHOLE, SAME, OWN = "#D55E00", "#0072B2", "#444444"  # what backward reads, as in `study_plots.draw_readings`
# Panel of `gaps` -> its arms
PANELS = {
    "one weight": ("w1", "w2", "w1+w1t", "w2+w2t", "w1, same", "w2, same"),
    "both weights": ("w1+w2", "w1+w2, scaled", "w1+w2, hard", "w1+w2+t", "w1+w2, same"),
    "activations, and the recipe": ("venom64", "venom32", "venom16", "recipe", "recipe, same", "act24"),
}
_DASHED = ("w2", "w2, same", "w2+w2t", "w1+w2, scaled", "venom32")
_DOTTED = ("w1+w2, hard", "venom64")
# Contrast of training losses -> the arm, and those whose costs are taken from its own
EFFECTS = {name: arms for name, arms in study_tables.WEIGHTS.items() if not arms[0].startswith("recipe")}
# Claim of Table 3 and its text -> the arm, and those whose costs are taken from its own
CLAIMS: dict[str, tuple[str, ...]] = {
    "table3-w1": ("w1",),
    "table3-w1-same": ("w1, same",),
    "table3-w1-w1t": ("w1+w1t",),
    "table3-w2": ("w2",),
    "table3-w2-same": ("w2, same",),
    "table3-w2-w2t": ("w2+w2t",),
    "table3-w1-w2-whole": ("w1+w2",),
    "table3-w1-w2-same": ("w1+w2, same",),
    "table3-w1-w2": ("w1+w2+t",),
    "table3-venom": ("venom16",),
    "table3-act24": ("act24",),
    "table3-additive-whole": EFFECTS["beyond the sum of W1 and W2, read whole"],
    "table3-additive-same": EFFECTS["beyond the sum of W1 and W2, read the same"],
    "table3-additive": EFFECTS["beyond the sum, with transposes"],
    "table3-transpose": EFFECTS["W1's transpose, over W1 read whole"],
    "table3-transpose-same": EFFECTS["W1's transpose, over W1 read the same"],
    "table3-transpose-w2": EFFECTS["W2's transpose, over W2 read whole"],
    "table3-transpose-w2-same": EFFECTS["W2's transpose, over W2 read the same"],
}
_NORMS = {"w1+w2": (WHOLE, "-"), "w1": (WHOLE, "--"), "dense": ("0.6", "-"), "w1+w2, same": (SAME, "-")}
_FLIPS = {
    "w1": (WHOLE, "-"),
    "w2": (WHOLE, "--"),
    "w1+w2+t": (OWN, "-"),
    "recipe": (figures.PALETTE["venom"], ":"),
}


def look(arm: str) -> tuple[str, str]:
    """(colour, line) of an arm's curve: activations by format, weights by what the backward pass reads."""
    line = "--" if arm in _DASHED else ":" if arm in _DOTTED else "-"
    if arm.startswith(("act24", "venom")):
        return figures.PALETTE[figures.family(arm)], line
    return SAME if arm.endswith(", same") else OWN if arm.endswith("t") else WHOLE, line


def table3(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Table 3 under both readings of the backward pass, a panel for each scale."""
    size = (1.4 + 3.2 * max(2.7, len(studies)), 4.8)
    fig, axes = plt.subplots(1, len(studies), figsize=size, squeeze=False, sharey=True)
    for ax, (scale, part) in zip(axes[0], studies.items(), strict=True):
        stats = results.differences(part, column="final_loss")
        plots.draw_readings(ax, stats, study_tables.paper_costs(), title=f"{scale} scale")
    marks, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(marks, labels, loc="outside lower center", ncols=2)
    axes[0][len(studies) // 2].set_xlabel("training loss above dense (nats; logarithmic from 0.02 on)")
    return fig


def cost_table(studies: Mapping[str, pd.DataFrame], names: Sequence[str]) -> pd.DataFrame:
    """A row an arm that ran: the paper's training loss above dense, and ours at each scale, in nats."""
    costs = {scale: results.differences(part, column="final_loss") for scale, part in studies.items()}
    printed, rows = study_tables.paper_costs(), []
    for name in (name for name in names if any(name in stats for stats in costs.values())):
        row = {"arm": name, "paper": f"{printed[name]:+.3f}" if name in printed else ""}
        rows.append(row | {scale: study_tables.brief(stats.get(name)) for scale, stats in costs.items()})
    return pd.DataFrame(rows)


def effects(scales: Sequence[str]) -> pd.DataFrame:
    """A row for each of EFFECTS: the paper's and ours at each scale, in nats of training loss."""
    printed, rows = study_tables.paper_costs(), []
    for label, (arm, *others) in EFFECTS.items():
        row = {"effect": label, "paper": f"{printed[arm] - sum(printed[name] for name in others):+.3f}"}
        for scale in scales:
            stats = study_tables.contrast(study_tables.runs(scale), (arm, *others), study_tables.TRAIN)
            row[scale] = study_tables.brief(stats)
        rows.append(row)
    return pd.DataFrame(rows)


def gaps(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Training loss above dense as runs go on, mean and range of the seeds, a row for each scale."""
    size = (11, 3.7 * len(studies))
    fig, axes = plt.subplots(len(studies), len(PANELS), figsize=size, squeeze=False)
    for row, (scale, part) in zip(axes, studies.items(), strict=True):
        dense, there = study.arms(scale, ["dense"])[0], set(part["arm"])
        window = max(5, dense.steps // 15)
        for ax, (title, names) in zip(row, PANELS.items(), strict=True):
            ends, late = {}, []
            for name in (name for name in names if name in there):
                colour, line = look(name)
                steps, gap = results.gap_curve(part, name, window=window)
                tokens = steps * dense.tokens_per_step / 1e6
                ax.plot(tokens, gap.mean(0), line, color=colour)
                ax.fill_between(tokens, gap.min(0), gap.max(0), color=colour, alpha=0.15, lw=0)
                ends[name] = tokens[-1], gap.mean(0)[-1], colour
                late.append(gap[:, gap.shape[1] // 3 :].max())
            ax.axhline(0, color="0.5", lw=0.8)
            ax.set_ylim(-0.08 * max(late), 1.08 * max(late))
            ax.set(xlabel="training tokens (millions)", title=f"{title}, {scale}")
            plots.label_ends(ax, ends)
        row[0].set_ylabel("training loss above dense (nats)")
    return fig


def layers(by_layer: Mapping[str, Sequence[Mapping[str, float]]], scale: str, runs: pd.DataFrame) -> Figure:
    """Length and cosine of the gradient sent down, by layer, and the gradient's length over the steps.

    Args:
        by_layer: of `gradients.ends`. scale, runs: whose gradient norms are drawn.
    """
    looks = {"w1": (WHOLE, "--"), "w2": (figures.PALETTE["2:4 activations"], "--")}
    looks |= {"w1+w2": (WHOLE, "-"), "recipe": (OWN, "-")}
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.7))
    for ax, key in zip(axes, ("length", "cosine"), strict=False):
        for name, (colour, line) in looks.items():
            values = [row[key] for row in by_layer[name]]
            ax.plot(range(1, len(values) + 1), values, f"o{line}", color=colour, ms=5, label=name)
        ax.axhline(1, color="0.5", lw=1, ls=":")
        ax.set(xlabel="layer (1 is the first)", xticks=range(1, len(values) + 1))
    axes[0].set(yscale="log", ylabel="times as long as the true one", title="Length")
    axes[1].set(ylim=(0, 1.05), ylabel="cosine with the true one", title="Direction")
    axes[0].legend()
    ends = {}
    for name, (colour, line) in _NORMS.items():
        steps, norms = norm_curve(runs, name)
        axes[2].plot(steps, norms, line, color=colour)
        ends[name] = steps[-1], norms[-1], colour
    axes[2].set(yscale="log", xlabel="step", ylabel="length before clipping at 1")
    axes[2].set_title(f"Whole gradient, {scale}")
    plots.label_ends(axes[2], ends)
    return fig


def norm_curve(runs: pd.DataFrame, arm: str) -> tuple[list[int], np.ndarray]:
    """(steps, length of the gradient of all weights before clipping, median of the seeds) of an arm."""
    curves = [results.series(record, "grad_norm") for record in runs.loc[runs["arm"] == arm, "record"]]
    return [step for step, _ in curves[0]], np.median([[norm for _, norm in c] for c in curves], axis=0)


def spikes(scale: str, runs: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Training loss around the first sparse step, means over seeds, a row an arm; losses in nats.

    Columns: "before", "first sparse step", "highest" of the sixty from there on, and "steps until back" at
    the mean of the last ten dense steps.
    """
    start, rows = study.arms(scale, ["dense"])[0].dense_warmup, []
    for name in [name for name in names if name in set(runs["arm"])]:
        losses = [r.results["steps"]["loss"] for r in runs.loc[runs["arm"] == name, "record"]]
        levels = [np.mean(loss[start - 10 : start]) for loss in losses]
        around = [(loss[start - 1], loss[start], max(loss[start : start + 60])) for loss in losses]
        pairs = zip(losses, levels, strict=True)
        back = [np.argmax(np.array(loss[start:]) <= level) for loss, level in pairs]
        before, first, highest = np.mean(around, axis=0)
        row = {"arm": name, "before": before, "first sparse step": first, "highest": highest}
        rows.append(row | {"steps until back": np.mean(back)})
    return pd.DataFrame(rows)


def flip_curve(runs: pd.DataFrame, arm: str) -> tuple[list[int], np.ndarray]:
    """(steps, percent of the mask entries flipped in a step, mean over seeds and layers) of an arm."""
    curves = [results.series(record, "flip_rate") for record in runs.loc[runs["arm"] == arm, "record"]]
    return [step for step, _ in curves[0]], 100 * np.mean([[rate for _, rate in c] for c in curves], axis=0)


def moves(sizes: Sequence[float]) -> dict[str, list[float]]:
    """What a move of random weights by h does, for each h: "flipped" (%), and how far S(W) moves over W.

    Weights are standard normal, the same on every machine; each moves by h up or down, as AdamW moves it.
    """
    draw = np.random.default_rng(0)
    w = torch.from_numpy(draw.standard_normal((1024, 1024)))
    step = torch.from_numpy(2.0 * draw.integers(0, 2, w.shape) - 1)
    found = {"flipped": [100 * flip_rate(mask24(w), mask24(w + h * step)) for h in sizes]}
    for name, prune in {"hard pruning": prune24, "soft thresholding": soft_threshold24}.items():
        found[name] = [((prune(w + h * step) - prune(w)).norm() / (h * step).norm()).item() for h in sizes]
    return found


def flips(scale: str, runs: pd.DataFrame, moved: Mapping[str, Sequence[float]]) -> Figure:
    """Flip rates over the steps of a scale's runs, and what flips do to S(W), see `moves`."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    for name, (colour, line) in _FLIPS.items():
        left.plot(*flip_curve(runs, name), line, color=colour, label=name)
    start = study.arms(scale, ["dense"])[0].dense_warmup
    left.axvline(start, color="0.5", lw=1, ls="--", label="sparse from here")
    left.set(xlabel="step", ylabel="mask entries flipped in a step (%)", ylim=(0, None))
    left.set_title(f"How many flip, {scale} scale")
    left.legend()
    for name, look in {"hard pruning": "o-", "soft thresholding": "s--"}.items():
        colour = WHOLE if name == "hard pruning" else SAME
        right.loglog(moved["flipped"], moved[name], look, color=colour, ms=5, label=name)
    late = flip_curve(runs, "recipe")[1][-1]
    right.axvspan(late / 1.2, late * 1.2, color="0.85", lw=0, label="the recipe's rate at the end")
    right.set(xlabel="mask entries flipped (%)", ylabel="move of S(W) / move of W", title="What flips do")
    right.legend()
    return fig


def mismatch(formats: Mapping[str, Any], plain: Any, x: torch.Tensor, upstream: torch.Tensor) -> pd.DataFrame:
    """What one layer sends down against the true gradient, a row a format; see `gradients.sent_down`."""
    rows = []
    for name, sparsity in formats.items():
        found = gradients.sent_down(plain, sparsity, x, upstream)
        row = {"arm": name, "y3, of the dense size": figures.about(found["output"], 2)}
        row["dx sent down / true dx"] = figures.about(found["length"], 3)
        rows.append(row | {"cosine of the two": figures.about(found["cosine"], 2)})
    return pd.DataFrame(rows)
