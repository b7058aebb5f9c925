"""Which clusters a token uses, by its router's scores, before product 1 (algorithm 3, step 2).

    scores[t, e] = x[t] . means[e]
    clusters[t] = the k largest, best first, ties to the lower id

Scores are float32. A token's choice reads that token alone, so it is causal.
"""

from __future__ import annotations

from torch import Tensor

from replicate.kernels.backend import check, on_its_device, tl, triton
from replicate.kernels.venom.common import check_operands, dot_precision, empty_clusters, store_top_k


def route_topk_reference(x: Tensor, means: Tensor, top_k: int) -> Tensor:
    """[T, k] int32 in torch."""
    scores = x.float() @ means.float().T
    return scores.argsort(dim=1, descending=True, stable=True)[:, :top_k].int()


@on_its_device
@triton.jit
def _route_topk_kernel(
    x, means, clusters, n_tokens, d_model, n_clusters,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, CLUSTERS: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, CLUSTERS)
    k = tl.arange(0, K)
    x_rows = x + token.to(tl.int64)[:, None] * d_model + k[None, :]
    mean_cols = means + e[None, :] * d_model + k[:, None]
    scores = tl.zeros((TOKENS, CLUSTERS), dtype=tl.float32)
    for k0 in range(0, d_model, K):
        inside = k0 + k < d_model
        a = tl.load(x_rows + k0, mask=(token < n_tokens)[:, None] & inside[None, :], other=0.0)
        b = tl.load(mean_cols + k0, mask=(e < n_clusters)[None, :] & inside[:, None], other=0.0)
        scores = tl.dot(a, b, scores, input_precision=PRECISION)
    store_top_k(scores, clusters, token, n_tokens, n_clusters, TOP_K, CLUSTERS)


def route_topk(x: Tensor, means: Tensor, top_k: int) -> Tensor:
    """Each token's top-k clusters by dot product.

    Args:
        x: [T, D]. means: [n, D] in x's dtype. top_k: 1 to n.

    Returns:
        [T, k] int32 cluster ids, best first. NaN scores count as largest.

    Raises:
        ValueError: shapes, dtypes or top_k do not fit.
    """
    check_operands(x=x, means=means)
    n, d_model = means.shape
    check(x.shape[1] == d_model, f"x {tuple(x.shape)} and means {tuple(means.shape)} differ in d_model")
    clusters = empty_clusters(x, n, top_k)
    if len(x):
        _route_topk_kernel[(triton.cdiv(len(x), 64),)](
            x, means, clusters, len(x), d_model, n, TOP_K=top_k, TOKENS=64,
            CLUSTERS=max(16, triton.next_power_of_2(n)), K=128 if x.dtype.itemsize == 2 else 32,
            PRECISION=dot_precision(x.dtype), num_warps=4, num_stages=4,
        )  # fmt: skip
    return clusters
