"""One FFN's inputs and layers, and the checks that come before any time is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from replicate import router
from replicate.bench.timing import relative_error
from replicate.ffn import INIT_STD, SparseFFN
from replicate.kernels import layer as fused_ffn
from replicate.settings.presets import SPARSITY_PRESETS

DENSE = "dense"
PARTS = ("y3", "dx", "dW1", "dW2")
TOLERANCE, SLACK, LIMIT = 2e-2, 1.5, 0.2  # see `errors`


class LayerCase:
    """One layer's random inputs, shared by all arms: x and dy3 [T, D] in bf16, W1 and W2 in float32.

    The neurons count as clustered as they stand: of independent random neurons no order is better.

    Args:
        shape: tokens T, d_model D, d_ff F. seed: of all numbers. device: "cuda" or "cpu".
    """

    def __init__(self, shape: Sequence[int], seed: int, device: str) -> None:
        tokens, self.d_model, self.d_ff = shape
        draw = torch.Generator(device).manual_seed(seed)
        randn = partial(torch.randn, generator=draw, device=device)
        self.device = device
        self.x = randn(tokens, self.d_model).bfloat16().requires_grad_()
        self.dy3 = randn(tokens, self.d_model).bfloat16()
        self.w1 = nn.Parameter(randn(self.d_model, self.d_ff) * INIT_STD)
        self.w2 = nn.Parameter(randn(self.d_ff, self.d_model) * INIT_STD)

    def layer(self, name: str, backend: str | None = None) -> SparseFFN:
        """A layer on the shared weights: preset `name` in its sparse phase, or DENSE."""
        with torch.device(self.device):
            ffn = SparseFFN(self.d_model, self.d_ff, SPARSITY_PRESETS[name])
        ffn.w1, ffn.w2, ffn.backend = self.w1, self.w2, backend
        ffn.clustered.fill_(True)
        ffn.phase = DENSE if name == DENSE else "sparse"
        return ffn

    def step(self, forward: Callable[[Tensor], Tensor], x: Tensor | None = None) -> tuple[Tensor, ...]:
        """y3, dx, dW1 and dW2; the weights are cast or compressed anew, as in every training step."""
        x = self.x if x is None else x
        y3 = forward(x)
        return y3, *torch.autograd.grad(y3, (x, self.w1, self.w2), self.dy3.to(x.dtype))

    def load(self, ffn: SparseFFN) -> float:
        """Tokens of the busiest cluster over the mean."""
        with torch.no_grad():
            experts = ffn.experts(self.x.detach())
        return router.load_stats(experts, ffn.config.n_clusters)["max_over_mean"]


def check(p: LayerCase, sparsity: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What computes each preset ("engines"), and the `errors` of each preset.

    Raises:
        ValueError: on a GPU a preset would be computed by plain torch.
        AssertionError: a part of a result is beyond its limit.
    """
    engines = {name: fused_ffn.describe(p.layer(name), p.x) for name in sparsity}
    slow = {name: text for name, text in engines.items() if text.startswith("reference")}
    if slow and p.device != "cpu":
        raise ValueError(f"no kernels to measure for {slow}; leave them out with --sparsity")
    found = {name: errors(p, name) for name in sparsity}
    wrong = [
        f"{name}, {part}: {error:.2e}, at most {e['limit'][part]:.2e}"
        for name, e in found.items()
        for part, error in e["error"].items()
        if not error <= e["limit"][part]
    ]
    if wrong:
        raise AssertionError(f"[{len(p.x)}, {p.d_model}, {p.d_ff}] differs from the reference: {wrong}")
    return {"engines": engines, "errors": found}


def errors(p: LayerCase, name: str) -> dict[str, dict[str, float]]:
    """{"error": relative errors of y3, dx, dW1 and dW2, "limit": of each}.

    The reference is the reference backend in float32. Where two activations of a group differ by less than
    bf16 resolves, either may be kept, and each such pair counts as an error; so the limit is TOLERANCE, or
    SLACK times the error of the reference backend itself in bf16 where that is more, and LIMIT at most. Both
    route by the same means, rounded to bf16.
    """
    half, wide = p.layer(name, "reference"), p.layer(name, "reference")
    wide.expert_means = lambda: half.expert_means().to(p.x.dtype).float()
    exact = p.step(wide, p.x.detach().float().requires_grad_())
    found: dict[str, dict[str, float]] = {}
    for key, layer in (("limit", half), ("error", p.layer(name))):
        pairs = zip(PARTS, p.step(layer), exact, strict=True)
        found[key] = {part: relative_error(ours, reference) for part, ours, reference in pairs}
    found["limit"] = {n: min(LIMIT, max(TOLERANCE, SLACK * e)) for n, e in found["limit"].items()}
    return found
