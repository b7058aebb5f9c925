"""The routed squared-ReLU FFN with all six products in the selected blocks only (figure 4d), as one operator.

    y1 = x W1,  y2 = S(relu(y1)^2),  y3 = y2 W2      where token t uses the clusters clusters[t] alone

    product  1 y2 (2 of 4 fused)   venom_up             3 dy1 = 2 dy2 sqrt(y2)   venom_up_backward
             2 y3                  venom_down           5 dx                     venom_down
             4 dW2                 venom_wgrad          6 dW1                    venom_wgrad

Saved for the backward pass: x and the compact y2, [R, F / n]. The choice of clusters carries no gradient.
Registered as custom operators too, which torch.compile keeps whole; CUDA graphs can record both forms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate.kernels.venom.common import check_operands, check_shape, cluster_width
from replicate.kernels.venom.down import venom_down
from replicate.kernels.venom.token_lists import BlockLists, empty_lists, token_lists
from replicate.kernels.venom.up import venom_up, venom_up_backward
from replicate.kernels.venom.wgrad import venom_wgrad
from replicate.router import ordered_cluster_mask
from replicate.sparsity import prune24


def venom_ffn_reference(
    x: Tensor, w1: Tensor, w2: Tensor, clusters: Tensor, n_clusters: int, inner: bool = True
) -> Tensor:
    """y3 [T, D] in torch, differentiable: everything is computed, then masked."""
    chosen = ordered_cluster_mask(clusters, w1.shape[1], n_clusters)
    y2 = torch.where(chosen, (x @ w1).relu().square(), 0.0)
    return (prune24(y2) if inner else y2) @ w2


def block_rows(n_choices: int, n_clusters: int) -> int:
    """Rows of a block: 128, or fewer where the clusters' lists are shorter than that."""
    mean = n_choices // n_clusters
    return 128 if mean >= 128 else 64 if mean >= 64 else 32 if mean >= 32 else 16


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
    block = block or block_rows(clusters.numel(), n_clusters)
    if torch.compiler.is_compiling():
        return _operator(x, w1, w2, clusters, n_clusters, inner, block)[0]
    return VenomFFN.apply(x, w1, w2, (w1, w2), clusters, n_clusters, inner, block)


def forward_products(
    x: Tensor, w1: Tensor, w2: Tensor, clusters: Tensor, n_clusters: int, inner: bool, block: int
) -> tuple[Tensor, Tensor, BlockLists]:
    """Products 1 and 2: y3, y2 and the lists."""
    lists = token_lists(clusters, n_clusters, block)
    y2 = venom_up(x, w1, lists, inner=inner)
    return venom_down(y2, w2, lists), y2, lists


def backward_products(
    dy3: Tensor, x: Tensor, w1: Tensor, w2: Tensor, y2: Tensor, lists: BlockLists, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Products 3 to 6: dx, dW1, dW2, the latter two in `dtype`. dx needs most memory, so it comes first."""
    dy3 = dy3.contiguous()
    dy1 = venom_up_backward(dy3, w2, y2, lists)
    dx = venom_down(dy1, w1, lists, transposed=True)
    dw1 = venom_wgrad(x, dy1, lists, dtype=dtype)
    return dx, dw1, venom_wgrad(dy3, y2, lists, transposed=True, dtype=dtype)


class VenomFFN(torch.autograd.Function):
    """Without torch.compile: the same without the operator's 0.2 ms of dispatch.

    The products read `weights`, W1 and W2 in x's dtype; gradients come out in the dtype of w1 and w2.
    """

    @staticmethod
    def forward(ctx, x, w1, w2, weights, clusters, n_clusters, inner, block):
        y3, y2, lists = forward_products(x, *weights, clusters, n_clusters, inner, block)
        ctx.save_for_backward(x, w1, w2, y2, *lists)
        ctx.weights = weights
        return y3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy3):
        x, w1, _, y2, *lists = ctx.saved_tensors
        grads = backward_products(dy3.to(x.dtype), x, *ctx.weights, y2, BlockLists(*lists), w1.dtype)
        return *grads, None, None, None, None, None


@torch.library.custom_op("replicate::venom_ffn", mutates_args=())
def _operator(
    x: Tensor, w1: Tensor, w2: Tensor, clusters: Tensor, n_clusters: int, inner: bool, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y3, y2 and the six parts of BlockLists."""
    y3, y2, lists = forward_products(x, w1, w2, clusters, n_clusters, inner, block)
    return y3, y2, *lists


@_operator.register_fake
def _(x, w1, w2, clusters, n_clusters, inner, block):
    lists = empty_lists(clusters, n_clusters, block)
    return torch.empty_like(x), x.new_empty(len(lists.tokens), w1.shape[1] // n_clusters), *lists


@torch.library.custom_op("replicate::venom_ffn_backward", mutates_args=())
def _backward_operator(
    dy3: Tensor, x: Tensor, w1: Tensor, w2: Tensor, y2: Tensor, lists: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dW1, dW2."""
    return backward_products(dy3, x, w1, w2, y2, BlockLists(*lists), x.dtype)


_backward_operator.register_fake(lambda dy3, x, w1, w2, y2, lists: tuple(map(torch.empty_like, (x, w1, w2))))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy3, *_):
    x, w1, w2, y2, *lists = ctx.saved_tensors
    return *_backward_operator(dy3, x, w1, w2, y2, lists), None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)
