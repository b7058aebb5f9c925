"""2:4 and V:N:M sparsity in plain torch: the specification that every kernel is tested against.

Two-of-four keeps at most two non-zeros in each group of four along an axis (section 2.1). V:N:M, or
Venom, keeps 4 columns of M, shared by V rows, and N of those 4 in each row (section 2.3). Everything
here is vectorised, deterministic (ties go to the lower index), keeps the dtype, and lets NaN through.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from replicate.config import SELECTIONS

# The six pairs of columns k < l; pair 5 - n has the columns that pair n has not.
PAIRS_K, PAIRS_L = (0, 0, 0, 1, 1, 2), (1, 2, 3, 2, 3, 3)


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
    _check_float(w)
    _check_groups(w, dim)
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
    _check_float(x)
    rows, cols = _check_blocks(x, v, m, n)
    blocks = x.reshape(rows // v, v, cols // m, m).movedim(2, 1)  # [R/v, C/m, v, m]
    weight = blocks.abs().to(torch.promote_types(x.dtype, torch.float32)).sum(2)
    columns = weight.argsort(dim=-1, descending=True, stable=True)[..., :4].sort(-1).values
    columns = columns.unsqueeze(2).expand(-1, -1, v, -1)
    four = blocks.gather(-1, columns)
    kept = _join(_top_of_four(_split(_order_key(four), -1), n), -1)
    mask = torch.zeros(blocks.shape, dtype=torch.bool, device=x.device).scatter(-1, columns, kept)
    return mask.movedim(1, 2).reshape(rows, cols)


def check24(x: Tensor, dim: int = -1) -> None:
    """Raise ValueError naming the first group of four along `dim` with more than two non-zeros."""
    _check_groups(x, dim)
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


def mvue24(x: Tensor, dim: int = -1, generator: torch.Generator | None = None) -> Tensor:
    """Minimum-variance unbiased 2:4 estimate of x (2203.10991): E[mvue24(x)] = x.

    Of each four, two are drawn without replacement with inclusion probability p_i = min(1, c |x_i|),
    sum p_i = 2, and divided by p_i. Systematic sampling meets these probabilities exactly: element i is
    drawn when its interval of the running sum of p covers u or u + 1, u uniform.

    Args:
        x: floating-point tensor; `dim` a multiple of 4.
        generator: source of the draws; None uses torch's default one.

    Raises:
        ValueError: x is not floating point, or `dim` is no multiple of 4.
    """
    _check_float(x)
    _check_groups(x, dim)
    groups = x.movedim(dim, -1).unflatten(-1, (-1, 4)).to(torch.promote_types(x.dtype, torch.float32))
    tiny = torch.finfo(groups.dtype).tiny
    mag = groups.abs().clamp_max(torch.finfo(groups.dtype).max / 8)  # sums stay finite
    is_top = torch.arange(4, device=x.device) == mag.argmax(-1, keepdim=True)
    top = mag.amax(-1, keepdim=True)
    rest = mag.masked_fill(is_top, 0).sum(-1, keepdim=True)
    capped = torch.where(is_top, torch.ones_like(mag), mag / rest.clamp_min(tiny))
    p = torch.where(top >= rest, capped, 2 * mag / (top + rest).clamp_min(tiny))
    u = torch.rand(top.shape, generator=generator, device=x.device, dtype=p.dtype)
    high = p.cumsum(-1)
    low = torch.cat([torch.zeros_like(u), high[..., :-1]], -1)
    # Two points in disjoint intervals draw two at most, however the sums of p are rounded.
    drawn = ((low <= u) & (u < high)) | ((low <= u + 1) & (u + 1 < high))
    kept = torch.where(drawn & (mag > 0), groups / p.clamp_min(tiny), torch.zeros_like(groups))
    kept = torch.where(groups.isnan(), groups, kept)
    return kept.flatten(-2).movedim(-1, dim).to(x.dtype)


def transposable_mask(w: Tensor) -> Tensor:
    """Mask that is 2:4 along both axes: in each 4 x 4 tile the best of the 90 patterns (2404.01847).

    "Best" keeps the largest summed magnitude. The search is exhaustive; its sums are rounded, in float32 or
    in w's dtype if that is wider, so patterns closer than that rounding count as equal. NaN, infinity and
    the largest numbers count alike, as more than the rest.

    Ties keep the first pattern in this order: rows 0 and 1 keep the same two columns (01, 02, 03, 12, 13,
    23); they share a column i, and rows 2 and 3 a column j (by i, then j, then the lower other column in
    row 0, then in row 2); they share none (row 0, then row 2, keeps 02, 03, 12, 13, 01, 23).

    Args:
        w: [R, C], both multiples of 4.

    Returns:
        Boolean [R, C] with two True in each group of four of every row and every column.

    Raises:
        ValueError: w is not floating point, or does not tile by 4 x 4.
    """
    _check_float(w)
    if w.dim() != 2 or w.shape[0] % 4 or w.shape[1] % 4:
        fix = [-(-size // 4) * 4 for size in w.shape]
        raise ValueError(
            f"shape {tuple(w.shape)} does not tile by 4 x 4; "
            + (f"pad it to {tuple(fix)}" if w.dim() == 2 else "use a matrix")
        )
    rows, cols = w.shape
    tiles = w.detach().abs().reshape(rows // 4, 4, cols // 4, 4).movedim(2, 1)
    wide = tiles.to(torch.promote_types(w.dtype, torch.float32))
    top = torch.finfo(wide.dtype).max / 8  # sums of eight stay finite
    code = _best_pattern(wide.nan_to_num(nan=top).clamp_max(top))
    bits = code[..., None] >> torch.arange(16, device=w.device) & 1
    return bits.bool().unflatten(-1, (4, 4)).movedim(1, 2).reshape(rows, cols)


def select24(y: Tensor, method: str = "magnitude", score: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The neuron-level 2:4 activation: keep two of every four adjacent neurons of each token.

    Args:
        y: activations [..., F], F a multiple of 4.
        method: "magnitude" keeps the two largest; "soft" also subtracts the second-smallest magnitude
            from them (section 2.2 on activations); "learned" ranks by |y_f| exp(score_f); "static"
            always keeps the first two of four, the control.
        score: learned scores [F], for "learned" only.

    Returns:
        (values [..., F] in y's dtype, mask [..., F] bool).

    Raises:
        ValueError: unknown method, F no multiple of 4, or score missing or of the wrong shape.
    """
    if method == "magnitude":
        mask = mask24(y)
    elif method == "soft":
        return soft_threshold24(y), mask24(y)
    elif method == "learned":
        if score is None or score.shape != y.shape[-1:]:
            got = None if score is None else tuple(score.shape)
            raise ValueError(f"method 'learned' needs a score of shape ({y.shape[-1]},), got {got}")
        mask = mask24(y.abs().to(torch.promote_types(y.dtype, torch.float32)) * score.exp())
    elif method == "static":
        _check_groups(y, -1)
        mask = (torch.arange(y.shape[-1], device=y.device) % 4 < 2).expand(y.shape)
    else:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(SELECTIONS)}")
    return torch.where(mask, y, torch.zeros_like(y)), mask


def _order_key(x: Tensor) -> Tensor:
    """Integers that order like |x|, with NaN above infinity: the bits without the sign."""
    _check_float(x)
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
    _check_groups(x, dim)
    dim %= x.dim()
    return list(x.unflatten(dim, (-1, 4)).unbind(dim + 1))


def _join(four: list[Tensor], dim: int) -> Tensor:
    """Inverse of `_split`."""
    dim %= four[0].dim()
    return torch.stack(four, dim + 1).flatten(dim, dim + 1)


def _check_float(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"the tensor is {x.dtype}; sparsity by magnitude needs a floating-point one")


def _check_groups(x: Tensor, dim: int) -> None:
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


def _best_pattern(tiles: Tensor) -> Tensor:
    """The pattern of `transposable_mask` for tiles [..., 4, 4] >= 0, as an integer: bit 4 r + c.

    Rows 0 and 1 use each column twice, once or never, and rows 2 and 3 complement them. The best way of
    using two columns k < l once in each half does not depend on the other columns, so 19 sums stand for
    the 90 patterns. Kernels add in the same order, to round alike.
    """
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
