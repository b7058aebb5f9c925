"""Sampled-output products: products 1 and 3 in the selected blocks only (figure 4d), epilogues fused.

For the rows r of cluster e, token t(r), and e's columns C_e = [e W, (e + 1) W), W = F / n:

    forward     y2[r]  = S(relu(x[t(r)] W1[:, C_e])^2)            equations 1, 2 and the inner 2 of 4
    backward    dy1[r] = 2 (dy3[t(r)] W2[C_e]^T) sqrt(y2[r])      equations 4 and 6

S keeps the two largest of each four adjacent neurons (ties to the lower). relu(y1) = sqrt(y2), so y1 is
never stored and dy1 inherits the forward's mask. Output is compact, [R, W]; padding rows are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate.kernels.backend import on_its_device, tl, triton
from replicate.kernels.venom.common import (
    FP8,
    check_factor,
    check_operands,
    check_shape,
    cluster_width,
    descriptor,
    fit_tile,
    halves,
    programs,
    relu2,
)
from replicate.kernels.venom.select import venom_select_reference
from replicate.kernels.venom.token_lists import BlockLists


def venom_up_reference(x: Tensor, w1: Tensor, lists: BlockLists, inner: bool = True) -> Tensor:
    """y2 [R, W] in torch; rows past the last used block are zero."""
    return venom_select_reference(x @ w1, lists, inner=inner)


def venom_up_backward_reference(dy3: Tensor, w2: Tensor, y2: Tensor, lists: BlockLists) -> Tensor:
    """dy1 [R, W] in torch; rows past the last used block are zero."""
    return venom_select_reference(dy3 @ w2.T, lists, y2)


@triton.jit
def _finish(acc, y2, out, token, row, col, BACKWARD: tl.constexpr, INNER: tl.constexpr):
    """Epilogue of a part's columns: activation and mask, or its derivative; zero in padding rows."""
    if BACKWARD:
        acc = 2 * acc * tl.sqrt(y2.load([row, col]).to(tl.float32))
    else:
        acc = relu2(acc, INNER)
    out.store([row, col], tl.where(token[:, None] >= 0, acc, 0.0).to(out.dtype))


