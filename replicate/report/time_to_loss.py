"""Loss against time: Table 2's form, the time to a loss, and dense runs cut short or planned shorter."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from replicate import paper
from replicate.bench import step
from replicate.figures import about
from replicate.report import layer_tables, step_plots, step_table, study_tables
from replicate.report.layer_tables import NAMES
from replicate.settings.presets import PRESET_OF, train_preset
from replicate.settings.text import from_dict
from replicate.study import plans, results, statistics
from replicate.study.records import Record
from replicate.training import flops
from replicate.training.flops import param_count

RACED = {  # scale -> arms whose time to the recipe's loss is known
    "gpu": ("dense", "act24", "venom16", "venom32", "recipe", "active16", "active16x32", "active64x32"),
    "gpu40m": ("dense", "act24", "venom16", "recipe", "active16x32"),
}
MIXED = {  # arm by algorithms 1 and 2 with dense steps -> its mix in Table 4
    f"recipe, {share}% sparse first": mix
    for share, mix in zip((50, 67, 83), step_table.table4_mixes(), strict=False)
}
BROAD = "gpu"  # the largest scale at which all formats were trained
SHORT = {arm: f"{arm[8:10]} % sparse" for arm in MIXED} | {"recipe": "algorithms 1, 2"}
SHORT |= {"act24": NAMES["act24"]} | {f"venom{m}": NAMES[f"venom{m}"] for m in (16, 32, 64)}
ARMS = {  # of `frontier` -> what it is called; its formats are those of the preset before the comma
    "recipe": "algorithms 1, 2, 4 of 16",
    "recipe, 50% sparse first": "algorithms 1, 2, 4 of 16: half",
    "venom16": "figure 4d, 4 of 16",
    "venom64": "figure 4d, 4 of 64",
    "act24": "2:4 activations",
    "active16x32": "by activations, 8 of 32",
    "active16x32, 50% sparse first": "by activations, 8 of 32: half",
}
Points = dict[str, tuple[float, statistics.Stats, str]]  # label -> times as fast, loss above dense, preset


def in_fp8() -> pd.DataFrame:
    """What FP8 gains a layer and costs in loss: one row dense in FP8, figure 4d, and figure 4d in FP8.

    Speeds are those of `layer_tables.in_fp8`; losses are held out, above dense, at `BROAD`.
    """
    speeds, runs = layer_tables.in_fp8(), study_tables.runs(BROAD)
    trained = {"fp8": "dense, FP8", "venom16": "venom16", "venom16, fp8": "venom16, FP8"}
    losses = [study_tables.contrast(runs, (trained[arm],), study_tables.HELD) for arm in speeds.index]
    above = {"held-out loss above dense": [study_tables.brief(loss) for loss in losses]}
    frame = speeds.rename(columns=lambda model: f"times as fast as dense, {model} shape")
    frame.insert(0, "layer", [NAMES[arm] for arm in speeds.index])
    return frame.assign(**above)


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


def planned_shorter(runs: pd.DataFrame) -> pd.DataFrame:
    """Held-out loss of dense runs of plans.PLANNED above the whole one: a row a seed, columns times as fast.

    Column 1 is the whole run. Runs that a seed lacks are left out.
    """
    dense = runs[runs["arm"].isin(["dense", *plans.PLANNED])]
    steps = {arm: part["record"].iloc[0].config["steps"] for arm, part in dense.groupby("arm")}
    losses = dense.pivot(index="seed", columns="arm", values="valid_loss").dropna(axis=1)
    above = losses.sub(losses["dense"], axis=0)
    return above.rename(columns=lambda arm: steps["dense"] / steps[arm]).sort_index(axis=1)


def above_stopped(runs: pd.DataFrame, arm: str, speed: float) -> statistics.Stats:
    """Held-out loss of an arm above its own dense run, stopped to be `speed` times as fast, seed by seed."""
    return _above(runs, arm, lambda seed: np.interp(speed, *stopped_early(runs[runs["seed"] == seed])))


def _above(runs: pd.DataFrame, arm: str, line: Callable[[int], float]) -> statistics.Stats:
    """Held-out loss of an arm above its own dense run and `line`, seed by seed, see `results.contrast`."""
    values = runs.pivot(index="seed", columns="arm", values="valid_loss")
    apart = (values[arm] - values["dense"]).dropna()
    found = statistics.summary([gap - line(seed) for seed, gap in apart.items()])
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


def parameters(scale: str) -> str:
    """The size of a scale's model without its embedding, such as "10.6M"."""
    return f"{param_count(train_preset(PRESET_OF[scale]).model)['non_embedding'] / 1e6:.1f}M"


