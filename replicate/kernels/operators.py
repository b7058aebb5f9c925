"""The sparse FFN as operators of PyTorch: forward, backward, and the weights as products read them.

    replicate::sparse_ffn            y3 and what the backward pass needs
    replicate::sparse_ffn_backward   dx, dW1, dW2, and the gradient of gates
    replicate::sparse_ffn_operands   every form of the weights, for several passes over the same ones

They have fake implementations and a derivative, so that torch.compile, torch.export, CUDA graphs and
activation checkpointing take a layer whole. Three families by what is sparse:

    two_four    activation "dense" or "24": products 1 to 6 over all neurons, some operands 2:4
    routed      W1 or W2^T 2:4, or clusters by activations: y1 in full, the other products in Venom's blocks
    venom       figure 4d: all six products in the selected blocks, of dense weights or in FP8, gated or not

Saved for the backward pass: x, and relu(y1), the compressed y2 or the compact y2 with its lists and factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from replicate.ablations import token_order
from replicate.kernels.backend import check
from replicate.kernels.execution import Execution
from replicate.kernels.operands import Operands
from replicate.kernels.two_four.compressed24 import Compressed24, empty_outputs, unpack24
from replicate.kernels.two_four.matmul24 import matmul24
from replicate.kernels.two_four.relu2_prune24 import relu2_prune24, relu2_prune24_backward
from replicate.kernels.two_four.tile_prune24 import tile_prune24
from replicate.kernels.two_four.wgrad24 import column_blocks, product_into, weight_gradient24
from replicate.kernels.venom import products
from replicate.kernels.venom.gates import gate_factors, gate_gradient
from replicate.kernels.venom.route_active import route_active
from replicate.kernels.venom.route_topk import route_topk
from replicate.kernels.venom.select import venom_select
from replicate.kernels.venom.token_lists import BlockLists, block_rows, empty_lists, token_lists
from replicate.kernels.venom.wgrad import venom_wgrad
from replicate.router import route
from replicate.system.once import once

Gradients = tuple[Tensor, ...]  # dx, dW1, dW2, and dg [T, k] where there are gates
_MISFIT = "routing 'learned', and no other, takes clusters and gates; got routing {!r}, clusters={}, gates={}"


def sparse_ffn(
    x: Tensor, w1: Tensor, w2: Tensor, scale: Tensor | None, clusters: Tensor | None, gates: Tensor | None,
    held: Sequence[Tensor], how: str,
) -> Tensor:  # fmt: skip
    """y3 [T, D] of the sparse FFN, differentiable in x, W1, W2 and the gates.

    Args:
        x: [T, D], contiguous. w1: [D, F]. w2: [F, D], in x's dtype or float32, which their gradients get.
        scale: [4], S-STE's scales, or None.
        clusters: [T, k] of each token or [k] of all; None where the tokens choose.
        gates: [T, k] float32, by which each of the clusters counts; of routing "learned" alone.
        held: from `operands`, or empty: then the pass makes them itself.
        how: the text of an `Execution`.

    Raises ValueError for routing "learned" without gates or clusters, or gates of another routing.
    """
    if torch.compiler.is_compiling():
        return _forward(x, w1, w2, scale, clusters, gates, list(held), how)[0]
    return _SparseFFN.apply(x, w1, w2, scale, clusters, gates, how, *held)[0]


def operands(w1: Tensor, w2: Tensor, scale: Tensor | None, dtype: torch.dtype, how: str) -> list[Tensor]:
    """Every form of the weights that the passes of this execution read."""
    return _operands(w1.detach(), w2.detach(), scale, dtype, how)


@torch.library.custom_op("replicate::sparse_ffn", mutates_args=())
def _forward(
    x: Tensor, w1: Tensor, w2: Tensor, scale: Tensor | None, clusters: Tensor | None, gates: Tensor | None,
    held: list[Tensor], how: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """y3, and the saved activations followed by the forms of the weights that are read again."""
    weights = _weights(w1, w2, scale, x.dtype, how, held)
    c = weights.how.config
    told = [t is not None for t in (clusters, gates)]
    check(told[1] == _gated(weights.how) and (told[0] or not told[1]), _MISFIT.format(c.routing, *told))
    if c.activation != "venom":
        y3, saved = _two_four_forward(x, weights)
    elif c.w1 or c.w2_t or c.routing == "activation":
        y3, saved = _routed_forward(x, clusters, weights)
    else:
        y3, saved = _venom_forward(x, clusters, gates, weights)
    return y3, saved if held else [*saved, *weights.all(weights.kept())]


@_forward.register_fake
def _(x, w1, w2, scale, clusters, gates, held, how):
    weights = _weights(w1, w2, scale, x.dtype, how, held)
    saved = _saved(x, w1.shape[1], weights.how)
    return torch.empty_like(x), saved if held else [*saved, *map(weights.empty, weights.kept())]


@torch.library.custom_op("replicate::sparse_ffn_backward", mutates_args=())
def _backward(
    dy3: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: Tensor | None, saved: list[Tensor],
    held: list[Tensor], how: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx in x's dtype, dW1 and dW2 in that of the weights, and of gates float32; empty without gates."""
    weights = _weights(w1, w2, scale, x.dtype, how, held)
    if not held and (kept := weights.kept()):
        saved, again = saved[: -len(kept)], saved[-len(kept) :]
        weights.made.update(zip(kept, again, strict=True))
    c, dy3 = weights.how.config, dy3.to(x.dtype).contiguous()
    if c.activation == "dense":
        found = _dense_backward(dy3, x, *saved, weights)
    elif c.activation == "24":
        found = _two_four_backward(dy3, x, saved, weights)
    else:
        found = _venom_backward(dy3, x, saved, weights)
    return found if _gated(weights.how) else (*found, _gate_slopes(x, weights.how))


