"""Benchmark of the training loop: what its bookkeeping costs against the barest loop one can write."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from replicate import measure
from replicate.config import SparsityConfig, TrainConfig
from replicate.config_text import to_dict
from replicate.data import TokenData
from replicate.gpt import GPT
from replicate.presets import train_preset
from replicate.train import Trainer


def train_bench(
    config: TrainConfig | None = None, *, repeats: int = 15, steps: int = 20, data: TokenData | None = None
) -> dict[str, Any]:
    """Tokens/s of the dense model under `Trainer` and under a plain torch loop of the same shapes.

    Both train in this process, interleaved, in turns of `steps` steps each; the numbers are medians over
    the turns, the ratio too. The trainer records losses and statistics as in any run.

    Args:
        config: shapes and precision; its sparsity is ignored. Default: the smoke preset.
        repeats: turns.
        steps: optimiser steps a turn.
        data: tokens to train on instead of config.corpus's.

    Returns:
        trainer_tokens_per_s, plain_tokens_per_s, ratio (trainer / plain, 1 costs nothing), overhead
        (share of time added), low and high (10th and 90th percentile of the turns' ratios), and what
        was measured: config, device, threads, repeats, steps.

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
    trainer = Trainer(config, progress=False, data=data)
    plain = PlainLoop(trainer)
    loops = [lambda first, n: trainer.run(first + n), plain.run]
    # Step by step on a CPU, whose clock and neighbours change within a turn; a GPU would idle in between.
    block = 1 if trainer.device.type == "cpu" else steps
    speeds: list[list[float]] = [[], []]
    for turn in range(repeats + 1):
        spent = [0.0, 0.0]
        for first in range(turn * steps, (turn + 1) * steps, block):
            for which in (0, 1) if (turn + first) % 2 else (1, 0):
                start = time.perf_counter()
                loops[which](first, block)
                _wait(trainer.device)
                spent[which] += time.perf_counter() - start
        if turn:  # the first one warms up
            for speed, seconds in zip(speeds, spent):
                speed.append(steps * config.tokens_per_step / seconds)
    ours, theirs = (float(np.median(part)) for part in speeds)
    low, ratio, high = (float(q) for q in np.quantile(np.divide(*speeds), [0.1, 0.5, 0.9]))
    return {
        "trainer_tokens_per_s": ours,
        "plain_tokens_per_s": theirs,
        "ratio": ratio,
        "overhead": 1 / ratio - 1,
        "low": low,
        "high": high,
        "repeats": repeats,
        "steps": steps,
        "device": measure.device_name() if trainer.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "config": to_dict(config),
    }


class PlainLoop:
    """The barest loop around the same model, data, precision and optimiser: no record, no checks."""

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.config
        self.trainer = trainer
        self.model = GPT(config.model).to(trainer.device, next(trainer.model.parameters()).dtype)
        self.forward = torch.compile(self.model) if config.compile else self.model
        betas = (config.beta1, config.beta2)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.lr, betas, weight_decay=config.weight_decay, fused=True
        )

    def run(self, first: int, steps: int) -> None:
        """Train on the batches of steps `first` to `first + steps` - 1."""
        config = self.trainer.config
        for step in range(first, first + steps):
            for micro in range(config.grad_accum):
                inputs, targets = self.trainer.batch(step, micro)
                with self.trainer.autocast():
                    loss = self.forward(inputs, targets)[1]
                (loss / config.grad_accum).backward()
            if config.clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