def clocks() -> pd.DataFrame:
    """`table` of RACED, models and formats by name."""
    found = [table(scale, arms)[2].assign(model=parameters(scale)) for scale, arms in RACED.items()]
    columns = {"arm": "format", "n": "seeds", "a step": "times as fast a step"}
    columns |= {"to the loss": "times as fast to the loss"}
    frame = pd.concat(found).replace({"arm": NAMES}).rename(columns=columns)
    return frame[["model", *frame.columns.drop("model")]]


def half_sparse(scale: str) -> dict[str, statistics.Stats]:
    """Above dense, "loss" and, where it is known, "accuracy" of the run with half of its steps sparse."""
    half, runs = study_tables.HALF, study_tables.runs(scale)
    known = study_tables.accuracies(runs)
    out = {"loss": results.differences(runs, column=study_tables.TRAIN, arms=[half])[half]}
    if half in set(known["arm"]):
        out["accuracy"] = results.differences(known, column="accuracy", arms=[half])[half]
    return out


def table2(records: Mapping[str, Record]) -> pd.DataFrame:
    """Table 2's form: our runs and the paper's; records: of the steps that our speed-ups come from."""
    speed = {label: found["recipe"] for label, found in step_table.sparse_speeds(records).items()}
    sparse, dense = paper.number("mix_1b")
    ours, rows = {"dense": 0.0, study_tables.HALF: sparse / (sparse + dense), "recipe": 1.0}, []
    for scale in study_tables.SIZES:
        runs = study_tables.runs(scale)
        known = study_tables.accuracies(runs)
        for arm, share in ours.items():
            ran = " / ".join(f"{flops.run_speedup(share, x):.3f}" for x in speed.values()) if share else "1"
            gap = study_tables.contrast(runs, (arm,), study_tables.TRAIN) if share else None
            score = known.loc[known["arm"] == arm, "accuracy"].mean()
            row = {"model": f"ours, {parameters(scale)} ({scale})", "training": arm, "speed-up": ran}
            row["loss"] = f"{runs.loc[runs['arm'] == arm, study_tables.TRAIN].mean():.3f}"
            row |= {"above dense": study_tables.brief(gap)}
            rows.append(row | {"accuracy": "not recorded" if np.isnan(score) else about(score)})
    printed = {row["model"]: row for row in paper.rows(2)}
    for name, found in printed.items():
        size, training = name.split()
        row = {"model": f"the paper's, {size}", "training": training, "speed-up": f"{found['speedup']:g}"}
        gap = found["loss"] - printed[f"{size} dense"]["loss"]
        row |= {"loss": f"{found['loss']:.3f}", "above dense": f"{gap:+.3f}" if training == "sparse" else ""}
        rows.append(row | {"accuracy": f"{found['avg']:.3f}"})
    return pd.DataFrame(rows)


def points(records: Mapping[str, Record]) -> dict[str, Points]:
    """Model -> every format of SHORT at its measured speed, with its held-out loss at scale BROAD."""
    gaps, mixes = results.differences(study_tables.runs(BROAD), arms=list(SHORT)), step_table.mixes()
    out: dict[str, Points] = {}
    for model, speed in step_table.sparse_speeds(records).items():
        out[model] = {}
        for arm, label in SHORT.items():
            preset, share = ("recipe", mixes[MIXED[arm]]) if arm in MIXED else (arm, 1.0)
            out[model][label] = (flops.run_speedup(share, speed[preset]), gaps[arm], preset)
    return out


def ranges(records: Mapping[str, Record]) -> dict[str, dict[str, tuple[float, float]]]:
    """Model -> what the timings allow for the speeds of `points`, see `step_table.speed_ranges`."""
    mixes, out = step_table.mixes(), {}
    for model, record in records.items():
        timed, out[model] = step_table.speed_ranges(record.config["preset"]), {}
        for arm, label in SHORT.items():
            preset, share = ("recipe", mixes[MIXED[arm]]) if arm in MIXED else (arm, 1.0)
            out[model][label] = tuple(flops.run_speedup(share, end) for end in timed[preset])
    return out


