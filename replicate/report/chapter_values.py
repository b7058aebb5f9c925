"""What the notebooks' text shows between markers: numbers from the records, and links to other chapters."""

import re
from functools import cache

import numpy as np
import pandas as pd

from replicate import paper, study
from replicate.bench import step
from replicate.config import TrainConfig
from replicate.report import (
    choice_plots,
    decode_tables,
    diffusion_values,
    kernels_page,
    mix_tables,
    notebooks,
    replication_page,
    step_table,
    time_to_loss,
    weight_plots,
    width,
)
from replicate.report import study_tables as tables
from replicate.report.layer_tables import NAMES
from replicate.settings.presets import train_preset
from replicate.study import completion, gradients, results
from replicate.training.flops import param_count

_SCALE = "|".join(tables.TRAINED)
_LOSS = re.compile(rf"(held-out|training) ({_SCALE}): (.+)")
_ZEROS = re.compile(rf"zeros ({_SCALE})")
_BEFORE = re.compile(r"2503\.16672: (.+?)(?: - (.+))?")
_COLUMN = {"held-out": tables.HELD, "training": tables.TRAIN}


def value(book: notebooks.Notebook, name: str) -> str:
    """The text that stands for a name in a notebook, "" for an unknown one.

    "links": to other chapters. "held-out gpu: A - B": the loss of arm A above B (A alone: above dense),
    mean ± half of the 95 % interval (number of seeds); likewise "training laptop: A", and
    "training gpu: A - B - C" for the loss of A above the sum of two, each above dense.
    "2503.16672: A - B": that paper's loss of A minus that of B. "tokens, gpu over laptop" (or "parameters"):
    how many times as many. "zeros gpu": natural sparsity of dense training, mean over layers and seeds.
    Other names are those of `values` here, in `diffusion_values`, `kernels_page` and `replication_page`,
    and those of `decode_tables.chapter_values`.
    """
    if name == "links":
        return _links(book)
    if found := _LOSS.fullmatch(name):
        kind, scale, arms = found.groups()
        above = tuple(arm for arm in arms.split(" - ") if arm != "dense")
        return tables.brief(tables.contrast(tables.runs(scale), above, _COLUMN[kind]))
    if found := _ZEROS.fullmatch(name):
        dense = tables.runs(found[1]).query("arm == 'dense'")
        return f"{100 * dense['y2_sparsity'].mean():.1f} %"
    if found := _BEFORE.fullmatch(name):
        losses = paper.data()["neighbours"]["2503.16672"]
        return f"{losses[found[1]] - (losses[found[2]] if found[2] else 0):.3f}"
    if name in ("parameters, gpu over laptop", "tokens, gpu over laptop"):
        gpu, laptop = (study.arms(scale, ["dense"])[0] for scale in ("gpu", "laptop"))
        if name.startswith("tokens"):
            return f"{gpu.steps * gpu.tokens_per_step / laptop.steps / laptop.tokens_per_step:.0f}"
        return f"{_weights(gpu) / _weights(laptop):.0f}"
    pages = (kernels_page, replication_page, diffusion_values)
    numbers = (values, decode_tables.chapter_values, *(page.values for page in pages))
    return next(filter(None, (found().get(name) for found in numbers)), "")


def _weights(config: TrainConfig) -> int:
    return param_count(config.model)["non_embedding"]


def _links(book: notebooks.Notebook) -> str:
    books = notebooks.discover()
    place = [other.name for other in books].index(book.name)
    near = {"← {}": books[place - 1 : place], "{} →": books[place + 1 : place + 2]}
    links = [f"[{look.format(b.title)}]({b.path.name})" for look, some in near.items() for b in some]
    more = ("[all chapters](../README.md#the-notebooks)", "[glossary](../docs/glossary.md)")
    return " | ".join([*links, *more])


@cache
def values() -> dict[str, str]:
    """Name -> text of every number of chapters 08 to 10 and 12, from the records that their figures show."""
    mixed = _switches() | _mixes() | _accuracy() | _steps() | _losses() | _widths()
    return mixed | _costs() | _gradients() | _choices() | _time()


