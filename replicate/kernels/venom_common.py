"""What the block-sparse kernels share: checks, tile shapes, descriptors, 2 of 4 in registers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from replicate.kernels.backend import HAVE_TRITON, check, interpreted, tl, triton

if HAVE_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Tile:
    """Output columns n and reduction step k of a program's tile, and its scheduling; rows are a block."""

    n: int = 256
    k: int = 64
    warps: int = 8
    stages: int = 4


def cuda_or_interpreted(*tensors: Tensor) -> None:
    """Raise ValueError unless Triton can run on the tensors, which must share a device."""
    devices = {t.device for t in tensors}
    check(len(devices) == 1, f"tensors are on several devices: {sorted(map(str, devices))}")
    check(HAVE_TRITON, "Triton is not installed; use backend='reference'")
    check(
        tensors[0].is_cuda or interpreted(),
        f"tensors are on {tensors[0].device}; Triton kernels need a CUDA device: use backend='reference'",
    )


def check_operands(**operands: Tensor) -> None:
    """Raise ValueError unless all are contiguous matrices of one dtype, rows a multiple of 8 wide."""
    first = next(iter(operands.values()))
    cuda_or_interpreted(*operands.values())
    for name, t in operands.items():
        check(t.dim() == 2, f"{name} must be a matrix, got shape {tuple(t.shape)}")
        check(t.is_contiguous(), f"{name} must be contiguous, got strides {t.stride()}")
        check(t.dtype == first.dtype and t.dtype in DTYPES, f"{name} is {t.dtype}; use one of {DTYPES}")
        check(t.shape[1] % 8 == 0, f"{name} has {t.shape[1]} columns; kernels need a multiple of 8")
    check(
        not (interpreted() and first.dtype == torch.bfloat16 and not first.is_cuda),
        "interpreted Triton gets bfloat16 wrong; use float32 or float16 on a CPU",
    )


def cluster_width(d_ff: int, n_clusters: int) -> int:
    """Neurons of one of n equal clusters. Raises ValueError unless that is a multiple of 8."""
    check(
        d_ff % (8 * n_clusters) == 0,
        f"d_ff is {d_ff}; {n_clusters} clusters need a multiple of {8 * n_clusters}: try "
        f"{max(1, round(d_ff / 8 / n_clusters)) * 8 * n_clusters}",
    )
    return d_ff // n_clusters


def fit_tile(tile: Tile, dtype: torch.dtype, n: int, k: int) -> Tile:
    """A tile no wider than the problem, and small enough for float32."""
    most_n, most_k = (tile.n, tile.k) if dtype.itemsize == 2 else (min(tile.n, 64), min(tile.k, 32))
    wide = min(most_n, max(16, triton.next_power_of_2(n)))
    return Tile(wide, min(most_k, max(16, triton.next_power_of_2(k))), tile.warps, tile.stages)


def descriptor(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Tiles [rows, cols] of a row-major matrix; loads past its edges give zero, stores there are dropped."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, cols])


def programs(like: Tensor, tiles: int) -> int:
    """Programs that share `tiles` tiles: one a multiprocessor, or 4 when interpreted."""
    if not like.is_cuda:
        return min(tiles, 4)
    return min(tiles, torch.cuda.get_device_properties(like.device).multi_processor_count)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products in float32, not tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def two_of_four(y, ROWS: tl.constexpr, COLS: tl.constexpr):
    """y [ROWS, COLS] >= 0 (or NaN) with all but the two largest of each four adjacent columns zero.

    Non-negative floats order like their bits. The last two bits make room for the column, so that keys
    differ: values equal in their first 22 significant bits count as tied, and ties keep the lower column.
    NaN is largest. With the four seen as two pairs, the second largest is the larger of (the smaller of the
    pairs' maxima, the larger of the pairs' minima), and tensor-core accumulators keep their layout.
    """
    even, odd = tl.split(tl.reshape(y, (ROWS, COLS // 4, 2, 2)))
    bonus = 3 - 2 * tl.arange(0, 2)[None, None, :]
    a = (even.to(tl.int32, bitcast=True) & 0x7FFFFFFC) | bonus
    b = (odd.to(tl.int32, bitcast=True) & 0x7FFFFFFC) | (bonus - 1)
    low_of_max = tl.min(tl.maximum(a, b), axis=2, keep_dims=True)
    high_of_min = tl.max(tl.minimum(a, b), axis=2, keep_dims=True)
    second = tl.maximum(low_of_max, high_of_min)
    kept = tl.join(tl.where(a >= second, even, 0.0), tl.where(b >= second, odd, 0.0))
    return tl.reshape(kept, (ROWS, COLS))
