"""What the text of notebooks 08 and 12 shows between markers, beside losses: ratios, gradients, shares."""

from __future__ import annotations

from functools import cache

from replicate.report import choice_plots, frontier, study_tables, weight_plots, width
from replicate.study import gradients, results
from replicate.training import flops

SCALE = "gpu"  # of what is said once


@cache
def values() -> dict[str, str]:
    """Name -> text of every number, from the records that the notebooks' figures show."""
    return _costs() | _gradients() | _choices() | _time()


def value(name: str) -> str:
    """The text of one of `values`, "" for an unknown name."""
    return values().get(name, "")


def _costs() -> dict[str, str]:
    """The paper's costs by arm and ours over them, the layer's arithmetic, the spike, the flips of masks."""
    printed, runs = weight_plots.paper_costs(), study_tables.runs(SCALE)
    out = {f"printed {arm}": f"{cost:.3f}" for arm, cost in printed.items()}
    ours = results.differences(runs, column=study_tables.TRAIN)
    out |= {
        f"over the paper's {arm}": f"{ours[arm].mean / cost:.1f}" for arm, cost in printed.items() if cost > 0
    }
    one = {arm: flops.ffn_speedup(8, n24=n, n_venom=v) for arm, n, v in (("w1", 1, 0), ("venom16", 0, 4))}
    out |= {f"arithmetic {arm}": f"{x:.2f}" for arm, x in one.items()}
    for label, effect in weight_plots.EFFECTS.items():
        out[f"printed {label}"] = f"{printed[effect[0]] - sum(printed[arm] for arm in effect[1:]):.3f}"
    arms = [arm for names in weight_plots.PANELS.values() for arm in names]
    for row in weight_plots.spikes(SCALE, runs, [*arms, "recipe, scaled", "recipe, hard"]).itertuples(False):
        arm, before, _, highest, back = row
        out |= {f"before {arm}": f"{before:.2f}", f"highest {arm}": f"{highest:.2f}"}
        out[f"steps until back {arm}"] = f"{back:.0f}"
    rates = weight_plots.flip_curve(runs, "recipe")[1]
    return out | {"flips, most": f"{rates.max():.1f} %", "flips, at the end": f"{rates[-1]:.2f} %"}


def _gradients() -> dict[str, str]:
    """Length and cosine of the gradient sent down, over the true one, at the first and the last layer."""
    out = {}
    for arm, layers in gradients.ends().items():
        for name, row in (("first", layers[0]), ("last", layers[-1])):
            out[f"{name} layer, length {arm}"] = f"{row['length']:,.0f}"
            out[f"{name} layer, cosine {arm}"] = f"{row['cosine']:.2f}"
    return out


def _choices() -> dict[str, str]:
    """What looking saves over guessing, what width gains, and what one change to an arm costs."""
    runs, out = study_tables.runs(SCALE), {}
    costs = results.differences(runs, column=study_tables.TRAIN)
    for n, (looked, guessed) in choice_plots.SAME_NUMBER.items():
        out[f"looking saves, {n} clusters"] = f"{100 * (1 - costs[looked].mean / costs[guessed].mean):.0f} %"
    others = results.differences(runs[runs["seed"] != 1], column=study_tables.TRAIN)["active16x32"]
    out["winner, other seeds"] = f"{others.mean:.3f}"
    for _, arm, _, found in study_tables.open_questions():
        out |= {f"open {scale} {arm}": study_tables.brief(stats) for scale, stats in found.items()}
    return out | {"width": width.sentence(width.trade(runs), width.times())}


def _time() -> dict[str, str]:
    """The runs in the picture of loss against time: speed, and loss above a dense run as short."""
    found, out = frontier.frontier(study_tables.runs(SCALE)), {}
    for arm, label in frontier.ARMS.items():
        out[f"run {arm}"] = f"{found.points[label][0]:.2f}"
        out[f"{arm}, above stopped"] = study_tables.brief(found.stopped[label])
        out[f"{arm}, above planned"] = study_tables.brief(found.shorter.get(label))
    return out
