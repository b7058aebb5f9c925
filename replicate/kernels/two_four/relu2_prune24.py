"""Squared ReLU, the two largest of each four along d_ff, and compression, in one pass; and its derivative.

    y2 = relu(y1)^2 where y1 is among the two largest of its group of four, else 0     (equation 2, then 2:4)
    dy1 = 2 dy2 relu(y1) = 2 dy2 sqrt(y2) where y2 was kept, else 0                    (equation 6, same mask)

y1 and dy2 are [T, F]; y2 and dy1 are 2:4 along F, the reduction axis of products 2 and 5, and come compressed
(values and metadata in cuSPARSELt's layout) and, if asked for, dense. Choosing by y1 or by y2 is the same,
except that distinct y1 stay distinct where their squares under- or overflow. Ties keep the lower index; a NaN
counts as largest, so it is kept. One read of y1 and 9/16 of it written is all the traffic.

The backward pass needs no y1 and copies y2's metadata, so that the mask is the forward's by construction:
pruning dy1 by its own magnitudes, or not at all, is another algorithm.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from replicate.kernels import backend as engines
from replicate.kernels.backend import HALF, INTERPRETED, check, on_its_device, tl, triton
from replicate.kernels.two_four.compressed24 import (
    Compressed24,
    as_words,
    check_compressible,
    compress_by_library,
    compress_in_torch,
    empty_outputs,
    fit_config,
    layout,
    parts,
    unpack24,
    unpack24_reference,
    word_parts,
)
from replicate.kernels.two_four.tile24 import (
    band_rows,
    gather,
    kept_nibble,
    metadata_words,
    nibbles,
    pack_pair,
    spread,
    store_metadata,
    two_of_four,
    unpack_four,
    unpack_pair,
)
from replicate.sparsity import mask24

# Tile and warps of both passes, the fastest that `python -m replicate bench kernels --tune` tries.
CONFIG = {"BANDS": 2, "GROUPS": 64, "num_warps": 4}


def relu2_prune24_reference(y1: Tensor) -> tuple[Tensor, Tensor]:
    """(y2, mask) [T, F]: squared ReLU with the two largest of each four kept, and where they are."""
    positive = F.relu(y1)
    mask = mask24(positive)
    y2 = positive.float().square().to(y1.dtype)
    return torch.where(mask, y2, torch.zeros_like(y2)), mask


def relu2_prune24_backward_reference(dy2: Tensor, y2: Tensor, mask: Tensor) -> Tensor:
    """dy1 [T, F] = 2 dy2 sqrt(y2) where mask, else 0."""
    dy1 = (2 * dy2.float() * y2.float().sqrt()).to(dy2.dtype)
    return torch.where(mask, dy1, torch.zeros_like(dy1))


@on_its_device
@triton.jit
def _relu2_prune24_kernel(
    y1, values, metadata, dense, rows, groups,
    BF16: tl.constexpr, COMPRESSED: tl.constexpr, DENSE: tl.constexpr, EVEN: tl.constexpr,
    BANDS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
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


@on_its_device
@triton.jit
def _relu2_prune24_backward_kernel(
    dy2, y2_values, y2_metadata, values, metadata, dense, rows, groups,
    BF16: tl.constexpr, COMPRESSED: tl.constexpr, DENSE: tl.constexpr, EVEN: tl.constexpr,
    BANDS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """As the forward kernel; metadata are 64-bit words, copied as they are."""
    first = tl.program_id(0) * GROUPS
    band, row = band_rows(tl.program_id(1) * BANDS, BANDS)
    r = (band * 16 + row)[:, None]
    upper = r.to(tl.int64) * groups + (first + tl.arange(0, GROUPS))[None, :]
    lower = upper + 8 * groups
    if EVEN:
        word_upper, word_lower = tl.load(dy2 + upper), tl.load(dy2 + lower)
    else:
        word_upper = tl.load(dy2 + upper, mask=r < rows, other=0)
        word_lower = tl.load(dy2 + lower, mask=r + 8 < rows, other=0)
    at = metadata_words(band, row, first, groups, GROUPS)
    word = tl.load(y2_metadata + at)
    nibble_upper, nibble_lower = nibbles(word, BANDS, GROUPS)
    pair_upper = _scaled_by_root(gather(word_upper, nibble_upper), tl.load(y2_values + upper), BF16)
    pair_lower = _scaled_by_root(gather(word_lower, nibble_lower), tl.load(y2_values + lower), BF16)
    if COMPRESSED:
        tl.store(values + upper, pair_upper)
        tl.store(values + lower, pair_lower)
        tl.store(metadata + at, word)
    if DENSE:
        tl.store(dense + upper, spread(pair_upper, nibble_upper), mask=r < rows)
        tl.store(dense + lower, spread(pair_lower, nibble_lower), mask=r + 8 < rows)


@triton.jit
def _scaled_by_root(dy2, y2, BF16: tl.constexpr):
    """2 dy2 sqrt(y2) for words of two."""
    dy2_low, dy2_high = unpack_pair(dy2, BF16)
    y2_low, y2_high = unpack_pair(y2, BF16)
    return pack_pair(2.0 * dy2_low * tl.sqrt(y2_low), 2.0 * dy2_high * tl.sqrt(y2_high), BF16)


@torch.library.custom_op("replicate::relu2_prune24", mutates_args=())
def _relu2_prune24_op(y1: Tensor, compressed: bool, dense: bool) -> tuple[Tensor, Tensor]:
    return launch_relu2_prune24(y1, compressed, dense, CONFIG)


@torch.library.custom_op("replicate::relu2_prune24_backward", mutates_args=())
def _backward_op(dy2: Tensor, y2: Tensor, compressed: bool, dense: bool) -> tuple[Tensor, Tensor]:
    return launch_relu2_prune24_backward(dy2, y2, compressed, dense, CONFIG)


@torch.library.custom_op("replicate::relu2_prune24_backward_", mutates_args=("dy2",))
def _backward_in_place_op(dy2: Tensor, y2: Tensor, compressed: bool) -> Tensor:
    return launch_relu2_prune24_backward(dy2, y2, compressed, True, CONFIG, overwrite=True)[0]


_relu2_prune24_op.register_fake(empty_outputs)
_backward_op.register_fake(lambda dy2, y2, compressed, dense: empty_outputs(dy2, compressed, dense))
_backward_in_place_op.register_fake(lambda dy2, y2, compressed: empty_outputs(dy2, compressed, False)[0])


def launch_relu2_prune24(
    y1: Tensor, compressed: bool, dense: bool, config: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """(buffer, dense form) from the kernel with a given tile; an output not asked for is empty."""
    rows, cols = y1.shape
    buffer, full = empty_outputs(y1, compressed, dense)
    grid, config = fit_config(config, rows, cols)
    _relu2_prune24_kernel[grid](
        as_words(y1), *word_parts(buffer, cols), full.view(torch.int64), rows, cols // 4,
        BF16=y1.dtype == torch.bfloat16, COMPRESSED=compressed, DENSE=dense, EVEN=rows % 64 == 0, **config,
    )  # fmt: skip
    return buffer, full


def launch_relu2_prune24_backward(
    dy2: Tensor, y2: Tensor, compressed: bool, dense: bool, config: dict[str, int], overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """(buffer, dense form) of dy1 from the kernel with a given tile; `y2` is the forward's buffer.

    With `overwrite` the dense form is dy2's memory: a program writes the tile that only it has read.
    """
    rows, cols = dy2.shape
    buffer, full = empty_outputs(dy2, compressed, dense and not overwrite)
    y2_values, y2_metadata = word_parts(y2, cols)
    values, metadata = word_parts(buffer, cols)
    grid, config = fit_config(config, rows, cols)
    words = as_words(dy2)
    _relu2_prune24_backward_kernel[grid](
        words, y2_values, y2_metadata.view(torch.int64), values, metadata.view(torch.int64),
        words if overwrite else full.view(torch.int64), rows, cols // 4,
        BF16=dy2.dtype == torch.bfloat16, COMPRESSED=compressed, DENSE=dense, EVEN=rows % 64 == 0, **config,
    )  # fmt: skip
    return buffer, dy2 if overwrite else full


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
    check(y1.dim() == 2, f"y1 must be a matrix [tokens, d_ff], got {tuple(y1.shape)}; flatten leading axes")
    check_compressible("y1", *y1.shape, y1.dtype)
    kind = layout(y1.device, y1.dtype)
    if engines.select(y1.device, backend, y1.dtype) == "reference":
        y2, mask = relu2_prune24_reference(y1)
        out = compress_in_torch(y2, mask, kind)
        return out.with_dense(y2) if dense else out
    buffer, full = _relu2_prune24_op(y1, kind == "sm90", dense or kind == "vendor")
    if kind == "vendor":
        buffer = compress_by_library(full)
    return Compressed24(buffer, *y1.shape, kind, full if full.numel() else None)


def relu2_prune24_backward(
    dy2: Tensor, y2: Compressed24, *, form: str = "compressed", overwrite: bool = False,
    backend: str | None = None,
) -> Compressed24 | Tensor:  # fmt: skip
    """dy1 = 2 dy2 sqrt(y2) under the forward's mask.

    Args:
        dy2: [T, F], the dtype of y2.
        y2: what `relu2_prune24` returned; any dense form it carries is not needed.
        form: "compressed"; "dense" for a tensor [T, F]; "both" for a Compressed24 with `.dense` set.
        overwrite: put the dense form into dy2's memory, which saves T F elements.

    Returns:
        dy1 in that form.

    Raises:
        ValueError: shapes, dtypes or form do not fit.
    """
    check(form in ("compressed", "dense", "both"), f"form is {form!r}; choose compressed, dense or both")
    check(tuple(dy2.shape) == y2.shape, f"dy2 has shape {tuple(dy2.shape)}, y2 has {y2.shape}")
    check(dy2.dtype == y2.buffer.dtype and dy2.dtype in HALF, f"dy2 is {dy2.dtype}, y2 is {y2.buffer.dtype}")
    check(not overwrite or form != "compressed", "overwrite=True needs a dense form: form='dense' or 'both'")
    check(
        not overwrite or (dy2.is_contiguous() and dy2.storage_offset() % 4 == 0),
        "overwrite=True needs a contiguous dy2 that starts at a 64-bit word",
    )
    if y2.layout == "vendor" or engines.select(dy2.device, backend, dy2.dtype) == "reference":
        return _backward_in_torch(dy2, y2, form, overwrite)
    if overwrite:
        buffer, full = _backward_in_place_op(dy2, y2.buffer, form == "both"), dy2
    else:
        buffer, full = _backward_op(dy2, y2.buffer, form != "dense", form != "compressed")
    if form == "dense":
        return full
    return Compressed24(buffer, *y2.shape, y2.layout, full if form == "both" else None)


def _backward_in_torch(dy2: Tensor, y2: Compressed24, form: str, overwrite: bool) -> Compressed24 | Tensor:
    full = unpack24(y2, backend="reference")
    mask = full != 0
    if y2.layout == "sm90":  # the metadata also names kept zeros
        ones = y2.buffer.clone()
        parts(ones, y2.cols)[0].fill_(1)
        mask = unpack24_reference(ones, *y2.shape) != 0
    dy1 = relu2_prune24_backward_reference(dy2, full, mask)
    dy1 = dy2.copy_(dy1) if overwrite else dy1
    if form == "dense":
        return dy1
    out = compress_in_torch(dy1, mask, y2.layout)
    return out.with_dense(dy1) if form == "both" else out