@triton.jit
def _finish_halves(acc, y2, out, token, row, col, BACKWARD: tl.constexpr, INNER: tl.constexpr):
    left, right = halves(acc)
    _finish(left, y2, out, token, row, col, BACKWARD, INNER)
    _finish(right, y2, out, token, row, col + acc.shape[1] // 2, BACKWARD, INNER)


@on_its_device
@triton.jit
def _venom_up_kernel(
    x, tokens, block_cluster, n_blocks, w, y2, out, factor, d_model, width,
    BLOCK: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BACKWARD: tl.constexpr, TRANSPOSED: tl.constexpr,
    FACTOR: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK, N] of the compact output; a program takes every num_programs-th, columns first."""
    n_cols = tl.cdiv(width, N)
    n_tiles = tl.load(n_blocks) * n_cols
    tl.assume(d_model > 0)  # or ptxas waits for each tensor-core instruction before the next
    k = tl.arange(0, K)
    # flatten: the next tile's first loads are under way while this one is finished.
    for i in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
        row = (i // n_cols) * BLOCK
        col = (i % n_cols) * N
        first = tl.load(block_cluster + i // n_cols) * width + col
        # Padding rows read token 0 and are cleared at the end, which costs less than masking every load.
        token = tl.maximum(tl.load(tokens + row + tl.arange(0, BLOCK)), 0).to(tl.int64)
        x_rows = x + token[:, None] * d_model + k[None, :]
        acc = tl.zeros((BLOCK, N), dtype=tl.float32)
        for k0 in range(0, d_model, K):
            if EVEN:
                a = tl.load(x_rows + k0)
            else:
                a = tl.load(x_rows + k0, mask=(k0 + k)[None, :] < d_model, other=0.0)
            if TRANSPOSED:
                b = w.load([first, k0]).T
            else:
                b = w.load([k0, first])
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        owner = tl.load(tokens + row + tl.arange(0, BLOCK))
        if FACTOR:
            acc *= tl.load(factor + row + tl.arange(0, BLOCK))[:, None]
        # In parts: small staging buffers leave room for one more pipeline stage.
        if BACKWARD:  # stages y2 as well
            left, right = halves(acc)
            _finish_halves(left, y2, out, owner, row, col, BACKWARD, INNER)
            _finish_halves(right, y2, out, owner, row, col + N // 2, BACKWARD, INNER)
        else:
            _finish_halves(acc, y2, out, owner, row, col, BACKWARD, INNER)


def venom_up(
    x: Tensor, w1: Tensor, lists: BlockLists, *, inner: bool = True, transposed: bool = False,
    factor: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Squared-ReLU activations of each token's own clusters, compact (equations 1 and 2, figure 4d).

    Args:
        x: [T, D]. w1: [D, F] with neurons in cluster order, or its transpose [F, D] if `transposed`, as FP8
            needs it. lists: from `token_lists`.
        inner: also keep 2 of each 4 adjacent neurons.
        factor: [R] float32, by which a row's y1 is multiplied. dtype: of y2, x's by default.

    Returns:
        y2 [R, F / n]; rows past the last used block are not written.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    check_operands(x=x, w1=w1)
    d_model, d_ff = w1.shape[::-1] if transposed else w1.shape
    if x.shape[1] != d_model:
        raise ValueError(f"x {tuple(x.shape)} and w1 {tuple(w1.shape)} differ in d_model")
    width = cluster_width(d_ff, len(lists.starts))
    return _launch(x, w1, None, lists, width, inner, transposed, factor, dtype or x.dtype)


def venom_up_backward(
    dy3: Tensor, w2: Tensor, y2: Tensor, lists: BlockLists, *, factor: Tensor | None = None
) -> Tensor:
    """Gradient before the activation, compact (equations 4 and 6 under the forward's mask).

    Args:
        dy3: [T, D]. w2: [F, D] with neurons in cluster order. y2: [R, F / n] from `venom_up`.
        factor: [R] float32, by which a row's dy2 is multiplied.

    Returns:
        dy1 [R, F / n] in y2's dtype; rows past the last used block are not written.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    check_operands(dy3=dy3, w2=w2, **({} if dy3.dtype == FP8 else {"y2": y2}))
    check_operands(y2=y2)
    if dy3.shape[1] != w2.shape[1]:
        raise ValueError(f"dy3 {tuple(dy3.shape)} and w2 {tuple(w2.shape)} differ in d_model")
    width = cluster_width(w2.shape[0], len(lists.starts))
    check_shape("y2", y2, len(lists.tokens), width)
    return _launch(dy3, w2, y2, lists, width, True, True, factor, y2.dtype)


def _launch(
    x: Tensor, w: Tensor, y2: Tensor | None, lists: BlockLists, width: int, inner: bool, transposed: bool,
    factor: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    tile, block = fit_tile(x, width, x.shape[1]), lists.block
    out = x.new_empty(len(lists.tokens), width, dtype=dtype)
    if out.numel() == 0:
        return out
    check_factor(factor, out)
    backward = y2 is not None
    weights = descriptor(w, tile.n, tile.k) if transposed else descriptor(w, tile.k, tile.n)
    part = tile.n // 4 if backward else tile.n // 2
    grid = (programs(x, len(lists.block_cluster) * triton.cdiv(width, tile.n)),)
    _venom_up_kernel[grid](
        x, lists.tokens, lists.block_cluster, lists.n_blocks, weights,
        descriptor(y2 if backward else out, block, part), descriptor(out, block, part),
        lists.tokens if factor is None else factor, x.shape[1], width, BLOCK=block, BACKWARD=backward,
        TRANSPOSED=transposed, FACTOR=factor is not None, INNER=inner, EVEN=x.shape[1] % tile.k == 0,
        **tile.options(x),
    )  # fmt: skip
    return out
