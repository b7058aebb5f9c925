"""Sparse-reduction products: products 4 and 6, weight gradients over each cluster's own tokens (figure 4d).

    dW2[C_e]    = sum over rows r of e of y2[r]^T dy3[t(r)]        equation 5
    dW1[:, C_e] = sum over rows r of e of x[t(r)]^T dy1[r]         equation 8

Both are G_e = sum of g[t(r)]^T y[r], [D, W], with g token rows and y compact; dW2 stores it transposed.
A cluster without tokens gets zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate.kernels.backend import on_its_device, tl, triton
from replicate.kernels.venom.common import check_operands, check_shape, descriptor, fit_tile, programs
from replicate.kernels.venom.token_lists import BlockLists


def venom_wgrad_reference(g: Tensor, y: Tensor, lists: BlockLists, transposed: bool = False) -> Tensor:
    """[D, F] in torch, or [F, D] if transposed: dW1 from x and dy1, or dW2 from dy3 and y2."""
    grad = torch.cat([g[tokens].T @ y[rows] for _, rows, tokens in lists.runs()], 1)
    return grad.T.contiguous() if transposed else grad


@on_its_device
@triton.jit
def _venom_wgrad_kernel(
    g, y, tokens, starts, counts, out, d_model, width, stride_d, stride_f, n_clusters,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of a cluster's G_e: M entries of d_model by N neurons, reduced over the cluster's tokens.

    A program takes every num_programs-th tile.
    """
    n_cols = tl.cdiv(width, N)
    n_tiles = n_cols * tl.cdiv(d_model, M)
    row = tl.arange(0, K)
    for i in tl.range(tl.program_id(0), n_clusters * n_tiles, tl.num_programs(0)):
        cluster = i // n_tiles
        tile = i % n_tiles
        col = (tile % n_cols) * N
        d = (tile // n_cols) * M + tl.arange(0, M)
        start = tl.load(starts + cluster)
        end = start + tl.load(counts + cluster)
        acc = tl.zeros((M, N), dtype=tl.float32)
        # A token id is loaded one step before the row it points to, or the pipeline stalls on it.
        token = tl.load(tokens + start + row, mask=start + row < end, other=-1)
        for r0 in range(start, end, K):
            after = r0 + K + row
            next_token = tl.load(tokens + after, mask=after < end, other=-1)
            where = g + token.to(tl.int64)[:, None] * d_model + d[None, :]
            present = (token >= 0)[:, None]
            a = tl.load(where, mask=present if EVEN else present & (d < d_model)[None, :], other=0.0)
            acc = tl.dot(a.T, y.load([r0, col]), acc, input_precision=PRECISION)
            token = next_token
        f = cluster * width + col + tl.arange(0, N)
        out_tile = out + d.to(tl.int64)[:, None] * stride_d + f.to(tl.int64)[None, :] * stride_f
        mask = (d < d_model)[:, None] & (col + tl.arange(0, N) < width)[None, :]
        tl.store(out_tile, acc.to(out.dtype.element_ty), mask=mask)


def venom_wgrad(
    g: Tensor, y: Tensor, lists: BlockLists, *, transposed: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """Weight gradient from token rows and compact activations.

    Args:
        g: [T, D], x or dy3. y: [R, F / n], dy1 or y2. lists: from `token_lists`.
        transposed: False for dW1 [D, F], True for dW2 [F, D].
        dtype: of the gradient, g's by default; the sums are float32, which a float32 gradient keeps.

    Returns:
        The gradient, every entry written.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    check_operands(g=g, y=y)
    n, d_model, width = len(lists.starts), g.shape[1], y.shape[1]
    check_shape("y", y, len(lists.tokens), width)
    shape = (n * width, d_model) if transposed else (d_model, n * width)
    out = g.new_empty(shape, dtype=dtype or g.dtype)
    if y.numel() == 0:
        return out.zero_()
    tile = fit_tile(g, width, lists.block)
    m = min(128 if g.dtype.itemsize == 2 else 64, max(16, triton.next_power_of_2(d_model)))
    stride_f, stride_d = out.stride() if transposed else out.stride()[::-1]
    tiles = n * triton.cdiv(d_model, m) * triton.cdiv(width, tile.n)
    # Persistent programs are faster where a tile's rows are the result's (dW1), slower where it is turned.
    _venom_wgrad_kernel[(tiles if transposed else programs(g, tiles),)](
        g, descriptor(y, tile.k, tile.n), lists.tokens, lists.starts, lists.counts, out, d_model, width,
        stride_d, stride_f, n, M=m, EVEN=d_model % m == 0, **tile.options(g),
    )  # fmt: skip
    return out
