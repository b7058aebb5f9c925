"""Tables of the training study from its records: losses above dense, contrasts, mixes, what is missing.

Everything is taken from data/recorded/ as it is; nothing is trained. An arm may have any number of seeds;
with one it has no interval.
"""

import itertools
from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np
import pandas as pd

from replicate import figures, paper
from replicate.config import TrainConfig
from replicate.schedule import sparse_steps
from replicate.study import noise, plans, results, statistics
from replicate.study.records import RecordStore
from replicate.study.results import contrast

SCALES = ("laptop", "gpu")
SIZES = (*SCALES, "gpu40m")  # where only the recipe and what bears on it were trained
TRAINED = (*SIZES, "gpu100m")  # and where four arms were trained, two of them with one seed
TRAIN, HELD = "final_loss", "valid_loss"
WEIGHTS = {  # contrasts of training losses
    "W1's transpose, over W1 read whole": ("w1+w1t", "w1"),
    "W1's transpose, over W1 read the same": ("w1+w1t", "w1, same"),
    "W2's transpose, over W2 read whole": ("w2+w2t", "w2"),
    "W2's transpose, over W2 read the same": ("w2+w2t", "w2, same"),
    "beyond the sum of W1 and W2, read whole": ("w1+w2", "w1", "w2"),
    "beyond the sum of W1 and W2, read the same": ("w1+w2, same", "w1, same", "w2, same"),
    "beyond the sum, with transposes": ("w1+w2+t", "w1+w1t", "w2+w2t"),
    "2:4 weights on top of Venom, read whole": ("recipe", "venom16"),
    "2:4 weights on top of Venom, read the same": ("recipe, same", "venom16"),
}
HALF = "recipe, 50% sparse first"
SWITCHES = (HALF, "recipe, folded, 50% sparse first", "active16x32, 50% sparse first")
TOLD = {  # contrasts that sentences name
    "third, above none": (("recipe, 67% sparse first", "recipe"), HELD),
    "sparse to the end, above half": (("recipe", HALF), HELD),
    "folded, above not": (("recipe, folded, 50% sparse first", HALF), HELD),
    "same, the end saves": (("recipe, same", f"recipe, same{HALF.removeprefix('recipe')}"), HELD),
    "finer clusters": (("venom16, 64 clusters", "venom16"), TRAIN),
}
BEYOND_FP8 = ("venom16, FP8", "venom16", "dense, FP8")
ENDS = {  # contrasts of held-out losses, at the very end
    "half sparse, then dense, above dense": (HALF, "dense"),
    "sparse to the end, above half sparse, then dense": ("recipe", HALF),
    "dense first, above sparse first, half sparse": ("recipe, 50% dense-sparse", HALF),
    "interleaved, above sparse first, half sparse": ("recipe, 50% interleaved", HALF),
}


runs = lru_cache(results.recorded_study)  # read once


def every_run(scale: str) -> pd.DataFrame:
    """`runs` on every text: also those that a CPU trained at laptop scale, with seeds of their own, and those
    on English prose, as "venom16, on English"."""
    other = runs(scale, plans.EVERY_SEED, english=True)
    named = other.assign(arm=[f"{arm}, {plans.ENGLISH}" for arm in other["arm"]])
    return pd.concat([frame for frame in (runs(scale, plans.EVERY_SEED), named) if len(frame)])


def fp8_beyond_sum(scale: str) -> statistics.Stats | None:
    """Held-out loss that Venom in FP8 costs beyond the sum of what Venom and FP8 cost alone, in nats."""
    return contrast(runs(scale), BEYOND_FP8, HELD)


def run_seconds(scale: str) -> float:
    """Median seconds of the recorded runs: on a CPU at laptop scale, on a GPU at the larger ones."""
    device = "CPU" if scale == "laptop" else "NVIDIA"
    records = every_run(scale)["record"]
    return float(np.median([record.seconds for record in records if record.device.startswith(device)]))


