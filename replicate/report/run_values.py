"""What the text of notebooks 09 and 10 shows between markers, beside losses: switches, speeds, shares."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd

from replicate import paper
from replicate.bench import step
from replicate.report import mix_tables, replication_page, step_table, time_to_loss
from replicate.report import study_tables as tables
from replicate.report.layer_tables import NAMES
from replicate.settings.presets import train_preset
from replicate.study import completion
from replicate.training.flops import param_count


@cache
def values() -> dict[str, str]:
    """Name -> text of every number, from the records that the notebooks' figures show."""
    return _switches() | _mixes() | _accuracy() | _steps() | _losses() | _widths()


def value(name: str) -> str:
    """The text of one of `values`, "" for an unknown name."""
    return values().get(name, "")


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
        out[f"{label} formula"], out[f"{label} complete"] = (
            f"{100 * formula:.0f} %",
            f"{100 * complete:.0f} %",
        )
        out[f"{label} time"] = f"{100 * time:.0f} %"
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
    out = {f"below {model}": _list(time_to_loss.below(found, early)) for model, found in panels.items()}
    for model, found in panels.items():
        out[f"surely below {model}"] = _list(time_to_loss.below(found, early, sure=True))
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
