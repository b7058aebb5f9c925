"""Pruning by 4 x 4 tiles: a matrix that is 2:4 along both axes, compressed along either or both at once.

    P = x where the best of the 90 patterns with two kept in each row and column keeps it, else 0

of every tile of x [R, C]; "best" keeps the largest summed magnitude (2404.01847; `transposable_mask` is the
specification). P is 2:4 along C, and P^T [C, R] is 2:4 along R: with x = y2 or dy1 [T, F] the transpose is
the sparse operand of a weight gradient, dW2 = P(y2)^T dy3. Which tokens a tile keeps depends on four of them
together, so a text has it in the backward pass alone: in the forward pass a token would see later ones.
Pictures may have it there too (`selection="tile"`).

The search takes 19 sums instead of 90, see `tile_search`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from replicate.kernels import backend as engines
from replicate.kernels.backend import check, on_its_device, tl, triton
from replicate.kernels.two_four.compressed24 import (
    TILE,
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
    four_of_row,
    magnitude,
    pack_pair,
    permute,
    store_metadata,
    unpack_four,
)
from replicate.kernels.two_four.tile_search import PAIRS_K, PAIRS_L, tile_mask

# Tile and warps, the fastest of the configurations `python -m replicate bench kernels --tune` tries.
CONFIG_BOTH = {"TILE_R": 128, "TILE_C": 64, "num_warps": 4}
CONFIG_ONE = {"TILE_R": 128, "TILE_C": 128, "num_warps": 4}
K: tl.constexpr = tl.constexpr(PAIRS_K)
L: tl.constexpr = tl.constexpr(PAIRS_L)
# Larger magnitudes count as this one, NaN too: float32's largest / 8, so that sums of eight stay finite.
MOST: tl.constexpr = tl.constexpr(0x7DFFFFFF)


def tile_prune24_reference(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(P in `dtype`, mask) of x's shape, 2:4 along both axes."""
    mask = tile_mask(x)
    return torch.where(mask, x, torch.zeros_like(x)).to(dtype or x.dtype), mask