def cells(stats: statistics.Stats | None, name: str) -> dict[str, str]:
    """Mean, standard deviation and 95 % interval as cells of a table; one seed has the mean only."""
    mean, spread, interval = (f"{stats.mean:+.4f}" if stats else ""), "", ""
    if stats and stats.n > 1:
        spread, interval = f"{stats.std:.4f}", f"{stats.low:+.4f} to {stats.high:+.4f}"
    return {name: mean, f"sd {name}": spread, f"95 % {name}": interval}


def at_scales(stats: Mapping[str, statistics.Stats | None], *, count: bool = True) -> dict[str, str]:
    """Mean, interval and (if asked) n at each scale as cells of a table, "not run" where there is none."""
    row = {}
    for scale, one in stats.items():
        mean, _, interval = cells(one, scale).values()
        row |= {scale: mean or "not run", f"95 %, {scale}": interval}
        row |= {f"n, {scale}": str(one.n) if one else ""} if count else {}
    return row


def sentence(stats: statistics.Stats | None) -> str:
    """Mean, interval and seeds in words: "+0.210 nats (95 % interval +0.162 to +0.257, n = 2)", or ""."""
    if stats is None:
        return ""
    interval = f"95 % interval {stats.low:+.3f} to {stats.high:+.3f}, " if stats.n > 1 else ""
    return f"{stats.mean:+.3f} nats ({interval}n = {stats.n})"


def brief(stats: statistics.Stats | None) -> str:
    """Mean, half of the 95 % interval and seeds: "0.210 ± 0.048 (3)", or ""."""
    if stats is None:
        return ""
    half = f" ± {stats.half:.3f}" if stats.n > 1 else ""
    return f"{stats.mean:.3f}{half} ({stats.n})"


def read_on_cpu(frame: pd.DataFrame, arms: Iterable[str]) -> bool:
    """True if what is said of these arms rests on the runs that a CPU trained on its own text."""
    found = results.of_one_text(frame[frame["arm"].isin(list(arms))])
    common = set.intersection(*(set(part["seed"]) for _, part in found.groupby("arm")))
    return common <= set(plans.ON_CPU)


def paper_costs() -> dict[str, float]:
    """Arm -> the paper's training loss above dense, in nats; the row "W1, W2" counts for all it may mean."""
    losses = {row["preset"]: row["loss"] for row in paper.rows(3)}
    costs = {name: round(loss - losses["dense"], 3) for name, loss in losses.items() if name != "dense"}
    costs |= {f"{name}, same": costs[name] for name in ("w1", "w2", "w1+w2")}
    return costs | {"w1+w2+t": costs["w1+w2"]}


def losses(frame: pd.DataFrame, arms: Iterable[str]) -> pd.DataFrame:
    """One row an arm that is in `runs`: the paper's cost, n, training and held-out loss above dense."""
    printed, rows = {arm: f"{cost:+.3f}" for arm, cost in paper_costs().items()}, []
    for arm in arms:
        train, held = _above_dense(frame, arm)
        if train:
            row = {"arm": arm, "paper": printed.get(arm, ""), "n": train.n}
            rows.append(row | cells(train, "training") | cells(held, "held-out"))
    return pd.DataFrame(rows)


def english(frame: pd.DataFrame) -> str:
    """`losses` as Markdown of arms on English prose, see `recorded_study`, above the dense model there."""
    return figures.markdown(losses(frame, plans.IN_ENGLISH[1:]).drop(columns="paper"))


def _above_dense(frame: pd.DataFrame, arm: str) -> list[statistics.Stats | None]:
    """Training and held-out loss of an arm, above the dense model."""
    return [contrast(frame, (arm,), column) for column in (TRAIN, HELD)]


def contrasts(
    named: Mapping[str, tuple[str, ...]], column: str, scales: tuple[str, ...] = SCALES
) -> pd.DataFrame:
    """One row a contrast: mean, interval and n at each scale, empty where it was not run."""
    rows = []
    for label, arms in named.items():
        row = {"effect": label, "arms": " − ".join(f"[{arm}]" for arm in arms)}
        rows.append(row | at_scales({scale: contrast(runs(scale), arms, column) for scale in scales}))
    return pd.DataFrame(rows)


