"""How soon a held-out loss is reached: by sparse arms, and by a dense run that is cut short."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from replicate.bench import step
from replicate.report import step_table, study_tables
from replicate.settings.presets import PRESET_OF
from replicate.settings.text import from_dict
from replicate.study import results, statistics
from replicate.study.records import Record


def table(scale: str, arms: Sequence[str]) -> tuple[float, str, pd.DataFrame]:
    """Steps and seconds until the held-out loss was down to the highest at which a run of the recipe ends.

    Seconds are steps times the milliseconds of a step as one CUDA graph, alone on the GPU; those of the dense
    warm-up count at the dense speed, evaluations not at all.

    Args:
        scale: "gpu" or "gpu40m". arms: dense first; their steps must be recorded.

    Returns:
        the loss in nats, rounded up so that every run of the recipe reaches it; the GPU's name; a row an arm.

    Raises ValueError for an arm of which a run never gets down to that loss or is not sparse to the end.
    """
    record = step_table.recorded(PRESET_OF[scale], [arm for arm in arms if arm != "dense"])
    ms = {row["arm"]: row["ms"] for row in step.rows(record)}
    ms["dense"] = ms[step.baseline(step.step_times(record))]
    frame = study_tables.runs(scale)
    target = float(np.ceil(1000 * frame.loc[frame["arm"] == "recipe", study_tables.HELD].max()) / 1000)
    rows = []
    for arm in arms:
        trained: list[Record] = frame.loc[frame["arm"] == arm, "record"].tolist()
        config = from_dict(trained[0].config)
        if config.sparse_share < 1:
            raise ValueError(f"{arm!r} has dense steps after its warm-up; leave it out")
        warm, needed = config.dense_warmup, [results.steps_to_loss(each, target) for each in trained]
        if None in needed:
            raise ValueError(f"{arm!r} never comes down to {target} nats; leave it out")
        steps = [(min(n, warm), max(0, n - warm)) for n in needed]  # dense, sparse
        seconds = [(dense * ms["dense"] + sparse * ms[arm]) / 1000 for dense, sparse in steps]
        row = {"arm": arm, "n": len(trained), "ms a step": ms[arm], "a step": ms["dense"] / ms[arm]}
        row |= {"steps": sum(needed) / len(needed), "seconds": sum(seconds) / len(seconds)}
        rows.append(row | {"from": min(seconds), "to": max(seconds)})
    found = pd.DataFrame(rows)
    found["to the loss"] = found["seconds"][0] / found["seconds"]
    return target, record.device, found


def stopped_early(runs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """What a dense run loses if it is stopped early: (times as fast [N], held-out loss above its end [N]).

    From the evaluations on the way, averaged over seeds, latest first: (1, 0) is the whole run. The learning
    rate had not yet fallen to its end there, so a run planned to be this short would lose less.
    Raises ValueError if there are no dense runs, or they were evaluated at different steps.
    """
    curves = [record.results["valid_losses"] for record in runs.loc[runs["arm"] == "dense", "record"]]
    if not curves or len({tuple(step for step, _ in curve) for curve in curves}) != 1:
        raise ValueError(f"{len(curves)} runs of 'dense'; need one or more, evaluated at the same steps")
    steps, losses = np.mean(curves, axis=0).T
    there = steps > 0
    return (steps[-1] / steps[there])[::-1], (losses[there] - losses[-1])[::-1]


def above_stopped(runs: pd.DataFrame, arm: str, speed: float) -> statistics.Stats:
    """Held-out loss of an arm above its own dense run, stopped to be `speed` times as fast, seed by seed.

    With intervals as in `results.contrast`.
    """
    values = runs.pivot(index="seed", columns="arm", values="valid_loss")
    apart = (values[arm] - values["dense"]).dropna()
    lines = {seed: stopped_early(runs[runs["seed"] == seed]) for seed in apart.index}
    found = statistics.summary([gap - float(np.interp(speed, *lines[seed])) for seed, gap in apart.items()])
    return results.with_floor(found, runs, {arm: 1, "dense": -1}, "valid_loss", apart.index)


def side(
    runs: pd.DataFrame, arm: str, speed: float, between: tuple[float, float]
) -> tuple[statistics.Stats, str]:
    """`above_stopped`, and on which side of the line of dense runs stopped early the arm lies.

    "below" or "above" if the whole interval is, at this speed and at both ends of what the timing allows
    (`between`); "on it" if it is not at this speed, "on it within timing error" if not at an end.
    """
    here, *ends = (above_stopped(runs, arm, x) for x in (speed, *between))
    words = ["below" if s.high < 0 else "above" if s.low > 0 else "on it" for s in (here, *ends)]
    if words[0] != "on it" and len(set(words)) > 1:
        return here, "on it within timing error"
    return here, words[0]
