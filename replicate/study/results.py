"""From the records of a study to its tables: one row a run, paired differences between arms."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from replicate import study
from replicate.config import TrainConfig
from replicate.settings.presets import PRESET_OF, preset_of
from replicate.settings.text import config_hash, from_dict
from replicate.study import noise, plans, statistics, worker
from replicate.study.records import Record, RecordStore, make_record
from replicate.training import checkpoint

Run = tuple[Record, str]  # and its origin
Plan = Callable[[str], Mapping[str, Sequence[TrainConfig]]]


def frame(runs: Iterable[Run], arms: Sequence[str] | None = None) -> pd.DataFrame:
    """One row a run: arm, seed, losses in nats, natural sparsity in the last statistics, origin.

    `arm` is the name in `arms`, by default that of `study.describe` without the seed; `record` the record.
    """
    rows = []
    for record, origin in runs:
        config = from_dict(record.config)
        last = (record.results.get("stats") or [{}])[-1]
        rows.append(
            {
                "arm": study.describe(config).rsplit(" seed ", 1)[0],
                "seed": config.seed,
                "final_loss": record.results["final_loss"],
                "valid_loss": record.results["valid_loss"],
                "y2_sparsity": _mean(last.get("y2_sparsity")),
                "origin": origin,
                "record": record,
            }
        )
    found = pd.DataFrame(rows)
    return found if arms is None else found.assign(arm=arms)


def run_plan(
    plan: Mapping[str, Sequence[TrainConfig]], label: str = "", models: Iterable[str] = ()
) -> pd.DataFrame:
    """`frame` of every run of a plan, arm name -> configurations, trained side by side where missing.

    Args:
        label: of the study, at the start of its progress lines.
        models: arms whose finished models are kept, for `study.trained` or `completions`.
    """
    runs = [(name, config) for name, arm in plan.items() for config in arm]
    kept = {config_hash(config) for name, config in runs if name in set(models)}
    found = study.run([c for _, c in runs], names=plans.names_of(runs), models=kept, label=label)
    return frame(found, [name for name, _ in runs])


def larger(
    profile: str, plan: Plan, store: RecordStore | None = None, **counts: Any
) -> tuple[str, pd.DataFrame] | None:
    """(scale, frame) of the last of `all_larger`, whose arguments it takes; None if there is none."""
    return next(reversed(all_larger(profile, plan, store, **counts).items()), None)


def all_larger(
    profile: str,
    plan: Plan,
    store: RecordStore | None = None,
    *,
    needed: Sequence[str] | None = None,
    min_seeds: int | None = None,
) -> dict[str, pd.DataFrame]:
    """Scale -> recorded runs of a notebook's plan, of every scale above `profile` that counts, ascending.

    Args:
        plan: scale -> arm name -> configurations, as for `run_plan`.
        needed: arms without which a scale does not count, by default all; others are left out where a run
            is missing.
        min_seeds: runs an arm must have at least, its first ones; by default all that the plan names.
    """
    preset_of(profile)
    store, scales = store or RecordStore(), list(PRESET_OF)
    larger = {}
    for scale in scales[scales.index(profile) + 1 :]:
        arms, kept = plan(scale), []
        for name, configs in arms.items():
            there = list(itertools.takewhile(bool, (_recorded(store, config) for config in configs)))
            if len(there) >= (len(configs) if min_seeds is None else min_seeds):
                kept += [(name, run) for run in there]
        if kept and set(arms if needed is None else needed) <= {name for name, _ in kept}:
            larger[scale] = _named(kept)
    return larger


def differences(
    runs: pd.DataFrame, base: str = "dense", column: str = "valid_loss", arms: Sequence[str] | None = None
) -> dict[str, statistics.Stats]:
    """arm -> statistics over seeds of (arm - base), paired by seed, for each arm (or `arms`) but the base.

    Only the seeds that both have count, on one text (`of_one_text`). Intervals as in `contrast`. Raises
    ValueError for an arm that is missing or shares no seed.
    """
    there = list(dict.fromkeys(runs["arm"]))
    out = {}
    for name in arms or [n for n in there if n != base]:
        if name not in there or base not in there:
            raise ValueError(f"no runs of {name!r} or of {base!r}; there are {', '.join(there)}")
        pair = of_one_text(runs[runs["arm"].isin([name, base])])
        values = {arm: pair[pair["arm"] == arm].set_index("seed")[column] for arm in (name, base)}
        seeds = _common_seeds({arm: values[arm].index for arm in (name, base)})
        found = statistics.paired(values[name].loc[seeds].tolist(), values[base].loc[seeds].tolist())
        out[name] = with_floor(found, pair, {name: 1, base: -1}, column, seeds)
    return out


def contrast(runs: pd.DataFrame, arms: Sequence[str], column: str) -> statistics.Stats | None:
    """Statistics over seeds of the first arm minus the others, within a seed, each above the dense model.

    A sum of several arms so has the dense model counted once. Of two texts (`of_one_text`) one is taken.
    None if no seed has all of them. The interval is `statistics.widened`: its standard deviation is at least
    `noise.floor`, and an accuracy has the error of its questions, which are the same for every seed.
    """
    if runs.empty:
        return None
    runs = of_one_text(runs[runs["arm"].isin([*arms, "dense"])])
    values = runs.pivot(index="seed", columns="arm", values=column)
    if not {*arms, "dense"} <= set(values):
        return None
    weights = dict.fromkeys([*arms, "dense"], 0)
    for arm, weight in zip(arms, (1, *(-1 for _ in arms[1:])), strict=True):
        weights[arm] += weight
        weights["dense"] -= weight
    weights = {arm: weight for arm, weight in weights.items() if weight}
    each = sum((weight * values[arm] for arm, weight in weights.items()), 0 * values["dense"]).dropna()
    if not len(each):
        return None
    return with_floor(statistics.summary(each.tolist()), runs, weights, column, each.index)


def with_floor(
    found: statistics.Stats, runs: pd.DataFrame, weights: Mapping[str, int], column: str, seeds: Sequence[int]
) -> statistics.Stats:
    """`found`, the sum of weight x arm over these seeds, with `noise.floor` and the questions' error.

    The questions' error is the variance, over them, of what they add in the mean of the seeds.
    """
    if "record" not in runs:
        return found
    runs = runs[runs["arm"].isin(weights) & runs["seed"].isin(seeds)]
    floor = noise.floor((from_dict(part["record"].iloc[0].config) for _, part in runs.groupby("arm")), column)
    shared = 0.0
    if column == "accuracy" and "correct" in runs:
        right = runs.set_index(["arm", "seed"])["correct"].map(lambda answers: np.array(list(answers), float))
        by_seed = [sum(weight * right[arm, seed] for arm, weight in weights.items()) for seed in seeds]
        shared = float(np.mean(by_seed, axis=0).var(ddof=1)) / len(by_seed[0])
    return statistics.widened(found, floor, shared)


def _common_seeds(arms: Mapping[str, Iterable[int]]) -> list[int]:
    """The seeds that all arms have, ascending. Raises ValueError, naming each arm's, if there is none."""
    common = set.intersection(*map(set, arms.values()))
    if not common:
        have = ", ".join(f"{name} has {sorted(seeds)}" for name, seeds in arms.items())
        raise ValueError(f"no seed in common to pair runs by: {have}")
    return sorted(common)


