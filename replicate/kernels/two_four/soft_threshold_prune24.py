"""2:4 weights: soft thresholding (or plain top 2 of 4) and compression, along either axis or both at once.

In each group of four let t be the second-smallest magnitude (section 2.2, after S-STE):

    f(a) = sign(a) max(|a| - t, 0), times S-STE's frozen scale beta if one is given

W is [D, F]. Along its last axis the result is S24(W) [D, F]; with `transpose` the groups run along D and
the result is S24(W)^T [F, D], since a compressed operand is 2:4 along its own last axis. Product 1 reads
the transpose of W1, product 3 reads W2 as it is stored. Master weights may be float32: they are
thresholded as such and rounded once. Compress once per optimiser step, not once per micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate.kernels import backend as engines
from replicate.kernels.backend import check, on_its_device, tl, triton
from replicate.kernels.two_four.compressed24 import (
    Compressed24,
    as_words,
    buffers_of_both,
    check_either_axis,
    compress_in_torch,
    fit_square,
    layout,
    matrices_of_both,
    word_parts,
)
from replicate.kernels.two_four.tile24 import (
    band_rows,
    four_of_column,
    four_of_row,
    kept_nibble,
    magnitude,
    pack_pair,
    store_metadata,
    two_of_four,
)
from replicate.sparsity import mask24, soft_threshold24

# Tile and warps, the fastest of the configurations `python -m replicate bench kernels --tune` tries.
CONFIG = {"TILE_D": 64, "TILE_F": 64, "num_warps": 4}
Scale = float | Tensor | None


def soft_threshold_prune24_reference(
    w: Tensor, dim: int, scale: Scale = None, method: str = "soft", dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(S24(w) in `dtype`, mask) of w's shape, 2:4 along `dim`."""
    mask = mask24(w, dim)
    if method == "hard":
        out = torch.where(mask, w, torch.zeros_like(w)).float() * (1.0 if scale is None else scale)
    else:
        out = soft_threshold24(w.float(), dim, scale)
    return out.to(dtype or w.dtype), mask


@on_its_device
@triton.jit
def _soft_threshold_prune24_kernel(
    w, words, last_values, last_metadata, first_values, first_metadata, last_scale, first_scale,
    d_rows, f_cols,
    WIDE: tl.constexpr, BF16_IN: tl.constexpr, BF16: tl.constexpr, LAST: tl.constexpr, FIRST: tl.constexpr,
    SOFT: tl.constexpr, LAST_SCALED: tl.constexpr, FIRST_SCALED: tl.constexpr,
    TILE_D: tl.constexpr, TILE_F: tl.constexpr,
):  # fmt: skip
    """One tile of W, compressed along F (LAST), along D (FIRST), or both; `words` is w as 64-bit words."""
    if LAST:
        BANDS: tl.constexpr = TILE_D // 16
        GROUPS: tl.constexpr = TILE_F // 4
        groups = f_cols // 4
        first = tl.program_id(0) * GROUPS
        band, row = band_rows(tl.program_id(1) * BANDS, BANDS)
        scale = tl.load(last_scale) if LAST_SCALED else 1.0
        r = band * 16 + row
        a, b, c, d = four_of_row(words, r, first, groups, d_rows, WIDE, BF16_IN, BANDS, GROUPS)
        pair, nibble_upper = _threshold(a, b, c, d, scale, LAST_SCALED, SOFT, BF16)
        upper = r.to(tl.int64)[:, None] * groups + (first + tl.arange(0, GROUPS))[None, :]
        tl.store(last_values + upper, pair)
        a, b, c, d = four_of_row(words, r + 8, first, groups, d_rows, WIDE, BF16_IN, BANDS, GROUPS)
        pair, nibble_lower = _threshold(a, b, c, d, scale, LAST_SCALED, SOFT, BF16)
        tl.store(last_values + upper + 8 * groups, pair)
        byte = nibble_upper | nibble_lower << 4
        store_metadata(last_metadata, band, row, first, groups, byte, BANDS, GROUPS)
    if FIRST:
        BANDS_F: tl.constexpr = TILE_F // 16
        GROUPS_D: tl.constexpr = TILE_D // 4
        groups = d_rows // 4
        first = tl.program_id(1) * GROUPS_D
        band, row = band_rows(tl.program_id(0) * BANDS_F, BANDS_F)
        f = band * 16 + row
        g = first + tl.arange(0, GROUPS_D)
        scale = tl.load(first_scale) if FIRST_SCALED else 1.0
        a, b, c, d = four_of_column(w, g, f, f_cols)
        pair, nibble_upper = _threshold(a, b, c, d, scale, FIRST_SCALED, SOFT, BF16)
        upper = f.to(tl.int64)[:, None] * groups + g[None, :]
        tl.store(first_values + upper, tl.trans(pair))
        a, b, c, d = four_of_column(w, g, f + 8, f_cols)
        pair, nibble_lower = _threshold(a, b, c, d, scale, FIRST_SCALED, SOFT, BF16)
        tl.store(first_values + upper + 8 * groups, tl.trans(pair))
        byte = tl.trans(nibble_upper | nibble_lower << 4)
        store_metadata(first_metadata, band, row, first, groups, byte, BANDS_F, GROUPS_D)


