"""Exercises of chapter 07, Venom kernels. Read this after you tried them."""

from collections.abc import Callable
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
FEW = torch.tensor([[2, 0], [0, 2], [2, 3], [0, 2]])  # of 5: nobody wants 1 and the last, one wants 3
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
    if len(given) == CLUSTERS - 1:
        raise Wrong("There are 3 lists for 4 clusters. A cluster that no token chose has an empty list.")
    if len(given) == len(CHOICES):
        raise Wrong("You return a list for each token. Turn it round: a list of tokens for each cluster.")
    _same_lists(given, CHOICES, CLUSTERS)
    n_clusters = 5
    given = call(answer, FEW, n_clusters)
    if len(given) == int(FEW.max()) + 1:
        raise Wrong(
            f"There are {len(given)} lists for {n_clusters} clusters. Count to n_clusters, not to the "
            "largest cluster chosen."
        )
    _same_lists(given, FEW, n_clusters)
    return "The kernel makes them without asking the processor, so that a CUDA graph can hold them."


def _same_lists(given: Any, clusters: Tensor, n_clusters: int) -> None:
    """Raises Wrong if `given` are not the lists of `clusters` [T, k]."""
    if len(given) != n_clusters:
        raise Wrong(f"There are {len(given)} lists for {n_clusters} clusters.")
    if any(part is None or part is ... for part in given):
        raise NotAnswered
    flat, k = clusters.flatten(), clusters.shape[1]
    if any(isinstance(part, set) for part in given):
        raise Wrong("A set has no order. Return tensors with ascending numbers.")
    for cluster, (part, tokens) in enumerate(zip(given, lists_of(clusters, n_clusters))):
        got, example = torch.as_tensor(part).long(), f"For {clusters.tolist()}, cluster {cluster}: "
        places = (flat == cluster).nonzero()[:, 0]
        first = (clusters[:, 0] == cluster).nonzero()[:, 0]
        if torch.equal(got, tokens):
            continue
        if got.dim() == 0:
            raise Wrong(
                f"{example}a cluster with one token needs a list of length 1, not a single number "
                "(`squeeze`)."
            )
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
        (_with_activation(x, w1, w2, torch.relu), "The activation is relu squared. The square is missing."),
        (_with_activation(x, w1, w2, torch.square), "The activation is relu squared. The relu is missing."),
        (_without_last(x, w1, w2), "A slice stops before its end: you left out each cluster's last neuron."),
        (_strided(x, w1, w2), "A cluster's neurons stand side by side. You took every fourth column."),
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
    rows, total = _multiplied(loads), sum(loads)
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
    guess, longer = len(loads) * BLOCK // 2, _shape()["load"]["4"]
    return (
        "Larger blocks use the tensor cores better and waste more rows. Half a block for each cluster would "
        f"be {guess:,} rows. The padding is {rows - total:,} rows here and "
        f"{_multiplied(longer) - sum(longer):,} at 4 of 16: that rule holds only on average."
    )


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
            (
                (products + rest) / (dense / 16 + rest),
                "As many times as *dense*, not as the measured 4 of 64.",
            ),
            ((dense / 16 + rest) / dense, "Other way round: dense time over sparse time."),
            (dense / 16 + rest, "Those are milliseconds. How many times as fast as dense is that?"),
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
                (
                    flops / (2 * (values + out)),
                    "The K gathered rows of W2, [K, D], are read as well, for each block.",
                ),
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
        "At V = 64 it is 61, at 128 it is 117. Both are left of the ridge (about "
        f"{kernel_plots.PEAK_DENSE / copy['tb_per_s']:.0f}): gathering waits for memory, "
        "with a small V more so."
    )


def _multiplied(loads: list[int]) -> int:
    """Rows that are multiplied if each cluster's list is filled up to whole blocks."""
    return sum(-(-load // BLOCK) * BLOCK for load in loads)


def _shape() -> dict[str, Any]:
    """The recorded results of the 7B shape."""
    return kernel_tables.shape_of(kernel_tables.recorded(kernel_tables.VENOM), 4096)


def _last_one_wins(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Each token's part from its cluster of the highest number, as assignment in a loop gives it."""
    return routed(x, w1, w2, CHOICES.max(1, keepdim=True).values, CLUSTERS)


def _chosen(x: Tensor) -> Tensor:
    """1 where a token chose a cluster, else 0, [T, n]."""
    return torch.zeros(len(x), CLUSTERS).scatter(1, CHOICES, 1.0)


def _with_activation(x: Tensor, w1: Tensor, w2: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    return (act(x @ w1) * _chosen(x).repeat_interleave(w1.shape[1] // CLUSTERS, 1)) @ w2


def _without_last(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Cluster c's neurons without its last one."""
    width = w1.shape[1] // CLUSTERS
    kept = torch.arange(w1.shape[1]) % width < width - 1
    return routed(x, w1 * kept, w2, CHOICES, CLUSTERS)


def _strided(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Cluster c of n with the neurons c, c + n, c + 2 n and so on."""
    return (torch.relu(x @ w1).square() * _chosen(x).repeat(1, w1.shape[1] // CLUSTERS)) @ w2
