"""What the block-sparse kernels share: checks, tile shapes, descriptors, squared ReLU and top k."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from replicate.fp8 import FORMAT as FP8
from replicate.kernels.backend import HAVE_TRITON, check, interpreted, tl, triton

if HAVE_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

NARROW = 64  # columns that the rows of a tile cost as much as, see `fit_tile`
HOPPER_SHARED = 232448  # bytes of shared memory a program may have on sm_90
REFERENCE = "use the operation's *_reference function, or SparseFFN(..., backend='reference')"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, FP8)


@dataclass(frozen=True)
class Tile:
    """Output columns n and reduction step k of a program's tile, and its scheduling; rows are a block."""

    n: int = 256
    k: int = 64
    warps: int = 8
    stages: int = 4

    def options(self, like: Tensor) -> dict[str, Any]:
        """What a product's kernel is launched with, for operands like `like`."""
        own = {"N": self.n, "K": self.k, "num_warps": self.warps, "num_stages": self.stages}
        return own | {"PRECISION": dot_precision(like.dtype)}


def cuda_or_interpreted(first: Tensor, *others: Tensor) -> None:
    """Raise ValueError unless Triton can run on the tensors, which must share a device."""
    device = first.device
    for t in others:
        if t.device != device:
            raise ValueError(f"tensors are on several devices: {device} and {t.device}")
    if not HAVE_TRITON:
        raise ValueError(f"Triton is not installed; {REFERENCE}")
    if not (first.is_cuda or interpreted()):
        raise ValueError(f"tensors are on {device}; Triton kernels need a CUDA device: {REFERENCE}")


def check_operands(**operands: Tensor) -> None:
    """Raise ValueError unless all are contiguous matrices of one dtype, 8 n columns wide, in FP8 32 n."""
    cuda_or_interpreted(*operands.values())
    dtype = next(iter(operands.values())).dtype
    unit = 32 if dtype == FP8 else 8
    for name, t in operands.items():
        if t.dim() != 2:
            raise ValueError(f"{name} must be a matrix, got shape {tuple(t.shape)}")
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")
        if t.dtype != dtype or dtype not in DTYPES:
            raise ValueError(f"{name} is {t.dtype}; use one of {DTYPES}, the same for all")
        if t.size(1) % unit:
            raise ValueError(f"{name} has {t.size(1)} columns; kernels need a multiple of {unit}")
    if dtype == torch.bfloat16 and interpreted():
        raise ValueError("interpreted Triton gets bfloat16 wrong; use float32 or float16 on a CPU")


def check_shape(name: str, t: Tensor, *want: int) -> None:
    """Raise ValueError unless t has this shape."""
    if t.shape != want:
        got = list(t.shape)
        raise ValueError(f"{name} must be {list(want)}, rows and columns the other operands need, got {got}")


def check_factor(factor: Tensor | None, out: Tensor) -> None:
    """Raise ValueError unless factor is None or has a float32 for each row of `out`, on its device."""
    right = factor is None or (
        factor.shape == out.shape[:1] and factor.dtype == torch.float32 and factor.is_contiguous()
    )
    if not right or (factor is not None and factor.device != out.device):
        got = f"{factor.dtype} {tuple(factor.shape)} on {factor.device}"
        raise ValueError(f"factor must be [{len(out)}] float32 on {out.device}, contiguous, got {got}")


def cluster_width(d_ff: int, n_clusters: int) -> int:
    """Neurons of one of n equal clusters. Raises ValueError unless that is a multiple of 8."""
    unit = 8 * n_clusters
    if d_ff % unit:
        near = max(1, round(d_ff / unit)) * unit
        raise ValueError(f"d_ff is {d_ff}; {n_clusters} clusters need a multiple of {unit}: try {near}")
    return d_ff // n_clusters


