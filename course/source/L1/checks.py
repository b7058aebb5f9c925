"""What the tests of lab L1 call: each function takes an answer, tries it, and names its mistake."""

import marking
import numpy as np
import torch
from marking import NotYet, right, show

__all__ = ["is24", "mask24", "planted", "right", "soft_threshold24", "thresholded", "venom_mask"]
MOVED = "has the right entries at wrong places: undo the changes of the axes, in reverse order."
ORDINAL = ("smallest", "second-smallest", "second-largest", "largest")


def is24(answer, cases):
    """Task 1. `cases` are (rows, dim, is it 2:4, what to say if the answer says otherwise)."""
    for rows, dim, wanted, why in cases:
        got = marking.run(answer, torch.as_tensor(rows), dim)
        if isinstance(got, torch.Tensor) and got.numel() != 1:
            raise NotYet(
                f"is24 returns a tensor of shape {list(got.shape)}. It should be one answer for all groups."
            )
        if not isinstance(got, bool | np.bool_ | torch.Tensor):
            raise NotYet(f"is24 returns a {type(got).__name__}. It should be True or False.")
        if bool(got) != wanted:
            raise NotYet(f"is24({_matrix(rows)}, dim={dim}) is {bool(got)}. It should be {wanted}: {why}")


def mask24(answer, x, dim=-1):
    """Task 2. The mask is fixed by what it must have, so x may be any tensor."""
    mask = marking.run(answer, x, dim)
    size = _groups(x.abs(), dim)
    right_one = _shaped_as(mask, x) and _two_largest(_groups(mask.bool(), dim), size).all()
    if not right_one and any(
        _two_largest(_groups(m.bool(), dim), size).all() for m in _put_back(mask, x, dim)
    ):
        raise NotYet(f"With dim={dim} the mask {MOVED}")
    _is_mask("mask24", mask, x)
    if right_one:
        return
    kept = _groups(mask, dim)
    signed = _groups(x, dim)
    for other in range(x.dim()):
        if other == dim % x.dim() or x.shape[other] % 4:
            continue
        if _two_largest(_groups(mask, other), _groups(x.abs(), other)).all():
            raise NotYet(
                f"mask24 prunes {_direction(other, x)} (axis {other}), not {_direction(dim % x.dim(), x)}: "
                f"dim={dim} was asked for. Four numbers that follow each other along `dim` are a group."
            )
    if _two_largest(kept, signed).all():
        at = tuple((~_two_largest(kept, size)).nonzero()[0].tolist())
        raise NotYet(
            f"mask24 keeps the two largest numbers, not the two largest magnitudes: see the group "
            f"{show(signed[at])}. A large negative number counts as much as a positive one."
        )
    if _two_largest(kept, -size).all():
        raise NotYet("mask24 keeps the two smallest magnitudes. It should keep the two largest.")
    if _two_largest(_strided(mask, dim), _strided(x.abs(), dim)).all():
        raise NotYet(
            "The groups of mask24 are no neighbours: it takes one entry from each quarter. Along `dim`, "
            "entries 0 to 3 are the first group, entries 4 to 7 the second."
        )
    _name_a_group(kept, size, signed)


