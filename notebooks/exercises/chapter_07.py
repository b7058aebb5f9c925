"""Exercises of chapter 07, Venom kernels. Read this after you tried them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from exercises import exercise
from exercises.compare import NotAnswered, Wrong, call, number, tensor
from replicate.report import kernel_plots, kernel_tables

CHOICES = torch.tensor([[2, 0], [0, 3], [2, 3], [3, 0], [0, 2]])  # nobody wants cluster 1
CLUSTERS = 4
BLOCK = 128


def lists_of(clusters: Tensor, n_clusters: int) -> list[Tensor]:
    """The tokens of each cluster, ascending."""
    return [(clusters == c).any(1).nonzero()[:, 0] for c in range(n_clusters)]


@exercise("07.1")
def token_lists(answer: Any) -> str:
    """A list of the tokens of each cluster."""
    given = call(answer, CHOICES, CLUSTERS)
    if not isinstance(given, (list, tuple)):
        raise Wrong("Return a Python list of tensors, one for each cluster: they differ in length.")
    right = lists_of(CHOICES, CLUSTERS)
    if len(given) == CLUSTERS - 1:
        raise Wrong("There are 3 lists for 4 clusters. A cluster that no token chose has an empty list.")
    if len(given) == len(CHOICES):
        raise Wrong("You return a list for each token. Turn it round: a list of tokens for each cluster.")
    if len(given) != CLUSTERS:
        raise Wrong(f"There are {len(given)} lists for {CLUSTERS} clusters.")
    if any(part is None or part is ... for part in given):
        raise NotAnswered
    flat, k = CHOICES.flatten(), CHOICES.shape[1]
    if any(isinstance(part, set) for part in given):
        raise Wrong("A set has no order. Return tensors with ascending numbers.")
    for cluster, (part, tokens) in enumerate(zip(given, right)):
        got, example = torch.as_tensor(part).long(), f"For {CHOICES.tolist()}, cluster {cluster}: "
        places = (flat == cluster).nonzero()[:, 0]
        first = (CHOICES[:, 0] == cluster).nonzero()[:, 0]
        if torch.equal(got, tokens):
            continue
        if got.dim() == 2:
            raise Wrong(f"{example}`nonzero` gives a row and a column number. The row is the token.")
        if torch.equal(got, places):
            raise Wrong(
                f"{example}these are places in the flattened choices. Divide by k = {k}, rounded down."
            )
        if torch.equal(got, first):
            raise Wrong(f"{example}you took each token's first choice. All k choices count.")
        if torch.equal(got.sort().values, tokens):
            raise Wrong(f"{example}the right tokens, but not in ascending order.")
        raise Wrong(f"{example}{got.tolist()}; it should be {tokens.tolist()}.")
    return "The kernel makes them without asking the processor, so that a CUDA graph can hold them."


def routed(x: Tensor, w1: Tensor, w2: Tensor, clusters: Tensor, n: int) -> Tensor:
    """relu(x W1)^2 W2 with all neurons outside of a token's clusters zero."""
    y2 = torch.relu(x @ w1).square()
    chosen = torch.zeros(len(x), n).scatter(1, clusters, 1.0)
    return (y2 * chosen.repeat_interleave(w1.shape[1] // n, 1)) @ w2


@exercise("07.2")
def selected_blocks(answer: Any) -> str:
    """y3 [T, D] from the selected blocks only."""
    draw = np.random.default_rng(0)  # the same numbers on every processor
    tokens, d_model, d_ff = len(CHOICES), 8, 4 * CLUSTERS
    shapes = (tokens, d_model), (d_model, d_ff), (d_ff, d_model)
    x, w1, w2 = (torch.from_numpy(draw.standard_normal(shape, np.float32)) for shape in shapes)
    with FlopCounterMode(display=False) as counted:
        y3 = call(answer, x, w1, w2, CHOICES, CLUSTERS)
    right = routed(x, w1, w2, CHOICES, CLUSTERS)
    hints = [
        (torch.relu(x @ w1).square() @ w2, "That is the dense layer. A token uses its own clusters only."),
        (
            routed(x, w1, w2, CHOICES[:, :1], CLUSTERS),
            "You used each token's first cluster. Sum over all.",
        ),
        (_last_one_wins(x, w1, w2), "A later cluster overwrites an earlier one. Add: `y3[tokens] += ...`."),
        (_without_square(x, w1, w2), "The activation is relu squared. The square is missing."),
        (right / CHOICES.shape[1], "You averaged over a token's clusters. Their parts add up."),
    ]
    tensor(y3, right, hints, tolerance=1e-4)
    least = 2 * 2 * CHOICES.numel() * d_model * (d_ff // CLUSTERS)
    done = counted.get_total_flops()
    if done > least:
        raise Wrong(
            f"The numbers are right, but you do {done:,} FLOPs where {least:,} are enough. Take x[tokens] "
            "and the cluster's columns of W1 before you multiply."
        )
    return "With k of n clusters the products do k / n of the work."


@exercise("07.3")
def wasted_rows(answer: Any) -> str:
    """The share of padding among the rows of 4 of 64 at the 7B shape, blocks of 128."""
    loads = _shape()["load"]["1"]
    rows = sum(-(-load // BLOCK) * BLOCK for load in loads)
    total = sum(loads)
    number(
        answer,
        1 - total / rows,
        hints=[
            (
                rows / total - 1,
                "You divided by the tokens. Asked is the share of the rows that are multiplied.",
            ),
            (rows - total, "That is the number of padded rows. What share of all rows is it?"),
            (total / rows, "That is the share of rows with a token. The others are wasted."),
            (rows, "So many rows are multiplied. What share of them has no token?"),
            (0, f"Every cluster has rows of its own, so each list is filled up to a multiple of {BLOCK}."),
            (
                1 - total / (-(-total // BLOCK) * BLOCK),
                "You rounded up the sum. Each cluster's list is rounded up.",
            ),
        ],
        tolerance=5e-3,
    )
    return "Larger blocks use the tensor cores better and waste more rows."


@exercise("07.4")
def perfect_products(answer: Any) -> str:
    """The FFN's speed-up at 4 of 64 with products of a sixteenth of the dense time."""
    stages = kernel_tables.stages(kernel_tables.recorded(kernel_tables.VENOM), 4096)
    dense, own = sum(stages["dense"].values()), stages["4 of 64"]
    products = sum(ms for name, ms in own.items() if name.startswith("products"))
    rest = sum(own.values()) - products
    number(
        answer,
        dense / (dense / 16 + rest),
        hints=[
            (16, "That is the products alone. The other stages take as long as measured."),
            (
                dense / (products + rest),
                "That is what was measured. Give the products a sixteenth of the dense time.",
            ),
            (
                dense / (products / 16 + rest),
                "The products take a sixteenth of the *dense* time, not of their own.",
            ),
            (dense / products, "These are the measured products alone."),
            (dense / rest, "That is for products that take no time."),
            ((dense + rest) / (dense / 16 + rest), "The dense layer has no routing, no lists and no sums."),
        ],
        tolerance=5e-3,
    )
    return (
        f"What is not a product takes {rest / (dense / 16 + rest):.0%} of the time then. Attack the sum "
        "of the parts first: it takes more than routing and lists together."
    )


@exercise("07.5")
def gather_intensity(answer: Any) -> str:
    """FLOPs a byte of a block of V rows: values [V, K] times gathered rows [K, D], output [V, D]."""
    for v, kept, d in ((64, 2048, 4096), (16, 512, 1024)):
        flops, weight, values, out = 2 * v * kept * d, kept * d, v * kept, v * d
        number(
            call(answer, v, kept, d),
            flops / (2 * (weight + values + out)),
            hints=[
                (flops / (2 * weight), "You counted W2's rows alone. Values and output move too."),
                (flops / (2 * (weight + values)), "The output [V, D] is written. Its bytes are missing."),
                (flops / (2 * (weight + out)), "The kept values [V, K] are read. Their bytes are missing."),
                (flops / (weight + values + out), "You counted numbers. In bf16 each has two bytes."),
                (flops / 4 / (weight + values + out), "A multiplication with its addition is two FLOPs."),
                (flops / (2 * (v * weight + values + out)), "W2's rows are fetched once for a block."),
            ],
        )
    copy = next(
        row
        for row in kernel_tables.recorded(kernel_tables.KERNELS).results["memory"]
        if row["name"] == "copy by a kernel"
    )
    return (
        "At V = 64, K = 2048, D = 4096 it is 61, left of chapter 06's ridge at about "
        f"{kernel_plots.PEAK_DENSE / copy['tb_per_s']:.0f}: a small V waits for memory."
    )


def _shape() -> dict[str, Any]:
    """The recorded results of the 7B shape."""
    return kernel_tables.shape_of(kernel_tables.recorded(kernel_tables.VENOM), 4096)


def _last_one_wins(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Each token's part from its cluster of the highest number, as assignment in a loop gives it."""
    return routed(x, w1, w2, CHOICES.max(1, keepdim=True).values, CLUSTERS)


def _without_square(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    chosen = torch.zeros(len(x), CLUSTERS).scatter(1, CHOICES, 1.0)
    return (torch.relu(x @ w1) * chosen.repeat_interleave(w1.shape[1] // CLUSTERS, 1)) @ w2
