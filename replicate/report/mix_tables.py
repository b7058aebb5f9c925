"""Runs that mix sparse and dense steps, as chapter 09 compares them: which there are, and their tables."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd

from replicate import SPARSITY_PRESETS, evaluate, paper, schedule
from replicate.config import TrainConfig
from replicate.figures import about
from replicate.report import step_table
from replicate.report import study_tables as tables
from replicate.study import completion, plans, results, statistics
from replicate.study.transplant import with_sparsity
from replicate.train import Trainer
from replicate.training import flops

READINGS = {  # arm that is sparse to the end -> what its backward pass reads of a 2:4 weight
    "recipe": "backward as printed",
    "recipe, same": "backward reads what forward read",
}
MIXES = {  # which steps after the warm-up are sparse -> how the arm's name ends
    "50 %": ", 50% sparse first",
    "67 %": ", 67% sparse first",
    "83 %": ", 83% sparse first",
    "100 %": "",
    "50 %, at the end": ", 50% dense-sparse",
    "50 %, interleaved": ", 50% interleaved",
}
FIRST = ("50 %", "67 %", "83 %")  # sparse first, then dense
ARMS = ("dense", *(base + end for base in READINGS for end in MIXES.values()))
SMOKE = ("dense", tables.HALF, "recipe", "recipe, 50% dense-sparse", "recipe, same, 50% sparse first")
SCORES = ("ArcE", "ArcC", "PIQA", "OBQA", "HSwag", "WinoG")  # the paper's six benchmarks


def plan(profile: str, seeds: Sequence[int]) -> dict[str, list[TrainConfig]]:
    """What the chapter trains, if it is not recorded: at smoke a few arms, else all as printed."""
    names = SMOKE if profile == "smoke" else [arm for arm in ARMS if "same" not in arm]
    return plans.some(names, seeds, profile)


def recorded() -> dict[str, pd.DataFrame]:
    """Scale -> every recorded run of `ARMS`, of those scales that have the dense model, a half and all."""
    how = {"needed": ("dense", tables.HALF, "recipe"), "min_seeds": 1}
    return results.all_larger("smoke", lambda scale: plans.some(ARMS, (1, 2, 3), scale), **how)


def shares() -> dict[str, float]:
    """Arm, as printed and sparse first, -> its share of sparse steps in Table 4: of 0, 50, 67, 83, 100 %."""
    rows = paper.rows(4)
    arms = ("dense", *("recipe" + MIXES[name] for name in (*FIRST, "100 %")))
    return {arm: row["sparse_steps"] / rows[-1]["sparse_steps"] for arm, row in zip(arms, rows, strict=True)}


def above(runs: pd.DataFrame, arm: str, base: str = "dense") -> statistics.Stats | None:
    """Held-out loss of an arm above that of another, over seeds; None where one of them did not run."""
    if not {arm, base} <= set(runs["arm"]):
        return None
    return results.differences(runs, base=base, arms=[arm])[arm]


def compare(runs: pd.DataFrame) -> dict[str, statistics.Stats | None]:
    """Claim -> what section 4 and figure 5 speak of, of the recipe as printed.

    `figure5` is the least rise from one share of sparse steps to the next, None where a share is missing.
    """
    rises = [above(runs, more, less) for less, more in pairwise(shares())]
    return {
        "table4-recovers": above(runs, tables.HALF),
        "table4-helps": above(runs, "recipe", tables.HALF),
        "order": above(runs, "recipe, 50% dense-sparse", tables.HALF),
        "figure5": None if None in rises else min(rises, key=lambda rise: rise.mean),
    }


def endings(runs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a mix and reading: held-out loss above dense at each scale, of what ran."""
    rows = []
    for base, reading in READINGS.items():
        for name, end in MIXES.items():
            row = {"sparse steps": name, "reading": reading}
            for scale, part in runs.items():
                found = above(part, base + end)
                row[scale] = tables.brief(found) or "not run"
            rows.append(row)
    frame = pd.DataFrame(rows)
    return frame[(frame[list(runs)] != "not run").any(axis=1)]


