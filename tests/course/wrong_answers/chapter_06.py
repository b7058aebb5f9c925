"""Answers that students give in chapter 06, and the hint that each must get."""

import math

import torch

from replicate.report import kernel_plots, kernel_tables
from replicate.sparsity import mask24

RECORD = kernel_tables.recorded(kernel_tables.KERNELS)
ROW = kernel_tables.figure6(RECORD)
RIDGE = kernel_plots.PEAK_DENSE / next(
    r["tb_per_s"] for r in RECORD.results["memory"] if r["name"] == "copy by a kernel"
)


def pack(x, mask=None, nibble=lambda i, j: i + 4 * j, values=lambda kept: kept, within=4):
    mask = mask24(x) if mask is None else mask
    places = mask.nonzero()[:, 1].view(len(x), -1, 2) % within
    return values(x[mask].view(len(x), -1)), nibble(places[..., 0], places[..., 1])


def largest(x):
    groups = x.view(len(x), -1, 4)
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, groups.topk(2).indices, True).view_as(x)


def by_size(x):
    """Values and places as topk of the magnitude returns them."""
    groups = x.view(len(x), -1, 4)
    places = groups.abs().argsort(dim=-1, descending=True, stable=True)[..., :2]
    return groups.gather(-1, places).flatten(1), places[..., 0] + 4 * places[..., 1]


def nibbles_by_size(x):
    """Right values, but a group's places in the order of size."""
    return pack(x)[0], by_size(x)[1]


def later_of_equal(x):
    return pack(x, mask24(x.flip(-1)).flip(-1))


def unpack(values, first, second):
    groups = values.new_zeros(*first.shape, 4)
    return groups.scatter(-1, torch.stack((first, second), -1), values.view(*first.shape, 2)).flatten(1)


def into_the_first_group(values, nibbles):
    places = torch.stack((nibbles % 4, nibbles // 4), -1).flatten(1)
    return values.new_zeros(len(values), 2 * values.shape[1]).scatter(1, places, values)


WRONG = [
    ("06.1", lambda rows, cols, bits: rows * cols * bits / 16, "Where is it written"),
    ("06.1", lambda rows, cols, bits: rows * cols * (bits + 2) / 2, "Eight of them are a byte"),
    ("06.1", lambda rows, cols, bits: rows * cols * bits / 8 * 9 / 16, "9/16 holds for 16-bit values"),
    ("06.1", lambda rows, cols, bits: rows * cols * 2 * 9 / 16, "Use the argument `bits`"),
    ("06.1", lambda rows, cols, bits: rows * cols / 2 * bits / 8 + rows * cols / 4, "for every entry"),
    ("06.1", lambda rows, cols, bits: (bits + 2) / 2 / bits, "That is the share. Asked are bytes"),
    ("06.1", lambda rows, cols, bits: rows * cols * (bits + 2) / 2, "For rows=64, cols=128, bits=16: That"),
    ("06.1", lambda rows, cols, bits: rows * cols / 2 * (bits / 8 + 1 / 2), "a whole byte for a nibble"),
    ("06.1", 9 / 16, "The answer is a function"),
    ("06.2", lambda x: pack(x, largest(x)), "It goes by magnitude"),
    ("06.2", by_size, "in the order of their places"),
    ("06.2", lambda x: pack(x, values=torch.abs), "The signs are lost"),
    ("06.2", lambda x: pack(x, nibble=lambda i, j: j + 4 * i), "Yours are swapped"),
    ("06.2", lambda x: pack(x, within=8), "within a group, 0 to 3"),
    ("06.2", lambda x: (x[mask24(x)].view(2, 4), mask24(x).nonzero()[:, 1].view(2, 4) % 4), "one number"),
    ("06.2", nibbles_by_size, "nibbles[0, 0] is 3; it should be 12. Sort the two places first"),
    ("06.2", lambda x: pack(x)[::-1], "Values come first, then nibbles"),
    ("06.2", lambda x: (pack(x)[0].flatten(), pack(x)[1]), "The shape of values is (8,)"),
    ("06.2", lambda x: (pack(x)[0], pack(x)[1].flatten()), "The shape of nibbles is (4,)"),
    ("06.2", later_of_equal, "Of equal values keep the earlier"),
    ("06.2", lambda x: pack(x)[0], "Return two tensors"),
    ("06.3", lambda values, nibbles: unpack(values, nibbles // 4, nibbles % 4), "Yours are swapped"),
    ("06.3", lambda values, nibbles: unpack(values, 0 * nibbles, 0 * nibbles + 1), "places 0 and 1"),
    ("06.3", into_the_first_group, "Group g begins at column 4 g"),
    ("06.3", lambda values, nibbles: values, "The zeros are missing"),
    ("06.4", RIDGE, "the weight's bytes alone"),
    ("06.4", RIDGE * 4096 / (4096 - RIDGE), "two of the three matrices"),
    ("06.4", 2 * RIDGE * 4096 / (4096 - 4 * RIDGE), "You counted one"),
    ("06.4", 3 * RIDGE, "three matrices of the weight's size"),
    ("06.5", math.ceil(ROW["eager_ms"] / (ROW["dense_ms"] - ROW["sparse_ms"])), "faster than dense at all"),
    ("06.5", 1.4 * ROW["eager_ms"] / (ROW["dense_ms"] - 1.4 * ROW["sparse_ms"]), "A product is whole"),
    ("06.5", 1, "our conversion"),
]