@_backward.register_fake
def _(dy3, x, w1, w2, scale, saved, held, how):
    dgates = _gate_slopes(x, Execution.parse(how))
    return torch.empty_like(x), torch.empty_like(w1), torch.empty_like(w2), dgates


@torch.library.custom_op("replicate::sparse_ffn_operands", mutates_args=())
def _operands(w1: Tensor, w2: Tensor, scale: Tensor | None, dtype: torch.dtype, how: str) -> list[Tensor]:
    weights = _weights(w1, w2, scale, dtype, how)
    return weights.all(weights.forms())


@_operands.register_fake
def _(w1, w2, scale, dtype, how):
    weights = _weights(w1, w2, scale, dtype, how)
    return [weights.empty(key) for key in weights.forms()]


class _SparseFFN(torch.autograd.Function):
    """The operators for PyTorch outside of compiled code: half the overhead, and torch.func."""

    @staticmethod
    def forward(x, w1, w2, scale, clusters, gates, how, *held):
        y3, saved = _forward(x, w1, w2, scale, clusters, gates, list(held), how)
        return y3, *saved

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w1, w2, scale, clusters, gates, how, *held = inputs
        _setup_context(ctx, (x, w1, w2, scale, clusters, gates, held, how), (output[0], output[1:]))

    @staticmethod
    def backward(ctx, dy3, *_):
        return *_gradients(ctx, dy3), None, *[None] * ctx.n_held


def _setup_context(ctx, inputs, output):
    x, w1, w2, scale, _, _, held, ctx.how = inputs
    saved, ctx.n_held = output[1], len(held)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w1, w2, scale, *held, *saved)


def _gradients(ctx, dy3):
    """Of x, W1, W2, scale, clusters and gates."""
    if dy3 is None:
        return [None] * 6
    x, w1, w2, scale, *rest = ctx.saved_tensors
    *found, dgates = once(_backward, dy3, x, w1, w2, scale, rest[ctx.n_held :], rest[: ctx.n_held], ctx.how)
    return *found, None, None, dgates if _gated(Execution.parse(ctx.how)) else None


_forward.register_autograd(
    lambda ctx, dy3, _: (*_gradients(ctx, dy3), [None] * ctx.n_held, None), setup_context=_setup_context
)


def _gated(how: Execution) -> bool:
    return how.config.routing == "learned"


def _gate_slopes(x: Tensor, how: Execution) -> Tensor:
    """Uninitialised gradient of the gates of x [T, D]; empty if there are none."""
    shape = (x.shape[0], how.config.top_k) if _gated(how) else (0,)
    return x.new_empty(shape, dtype=torch.float32)