def mixes(scale: str) -> pd.DataFrame:
    """Table 4 at a scale: sparse steps, losses above dense, accuracy where it was recorded.

    With both readings of the backward pass; mixes of the second one where they ran.
    """
    frame = runs(scale)
    known = accuracies(frame)
    rows, ran = [], set(frame["arm"])
    for arm in ("recipe", *plans.MIXES, *(arm for arm in ("recipe, same", *plans.SAME_MIXES) if arm in ran)):
        config, (train, held) = plans.everything(scale, (1,))[arm][0], _above_dense(frame, arm)
        row = {"arm": arm, "sparse steps": f"{sparse_steps(config)} of {config.steps}"}
        row["n"] = str(train.n) if train else "not run"
        row |= cells(train, "training") | cells(held, "held-out")
        if len(known):
            row |= cells(contrast(known, (arm,), "accuracy"), "accuracy")
        rows.append(row)
    return pd.DataFrame(rows).drop(columns="sd accuracy", errors="ignore")


def sizes() -> pd.DataFrame:
    """Training loss above dense, one column a scale, of the arms recorded at the largest of SIZES."""
    rows = []
    for arm in plans.AT_40M[1:]:
        stats = {scale: contrast(runs(scale), (arm,), TRAIN) for scale in SIZES}
        if stats[SIZES[-1]]:
            rows.append({"arm": arm} | at_scales(stats, count=False))
    return pd.DataFrame(rows)


def on_one_card(scale: str, arm: str) -> statistics.Stats | None:
    """Held-out loss of an arm above dense as trained again (`study run --rerun`), of seeds for which both ran
    on the same kind of card; None if there is none."""
    again = {record.seed: record for name, record in noise.recorded(scale, "rerun-1") if name == "dense"}
    found = runs(scale).query("arm == @arm")
    same = [r.seed in again and r.device == again[r.seed].device for r in found["record"]]
    dense = results.frame([(record, "recorded") for record in again.values()], ["dense"] * len(again))
    return contrast(pd.concat([found[same], dense]), (arm,), HELD)


def by_size() -> dict[str, dict[str, statistics.Stats]]:
    """Arm -> scale -> held-out loss above dense, of the arms at the last of TRAINED, on scales of a GPU."""
    out: dict[str, dict[str, statistics.Stats]] = {arm: {} for arm in plans.PARTLY[TRAINED[-1]][1:]}
    for arm, scale in itertools.product(out, TRAINED[1:]):
        if stats := contrast(runs(scale), (arm,), HELD):
            out[arm][scale] = stats
    return out


def size_table() -> pd.DataFrame:
    """`by_size` for the eye, one column a scale: mean, half of the 95 % interval, seeds."""
    table = pd.DataFrame({arm: {s: brief(x) for s, x in each.items()} for arm, each in by_size().items()})
    return table.T.fillna("").rename_axis("arm").reset_index()


def rates() -> pd.DataFrame:
    """Arms at half, once and twice the learning rate: above dense at its own rate, and dense above itself."""
    rows = []
    for scale in SCALES:
        for suffix in (", lr x 0.5", "", ", lr x 2"):
            base = f"dense{suffix}"
            row = {"scale": scale, "rate": suffix.removeprefix(", lr ") or "x 1"}
            for arm in plans.RATES:
                pair = (f"{arm}{suffix}", base) if arm != "dense" else (base, "dense")
                stats = contrast(runs(scale), pair, TRAIN) if pair[0] != pair[1] else None
                half = f" ± {stats.half:.3f}" if stats and stats.n > 1 else ""
                row[arm] = f"{stats.mean:+.3f}{half}, n = {stats.n}" if stats else ""
            rows.append(row)
    return pd.DataFrame(rows).rename(columns={"dense": "dense, above dense x 1"})


