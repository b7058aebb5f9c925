"""Which clusters a token uses: by its router's scores (algorithm 3, step 2), or by its own activations.

    route_topk      scores[t, e] = x[t] . means[e]                          before product 1
    route_active    scores[t, e] = sum_{f in C_e} relu(y1[t, f])^2          after it, from all of y1

    experts[t] = the k largest, best first, ties to the lower id

Scores are float32. A token's choice reads that token alone, so it is causal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate.kernels.backend import check, tl, triton
from replicate.kernels.venom_common import check_operands, cluster_width, dot_precision


def route_topk_reference(x: Tensor, means: Tensor, top_k: int) -> Tensor:
    """[T, k] int32 in torch."""
    scores = x.float() @ means.float().T
    return scores.argsort(dim=1, descending=True, stable=True)[:, :top_k].int()


def route_active_reference(y1: Tensor, n_clusters: int, top_k: int) -> Tensor:
    """[T, k] int32 in torch."""
    energy = y1.float().relu().square().unflatten(1, (n_clusters, -1)).sum(2)
    return energy.argsort(dim=1, descending=True, stable=True)[:, :top_k].int()


@triton.jit
def _store_top_k(scores, experts, token, n_tokens, n_clusters, TOP_K: tl.constexpr, EXPERTS: tl.constexpr):
    """Write the ids of the TOP_K largest scores [TOKENS, EXPERTS] of each token, best first."""
    e = tl.arange(0, EXPERTS)
    # NaN comes first, as in torch: a neuron gone wrong must be used, and so be seen. Minus infinity still
    # loses only to real scores, never to an expert already taken.
    scores = tl.where(scores != scores, float("inf"), scores)
    scores = tl.where(scores > -3e38, scores, -3e38)
    scores = tl.where((e < n_clusters)[None, :], scores, float("-inf"))
    for j in tl.static_range(TOP_K):
        best = tl.max(scores, axis=1)
        choice = tl.min(tl.where(scores == best[:, None], e[None, :], EXPERTS), axis=1)
        tl.store(experts + token * TOP_K + j, choice, mask=token < n_tokens)
        scores = tl.where(e[None, :] == choice[:, None], float("-inf"), scores)


@triton.jit
def _route_topk_kernel(
    x, means, experts, n_tokens, d_model, n_clusters,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, EXPERTS)
    k = tl.arange(0, K)
    x_rows = x + token.to(tl.int64)[:, None] * d_model + k[None, :]
    mean_cols = means + e[None, :] * d_model + k[:, None]
    scores = tl.zeros((TOKENS, EXPERTS), dtype=tl.float32)
    for k0 in range(0, d_model, K):
        inside = k0 + k < d_model
        a = tl.load(x_rows + k0, mask=(token < n_tokens)[:, None] & inside[None, :], other=0.0)
        b = tl.load(mean_cols + k0, mask=(e < n_clusters)[None, :] & inside[:, None], other=0.0)
        scores = tl.dot(a, b, scores, input_precision=PRECISION)
    _store_top_k(scores, experts, token, n_tokens, n_clusters, TOP_K, EXPERTS)


@triton.jit
def _energy_kernel(
    y1, energy, n_tokens, d_ff, width, n_clusters, TOKENS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """energy [T, n] of TOKENS tokens in one cluster."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    cluster = tl.program_id(1)
    col = tl.arange(0, COLS)
    rows = y1 + token.to(tl.int64)[:, None] * d_ff + cluster * width + col[None, :]
    total = tl.zeros((TOKENS, COLS), dtype=tl.float32)
    for c0 in range(0, width, COLS):
        inside = (token < n_tokens)[:, None] & (c0 + col < width)[None, :]
        value = tl.load(rows + c0, mask=inside, other=0.0).to(tl.float32)
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        total += value * value
    tl.store(energy + token * n_clusters + cluster, tl.sum(total, axis=1), mask=token < n_tokens)


@triton.jit
def _top_k_kernel(
    energy, experts, n_tokens, n_clusters,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, EXPERTS)
    inside = (token < n_tokens)[:, None] & (e < n_clusters)[None, :]
    scores = tl.load(energy + token[:, None] * n_clusters + e[None, :], mask=inside, other=0.0)
    _store_top_k(scores, experts, token, n_tokens, n_clusters, TOP_K, EXPERTS)


def route_topk(x: Tensor, means: Tensor, top_k: int) -> Tensor:
    """Each token's top-k experts by dot product.

    Args:
        x: [T, D]. means: [n, D] in x's dtype. top_k: 1 to n.

    Returns:
        [T, k] int32 expert ids, best first. NaN scores count as largest.

    Raises:
        ValueError: shapes, dtypes or top_k do not fit.
    """
    check_operands(x=x, means=means)
    n, d_model = means.shape
    check(x.shape[1] == d_model, f"x {tuple(x.shape)} and means {tuple(means.shape)} differ in d_model")
    experts = _experts(x, n, top_k)
    if len(x):
        _route_topk_kernel[(triton.cdiv(len(x), 64),)](
            x, means, experts, len(x), d_model, n, TOP_K=top_k, TOKENS=64,
            EXPERTS=max(16, triton.next_power_of_2(n)), K=128 if x.dtype.itemsize == 2 else 32,
            PRECISION=dot_precision(x.dtype), num_warps=4, num_stages=4,
        )  # fmt: skip
    return experts


def route_active(y1: Tensor, n_clusters: int, top_k: int) -> Tensor:
    """Each token's top-k clusters by the sum of its squared-ReLU activations in them.

    Args:
        y1: [T, F] before the activation, neurons in cluster order. n_clusters: n equal clusters.
        top_k: 1 to n.

    Returns:
        [T, k] int32 cluster ids, best first. NaN energies count as largest.

    Raises:
        ValueError: shapes, dtypes or top_k do not fit.
    """
    check_operands(y1=y1)
    width, n_tokens = cluster_width(y1.shape[1], n_clusters), len(y1)
    experts = _experts(y1, n_clusters, top_k)
    if n_tokens == 0:
        return experts
    energy = torch.empty(n_tokens, n_clusters, dtype=torch.float32, device=y1.device)
    cols = min(512, max(16, triton.next_power_of_2(width)))
    tokens = 8192 // cols
    _energy_kernel[(triton.cdiv(n_tokens, tokens), n_clusters)](
        y1, energy, n_tokens, y1.shape[1], width, n_clusters, TOKENS=tokens, COLS=cols, num_warps=4
    )
    _top_k_kernel[(triton.cdiv(n_tokens, 32),)](
        energy, experts, n_tokens, n_clusters, TOP_K=top_k, TOKENS=32,
        EXPERTS=max(16, triton.next_power_of_2(n_clusters)), num_warps=4,
    )  # fmt: skip
    return experts


def _experts(x: Tensor, n_clusters: int, top_k: int) -> Tensor:
    check(1 <= top_k <= n_clusters, f"top_k is {top_k}; choose 1 to the number of experts, {n_clusters}")
    return torch.empty(len(x), top_k, dtype=torch.int32, device=x.device)
