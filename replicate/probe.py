"""How many runs should share a GPU? Steady speed of an arm with one, two or three processes on it.

Each process goes through the arms. In an arm it first does the dense steps and as many sparse ones as
compilation and caches need, then waits until its companions are there too, and all are timed together.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from replicate import paths, pool
from replicate.config import TrainConfig
from replicate.config_text import from_dict, to_dict, with_changes
from replicate.train import Trainer

DENSE, WARM = 12, 24  # dense steps, and all steps before the clock starts
PATIENCE = 300  # seconds to wait for the others


def show(
    runs: Sequence[tuple[str, TrainConfig]],
    counts: Sequence[int],
    *,
    steps: int = 60,
    changes: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Print and return tokens/s on one device for each arm and number of processes sharing it.

    Args:
        runs: (arm name, configuration).
        counts: numbers of processes; with several GPUs, as many numbers are tried side by side.
        steps: timed steps.
        changes: of configuration fields, as on the command line.

    Returns:
        rows with workers, arm, tokens_per_s (of all processes together), gigabytes (of one process).
    """
    arms = [(name, _short(with_changes(config, changes or {}), steps)) for name, config in runs]
    gpus = max(1, torch.cuda.device_count())
    rows = []
    for start in range(0, len(counts), gpus):
        groups = [_Group(arms, count, gpu) for gpu, count in enumerate(counts[start : start + gpus])]
        for group in groups:
            found = group.rows()
            rows += found
            for row in found:
                print(
                    f"{row['workers']} on a device, {row['arm']:24} {row['tokens_per_s']:12,.0f} tokens/s, "
                    f"{row['gigabytes']:.1f} GB each",
                    flush=True,
                )
    return rows


def _short(config: TrainConfig, steps: int) -> TrainConfig:
    """The same training for WARM + `steps` steps, sparse from step DENSE on, without extras."""
    return replace(
        config, steps=WARM + steps + 1, dense_warmup=DENSE, lr_warmup=1, sparse_share=1.0, eval_every=0,
        stats_every=0, checkpoint_every=0, log_every=WARM + steps + 1,
    )  # fmt: skip


class _Group:
    """Processes that share one GPU."""

    def __init__(self, arms: Sequence[tuple[str, TrainConfig]], count: int, gpu: int) -> None:
        self.arms, self.count = arms, count
        self.folder = tempfile.TemporaryDirectory()
        request = {"arms": [(n, to_dict(c)) for n, c in arms], "count": count, "folder": self.folder.name}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", "from replicate.probe import work; work()", json.dumps(request)],
                stdout=subprocess.PIPE,
                env=pool.environment(gpu, torch.cuda.is_available()),
                cwd=paths.ROOT,
                text=True,
            )
            for _ in range(count)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """One row an arm. Raises RuntimeError if a process failed; its error is on stderr."""
        try:
            outputs = [process.communicate()[0] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        if any(process.returncode for process in self.processes):
            raise RuntimeError(f"a process of {self.count} on a device failed")
        self.folder.cleanup()
        parts = [json.loads(output.splitlines()[-1]) for output in outputs]
        return [
            {
                "workers": self.count,
                "arm": name,
                "tokens_per_s": sum(part[i]["tokens_per_s"] for part in parts),
                "gigabytes": max(part[i]["gigabytes"] for part in parts),
            }
            for i, (name, _) in enumerate(self.arms)
        ]


def work() -> None:
    """Be one of the processes: time each arm of the request in sys.argv[1], print a JSON list."""
    torch.set_num_threads(1)
    request = json.loads(sys.argv[1])
    timed = []
    for i, (_, config) in enumerate(request["arms"]):
        timed.append(_time(from_dict(config), Path(request["folder"]) / str(i), request["count"]))
    print(json.dumps(timed))


def _time(config: TrainConfig, place: Path, count: int) -> dict[str, float]:
    tokens = pool.tokens(config.corpus, config.model.vocab_size, config.model.seq_len, paths.runs_dir())
    trainer = Trainer(config, progress=False, data=tokens)
    trainer.run(WARM)
    _meet(trainer.device, place, count)
    begun = time.perf_counter()
    trainer.run(config.steps - 1)  # not the last step, with its evaluation
    _wait(trainer.device)
    seconds = time.perf_counter() - begun
    gpu = trainer.device.type == "cuda"
    return {
        "tokens_per_s": (config.steps - 1 - WARM) * config.tokens_per_step / seconds,
        "gigabytes": torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0,
    }


def _meet(device: torch.device, place: Path, count: int) -> None:
    """Wait until `count` processes are here."""
    _wait(device)
    place.mkdir(exist_ok=True)
    Path(tempfile.mkstemp(dir=place)[1]).touch()
    end = time.monotonic() + PATIENCE
    while sum(1 for _ in place.iterdir()) < count:
        if time.monotonic() > end:
            raise TimeoutError(f"fewer than {count} processes after {PATIENCE} s")
        time.sleep(0.005)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