def switch_on(scale: str, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """(step counted from the first sparse one [N], training loss [N], mean over the recorded seeds)."""
    start = plans.everything(scale, (1,))[arm][0].dense_warmup
    runs = tables.runs(scale).query("arm == @arm")["record"]
    losses = np.mean([run.results["steps"]["loss"][start - 20 : start + 100] for run in runs], axis=0)
    return np.arange(-20, 100), losses


def switch_off(scale: str, runs: pd.DataFrame, arm: str) -> tuple[int, np.ndarray]:
    """(first step of the dense end, training loss above dense at every step, mean over seeds)."""
    _, raw = results.gap_curve(runs, arm, window=1)
    return schedule.phase_plan(plans.everything(scale, (1,))[arm][0])[-1][1], raw.mean(0)


def switched(dense: Trainer, sparse: Trainer, seed: int) -> pd.DataFrame:
    """Held-out loss of two trained models, evaluated with parts of the recipe on or off; no step is made.

    Args:
        dense: trained without sparsity. sparse: trained with the recipe to the end.
        seed: of the clusters that the dense model is given.
    """
    recipe, data, text = SPARSITY_PRESETS["recipe"], dense.data, dense.data.valid_batches(1, 8)[0][0]
    parts = {"weights": {"w1": False, "w2_t": False}, "Venom": {"activation": "dense"}}
    ways = {
        "with the recipe": {},
        "without 2:4 weights": parts["weights"],
        "without Venom": parts["Venom"],
        "dense": parts["weights"] | parts["Venom"],
    }
    rows = []
    for way, changes in ways.items():
        for ffn in sparse.model.ffns():
            ffn.config = replace(recipe, **changes)
        rows.append(("sparse to the end", way, evaluate.valid_loss(sparse.model, data, 8)))
    for ffn in sparse.model.ffns():
        ffn.config = recipe
    changed = with_sparsity(dense.model, recipe, text, seed)
    rows.append(("dense throughout", "with the recipe", evaluate.valid_loss(changed, data, 8)))
    rows.append(("dense throughout", "dense", evaluate.valid_loss(dense.model, data, 8)))
    return pd.DataFrame(rows, columns=["trained", "evaluated", "held-out loss"])


def averages() -> dict[str, float]:
    """Arm -> the mean of the paper's six scores for that share of sparse steps."""
    rows = zip(shares(), paper.rows(4), strict=True)
    return {arm: float(np.mean([row[score] for score in SCORES])) for arm, row in rows}


def answered(runs: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Scale -> runs of the mixes of Table 4 with their accuracy, of scales that have the first two."""
    out = {}
    for scale, part in runs.items():
        asked = part[part["arm"].isin(shares())]
        known = results.completions(asked, completion.QUESTIONS[scale]).dropna(subset="accuracy")
        if {"dense", tables.HALF} <= set(known["arm"]):
            out[scale] = known
    return out


def accuracies(runs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row an arm of `answered`: accuracy, and how far above dense; the paper's average beside it."""
    theirs, rows = averages(), []
    for scale, part in runs.items():
        gaps = results.differences(part, column="accuracy")
        for arm, group in part.groupby("arm", sort=False):
            row = {"scale": scale, "sparse steps": f"{100 * shares()[arm]:.0f} %"}
            row["accuracy"] = about(group["accuracy"].mean())
            row["above dense"] = tables.brief(gaps.get(arm))
            row["paper: average"] = f"{theirs[arm]:.3f}"
            rows.append(row | {"paper: above dense": f"{theirs[arm] - theirs['dense']:+.3f}"})
    return pd.DataFrame(rows)


def speeds() -> dict[str, dict[str, float]]:
    """Count -> arm of Table 4 -> how many times as fast a run of the 1B model is, by three accounts."""
    model = paper.model("1B")
    counted = (flops.formula_share(model), flops.honest_share(model))
    steps = [flops.step_speedup(share, paper.number("venom_speedup_table2")) for share in counted]
    steps.append(step_table.speeds("llama1b")["recipe"])
    names = ("the paper's count", "complete count", "measured")
    return {
        name: {arm: flops.run_speedup(share, step) for arm, share in shares().items()}
        for name, step in zip(names, steps, strict=True)
    }


def figure5(runs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Figure 5 in numbers: the paper's average as printed and recomputed, speed-ups, our losses."""
    theirs, rows = averages(), []
    for (arm, share), printed in zip(shares().items(), paper.rows(4), strict=True):
        row = {"sparse steps": f"{100 * share:.0f} %", "paper's average": f"{printed['avg']:.3f}"}
        row["recomputed"] = f"{theirs[arm]:.3f}"
        row |= {f"speed-up, {name}": f"{found[arm]:.3f}" for name, found in speeds().items()}
        for scale, part in runs.items():
            found = above(part, arm) if arm != "dense" else None
            missing = "" if arm == "dense" else "not run"
            row[f"loss above dense, {scale}"] = f"{found.mean:.3f}" if found else missing
        rows.append(row)
    return pd.DataFrame(rows)