def _costs() -> dict[str, str]:
    """The paper's costs by arm and ours over them, and the flips of masks."""
    printed, runs = tables.paper_costs(), tables.runs("gpu")
    out = {f"printed {arm}": f"{cost:.3f}" for arm, cost in printed.items()}
    ours = results.differences(runs, column=tables.TRAIN)
    over = {arm: ours[arm].mean / cost for arm, cost in printed.items() if cost > 0}
    out |= {f"over the paper's {arm}": f"{times:.1f}" for arm, times in over.items()}
    for label, effect in weight_plots.EFFECTS.items():
        out[f"printed {label}"] = f"{printed[effect[0]] - sum(printed[arm] for arm in effect[1:]):.3f}"
    rates = weight_plots.flip_curve(runs, "recipe")[1]
    return out | {"flips, at the end": f"{rates[-1]:.2f} %"}


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
    runs, out = tables.runs("gpu"), {}
    costs = results.differences(runs, column=tables.TRAIN)
    for n, (looked, guessed) in choice_plots.SAME_NUMBER.items():
        out[f"looking saves, {n} clusters"] = f"{100 * (1 - costs[looked].mean / costs[guessed].mean):.0f} %"
    others = results.differences(runs[runs["seed"] != 1], column=tables.TRAIN)["active16x32"]
    out["winner, other seeds"] = f"{others.mean:.3f}"
    for _, arm, _, found in tables.open_questions():
        out |= {f"open {scale} {arm}": tables.brief(stats) for scale, stats in found.items()}
    traded = width.trade(runs)
    times = width.times()
    return out | {"width": width.sentence(traded, times), "experts": width.peer(traded, runs, times)}


def _time() -> dict[str, str]:
    """The runs in the picture of loss against time: speed, and loss above a dense run as short."""
    found, out = time_to_loss.frontier(tables.runs("gpu")), {}
    for arm, label in time_to_loss.ARMS.items():
        out[f"run {arm}"] = f"{found.points[label][0]:.2f}"
        out[f"{arm}, above stopped"] = tables.brief(found.stopped[label])
        if label in found.shorter:
            out[f"{arm}, above planned"] = tables.brief(found.shorter[label])
    return out


def _switches() -> dict[str, str]:
    """The jumps where the recipe is switched on and off, in nats, and the steps until the first is over."""
    out, runs = {}, mix_tables.recorded()
    for arm, row in replication_page.spike().iterrows():
        out |= {f"spike {arm}, {when}": f"{row[when]:.2f}" for when in ("before", "highest")}
        out[f"spike {arm}, back"] = f"{row['steps until back']:.0f}"
    for scale, part in runs.items():
        for name in mix_tables.FIRST:
            arm = "recipe" + mix_tables.MIXES[name]
            if arm in set(part["arm"]):
                start, gap = mix_tables.switch_off(scale, part, arm)
                here = f"off {scale} {name}"
                out |= {f"{here}, before": f"{gap[start - 20 : start].mean():.2f}"}
                out |= {f"{here}, {k}": f"{gap[start + k]:.2f}" for k in (0, 25)}
                out[f"dense end {scale} {name}"] = f"{len(gap) - start:,}"
    return out


def _mixes() -> dict[str, str]:
    """The second reading in a sentence, speeds of a run that is sparse to the end, Table 4's last average."""
    out = {"second reading": second_reading()}
    for arm in width.ON_ONE_CARD:
        out[f"on one card: {arm}"] = tables.brief(tables.on_one_card("gpu40m", arm))
    out |= {f"all sparse, {name}": f"{found['recipe']:.2f}" for name, found in mix_tables.speeds().items()}
    out["Table 4, last average"] = f"{paper.rows(4)[-1]['avg']:.3f}"
    return out | {"Table 4, last recomputed": f"{mix_tables.averages()['recipe']:.3f}"}


def second_reading() -> str:
    """What the dense end does if the backward pass reads what the forward pass read, as far as it ran."""
    arms = ("recipe, same, 50% sparse first", "recipe, same")
    ran, sure, seeds = [], [], []
    for scale, runs in mix_tables.recorded().items():
        half, whole = (mix_tables.above(runs, arm) for arm in arms)
        if half and whole:
            ran.append(f"{tables.brief(half)} at scale `{scale}` (sparse to the end {tables.brief(whole)})")
            sure.append(half.low > 0)
            seeds.append(half.n)
    if not ran:
        return "No mix of this kind is recorded yet, only runs that are sparse to the end (below)."
    listed = f"A run with half of its steps sparse ends above dense by {', '.join(ran)}. "
    if max(seeds) < 3:
        return listed + "Fewer than three runs are a first sign, no result."
    if all(sure):
        return listed + "So under this reading, too, a dense end of this length stays above dense."
    if not any(sure):
        return listed + "The intervals include zero: this cannot be told from dense."
    return listed + "Some of these intervals include zero, so it depends on the scale."


