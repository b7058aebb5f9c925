"""Benchmark of the training loop: what its bookkeeping costs against the barest loops one can write."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from replicate.config import TrainConfig
from replicate.settings.presets import train_preset
from replicate.settings.text import from_dict, refuse, to_dict
from replicate.study import records
from replicate.text.synthetic import MOST_SYMBOLS
from replicate.train import Trainer

KIND = "bench-train"
# How a plain loop may be compiled: as torch.compile does by default, and for the least launches.
MODES = ("default", "reduce-overhead")

GIVEN = {
    "steps": "use --turn and --repeats", "lr_warmup": "it is 0 for a steady rate",
    "eval_every": "it is 0: training alone is timed", "model.sparsity": "the model is dense",
}  # fmt: skip


def config(
    preset: str = "smoke", changes: dict[str, Any] | None = None, repeats: int = 15, turn: int = 20
) -> dict[str, Any]:
    """What identifies a run: a dense training configuration, and `repeats` turns of `turn` steps.

    Raises ValueError for changes of what is GIVEN, or unknown.
    """
    refuse(changes or {}, GIVEN)
    train = train_preset(preset, **(changes or {}))
    # One step more than is run, so that there is no final evaluation.
    train = replace(train, steps=turn * (repeats + 1) + 1, lr_warmup=0, eval_every=0)
    return {"repeats": repeats, "turn": turn, "train": to_dict(train)}


def run(c: dict[str, Any]) -> records.Record:
    """Tokens/s of a dense model under `Trainer` and under plain torch loops of the same shapes.

    All train the same weights with the same optimiser in this process, in turns. A plain loop's model is
    compiled in one piece, by each of MODES, or not at all without `compile`. The trainer records losses and
    statistics as in any run. A large vocabulary is trained on random tokens.

    The record's results: "tokens_per_s" by loop, medians over the turns; the "fastest" plain loop; "ratio"
    of the trainer to it (1 is no overhead), also a median, with "low" and "high", the 10th and 90th
    percentile; "captured", if a step is one CUDA graph; "threads".
    """
    start, train = time.perf_counter(), from_dict(c["train"])
    data = RandomTokens(train) if train.model.vocab_size > MOST_SYMBOLS else None
    trainer = Trainer(train, progress=False, data=data)
    loops = {"trainer": lambda first, n: trainer.run(first + n)}
    for mode in MODES if train.compile else (None,):
        loops[f"plain loop, {mode or 'not compiled'}"] = PlainLoop(trainer, mode).run
    speeds = turns(loops, trainer, c["repeats"], c["turn"])
    medians = {name: float(np.median(found)) for name, found in speeds.items()}
    fastest = max((name for name in loops if name != "trainer"), key=medians.__getitem__)
    low, ratio, high = np.quantile(np.divide(speeds["trainer"], speeds[fastest]), [0.1, 0.5, 0.9]).tolist()
    results = {"tokens_per_s": medians, "fastest": fastest, "ratio": ratio, "low": low, "high": high}
    results |= {"captured": trainer.optimizer_step.captured > 0, "threads": torch.get_num_threads()}
    took = time.perf_counter() - start
    return records.make_record(KIND, c, results, seconds=took, device=trainer.device.type)


def turns(
    loops: dict[str, Callable[[int, int], Any]], trainer: Trainer, repeats: int, turn: int
) -> dict[str, list[float]]:
    """Tokens/s of each loop in each of `repeats` turns, after one that warms up."""
    on_gpu = trainer.device.type == "cuda"
    # Step by step on a CPU, whose clock and neighbours change within a turn; a GPU would idle in between.
    block = turn if on_gpu else 1
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for i in range(repeats + 1):
        spent = dict.fromkeys(loops, 0.0)
        for first in range(i * turn, (i + 1) * turn, block):
            for name in reversed(list(loops)) if (i + first) % 2 else list(loops):
                start = time.perf_counter()
                loops[name](first, block)
                if on_gpu:
                    torch.cuda.synchronize(trainer.device)
                spent[name] += time.perf_counter() - start
        if i:
            for name, seconds in spent.items():
                speeds[name].append(turn * trainer.config.tokens_per_step / seconds)
    return speeds


class PlainLoop:
    """The barest loop around a trainer's model, data, precision and optimiser: no record, no checks.

    Args:
        mode: of torch.compile, one of MODES; None does not compile.
    """

    def __init__(self, trainer: Trainer, mode: str | None = None) -> None:
        self.trainer, self.model, self.optimizer = trainer, trainer.model, trainer.optimizer
        self.forward = torch.compile(self.model, mode=mode, dynamic=False) if mode else self.model

    def run(self, first: int, steps: int) -> None:
        """Train on the batches of steps `first` to `first + steps` - 1."""
        config = self.trainer.config
        for step in range(first, first + steps):
            for micro in range(config.grad_accum):
                inputs, targets = self.trainer.batch(step, micro)
                torch.compiler.cudagraph_mark_step_begin()
                with self.trainer.autocast():
                    loss = self.forward(inputs, targets)[1]
                (loss / config.grad_accum).backward()
            if config.clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class RandomTokens:
    """One random batch in the place of `TokenData`, for shapes whose vocabulary no corpus here has."""

    def __init__(self, train: TrainConfig) -> None:
        draw = torch.Generator().manual_seed(train.seed)
        shape = (train.batch_size, train.model.seq_len + 1)
        self.rows = torch.randint(train.model.vocab_size, shape, generator=draw)

    def batch(self, *_: Any, device: Any = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets [B, S]."""
        rows = self.rows.to(device) if device else self.rows
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def provenance(self) -> dict[str, Any]:
        """What a result must say about its text."""
        return {"corpus": "random", "sha256": "random"}


def table(record: records.Record) -> str:
    """Tokens/s of every loop, and the trainer's ratio to the fastest plain one."""
    r = record.results
    speeds = pd.Series(r["tokens_per_s"], name="tokens/s").to_string(float_format="{:,.0f}".format)
    graph = ", a step one CUDA graph" if r["captured"] else ""
    return (
        f"{speeds}\nratio to the fastest plain loop {r['ratio']:.3f} ({r['low']:.3f} to {r['high']:.3f} over "
        f"{record.config['repeats']} turns){graph}"
    )
