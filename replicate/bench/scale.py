"""Benchmark of several GPUs: tokens/s of a training step on N processes against one, by DDP and by FSDP2.

The step is the trainer's own, `OptimizerStep`: forward, backward, clipping, AdamW, on random tokens; each
process has the preset's micro-batch, so that N processes read N times the tokens. One command starts all:
first one process, then N, each of which measures every case in turn.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from replicate.bench import timing
from replicate.config import TrainConfig
from replicate.gpt import GPT
from replicate.settings.presets import train_preset
from replicate.settings.text import from_dict, refuse, to_dict
from replicate.study import records
from replicate.training import attention, parallel
from replicate.training.compiled import compiled_loss
from replicate.training.device import autocast_in, pick_device, pick_dtype
from replicate.training.step import OptimizerStep, make_optimizer

KIND = "bench-scale"
PRESETS = ("llama1b",)
SPARSITY = ("dense", "recipe")
ENGINES = ("ddp", "fsdp")
WARM = 4  # steps of each case before any is timed: they compile, tune, allocate, and one is captured
LR = 1e-6
GIVEN = {
    "grad_accum": "use --micro", "model.n_layer": "use --layers", "model.sparsity": "use --sparsity",
    "lr": f"it is {LR}", "lr_warmup": "it is 0", "parallel": "both ways are measured",
}  # fmt: skip
Row = dict[str, Any]


def config(
    preset: str = "llama1b",
    sparsity: Sequence[str] = SPARSITY,
    layers: Sequence[int] = (6,),
    processes: int | None = None,
    micro: int = 1,
    repeats: int = 20,
    changes: Row | None = None,
) -> Row:
    """What identifies a run.

    Args:
        preset: training preset; its batch_size is one process's. sparsity: presets; times are over the first.
        layers: the depth, one number. processes: beside one; None takes all GPUs here.
        micro: micro-batches a step. repeats: timed steps of a case.
        changes: of the training preset, as `--set` gives them.

    Raises ValueError for several depths, a change of what is GIVEN, or something unknown.
    """
    count = torch.cuda.device_count() if processes is None else processes
    if len(layers) != 1 or layers[0] < 1:
        raise ValueError(f"layers {list(layers)}: scale measures one depth, such as 6")
    refuse(changes or {}, GIVEN)
    train = train_preset(preset, **{"dtype": "bfloat16", "compile": True, **(changes or {})})
    model = replace(train.model, n_layer=layers[0])
    train = replace(train, model=model, grad_accum=micro, lr=LR, lr_warmup=0)
    for name in sparsity:
        train_preset(preset, name)
    return {
        "preset": preset, "sparsity": list(sparsity), "processes": count, "engines": list(ENGINES),
        "repeats": repeats, "warm": WARM, "seed": 0, "train": to_dict(train),
    }  # fmt: skip


def run(c: Row, device: str = "cuda") -> records.Record:
    """Start one process, then N; the record's results: "cases".

    A case has processes, engine ("" of one process), sparsity, ms of a step (median) with ms_p10 and ms_p90,
    each the slowest process's; tokens_per_s; peak_bytes, the most of any process; captured, if a step was one
    CUDA graph; attention, its kernel.

    Raises ValueError for one process or more than GPUs, RuntimeError with what they said last if they fail.
    """
    if c["processes"] < 2:
        raise ValueError(f"processes is {c['processes']}; scaling needs 2 or more, each with its own GPU")
    if device == "cuda" and c["processes"] > (count := torch.cuda.device_count()):
        raise ValueError(
            f"processes is {c['processes']}, and there are {count} GPUs; set --processes {count}"
        )
    start, cases = time.perf_counter(), []
    for world in (1, c["processes"]):
        cases += _started(c, world, device)
        print(f"{world} process(es) measured, {time.perf_counter() - start:.0f} s", flush=True)
    seconds = time.perf_counter() - start
    return records.make_record(KIND, c, {"cases": cases}, seconds=seconds, device=device)


def _started(c: Row, world: int, device: str) -> list[Row]:
    """The cases of so many processes, measured by them."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "asked.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(c | {"device": device, "answer": str(answer)}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(world), "-m", "replicate.bench.scale", str(asked)]
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if done.returncode or not answer.exists():
            raise RuntimeError(f"{world} processes failed:\n{done.stderr[-3000:]}")
        return json.loads(answer.read_text())