def _accuracy() -> dict[str, str]:
    """Questions asked of a model, and the largest standard error of such a score."""
    count = completion.QUESTIONS["gpu"]["n"]
    items = paper.data()["test_items"].values()
    out = {"questions": f"{count:,}", "standard error": f"{0.5 / count**0.5:.3f}"}
    return out | {"test items": f"{min(items):,} to {max(items):,}"}


def _steps() -> dict[str, str]:
    """Shares of a step, what its parts leave, memory, the law's error, the fit of the 7B model's depths."""
    records, out = step_table.models(), {}
    shares, law = step_table.shares(records), step_table.law(records)
    rests = [row["rest"] / row["step"] for record in records.values() for row in step_table.parts(record)]
    for label, row in shares.iterrows():
        formula, complete, time, attention = row
        parts = {"formula": formula, "complete": complete, "time": time}
        out |= {f"{label} {name}": f"{100 * part:.0f} %" for name, part in parts.items()}
        out[f"{label} attention over FFN"] = f"{attention / time:.1f}"
        off = law[f"{label}: step measured"] / law[f"{label}: step by the law"] - 1
        out[f"{label} law off"] = f"{100 * off.abs().max():.0f} %"
    found = {row["arm"]: row["peak GiB"] for row in step.rows(records["1B"])}
    saved = found["dense"] - found["recipe"]
    out |= {"1B peak": f"{found['dense']:.1f} GiB", "1B saved": f"{saved:.1f} GiB"}
    out["1B saved share"] = f"{100 * saved / found['dense']:.0f} %"
    out["unexplained"] = f"{100 * max(map(abs, rests)):.0f} %"
    off = max(row["residual"] for row in step.rows(records["7B"]))
    return out | {"off the line": f"{100 * off:.1f} %", "state": f"{12 * _total('llama1b') / 2**30:.1f} GiB"}


def _losses() -> dict[str, str]:
    """What our mixes cost beside the 1B model, what is below the black line, and the small models' clock."""
    panels, early = time_to_loss.points(step_table.models()), time_to_loss.stopped_early(tables.runs("gpu"))
    planned = time_to_loss.planned_shorter(tables.runs("gpu")).mean()
    shorter = planned.index.to_numpy(), planned.to_numpy()
    out = {f"below {model}": _list(time_to_loss.below(found, early)) for model, found in panels.items()}
    for model, found in panels.items():
        out[f"surely below {model}"] = _list(time_to_loss.below(found, early, sure=True))
        out[f"surely below planned {model}"] = _list(time_to_loss.below(found, shorter, sure=True))
        x, gap, _ = found[time_to_loss.SHORT[tables.HALF]]
        out[f"half, stopped {model}"] = f"{np.interp(x, *early):.3f}"
        out["half, loss"] = f"{gap.mean:.3f}"
    clock = time_to_loss.clocks()
    faster = clock["times as fast a step"][clock["format"] != NAMES["dense"]]
    out |= {"slower steps": str((faster < 1).sum()), "sparse steps": str(len(faster))}
    out["small steps"] = f"{faster.min():.2f} to {faster.max():.2f}"
    for scale, arms in time_to_loss.RACED.items():
        target, *_ = time_to_loss.table(scale, arms)
        size = time_to_loss.parameters(scale)
        rows = clock[clock["model"] == size].set_index("format")["times as fast to the loss"]
        out |= {f"target {size}": f"{target:.3f}", f"clock {size}": f"{1 / rows[NAMES['recipe']]:.2f}"}
        out[f"level {size}"] = f"{rows[NAMES['act24']]:.2f}"
    ratio = _total("llama1b") / param_count(train_preset("study40m").model)["total"]
    out["1B over gpu40m"] = f"{ratio:.0f}"
    out["accuracy gpu40m"] = tables.brief(time_to_loss.half_sparse("gpu40m")["accuracy"])
    return out


def _widths() -> dict[str, str]:
    """The speed of a step by algorithms 1 and 2 at the width from which it pays, as a graph and launched."""
    wide = pd.DataFrame(step_table.widths())
    row = wide[wide["arm"] == "recipe"].set_index("d_model").loc[step_table.pays_from(wide, "recipe")]
    return {"launched there": f"{row['x launched']:.2f}", "graph there": f"{row['x']:.2f}"}


def _total(preset: str) -> int:
    return param_count(train_preset(preset).model)["total"]


def _list(names: list[str]) -> str:
    return "; ".join(names) or "nothing"
