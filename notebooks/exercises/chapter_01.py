"""Chapter 01: pruning two of four, the other axis, a Venom mask, soft thresholding and its worst group."""

import math

import torch

from exercises import Wrong, compare, exercise
from replicate.sparsity import mask24, prune24, soft_threshold24, venom_mask


@exercise("01.1")
def two_of_four(answer):
    def case(w, dim, hints):
        w = torch.tensor(w)
        found = compare.call(answer, w, dim)
        hints = [(torch.tensor(wrong), hint) for wrong, hint in hints]
        with compare.given(f"w = {w.tolist()} and dim = {dim}"):
            compare.tensor(found, prune24(w, dim), hints)

    case(
        [[3.0, -1.0, 2.0, -4.0]],
        1,
        [
            ([[3.0, 0.0, 2.0, 0.0]], "You kept the two largest values. Compare magnitudes: -4 is large."),
            ([[0.0, -1.0, 2.0, 0.0]], "You kept the two smallest magnitudes. Turn the order around."),
            ([[1.0, 0.0, 0.0, 1.0]], "That is the mask. Give w itself where the mask is true."),
            ([[3.0, 0.0, 0.0, 4.0]], "You lost the sign of a kept weight."),
        ],
    )
    several = "ties: you keep all that equal the second-largest magnitude, so more than two stay"
    case(
        [[0.5, 0.5, 0.5, 0.5]],
        1,
        [
            ([[0.5] * 4], f"This group has {several}. Choose two places, not a threshold."),
            ([[0.0] * 4], "With > the tied ones are all lost. Choose two places, not a threshold."),
            (
                [[0.0, 0.0, 0.5, 0.5]],
                "Of equal ones you keep the last two. argsort with stable=True keeps the first.",
            ),
        ],
    )
    case(
        [[1.0, -2.0, 2.0, 2.0]],
        1,
        [
            ([[0.0, -2.0, 2.0, 2.0]], f"This group has {several}."),
            ([[0.0, 0.0, 2.0, 2.0]], "Three magnitudes are equal. Keep the first two of them."),
            ([[0.0, -2.0, 0.0, 2.0]], "Three magnitudes are equal. Keep the first two of them."),
        ],
    )
    case(
        [[5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0, 4.0]],
        1,
        [
            (
                [[0.0, 0.0, 7.0, 8.0] + [0.0] * 4],
                "You kept two of the whole row. Each four have their own two.",
            ),
            ([[5.0, 6.0, 7.0, 8.0] + [0.0] * 4], "You kept the larger half of the row. Cut it into fours."),
        ],
    )
    down = torch.tensor([[8, -1, 6, 3], [2, 7, -4, 5], [-9, 12, 10, 11], [15, 14, -16, 13.0]])
    hints = [
        (prune24(down, 1).tolist(), "You pruned along the rows. With dim = 0 a group runs down a column."),
        (prune24(down, 0).T.tolist(), "The result is transposed. Turn it back after pruning."),
    ]
    case(down.tolist(), 0, hints)
    with compare.given("normal numbers of shape [16, 8] and dim = 0"):
        w = compare.normal(16, 8)
        compare.tensor(compare.call(answer, w, 0), prune24(w, 0))
    return "The pattern holds along one axis only: 01.2 asks about the other."


@exercise("01.2")
def other_axis(answer):
    hints = [
        (6 / 16, "That is exactly two of four. None and one are allowed as well."),
        (10 / 16, "Count again: a group of zeros alone is allowed too."),
        (5 / 16, "That is the share that fails, with three or four left. Give the others."),
        (
            1 / 2,
            "Half of the numbers are left, but the question is about groups. Write down the 16 patterns.",
        ),
        (1.0, "Along dim=1 nothing was pruned: a group's four entries come from four other groups."),
        (0.0, "Some do by luck. Each entry is left with chance 1/2, on its own."),
    ]
    compare.number(answer, 11 / 16, hints, tolerance=0.01)
    return "11 of the 16 patterns. A mask that fits both axes has to be made for it: it is transposable."


