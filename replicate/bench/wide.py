"""Benchmark of training steps of the study's arms with shapes of their own: wider layers and their peers.

One model at a time, the dense one first and again last; a step is the trainer's own, `OptimizerStep`, as one
CUDA graph: micro-batches of random tokens, clipping, AdamW. It has as many passes as micro-batches, but one
update: the time of any number follows from two. A deep model is composed from depths, see `step`.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch

from replicate.bench import timing
from replicate.bench.step import fit
from replicate.config import TrainConfig
from replicate.gpt import GPT
from replicate.settings.presets import train_preset
from replicate.study import plans, records
from replicate.training import attention
from replicate.training.compiled import compiled_loss
from replicate.training.device import pick_dtype
from replicate.training.step import OptimizerStep, make_optimizer

KIND = "bench-wide"
DENSE, AGAIN = "dense", "dense, again"
PRESETS = ("llama1b",)
DEPTHS = {"llama1b": (3, 6, 9), "llama7b": (1, 2, 3)}  # four times as wide, 22 layers exceed 80 GB
MICRO = (1, 4)  # micro-batches of the two timings
LR = 1e-6
ARMS = (
    *("venom16", "wide x2, 32 of 64", "wide x2, 16 of 64", "wide x4, 16 of 64", "wide x4, 8 of 64"),
    *("wide x2, 16 of 64 by activations", "wide x4, 8 of 64 by activations"),
    *("wide x4, 4 of 64 by activations", "experts x4, 16 of 64", "experts x4, 8 of 64", "dense, wide x1.5"),
)
Row = dict[str, Any]


def config(
    preset: str, arms: Sequence[str] = ARMS, layers: Sequence[int] | None = None, repeats: int = 5
) -> Row:
    """What identifies a run; ValueError for something unknown, or depths that cannot be fitted.

    Args:
        preset: training preset. arms: of the study; dense is always there.
        layers: depths to time: the model's own, or three or more to fit. None: DEPTHS, or the model's own.
        repeats: timed steps of each arm.
    """
    model = train_preset(preset).model
    for name in arms:
        of_arm(preset, name, model.n_layer)
    layers = sorted(set(layers or DEPTHS.get(preset, (model.n_layer,))))
    if layers != [model.n_layer] and (len(layers) < 3 or layers[0] < 1):
        raise ValueError(
            f"layers {layers}: give {model.n_layer}, the model's, or three depths or more to fit"
        )
    arms = [name for name in dict.fromkeys(arms) if name != DENSE]
    return {
        "preset": preset, "n_layer": model.n_layer, "layers": layers, "arms": arms, "micro": list(MICRO),
        "dtype": "bfloat16", "seed": 0, "repeats": repeats,
    }  # fmt: skip


def of_arm(preset: str, name: str, n_layer: int) -> TrainConfig:
    """The training configuration of an arm at some depth; ValueError for an arm that the study lacks."""
    dense = train_preset(preset)
    known = plans.ARMS | plans.wider(dense)
    if name not in known:
        raise ValueError(f"the study has no arm {name!r} of a shape of its own; it has {', '.join(known)}")
    sparsity, changes = known[name]
    return train_preset(preset, sparsity, **changes, **{"model.n_layer": n_layer, "lr": LR})


def run(c: Row, device: str = "cuda", compile: bool = True) -> records.Record:
    """Time every arm at every depth. The record's results: "attention" that was used, and "depths".

    By depth and arm: "ms" by number of micro-batches, with spread, "peak_bytes" and "parameters".
    """
    start, results = time.perf_counter(), {"depths": {}}
    for depth in c["layers"]:
        found = results["depths"][str(depth)] = {}
        for name in (DENSE, *c["arms"], AGAIN):
            asked = of_arm(c["preset"], DENSE if name == AGAIN else name, depth)
            case = Case(replace(asked, compile=compile, seed=c["seed"], dtype=c["dtype"]), device)
            results["attention"] = case.attention
            found[name] = case.measure(c["micro"], c["repeats"])
            del case
            timing.release()
        print(f"{c['preset']}: {depth} layers timed, {time.perf_counter() - start:.0f} s", flush=True)
    return records.make_record(KIND, c, results, seconds=time.perf_counter() - start, device=device)


class Case:
    """A model in its sparse phase, its optimiser and random tokens. Its neurons count as clustered."""

    def __init__(self, config: TrainConfig, device: str) -> None:
        self.config, self.device = config, torch.device(device)
        shape = attention.Shape.of(config.model, config.batch_size, pick_dtype(config.dtype, self.device))
        self.attention = attention.pick(config.attention, shape, self.device)
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(config.seed)
            self.model = GPT(config.model)
            size = (config.batch_size, config.model.seq_len + 1)
            tokens = torch.randint(config.model.vocab_size, size)
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.model.set_attention(self.attention)
        for layer in self.model.ffns():
            layer.clustered.fill_(True)
        self.model.set_phase("sparse")
        self.forward = compiled_loss(self.model) if config.compile else self.model
        self.optimizer = make_optimizer(self.model, config)

    def measure(self, micro: Sequence[int], repeats: int) -> Row:
        """Times by number of micro-batches; raises AssertionError for a loss that is not finite."""
        autocast = partial(torch.autocast, self.device.type, torch.bfloat16)
        found: Row = {"parameters": sum(p.numel() for p in self.model.parameters()), "ms": {}}
        for count in micro:
            c = replace(self.config, grad_accum=count)
            step = OptimizerStep(self.model, self.forward, self.optimizer, c, autocast)
            calls = {"step": partial(step, [self.batch] * count, c.lr)}
            loss = [float(calls["step"]()[0]) for _ in range(3)][-1]  # two are launched, the third captured
            if not math.isfinite(loss):
                raise AssertionError(f"the loss is {loss}")
            found["ms"][str(count)] = timing.compare(calls, self.device.type, repeats)["step"]
            found["captured"] = step.captured > 0
            if self.device.type == "cuda":
                found["peak_bytes"] = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            step.forget()
        return found


def step_ms(record: records.Record, arm: str, micro: int) -> float:
    """Milliseconds of a whole model's step of so many micro-batches, composed where it was not timed."""
    depths = record.config["layers"]
    times = [_of_micro(record.results["depths"][str(n)][arm]["ms"], micro) for n in depths]
    if depths == [record.config["n_layer"]]:
        return times[0]
    fixed, layer, _ = fit(depths, times)
    return fixed + layer * record.config["n_layer"]