def soft_threshold24(answer, w, wanted, dim=-1):
    """Task 3, on w, whose result is known because w was made from it, see `thresholded`."""
    got = marking.run(answer, w, dim)
    moved = any(marking.is_close(one, wanted) for one in _put_back(got, w, dim))
    if moved and not marking.is_close(got, wanted):
        raise NotYet(f"With dim={dim} the result {MOVED}")
    marking.shaped("The result", got, w.shape)
    if got.dtype == torch.bool:
        raise NotYet(
            "soft_threshold24 returns a mask. It should return the weights themselves, made smaller by t."
        )
    rows, result, right_ones = _groups(w, dim), _groups(got, dim), _groups(wanted, dim)
    bad = ((result - right_ones).abs() > 1e-5 * (1 + right_ones.abs())).any(-1)
    if not bad.any():
        return
    if marking.is_close(got, wanted.abs()):
        raise NotYet(
            "soft_threshold24 loses the sign: a weight below -t should become a + t, which is negative."
        )
    if ((result != 0) & (result != rows)).sum() == 0 and (result != 0).sum(-1).max() <= 2:
        raise NotYet(
            "soft_threshold24 keeps the two largest of each group as they are. That is hard pruning. "
            "Subtract t from their magnitudes, too."
        )
    _name_the_threshold(rows, result)
    at = tuple(bad.nonzero()[0].tolist())
    group, made, t = rows[at], result[at] + 0.0, rows[at].abs().sort().values[1]
    passed = (group * made < 0) & (group.abs() < t)
    why = ""
    if passed.any():
        i = int(passed.nonzero()[0])
        why = f" {group[i]:.4g} became {made[i]:.4g}: a weight stops at zero."
    elif _subtracts_another(group, made, t):
        why = f" What is the second-smallest magnitude there? It is {t:.4g}."
    raise NotYet(
        f"soft_threshold24 makes {show(made)} of the group {show(group)}. It should be "
        f"{show(right_ones[at] + 0.0)}.{why}"
    )


def thresholded(seed, rows, groups):
    """(w, f(w)) [rows, 4 groups], made from the result: what was cut off is put back."""
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, groups, 4, generator=draw) + 0.1
    kept[..., :2] = 0  # t itself, and one that is smaller still
    t = torch.rand(rows, groups, 1, generator=draw) + 0.5
    size = kept + t
    size[..., 0] *= torch.rand(rows, groups, generator=draw) * 0.9
    place = torch.rand(rows, groups, 4, generator=draw).argsort(-1)
    sign = torch.randint(0, 2, (rows, groups, 4), generator=draw) * 2 - 1
    return (size.gather(-1, place) * sign).flatten(1), (kept.gather(-1, place) * sign).flatten(1)


def _subtracts_another(group, made, t):
    """True if the magnitudes that are left became smaller by one number, and it is not t."""
    left = made != 0
    taken = (group.abs() - made.abs())[left]
    return bool(left.any()) and bool((taken - taken[0]).abs().max() < 1e-5 < (taken[0] - t).abs())