@exercise("01.3")
def venom(answer):
    x = compare.normal(8, 16)
    v, m = 4, 8
    right = venom_mask(x, v, m)
    columns = venom_mask(x, v, m, n=4)
    among = "You marked places among the 4. Which columns of the block are they?"
    by_maximum = _venom(x, v, m, lambda block: block.abs().amax(0))
    signed = _venom(x, v, m, lambda block: block.sum(0))
    always_signed = _venom(x, v, m, lambda block: block.sum(0), key=torch.Tensor.clone)
    squares = _venom(x, v, m, lambda block: block.square().sum(0))
    swapped = "v counts rows, m columns. Your blocks have m rows and v columns."
    hints = [
        (x * right, "These are the values. Give the mask, true where they stay."),
        (columns, "The 4 columns are right. Now keep 2 of these 4 in each row."),
        (venom_mask(x, 1, m), "Each row has its own columns. All v rows of a block share the same 4."),
        (by_maximum, "You compare the columns' largest entries. Compare sums of magnitudes."),
        (signed, "Sum magnitudes, not signed values: these cancel."),
        (always_signed, "Sum magnitudes, not signed values. Compare magnitudes in the rows as well."),
        (squares, "Sum magnitudes, not squares."),
        (venom_mask(x, 8, 4), swapped),
        (mask24(x) & (torch.arange(16) % m < v), swapped),
        (venom_mask(x, 8, m), "You choose columns for all rows at once. Choose them anew for every v rows."),
        (_venom(x, v, m, _by_row), "You added along the rows. Add down each column of the block."),
        (_venom(x, v, m, _by_size, inside=True), among),
        (_venom(x, v, m, _by_size, inside=True, in_order=False), among),
        (columns & mask24(x), "You took 2 of 4 neighbours. Take 2 of the 4 columns that the block kept."),
        (
            _venom(x, v, m, _by_size, key=torch.Tensor.clone),
            "In the second step compare magnitudes too: a large negative number stays.",
        ),
    ]
    with compare.given("normal numbers of shape [8, 16], v = 4 and m = 8"):
        compare.tensor(compare.call(answer, x, v, m), right, hints)
    x, v, m = torch.ones(2, 8), 2, 8
    right = venom_mask(x, v, m)
    tied = (
        "All are equal here: keep the first 4 columns, and the first 2 in each row (topk promises no order)."
    )
    hints = [
        (
            torch.ones_like(right),
            "All sums are equal, and you keep every column: choose 4 places, no threshold.",
        ),
        (venom_mask(x, v, m, n=4), "Two of each row stay, also when all four are equal. " + tied),
        (right.flip(1), "You keep the last of equal ones. " + tied),
    ]
    with compare.given("ones of shape [2, 8], v = 2 and m = 8"):
        compare.tensor(compare.call(answer, x, v, m), right, hints, otherwise=tied)
    x = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0], [1.0, 2, 3, 4, 0, 0, 0, 0]])
    leftmost = "Row 0 has four equal entries in the kept columns: keep the leftmost two of them. "
    by_sum = _venom(x, 2, 8, _by_size, in_order=False)
    hints = [(by_sum, leftmost + "Your columns are in the order of their sums: sort them by place first.")]
    with compare.given(f"x = {x.tolist()}, v = 2 and m = 8"):
        compare.tensor(compare.call(answer, x, 2, 8), venom_mask(x, 2, 8), hints, otherwise=leftmost)
    x = compare.normal(6, 24, seed=1)
    with compare.given("normal numbers of shape [6, 24], v = 3 and m = 12"):
        compare.tensor(compare.call(answer, x, 3, 12), venom_mask(x, 3, 12))
    return "Of m entries of a row 2 are left: 1 - 2/m are zero, whatever v is."


