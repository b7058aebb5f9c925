"""Operands of Venom's products in FP8 (E4M3): tokens and activations by rows, weights as wholes.

    rows       s[r] = max over c of |t[r, c]| / 448,   q[r, c] = round(t[r, c] / s[r])
    weight     s    = max of |w| / 448,                q = round(w / s), and the same transposed

448 is E4M3's largest number; where all is zero, or too small for a scale, s is 1. Tensor cores read FP8 along
the axis that a product sums over. Two products sum a weight over different axes, so it is stored both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate import fp8
from replicate.kernels.backend import INTERPRETED, check, on_its_device, tl, triton
from replicate.kernels.venom.common import FP8, cuda_or_interpreted

ELEMENTS = 4096  # of a program, but at least a row
LARGEST, LEAST = tl.constexpr(fp8.LARGEST), tl.constexpr(2.0**-126)  # of E4M3; smallest normal float32
SIDE = 64  # of a program's square of a weight


@triton.jit
def _scale(largest):
    """`fp8.scale_of` in a kernel."""
    scale = largest / LARGEST
    return tl.where(scale < LEAST, 1.0, scale)


@triton.jit
def _to_fp8(value):
    """float32 of at most 448 to E4M3, to nearest, ties to even."""
    if INTERPRETED:  # it rounds without a carry, 1.97 to 1, and NaN to 384
        return _code(value).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return value.to(tl.float8e4nv)


@triton.jit
def _code(value):
    """The byte, as an int32, of `_to_fp8`, by arithmetic with whole numbers.

    float32 has 20 bits of mantissa more and 120 is added to its exponents; below 2^-6 numbers are in steps of
    2^-9, the last bit of a float32 from 2^14 on.
    """
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = (tl.abs(value) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < 0x3C800000, small, tl.minimum(normal, 0x7E))
    return tl.where(size > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)


@on_its_device
@triton.jit
def _quantise_rows_kernel(t, out, scale, n_rows, n_cols, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS whole rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLUMNS)
    mask = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    at = row.to(tl.int64)[:, None] * n_cols + col[None, :]
    value = tl.load(t + at, mask=mask, other=0.0).to(tl.float32)
    own = _scale(tl.max(tl.abs(value), axis=1))
    tl.store(scale + row, own, mask=row < n_rows)
    tl.store(out + at, _to_fp8(value / own[:, None]), mask=mask)


@on_its_device
@triton.jit
def _quantise_weight_kernel(w, scale, out, turned, n_fours, n_cols, SIDE: tl.constexpr):
    """A square of w, as it is and turned.

    Turned, four rows travel as one word. Not by `_to_fp8`: where its bytes are stored and turned, ptxas 12.9
    gets some wrong (Triton's issue 11111).
    """
    four = tl.program_id(0) * (SIDE // 4) + tl.arange(0, SIDE // 4)
    col = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    mask = (four < n_fours)[:, None] & (col < n_cols)[None, :]
    own, words = tl.load(scale), tl.zeros((SIDE // 4, SIDE), dtype=tl.int32)
    for i in tl.static_range(4):
        at = (4 * four + i).to(tl.int64)[:, None] * n_cols + col[None, :]
        code = _code(tl.load(w + at, mask=mask, other=0.0).to(tl.float32) / own)
        tl.store(out + at, code.to(tl.uint8), mask=mask)
        words |= code << (8 * i)
    at = col.to(tl.int64)[:, None] * n_fours + four[None, :]
    tl.store(turned + at, words.T, mask=(col < n_cols)[:, None] & (four < n_fours)[None, :])


def quantise_rows(t: Tensor) -> tuple[Tensor, Tensor]:
    """t [R, C], contiguous, in FP8 and the float32 scale [R] of each row; the reference is `fp8.quantise`.

    Raises ValueError if t is no contiguous matrix.
    """
    cuda_or_interpreted(t)
    check(t.dim() == 2 and t.is_contiguous(), f"t must be a contiguous matrix, got strides {t.stride()}")
    n_rows, n_cols = t.shape
    out, scale = t.new_empty((n_rows, n_cols), dtype=FP8), t.new_empty(n_rows, dtype=torch.float32)
    columns = triton.next_power_of_2(n_cols)
    rows = max(1, ELEMENTS // columns) if t.is_cuda else 512
    if t.numel():
        _quantise_rows_kernel[(triton.cdiv(n_rows, rows),)](
            t, out, scale, n_rows, n_cols, ROWS=rows, COLUMNS=columns, num_warps=8
        )
    return out, scale


def quantise_weight(w: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """w [N, M], contiguous, in FP8; its transpose [M, N] in FP8; the scale, a float32 of no dimension.

    `largest` is the largest magnitude in w, if it is known, a float32 of no dimension; else w is read for it.
    Raises ValueError if w is no contiguous matrix or N no multiple of 4.
    """
    cuda_or_interpreted(w)
    check(w.dim() == 2 and w.is_contiguous(), f"w must be a contiguous matrix, got strides {w.stride()}")
    check(w.shape[0] % 4 == 0, f"w has {w.shape[0]} rows; its transpose is written by fours: use a multiple")
    largest = torch.linalg.vector_norm(w, torch.inf) if largest is None else largest
    (n_rows, n_cols), scale = w.shape, fp8.scale_of(largest)
    out, turned = w.new_empty((n_rows, n_cols), dtype=FP8), w.new_empty((n_cols, n_rows), dtype=FP8)
    side = SIDE if w.is_cuda else 512
    if w.numel():
        bytes_of, words_of = out.view(torch.uint8), turned.view(torch.int32)
        _quantise_weight_kernel[(triton.cdiv(n_rows, side), triton.cdiv(n_cols, side))](
            w, scale, bytes_of, words_of, n_rows // 4, n_cols, SIDE=side, num_warps=4
        )
    return out, turned, scale
