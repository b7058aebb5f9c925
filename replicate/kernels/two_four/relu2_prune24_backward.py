"""The derivative of squared ReLU under the forward's 2:4 mask, compressed with the forward's metadata.

    dy1 = 2 dy2 relu(y1) = 2 dy2 sqrt(y2) where y2 was kept, else 0     (equation 6, same mask)

dy2 is [T, F], y2 what `relu2_prune24` returned. y1 need not be kept for the backward pass, and the mask is
the forward's by construction: pruning dy1 by its own magnitudes, or not at all, is another algorithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate.kernels import backend as engines
from replicate.kernels.backend import HALF, check, on_its_device, tl, triton
from replicate.kernels.two_four.compressed24 import (
    Compressed24,
    as_words,
    compress_by_library,
    empty_outputs,
    fit_config,
    pack24_reference,
    parts,
    unpack24,
    unpack24_reference,
)
from replicate.kernels.two_four.tile24 import (
    band_rows,
    gather,
    metadata_words,
    nibbles,
    pack_pair,
    spread,
    unpack_pair,
)

# Tile and warps, the fastest of the configurations `python -m replicate bench kernels --tune` tries.
CONFIG = {"BANDS": 2, "GROUPS": 64, "num_warps": 4}


def relu2_prune24_backward_reference(dy2: Tensor, y2: Tensor, mask: Tensor) -> Tensor:
    """dy1 [T, F] = 2 dy2 sqrt(y2) where mask, else 0."""
    dy1 = (2 * dy2.float() * y2.float().sqrt()).to(dy2.dtype)
    return torch.where(mask, dy1, torch.zeros_like(dy1))


@on_its_device
@triton.jit
def _relu2_prune24_backward_kernel(
    dy2,
    y2_values,
    y2_metadata,
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


@torch.library.custom_op("replicate::relu2_prune24_backward", mutates_args=())
def _relu2_prune24_backward_op(
    dy2: Tensor, y2: Tensor, compressed: bool, dense: bool
) -> tuple[Tensor, Tensor]:
    return launch_relu2_prune24_backward(dy2, y2, compressed, dense, CONFIG)


@_relu2_prune24_backward_op.register_fake
def _(dy2: Tensor, y2: Tensor, compressed: bool, dense: bool) -> tuple[Tensor, Tensor]:
    return empty_outputs(dy2, compressed, dense)


@torch.library.custom_op("replicate::relu2_prune24_backward_", mutates_args=("dy2",))
def _relu2_prune24_backward_in_place_op(dy2: Tensor, y2: Tensor, compressed: bool) -> Tensor:
    return launch_relu2_prune24_backward(dy2, y2, compressed, True, CONFIG, overwrite=True)[0]


@_relu2_prune24_backward_in_place_op.register_fake
def _(dy2: Tensor, y2: Tensor, compressed: bool) -> Tensor:
    return empty_outputs(dy2, compressed, False)[0]


def launch_relu2_prune24_backward(
    dy2: Tensor,
    y2: Tensor,
    compressed: bool,
    dense: bool,
    config: dict[str, int],
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """(buffer, dense form) of dy1 from the kernel with a given tile; `y2` is the forward's buffer.

    With `overwrite` the dense form is dy2's memory: a program writes the tile that only it has read.
    """
    rows, cols = dy2.shape
    buffer, full = empty_outputs(dy2, compressed, dense and not overwrite)
    full = dy2 if overwrite else full
    y2_values, y2_metadata = parts(y2, cols)
    values, metadata = parts(buffer, cols) if compressed else (buffer, buffer)
    grid, config = fit_config(config, rows, cols)
    words = as_words(dy2)
    _relu2_prune24_backward_kernel[grid](
        words,
        y2_values.view(torch.int32),
        y2_metadata.view(torch.int64),
        values.view(torch.int32),
        metadata.view(torch.int64),
        words if overwrite else full.view(torch.int64),
        rows,
        cols // 4,
        BF16=dy2.dtype == torch.bfloat16,
        COMPRESSED=compressed,
        DENSE=dense,
        EVEN=rows % 64 == 0,
        **config,
    )
    return buffer, full


def relu2_prune24_backward(
    dy2: Tensor,
    y2: Compressed24,
    *,
    form: str = "compressed",
    overwrite: bool = False,
    backend: str | None = None,
) -> Compressed24 | Tensor:
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
        buffer = _relu2_prune24_backward_in_place_op(dy2, y2.buffer, form == "both")
        return dy2 if form == "dense" else Compressed24(buffer, *y2.shape, y2.layout, dy2)
    buffer, full = _relu2_prune24_backward_op(dy2, y2.buffer, form != "dense", form != "compressed")
    if form == "dense":
        return full
    return Compressed24(buffer, *y2.shape, y2.layout, full if form == "both" else None)


def _backward_in_torch(dy2: Tensor, y2: Compressed24, form: str, overwrite: bool) -> Compressed24 | Tensor:
    full = unpack24(y2, backend="reference")
    mask = full != 0
    if y2.layout == "sm90":  # the metadata also names kept zeros
        ones = torch.cat([torch.ones_like(y2.values).view(-1), parts(y2.buffer, y2.cols)[1]])
        mask = unpack24_reference(ones.view(y2.buffer.shape), *y2.shape) != 0
    dy1 = relu2_prune24_backward_reference(dy2, full, mask)
    dy1 = dy2.copy_(dy1) if overwrite else dy1
    if form == "dense":
        return dy1
    buffer = pack24_reference(dy1, mask) if y2.layout == "sm90" else compress_by_library(dy1)
    keeps = form == "both" or y2.layout == "vendor"
    return Compressed24(buffer, *y2.shape, y2.layout, dy1 if keeps else None)