@exercise("01.4")
def soft(answer):
    w = torch.tensor([[-5.0, 3.0, -1.0, 2.0]])
    size, sign = w.abs(), w.sign()
    hints = [
        (
            prune24(w),
            "Two are zero, but the other two are whole: that is hard pruning. Subtract t from them.",
        ),
        (size.sub(2).clamp_min(0), "The sign is lost. Multiply by it at the end."),
        (w.sub(2) * (size > 2), "A negative weight must shrink too: from -5 to -3, not to -7."),
        (
            sign * (size - 2),
            "The two small ones passed through zero. Cut off at zero before the sign returns.",
        ),
        (sign * size.sub(1).clamp_min(0), "You subtract the smallest magnitude. It is the second-smallest."),
        (
            sign * size.sub(3).clamp_min(0),
            "You subtract the second-largest magnitude. It is the second-smallest.",
        ),
        (sign * size.add(1), "t is negative: you sorted values. Sort magnitudes."),
        (sign * size.add(1).clamp_min(0), "t is negative: you sorted values. Sort magnitudes."),
        (w.sub(2).clamp_min(0), "Negative weights are lost. Work with magnitudes and give the sign back."),
    ]
    with compare.given(f"groups = {w.tolist()}"):
        compare.tensor(compare.call(answer, w), soft_threshold24(w), hints)
    two = torch.tensor([[1.0, 2.0, 3.0, 5.0], [50.0, -30.0, 10.0, 20.0]])
    whole = two.sign() * two.abs().sub(2).clamp_min(0)
    with compare.given(f"groups = {two.tolist()}"):
        hint = "You use one threshold for all groups. Each row has its own t."
        compare.tensor(compare.call(answer, two), soft_threshold24(two), [(whole, hint)])
    tied = torch.tensor([[2.0, -2.0, 2.0, 1.0], [0.0, 0.0, 3.0, -4.0]])
    with compare.given(f"groups = {tied.tolist()}"):
        compare.tensor(compare.call(answer, tied), soft_threshold24(tied))
    return "Ties need no rule here: a weight that equals t becomes zero, whichever stands first."


@exercise("01.5")
def worst_group(answer):
    try:
        w = torch.as_tensor(answer, dtype=torch.float64).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise Wrong("The answer is a list of four numbers.") from None
    if len(w) != 4:
        raise Wrong(f"A group has four numbers; these are {len(w)}.")
    if not w.isfinite().all() or not w.any():
        raise Wrong("The ratio is not defined for this group. Take finite numbers, not all zero.")
    ratio = ((prune24(w) - soft_threshold24(w)).norm() / w.norm()).item()
    if math.isclose(ratio, math.sqrt(2 / 3), rel_tol=1e-3):
        return "The ratio is sqrt(2/3) = 0.816: both kept weights lose t, and t is all they have."
    size = w.abs().sort().values
    t = size[1].item()
    said = f"Your group gives {ratio:.3f}; more is possible. "
    if t == 0:
        raise Wrong(said + "Its second-smallest magnitude is 0, so soft thresholding takes nothing away.")
    if size[3] > size[1]:
        raise Wrong(
            said + f"Hard and soft differ by t = {t:g} in the two kept weights. Need these be larger than t?"
        )
    raise Wrong(said + "Now three are t. Does the smallest change the distance? It does change the norm.")


def _by_size(block):
    return block.abs().sum(0)


def _by_row(block):
    """Sums along the rows, which number as many as the rows."""
    return block.abs().sum(1)


def _venom(x, v, m, weight, key=torch.abs, inside=False, in_order=True):
    """A V:2:M mask with one mistake: another weight of the columns, another key in a row, or wrong places."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for i in range(0, x.shape[0], v):
        for j in range(0, x.shape[1], m):
            block = x[i : i + v, j : j + m]
            columns = weight(block).argsort(descending=True, stable=True)[:4]
            columns = columns.sort().values if in_order else columns
            two = key(block[:, columns]).argsort(dim=1, descending=True, stable=True)[:, :2]
            for row in range(v):
                mask[i + row, j + (two[row] if inside else columns[two[row]])] = True
    return mask
