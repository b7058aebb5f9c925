"""A few tokens' activations times W2 by neuron: product 2 from the chosen clusters, in two stages.

    p[i, t] = sum_{f in part i} S(y2[t, f]) W2[f]        of a part of the neurons of one cluster
    y3[t]   = sum_i p[i, t]                              in the order of i: the same sum on every run

A cluster's rows are divided into parts, and their columns into blocks, until one token fills the GPU. S keeps
two of each four adjacent neurons (ties to the lower) if so configured: a row that S makes superfluous for one
token is read all the same, as another token's, or another column's program, needs its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate.kernels.backend import check, on_its_device, tl, triton
from replicate.kernels.decode.route import Choice, chosen_reference, slot_of
from replicate.kernels.decode.rows import Rows, load_rows, rows_reference
from replicate.kernels.decode.up import check_decode, of_clusters, pick, slot_options
from replicate.kernels.venom.common import Tile, dot_precision, prune24_by_22_bits
from replicate.sparsity import prune24

# Tuning: columns (n) and rows (k) of a program's tile by tokens as in `up`; for 16 bits.
ONE, FEW, MANY = Tile(128, 32, 4, 4), Tile(128, 64, 4, 3), Tile(128, 64, 4, 4)
PROGRAMS = 256  # about two for each of an H200's 132 multiprocessors, where the shape has so many


def decode_down_reference(y: Tensor, rows: Rows, choice: Choice | None = None, inner: bool = False) -> Tensor:
    """[T, C] in torch; what y has in clusters that a token does not use is not read."""
    if choice is not None:
        use = chosen_reference(choice)[..., None]
        groups = y.unflatten(1, (use.shape[1], -1))
        y = groups.where(use, groups.new_zeros(())).flatten(1)
    return (prune24(y) if inner else y) @ rows_reference(rows)


@on_its_device
@triton.jit
def _decode_down_kernel(
    y, values, positions, scores, parts, n_tokens, n_rows, n_cols, width, n_clusters, stride, length,
    TOKENS: tl.constexpr, TOP_K: tl.constexpr, CLUSTERS: tl.constexpr, BY_CHOICE: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, TWO_FOUR: tl.constexpr, INNER: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """N columns of the result of `length` neurons of the cluster of a slot; zeros for tokens without."""
    token = tl.arange(0, TOKENS)
    part = tl.program_id(1)
    cluster, use = slot_of(
        scores, part // PARTS, token, n_tokens, n_clusters, stride, TOP_K, CLUSTERS, BY_CHOICE
    )
    col = tl.program_id(0) * N
    begin = part % PARTS * length
    end = tl.where(tl.max(use.to(tl.int32), axis=0) > 0, tl.minimum(begin + length, width), begin)
    if TOKENS == 1:
        sums = tl.zeros((K, N), dtype=tl.float32)
    else:
        turned = tl.zeros((N, TOKENS), dtype=tl.float32)  # as in `up`
    for f0 in tl.range(begin, end, K, num_stages=STAGES):
        own = f0 + tl.arange(0, K)
        row = cluster * width + own
        at = y + token.to(tl.int64)[:, None] * n_rows + row[None, :]
        a = tl.load(at, mask=use[:, None] & (own < end)[None, :], other=0.0)
        if INNER:
            a = prune24_by_22_bits(a.to(tl.float32)).to(a.dtype)
        w = load_rows(values, positions, row, own < end, col, n_cols, N, TWO_FOUR)
        if TOKENS == 1:
            sums += tl.sum(a, axis=0).to(tl.float32)[:, None] * w.to(tl.float32)
        else:
            turned = tl.dot(tl.trans(w), tl.trans(a), turned, input_precision=PRECISION)
    acc = tl.sum(sums, axis=0)[None, :] if TOKENS == 1 else tl.trans(turned)
    c = col + tl.arange(0, N)
    at = parts + (part * n_tokens + token).to(tl.int64)[:, None] * n_cols + c[None, :]
    mask = (token < n_tokens)[:, None] & (c < n_cols)[None, :]
    tl.store(at, tl.where(use[:, None], acc, 0.0), mask=mask)


@on_its_device
@triton.jit
def _sum_parts_kernel(parts, out, size, n_parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, PARTS)
    mask = (i < n_parts)[:, None] & (at < size)[None, :]
    found = tl.load(parts + i.to(tl.int64)[:, None] * size + at[None, :], mask=mask, other=0.0)
    tl.store(out + at, tl.sum(found, axis=0).to(out.dtype.element_ty), mask=at < size)


def decode_down(y: Tensor, rows: Rows, choice: Choice | None = None, *, inner: bool = False) -> Tensor:
    """Activations y [T, R] times the rows [R, C] of W2, over the clusters that each token uses.

    Args:
        y: [T, R] >= 0, T at most `up.MOST_TOKENS`; not read in clusters that a token does not use.
        rows: R neurons in cluster order, in y's dtype. choice: of clusters; None takes all neurons.
        inner: keep two of each four adjacent neurons of a token.

    Returns:
        [T, C] in y's dtype.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    n_rows, n_cols = check_decode(y, rows, choice)
    check(y.shape[1] == n_rows, f"y {tuple(y.shape)} does not fit {n_rows} rows")
    check(
        not inner or n_rows // of_clusters(choice) % 4 == 0, "clusters of whole groups of four neurons only"
    )
    tile, width, slots = pick(y, ONE, FEW, MANY), n_rows // of_clusters(choice), choice.slots if choice else 1
    columns = triton.cdiv(n_cols, tile.n)
    n_parts = max(1, min(triton.cdiv(PROGRAMS, columns * slots), triton.cdiv(width, tile.k)))
    length = triton.cdiv(triton.cdiv(width, n_parts), tile.k) * tile.k
    n_parts = triton.cdiv(width, length)
    parts = y.new_empty((n_parts * slots, len(y), n_cols), dtype=torch.float32)
    _decode_down_kernel[(columns, n_parts * slots)](
        y, rows.values, y if rows.positions is None else rows.positions, choice.scores if choice else y,
        parts, len(y), n_rows, n_cols, width, of_clusters(choice), choice.scores.stride(0) if choice else 0,
        length, N=tile.n, K=tile.k, PARTS=n_parts, TWO_FOUR=rows.two_of_four, INNER=inner,
        PRECISION=dot_precision(y.dtype), STAGES=tile.stages, num_warps=tile.warps, **slot_options(y, choice),
    )  # fmt: skip
    out = y.new_empty(len(y), n_cols)
    padded, block = triton.next_power_of_2(len(parts)), 256 if len(parts) <= 16 else 64
    _sum_parts_kernel[(triton.cdiv(out.numel(), block),)](
        parts, out, out.numel(), len(parts), PARTS=padded, BLOCK=block, num_warps=4
    )
    return out