def below(found: Points, early: tuple[np.ndarray, np.ndarray], *, sure: bool = False) -> list[str]:
    """Those that lose less than a dense run as short, at times as fast [N] and loss [N].

    Beyond the shortest dense run its loss is taken, so nothing is below by extrapolation.

    Args:
        sure: with the whole interval of three seeds or more.
    """
    return [
        name
        for name, (x, gap, _) in found.items()
        if (gap.high if sure else gap.mean) < np.interp(x, *early) and (gap.n > 2 or not sure)
    ]


def loss_and_time(panels: Mapping[str, Points], early: tuple[np.ndarray, np.ndarray]) -> pd.DataFrame:
    """`points` as a table, beside what a dense run loses that is stopped as early."""
    rows = []
    for label, (_, gap, _) in next(iter(panels.values())).items():
        row = {"training": label, "loss above dense": study_tables.brief(gap)}
        for model, found in panels.items():
            x = found[label][0]
            row |= {f"{model}: speed-up": f"{x:.3f}"}
            row[f"{model}: dense stopped as early"] = f"{np.interp(x, *early):.3f}"
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Frontier:
    """Sparse runs among dense ones, by how many times as fast as dense they are and what they lose.

    early: see `stopped_early`. ranges: label -> least and greatest times as fast by the timings.
    planned: times as fast -> loss above dense. table: a row a point. stopped, shorter: label -> loss above
    its own dense run, stopped as early or planned as short (where one was).
    """

    points: Points
    early: tuple[np.ndarray, np.ndarray]
    ranges: dict[str, tuple[float, float]]
    planned: dict[float, float]
    table: pd.DataFrame
    stopped: dict[str, statistics.Stats]
    shorter: dict[str, statistics.Stats]


def frontier(runs: pd.DataFrame) -> Frontier:
    """The arms of ARMS that ran, at the measured speeds of the 1B model's step.

    Each arm is compared seed by seed with its own dense run; the line "stopped" goes through that run's
    evaluations, the line "planned" through the shorter dense runs.
    """
    there = [arm for arm in ARMS if arm in set(runs["arm"])]
    speed, timed = step_table.speeds("llama1b"), step_table.speed_ranges("llama1b")
    gaps, early = results.differences(runs, arms=there), stopped_early(runs)
    configs = {arm: from_dict(part["record"].iloc[0].config) for arm, part in runs.groupby("arm")}
    dense = planned_shorter(runs)
    points, ranges, stopped, shorter, rows = {}, {}, {}, {}, []
    for arm in there:
        preset, config, label = arm.split(",")[0], configs[arm], ARMS[arm]
        share = config.sparse_share * (1 - config.dense_warmup / config.steps)
        x = flops.run_speedup(share, speed[preset])
        ranges[label] = tuple(flops.run_speedup(share, end) for end in timed[preset])
        over, where = side(runs, arm, x, ranges[label])
        points[label], stopped[label] = (x, gaps[arm], preset), over
        row = {"training": label, "times as fast": f"{x:.3f}", "above dense": study_tables.brief(gaps[arm])}
        row["dense stopped as early"] = about(float(np.interp(x, *early)), 2)
        row["above its own dense, stopped"] = study_tables.brief(over)
        row["the line"] = where
        row["above its own dense, planned"] = "not run"
        if x <= dense.columns[-1]:  # nothing shorter was planned
            fair = _above(runs, arm, lambda seed, x=x: np.interp(x, dense.columns, dense.loc[seed]))
            shorter[label], row["above its own dense, planned"] = fair, study_tables.brief(fair)
        rows.append(row)
    return Frontier(points, early, ranges, dense.mean().to_dict(), pd.DataFrame(rows), stopped, shorter)


def draw(found: Frontier, ylabel: str, title: str) -> Figure:
    """Held-out loss above dense over the speed of a run, beside dense runs stopped or planned short."""
    fig, ax = plt.subplots(figsize=(10, 5))
    step_plots.draw_frontier(ax, found.points, found.early, found.ranges)
    line = list(found.planned), list(found.planned.values())
    ax.plot(*line, "s--", color="0.3", ms=7, label="dense, planned shorter")
    ax.set(ylabel=ylabel, title=title)
    ax.legend(loc="upper left")
    return fig
