"""The search for a tile's best transposable pattern by 19 sums instead of 90, as the kernel makes it.

Rows 0 and 1 use each column twice, once or never, and rows 2 and 3 complement them. The best way of using two
columns k < l once in each half does not depend on the other columns. `ablations.transposable_mask` is the
specification; both agree where the sums are exact.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from replicate.ablations import check_tiles

# The six pairs of columns k < l; pair 5 - n has the columns that pair n has not.
PAIRS_K, PAIRS_L = (0, 0, 0, 1, 1, 2), (1, 2, 3, 2, 3, 3)


def tile_mask(x: Tensor) -> Tensor:
    """`transposable_mask` [R, C] of x, by sums rounded as the kernel rounds them, in at least float32."""
    check_tiles(x)
    rows, cols = x.shape
    tiles = x.detach().abs().reshape(rows // 4, 4, cols // 4, 4).movedim(2, 1)
    wide = tiles.to(torch.promote_types(x.dtype, torch.float32))
    top = torch.finfo(wide.dtype).max / 8  # sums of eight stay finite
    code = best_pattern(wide.nan_to_num(nan=top).clamp_max(top))
    bits = code[..., None] >> torch.arange(16, device=x.device) & 1
    return bits.bool().unflatten(-1, (4, 4)).movedim(1, 2).reshape(rows, cols)


def best_pattern(tiles: Tensor) -> Tensor:
    """The pattern of tiles [..., 4, 4] >= 0, as an integer: bit 4 r + c. Adds as the kernel does."""
    k, l = PAIRS_K, PAIRS_L
    row, below = tiles[..., 0::2, :], tiles[..., 1::2, :]  # rows 0 and 2, rows 1 and 3: [..., half, 4]
    twice = row + below
    straight, swapped = row[..., k] + below[..., l], row[..., l] + below[..., k]
    once = torch.maximum(straight, swapped)  # [..., half, 6]
    unit = torch.tensor([[1], [1 << 8]], device=tiles.device)
    k_bit, l_bit = (unit << torch.tensor(columns, device=tiles.device) for columns in (k, l))
    ways = torch.where(swapped > straight, l_bit | k_bit << 4, k_bit | l_bit << 4)

    twice = twice[..., 0, :, None] + twice[..., 1, None, :]  # column i above, j below
    sums = [twice[..., k[n], k[5 - n]] + twice[..., l[n], l[5 - n]] for n in range(6)]
    codes = [
        ways.new_tensor(17 << k[n] | 17 << l[n] | 17 << k[5 - n] + 8 | 17 << l[5 - n] + 8) for n in range(6)
    ]
    both_once, both_ways = once.sum(-2), ways.sum(-2)
    for i, j in itertools.permutations(range(4), 2):
        rest = 5 - [*zip(k, l)].index((min(i, j), max(i, j)))
        sums.append(twice[..., i, j] + both_once[..., rest])
        codes.append(both_ways[..., rest] | 17 << i | 17 << j + 8)
    first, second = once[..., 0] + once[..., 5], once[..., 1] + once[..., 4]
    sums.append(torch.maximum(first, second).sum(-1))
    ways = torch.where(second > first, ways[..., 1] | ways[..., 4], ways[..., 0] | ways[..., 5])
    codes.append(ways.sum(-1))
    best = torch.stack(sums, -1).argmax(-1, keepdim=True)
    return torch.stack(torch.broadcast_tensors(*codes), -1).gather(-1, best).squeeze(-1)
