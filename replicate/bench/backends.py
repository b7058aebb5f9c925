"""Do kernels train the same model as the reference? Loss curves of both, beside the spread of two seeds.

Each format is trained at laptop scale with both backends and two seeds. Two precisions of one computation
drift apart as two seeds do, only less: the criterion is that the kernels' curve stays nearer to the
reference's of the same seed than two seeds of the reference are to each other.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from replicate.config import TrainConfig
from replicate.settings.presets import SPARSITY_PRESETS, train_preset
from replicate.settings.text import from_dict, refuse, to_dict
from replicate.study import pool, records, worker
from replicate.training import checkpoint

KIND = "bench-backends"
ARMS = ("w1+w2+t", "act24", "venom16", "recipe")
SEEDS = (1, 2)
BACKENDS = ("reference", "auto")
SPREADS = ("seeds", "final_seeds")
WINDOW = 20
GIVEN = {"model.sparsity": "use --arms", "seed": f"they are {SEEDS}", "backend": f"they are {BACKENDS}"}
Run = tuple[str, int, str]  # arm, seed, backend


def config(arms: Sequence[str] = ARMS, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """What identifies a run: laptop shapes, an early sparse start and bfloat16, but for `changes`."""
    refuse(changes or {}, GIVEN)
    base = {"steps": 400, "dense_warmup": 50, "stats_every": 0, "dtype": "bfloat16"} | (changes or {})
    train = train_preset("laptop", arms[0], backend=BACKENDS[0], seed=0, **base)
    c = {"what": "backends", "arms": list(arms), "seeds": list(SEEDS), "window": WINDOW}
    return c | {"train": to_dict(train)}


def runs(c: dict[str, Any]) -> dict[Run, TrainConfig]:
    """The configuration of every arm, seed and backend."""
    base = from_dict(c["train"])
    return {
        (arm, seed, backend): replace(
            base, model=replace(base.model, sparsity=SPARSITY_PRESETS[arm]), seed=seed, backend=backend
        )
        for arm in c["arms"]
        for seed in c["seeds"]
        for backend in BACKENDS
    }


def run(c: dict[str, Any], workers: int | None = None) -> records.Record:
    """Train all runs; the record's results are those of `judge`. Raises RuntimeError naming a failed run."""
    start, plan = time.perf_counter(), runs(c)
    names = {config: name for name, config in plan.items()}
    losses = {}
    for config, answer in pool.train_all(list(plan.values()), workers):
        name = names[config]
        if "error" in answer:
            raise RuntimeError(f"{name}: {answer['error']}")
        checkpoint.clear(worker.run_dir(config))
        losses[name] = answer["results"]["steps"]["loss"]
    results = judge([compare(arm, losses) for arm in c["arms"]])
    return records.make_record(KIND, c, results, seconds=time.perf_counter() - start)


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """{"arms": rows with `within`, "seeds", "final_seeds"}: gaps between seeds, root mean square over arms.

    Two seeds may end close by chance, hence the mean over arms; a row is `within` if neither of its gaps
    between backends is larger than that.
    """
    spread = {name: float(np.sqrt(np.mean([row[name] ** 2 for row in rows]))) for name in SPREADS}
    for row in rows:
        row["within"] = all(row[name.replace("seeds", "backends")] <= spread[name] for name in SPREADS)
    return {"arms": rows, **spread}


def compare(arm: str, losses: dict[Run, Sequence[float]]) -> dict[str, Any]:
    """How far the curves of an arm are apart, in nats, after a running mean over WINDOW steps.

    Returns:
        backends: largest gap between the two backends of one seed; seeds: largest gap between the
        reference's two seeds. final_backends and final_seeds: the same for the mean of the last 100 steps.
    """
    own = {(seed, b): losses[arm, seed, b] for seed in SEEDS for b in BACKENDS}
    curves = {key: np.convolve(curve, np.ones(WINDOW) / WINDOW, mode="valid") for key, curve in own.items()}
    ends = {key: float(np.mean(curve[-100:])) for key, curve in own.items()}
    first, second = ((seed, "reference") for seed in SEEDS)
    pairs = [((seed, "reference"), (seed, "auto")) for seed in SEEDS]
    return {
        "arm": arm,
        "backends": max(float(np.abs(curves[a] - curves[b]).max()) for a, b in pairs),
        "seeds": float(np.abs(curves[first] - curves[second]).max()),
        "final_backends": max(abs(ends[a] - ends[b]) for a, b in pairs),
        "final_seeds": abs(ends[first] - ends[second]),
        "final": {f"{b} {seed}": ends[seed, b] for seed, b in ends},
    }


def table(record: records.Record) -> str:
    """The gaps in nats as text."""
    frame = pd.DataFrame(record.results["arms"]).drop(columns="final").set_index("arm")
    return frame.to_string(float_format="{:.4f}".format)