@lru_cache
def _device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and bytes of shared memory a program may have."""
    if device.type != "cuda":
        return 4, HOPPER_SHARED
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


@lru_cache
def _fitted(device: torch.device, bytes_each: int, n: int, k: int) -> Tile:
    tile = Tile(128, 32, 8, 3) if _device_limits(device)[1] < HOPPER_SHARED else Tile()
    most_n, most_k = (min(tile.n, 64), min(tile.k, 32)) if bytes_each == 4 else (tile.n, tile.k)
    most_k = 2 * most_k if bytes_each == 1 else most_k
    widths = [most_n >> i for i in range(4) if most_n >> i >= 32]
    best = min(widths, key=lambda width: (-(-n // width) * (width + NARROW), -(-n // width) * width))
    steps = [most_k >> i for i in range(3) if most_k >> i >= 16]
    return Tile(best, next((step for step in steps if k % step == 0), steps[0]), tile.warps, tile.stages)


def fit_tile(like: Tensor, n: int, k: int) -> Tile:
    """The device's tile fitted to n output columns and a reduction of k; smaller for float32, deeper for FP8.

    The width is the one with the least work, counted as tiles * (width + NARROW): columns past n are wasted,
    and narrow tiles read their rows of the other operand more often. Of equals that with the fewest columns.
    So it is the fastest at 96, 160, 320, 864 and 1152 columns in bfloat16 on one NVIDIA H200, where all were
    timed.
    The step divides k if any does.
    """
    return _fitted(like.device, like.dtype.itemsize, n, k)


def programs(like: Tensor, tiles: int) -> int:
    """Programs that share `tiles` tiles: one a multiprocessor."""
    return min(tiles, _device_limits(like.device)[0])


def descriptor(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Tiles [rows, cols] of a row-major matrix; loads past its edges give zero, stores there are dropped."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, cols])


def empty_clusters(x: Tensor, n_clusters: int, top_k: int) -> Tensor:
    """[T, k] for ids of clusters, to be filled. Raises ValueError unless 1 <= top_k <= n."""
    check(1 <= top_k <= n_clusters, f"top_k is {top_k}; choose 1 to the number of clusters, {n_clusters}")
    return torch.empty(len(x), top_k, dtype=torch.int32, device=x.device)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products in float32, not tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def halves(t):
    """The left and the right half of t's columns; tensor-core accumulators keep their layout."""
    return tl.split(tl.permute(tl.reshape(t, (t.shape[0], 2, t.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def relu2(y1, INNER: tl.constexpr):
    """Squared ReLU of y1 [rows, columns], NaN included; with INNER two of each four adjacent columns."""
    y2 = tl.maximum(y1, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y2 = y2 * y2
    if INNER:
        y2 = prune24_by_22_bits(y2)
    return y2


@triton.jit
def prune24_by_22_bits(y):
    """y [rows, columns] >= 0 (or NaN) with all but the two largest of each four adjacent columns zero.

    Non-negative floats order like their bits. The last two bits make room for the column, so that keys
    differ: values equal in their first 22 significant bits count as tied, and ties keep the lower column.
    NaN is largest. With the four seen as two pairs, the second largest is the larger of (the smaller of the
    pairs' maxima, the larger of the pairs' minima), and tensor-core accumulators keep their layout.
    """
    even, odd = tl.split(tl.reshape(y, (y.shape[0], y.shape[1] // 4, 2, 2)))
    bonus = 3 - 2 * tl.arange(0, 2)[None, None, :]
    a = (even.to(tl.int32, bitcast=True) & 0x7FFFFFFC) | bonus
    b = (odd.to(tl.int32, bitcast=True) & 0x7FFFFFFC) | (bonus - 1)
    low_of_max = tl.min(tl.maximum(a, b), axis=2, keep_dims=True)
    high_of_min = tl.max(tl.minimum(a, b), axis=2, keep_dims=True)
    second = tl.maximum(low_of_max, high_of_min)
    kept = tl.join(tl.where(a >= second, even, 0.0), tl.where(b >= second, odd, 0.0))
    return tl.reshape(kept, (y.shape[0], y.shape[1]))


@triton.jit
def store_top_k(scores, clusters, token, n_tokens, n_clusters, TOP_K: tl.constexpr, CLUSTERS: tl.constexpr):
    """Write the ids of the TOP_K largest scores [TOKENS, CLUSTERS] of each token, best first."""
    e = tl.arange(0, CLUSTERS)
    # NaN comes first, as in torch: a neuron gone wrong must be used, and so be seen. Minus infinity still
    # loses only to real scores, never to a cluster already taken.
    scores = tl.where(scores != scores, float("inf"), scores)
    scores = tl.where(scores > -3e38, scores, -3e38)
    scores = tl.where((e < n_clusters)[None, :], scores, float("-inf"))
    for j in tl.static_range(TOP_K):
        best = tl.max(scores, axis=1)
        choice = tl.min(tl.where(scores == best[:, None], e[None, :], CLUSTERS), axis=1)
        tl.store(clusters + token * TOP_K + j, choice, mask=token < n_tokens)
        scores = tl.where(e[None, :] == choice[:, None], float("-inf"), scores)
