"""Loss against time: sparse runs, and dense runs that are cut short or planned shorter."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from replicate.figures import about
from replicate.report import step_plots, step_table, time_to_loss
from replicate.settings.text import from_dict
from replicate.study import plans, results, statistics
from replicate.training import flops

ARMS = {  # -> what it is called; its formats are those of the preset before the comma
    "recipe": "algorithms 1, 2, 4 of 16",
    "recipe, 50% sparse first": "algorithms 1, 2, 4 of 16: half",
    "venom16": "figure 4d, 4 of 16",
    "venom64": "figure 4d, 4 of 64",
    "act24": "2:4 activations",
    "active16x32": "by activations, 8 of 32",
    "active16x32, 50% sparse first": "by activations, 8 of 32: half",
}


@dataclass(frozen=True)
class Frontier:
    """Sparse runs among dense ones, by how many times as fast as dense they are and what they lose.

    points: label -> (times as fast, held-out loss above dense, sparsity preset). early: see
    `time_to_loss.stopped_early`. ranges: label -> least and greatest times as fast by the timings.
    planned: times as fast -> loss above dense. table: a row a point. stopped, shorter: label -> loss above
    its own dense run, stopped as early or planned as short (where one was).
    """

    points: dict[str, tuple[float, statistics.Stats, str]]
    early: tuple[np.ndarray, np.ndarray]
    ranges: dict[str, tuple[float, float]]
    planned: dict[float, float]
    table: pd.DataFrame
    stopped: dict[str, statistics.Stats]
    shorter: dict[str, statistics.Stats]


def frontier(runs: pd.DataFrame, model: str = "llama1b") -> Frontier:
    """The arms of ARMS that ran, at the measured speeds of a model's step.

    Each arm is compared seed by seed with its own dense run; the line "stopped" goes through that run's
    evaluations, the line "planned" through the shorter dense runs.
    """
    there = [arm for arm in ARMS if arm in set(runs["arm"])]
    step, timed = step_table.speeds(model), step_table.speed_ranges(model)
    gaps = results.differences(runs, arms=there)
    configs = {arm: from_dict(part["record"].iloc[0].config) for arm, part in runs.groupby("arm")}
    whole = configs["dense"]
    early = time_to_loss.stopped_early(runs)
    losses = runs.pivot(index="seed", columns="arm", values="valid_loss")
    planned = [arm for arm in plans.PLANNED if arm in configs and losses[arm].count() == len(losses)]
    lengths = {whole.steps / configs[arm].steps: losses[arm] for arm in ("dense", *planned)}
    lengths = dict(sorted(lengths.items()))
    points, ranges, stopped, shorter, rows = {}, {}, {}, {}, []
    for arm in there:
        preset, config, label = arm.split(",")[0], configs[arm], ARMS[arm]
        share = config.sparse_share * (1 - config.dense_warmup / config.steps)
        x = flops.run_speedup(share, step[preset])
        apart = (losses[arm] - losses["dense"]).dropna()
        ranges[label] = tuple(flops.run_speedup(share, end) for end in timed[preset])
        over, side = time_to_loss.side(runs, arm, x, ranges[label])
        points[label], stopped[label] = (x, gaps[arm], preset), over
        row = {"training": label, "times as fast": f"{x:.3f}", "above dense": results.interval(gaps[arm], "")}
        row["dense stopped as early"] = about(float(np.interp(x, *early)), 2)
        row["above its own dense, stopped"] = results.interval(over, "")
        row["the line"] = side
        row["above its own dense, planned"] = "not run"
        if x <= max(lengths):  # nothing shorter was planned
            ends = {
                one: float(np.interp(x, list(lengths), [loss[one] for loss in lengths.values()]))
                for one in apart.index
            }
            fair = [gap - (ends[one] - losses["dense"][one]) for one, gap in apart.items()]
            of = {arm: 1, "dense": -1}
            fair = results.with_floor(statistics.summary(fair), runs, of, "valid_loss", list(apart.index))
            shorter[label] = fair
            row["above its own dense, planned"] = results.interval(shorter[label], "")
        rows.append(row)
    means = {x: float((loss - losses["dense"]).mean()) for x, loss in lengths.items()}
    return Frontier(points, early, ranges, means, pd.DataFrame(rows), stopped, shorter)


def draw(found: Frontier, ylabel: str, title: str) -> Figure:
    """Held-out loss above dense over the speed of a run, beside dense runs stopped or planned short."""
    fig, ax = plt.subplots(figsize=(10, 5))
    step_plots.draw_frontier(ax, found.points, found.early, found.ranges)
    line = list(found.planned), list(found.planned.values())
    ax.plot(*line, "s--", color="0.3", ms=7, label="dense, planned shorter")
    ax.set(ylabel=ylabel, title=title)
    ax.legend(loc="upper left")
    return fig
