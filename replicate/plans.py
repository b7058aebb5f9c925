"""Which runs the project's study consists of: the arms of every notebook, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from replicate import study
from replicate.config import TrainConfig

TABLE3 = (
    *("dense", "w1", "w1+w1t", "w2", "w2+w2t", "w1+w2", "w1+w2+t"),
    *("act24", "venom16", "venom32", "venom64", "recipe"),
)
CONTROLS = ("static16", "oracle16", "no-mask-reuse", "act24+wgrad", "recipe32", "recipe64")
SHARES = (1 / 2, 2 / 3, 5 / 6)  # Table 4's 30, 40 and 50 of 60 thousand steps; 0 and 1 are arms of Table 3
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "recipe, no warm-up": ("recipe", {"dense_warmup": 0}),
    "act24, no warm-up": ("act24", {"dense_warmup": 0}),
    "act24, learned": ("act24", {"model.sparsity.selection": "learned"}),
    "act24, soft": ("act24", {"model.sparsity.selection": "soft"}),
    "act24, static": ("act24", {"model.sparsity.selection": "static"}),
    "recipe, hard": ("recipe", {"model.sparsity.weight_method": "hard"}),
    "recipe, scaled": ("recipe", {"model.sparsity.weight_scale": True}),
    "w1+w2, hard": ("w1+w2", {"model.sparsity.weight_method": "hard"}),
    "w1+w2, scaled": ("w1+w2", {"model.sparsity.weight_scale": True}),
    "venom16, no mask reuse": ("venom16", {"model.sparsity.mask_reuse": False}),
    "recipe, no mask reuse": ("recipe", {"model.sparsity.mask_reuse": False}),
    "venom16, no inner": ("venom16", {"model.sparsity.inner": False}),
    "GELU": ("dense", {"model.activation": "gelu"}),
}


def everything(profile: str, seeds: Sequence[int] = (1, 2, 3)) -> dict[str, list[TrainConfig]]:
    """Arm name -> configurations, one a seed, of all arms at a scale, Table 3's first.

    Args:
        profile: "smoke", "laptop" or "gpu". seeds: of each arm.
    """
    plan = {name: study.arms(profile, [name], seeds) for name in (*TABLE3, *CONTROLS)}
    for share in SHARES:
        plan[f"recipe, {share:.0%} sparse first"] = study.arms(profile, ["recipe"], seeds, sparse_share=share)
    for order in ("dense-sparse", "interleaved"):
        plan[f"recipe, 50% {order}"] = study.arms(profile, ["recipe"], seeds, sparse_share=0.5, order=order)
    for name, (preset, changes) in VARIANTS.items():
        plan[name] = study.arms(profile, [preset], seeds, **changes)
    for factor in (0.5, 2.0):  # does the ranking depend on the learning rate, tuned for dense?
        for name in ("dense", "w1+w2", "act24", "venom16", "recipe"):
            lr = factor * plan[name][0].lr
            plan[f"{name}, lr x {factor:g}"] = study.arms(profile, [name], seeds, lr=lr)
    d_ff = plan["dense"][0].model.d_ff
    swiglu = {"model.activation": "swiglu", "model.d_ff": 2 * d_ff // 3}  # three matrices, equal parameters
    plan["SwiGLU"] = study.arms(profile, ["dense"], seeds, **swiglu)
    return plan


def some(names: Sequence[str], seeds: Sequence[int], profile: str) -> dict[str, list[TrainConfig]]:
    """The arms of `everything` with these names, in this order; ValueError names one that does not exist."""
    plan = everything(profile, seeds)
    unknown = [name for name in names if name not in plan]
    if unknown:
        raise ValueError(f"the study has no arm {unknown[0]!r}; it has {', '.join(plan)}")
    return {name: plan[name] for name in names}
