"""Exercises of chapter 12, what fired. Read this after you tried them."""

from collections.abc import Callable
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from exercises import exercise
from exercises.compare import Wrong, call, given, number, tensor
from replicate.training import flops

# Eight neurons in clusters of neighbours. Tokens 0 and 1 have one strong neuron,
# so that the largest neuron and the sum of squares choose otherwise; token 3 is much larger than the others.
Y2 = torch.tensor(
    [
        [7.0, 0, 6, 6, 5, 5, 1, 1],
        [7, 0, 6, 6, 4, 4, 0, 2],
        [0, 1, 0, 1, 3, 3, 2, 5],
        [40, 40, 10, 0, 0, 0, 30, 0],
    ]
)
CASES = (4, 2), (2, 1)  # clusters, kept


@exercise("12.1")
def share_kept(answer: Any) -> str:
    """Share of sum y2 that survives if each token keeps its k clusters of the largest energy."""
    for n, k in CASES:
        right, hints = _shares(n, k)
        with given(f"4 tokens, 8 neurons, n_clusters = {n} and k = {k}"):
            number(call(answer, Y2.clone(), n, k), right, hints)
    return "No router can keep more with these clusters: it is the best choice for each token."


def _shares(n: int, k: int) -> tuple[float, list[tuple[float, str]]]:
    """The share that survives with k of n clusters, and the wrong shares with their hints."""
    total = Y2.sum()
    energy = Y2.unflatten(1, (n, -1)).sum(2)
    each = energy.topk(k).values.sum()
    width = Y2.shape[1] // n
    largest = Y2.unflatten(1, (n, -1)).amax(2).topk(k).indices
    by_square = Y2.unflatten(1, (n, -1)).square().sum(2)
    in_turn = Y2.unflatten(1, (-1, n)).sum(1)  # neuron f in cluster f % n
    hints = [
        (
            energy.sum(0).topk(k).values.sum() / total,
            "All tokens keep the same clusters: a vote of a block.",
        ),
        (
            (energy.topk(k).values.sum(1) / energy.sum(1)).mean(),
            "You averaged the tokens' shares. Divide the sums over all tokens.",
        ),
        (
            energy.gather(1, largest).sum() / total,
            "You ranked clusters by their largest neuron. Take their sums.",
        ),
        (
            Y2.topk(k * width).values.sum() / total,
            "You chose single neurons. Whole clusters are kept, so it is less.",
        ),
        (in_turn.topk(k).values.sum() / total, f"Clusters are neighbours: 0 and 1, not 0 and {n}."),
        (Y2.topk(k).values.sum() / total, "k is a number of clusters."),
        (energy[:, :k].sum() / total, "You kept the first clusters. Keep those with the largest energy."),
        (1 - each / total, "That is the share which is lost."),
        (each, "That is the sum that survives. Divide it by the whole sum."),
        (energy.topk(1).values.sum() / total, "You kept one cluster for each token. There are k."),
        (
            energy.gather(1, by_square.topk(k).indices).sum() / total,
            "y2 is squared already. Do not square it again.",
        ),
    ]
    if (n, k) != CASES[0]:
        clusters, kept = CASES[0]
        fine = Y2.unflatten(1, (clusters, -1)).sum(2)
        hints += [
            (energy.topk(kept).values.sum() / total, f"You kept {kept} clusters. k says how many."),
            *(
                (
                    fine.topk(m).values.sum() / total,
                    f"You made {clusters} clusters. n_clusters says how many.",
                )
                for m in (k, kept)
            ),
        ]
    return float(each / total), [(float(share), hint) for share, hint in hints]


def both_fired(fired: Tensor) -> Tensor:
    """For each two neurons the tokens for which both fired, [F, F]."""
    return fired.T.double() @ fired.double()


