"""Sparse-left-operand products: products 2 and 5 from the compact activations (figure 4d).

Row r of cluster e multiplies only e's rows of the weight; a token's k partial results are then summed:

    forward     p[r] = y2[r] W2[C_e],      y3[t] = sum_j p[inverse[t, j]]        equation 3
    backward    p[r] = dy1[r] W1[:, C_e]^T, dx[t] = sum_j p[inverse[t, j]]       equation 7

The partial results p [R, D] are stored once and gathered in a second pass, in the order of the token's
choices: the same sum on every run, which atomic additions would not give. Where a row has a factor, for
the scales of FP8 operands, p[r] is multiplied by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate.kernels.backend import on_its_device, tl, triton
from replicate.kernels.venom.common import (
    check_factor,
    check_operands,
    check_shape,
    cluster_width,
    descriptor,
    fit_tile,
    halves,
    programs,
)
from replicate.kernels.venom.token_lists import BlockLists


def venom_down_reference(y: Tensor, w: Tensor, lists: BlockLists, transposed: bool = False) -> Tensor:
    """[T, D] in torch: y2 and W2, or dy1 and W1 if transposed; products of all choices added per token."""
    weights = (w.T if transposed else w).chunk(len(lists.starts), 0)
    out = y.new_zeros(len(lists.inverse), weights[0].shape[1])
    for e, rows, tokens in lists.runs():
        out.index_add_(0, tokens, y[rows] @ weights[e])
    return out


@on_its_device
@triton.jit
def _venom_down_kernel(
    y, w, out, block_cluster, n_blocks, factor, d_model, width,
    BLOCK: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    TRANSPOSED: tl.constexpr, FACTOR: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK, N] of the partial results; a program takes every num_programs-th, columns first."""
    n_cols = tl.cdiv(d_model, N)
    n_tiles = tl.load(n_blocks) * n_cols
    tl.assume(width > 0)  # or ptxas waits for each tensor-core instruction before the next
    # flatten: the next tile's first loads are under way while this one is stored.
    for i in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
        block = i // n_cols
        col = (i % n_cols) * N
        first = tl.load(block_cluster + block) * width
        acc = tl.zeros((BLOCK, N), dtype=tl.float32)
        for k0 in range(0, width, K):
            a = y.load([block * BLOCK, k0])
            if TRANSPOSED:
                b = w.load([col, first + k0]).T
            else:
                b = w.load([first + k0, col])
            if not EVEN:  # a is zero past its width, but the next cluster's weight might not be finite
                b = tl.where((k0 + tl.arange(0, K))[:, None] < width, b, 0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if FACTOR:
            acc *= tl.load(factor + block * BLOCK + tl.arange(0, BLOCK))[:, None]
        # Stored by halves: the smaller staging buffer leaves room for one more pipeline stage.
        left, right = halves(acc)
        out.store([block * BLOCK, col], left.to(out.dtype))
        out.store([block * BLOCK, col + N // 2], right.to(out.dtype))


@on_its_device
@triton.jit
def _gather_sum_kernel(
    parts, inverse, out, n_tokens, d_model, TOP_K: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr
):
    """out[t] = sum of the rows inverse[t, :] of parts, in float32."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    col = tl.program_id(1) * N + tl.arange(0, N)
    inside = col[None, :] < d_model
    acc = tl.zeros((TOKENS, N), dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(inverse + token * TOP_K + j, mask=token < n_tokens, other=-1).to(tl.int64)
        part = parts + row[:, None] * d_model + col[None, :]
        acc += tl.load(part, mask=(row >= 0)[:, None] & inside, other=0.0).to(tl.float32)
    where = out + token.to(tl.int64)[:, None] * d_model + col[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=(token < n_tokens)[:, None] & inside)


def venom_down(
    y: Tensor, w: Tensor, lists: BlockLists, *, transposed: bool = False, factor: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Product of the compact activations with the weight's selected clusters, summed per token.

    Args:
        y: [R, F / n], y2 or dy1. w: W2 [F, D], or if transposed W1 [D, F] or the transpose of W2, which FP8
            needs; neurons in cluster order. lists: from `token_lists`.
        factor: [R] float32, by which a row's partial result is multiplied.
        dtype: of the result, y's by default.

    Returns:
        y3 or dx, [T, D]; the k partial results are rounded to its dtype before they are added.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    parts = down_parts(y, w, lists, transposed=transposed, factor=factor, dtype=dtype)
    return gather_sum(parts, lists.inverse)


def down_parts(
    y: Tensor, w: Tensor, lists: BlockLists, *, transposed: bool = False, factor: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`venom_down`'s partial results p [R, D] alone; rows past the last used block are not written."""
    check_operands(y=y, w=w)
    d_model, d_ff = w.shape if transposed else w.shape[::-1]
    width = cluster_width(d_ff, len(lists.starts))
    check_shape("y", y, len(lists.tokens), width)
    tile, block = fit_tile(y, d_model, width), lists.block
    out = y.new_empty(len(lists.tokens), d_model, dtype=dtype or y.dtype)
    if out.numel() == 0:
        return out
    check_factor(factor, out)
    weights = descriptor(w, tile.n, tile.k) if transposed else descriptor(w, tile.k, tile.n)
    grid = (programs(y, len(lists.block_cluster) * triton.cdiv(d_model, tile.n)),)
    _venom_down_kernel[grid](
        descriptor(y, block, tile.k), weights, descriptor(out, block, tile.n // 2), lists.block_cluster,
        lists.n_blocks, lists.block_cluster if factor is None else factor, d_model, width, BLOCK=block,
        TRANSPOSED=transposed, FACTOR=factor is not None, EVEN=width % tile.k == 0, **tile.options(y),
    )  # fmt: skip
    return out


def gather_sum(parts: Tensor, inverse: Tensor) -> Tensor:
    """out [T, D] with out[t] = sum_j parts[inverse[t, j]], in float32 and in that order; -1 adds nothing.

    Raises:
        ValueError: parts [R, D] or inverse [T, k] does not fit.
    """
    check_operands(parts=parts)
    if inverse.dim() != 2:
        raise ValueError(f"inverse must be [T, k], got shape {tuple(inverse.shape)}")
    inverse = inverse.contiguous()
    n_tokens, d_model = len(inverse), parts.shape[1]
    out = parts.new_empty(n_tokens, d_model)
    n = min(2048, triton.next_power_of_2(d_model))
    tokens = 2048 // n if parts.is_cuda else 32
    if n_tokens:
        _gather_sum_kernel[(triton.cdiv(n_tokens, tokens), triton.cdiv(d_model, n))](
            parts, inverse, out, n_tokens, d_model, TOP_K=inverse.shape[1], TOKENS=tokens, N=n, num_warps=8
        )
    return out
