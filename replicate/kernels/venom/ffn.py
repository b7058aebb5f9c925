"""The routed squared-ReLU FFN with all six products in the selected blocks only (figure 4d), as one.

    y1 = x W1,  y2 = S(relu(y1)^2),  y3 = y2 W2      where token t uses the clusters clusters[t] alone

    product  1 y2 (2 of 4 fused)   venom_up             3 dy1 = 2 dy2 sqrt(y2)   venom_up_backward
             2 y3                  venom_down           5 dx                     venom_down
             4 dW2                 venom_wgrad          6 dW1                    venom_wgrad

The choice of clusters carries no gradient. The operator is `kernels.operators.sparse_ffn`, which chooses no
clusters here.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from replicate.config import SparsityConfig
from replicate.kernels.execution import Execution
from replicate.kernels.operators import sparse_ffn
from replicate.kernels.venom.common import check_operands, check_shape, cluster_width
from replicate.router import ordered_cluster_mask
from replicate.sparsity import prune24
from replicate.system.tracing import constant


def venom_ffn_reference(
    x: Tensor, w1: Tensor, w2: Tensor, clusters: Tensor, n_clusters: int, inner: bool = True
) -> Tensor:
    """y3 [T, D] in torch, differentiable: everything is computed, then masked."""
    chosen = ordered_cluster_mask(clusters, w1.shape[1], n_clusters)
    y2 = torch.where(chosen, (x @ w1).relu().square(), 0.0)
    return (prune24(y2) if inner else y2) @ w2


def venom_ffn(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    clusters: Tensor,
    n_clusters: int,
    *,
    inner: bool = True,
    block: int = 0,
) -> Tensor:
    """Squared-ReLU FFN in which each token uses only the neurons of its own clusters.

    Args:
        x: [T, D]. w1: [D, F] and w2: [F, D], neurons in cluster order, in x's dtype.
        clusters: [T, k] int32 or int64, distinct ids of each token's clusters.
        n_clusters: n equal clusters of F / n neurons.
        inner: also keep 2 of each 4 adjacent neurons. block: rows of a block; 0 chooses.

    Returns:
        y3 [T, D], differentiable in x, w1 and w2.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    check_operands(x=x, w1=w1, w2=w2)
    (n_tokens, d_model), d_ff = x.shape, w1.shape[1]
    check_shape("w1", w1, d_model, d_ff)
    check_shape("w2", w2, d_ff, d_model)
    if clusters.dim() != 2 or len(clusters) != n_tokens:
        raise ValueError(f"clusters must be [{n_tokens}, k], got shape {tuple(clusters.shape)}")
    cluster_width(d_ff, n_clusters)
    return sparse_ffn(x, w1, w2, None, clusters, None, [], _how(n_clusters, clusters.shape[1], inner, block))


@constant
def _how(n_clusters: int, top_k: int, inner: bool, block: int) -> str:
    config = SparsityConfig(activation="venom", n_clusters=n_clusters, top_k=top_k, inner=inner)
    return Execution(json.dumps(vars(config)), block=block).text
