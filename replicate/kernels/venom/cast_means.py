"""ExpertMeans, and what the products need of the stored W1, from one read of it.

    means[e] = mean over columns f of cluster e of W1[:, f]      algorithm 3, step 1, neurons in cluster order

Routing reads the means of the weights as they are stored. Products read them cast, or in FP8, for which the
largest magnitude must be known first. Two reads of a float32 W1 would be a visible part of the layer's time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate.kernels.backend import check, on_its_device, tl, triton
from replicate.kernels.venom.common import cluster_width, cuda_or_interpreted
from replicate.router import ordered_cluster_means

ROWS, COLUMNS = 4, 1024  # rows of a program, columns that it reads at a time


def cast_means_reference(w1: Tensor, n_clusters: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(W1 [D, F], means [n, D]) in `dtype`."""
    return w1.to(dtype), ordered_cluster_means(w1, n_clusters).to(dtype).contiguous()


@on_its_device
@triton.jit
def _cast_means_kernel(
    w1, out, means, d_model, d_ff, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAST: tl.constexpr
):  # fmt: skip
    """ROWS rows of one cluster's columns; `out` is W1 cast, or the largest magnitude of each program."""
    cluster = tl.program_id(1)
    d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total, largest = tl.zeros((ROWS,), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32)
    for f0 in range(0, width, COLUMNS):
        f = f0 + tl.arange(0, COLUMNS)
        mask = (d < d_model)[:, None] & (f < width)[None, :]
        at = d.to(tl.int64)[:, None] * d_ff + (cluster * width + f)[None, :]
        value = tl.load(w1 + at, mask=mask, other=0.0)
        if CAST:
            tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)
        else:
            size = tl.where(value == value, tl.abs(value.to(tl.float32)), float("inf"))
            largest = tl.maximum(largest, tl.max(size, axis=1))
        total += tl.sum(value.to(tl.float32), axis=1)
    if not CAST:
        tl.store(out + tl.program_id(0) * tl.num_programs(1) + cluster, tl.max(largest, axis=0))
    mean = total / width
    tl.store(means + cluster * d_model + d, mean.to(means.dtype.element_ty), mask=d < d_model)


def cast_means(w1: Tensor, n_clusters: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W1 cast, and the router's means of its columns.

    Args:
        w1: [D, F], contiguous, neurons in cluster order. n_clusters: n. dtype: of both results.

    Returns:
        (W1 [D, F], means [n, D]).

    Raises:
        ValueError: w1 is no contiguous matrix, or F no multiple of 8 n.
    """
    cast = torch.empty_like(w1, dtype=dtype)
    return cast, _launch(w1, n_clusters, dtype, cast)[0]


def means_and_largest(w1: Tensor, n_clusters: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The router's means [n, D] of W1's columns, and the largest |W1|, of no dimension; infinite for a NaN.

    Arguments, dtype of the means and errors are those of `cast_means`; the largest is float32.
    """
    means, largest = _launch(w1, n_clusters, dtype, None)
    return means, largest.amax()


def _launch(w1: Tensor, n_clusters: int, dtype: torch.dtype, cast: Tensor | None) -> tuple[Tensor, Tensor]:
    """The means, and `cast` or the largest magnitudes of the programs."""
    cuda_or_interpreted(w1)
    check(w1.dim() == 2 and w1.is_contiguous(), f"w1 must be a contiguous matrix, got strides {w1.stride()}")
    (d_model, d_ff), width = w1.shape, cluster_width(w1.shape[1], n_clusters)
    columns = min(COLUMNS, triton.next_power_of_2(width))
    rows = min(ROWS * COLUMNS // columns if w1.is_cuda else 4096, triton.next_power_of_2(d_model))
    programs, means = triton.cdiv(d_model, rows), w1.new_empty((n_clusters, d_model), dtype=dtype)
    out = w1.new_empty((programs, n_clusters), dtype=torch.float32) if cast is None else cast
    _cast_means_kernel[(programs, n_clusters)](
        w1, out, means, d_model, d_ff, width, ROWS=rows, COLUMNS=columns, CAST=cast is not None, num_warps=8
    )
    return means, out
