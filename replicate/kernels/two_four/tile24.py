"""Device functions the 2:4 kernels share: groups of four in registers, two of four, the metadata layout.

A kernel's tile has rows in bands of 16: rows r and r + 8 of a band share metadata bytes, so every kernel
keeps them as two tensors, "upper" and "lower", of 8 rows a band. A column of a tile is a group of four
elements: one 64-bit word of a dense matrix, one 32-bit word of kept values. Working on whole words keeps
a group inside one thread; splitting a last axis of four would pass it through shared memory.
"""

from __future__ import annotations

from replicate.kernels.backend import INTERPRETED, tl, triton


@triton.jit
def unpack_pair(word, BF16: tl.constexpr):
    """The two 16-bit floats of a 32-bit word, as float32."""
    if BF16:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def unpack_four(word, BF16: tl.constexpr):
    """The four 16-bit floats of a 64-bit word, as float32."""
    a, b = unpack_pair(word.to(tl.int32), BF16)
    c, d = unpack_pair((word >> 32).to(tl.int32), BF16)
    return a, b, c, d


@triton.jit
def four_of_row(
    words, r, first, groups, rows,
    WIDE: tl.constexpr, BF16_IN: tl.constexpr, BANDS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Four adjacent elements of rows r as float32 [8 BANDS, GROUPS]; `words` holds two or four in 64 bits."""
    mask = (r < rows)[:, None]
    if WIDE:
        at = r.to(tl.int64)[:, None] * (2 * groups) + (2 * first + tl.arange(0, 2 * GROUPS))[None, :]
        pairs = tl.load(words + at, mask=mask, other=0)
        front, back = tl.split(tl.reshape(pairs, (8 * BANDS, GROUPS, 2)))
        a = front.to(tl.int32).to(tl.float32, bitcast=True)
        b = (front >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        c = back.to(tl.int32).to(tl.float32, bitcast=True)
        d = (back >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        at = r.to(tl.int64)[:, None] * groups + (first + tl.arange(0, GROUPS))[None, :]
        a, b, c, d = unpack_four(tl.load(words + at, mask=mask, other=0), BF16_IN)
    return a, b, c, d


@triton.jit
def four_of_column(w, g, f, f_cols):
    """Four adjacent elements of each column as float32 [groups, columns]."""
    at = w + (g * 4).to(tl.int64)[:, None] * f_cols + f[None, :]
    mask = (f < f_cols)[None, :]
    a = tl.load(at, mask=mask, other=0).to(tl.float32)
    b = tl.load(at + f_cols, mask=mask, other=0).to(tl.float32)
    c = tl.load(at + 2 * f_cols, mask=mask, other=0).to(tl.float32)
    d = tl.load(at + 3 * f_cols, mask=mask, other=0).to(tl.float32)
    return a, b, c, d


@triton.jit
def pack_pair(low, high, BF16: tl.constexpr):
    """Two float32 rounded to 16 bits, as one 32-bit word."""
    if BF16:
        low16 = low.to(tl.bfloat16).to(tl.int16, bitcast=True)
        high16 = high.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        low16 = low.to(tl.float16).to(tl.int16, bitcast=True)
        high16 = high.to(tl.float16).to(tl.int16, bitcast=True)
    return (low16.to(tl.int32) & 0xFFFF) | (high16.to(tl.int32) << 16)


@triton.jit
def magnitude(x):
    """|x| of float32 as integer bits, which order like the magnitudes, NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def two_of_four(a, b, c, d):
    """Which two of four integers are largest, ties to the earlier: (a and b; c and d; a >= b; c >= d).

    Unless both of a pair are kept, the larger of each pair is. Non-negative floats order like their bits,
    with NaN above infinity.
    """
    both_ab = tl.minimum(a, b) >= tl.maximum(c, d)
    both_cd = tl.minimum(c, d) > tl.maximum(a, b)
    return both_ab, both_cd, a >= b, c >= d


@triton.jit
def kept_nibble(both_ab, both_cd, a_top, c_top):
    """The metadata nibble i0 | i1 << 2 of the kept positions i0 < i1."""
    return tl.where(both_ab, 4, tl.where(both_cd, 14, tl.where(a_top, 0, 1) | tl.where(c_top, 8, 12)))


@triton.jit
def spread(pair, nibble):
    """A group as a 64-bit word: two kept 16-bit values at their positions, zeros elsewhere."""
    low = (pair & 0xFFFF).to(tl.int64) << ((nibble & 3) * 16).to(tl.int64)
    high = ((pair >> 16) & 0xFFFF).to(tl.int64) << ((nibble >> 2) * 16).to(tl.int64)
    return low | high


@triton.jit
def gather(word, nibble):
    """The two elements of a 64-bit word at the positions of a nibble, as one 32-bit word."""
    low = (word >> ((nibble & 3) * 16).to(tl.int64)).to(tl.int32) & 0xFFFF
    high = (word >> ((nibble >> 2) * 16).to(tl.int64)).to(tl.int32) << 16
    return low | high


@triton.jit
def permute(a, b, selector):
    """PTX's prmt: byte i of the result is byte d of the word b:a of 64 bits, d the selector's hex digit i."""
    if INTERPRETED:
        word = (a.to(tl.int64) & 0xFFFFFFFF) | (b.to(tl.int64) << 32)
        out = tl.zeros_like(word)
        for i in tl.static_range(4):
            digit = tl.zeros_like(word) + ((selector >> (4 * i)) & 7)
            out |= ((word >> (8 * digit)) & 255) << (8 * i)
        out = out.to(tl.int32)
    else:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit
def band_rows(first_band, BANDS: tl.constexpr):
    """(band, row in it) of a tile's 8 BANDS rows; the upper row is 16 band + row, the lower one 8 more."""
    i = tl.arange(0, 8 * BANDS)
    return first_band + i // 8, i % 8


@triton.jit
def store_metadata(metadata, band, row, first_group, groups, byte, BANDS: tl.constexpr, GROUPS: tl.constexpr):
    """Write bytes [8 BANDS, GROUPS], upper nibble | lower nibble << 4, in cuSPARSELt's sm_90 layout.

    Eight groups of both rows are 16 nibbles, one 64-bit word, written as two halves: byte
    2 (g % 4) + (g // 4) % 2 belongs to group g.
    """
    ROWS: tl.constexpr = 8 * BANDS
    byte = tl.reshape(byte, (ROWS, GROUPS // 2, 2))
    pair = tl.xor_sum(byte << (tl.arange(0, 2) * 16)[None, None, :], 2)
    quad = tl.reshape(pair, (ROWS, GROUPS // 8, 2, 2))
    half = tl.xor_sum(quad << (tl.arange(0, 2) * 8)[None, None, :, None], 2)
    word = metadata_words(band, row, first_group, groups, GROUPS)
    tl.store(metadata + word[:, :, None] * 2 + tl.arange(0, 2)[None, None, :], half)


@triton.jit
def metadata_words(band, row, first_group, groups, GROUPS: tl.constexpr):
    """Offsets [8 BANDS, GROUPS / 8] of the tile's 64-bit metadata words."""
    octet = first_group // 8 + tl.arange(0, GROUPS // 8)
    of_row = (band // 4).to(tl.int64) * (groups // 16) * 64 + (band % 4) * 8 + row
    return of_row[:, None] + ((octet // 2) * 64 + (octet % 2) * 32)[None, :]


@triton.jit
def nibbles(word, BANDS: tl.constexpr, GROUPS: tl.constexpr):
    """The nibbles [8 BANDS, GROUPS] of upper and lower rows, from metadata words."""
    quad = word[:, :, None] >> (tl.arange(0, 2) * 8).to(tl.int64)[None, None, :]
    byte = quad[:, :, :, None] >> (tl.arange(0, 4) * 16).to(tl.int64)[None, None, None, :]
    byte = tl.reshape(byte.to(tl.int32), (8 * BANDS, GROUPS))
    return byte & 15, (byte >> 4) & 15