def recipe_sparse(scale: str) -> pd.DataFrame:
    """Arms at least as sparse as Venom at 4 of 16 with 2 of 4 inside, in every step after the usual warm-up.

    Same learning rate, so that the dense model above which they lie is the tuned one; lowest loss first.
    """
    frame = every_run(scale)
    plan = {arm: configs[0] for arm, configs in plans.everything(scale, (1,)).items()}

    def meant(c: TrainConfig) -> bool:
        whole = (c.sparse_share, c.lr, c.dense_warmup) == (1, plan["dense"].lr, plan["dense"].dense_warmup)
        s = c.model.sparsity
        sparse = s.activation == "venom" and s.inner and 4 * s.top_k <= s.n_clusters
        return whole and bool(sparse) and not s.fp8

    table = losses(frame, (arm for arm in frame["arm"].unique() if meant(plan[arm]))).drop(columns="paper")
    if scale == "laptop":
        on_cpu = (read_on_cpu(frame, (arm, "dense")) for arm in table["arm"])
        table.insert(1, "trained on", ["a CPU, its text" if there else "a GPU" for there in on_cpu])
    return table.sort_values("training", key=lambda cells: cells.astype(float), ignore_index=True)


def prize() -> str:
    """A line a scale: is there an arm of `recipe_sparse` that surely costs less than the paper's Venom?

    Surely: by `statistics.holm` over all of these arms with three seeds, by the worse of the two losses.
    """
    limit, lines = paper_costs()["venom16"], []
    for scale in SIZES:
        table = recipe_sparse(scale)
        stats = {arm: _above_dense(every_run(scale), arm) for arm in table["arm"]}
        p = {a: max(statistics.p_value(s, limit) for s in two) for a, two in stats.items() if two[0].n > 2}
        below = [a for a, two in stats.items() if all(s.n > 1 and s.high < limit for s in two)]
        sure = [a for a in below if a in statistics.holm(p)]
        best = table["arm"].iloc[0]
        lines.append(
            f"- {scale}, of {len(table)} arms: surely below {limit:+.3f} nats in training and held out: "
            f"{_named(sure)}; by their own intervals alone: {_named(below)}. The lowest mean is that of "
            f"`{best}`: {sentence(stats[best][0])} in training, {sentence(stats[best][1])} held out."
        )
    return "\n".join(lines)


def _named(arms: Iterable[str]) -> str:
    return ", ".join(f"`{arm}`" for arm in arms) or "none"


@lru_cache
def open_questions() -> list[tuple[str, str, str, dict[str, statistics.Stats]]]:
    """`results.open_questions` of the study: training loss, at each of SCALES."""
    return results.open_questions({s: every_run(s) for s in SCALES})


def opened() -> pd.DataFrame:
    """One row an answer to `plans.OPEN`: mean, interval and n at each scale where it was run, and a word.

    The word is `results.surely`'s, over all rows of the table at that scale. "CPU": on a text of its own.
    """
    answers = open_questions()
    table = pd.DataFrame(
        {"question": question, "arm": arm, "instead of": base}
        | at_scales({scale: found.get(scale) for scale in SCALES})
        for question, arm, base, found in answers
    )
    for i, (_, arm, base, _) in enumerate(answers):
        if table.loc[i, "n, laptop"] and read_on_cpu(every_run("laptop"), (arm, base)):
            table.loc[i, "n, laptop"] += ", CPU"
    for scale in SCALES:
        there = {row: found[scale] for row, (*_, found) in enumerate(answers) if scale in found}
        word = results.surely(there)
        table[f"surely, {scale}"] = [word.get(row, "") for row in table.index]
    return table


def accuracies(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs whose score on the held-out completion task was recorded, with the column `accuracy`."""
    asked = [record for record, origin in RecordStore().all("completion") if origin == "recorded"]
    answers = {record.config["train"]: record for record in asked}
    found = results.answered(frame, [answers.get(record.config_hash) for record in frame["record"]])
    return found.dropna(subset="accuracy")