def recorded_study(scale: str, seeds: Sequence[int] = (1, 2, 3), *, english: bool = False) -> pd.DataFrame:
    """`frame` of every recorded run of the study (`plans.everything`) at a scale, arms called as there.

    Args:
        english: the arms on English prose instead of those on Python, without "on English" in their names.
            The two are never in one frame: a loss is compared with that of the same text's dense model.
    """
    suffix = f", {plans.ENGLISH}"
    found = [
        (arm.removesuffix(suffix), (record, "recorded"))
        for arm, record in noise.recorded(scale)
        if record.seed in seeds and arm.endswith(suffix) == english
    ]
    return _named(found)


def _recorded(store: RecordStore, config: TrainConfig) -> Run | None:
    run = store.find("train", config)
    return run if run and run[1] == "recorded" else None


def _named(runs: Sequence[tuple[str, Run]]) -> pd.DataFrame:
    return frame([run for _, run in runs], [name for name, _ in runs])


def open_questions(
    studies: Mapping[str, pd.DataFrame], questions: Iterable[tuple[str, str, Sequence[str]]] = plans.OPEN
) -> list[tuple[str, str, str, dict[str, statistics.Stats]]]:
    """What one change to an arm costs, at each scale that has both: (question, arm, instead of, by scale).

    The cost is in training loss, seed by seed, where both arms ran on one text (`of_one_text`).

    Args:
        studies: scale -> runs, as from `recorded_study`. questions: as `plans.OPEN`.
    """
    rows = []
    for question, base, arms in questions:
        for arm in arms:
            there = {scale: part for scale, part in studies.items() if {arm, base} <= set(part["arm"])}
            each = {scale: differences(part, base, "final_loss", [arm]) for scale, part in there.items()}
            rows.append((question, arm, base, {scale: found[arm] for scale, found in each.items()}))
    return rows


def surely(stats: Mapping[Any, statistics.Stats], null: float = 0.0, least: int = 3) -> dict[Any, str]:
    """Key -> "more", "less" or "", the word of each comparison of one family with `null`.

    More or less surely: it stands after `statistics.holm` over all of the family that have `least` seeds.
    """
    p = {key: statistics.p_value(s, null) for key, s in stats.items() if s.n >= least}
    sure = statistics.holm(p)
    return {key: ("more" if s.mean > null else "less") if key in sure else "" for key, s in stats.items()}


