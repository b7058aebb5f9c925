"""Do kernels train the same model as the reference? Loss curves of both, beside the spread of two seeds.

`python -m replicate bench backends` trains each format at laptop scale with both backends and two seeds. Two
precisions of one computation drift apart as two seeds do, only less: the criterion is that the kernels'
curve stays nearer to the reference's of the same seed than two seeds of the reference are to each other.
Without a GPU it shows the recorded table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from replicate import checkpoint, pool, records
from replicate.config import TrainConfig
from replicate.config_text import to_dict
from replicate.presets import train_preset

KIND = "bench-backends"
ARMS = ("w1+w2+t", "act24", "venom16", "recipe")
SEEDS = (1, 2)
BACKENDS = ("reference", "auto")
SPREADS = ("seeds", "final_seeds")
WINDOW = 20


def configs(arms: Sequence[str] = ARMS, **changes: Any) -> dict[tuple[str, int, str], TrainConfig]:
    """(arm, seed, backend) -> configuration: laptop shapes, an early sparse start, bfloat16."""
    base = {"steps": 400, "dense_warmup": 50, "stats_every": 0, "dtype": "bfloat16"} | changes
    return {
        (arm, seed, backend): train_preset("laptop", arm, seed=seed, backend=backend, **base)
        for arm in arms
        for seed in SEEDS
        for backend in BACKENDS
    }


def run(workers: int | None = None, plan: dict[tuple[str, int, str], TrainConfig] | None = None) -> dict:
    """Train all of `plan`, the project's by default; {"arms": rows of `compare`}.

    Raises RuntimeError naming a run that failed.
    """
    plan = plan or configs()
    wanted = {(_name(config), config.seed, config.backend): key for key, config in plan.items()}
    losses = {}
    for config, answer in pool.train_all(list(plan.values()), workers):
        key = wanted[_name(config), config.seed, config.backend]
        if "error" in answer:
            raise RuntimeError(f"{key}: {answer['error']}")
        checkpoint.clear(pool.run_dir(config))
        losses[key] = answer["results"]["steps"]["loss"]
    return judge([compare(arm, losses) for arm in dict.fromkeys(key[0] for key in plan)])


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """{"arms": rows with `within`, "seeds", "final_seeds"}: gaps between seeds, root mean square over arms.

    Two seeds may end close by chance, hence the mean over arms; a row is `within` if neither of its gaps
    between backends is larger than that.
    """
    spread = {name: float(np.sqrt(np.mean([row[name] ** 2 for row in rows]))) for name in SPREADS}
    for row in rows:
        row["within"] = all(row[name.replace("seeds", "backends")] <= spread[name] for name in SPREADS)
    return {"arms": rows, **spread}


def compare(arm: str, losses: dict[tuple[str, int, str], Sequence[float]]) -> dict[str, Any]:
    """How far the curves of an arm are apart, in nats, after a running mean over WINDOW steps.

    Returns:
        backends: largest gap between the two backends of one seed; seeds: largest gap between the
        reference's two seeds. final_backends and final_seeds: the same for the mean of the last 100 steps.
    """
    curves = {(seed, b): _smooth(losses[arm, seed, b]) for seed in SEEDS for b in BACKENDS}
    ends = {(seed, b): float(np.mean(losses[arm, seed, b][-100:])) for seed in SEEDS for b in BACKENDS}
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


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [f"{'arm':12}{'gap of backends':>18}{'of seeds':>10}{'last 100':>12}{'of seeds':>10}  within"]
    for r in result["arms"]:
        lines.append(
            f"{r['arm']:12}{r['backends']:18.4f}{r['seeds']:10.4f}{r['final_backends']:12.4f}"
            f"{r['final_seeds']:10.4f}  {'yes' if r['within'] else 'NO'}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and record on a GPU; elsewhere show what was recorded."""
    parser = argparse.ArgumentParser(prog="replicate bench backends", description=main.__doc__)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", type=Path, help="folder of the record (default: data/recorded)")
    args = parser.parse_args(argv)
    store = records.RecordStore(recorded=args.out) if args.out else records.RecordStore()
    if not torch.cuda.is_available():
        found = store.all(KIND)
        print(f"no GPU here: showing {len(found)} recorded results")
        for record, _ in found:
            print(f"\n{record.device}, {record.date}, commit {record.commit}\n{table(record.results)}")
        return 0
    start, plan = time.perf_counter(), configs()
    result = run(args.workers, plan)
    some = to_dict(replace(next(iter(plan.values())), seed=0))
    config = {"what": "backends", "arms": list(ARMS), "seeds": list(SEEDS), "window": WINDOW, "train": some}
    record = records.make_record(KIND, config, result, seconds=time.perf_counter() - start)
    print(table(result), f"\nrecord: {store.put(record, recorded=True)}")
    return 0 if all(row["within"] for row in result["arms"]) else 1


def _name(config: TrainConfig) -> str:
    return repr(config.model.sparsity)


def _smooth(losses: Sequence[float]) -> np.ndarray:
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")
