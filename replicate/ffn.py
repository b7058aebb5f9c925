"""The feed-forward network, dense and sparse: the paper's six products, algorithms 1 and 2.

`SparseFFN` is a squared-ReLU FFN whose `SparsityConfig` says which operand of each product is sparse.
The masks are applied to dense tensors here: this file defines what is right. `fused_ffn` computes the same
by kernels, which take over in half precision on a GPU that has them. In the dense phase the layer is the
plain dense FFN, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replicate.config import SparsityConfig
from replicate.dense_ffn import INIT_STD, DenseFFN, new_weight, relu2
from replicate.layer_state import PHASES, LayerState
from replicate.router import cluster_neurons, load_stats, ordered_cluster_mask, route
from replicate.sparsity import (
    mask24,
    mvue24,
    prune24,
    select24,
    soft_threshold24,
    sparsity,
    transposable_mask,
    venom_mask,
)

__all__ = ["INIT_STD", "PHASES", "DenseFFN", "SparseFFN", "relu2", "token_order"]


@torch.compiler.assume_constant_result
def _has_autocast(kind: str) -> bool:
    """False for devices such as meta."""
    return torch.amp.is_autocast_available(kind)


def autocast_on(x: Tensor) -> bool:
    """True if autocast is on where x is."""
    return _has_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)


class SparseFFN(LayerState):
    """Squared-ReLU FFN that trains dense or sparse, by phase (algorithms 1 and 2, figure 4).

    Set `.phase = "sparse"` after the dense warm-up; for Venom call `make_clusters` first, once.
    Straight-through gradients reach all of W1 and W2. `.collect = True` keeps the statistics of the
    last forward pass for `stats()`. `.hold = True` promises that the weights stay as they are until it is
    False again, so that micro-batches share what kernels prepare from them.

    Args:
        d_model: D. d_ff: F; both multiples of 4, F of 4 n_clusters for Venom.
        sparsity: the formats; the default is dense in both phases.
        backend: of the sparse phase: None or "auto" takes kernels where the device, the dtype and the
            configuration have them, "reference" plain torch; see `replicate.kernels.backend`.
    """

    def __init__(
        self, d_model: int, d_ff: int, sparsity: SparsityConfig | None = None, *, backend: str | None = None
    ) -> None:
        super().__init__(sparsity or SparsityConfig())
        self.backend = backend
        self.operands: Any = None  # the weights as the kernels read them, while they are held
        self._hold = False
        self.config.check_shape(d_model, d_ff)
        self.w1 = new_weight(d_model, d_ff)
        self.w2 = new_weight(d_ff, d_model)
        learned = self.config.activation != "dense" and self.config.selection == "learned"
        self.score = nn.Parameter(torch.zeros(d_ff)) if learned else None
        self.collect = False
        self._last: dict[str, Tensor | None] = {}

    @property
    def hold(self) -> bool:
        """True while the weights are promised to stay as they are."""
        return self._hold

    @hold.setter
    def hold(self, hold: bool) -> None:
        self._hold, self.operands = hold, None

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model], in the autocast dtype where autocast is on."""
        if autocast_on(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.phase == "dense" or not self.config.any:
            y2 = relu2(x @ self.w1.to(x.dtype))
            if self.collect:
                self._note(y2, y2, None)
            y3 = y2 @ self.w2.to(x.dtype)
            return y3 if self.score is None else _with_score(y3, self.score)
        from replicate import fused_ffn  # here, since importing Triton takes a second

        with torch.autocast(x.device.type, enabled=False) if autocast_on(x) else nullcontext():
            return fused_ffn.sparse_phase(self, x.reshape(-1, x.shape[-1])).view(x.shape)

    def reference(self, x: Tensor) -> Tensor:
        """y3 [T, D] of the sparse phase on x [T, D] by plain torch, which defines what is right."""
        return _SparseProducts.apply(x, self.w1, self.w2, self.score, self)

    @torch.no_grad()
    def make_clusters(self, seed: int, sample: Tensor | None = None) -> Tensor:
        """Cluster the neurons and store them in cluster order, leaving the function unchanged.

        Cluster c then owns the contiguous columns c F/n to (c+1) F/n - 1 of W1 and the same rows of W2.

        Args:
            seed: of the k-means start.
            sample: inputs [..., d_model]; with them the fixed experts of routing "static" are those
                with the largest mean activation, the strongest fixed choice; without, the first top_k.

        Returns:
            The permutation [d_ff], long: new column j was column perm[j]. Optimiser moments of w1
            (columns), w2 (rows) and score must be permuted the same way.
        """
        labels = cluster_neurons(self.w1, self.config.n_clusters, seed=seed)
        perm = labels.argsort(stable=True)
        self.w1.copy_(self.w1[:, perm])
        self.w2.copy_(self.w2[perm])
        if self.score is not None:
            self.score.copy_(self.score[perm])
        if sample is not None:
            x = sample.reshape(-1, sample.shape[-1]).to(self.w1.dtype)
            energy = self._energy(relu2(x @ self.w1)).mean(0)
            self.static_experts.copy_(energy.argsort(descending=True, stable=True)[: self.config.top_k])
        self.clustered.fill_(self.config.n_clusters)
        return perm

    @torch.no_grad()
    def fold(self) -> None:
        """Make W1 and W2 what the sparse forward pass reads: S24(W1) where w1 is on, S24(W2) where w2 is.

        For the switch to the dense phase: soft thresholding computes with smaller weights than are stored,
        so that dense steps would start from another function. Pruned entries start from zero and may grow.

        Raises RuntimeError with `weight_scale` before the first sparse phase, which computes the scales.
        """
        if self.config.weight_scale and not self.scaled:
            raise RuntimeError("no scales yet: enter the sparse phase first")
        for name in ("w1", "w2"):
            w = getattr(self, name)
            w.copy_(self.sparse_weight(name, w.dtype))

    def expert_means(self) -> Tensor:
        """ExpertMeans [n, D] of the clusters' present columns of W1, so that the router follows W1."""
        return self.w1.detach().unflatten(1, (self.config.n_clusters, -1)).mean(2).T

    def weight_masks(self) -> dict[str, Tensor]:
        """The 2:4 weight masks in force by name (w1, w2, w2_t, w1_t), for flip rates."""
        names = ("w1", "w2", "w2_t", "w1_t")
        oriented = zip(names, self._oriented(), strict=True)
        return {name: mask24(w, dim) for name, (w, dim) in oriented if getattr(self.config, name)}

    def stats(self) -> dict[str, float]:
        """Of the last forward pass with `collect` on: shares of zeros before and after the masks, and load.

        y2_sparsity is the natural sparsity of relu(y1)^2, kept_sparsity that of the masked y2,
        kept_energy the share of y2's sum that the mask keeps; router_load (max over mean) when routed. Of no
        tokens each is NaN.
        """
        if not self._last:
            return {}
        y2, kept, experts = (self._last.get(k) for k in ("y2", "kept", "experts"))
        if y2.numel() == 0:
            names = [
                "y2_sparsity",
                "kept_sparsity",
                "kept_energy",
                *(["router_load"] * (experts is not None)),
            ]
            return dict.fromkeys(names, math.nan)
        out = {"y2_sparsity": sparsity(y2), "kept_sparsity": sparsity(kept)}
        total = y2.double().sum().item()
        out["kept_energy"] = kept.double().sum().item() / total if total > 0 else 1.0
        if experts is not None:
            out["router_load"] = load_stats(experts, self.config.n_clusters)["max_over_mean"]
        return out

    def activation_mask(self, x: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """(values, mask) [T, F] of y2 after the configured activation sparsity (algorithm 1, line 3)."""
        c = self.config
        if c.activation == "24":
            return select24(y2, c.selection, self.score)
        if c.routing == "oracle-block":
            mask = venom_mask(y2, c.v, c.m, n=2 if c.inner else 4)
            return torch.where(mask, y2, torch.zeros_like(y2)), mask
        clusters = self._chosen_neurons(x, y2)
        y2 = torch.where(clusters, y2, torch.zeros_like(y2))
        if not c.inner:
            return y2, clusters
        values, mask = select24(y2, c.selection, self.score)
        return values, mask & clusters

    def experts(self, x: Tensor, y2: Tensor | None = None) -> Tensor:
        """[T, k] the clusters that each token uses; not for a vote of blocks.

        Args:
            x: [T, D]. y2: [T, F] of the sparse phase before any mask, computed where it is needed and None.
        """
        c = self.config
        if c.routing == "static":
            return self.fixed_experts().expand(len(x), -1)
        if c.routing == "token":
            return route(x, self.expert_means().to(x.dtype), c.top_k, metric=c.metric)
        y2 = relu2(x @ self.sparse_weight("w1", x.dtype)) if y2 is None else y2
        return self._energy(y2).argsort(dim=1, descending=True, stable=True)[:, : c.top_k]

    def _chosen_neurons(self, x: Tensor, y2: Tensor) -> Tensor:
        """[T, F] bool: the neurons of each token's chosen clusters."""
        experts = self.experts(x, y2)
        if self.collect:
            self._last["experts"] = experts
        return ordered_cluster_mask(experts, self.w1.shape[1], self.config.n_clusters)

    def _energy(self, y: Tensor) -> Tensor:
        """[T, n]: magnitude of each cluster's activations, summed."""
        return y.abs().unflatten(1, (self.config.n_clusters, -1)).to(torch.float32).sum(2)

    def own_gradient_mask(self, dy1: Tensor) -> Tensor:
        """dy1 pruned by its own magnitudes, not by the forward mask: the mistake of mask_reuse=False."""
        if self.config.activation == "venom":
            top = self._energy(dy1).argsort(dim=1, descending=True, stable=True)[:, : self.config.top_k]
            dy1 = dy1 * ordered_cluster_mask(top, dy1.shape[1], self.config.n_clusters)
            if not self.config.inner:
                return dy1
        return prune24(dy1)

    def sparse_weight(self, name: str, dtype: torch.dtype, w: Tensor | None = None) -> Tensor:
        """The weight product `name` reads (w1, w2, w2_t or w1_t): 2:4 by `SparsityConfig.source`.

        Not transposed: w2_t is [F, D] pruned along D, w1_t is [D, F] pruned along F. `w` stands in for
        the module's own weight.
        """
        source = self.config.source(name)
        index = ("w1", "w2", "w2_t", "w1_t").index(source or name)
        own, dim = self._oriented()[index]
        w = (own if w is None else w).detach()
        if source:
            scale = self.beta(index) if self.config.weight_scale else None
            w = soft_threshold24(w, dim, scale) if self.config.weight_method == "soft" else prune24(w, dim)
        return w.to(dtype)

    def _oriented(self) -> list[tuple[Tensor, int]]:
        """(weight, axis of its groups of four) for w1, w2, w2_t, w1_t: the axis the product sums over."""
        return [(self.w1, 0), (self.w2, 0), (self.w2, 1), (self.w1, 1)]

    def _note(self, y2: Tensor, kept: Tensor, experts: Tensor | None) -> None:
        self._last = {"y2": y2.detach(), "kept": kept.detach(), "experts": experts}


class _SparseProducts(torch.autograd.Function):
    """Algorithms 1 and 2: the six products with the configured operand of each one sparse."""

    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, w2: Tensor, score: Tensor | None, ffn: SparseFFN) -> Tensor:
        relu_y1 = F.relu(x @ ffn.sparse_weight("w1", x.dtype))  # product 1
        y2 = relu_y1.square()
        if ffn.config.activation == "dense":
            kept, mask = y2, None
        else:
            kept, mask = ffn.activation_mask(x, y2)
        if ffn.collect:
            ffn._note(y2, kept, ffn._last.get("experts"))
        # The weights are saved so that backward reads forward's, and autograd notices a change in place.
        ctx.save_for_backward(x, relu_y1, kept, mask, score, w1, w2)
        ctx.ffn = ffn
        return kept @ ffn.sparse_weight("w2", x.dtype)  # product 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy3: Tensor) -> tuple[Tensor | None, ...]:
        x, relu_y1, kept, mask, score, w1, w2 = ctx.saved_tensors
        ffn, c = ctx.ffn, ctx.ffn.config
        dy3 = dy3.to(x.dtype)
        dy2 = dy3 @ ffn.sparse_weight("w2_t", x.dtype, w2).T  # product 3
        reduce_tokens = _token_reduction(kept, c)
        dw2 = reduce_tokens(kept, dy3)  # product 4
        dscore = None if score is None else _score_gradient(relu_y1.square(), mask, dy2, score)
        dy1 = 2 * dy2 * relu_y1
        if mask is not None:
            dy1 = dy1.masked_fill(~mask, 0) if c.mask_reuse else ffn.own_gradient_mask(dy1)
        dx = dy1 @ ffn.sparse_weight("w1_t", x.dtype, w1).T  # product 5
        dw1 = reduce_tokens(dy1, x).T  # product 6
        return dx, dw1.to(w1.dtype), dw2.to(w2.dtype), dscore, None


def _with_score(y3: Tensor, score: Tensor) -> Tensor:
    """y3, bit for bit, with a gradient of zero to the scores where processes train together.

    The dense phase does not read them, and DistributedDataParallel waits for every gradient. Elsewhere they
    have none, by which an optimiser leaves them, and the steps it counts for them, alone.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return y3 - score[:0].sum().to(y3.dtype) if together else y3


def _score_gradient(y2: Tensor, mask: Tensor, dy2: Tensor, score: Tensor) -> Tensor:
    """Straight-through gradient [F] of the learned scores.

    The hard 2-of-4 mask is treated as 2 p, p_i = c_i / sum_j c_j over the group, c = y2 exp(score): the
    inclusion probability of drawing two in proportion to the criterion. dL/dmask is dy2 y2. Where a
    group's mask is all False, its cluster was not chosen, and no score could change that.
    """
    wide, groups = torch.promote_types(y2.dtype, torch.float32), (-1, 4)
    offered = mask.unflatten(-1, groups).any(-1, keepdim=True)
    criterion = (y2.to(wide) * score.exp()).unflatten(-1, groups) * offered
    p = criterion / criterion.sum(-1, keepdim=True).clamp_min(torch.finfo(wide).tiny)
    dmask = (dy2.to(wide) * y2.to(wide)).unflatten(-1, groups)
    return (2 * p * (dmask - (p * dmask).sum(-1, keepdim=True))).flatten(-2).sum(0).to(score.dtype)


def _token_reduction(kept: Tensor, c: SparsityConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The product sparse^T dense over tokens, [T, F], [T, D] -> [F, D], for both weight gradients.

    With wgrad "24" or "mvue" the sparse operand is 2:4 along tokens (2503.16672): tokens are shuffled
    by one fixed permutation, since neighbours in a text resemble each other, and the features with the
    most non-zeros stay dense. With "tile" no feature does, and tiles of 4 tokens x 4 features are pruned to
    two a row and two a column (2404.01847), which one pass over dy1 can do as it is compressed for product 5.
    Tokens past the last whole group of four stay dense.
    """
    if c.wgrad == "dense":
        return lambda sparse, dense: sparse.T @ dense
    tokens, d_ff = kept.shape
    whole = tokens - tokens % 4
    order = torch.arange(whole, device=kept.device)
    if c.wgrad_permute:
        order, _ = token_order(whole, kept.device)
    busiest = (kept != 0).sum(0).argsort(descending=True, stable=True)[: round(c.wgrad_dense_share * d_ff)]
    stays_dense = torch.zeros(d_ff, dtype=torch.bool, device=kept.device)
    stays_dense.index_fill_(0, busiest, True)

    def prune(head: Tensor) -> Tensor:
        if c.wgrad == "tile":
            return torch.where(transposable_mask(head), head, torch.zeros_like(head))
        return torch.where(stays_dense, head, mvue24(head, 0) if c.wgrad == "mvue" else prune24(head, 0))

    def reduce(sparse: Tensor, dense: Tensor) -> Tensor:
        head = prune(sparse[order])
        return head.T @ dense[order] + sparse[whole:].T @ dense[whole:]

    return reduce


@cache  # a CUDA graph reads an order where it lies
def token_order(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The fixed permutation [n] by which weight gradients group tokens, and its inverse."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order.to(device), order.argsort().to(device)