def of_one_text(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that can be paired: without those of `plans.ON_CPU`, which read another text, if every arm has
    others, and without seeds whose runs read different texts (an arm on English prose has its own dense).
    """
    others = runs[~runs["seed"].isin(plans.ON_CPU)]
    runs = others if set(others["arm"]) == set(runs["arm"]) else runs
    if "record" not in runs or not len(runs):
        return runs
    text = runs["record"].map(lambda record: (record.corpus or {}).get("sha256", ""))
    return runs[text.groupby(runs["seed"]).transform("nunique") == 1]


def source(runs: pd.DataFrame) -> str:
    """Where the numbers of these runs come from, for `paper.check`: "recorded" only if every run was."""
    return next(kind for kind in ("fresh", "cached", "recorded") if kind in set(runs["origin"]))


def series(record: Record, key: str) -> list[tuple[int, float]]:
    """(step, mean over layers) of a statistic, such as "y2_sparsity", over a run."""
    return [(row["step"], _mean(row[key])) for row in record.results["stats"] if row.get(key) is not None]


def steps_to_loss(record: Record, loss: float) -> float | None:
    """Steps until the held-out loss was down to `loss`, between evaluations by a line; None if never."""
    steps, losses = np.array(record.results["valid_losses"]).T
    if not (there := losses <= loss).any():
        return None
    i = int(there.argmax())
    return float(np.interp(-loss, -losses[i - 1 : i + 1], steps[i - 1 : i + 1])) if i else steps[0]


def gap_curve(
    runs: pd.DataFrame, arm: str, base: str = "dense", window: int = 20
) -> tuple[np.ndarray, np.ndarray]:
    """How far an arm's training loss lies above the base's: steps [N] and gaps [seeds, N] in nats.

    The steps are those at the end of each window, the gaps means over it, one for every seed that both arms
    have: such runs read the same batches, so that the gap is far quieter than the losses.
    Raises ValueError if there is no such seed.
    """
    losses = {
        name: {seed: np.asarray(r.results["steps"]["loss"]) for seed, r in zip(part["seed"], part["record"])}
        for name, part in runs[runs["arm"].isin([arm, base])].groupby("arm")
    }
    seeds = _common_seeds({name: losses[name] for name in (arm, base)})
    gaps = np.stack([losses[arm][seed] - losses[base][seed] for seed in seeds])
    total = np.cumsum(np.pad(gaps, ((0, 0), (1, 0))), axis=1)
    return np.arange(window, gaps.shape[1] + 1), (total[:, window:] - total[:, :-window]) / window


def completions(runs: pd.DataFrame, question: Mapping[str, int]) -> pd.DataFrame:
    """`runs` with columns `accuracy` and `correct` ("0110..."): the models' on one of `completion.QUESTIONS`.

    A model that was not kept is trained once more, to the same weights, and then kept; one that was
    recorded elsewhere is not, and its accuracy is None unless that is recorded too.
    """
    store = RecordStore()
    asked = [{"train": record.config_hash, **question} for record in runs["record"]]
    corpora = [record.corpus["sha256"] for record in runs["record"]]
    found = [store.find("completion", *pair) for pair in zip(asked, corpora)]
    missing = [i for i, origin in enumerate(runs["origin"]) if found[i] is None and origin != "recorded"]
    configs = {i: from_dict(runs["record"].iloc[i].config) for i in missing}
    lost = [c for c in configs.values() if c.steps not in checkpoint.steps(worker.run_dir(c))]
    study.run(lost, store=store, fresh=True, models={config_hash(config) for config in lost})
    for i, config in configs.items():
        trainer = study.trained(config, progress=False)
        made = {"corpus": trainer.data.provenance(), "device": config.device}
        reply = make_record("completion", asked[i], worker.ask(trainer, question), **made)
        store.put(reply)
        found[i] = reply, "fresh"
    return answered(runs, [answer and answer[0] for answer in found])


def answered(runs: pd.DataFrame, answers: Iterable[Record | None]) -> pd.DataFrame:
    """`runs` with the columns `accuracy` and `correct` of their completion records, None without one."""
    each = [answer.results if answer else {} for answer in answers]
    return runs.assign(**{name: [result.get(name) for result in each] for name in ("accuracy", "correct")})


def _mean(values: Any) -> float | None:
    """Mean of a number, of those in a list, or of those in a dictionary's lists; None for nothing."""
    parts = values.values() if isinstance(values, dict) else [values]
    flat = [number for part in parts if part is not None for number in np.ravel(part).tolist()]
    return sum(flat) / len(flat) if flat else None
