"""Which clusters a token uses, by its own activations, after product 1, from all of y1.

    energy[t, e] = sum_{f in C_e} relu(y1[t, f])^2
    clusters[t] = the k largest, best first, ties to the lower id

Energies are float32. A token's choice reads that token alone, so it is causal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate.kernels.backend import on_its_device, tl, triton
from replicate.kernels.venom.common import check_operands, cluster_width, empty_clusters, store_top_k


def route_active_reference(y1: Tensor, n_clusters: int, top_k: int) -> Tensor:
    """[T, k] int32 in torch."""
    energy = y1.float().relu().square().unflatten(1, (n_clusters, -1)).sum(2)
    return energy.argsort(dim=1, descending=True, stable=True)[:, :top_k].int()


@on_its_device
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


@on_its_device
@triton.jit
def _top_k_kernel(
    energy, clusters, n_tokens, n_clusters,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, CLUSTERS)
    inside = (token < n_tokens)[:, None] & (e < n_clusters)[None, :]
    scores = tl.load(energy + token[:, None] * n_clusters + e[None, :], mask=inside, other=0.0)
    store_top_k(scores, clusters, token, n_tokens, n_clusters, TOP_K, CLUSTERS)


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
    clusters = empty_clusters(y1, n_clusters, top_k)
    if n_tokens == 0:
        return clusters
    energy = torch.empty(n_tokens, n_clusters, dtype=torch.float32, device=y1.device)
    cols = min(512, max(16, triton.next_power_of_2(width)))
    tokens = 8192 // cols
    _energy_kernel[(triton.cdiv(n_tokens, tokens), n_clusters)](
        y1, energy, n_tokens, y1.shape[1], width, n_clusters, TOKENS=tokens, COLS=cols, num_warps=4
    )
    _top_k_kernel[(triton.cdiv(n_tokens, 32),)](
        energy, clusters, n_tokens, n_clusters, TOP_K=top_k, TOKENS=32,
        CLUSTERS=max(16, triton.next_power_of_2(n_clusters)), num_warps=4,
    )  # fmt: skip
    return clusters
