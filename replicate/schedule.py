"""When a run is sparse, and its learning rate: pure functions of the step and the configuration.

A run is `dense_warmup` dense steps (natural sparsity and the clusters form), then the rest, of which
`sparse_share` is sparse. The paper puts the sparse steps first and the dense ones last (section 5.2.2).
"""

from __future__ import annotations

import math

from replicate.config import TrainConfig


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Learning rate of `step` (0 is the first): linear warm-up, then a cosine.

    With w warm-up steps of n: lr (step + 1) / w while step < w; after that
    lr (m + (1 - m)(1 + cos(pi p)) / 2) with m = min_lr_share and p from 0 to 1 at the last step.
    """
    if step < cfg.lr_warmup:
        return cfg.lr * (step + 1) / cfg.lr_warmup
    progress = min(1.0, (step - cfg.lr_warmup) / max(1, cfg.steps - 1 - cfg.lr_warmup))
    share = cfg.min_lr_share + (1 - cfg.min_lr_share) * 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.lr * share


def sparse_steps(cfg: TrainConfig) -> int:
    """Number of sparse steps of the run: `sparse_share` of those after the warm-up, 0 for a dense model."""
    if not cfg.model.sparsity.any:
        return 0
    return math.floor(cfg.sparse_share * _after_warmup(cfg) + 0.5)


def check(cfg: TrainConfig) -> None:
    """Raise ValueError for a run that asks for sparse steps and has none."""
    if cfg.model.sparsity.any and cfg.sparse_share and not sparse_steps(cfg):
        raise ValueError(
            f"no step is sparse: dense_warmup is {cfg.dense_warmup}, steps {cfg.steps}, sparse_share "
            f"{cfg.sparse_share}; set a smaller dense_warmup, more steps, or sparse_share=0"
        )


def phase_at(step: int, cfg: TrainConfig) -> str:
    """Phase of `step`, "dense" or "sparse"."""
    return "sparse" if sparse_before(step + 1, cfg) > sparse_before(step, cfg) else "dense"


def sparse_before(step: int, cfg: TrainConfig) -> int:
    """Number of sparse steps among steps 0 to `step` - 1.

    Interleaved, a period of `interleave` steps starts with its sparse ones, and the periods share the
    sparse steps out so that their sum is `sparse_steps` exactly.
    """
    n, rest = sparse_steps(cfg), _after_warmup(cfg)
    i = min(max(step - (cfg.steps - rest), 0), rest)  # steps after the warm-up
    if n == 0 or i == 0:
        return 0
    if cfg.order == "sparse-dense":
        return min(i, n)
    if cfg.order == "dense-sparse":
        return max(0, i - (rest - n))
    start = i - i % cfg.interleave
    stop = min(start + cfg.interleave, rest)
    before, through = start * n // rest, stop * n // rest
    return before + min(i - start, through - before)


def phase_plan(cfg: TrainConfig) -> list[tuple[str, int, int]]:
    """The run as stretches (phase, start, stop) of steps, stop excluded."""
    plan: list[tuple[str, int, int]] = []
    for step in range(cfg.steps):
        phase = phase_at(step, cfg)
        if plan and plan[-1][0] == phase:
            plan[-1] = (phase, plan[-1][1], step + 1)
        else:
            plan.append((phase, step, step + 1))
    return plan


def _after_warmup(cfg: TrainConfig) -> int:
    return max(0, cfg.steps - cfg.dense_warmup)