@on_its_device
@triton.jit
def _tile_prune24_kernel(
    words, last_values, last_metadata, first_values, first_metadata, rows, cols,
    WIDE: tl.constexpr, BF16: tl.constexpr, LAST: tl.constexpr, FIRST: tl.constexpr,
    TILE_R: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """TILE_R x TILE_C of x, compressed along C (LAST), R (FIRST) or both; `words` is x as 64-bit words."""
    TILES: tl.constexpr = TILE_R // 4
    GROUPS: tl.constexpr = TILE_C // 4
    first_tile, first_group = tl.program_id(1) * TILES, tl.program_id(0) * GROUPS
    r = (first_tile + tl.arange(0, TILES)) * 4
    front_0, back_0, a = _row(words, r, first_group, rows, cols, WIDE, BF16, TILES, GROUPS)
    front_1, back_1, b = _row(words, r + 1, first_group, rows, cols, WIDE, BF16, TILES, GROUPS)
    front_2, back_2, c = _row(words, r + 2, first_group, rows, cols, WIDE, BF16, TILES, GROUPS)
    front_3, back_3, d = _row(words, r + 3, first_group, rows, cols, WIDE, BF16, TILES, GROUPS)
    front, back = (front_0, front_1, front_2, front_3), (back_0, back_1, back_2, back_3)
    pattern = _best_pattern(a, b, c, d)
    if LAST:
        kept = _nibbles(pattern)
        pairs = _kept_pairs(front, back, kept)
        groups = cols // 4
        at = r.to(tl.int64)[:, None] * groups + (first_group + tl.arange(0, GROUPS))[None, :]
        for i in tl.static_range(4):
            tl.store(last_values + at + i * groups, pairs[i])
        _store_metadata_of_tiles(last_metadata, kept, first_tile, first_group, groups, TILES, GROUPS)
    if FIRST:
        kept = _nibbles(_transposed(pattern))
        upper = _columns(front[0], front[1], back[0], back[1])
        lower = _columns(front[2], front[3], back[2], back[3])
        pairs = _kept_pairs(upper, lower, kept)
        groups = rows // 4
        f = (first_group + tl.arange(0, GROUPS)) * 4
        at = f.to(tl.int64)[:, None] * groups + (first_tile + tl.arange(0, TILES))[None, :]
        for j in tl.static_range(4):
            tl.store(first_values + at + j * groups, tl.trans(pairs[j]))
        kept = tl.trans(kept)
        _store_metadata_of_tiles(first_metadata, kept, first_group, first_tile, groups, GROUPS, TILES)


@triton.jit
def _row(
    words, r, first, rows, cols,
    WIDE: tl.constexpr, BF16: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Four elements of rows r in 16 bits, as two words [TILES, GROUPS] of two, and their four magnitudes."""
    groups = cols // 4
    if WIDE:
        a, b, c, d = four_of_row(words, r, first, groups, rows, True, False, TILES // 8, GROUPS)
        front, back = pack_pair(a, b, BF16), pack_pair(c, d, BF16)
    else:
        word = tl.load(words + r.to(tl.int64)[:, None] * groups + (first + tl.arange(0, GROUPS))[None, :])
        a, b, c, d = unpack_four(word, BF16)
        front, back = word.to(tl.int32), (word >> 32).to(tl.int32)
    return front, back, (_bounded(a), _bounded(b), _bounded(c), _bounded(d))


@triton.jit
def _bounded(x):
    """min(|x|, MOST), NaN becoming MOST."""
    return tl.minimum(magnitude(x), MOST).to(tl.float32, bitcast=True)


@triton.jit
def _best_pattern(a, b, c, d):
    """`tile_search.best_pattern`, bit 8 r + c of the pattern, from four rows of four magnitudes."""
    above = (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3])
    below = (c[0] + d[0], c[1] + d[1], c[2] + d[2], c[3] + d[3])
    once_above, way_above = _each_once(a, b, 1)
    once_below, way_below = _each_once(c, d, 0x10000)
    best = (above[0] + below[2]) + (above[1] + below[3])
    pattern = tl.full(best.shape, 0x0C0C0303, tl.int32)
    for n in tl.static_range(1, 6):  # rows 0 and 1 keep the columns of pair n, rows 2 and 3 the others
        total = (above[K[n]] + below[K[5 - n]]) + (above[L[n]] + below[L[5 - n]])
        code = (0x101 << K[n]) | (0x101 << L[n]) | (0x1010000 << K[5 - n]) | (0x1010000 << L[5 - n])
        pattern = tl.where(total > best, code, pattern)
        best = tl.maximum(total, best)
    for i in tl.static_range(4):  # rows 0 and 1 share column i, rows 2 and 3 column j; pair n remains
        for j in tl.static_range(4):
            for n in tl.static_range(6):
                if i != j and (K[n] != i and L[n] != i) and (K[n] != j and L[n] != j):
                    total = (above[i] + below[j]) + (once_above[n] + once_below[n])
                    code = (way_above[n] | way_below[n]) | ((0x101 << i) | (0x1010000 << j))
                    pattern = tl.where(total > best, code, pattern)
                    best = tl.maximum(total, best)
    top, code_top = _all_once(once_above, way_above)
    bottom, code_bottom = _all_once(once_below, way_below)
    return tl.where(top + bottom > best, code_top | code_bottom, pattern)


@triton.jit
def _each_once(a, b, UNIT: tl.constexpr):
    """For each pair of columns k < l, the larger of a_k + b_l and a_l + b_k, and its bits of the pattern."""
    once_0, way_0 = _crossed(a, b, 0, UNIT)
    once_1, way_1 = _crossed(a, b, 1, UNIT)
    once_2, way_2 = _crossed(a, b, 2, UNIT)
    once_3, way_3 = _crossed(a, b, 3, UNIT)
    once_4, way_4 = _crossed(a, b, 4, UNIT)
    once_5, way_5 = _crossed(a, b, 5, UNIT)
    return (once_0, once_1, once_2, once_3, once_4, once_5), (way_0, way_1, way_2, way_3, way_4, way_5)


@triton.jit
def _crossed(a, b, N: tl.constexpr, UNIT: tl.constexpr):
    straight, swapped = a[K[N]] + b[L[N]], a[L[N]] + b[K[N]]
    l_then_k, k_then_l = UNIT << L[N] | (256 * UNIT) << K[N], UNIT << K[N] | (256 * UNIT) << L[N]
    way = tl.where(swapped > straight, l_then_k, k_then_l)
    return tl.maximum(straight, swapped), way


@triton.jit
def _all_once(once, way):
    """The best way of using all four columns once in two rows."""
    one, other = once[0] + once[5], once[1] + once[4]
    return tl.maximum(one, other), tl.where(other > one, way[1] | way[4], way[0] | way[5])


@triton.jit
def _nibbles(pattern):
    """Byte i: the metadata nibble i0 | i1 << 2 of row i, whose four bits of the pattern have i0 < i1 set."""
    down, down_2, up, up_2 = pattern >> 1, pattern >> 2, pattern << 1, pattern << 2
    low = (down & ~pattern & 0x01010101) | (down & down_2 & 0x02020202)
    return low | ((down | (up & up_2)) & 0x04040404) | ((pattern | up) & 0x08080808)


@triton.jit
def _transposed(pattern):
    """The pattern of the transposed tile: bit 8 c + r for bit 8 r + c."""
    swap = (pattern ^ (pattern >> 7)) & 0x000A000A
    pattern = pattern ^ swap ^ (swap << 7)
    swap = (pattern ^ (pattern >> 14)) & 0x00000C0C
    return pattern ^ swap ^ (swap << 14)


@triton.jit
def _columns(front_0, front_1, back_0, back_1):
    """The four columns of two rows, a word of two each."""
    return (
        permute(front_0, front_1, 0x5410),
        permute(front_0, front_1, 0x7632),
        permute(back_0, back_1, 0x5410),
        permute(back_0, back_1, 0x7632),
    )


@triton.jit
def _kept_pairs(front, back, kept):
    """The kept two of each of four rows, as words of two; byte i of `kept` is row i's nibble i0 | i1 << 2.

    A selector takes bytes 2 i0, 2 i0 + 1, 2 i1 and 2 i1 + 1 of the row's eight.
    """
    low = (kept & 0x03030303) * 0x22 + 0x10101010
    high = ((kept >> 2) & 0x03030303) * 0x22 + 0x10101010
    return (
        permute(front[0], back[0], permute(low, high, 0x40)),
        permute(front[1], back[1], permute(low, high, 0x51)),
        permute(front[2], back[2], permute(low, high, 0x62)),
        permute(front[3], back[3], permute(low, high, 0x73)),
    )


@triton.jit
def _store_metadata_of_tiles(
    metadata, kept, first_tile, first_group, groups, TILES: tl.constexpr, GROUPS: tl.constexpr
):
    """Write the nibbles [TILES, GROUPS] of 4 x 4 tiles, a row of the tile in each byte.

    A band of 16 rows is four tiles high: rows r and r + 8 belong to tiles t and t + 2.
    """
    BANDS: tl.constexpr = TILES // 4
    halves = tl.reshape(kept, (BANDS, 2, 2 * GROUPS)) << (tl.arange(0, 2) * 4)[None, :, None]
    both = tl.reshape(tl.xor_sum(halves, 1), (2 * BANDS, 1, GROUPS))
    byte = tl.reshape((both >> (tl.arange(0, 4) * 8)[None, :, None]) & 255, (8 * BANDS, GROUPS))
    band, row = band_rows(first_tile // 4, BANDS)
    store_metadata(metadata, band, row, first_group, groups, byte, BANDS, GROUPS)


@torch.library.custom_op("replicate::tile_prune24", mutates_args=())
def _tile_prune24_op(x: Tensor, last: bool, first: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return launch_tile_prune24(x, last, first, dtype, CONFIG_BOTH if last and first else CONFIG_ONE)


_tile_prune24_op.register_fake(buffers_of_both)


def launch_tile_prune24(
    x: Tensor, last: bool, first: bool, dtype: torch.dtype, config: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Buffers of P and of P^T from the kernel with a given tile, both axes multiples of 64; as asked for."""
    rows, cols = x.shape
    buffers = buffers_of_both(x, last, first, dtype)
    grid, config = fit_square(config, rows, cols)
    _tile_prune24_kernel[grid](
        as_words(x), *word_parts(buffers[0], cols), *word_parts(buffers[1], rows), rows, cols,
        WIDE=x.dtype == torch.float32, BF16=dtype == torch.bfloat16, LAST=last, FIRST=first, **config,
    )  # fmt: skip
    return buffers


def tile_prune24(
    x: Tensor, *, along_columns: bool = True, along_rows: bool = True, dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Compressed24 | None, Compressed24 | None]:  # fmt: skip
    """P [R, C] and P^T [C, R], x pruned to two of four along both axes, compressed from one read of x.

    Args:
        x: [R, C], float32, float16 or bfloat16, both multiples of 4; C a multiple of 64 for P, R for P^T.
        along_columns, along_rows: which of the two to make, P (groups run along C) and P^T (along R).
        dtype: of the result, float16 or bfloat16; by default x's, bfloat16 for float32. Another 16-bit type
            than x's is refused.
        backend: see `replicate.kernels.backend`.

    Returns:
        (P, P^T), None in place of one not asked for.

    Raises:
        ValueError: shape or dtype does not fit, or nothing is asked for.
    """
    check(along_columns or along_rows, "nothing is asked for: set along_columns or along_rows")
    dtype = check_either_axis("x", x, along_columns, along_rows, dtype)
    check(x.dtype in (dtype, torch.float32), f"x is {x.dtype} and dtype {dtype}; cast x")
    rows, cols = x.shape
    whole = rows % 4 == 0 and cols % 4 == 0
    check(whole, f"x has shape ({rows}, {cols}); tiles of 4 x 4 need multiples of 4: pad it with zeros")
    kind = layout(x.device, dtype)
    pad = (0, -cols % TILE, 0, -rows % TILE)
    padded = torch.nn.functional.pad(x, pad) if any(pad) else x
    if kind == "sm90" and engines.select(x.device, backend, dtype) != "reference":
        return matrices_of_both(_tile_prune24_op(padded, along_columns, along_rows, dtype), rows, cols)
    pruned = tile_prune24_reference(padded, dtype)

    def in_torch(dim: int) -> Compressed24:
        """The matrix without the rows that padding added."""
        out = compress_in_torch(*pruned, kind, dim)
        n = x.shape[1 - dim]
        return dataclasses.replace(out, rows=n, dense=None if out.dense is None else out.dense[:n])

    return in_torch(1) if along_columns else None, in_torch(0) if along_rows else None
