"""The feed-forward network, dense and sparse: the paper's six products, algorithms 1 and 2.

`SparseFFN` is a squared-ReLU FFN whose `SparsityConfig` says which operand of each product is sparse. Masks
are applied to dense tensors here: this file defines what is right, and computes it on a CPU. On a GPU in half
precision `kernels.layer` computes the same. The dense phase is the plain dense FFN, bit for bit, or `fp8`'s.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replicate import ablations, fp8, router
from replicate.config import BACKENDS, SparsityConfig
from replicate.experts import LearnedRouter, mixture
from replicate.settings.checks import one_of
from replicate.sparsity import mask24, prune24, soft_threshold24
from replicate.system.once import once
from replicate.training.device import autocast_on
from replicate.training.layer_state import LayerState
from replicate.training.sharded import agreed, settle, whole, write

INIT_STD = 0.02


def relu2(y1: Tensor) -> Tensor:
    """Squared ReLU, y2 = relu(y1)^2 (equation 2)."""
    return F.relu(y1).square()


def new_weight(rows: int, cols: int) -> nn.Parameter:
    """[rows, cols] drawn from torch's global generator."""
    return nn.Parameter(torch.randn(rows, cols) * INIT_STD)


class SparseFFN(LayerState):
    """Squared-ReLU FFN that trains dense or sparse, by phase (algorithms 1 and 2, figure 4).

    Set `.phase = "sparse"` after the dense warm-up; for Venom call `make_clusters` first, once.
    Straight-through gradients reach all of W1 and W2. `.collect = True` keeps the statistics of the
    last forward pass for `stats()`. `.hold = True` promises that the weights stay as they are until it is
    False again, so that micro-batches share what kernels prepare from them.

    Args:
        d_model: D. d_ff: F; both multiples of 4 unless all is dense, F of 4 n_clusters for Venom.
        sparsity: the formats; the default is dense in both phases.
        backend: of the sparse phase: None or "auto" takes kernels where the device, the dtype and the
            configuration have them, "reference" plain torch; see `replicate.kernels.backend`.
    """

    def __init__(
        self, d_model: int, d_ff: int, sparsity: SparsityConfig | None = None, *, backend: str | None = None
    ) -> None:
        super().__init__(SparsityConfig() if sparsity is None else sparsity)
        one_of("backend", backend or "auto", BACKENDS)
        self.backend = backend
        self.config.check_shape(d_model, d_ff)
        self.w1 = new_weight(d_model, d_ff)
        self.w2 = new_weight(d_ff, d_model)
        learned = self.config.activation != "dense" and self.config.selection == "learned"
        self.score = nn.Parameter(torch.zeros(d_ff)) if learned else None
        c = self.config
        self.experts = LearnedRouter(d_model, c.n_clusters, c.top_k) if c.routing == "learned" else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model], in the autocast dtype where autocast is on."""
        if autocast_on(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not self.config.any or self.phase == "dense":
            if self.config.fp8:
                y3, y2 = fp8.dense_ffn(x, self.w1, self.w2, backend=self.backend)
            else:
                y2 = relu2(x @ self.w1.to(x.dtype))
                y3 = y2 @ self.w2.to(x.dtype)
            if self.collect:
                self.note(y2, y2, None)
            return y3 if self.score is None else ablations.with_score(y3, self.score)
        with torch.autocast(x.device.type, enabled=False) if autocast_on(x) else nullcontext():
            return self._sparse(x.reshape(-1, x.shape[-1])).view(x.shape)

    def _sparse(self, x: Tensor) -> Tensor:
        asked = self.backend if self.backend not in (None, "auto") else os.environ.get("REPLICATE_BACKEND")
        if asked == "reference" or (x.device.type == "cpu" and asked in (None, "", "auto")):
            return self.by_reference(x)
        from replicate.kernels import layer  # Triton is optional, and takes a second to import

        return layer.sparse_phase(self, x)

    def by_reference(self, x: Tensor) -> Tensor:
        """`reference`, which compiled code contains unless statistics leave it or tokens choose in it."""
        apart = self.collect or self.config.wgrad != "dense" or self.config.selection == "tile"
        return self._apart(x) if apart else self.reference(x)

    @torch._disable_dynamo  # as torch.compiler.disable, which would import torch._dynamo here
    def _apart(self, x: Tensor) -> Tensor:
        return self.reference(x)

    def reference(self, x: Tensor) -> Tensor:
        """y3 [T, D] of the sparse phase on x [T, D] by plain torch, which defines what is right."""
        if self.experts is not None:
            return mixture(self, x)
        return _SparseProducts.apply(x, self.w1, self.w2, self.score, self)[0]

    def sparse_weight(self, name: str, dtype: torch.dtype, w: Tensor | None = None) -> Tensor:
        """The weight product `name` reads (w1, w2, w2_t or w1_t): 2:4 by `SparsityConfig.source`.

        Not transposed: w2_t is [F, D] pruned along D, w1_t is [D, F] pruned along F. `w` stands in for
        the module's own weight.
        """
        source = self.config.source(name)
        index = ("w1", "w2", "w2_t", "w1_t").index(source or name)
        own, dim = self._oriented()[index]
        w = whole(own if w is None else w).detach()
        if source:
            scale = self.beta(index) if self.config.weight_scale else None
            w = soft_threshold24(w, dim, scale) if self.config.weight_method == "soft" else prune24(w, dim)
        return w.to(dtype)

    def product(self, name: str, a: Tensor, w: Tensor | None = None) -> Tensor:
        """`a` [T, K] times what product `name` reads, see `sparse_weight`; with fp8 both are rounded."""
        w = self.sparse_weight(name, self.w1.dtype if self.config.fp8 else a.dtype, w)
        w = w.T if name.endswith("_t") else w
        if not self.config.fp8:
            return a @ w
        own = self.config.activation == "venom" and name in ("w2", "w1_t")  # a cluster's neurons have a scale
        return fp8.product(a, w, groups=self.config.n_clusters if own else 1)

    def _oriented(self) -> list[tuple[Tensor, int]]:
        """(weight, axis of its groups of four) for w1, w2, w2_t, w1_t: the axis the product sums over."""
        return [(self.w1, 0), (self.w2, 0), (self.w2, 1), (self.w1, 1)]

    def activation_mask(self, x: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """(values, mask) [T, F] of y2 after the configured activation sparsity (algorithm 1, line 3)."""
        c, allowed = self.config, None
        if c.activation == "venom":
            if c.routing == "oracle-block":
                return ablations.block_votes(y2, c)
            clusters = self.clusters(x, y2)
            if self.collect:
                self.seen["clusters"] = clusters
            allowed = router.ordered_cluster_mask(clusters, self.w1.shape[1], c.n_clusters)
            y2 = torch.where(allowed, y2, torch.zeros_like(y2))
            if not c.inner:
                return y2, allowed
        if c.selection == "magnitude":
            mask = mask24(y2)
            values = torch.where(mask, y2, torch.zeros_like(y2))
        else:
            values, mask = ablations.select24(y2, c.selection, self.score)
        return values, mask if allowed is None else mask & allowed

    def clusters(self, x: Tensor, y2: Tensor | None = None) -> Tensor:
        """[T, k] the clusters that each token of x [T, D] uses, by `router.RULES`.

        Not for routing "oracle-block", which has no rule.

        Args:
            y2: [T, F] of the sparse phase before any mask; where None, a rule that needs it computes it.
        """
        return router.RULES[self.config.routing](self, x, y2)

    def cluster_means(self) -> Tensor:
        """ExpertMeans [n, D] of the clusters' present columns of W1, so that the router follows W1."""
        return router.ordered_cluster_means(whole(self.w1), self.config.n_clusters)

    @torch.no_grad()
    def make_clusters(self, seed: int, sample: Tensor | None = None) -> Tensor:
        """Cluster the neurons and store them in cluster order, leaving the function unchanged.

        Cluster c then owns the contiguous columns c F/n to (c+1) F/n - 1 of W1 and the same rows of W2.

        Args:
            seed: of the k-means start.
            sample: inputs [..., d_model], by whose mean activation routing "static" fixes the strongest.

        Returns:
            The permutation [d_ff], long: new column j was column perm[j]. Optimiser moments of w1
            (columns), w2 (rows) and score must be permuted the same way.
        """
        settle(self)
        n, k, w1 = self.config.n_clusters, self.config.top_k, whole(self.w1)
        x = None if sample is None else router.tokens_of(sample, w1)
        perm = agreed(router.cluster_neurons(w1, n, seed=seed).argsort(stable=True), self.w1)
        for weight, axis in ((self.w1, 1), (self.w2, 0), (self.score, 0)):
            if weight is not None:
                write(weight, whole(weight).index_select(axis, perm))
        if x is not None:
            strength = router.energy(relu2(x @ whole(self.w1)), n).mean(0)
            self.static_clusters.copy_(agreed(strength.argsort(descending=True, stable=True)[:k], self.w1))
        self.clustered.fill_(n)
        return perm

    @torch.no_grad()
    def fold(self) -> None:
        """Make W1 and W2 what the sparse forward pass reads, 2:4 or as they are, see `SparsityConfig.source`.

        For the switch to the dense phase: soft thresholding computes with smaller weights than are stored,
        so that dense steps would start from another function. Pruned entries start from zero and may grow.

        Raises RuntimeError with `weight_scale` before the first sparse phase, which computes the scales.
        """
        if self.config.weight_scale and not self.scaled:
            raise RuntimeError("no scales yet: enter the sparse phase first")
        settle(self)
        for name in ("w1", "w2"):
            write(getattr(self, name), self.sparse_weight(name, self.w1.dtype))

    def weight_masks(self) -> dict[str, Tensor]:
        """The 2:4 weight masks in force by name (w1, w2, w2_t, w1_t), for flip rates."""
        oriented = zip(("w1", "w2", "w2_t", "w1_t"), self._oriented(), strict=True)
        return {name: mask24(whole(w), dim) for name, (w, dim) in oriented if getattr(self.config, name)}


