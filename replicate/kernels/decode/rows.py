"""A weight as decoding reads it: by rows, dense, or 2:4 along each row at 9/16 of the bytes in 16 bits.

    W1^T [F, D]    row f is what neuron f reads          W2 [F, D]    row f is what neuron f writes
    W2^T [D, F]    row d is what output d reads

A token at decoding takes as long as the bytes of weights that it reads, and a neuron that is not used need
not be read: so all of a neuron lies together. Compressed, a group is four adjacent numbers of a row, of which
two are kept, at positions p < q of the group:

    values [R, 2, C/4]       the first kept number of each group of the row, then the second
    positions [R, C/32]      int32, of eight groups: p + 4 q of group i in bits 4 i to 4 i + 3; rounded up

Words of eight groups: a thread reads eight numbers at a time, and fewer than four bytes are not copied ahead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from replicate.kernels.backend import HALF, check, tl, triton
from replicate.sparsity import check24, mask24

GROUPS = 8  # whose positions are one word; the kernels write 8, and 32 for their columns


class Rows(NamedTuple):
    """A matrix [R, C] by rows: `values` [R, C], or compressed, see the file, with `positions`."""

    values: Tensor
    positions: Tensor | None = None

    @property
    def two_of_four(self) -> bool:
        """True if compressed."""
        return self.positions is not None

    @property
    def size(self) -> tuple[int, int]:
        """R and C."""
        return self.values.shape[0], self.values[:1].numel() * (2 if self.two_of_four else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole matrix."""
        return self.values.nbytes + (self.positions.nbytes if self.two_of_four else 0)


def compress_rows(matrix: Tensor) -> Rows:
    """A matrix [R, C] of at most two non-zeros in each group of four of a row, compressed.

    It is done once for many tokens, in plain torch. Raises ValueError if the numbers do not have 16 bits, if
    C is no multiple of 16, or if the matrix is not 2:4.
    """
    check(matrix.dtype in HALF, f"matrix is {matrix.dtype}; only float16 and bfloat16 are compressed by rows")
    check(matrix.dim() == 2 and matrix.shape[1] % 16 == 0, f"matrix is {list(matrix.shape)}, not [R, 16 m]")
    check24(matrix, 1)
    kept = mask24(matrix, 1).unflatten(1, (-1, 4)).to(torch.uint8)
    first, second = kept.argmax(2), 3 - kept.flip(2).argmax(2)
    groups = matrix.unflatten(1, (-1, 4))
    values = torch.stack([groups.gather(2, at[..., None])[..., 0] for at in (first, second)], 1)
    codes = nn.functional.pad(first + 4 * second, (0, -first.shape[1] % GROUPS)).unflatten(1, (-1, GROUPS))
    words = (codes << 4 * torch.arange(GROUPS, device=matrix.device)).sum(2)
    return Rows(values, words.to(torch.int32))  # the top bit wraps to the sign


def rows_reference(rows: Rows) -> Tensor:
    """The matrix [R, C] in torch, not compressed."""
    if not rows.two_of_four:
        return rows.values
    shifts = 4 * torch.arange(GROUPS, device=rows.values.device)
    codes = (rows.positions[..., None] >> shifts).flatten(1)[:, : rows.values.shape[2]].long()
    groups = rows.values.new_zeros(*codes.shape, 4)
    for at, values in zip((codes & 3, codes >> 2 & 3), rows.values.unbind(1), strict=True):
        groups.scatter_(2, at[..., None], values[..., None])
    return groups.flatten(1)


@triton.jit
def load_kept(values, positions, row, inside, col, n_cols, COLS: tl.constexpr):
    """Both kept numbers of each group of COLS columns from `col` on and their positions, each [rows, COLS/4].

    Zero in rows not `inside` and past the edge.
    """
    n_groups, n_words = n_cols // 4, tl.cdiv(n_cols, 32)
    group = col // 4 + tl.arange(0, COLS // 4)
    present = inside[:, None] & (group < n_groups)[None, :]
    at = 2 * row.to(tl.int64)[:, None] * n_groups + group[None, :]
    first = tl.load(values + at, mask=present, other=0.0)
    second = tl.load(values + at + n_groups, mask=present, other=0.0)
    word = col // 32 + tl.arange(0, COLS // 32)
    at = row.to(tl.int64)[:, None] * n_words + word[None, :]
    bits = tl.load(positions + at, mask=inside[:, None] & (word < n_words)[None, :], other=0)
    bits = tl.broadcast_to(bits[:, :, None], (bits.shape[0], COLS // 32, 8)).reshape(bits.shape[0], COLS // 4)
    code = bits >> (4 * (group % 8))[None, :]
    return first, second, code & 3, (code >> 2) & 3


@triton.jit
def of_four(fours, place):
    """Of each four numbers of 16 bits, read as one int64, the one at a place, as its 16 bits."""
    return (fours >> (16 * place).to(tl.int64)).to(tl.int16)


@triton.jit
def load_rows(values, positions, row, inside, col, n_cols, COLS: tl.constexpr, TWO_FOUR: tl.constexpr):
    """Tile [rows, COLS] of the matrix, from column `col` on; zero in rows not `inside` and past the edge."""
    if TWO_FOUR:
        first, second, p, q = load_kept(values, positions, row, inside, col, n_cols, COLS)
        none = tl.zeros_like(first)
        w0 = tl.where(p == 0, first, none)
        w1 = tl.where(p == 1, first, tl.where(q == 1, second, none))
        w2 = tl.where(p == 2, first, tl.where(q == 2, second, none))
        w3 = tl.where(q == 3, second, none)
        tile = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last of its axes is the lower bit
        tile = tl.reshape(tile, (tile.shape[0], COLS))
    else:
        c = col + tl.arange(0, COLS)
        at = row.to(tl.int64)[:, None] * n_cols + c[None, :]
        tile = tl.load(values + at, mask=inside[:, None] & (c < n_cols)[None, :], other=0.0)
    return tile