@triton.jit
def _threshold(a, b, c, d, scale, SCALED: tl.constexpr, SOFT: tl.constexpr, BF16: tl.constexpr):
    """(kept values as a word of two, nibble) of four float32."""
    mag_a, mag_b, mag_c, mag_d = magnitude(a), magnitude(b), magnitude(c), magnitude(d)
    both_ab, both_cd, a_top, c_top = two_of_four(mag_a, mag_b, mag_c, mag_d)
    low = tl.where(both_ab, a, tl.where(both_cd, c, tl.where(a_top, a, b)))
    high = tl.where(both_ab, b, tl.where(both_cd, d, tl.where(c_top, c, d)))
    if SOFT:
        least = tl.maximum(tl.minimum(mag_a, mag_b), tl.minimum(mag_c, mag_d))
        most = tl.minimum(tl.maximum(mag_a, mag_b), tl.maximum(mag_c, mag_d))
        t = tl.minimum(least, most)
        low, high = _shrink(low, t), _shrink(high, t)
    if SCALED:
        low, high = low * scale, high * scale
    return pack_pair(low, high, BF16), kept_nibble(both_ab, both_cd, a_top, c_top)


@triton.jit
def _shrink(x, t_bits):
    """sign(x) max(|x| - t, 0); NaN stays NaN, and infinity with t infinite becomes 0."""
    signed_t = (t_bits | (x.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) <= tl.abs(signed_t), 0.0, x - signed_t)


@torch.library.custom_op("replicate::soft_threshold_prune24", mutates_args=())
def _soft_threshold_prune24_op(
    w: Tensor, last: bool, first: bool, last_scale: Tensor | None, first_scale: Tensor | None, soft: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return launch_soft_threshold_prune24(w, last, first, last_scale, first_scale, soft, dtype, CONFIG)


_soft_threshold_prune24_op.register_fake(
    lambda w, last, first, last_scale, first_scale, soft, dtype: buffers_of_both(w, last, first, dtype)
)


def launch_soft_threshold_prune24(
    w: Tensor, last: bool, first: bool, last_scale: Tensor | None, first_scale: Tensor | None, soft: bool,
    dtype: torch.dtype, config: dict[str, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Buffers of S24(W) and of S24(W)^T from the kernel with a given tile; one not asked for is empty."""
    w = w.contiguous()
    d_rows, f_cols = w.shape
    buffers = buffers_of_both(w, last, first, dtype)
    grid, config = fit_square(config, d_rows, f_cols)
    _soft_threshold_prune24_kernel[grid](
        w, as_words(w) if last else w, *word_parts(buffers[0], f_cols), *word_parts(buffers[1], d_rows),
        last_scale, first_scale, d_rows, f_cols,
        WIDE=w.dtype == torch.float32, BF16_IN=w.dtype == torch.bfloat16, BF16=dtype == torch.bfloat16,
        LAST=last, FIRST=first, SOFT=soft,
        LAST_SCALED=last_scale is not None, FIRST_SCALED=first_scale is not None, **config,
    )  # fmt: skip
    return buffers


def soft_threshold_prune24(
    w: Tensor, transpose: bool = False, *, scale: Scale = None, method: str = "soft",
    dtype: torch.dtype | None = None, backend: str | None = None,
) -> Compressed24:  # fmt: skip
    """S24(W) [D, F], or with `transpose` S24(W)^T [F, D] with groups along D, compressed.

    Args:
        w: [D, F], float32, float16 or bfloat16; the compressed axis (F, or D) is a multiple of 64.
        transpose: group along the first axis and compress the transpose.
        scale: S-STE's beta as a number or a tensor of one element; None is the paper.
        method: "soft", or "hard" for the two largest unchanged.
        dtype: of the result, float16 or bfloat16; by default w's, bfloat16 for float32.
        backend: see `replicate.kernels.backend`.

    Raises:
        ValueError: shape, dtype or method does not fit.
    """
    scales = (None, scale) if transpose else (scale, None)
    return _compress(w, not transpose, transpose, scales, method, dtype, backend)[int(transpose)]


def soft_threshold_prune24_both(
    w: Tensor, *, scales: tuple[Scale, Scale] = (None, None), method: str = "soft",
    dtype: torch.dtype | None = None, backend: str | None = None,
) -> tuple[Compressed24, Compressed24]:  # fmt: skip
    """S24(W) [D, F] with groups along F and S24(W)^T [F, D] with groups along D, from one read of W.

    Args:
        w: [D, F], float32, float16 or bfloat16; D and F are multiples of 64.
        scales: of the two results in that order; else as in `soft_threshold_prune24`.

    Raises:
        ValueError: shape, dtype or method does not fit.
    """
    return _compress(w, True, True, scales, method, dtype, backend)


def _compress(
    w: Tensor, last: bool, first: bool, scales: tuple[Scale, Scale], method: str,
    dtype: torch.dtype | None, backend: str | None,
) -> tuple[Compressed24 | None, Compressed24 | None]:  # fmt: skip
    dtype = check_either_axis("w", w, last, first, dtype)
    check(method in ("soft", "hard"), f"method is {method!r}; choose 'soft' or 'hard'")
    for scale in scales:
        shape = scale.shape if isinstance(scale, Tensor) else ()
        check(shape in ((), (1,)), f"scale has shape {tuple(shape)}; use one number")
    kind = layout(w.device, dtype)
    if kind == "sm90" and engines.select(w.device, backend, dtype) != "reference":
        on_device = [_as_tensor(scale, w) for scale in scales]
        buffers = _soft_threshold_prune24_op(w, last, first, *on_device, method == "soft", dtype)
        return matrices_of_both(buffers, *w.shape)

    def in_torch(dim: int, scale: Scale) -> Compressed24:
        return compress_in_torch(*soft_threshold_prune24_reference(w, dim, scale, method, dtype), kind, dim)

    return in_torch(1, scales[0]) if last else None, in_torch(0, scales[1]) if first else None


def _as_tensor(scale: Scale, like: Tensor) -> Tensor | None:
    if scale is None:
        return None
    if isinstance(scale, Tensor):
        return scale.to(like.device, torch.float32).reshape(1)
    return torch.full((1,), float(scale), dtype=torch.float32, device=like.device)