class _SparseProducts(torch.autograd.Function):
    """Algorithms 1 and 2: the six products with the configured operand of each one sparse."""

    @staticmethod
    def forward(x: Tensor, w1: Tensor, w2: Tensor, score: Tensor | None, ffn: SparseFFN) -> tuple[Any, ...]:
        relu_y1 = F.relu(ffn.product("w1", x, w1))  # product 1
        y2 = relu_y1.square()
        kept, mask = (y2, None) if ffn.config.activation == "dense" else ffn.activation_mask(x, y2)
        if ffn.collect:
            ffn.note(y2, kept, ffn.seen.get("clusters"))
        return ffn.product("w2", kept, w2), relu_y1, kept, mask  # product 2

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, w1, w2, score, ctx.ffn = inputs
        _, relu_y1, kept, mask = output
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
        # The weights are saved so that backward reads forward's, and autograd notices a change in place.
        ctx.save_for_backward(x, relu_y1, kept, mask, score, w1, w2)

    @staticmethod
    def backward(ctx, dy3: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return *once(_sparse_gradients, dy3, *ctx.saved_tensors, ctx.ffn), None


def _sparse_gradients(
    dy3: Tensor, x: Tensor, relu_y1: Tensor, kept: Tensor, mask: Tensor | None, score: Tensor | None,
    w1: Tensor, w2: Tensor, ffn: SparseFFN,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dx, dW1, dW2, dscore."""
    c, dy3 = ffn.config, dy3.to(x.dtype)
    over_tokens = _over_tokens if c.wgrad == "dense" else ablations.token_reduction(kept, c)
    dy2 = ffn.product("w2_t", dy3, w2)  # product 3
    dw2 = over_tokens(kept, dy3)  # product 4
    dscore = None if score is None else ablations.score_gradient(relu_y1.square(), mask, dy2, score)
    dy1 = 2 * dy2 * relu_y1
    if mask is not None:
        dy1 = dy1.masked_fill(~mask, 0) if c.mask_reuse else ablations.own_gradient_mask(dy1, c)
    dx = ffn.product("w1_t", dy1, w1)  # product 5
    dw1 = over_tokens(dy1, x).T  # product 6
    return dx, dw1.to(w1.dtype), dw2.to(w2.dtype), dscore


def _over_tokens(sparse: Tensor, dense: Tensor) -> Tensor:
    """[T, F], [T, D] -> [F, D]: the sum over tokens of a weight gradient."""
    return sparse.T @ dense