def main(path: str) -> None:
    """Be one of the processes: measure every case; the first one writes them."""
    c = json.loads(Path(path).read_text())
    train = replace(from_dict(c["train"]), device=c["device"])
    world = int(os.environ["WORLD_SIZE"])
    train = replace(train, batch_size=train.batch_size * world)  # of all processes
    cases = []
    for engine in c["engines"] if world > 1 else ("auto",):
        for name in c["sparsity"]:
            formats = train_preset(c["preset"], name).model.sparsity
            asked = replace(train, model=replace(train.model, sparsity=formats), parallel=engine)
            cases.append({"sparsity": name} | measure(asked, c))
            timing.release()
    if os.environ["RANK"] == "0":
        Path(c["answer"]).write_text(json.dumps(cases))


def measure(config: TrainConfig, c: Row) -> Row:
    """One case, in every process: its row. Raises AssertionError for a loss that is not finite."""
    group = parallel.start(config)
    device = pick_device(group.device(config.device))
    kernel, call, step = prepared(config, c["seed"], device, group)
    losses = [float(call()[0]) for _ in range(c["warm"])]
    if not all(map(math.isfinite, losses)):
        raise AssertionError(f"the losses are {losses}")
    times = 1e3 * np.array(group.most([_seconds(call, device) for _ in range(c["repeats"])]))
    ms = dict(zip(("ms", "ms_p10", "ms_p90"), np.quantile(times, [0.5, 0.1, 0.9]).tolist()))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "processes": group.world, "engine": group.engine, **ms,
        "tokens_per_s": 1e3 * config.tokens_per_step / ms["ms"], "peak_bytes": round(group.most([peak])[0]),
        "captured": step.captured > 0, "attention": kernel,
    }  # fmt: skip


def prepared(
    config: TrainConfig, seed: int, device: torch.device, group: parallel.Alone
) -> tuple[str, Callable[[], Tensor], OptimizerStep]:
    """Attention's kernel, a call that takes a step on random tokens, and what takes it."""
    dtype, rows = pick_dtype(config.dtype, device), config.batch_size // group.world
    kernel = attention.agreed(config, dtype, device, group)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(config.model)
        torch.manual_seed(seed + group.rank)
        tokens = torch.randint(config.model.vocab_size, (rows, config.model.seq_len + 1)).to(device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model.set_attention(kernel)
    for layer in model.ffns():
        layer.clustered.fill_(layer.config.n_clusters)  # random weights are as good in any order
    group.place(model, device, dtype)
    model.set_phase("sparse")
    forward = compiled_loss(model) if config.compile else model
    autocast = partial(autocast_in, dtype, device)
    step = OptimizerStep(model, forward, make_optimizer(model, config), config, autocast, group)
    return kernel, partial(step, [batch] * config.grad_accum, config.lr), step


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of a step, from and to a moment when this process's GPU has nothing to do."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def rows(record: records.Record) -> list[Row]:
    """A row a case; tokens/s also over those of one process with the same formats, and over dense ones."""
    cases, found = record.results["cases"], []
    base = record.config["sparsity"][0]
    for case in cases:
        same = [other for other in cases if other["sparsity"] == case["sparsity"]]
        dense = [
            other for other in cases
            if other["sparsity"] == base and all(other[k] == case[k] for k in ("processes", "engine"))
        ]  # fmt: skip
        alone = next(other for other in same if other["processes"] == 1)
        times = case["tokens_per_s"] / alone["tokens_per_s"]
        found.append(
            {
                "processes": case["processes"], "engine": case["engine"] or "one process",
                "formats": case["sparsity"], "ms": case["ms"], "tokens/s": case["tokens_per_s"],
                "x one process": times, "of linear": times / case["processes"],
                f"x {base}": case["tokens_per_s"] / dense[0]["tokens_per_s"],
                "GB a process": case["peak_bytes"] / 1e9,
            }
        )  # fmt: skip
    return found


def table(record: records.Record) -> str:
    """Every case: time of a step, tokens/s, and how they compare."""
    c, train = record.config, record.config["train"]
    shape = f"{c['preset']}, {train['model']['n_layer']} layers, {train['batch_size']} sequences a process"
    found = pd.DataFrame(rows(record)).to_string(index=False, float_format="{:,.3f}".format)
    return f"{shape}, {train['grad_accum']} micro-batches\n{found}"


if __name__ == "__main__":
    main(sys.argv[1])