def _of_micro(ms: dict[str, Row], micro: int) -> float:
    """The line through the times of two numbers of micro-batches, at `micro`."""
    (few, low), (many, high) = ((int(count), found["ms"]) for count, found in ms.items())
    return low + (micro - few) * (high - low) / (many - few)


def rows(record: records.Record, micros: Sequence[int] = (1, 8)) -> list[Row]:
    """One row an arm: parameters timed, ms of a step by micro-batches, and times the dense step's."""
    deepest, table = record.results["depths"][str(max(record.config["layers"]))], []
    for arm in (DENSE, *record.config["arms"], AGAIN):
        row = {"arm": arm, "parameters": deepest[arm]["parameters"]}
        for micro in micros:
            base = (step_ms(record, DENSE, micro) + step_ms(record, AGAIN, micro)) / 2
            row |= {f"ms, {micro}": (ms := step_ms(record, arm, micro)), f"x time, {micro}": ms / base}
        table.append(row)
    return table


def table(record: records.Record) -> str:
    """Every arm's step, and its time over the mean of the two dense ones, at 1 and 8 micro-batches."""
    c = record.config
    found = pd.DataFrame(rows(record)).set_index("arm").to_string(float_format="{:.3f}".format)
    return f"{c['preset']}, {c['n_layer']} layers from {c['layers']}, micro-batches {c['micro']}\n{found}"
