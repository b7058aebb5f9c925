"""Weight gradients from compressed activations, which are unpacked a few columns at a time.

    G = A^T B [F, D], or transposed G^T = B^T A [D, F]

A [T, F] is 2:4 along F and compressed, B [T, D] is dense. dW2 = y2^T dy3 is G (equation 5), and dW1 = x^T dy1
is G^T (equation 8). The sums run over tokens, along which A is not 2:4: these are dense products of an
unpacked A. Columns i of A make rows i of G, or columns i of G^T, so blocks of columns are unpacked and
multiplied in turn, and of n blocks only one, T F / n elements, is in memory beside the compressed A.

There is no kernel of its own: `unpack24` and cuBLAS do the work.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from replicate.kernels import backend as engines
from replicate.kernels.backend import check
from replicate.kernels.two_four.compressed24 import TILE, Compressed24, unpack24


def weight_gradient24_reference(sparse: Compressed24, dense: Tensor, transpose: bool = False) -> Tensor:
    """G [F, D], or G^T [D, F], in float32 throughout."""
    a, b = unpack24(sparse, backend="reference").float(), dense.float()
    return b.t() @ a if transpose else a.t() @ b


def weight_gradient24(
    sparse: Compressed24, dense: Tensor, *, blocks: int = 4, transpose: bool = False,
    dtype: torch.dtype | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """A^T B, or its transpose, with A compressed.

    Args:
        sparse: A [T, F], y2 or dy1. dense: B [T, D] of A's dtype, dy3 or x.
        blocks: of A's columns that are unpacked one after the other; at most one for 64 columns, and one
            if A carries its dense form, of which nothing is unpacked.
        transpose: False for [F, D], as dW2 is; True for [D, F], as dW1 is.
        dtype: of the gradient, B's by default, or float32, which keeps the float32 sums on a GPU.
        backend: see `replicate.kernels.backend`.

    Returns:
        The gradient, contiguous, every entry written.

    Raises:
        ValueError: shapes, dtypes, devices or blocks do not fit.
    """
    (rows, cols), dtype = sparse.shape, dtype or dense.dtype
    check(dense.dim() == 2, f"the dense operand must be a matrix, got shape {tuple(dense.shape)}")
    check(len(dense) == rows, f"A is {rows} x {cols}, B is {tuple(dense.shape)}: they differ in tokens")
    check(dense.dtype == sparse.buffer.dtype, f"A is {sparse.buffer.dtype}, B is {dense.dtype}; cast one")
    check(dense.device == sparse.buffer.device, f"A is on {sparse.buffer.device}, B on {dense.device}")
    check(dtype in (dense.dtype, torch.float32), f"dtype is {dtype}; choose {dense.dtype} or float32")
    check(blocks >= 1, f"blocks is {blocks}; choose 1 or more")
    if engines.select(dense.device, backend, dense.dtype) == "reference":
        return weight_gradient24_reference(sparse, dense, transpose).to(dtype)
    d_model = dense.shape[1]
    out = dense.new_empty((d_model, cols) if transpose else (cols, d_model), dtype=dtype)
    for columns in column_blocks(cols, 1 if sparse.dense is not None else blocks):
        # No name for a block: it would keep the memory until the next block is unpacked.
        if transpose:
            product_into(out[:, columns], dense.t(), unpack24(sparse, columns, backend=backend))
        else:
            product_into(out[columns], unpack24(sparse, columns, backend=backend).t(), dense)
    return out


def column_blocks(cols: int, blocks: int) -> list[slice]:
    """Slices of whole tiles of 64 that cover `cols` columns, about equal; fewer than `blocks` if need be."""
    tiles = cols // TILE
    blocks = min(blocks, tiles)
    edges = [i * tiles // blocks * TILE for i in range(blocks + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def product_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`out` [M, N] with a b of a [M, K] and b [K, N] written into it, in their dtype or in float32.

    On a GPU a float32 result is the products' float32 sums; on a CPU torch rounds them to a's dtype first.
    """
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if out.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a @ b)
