"""What README.md shows: verdicts on the main claims, and speeds of the layer and of a whole step.

docs/teaching.md shows its numbers too, and how long runs take.
"""

import re
from functools import cache

import pandas as pd

from replicate import figures, paper, study
from replicate.paper import audit
from replicate.paper.table import shipped_table, spared, verdict_counts
from replicate.paper.verdicts import FAILS, HOLDS
from replicate.report import (
    decode_tables,
    diffusion_values,
    layer_tables,
    scaling_page,
    step_table,
    study_coverage,
    study_tables,
    width,
)

ON_PAPER = ("01", "02", "11")  # notebooks that judge formats, FLOPs and printed numbers without a run


def tables() -> dict[str, str]:
    """Name -> Markdown of both tables, from the records and from what `replicate claims --write` wrote."""
    return {"verdicts": _verdicts(shipped_table()), "speed": _speed()}


def value(name: str) -> str:
    """The text of one of `values`; "minutes gpu", a run's; "hours gpu 15", of 15 runs; "" for other names."""
    if time := re.fullmatch(r"(minutes|hours) (\w+)(?: (\d+))?", name):
        unit, scale, runs = time.groups(default="1")
        return f"{study_tables.run_seconds(scale) * int(runs) / (60 if unit == 'minutes' else 3600):.1f}"
    return values().get(name, "")


@cache
def values() -> dict[str, str]:
    """Name -> text of the numbers in the README's sentences: losses above dense at gpu scale, speeds."""
    frame, (preset, _) = study_tables.runs("gpu"), step_table.MODELS["1B"]
    size, larger, largest = (study_coverage.setting(scale) for scale in ("gpu", "gpu40m", "gpu100m"))
    steps = step_table.speeds(preset)
    share = step_table.shares(step_table.models()).loc["1B", "time, measured"]
    layer = layer_tables.over_dense(step_table.MODELS["1B"][1], device=step_table.CARD)
    above = {arm: study_tables.contrast(frame, (arm,), study_tables.TRAIN) for arm in frame["arm"].unique()}
    out = {arm: f"{loss.mean:+.3f}" for arm, loss in above.items()}
    out |= decode_tables.values() | layer_tables.fp8_values() | step_table.fp8_values()
    out |= diffusion_values.shares() | scaling_page.values() | layer_tables.video_values()
    for arm, (one, eight) in width.times().items():
        out |= {f"time {arm}": f"{one:.2f} times", f"time 8 {arm}": f"{eight:.2f} times"}
    return out | {
        "headline": "{} to {} times".format(*paper.number("headline")),
        "paper step": f"{paper.number('step_speedup_text')} times",
        "paper W1": f"{audit.table3_costs()['W1']:+.3f}",
        "layer": f"{layer['recipe']:.1f} times",
        "step": f"{steps['recipe']:.1f} times",
        "ceiling": f"{1 / (1 - share):.1f} times",
        **{f"step {arm}": f"{steps[arm]:.2f} times" for arm in ("act24", "venom16", "active16x32")},
        "share": f"{share:.0%}",
        "parameters": size["parameters without embedding"].replace("M", " million"),
        "parameters gpu40m": larger["parameters without embedding"].replace("M", " million"),
        "parameters gpu100m": largest["parameters without embedding"].replace("M", " million"),
        "gain": f"{steps['recipe'] - 1:.2f}",
        "paper gain": f"{paper.number('step_speedup_text') - 1:.1f}",
        "tokens": size["training tokens"].replace("M", " million"),
    }


def _verdicts(claims: pd.DataFrame) -> str:
    columns = ["place", "claim", "paper", "ours", "verdict", "scale", "notebook"]
    shown = figures.markdown(claims.loc[paper.data()["claims_in_readme"], columns])
    return f"{verdict_counts(claims)}. {_kinds(claims)}\n\n{shown}"


def _kinds(claims: pd.DataFrame) -> str:
    """What the counts are made of: arithmetic and formulas, or runs and timings."""
    failed, held = (claims[claims["verdict"] == verdict] for verdict in (FAILS, HOLDS))
    sums = failed[failed["notebook"].isin(ON_PAPER)]
    large = int(held["scale"].isin(study.PRESET_OF.keys() - {"smoke"}).sum())
    places = ", ".join(sorted(set(sums["notebook"])))
    return (
        f"Of the {len(failed)} that do not hold, {len(sums)} are arithmetic or formulas (notebooks {places}) "
        f"and {len(failed) - len(sums)} measured; of the {len(held)} that hold, {large} "
        f"rest on runs or timings at laptop scale or larger. {len(spared(claims))} of those not testable "
        "have a whole interval against the paper, at a scale that we let refute nothing."
    )


def _speed() -> str:
    """Times as fast as dense, of the FFN and of a whole training step, by format and model."""
    columns: dict[str, dict[str, float]] = {}
    for model, (preset, d_model) in step_table.MODELS.items():
        columns[f"FFN, {model} shape"] = layer_tables.over_dense(d_model, device=step_table.CARD)
        columns[f"whole step, {model}"] = step_table.speeds(preset)
    arms = [arm for arm in layer_tables.NAMES if not arm.startswith("dense")]
    shown = pd.DataFrame(columns).reindex(arms).dropna(how="all")
    cells = shown.rename(index=layer_tables.NAMES).map(lambda x: "" if pd.isna(x) else f"{x:.2f}x")
    return figures.markdown(cells.rename_axis("times as fast as dense").reset_index())
