"""A weight as decoding reads it: by rows, dense, or 2:4 along each row at 9/16 of the bytes in 16 bits.

    W1^T [F, D]    row f is what neuron f reads          W2 [F, D]    row f is what neuron f writes
    W2^T [D, F]    row d is what output d reads

A token at decoding takes as long as the bytes of weights that it reads, and a neuron that is not used need
not be read: so all of a neuron lies together. Compressed, a group is four adjacent numbers of a row, of which
two are kept, at positions p < q of the group:

    values [R, 2, C/4]       the first kept number of each group of the row, then the second
    positions [R, C/8]       uint8, of two groups: p + 4 q of the first + 16 (p + 4 q of the second)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from replicate.kernels.backend import check, tl, triton
from replicate.sparsity import check24, mask24


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

    It is done once for many tokens, in plain torch. Raises ValueError if C is no multiple of 8, or if the
    matrix is not 2:4.
    """
    check(matrix.dim() == 2 and matrix.shape[1] % 8 == 0, f"matrix is {list(matrix.shape)}, not [R, 8 m]")
    check24(matrix, 1)
    kept = mask24(matrix, 1).unflatten(1, (-1, 4)).to(torch.uint8)
    first, second = kept.argmax(2), 3 - kept.flip(2).argmax(2)
    groups = matrix.unflatten(1, (-1, 4))
    values = torch.stack([groups.gather(2, at[..., None])[..., 0] for at in (first, second)], 1)
    both = first + 4 * second
    return Rows(values, (both[:, ::2] + 16 * both[:, 1::2]).to(torch.uint8))


def rows_reference(rows: Rows) -> Tensor:
    """The matrix [R, C] in torch, not compressed."""
    if not rows.two_of_four:
        return rows.values
    both = torch.stack([rows.positions & 15, rows.positions >> 4], 2).flatten(1).long()
    groups = rows.values.new_zeros(*both.shape, 4)
    for at, values in zip((both & 3, both >> 2), rows.values.unbind(1), strict=True):
        groups.scatter_(2, at[..., None], values[..., None])
    return groups.flatten(1)


@triton.jit
def load_kept(values, positions, row, present, group, n_groups):
    """Both kept numbers and their positions in the group, each [rows, groups]; zero where not `present`."""
    at = 2 * row.to(tl.int64)[:, None] * n_groups + group[None, :]
    first = tl.load(values + at, mask=present, other=0.0)
    second = tl.load(values + at + n_groups, mask=present, other=0.0)
    pair = row.to(tl.int64)[:, None] * (n_groups // 2) + (group // 2)[None, :]
    byte = tl.load(positions + pair, mask=present, other=0).to(tl.int32)
    both = byte >> (4 * (group % 2))[None, :]
    return first, second, both & 3, (both >> 2) & 3


@triton.jit
def load_rows(values, positions, row, inside, col, n_cols, COLS: tl.constexpr, TWO_FOUR: tl.constexpr):
    """Tile [rows, COLS] of the matrix, from column `col` on; zero in rows not `inside` and past the edge."""
    if TWO_FOUR:
        group = col // 4 + tl.arange(0, COLS // 4)
        present = inside[:, None] & (group < n_cols // 4)[None, :]
        first, second, p, q = load_kept(values, positions, row, present, group, n_cols // 4)
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
