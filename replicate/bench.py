"""Benchmark of the training loop: what its bookkeeping costs against the barest loops one can write."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from replicate import measure
from replicate.config import SparsityConfig, TrainConfig
from replicate.config_text import to_dict
from replicate.data import TokenData
from replicate.presets import train_preset
from replicate.step import draw_seed
from replicate.synthetic import MOST_SYMBOLS
from replicate.train import Trainer

# How a plain loop may be compiled: as torch.compile does by default, and for the least launches.
MODES = ("default", "reduce-overhead")


def train_bench(
    config: TrainConfig | None = None, *, repeats: int = 15, steps: int = 20, data: TokenData | None = None
) -> dict[str, Any]:
    """Tokens/s of the dense model under `Trainer` and under plain torch loops of the same shapes.

    All train the same weights with the same optimiser in this process. They take turns, after `steps` steps
    on a GPU and after each one on a CPU. A plain loop's model is compiled in one piece, by each of MODES, or
    not at all without config.compile. The numbers are medians over the turns, the ratio too, which is to the
    fastest plain loop. The trainer records losses and statistics as in any run.

    Args:
        config: shapes and precision; its sparsity is ignored. Default: the smoke preset.
        repeats: turns.
        steps: optimiser steps a turn.
        data: tokens to train on instead of config.corpus's, or of random ones for a large vocabulary.

    Returns:
        trainer_tokens_per_s, plain_tokens_per_s by loop, fastest, ratio (trainer / fastest plain loop, 1
        is no overhead), overhead (share of time added), low and high (10th and 90th percentile of the turns'
        ratios), and what was measured: config, device, threads, repeats, steps, captured.

    Raises:
        ValueError: for fewer than one turn or step.
    """
    if repeats < 1 or steps < 1:
        raise ValueError(f"repeats {repeats}, steps {steps}: choose 1 or more")
    config = config or train_preset("smoke")
    config = replace(
        config,
        model=replace(config.model, sparsity=SparsityConfig()),
        steps=steps * (repeats + 1) + 1,  # one more than is run: no final evaluation
        lr_warmup=0,
        eval_every=0,
    )
    if data is None and config.model.vocab_size > MOST_SYMBOLS:
        data = RandomTokens(config.model.vocab_size, config.model.seq_len)
    trainer = Trainer(config, progress=False, data=data)
    modes = MODES if config.compile else (None,)
    loops = {"trainer": lambda first, n: trainer.run(first + n)}
    loops |= {f"plain loop, {mode or 'not compiled'}": PlainLoop(trainer, mode).run for mode in modes}
    # Step by step on a CPU, whose clock and neighbours change within a turn; a GPU would idle in between.
    block = 1 if trainer.device.type == "cpu" else steps
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(repeats + 1):
        spent = dict.fromkeys(loops, 0.0)
        for first in range(turn * steps, (turn + 1) * steps, block):
            for name in reversed(list(loops)) if (turn + first) % 2 else list(loops):
                start = time.perf_counter()
                loops[name](first, block)
                _wait(trainer.device)
                spent[name] += time.perf_counter() - start
        if turn:  # the first one warms up
            for name, seconds in spent.items():
                speeds[name].append(steps * config.tokens_per_step / seconds)
    ours, *plain = ((name, float(np.median(found))) for name, found in speeds.items())
    fastest = max(plain, key=lambda pair: pair[1])[0]
    ratios = np.divide(speeds["trainer"], speeds[fastest])
    low, ratio, high = (float(q) for q in np.quantile(ratios, [0.1, 0.5, 0.9]))
    return {
        "trainer_tokens_per_s": ours[1],
        "plain_tokens_per_s": dict(plain),
        "fastest": fastest,
        "ratio": ratio,
        "overhead": 1 / ratio - 1,
        "low": low,
        "high": high,
        "repeats": repeats,
        "steps": steps,
        "captured": trainer.optimizer_step.captured > 0,
        "device": measure.device_name() if trainer.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "config": to_dict(config),
    }


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
        config, self.optimizer.found_inf = self.trainer.config, None  # which the trainer had set
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
    """Random tokens in the place of `TokenData`, for shapes whose vocabulary no corpus here has."""

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self.vocab_size, self.seq_len = vocab_size, seq_len

    def batch(
        self, _: str, step: int, batch_size: int, seed: int, micro: int = 0, *, device: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets [batch_size, S], the same for the same numbers."""
        draw = torch.Generator().manual_seed(draw_seed(seed, step, micro))
        rows = torch.randint(self.vocab_size, (batch_size, self.seq_len + 1), generator=draw)
        rows = rows.pin_memory().to(device, non_blocking=True) if device else rows
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def provenance(self) -> dict[str, Any]:
        """What a result must say about its text."""
        return {"corpus": "random", "sha256": "random"}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