def grown(
    near: Tensor,
    n_clusters: int,
    *,
    join: Callable[[Tensor], Tensor] = lambda rows: rows.sum(0),
    first: int = 0,
    last_of_equal: bool = False,
    free_only: bool = True,
) -> Tensor:
    """Labels [F] of the greedy clusters of 12.2 by the nearness [F, F], and of ways to go wrong.

    Args:
        join: the nearness to a cluster [F], of the nearness to its members [members, F].
        first: which of the free neurons starts a cluster. last_of_equal: ties go to the highest number.
    """
    neurons = len(near)
    labels = torch.full((neurons,), -1)
    for cluster in range(n_clusters):
        taken = [int((labels < 0).nonzero()[first])]
        while len(taken) < neurons // n_clusters:
            allowed = labels < 0 if free_only else torch.ones(neurons, dtype=torch.bool)
            allowed[taken] = False
            score = join(near[taken]).masked_fill(~allowed, -torch.inf)
            best = neurons - 1 - int(score.flip(0).argmax()) if last_of_equal else int(score.argmax())
            taken.append(best)
        labels[taken] = cluster
    return labels


def in_parallel(near: Tensor, n_clusters: int) -> Tensor:
    """Labels [F] of clusters that start with the first neurons and take a member each in turn."""
    neurons = len(near)
    labels = torch.full((neurons,), -1)
    labels[:n_clusters] = torch.arange(n_clusters)
    for _ in range(neurons // n_clusters - 1):
        for cluster in range(n_clusters):
            score = near[labels == cluster].sum(0).masked_fill(labels >= 0, -1)
            labels[int(score.argmax())] = cluster
    return labels


def fired_examples() -> list[tuple[str, Tensor, int]]:
    """Which neurons fired for each token, and the number of clusters: every mistake shows in one of them."""
    counts = {(0, 3): 6, (0, 5): 4, (0, 7): 1, (3, 6): 7, (5, 6): 2, (2, 6): 5}
    counts |= {(1, 2): 5, (1, 4): 3, (2, 7): 6, (4, 7): 1}
    pairs = [[neuron in pair for neuron in range(8)] for pair, n in counts.items() for _ in range(n)]
    rows = [
        "010100001000",
        "100000110010",
        "101000011101",
        "101111101011",
        "010000101100",
        "100110001011",
    ]
    few = torch.tensor([[mark == "1" for mark in row] for row in rows])
    shown = "fired = [" + ", ".join(rows) + "] (a row a token) and n_clusters = 3"
    return [(shown, few, 3), ("40 tokens, 8 neurons and n_clusters = 2", torch.tensor(pairs), 2)]


@exercise("12.2")
def clusters_by_what_fired(answer: Any) -> str:
    """Labels [F] of clusters grown greedily by how often neurons fire together."""
    for example, fired, n in fired_examples():
        labels = call(answer, fired, n)
        with given(example):
            _labels(labels, fired, n)
    return "The paper's clusters look at weights alone. These need activations, as chapter 12's choice does."


def _labels(labels: Any, fired: Tensor, n: int) -> None:
    """The labels are those of n clusters by what fired. Raises Wrong."""
    if isinstance(labels, (list, tuple)) and any(isinstance(part, (list, tuple, Tensor)) for part in labels):
        raise Wrong("You return the members of each cluster. Return each neuron's cluster, [F].")
    if len(labels) == len(fired):
        raise Wrong("You return a label for each token. Neurons are the columns: fired is [T, F].")
    near, neurons = both_fired(fired), fired.shape[1]
    right, again = grown(near, n), grown(near, n, free_only=False)
    count = near.diagonal()
    scaled = "Nearness is the number of tokens itself. Do not scale it by how often neurons fire."
    hints = [
        (
            grown(near, n, join=lambda rows: rows[0]),
            "You compare with the first neuron alone. Add up over all members.",
        ),
        (again, "A neuron that has a cluster already was taken again."),
        (again.clamp_min(0), "A neuron that has a cluster already was taken again."),
        (
            grown(near, n, join=lambda rows: rows.amax(0)),
            "You compare with the nearest member alone. Add up over all members.",
        ),
        (
            grown(near, n, join=lambda rows: rows[-1]),
            "You compare with the newest member alone. Add up over all members.",
        ),
        (
            grown(near + both_fired(~fired), n),
            "You also count the tokens for which both are silent. Count those for which both fired.",
        ),
        (grown(near, n, first=-1), "A cluster starts with the free neuron of the lowest number."),
        (grown(near, n, last_of_equal=True), "Of equally near neurons take the one of the lowest number."),
        (in_parallel(near, n), "Your clusters grow in parallel. Fill one, then start the next."),
        (grown(near / (count[:, None] * count).sqrt(), n), scaled),
        (grown(near / (count[:, None] + count - near), n), scaled),
        (grown(torch.corrcoef(fired.T.double()), n), scaled),
        (grown(near, 2), f"You made 2 clusters. n_clusters is {n}."),
        (
            torch.arange(neurons) * n // neurons,
            "These are neighbours by number. Which neurons fire together?",
        ),
        (torch.arange(neurons) % n, "These are dealt out in turn. Which neurons fire together?"),
        *(
            (torch.tensor(order)[right], "The right clusters with other numbers: cluster 0 has neuron 0.")
            for order in permutations(range(n))
        ),
    ]
    left = "Neurons are left over: a cluster has F / n_clusters members."
    tensor(labels, right, hints, otherwise=left if min(labels) < 0 else "")


@exercise("12.3")
def v_where_level(answer: Any) -> str:
    """v at which a layer by activations is as fast as by algorithms 1, 2: 1 + 5 / v = 2 / 1.5 + 4 / v."""
    number(
        answer,
        1 / (2 / flops.TWO_FOUR - 1),
        hints=[
            (0.75, "By activations product 1 is dense and counts as 1: 1 + 5 / v."),
            (
                1.5,
                "That is the speed-up of a 2:4 product, or did you put product 1 in blocks too?",
            ),
            (6, "Figure 4d has six such products. By activations there are five, and product 1 is dense."),
            (1 / 3, "That is 1 / v."),
            (8, "At Table 2's v = 8 the choice by activations is faster. At which v are they level?"),
            (
                2.25,
                "Two products are 2:4, each 1.5 times as fast: they take 2 / 1.5, not 1 / 1.5 + 1. "
                "If it is the layers' speed: asked is v.",
            ),
        ],
    )
    return "Above it, by activations is the faster one; its limit is 6x, that of algorithms 1 and 2 is 4.5x."


@exercise("12.4")
def partial_results(answer: Any) -> str:
    """GiB of the partial results of y3, 16384 tokens, 8 of 32 clusters, d_model 4096, bf16."""
    tokens, d_model, n, k = 16384, 4096, 32, 8
    gib = tokens * k * d_model * 2 / 2**30
    number(
        answer,
        gib,
        hints=[
            (
                gib * n / k,
                "Four times too much. Each partial result is d_model wide (not d_ff), and a token has 8 of "
                "them (not 32).",
            ),
            (
                gib / k,
                "That is the sum, y3 itself, or the compact y2. Before the sum there is one part for each of "
                "the 8 clusters, d_model wide.",
            ),
            (gib * 2, "Twice too much: two bytes a number, and y3 only, without dx."),
            (
                gib / 2,
                "0.5 GiB is the dense y2. For y3, count 8 partial results of d_model bf16 numbers, two bytes "
                "each.",
            ),
            (tokens * k * d_model * 2 / 1e9, "That is in GB, of 10^9 bytes. A GiB has 2^30."),
            (tokens * k * d_model * 2, "That is in bytes. Divide by 2^30."),
        ],
    )
    return (
        "Twice the dense y2, which is half a GiB, and the same again for dx: hence the memory of this format."
    )