def _weights(
    w1: Tensor, w2: Tensor, scale: Tensor | None, dtype: torch.dtype, how: str, held: Sequence[Tensor] = ()
) -> Operands:
    weights = Operands(w1, w2, scale, dtype, Execution.parse(how))
    if held:
        weights.made.update(zip(weights.forms(), held, strict=True))
    return weights


def _saved(x: Tensor, d_ff: int, how: Execution) -> list[Tensor]:
    """Uninitialised activations that the backward pass needs of x [T, D]."""
    c, n_tokens = how.config, x.shape[0]  # not len(x), which makes a variable number of tokens a constant
    if c.activation == "dense":
        return [x.new_empty(n_tokens, d_ff)]
    if c.activation == "24":
        buffer, dense = empty_outputs(x.new_empty(n_tokens, d_ff), True, True)
        return [buffer, dense] if how.keeps_dense else [buffer]
    choices = x.new_empty((n_tokens, c.top_k), dtype=torch.int32)
    lists = empty_lists(choices, c.n_clusters, _block(choices, how))
    rows = lists.tokens.shape[0]
    factors = [x.new_empty(rows, dtype=torch.float32)] if _gated(how) else []
    return [x.new_empty(rows, d_ff // c.n_clusters), *lists, *factors]


def _two_four_forward(x: Tensor, weights: Operands) -> tuple[Tensor, list[Tensor]]:
    """2:4 weights with dense activations, or 2:4 activations: products 2 and 5 then read y2 and dy1."""
    how, order = weights.how, _order(x, weights.how)
    y1 = weights.times(x if order is None else x[order[0]], "w1")
    if how.config.activation == "dense":
        relu_y1 = y1.relu_()
        return weights.times(relu_y1.square(), "w2"), [relu_y1]
    if how.config.selection == "tile":
        y2, _ = tile_prune24(y1.relu_().square_(), along_rows=False, backend=how.backend)
        del y1
        y2 = y2.with_dense(unpack24(y2, backend=how.backend)) if how.keeps_dense else y2
    else:
        y2 = relu2_prune24(y1, dense=how.keeps_dense, backend=how.backend)
        del y1
    y3 = _times24(y2, weights.dense("w2"), "y2", how)
    saved = [y2.buffer, y2.dense] if how.keeps_dense else [y2.buffer]
    return y3 if order is None else y3[order[1]], saved


def _dense_backward(dy3: Tensor, x: Tensor, relu_y1: Tensor, weights: Operands) -> Gradients:
    w1, w2 = weights.weights.values()
    dw2 = product_into(torch.empty_like(w2), relu_y1.square().t(), dy3)
    dy1 = weights.times(dy3, "w2_t").mul_(relu_y1).mul_(2)
    return weights.times(dy1, "w1_t"), product_into(torch.empty_like(w1), x.t(), dy1), dw2


def _two_four_backward(dy3: Tensor, x: Tensor, saved: list[Tensor], weights: Operands) -> Gradients:
    """Of y2, dy2 and dy1 at most one is there in full at a time: that is what the peak consists of."""
    how, order = weights.how, _order(x, weights.how)
    w1, w2 = weights.weights.values()
    if order is not None:
        x, dy3 = x[order[0]], dy3[order[0]]
    y2 = Compressed24(saved[0], len(x), w1.shape[1], how.layout, saved[1] if how.keeps_dense else None)
    sparse, dy2 = "dy1" in how.sparse, weights.times(dy3, "w2_t")
    form = "compressed" if sparse else "dense"
    dy1 = relu2_prune24_backward(dy2, y2, form=form, overwrite=not sparse, backend=how.backend)
    del dy2
    dx = _times24(dy1, weights.dense("w1_t").t(), "dy1", how)
    dw1 = _over_tokens(dy1, x, how, w1)
    del dy1
    dw2 = _over_tokens(y2, dy3, how, w2, transpose=False)
    return dx if order is None else dx[order[1]], dw1, dw2


def _order(x: Tensor, how: Execution) -> tuple[Tensor, Tensor] | None:
    """The order of tokens that tiles want, and back; the whole layer runs in it."""
    c = how.config
    return token_order(len(x), x.device) if c.wgrad == "tile" and c.wgrad_permute else None


def _times24(y: Compressed24 | Tensor, w: Tensor, name: str, how: Execution) -> Tensor:
    """Product 2 or 5 of a 2:4 activation, on sparse tensor cores or dense."""
    if name in how.sparse:
        return matmul24(y, w, backend=how.backend)
    return (y.dense if isinstance(y, Compressed24) else y) @ w


def _over_tokens(
    sparse: Compressed24 | Tensor, dense: Tensor, how: Execution, like: Tensor, transpose: bool = True
) -> Tensor:
    """sparse^T dense [F, D] over tokens, or its transpose, in the dtype of `like`.

    It is 2:4 along tokens if so configured: tiles of 4 x 4 are pruned, in a few blocks of columns.
    """
    if how.config.wgrad == "dense" and isinstance(sparse, Compressed24):
        return weight_gradient24(sparse, dense, transpose=transpose, dtype=like.dtype, backend=how.backend)
    out = torch.empty_like(like)
    if how.config.wgrad == "dense":
        return product_into(out, *((dense.t(), sparse) if transpose else (sparse.t(), dense)))
    for columns in column_blocks(sparse.shape[1], 2):
        whole = isinstance(sparse, Tensor)
        block = sparse[:, columns].contiguous() if whole else unpack24(sparse, columns, backend=how.backend)
        _, turned = tile_prune24(block, along_columns=False, backend=how.backend)
        del block
        product = matmul24(turned, dense, transpose=transpose, backend=how.backend)
        out[:, columns].copy_(product) if transpose else out[columns].copy_(product)
        del turned, product  # their memory is the next block's
    return out


def _routed_forward(x: Tensor, clusters: Tensor | None, weights: Operands) -> tuple[Tensor, list[Tensor]]:
    """Algorithm 1: y1 in full, then Venom's blocks of it. By activations, y1 says which clusters are used."""
    c = weights.how.config
    y1 = weights.times(x, "w1")
    if c.routing == "activation":
        clusters = route_active(y1, c.n_clusters, c.top_k)
    lists = _lists(x, clusters, weights)
    y2 = venom_select(y1, lists, inner=c.inner)
    del y1
    return products.down(y2, weights, "w2", lists), [y2, *lists]


def _venom_forward(
    x: Tensor, clusters: Tensor | None, gates: Tensor | None, weights: Operands
) -> tuple[Tensor, list[Tensor]]:
    """Figure 4d: products 1 and 2 in the selected blocks, y2 times the gates if there are any."""
    lists = _lists(x, clusters, weights)
    factor = None if gates is None else gate_factors(gates, lists)
    y2 = products.up(x, weights, lists, factor)
    saved = [y2, *lists] if factor is None else [y2, *lists, factor]
    return products.down(y2, weights, "w2", lists), saved


def _venom_backward(dy3: Tensor, x: Tensor, saved: list[Tensor], weights: Operands) -> Gradients:
    """Products 3 to 6 and the gates' gradient; dx needs most memory: it comes before the weight gradients."""
    y2, *runs, factor = saved if _gated(weights.how) else (*saved, None)
    lists = BlockLists(*runs)
    w1, w2 = weights.weights.values()
    if weights.how.config.w2_t:
        dy1 = venom_select(weights.times(dy3, "w2_t"), lists, y2)
    else:  # the forward's mask says which blocks of dy2 are needed
        dy1 = products.up_backward(dy3, weights, y2, lists, factor)
    dgates = [] if factor is None else [gate_gradient(dy1, y2, factor, lists)]
    dx = products.down(dy1, weights, "w1_t", lists)
    dw1 = venom_wgrad(x, dy1, lists, dtype=w1.dtype)
    return dx, dw1, venom_wgrad(dy3, y2, lists, transposed=True, dtype=w2.dtype), *dgates


def _lists(x: Tensor, clusters: Tensor | None, weights: Operands) -> BlockLists:
    """Each cluster's tokens; clusters [T, k] or [k] are given, or the tokens choose by the router."""
    c = weights.how.config
    if clusters is None and c.metric == "dot":
        clusters = route_topk(x, weights.means(), c.top_k)
    elif clusters is None:
        clusters = route(x, weights.means(), c.top_k, metric=c.metric)
    clusters = clusters.expand(len(x), -1).contiguous()
    return token_lists(clusters, c.n_clusters, _block(clusters, weights.how))


def _block(clusters: Tensor, how: Execution) -> int:
    return how.block or block_rows(clusters.numel(), how.config.n_clusters)