def venom_mask(answer, x, wanted, v, m, n=2):
    """Task 4, on x, whose mask is known because x was made for it, see `planted`."""
    mask = marking.run(answer, x, v, m, n)
    _is_mask("venom_mask", mask, x)
    if torch.equal(mask, wanted):
        return
    if mask.reshape(len(x) // v, -1, v, m).transpose(1, 2).reshape(x.shape).equal(wanted):
        raise NotYet(f"The mask of venom_mask {MOVED}")
    got, right_one, size = (_blocks(a, v, m) for a in (mask, wanted, x.abs()))
    _name_the_columns(got.any(2), right_one.any(2), _blocks(x, v, m), size, v, m)
    for i, j, r in (got.sum(-1) != n).nonzero().tolist():
        count = int(got[i, j, r].sum())
        extra = " The second step is missing: of the 4 columns each row keeps n." if count == 4 else ""
        raise NotYet(
            f"{_row(i, j, r, v, m)} venom_mask keeps {count} entries. It should keep n = {n}.{extra}"
        )
    i, j, r, c = (got & ~right_one).nonzero()[0].tolist()
    if c not in size[i, j].sum(0).argsort(descending=True, stable=True)[:4].tolist():
        raise NotYet(
            f"{_row(i, j, r, v, m)} venom_mask keeps column {j * m + c}, which is none of the 4 that stay. "
            "Choose among these only, also where they hold zeros."
        )
    other = (right_one & ~got)[i, j, r].nonzero()[0].item()
    equal = size[i, j, r, c] == size[i, j, r, other]
    why = (
        "They are equal, and the first counts: are the 4 columns in the order of their places?"
        if equal
        else "Within a row the largest magnitudes of the 4 columns stay."
    )
    raise NotYet(
        f"{_row(i, j, r, v, m)} venom_mask keeps {_blocks(x, v, m)[i, j, r, c]:.4g} and drops "
        f"{_blocks(x, v, m)[i, j, r, other]:.4g}. {why}"
    )


def planted(seed, rows, cols, v, m, n=2):
    """(x, its V:N:M mask) [rows, cols], v at least 4: the mask is drawn first, and x made to fit it.

    Columns that stay have the larger sum, columns that go the largest single entries, and columns that stay
    have both signs.
    """
    draw = torch.Generator().manual_seed(seed)
    shape = rows // v, cols // m, v, m
    columns = (torch.rand(shape[0], shape[1], 1, m, generator=draw).argsort(-1) < 4).expand(shape)
    rank = torch.rand(shape, generator=draw) + columns.float()
    kept = rank.argsort(-1, descending=True).argsort(-1) < n
    size = torch.where(kept, 1.5, 1.0) + 0.4 * torch.rand(shape, generator=draw)
    small = 0.1 + 0.1 * torch.rand(shape, generator=draw)
    small = torch.where(torch.rand(shape, generator=draw).argsort(2) == 0, torch.full(shape, 2.5), small)
    sign = torch.where(columns, torch.randint(0, 2, shape, generator=draw) * 2.0 - 1, torch.ones(shape))
    x = torch.where(columns, size, small) * sign
    return x.movedim(1, 2).reshape(rows, cols), kept.movedim(1, 2).reshape(rows, cols)


def _shaped_as(got, x):
    return isinstance(got, torch.Tensor) and got.shape == x.shape


def _put_back(got, x, dim):
    """What `got` would be if `dim`, which was moved to the end, were moved back: tensors of x's shape."""
    if not isinstance(got, torch.Tensor) or got.numel() != x.numel():
        return []
    moved = got.reshape(x.movedim(dim, -1).shape).movedim(-1, dim)
    return [moved, got.reshape(x.transpose(dim, -1).shape).transpose(-1, dim)]


def _is_mask(name, mask, x):
    marking.shaped("The mask", mask, x.shape)
    if mask.dtype != torch.bool:
        what = (
            "the kept values"
            if mask.is_floating_point() and ((mask == x) | (mask == 0)).all()
            else mask.dtype
        )
        raise NotYet(
            f"{name} returns {what}. A mask is a bool tensor: True where an entry stays, False where it goes."
        )


def _groups(x, dim):
    """[..., 4]: the groups of four neighbours along dim."""
    return x.movedim(dim, -1).unflatten(-1, (-1, 4))


def _strided(x, dim):
    """[..., 4]: the groups that one gets by cutting the axis into four parts."""
    return x.movedim(dim, -1).unflatten(-1, (4, -1)).transpose(-1, -2)


def _two_largest(kept, key):
    """Per group [..., 4]: the two with the largest keys are kept, of equal keys the first."""
    lowest = torch.where(kept, key, torch.inf).amin(-1, keepdim=True)
    highest = torch.where(kept, -torch.inf, key).amax(-1, keepdim=True)
    dropped_before = (~kept & (key == lowest)).int().cumsum(-1) > 0
    in_order = ~(kept & (key == lowest) & dropped_before).any(-1)
    return (kept.sum(-1) == 2) & (lowest >= highest).squeeze(-1) & in_order


def _name_a_group(kept, size, signed):
    """Raises NotYet for the first group that is not as `mask24` should leave it."""
    at = tuple((~_two_largest(kept, size)).nonzero()[0].tolist())
    group, count, chosen = signed[at], int(kept[at].sum()), signed[at][kept[at]]
    repeated = len(size[at].unique()) < 4
    if count == 2 and size[at][kept[at]].min() == size[at][~kept[at]].max():
        raise NotYet(
            f"mask24 keeps the wrong one of equal magnitudes. In the group {show(group)} it keeps places "
            f"{kept[at].nonzero().flatten().tolist()}. The rule is: the first of equal ones "
            "stays. (In torch, `argsort(dim=-1, stable=True)` leaves equal ones in their order; `topk` "
            "may not.)"
        )
    if count == 2:
        raise NotYet(
            f"mask24 keeps {show(chosen)} of the group {show(group)}. Two others are larger in magnitude."
        )
    if count > 2 and repeated:
        raise NotYet(
            f"mask24 keeps {('three', 'four')[count - 3]} of a group with equal magnitudes, {show(group)}. "
            "Comparing with a threshold (`>=` the second-largest) keeps all that are equal to it. "
            "Choose two places instead, for example by sorting."
        )
    if count < 2 and repeated:
        raise NotYet(
            f"mask24 keeps {('none', 'one')[count]} of a group with equal magnitudes, {show(group)}. "
            "Comparing with a threshold (`>` the third-largest) drops all that are equal to it. Choose two "
            "places instead, for example by sorting."
        )
    raise NotYet(f"mask24 keeps {count} of the group {show(group)}. It should keep exactly two.")


def _name_the_threshold(rows, result):
    """Raises NotYet if in each group another magnitude than the second-smallest was subtracted."""
    ordered = rows.abs().sort(-1).values
    for i in (0, 2, 3):
        if ((rows.abs() - ordered[..., i : i + 1]).clamp_min(0) - result.abs()).abs().max() < 1e-5:
            left = ("three", "", "one", "none")[i]
            raise NotYet(
                f"soft_threshold24 subtracts the {ORDINAL[i]} magnitude of each group, so that {left} of "
                "four stay. t is the second-smallest: then two stay."
            )


def _blocks(x, v, m):
    """[R/v, C/m, v, m]."""
    return x.reshape(x.shape[0] // v, v, x.shape[1] // m, m).movedim(2, 1)


def _name_the_columns(used, columns, x, size, v, m):
    """Raises NotYet for a block whose columns were chosen in another way."""
    for i, j in (used.sum(-1) > 4).nonzero().tolist():
        raise NotYet(
            f"In rows {i * v} to {i * v + v - 1}, columns {j * m} to {j * m + m - 1}, venom_mask uses "
            f"{int(used[i, j].sum())} different columns. A block keeps 4, the same for all of its rows: "
            "first sum the magnitudes over the rows of the block, then choose 4 columns, then look at "
            "single rows."
        )
    total, plain, top = size.sum(2), x.sum(2), size.amax(2)
    for i, j, c in (used & ~columns).nonzero().tolist():
        for d in (columns & ~used)[i, j].nonzero().flatten().tolist():
            at, instead = (i, j, c), (i, j, d)
            sums = f"{total[at]:.4g}", f"{total[instead]:.4g}"
            if total[at] > total[instead] or (total[at] == total[instead] and c < d):
                continue
            hint = ""
            if total[at] == total[instead]:
                hint = " Of columns with equal sums the first counts."
            elif _explains(used, top):
                hint = f" One large entry, like the {top[at]:.4g} of column {j * m + c}, does not decide."
            elif _explains(used, size.square().sum(2)):
                hint = " It has the larger squares: sum the magnitudes, not their squares."
            elif _explains(used, plain):
                hint = " Numbers of both signs cancel in a plain sum: take magnitudes first."
            raise NotYet(
                f"In rows {i * v} to {i * v + v - 1} venom_mask keeps column {j * m + c}, whose magnitudes "
                f"sum to {sums[0]}, and drops column {j * m + d}, whose magnitudes sum to {sums[1]}.{hint}"
            )


def _explains(used, key):
    """True if in every block no column that was left has a larger key than one that was used."""
    return bool(
        (torch.where(used, key, torch.inf).amin(-1) >= torch.where(used, -torch.inf, key).amax(-1)).all()
    )


def _row(i, j, r, v, m):
    return f"In row {i * v + r}, columns {j * m} to {j * m + m - 1},"


def _matrix(rows):
    return "[" + ", ".join(str(row) for row in rows) + "]"


def _direction(dim, x):
    return ("down the columns", "along the rows")[dim] if x.dim() == 2 else f"of size {x.shape[dim]}"
