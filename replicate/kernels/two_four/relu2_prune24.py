"""Squared ReLU, the two largest of each four along d_ff, and compression, in one pass.

    y2 = relu(y1)^2 where y1 is among the two largest of its group of four, else 0     (equation 2, then 2:4)

y1 is [T, F]; y2 is 2:4 along F, the reduction axis of product 2, and comes compressed (values and metadata
in cuSPARSELt's layout) and, if asked for, dense. Choosing by y1 or by y2 is the same, except that distinct
y1 stay distinct where their squares under- or overflow. Ties keep the lower index; a NaN counts as largest,
so it is kept. One read of y1 and 9/16 of it written is all the traffic.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from replicate.kernels import backend as engines
from replicate.kernels.backend import INTERPRETED, check, on_its_device, tl, triton
from replicate.kernels.two_four.compressed24 import (
    Compressed24,
    as_words,
    check_compressible,
    compress_by_library,
    empty_outputs,
    fit_config,
    layout,
    pack24_reference,
    parts,
)
from replicate.kernels.two_four.tile24 import (
    band_rows,
    kept_nibble,
    pack_pair,
    spread,
    store_metadata,
    two_of_four,
    unpack_four,
)
from replicate.sparsity import mask24

# Tile and warps, the fastest of the configurations `python -m replicate bench kernels --tune` tries.
CONFIG = {"BANDS": 2, "GROUPS": 64, "num_warps": 4}


def relu2_prune24_reference(y1: Tensor) -> tuple[Tensor, Tensor]:
    """(y2, mask) [T, F]: squared ReLU with the two largest of each four kept, and where they are."""
    positive = F.relu(y1)
    mask = mask24(positive)
    y2 = positive.float().square().to(y1.dtype)
    return torch.where(mask, y2, torch.zeros_like(y2)), mask


@on_its_device
@triton.jit
def _relu2_prune24_kernel(
    y1,
    values,
    metadata,
    dense,
    rows,
    groups,
    BF16: tl.constexpr,
    COMPRESSED: tl.constexpr,
    DENSE: tl.constexpr,
    EVEN: tl.constexpr,
    BANDS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A tile of 16 BANDS rows x GROUPS groups; y1 and dense are words of four elements, values of two."""
    first = tl.program_id(0) * GROUPS
    band, row = band_rows(tl.program_id(1) * BANDS, BANDS)
    r = (band * 16 + row)[:, None]
    upper = r.to(tl.int64) * groups + (first + tl.arange(0, GROUPS))[None, :]
    lower = upper + 8 * groups
    if EVEN:
        word_upper, word_lower = tl.load(y1 + upper), tl.load(y1 + lower)
    else:
        word_upper = tl.load(y1 + upper, mask=r < rows, other=0)
        word_lower = tl.load(y1 + lower, mask=r + 8 < rows, other=0)
    pair_upper, nibble_upper = _relu2_two_of_four(word_upper, BF16)
    pair_lower, nibble_lower = _relu2_two_of_four(word_lower, BF16)
    if COMPRESSED:
        tl.store(values + upper, pair_upper)
        tl.store(values + lower, pair_lower)
        byte = nibble_upper | nibble_lower << 4
        store_metadata(metadata, band, row, first, groups, byte, BANDS, GROUPS)
    if DENSE:
        tl.store(dense + upper, spread(pair_upper, nibble_upper), mask=r < rows)
        tl.store(dense + lower, spread(pair_lower, nibble_lower), mask=r + 8 < rows)


@triton.jit
def _relu2_two_of_four(word, BF16: tl.constexpr):
    """(kept y2 as a word of two, nibble) of a word of four y1."""
    a, b, c, d = unpack_four(word, BF16)
    a, b, c, d = _relu_bits(a), _relu_bits(b), _relu_bits(c), _relu_bits(d)
    both_ab, both_cd, a_top, c_top = two_of_four(a, b, c, d)
    low = tl.where(both_ab, a, tl.where(both_cd, c, tl.maximum(a, b))).to(tl.float32, bitcast=True)
    high = tl.where(both_ab, b, tl.where(both_cd, d, tl.maximum(c, d))).to(tl.float32, bitcast=True)
    return pack_pair(low * low, high * high, BF16), kept_nibble(both_ab, both_cd, a_top, c_top)


@triton.jit
def _relu_bits(x):
    """relu(x) as integer bits, which order like the values; NaN of either sign is largest."""
    bits = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(tl.int32, bitcast=True)
    if INTERPRETED:  # numpy's maximum keeps the sign of NaN and of zero; the GPU's does not
        bits &= 0x7FFFFFFF
    return bits


@torch.library.custom_op("replicate::relu2_prune24", mutates_args=())
def _relu2_prune24_op(y1: Tensor, compressed: bool, dense: bool) -> tuple[Tensor, Tensor]:
    return launch_relu2_prune24(y1, compressed, dense, CONFIG)


@_relu2_prune24_op.register_fake
def _(y1: Tensor, compressed: bool, dense: bool) -> tuple[Tensor, Tensor]:
    return empty_outputs(y1, compressed, dense)


def launch_relu2_prune24(
    y1: Tensor, compressed: bool, dense: bool, config: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """(buffer, dense form) from the kernel with a given tile; an output not asked for is empty."""
    rows, cols = y1.shape
    buffer, full = empty_outputs(y1, compressed, dense)
    values, metadata = parts(buffer, cols) if compressed else (buffer, buffer)
    grid, config = fit_config(config, rows, cols)
    _relu2_prune24_kernel[grid](
        as_words(y1),
        values.view(torch.int32),
        metadata.view(torch.int32),
        full.view(torch.int64),
        rows,
        cols // 4,
        BF16=y1.dtype == torch.bfloat16,
        COMPRESSED=compressed,
        DENSE=dense,
        EVEN=rows % 64 == 0,
        **config,
    )
    return buffer, full


def relu2_prune24(y1: Tensor, *, dense: bool = False, backend: str | None = None) -> Compressed24:
    """Squared ReLU of y1, pruned to two of each four along d_ff and compressed.

    Args:
        y1: [T, F], float16 or bfloat16, F a multiple of 64.
        dense: also return y2 [T, F] uncompressed, as `.dense`: product 4, y2^T dy3, needs it.
        backend: see `replicate.kernels.backend`.

    Returns:
        y2 as Compressed24; `values, metadata = relu2_prune24(y1)` unpacks it.

    Raises:
        ValueError: y1 is no such matrix.
    """
    check(
        y1.dim() == 2,
        f"y1 must be a matrix [tokens, d_ff], got shape {tuple(y1.shape)}; flatten leading axes",
    )
    check_compressible("y1", *y1.shape, y1.dtype)
    kind = layout(y1.device, y1.dtype)
    if engines.select(y1.device, backend, y1.dtype) == "reference":
        y2, mask = relu2_prune24_reference(y1)
        buffer = pack24_reference(y2, mask) if kind == "sm90" else compress_by_library(y2)
        return Compressed24(buffer, *y1.shape, kind, y2 if dense or kind == "vendor" else None)
    buffer, full = _relu2_prune24_op(y1, kind == "sm90", dense or kind == "vendor")
    if kind == "vendor":
        buffer = compress_by_library(full)
    return Compressed24(buffer, *y1.shape, kind, full if full.numel() else None)
