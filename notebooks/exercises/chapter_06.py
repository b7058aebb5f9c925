"""Exercises of chapter 06, two-of-four kernels. Read this after you tried them."""

import math
from typing import Any

import torch
from torch import Tensor

from exercises import exercise
from exercises.compare import NotAnswered, Wrong, call, given, number, tensor
from replicate.report import kernel_plots, kernel_tables
from replicate.sparsity import mask24

# A negative value that counts, a group of zeros, a group of equal values, two places at the end.
EXAMPLE = torch.tensor([[3.0, -1, 2, -4, 0, 0, 0, 0], [1, 1, 1, 1, -5, 2, 7, -6]])
TIED = torch.tensor([[False, True], [True, False]])  # its groups of equal values


def packed(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values [R, K / 2] and nibbles i0 + 4 i1 [R, K / 4] of the two kept of each four."""
    mask = mask24(x) if mask is None else mask
    places = mask.nonzero()[:, 1].view(len(x), -1, 2) % 4
    return x[mask].view(len(x), -1), places[..., 0] + 4 * places[..., 1]


def unpacked(values: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The matrix [R, K] with each group's two values at the places `first` and `second` [R, K / 4]."""
    groups = values.new_zeros(*first.shape, 4)
    pairs = values.view(*first.shape, 2)
    groups.scatter_add_(-1, first[..., None], pairs[..., :1])
    groups.scatter_add_(-1, second[..., None], pairs[..., 1:])
    return groups.flatten(1)


@exercise("06.1")
def compressed_bytes(answer: Any) -> str:
    """Bytes of a compressed [rows, cols] matrix whose values have so many bits."""
    rows, cols = 64, 128
    kept = rows * cols // 2
    sixteen, ninth = (
        kept * (16 + 2) / 8,
        "9/16 holds for 16-bit values. The places take two bits at any width.",
    )
    for bits in (16, 8):
        value = kept * bits / 8
        right = value + kept * 2 / 8
        hints = [
            (right / (rows * cols * bits / 8), "That is the share. Asked are bytes."),
            (8 * right, "That is in bits. Eight of them are a byte."),
            (value, "These are the values alone. Where is it written which two of four they are?"),
            (value + 2 * kept, "A place takes two bits. You counted two bytes."),
            (
                value + kept / 2,
                "You counted two bits for every entry, or a whole byte for a nibble of four bits. Only the "
                "kept ones have a place.",
            ),
            (value + kept / 8, "You counted one bit for a kept value. Its place is one of four: two bits."),
            (2 * value + kept / 4, "You stored all values. Half of them are dropped."),
        ]
        if bits == 8:
            hints = [
                (sixteen, "That is for 16-bit values. Use the argument `bits`."),
                (sixteen / 2, ninth),
                *hints,
            ]
        size = call(answer, rows, cols, bits)
        with given(f"rows={rows}, cols={cols}, bits={bits}"):
            number(size, right, hints)
    return "9/16 of the bytes for 16-bit values, but 10/16 for 8-bit values: narrow values gain less."


@exercise("06.2")
def pack(answer: Any) -> str:
    """Values [R, K / 2] and nibbles [R, K / 4] of a matrix [R, K]."""
    parts = call(answer, EXAMPLE)
    if not isinstance(parts, (tuple, list)) or len(parts) != 2:
        raise Wrong("Return two tensors: `return values, nibbles`.")
    if any(part is None or part is ... for part in parts):
        raise NotAnswered
    values, nibbles = (torch.as_tensor(part) for part in parts)
    right_values, right = packed(EXAMPLE)
    if values.shape == right.shape and nibbles.shape == right_values.shape:
        raise Wrong("Values come first, then nibbles.")
    if values.numel() < EXAMPLE.numel() // 2:
        raise Wrong("Each group keeps two values, a group of zeros too. Go by the mask, not by x != 0.")
    _shape("values", values, right_values)
    by_size = right_values.view(-1, 2)
    by_size = by_size.gather(-1, by_size.abs().argsort(dim=-1, descending=True, stable=True))
    hints = [
        (packed(EXAMPLE, _largest(EXAMPLE))[0], "It goes by magnitude: -4 counts more than 2."),
        (by_size.view(2, 4), "You store a group's values by size. Store them in the order of their places."),
        (right_values.abs(), "You store magnitudes. The signs are lost."),
    ]
    tensor(values, right_values, hints)
    if (nibbles > 15).any():
        raise Wrong("A nibble is at most 15. Count places within a group, 0 to 3, not within the row.")
    if nibbles.shape == right_values.shape:
        raise Wrong("You return a place for each value. Make one number of a group's two, i0 + 4 i1.")
    _shape("nibbles", nibbles, right)
    if (nibbles != right).any() and (nibbles == right)[~TIED].all():
        raise Wrong("Of equal values keep the earlier two; of a group of zeros that is places 0 and 1.")
    first, second = right % 4, right // 4
    hints = [
        (second + 4 * first, "The first kept place is in the low bits: i0 + 4 i1. Yours are swapped."),
        (first + 2 * second, "You multiply i1 by 2. A place takes two bits, so shift it by two: times 4."),
    ]
    differ = (nibbles != right).nonzero().tolist()
    if differ and _same_places(nibbles, right) and (nibbles != hints[0][0]).any():
        row, group = differ[0]
        raise Wrong(
            f"nibbles[{row}, {group}] is {int(nibbles[row, group])}; it should be {right[row, group]}. Sort "
            "the two places first."
        )
    tensor(nibbles, right, hints)
    return "A kernel finds the same with four comparisons, without sorting."


@exercise("06.3")
def unpack(answer: Any) -> str:
    """The matrix [R, K] again, from values and nibbles."""
    x = torch.tensor([[5.0, 0, -2, 1, 3, 4, -7, 6], [0, 8, 1, -9, -3, 2, 1, -4]])
    values, nibbles = packed(x)
    first, second = nibbles % 4, nibbles // 4
    one_group = torch.zeros_like(x).scatter_(1, torch.stack((first, second), -1).flatten(1), values)
    hints = [
        (
            unpacked(values, second, first),
            "The low two bits of a nibble are the first place. Yours are swapped.",
        ),
        (
            unpacked(values, 0 * first, 0 * first + 1),
            "All values went to places 0 and 1. The nibble says where they belong.",
        ),
        (one_group, "All values went into the first group of the row. Group g begins at column 4 g."),
        (values, "You return the packed values. The zeros are missing."),
    ]
    tensor(call(answer, values, nibbles), unpacked(values, first, second), hints)
    return "Nothing is lost but what pruning dropped."


@exercise("06.4")
def tokens_to_the_ridge(answer: Any) -> str:
    """Tokens n at which a dense product [n, 4096] x [4096, 4096] reaches the ridge of the roofline."""
    d, peak = 4096, kernel_plots.PEAK_DENSE
    memory = kernel_tables.recorded(kernel_tables.KERNELS).results["memory"]
    ridge = peak / next(r["tb_per_s"] for r in memory if r["name"] == "copy by a kernel")
    number(
        answer,
        _tokens(ridge, d),
        hints=[
            (ridge, "You counted the weight's bytes alone. Input and output move too."),
            (
                ridge * d / (d - ridge),
                "You counted two of the three matrices. Input, weight and output move.",
            ),
            (_tokens(2 * ridge, d), "A multiplication with its addition is two FLOPs. You counted one."),
            (_tokens(ridge / 2, d), "You counted one byte for a number. In bf16 it has two."),
            (3 * ridge, "You counted three matrices of the weight's size. Input and output have n rows."),
        ],
        tolerance=1e-2,
    )
    return "With fewer tokens the product waits for memory, and 2:4 can save it bytes alone."


@exercise("06.5")
def products_to_share(answer: Any) -> str:
    """Products that must share torch's conversion for a speed-up of 1.4."""
    row = kernel_tables.figure6(kernel_tables.recorded(kernel_tables.KERNELS))
    exact = _products(row, "eager_ms", 1.4)
    right = math.ceil(exact)
    number(
        answer,
        right,
        hints=[
            (exact, "So many products give 1.4 exactly. A product is whole: which is the least number?"),
            (right - 1, "With these it is just below 1.4 times as fast."),
            (
                math.ceil(_products(row, "eager_ms", 1.0)),
                "From there on it is faster than dense at all. Asked is 1.4.",
            ),
            (
                math.ceil(_products(row, "convert_ms", 1.4)),
                "That is our conversion. Take torch's, `eager_ms`.",
            ),
            (math.ceil(row["eager_ms"] / (1.4 * (row["dense_ms"] - row["sparse_ms"]))), _DIVIDED),
        ],
        tolerance=1e-4,
    )
    return (
        f"Weights can be shared by so many micro-batches, but {right} is more than the 8 of figure 6. "
        "Activations are new each time."
    )


_DIVIDED = (
    "The sparse side must take at most 1 / 1.4 of the dense time: t dense = 1.4 (t sparse + conversion)."
)


def _products(row: Any, convert: str, speedup: float) -> float:
    """t with t dense = speedup (t sparse + conversion)."""
    return speedup * row[convert] / (row["dense_ms"] - speedup * row["sparse_ms"])


def _shape(name: str, part: Tensor, right: Tensor) -> None:
    if part.shape != right.shape:
        raise Wrong(f"The shape of {name} is {tuple(part.shape)}; it should be {tuple(right.shape)}.")


def _same_places(nibbles: Tensor, right: Tensor) -> bool:
    """Whether all nibbles name the right two places, in whichever order."""
    low, high = nibbles % 4, nibbles // 4
    return torch.equal(torch.minimum(low, high) + 4 * torch.maximum(low, high), right.to(nibbles.dtype))


def _tokens(ridge: float, d: int) -> float:
    """n with n d / (2 n + d) = ridge: FLOPs 2 n d d over bytes 2 (n d + d d + n d)."""
    return ridge * d / (d - 2 * ridge)


def _largest(x: Tensor) -> Tensor:
    """The two largest of each four by value, not by magnitude."""
    groups = x.view(len(x), -1, 4)
    order = groups.argsort(dim=-1, descending=True, stable=True)[..., :2]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, order, True).view_as(x)
