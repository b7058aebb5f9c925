"""2:4 and V:N:M sparsity in plain torch: the specification that every kernel is tested against.

Two-of-four keeps at most two non-zeros in each group of four along an axis (section 2.1). V:N:M, or
Venom, keeps 4 columns of M, shared by V rows, and N of those 4 in each row (section 2.3). Everything
here is vectorised, deterministic (ties go to the lower index), keeps the dtype, and lets NaN through.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask24(x: Tensor, dim: int = -1) -> Tensor:
    """Where the two largest magnitudes of each group of four along `dim` are.

    Args:
        x: any floating-point tensor whose size along `dim` is a multiple of 4.
        dim: the axis the groups of four run along; a product's reduction axis for sparse tensor cores.

    Returns:
        Boolean tensor of x's shape with exactly two True a group. Ties keep the lower index; NaN
        counts as larger than infinity, so that it survives.

    Raises:
        ValueError: x is not floating point, or `dim` is no multiple of 4.
    """
    return _join(_top_of_four(_split(_order_key(x), dim), 2), dim)


def prune24(x: Tensor, dim: int = -1) -> Tensor:
    """x with all but the two largest magnitudes of each group of four along `dim` set to zero, see `mask24`.

    Raises ValueError if x is not floating point, or `dim` is no multiple of 4.
    """
    return torch.where(mask24(x, dim), x, torch.zeros_like(x))


def soft_threshold24(w: Tensor, dim: int = -1, scale: float | Tensor | None = None) -> Tensor:
    """2:4 soft thresholding (section 2.2): f(a) = sign(a) max(|a| - t, 0) in each group of four along `dim`.

    t is the second-smallest magnitude of the group. Unlike top-2 pruning f is continuous in w: an
    element enters and leaves at value zero. NaN counts as larger than infinity, as in `mask24`, outside
    of whose two elements all is zero; where t is NaN (three of a group), these two are NaN.

    Args:
        w: floating-point tensor; `dim` a multiple of 4.
        dim: the axis of the groups of four.
        scale: None is the paper's f; a number multiplies f, as S-STE's frozen beta does (`soft_scale`).

    Returns:
        Tensor of w's shape and dtype, computed in at least float32 with one rounding at the end.

    Raises:
        ValueError: w is not floating point, or `dim` is no multiple of 4.
    """
    check_float(w)
    check_groups(w, dim)
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    mag = wide.abs()
    a, b, c, d = four = _split(_order_key(w), dim)
    low = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
    high = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    t = torch.minimum(low, high).view(w.dtype).to(wide.dtype).repeat_interleave(4, dim)
    out = torch.where(mag <= t, torch.zeros_like(wide), torch.copysign(mag - t, wide))
    out = torch.where(_join(_top_of_four(four, 2), dim), out, torch.zeros_like(out))  # matters if t is NaN
    return (out if scale is None else out * scale).to(w.dtype)


def soft_scale(w: Tensor, dim: int = -1) -> float:
    """S-STE's scale beta = <w, f(w)> / ||f(w)||^2, which makes beta f(w) closest to w in least squares.

    Returns 1.0 when f(w) is all zero. S-STE (2409.09099) computes it once and freezes it.
    """
    f = soft_threshold24(w.double(), dim)
    norm = f.square().sum()
    return float((w.double() * f).sum() / norm) if norm > 0 else 1.0


def venom_mask(x: Tensor, v: int, m: int, n: int = 2) -> Tensor:
    """V:N:M mask: each block of v rows x m columns keeps 4 columns, and each row n of those 4.

    Columns are chosen by magnitude summed over the block's rows, then elements by magnitude within
    their row; both with ties to the lower index. The sparsity is 1 - n / m (Table 5).

    Args:
        x: [R, C] with R a multiple of v and C a multiple of m.
        v: rows of a block. m: columns of a block, at least 4. n: 1 to 4 kept of the 4.

    Returns:
        Boolean [R, C] with n R C / m True.

    Raises:
        ValueError: x is not floating point, or a shape or one of v, m, n does not fit.
    """
    check_float(x)
    rows, cols = _check_blocks(x, v, m, n)
    blocks = x.reshape(rows // v, v, cols // m, m)
    weight = blocks.abs().to(torch.promote_types(x.dtype, torch.float32)).sum(1)  # [R/v, C/m, m]
    columns = weight.argsort(dim=-1, descending=True, stable=True)[..., :4].sort(-1).values
    four = blocks.gather(-1, columns.unsqueeze(1).expand(-1, v, -1, -1))
    kept = _join(_top_of_four(_split(_order_key(four), -1), n), -1)
    # Gathered back, not scattered: in torch's deterministic mode a scatter sorts all of its indices.
    is_column = columns.unsqueeze(-1) == torch.arange(m, device=x.device)  # [R/v, C/m, 4, m]
    place = is_column.to(torch.uint8).argmax(-2)  # which of the 4 a column is, if any
    kept = kept.gather(-1, place.unsqueeze(1).expand(-1, v, -1, -1))
    return (kept & is_column.any(-2).unsqueeze(1)).reshape(rows, cols)


def check24(x: Tensor, dim: int = -1) -> None:
    """Raise ValueError naming the first group of four along `dim` with more than two non-zeros."""
    check_groups(x, dim)
    counts = (x != 0).movedim(dim, -1).unflatten(-1, (-1, 4)).sum(-1)
    bad = (counts > 2).nonzero()
    if len(bad):
        *where, group = bad[0].tolist()
        raise ValueError(
            f"not 2:4 along dim {dim}: group {group} (elements {4 * group} to {4 * group + 3}) at "
            f"{tuple(where)} has {counts[tuple(bad[0])].item()} non-zeros"
        )


def check_venom(x: Tensor, v: int, m: int, n: int = 2) -> None:
    """Raise ValueError naming the first block of v x m that is not V:N:M.

    A block may have non-zeros in at most 4 columns, and at most n in each row.
    """
    rows, cols = _check_blocks(x, v, m, n)
    nonzero = (x != 0).reshape(rows // v, v, cols // m, m).movedim(2, 1)
    columns = nonzero.any(2).sum(-1)
    bad = (columns > 4).nonzero()
    if len(bad):
        i, j = bad[0].tolist()
        raise ValueError(
            f"not V:N:M: the block of rows {i * v} to {i * v + v - 1}, columns {j * m} to "
            f"{j * m + m - 1} uses {columns[i, j].item()} columns, at most 4 may be non-zero"
        )
    per_row = nonzero.sum(-1)
    bad = (per_row > n).nonzero()
    if len(bad):
        i, j, r = bad[0].tolist()
        raise ValueError(
            f"not V:N:M: row {i * v + r} has {per_row[i, j, r].item()} non-zeros in columns {j * m} "
            f"to {j * m + m - 1}, at most n = {n} may be there"
        )


def flip_rate(mask_a: Tensor, mask_b: Tensor) -> float:
    """Share of positions where two masks of one shape differ, ||a xor b||_1 / numel (S-STE's r_k).

    Raises ValueError if the shapes differ, or the masks are empty.
    """
    if mask_a.shape != mask_b.shape:
        raise ValueError(f"masks of shapes {tuple(mask_a.shape)} and {tuple(mask_b.shape)} do not compare")
    if mask_a.numel() == 0:
        raise ValueError("flip_rate of empty masks is undefined; give masks with at least one element")
    return float((mask_a.bool() ^ mask_b.bool()).double().mean())


def sparsity(x: Tensor) -> float:
    """Share of the elements of x that are exactly zero. Raises ValueError for an empty tensor."""
    if x.numel() == 0:
        raise ValueError("the sparsity of an empty tensor is undefined")
    return float((x == 0).double().mean())


def _order_key(x: Tensor) -> Tensor:
    """Integers that order like |x|, with NaN above infinity: the bits without the sign."""
    check_float(x)
    as_int = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().abs().contiguous().view(as_int)


def _top_of_four(four: list[Tensor], n: int) -> list[Tensor]:
    """For each of four tensors, where it is among the n largest; the earlier one wins a tie."""
    a, b, c, d = four
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    wins = [(ab, ac, ad), (~ab, bc, bd), (~ac, ~bc, cd), (~ad, ~bd, ~cd)]
    if n == 2:
        return [(p & q) | (r & (p | q)) for p, q, r in wins]
    return [p.to(torch.int8) + q + r >= 4 - n for p, q, r in wins]


def _split(x: Tensor, dim: int) -> list[Tensor]:
    """The four members of each group along `dim`, as four tensors of a quarter of the size."""
    check_groups(x, dim)
    dim %= x.dim()
    return list(x.unflatten(dim, (-1, 4)).unbind(dim + 1))


def _join(four: list[Tensor], dim: int) -> Tensor:
    """Inverse of `_split`."""
    dim %= four[0].dim()
    return torch.stack(four, dim + 1).flatten(dim, dim + 1)


def check_float(x: Tensor) -> None:
    """Raise ValueError unless x is floating point."""
    if not x.is_floating_point():
        raise ValueError(f"the tensor is {x.dtype}; sparsity by magnitude needs a floating-point one")


def check_groups(x: Tensor, dim: int) -> None:
    """Raise ValueError unless x has whole groups of four along `dim`."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim {dim} is not an axis of a tensor of shape {tuple(x.shape)}")
    if x.shape[dim] % 4:
        raise ValueError(
            f"size {x.shape[dim]} along dim {dim} of shape {tuple(x.shape)} is no multiple of 4; "
            f"pad it to {-(-x.shape[dim] // 4) * 4}"
        )


def _check_blocks(x: Tensor, v: int, m: int, n: int) -> tuple[int, int]:
    if x.dim() != 2:
        raise ValueError(f"V:N:M needs a matrix, got shape {tuple(x.shape)}; flatten the leading axes")
    if m < 4 or v < 1 or not 1 <= n <= 4:
        raise ValueError(f"v, n, m = {v}, {n}, {m}; choose v >= 1, n from 1 to 4 and m >= 4")
    rows, cols = x.shape
    if rows % v or cols % m:
        raise ValueError(
            f"shape {rows} x {cols} does not divide into blocks of v = {v} rows x m = {m} columns"
        )
    return rows, cols
