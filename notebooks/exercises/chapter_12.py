"""Exercises of chapter 12, what fired. Read this after you tried them."""

from typing import Any

import torch
from torch import Tensor

from exercises import exercise
from exercises.compare import Wrong, call, number, tensor
from replicate.training import flops

# Eight neurons in four clusters of neighbours, of which two are kept. Tokens 0 and 1 have one strong neuron,
# so that the largest neuron and the sum of squares choose otherwise; token 3 is much larger than the others.
Y2 = torch.tensor(
    [
        [7.0, 0, 6, 6, 5, 5, 1, 1],
        [7, 0, 6, 6, 4, 4, 0, 2],
        [0, 1, 0, 1, 3, 3, 2, 5],
        [40, 40, 10, 0, 0, 0, 30, 0],
    ]
)
CLUSTERS, KEPT = 4, 2


@exercise("12.1")
def share_kept(answer: Any) -> str:
    """Share of sum y2 that survives if each token keeps its k clusters of the largest energy."""
    energy = Y2.unflatten(1, (CLUSTERS, -1)).sum(2)
    total = Y2.sum()
    each = energy.topk(KEPT).values.sum()
    width = Y2.shape[1] // CLUSTERS
    largest = Y2.unflatten(1, (CLUSTERS, -1)).amax(2).topk(KEPT).indices
    by_square = Y2.unflatten(1, (CLUSTERS, -1)).square().sum(2)
    hints = [
        (
            energy.sum(0).topk(KEPT).values.sum() / total,
            "All tokens keep the same clusters: a vote of a block.",
        ),
        (
            (energy.topk(KEPT).values.sum(1) / energy.sum(1)).mean(),
            "You averaged the tokens' shares. Divide the sums over all tokens.",
        ),
        (
            energy.gather(1, largest).sum() / total,
            "You ranked clusters by their largest neuron. Take their sums.",
        ),
        (
            Y2.topk(KEPT * width).values.sum() / total,
            "You chose single neurons. Whole clusters are kept, so it is less.",
        ),
        (energy[:, :KEPT].sum() / total, "You kept the first clusters. Keep those with the largest energy."),
        (1 - each / total, "That is the share which is lost."),
        (each, "That is the sum that survives. Divide it by the whole sum."),
        (energy.topk(1).values.sum() / total, "You kept one cluster for each token. There are k."),
        (
            energy.gather(1, by_square.topk(KEPT).indices).sum() / total,
            "y2 is squared already. Do not square it again.",
        ),
    ]
    number(call(answer, Y2.clone(), CLUSTERS, KEPT), float(each / total), [(float(w), h) for w, h in hints])
    return "No router can keep more with these clusters: it is the best choice for each token."


def grown(fired: Tensor, n_clusters: int, *, all_members: bool = True, free_only: bool = True) -> Tensor:
    """Labels [F] of the greedy clusters of 12.2, and of two ways to go wrong."""
    together = fired.T.float() @ fired.float()
    size = fired.shape[1] // n_clusters
    labels = torch.full((fired.shape[1],), -1)
    for cluster in range(n_clusters):
        first = int((labels < 0).nonzero()[0])
        labels[first], score, taken = cluster, together[first].clone(), [first]
        for _ in range(size - 1):
            allowed = labels < 0 if free_only else torch.ones_like(labels, dtype=torch.bool)
            allowed[taken] = False
            best = int(score.masked_fill(~allowed, -1).argmax())
            labels[best] = cluster
            taken.append(best)
            score += together[best] if all_members else 0
    return labels


def fired_example() -> Tensor:
    """Which of eight neurons fired for 40 tokens: no ties that decide, and every mistake shows."""
    counts = {(0, 3): 6, (0, 5): 4, (0, 7): 1, (3, 6): 7, (5, 6): 2, (2, 6): 5}
    counts |= {(1, 2): 5, (1, 4): 3, (2, 7): 6, (4, 7): 1}
    rows = [[neuron in pair for neuron in range(8)] for pair, n in counts.items() for _ in range(n)]
    return torch.tensor(rows)


@exercise("12.2")
def clusters_by_what_fired(answer: Any) -> str:
    """Labels [F] of clusters grown greedily by how often neurons fire together."""
    fired = fired_example()
    right = grown(fired, 2)
    labels = call(answer, fired, 2)
    if isinstance(labels, (list, tuple)) and any(isinstance(part, (list, tuple, Tensor)) for part in labels):
        raise Wrong("You return the members of each cluster. Return each neuron's cluster, [F].")
    again = grown(fired, 2, free_only=False)
    hints = [
        (
            grown(fired, 2, all_members=False),
            "You compare with the first neuron alone. Add up over all members.",
        ),
        (again, "A neuron that has a cluster already was taken again."),
        (again.clamp_min(0), "A neuron that has a cluster already was taken again."),
        (torch.arange(8) // 4, "These are neighbours by number. Which neurons fire together?"),
        (torch.arange(8) % 2, "These are dealt out in turn. Which neurons fire together?"),
        (1 - right, "The right clusters with their numbers swapped: cluster 0 has neuron 0."),
    ]
    if len(labels) == len(fired):
        raise Wrong("You return a label for each token. Neurons are the columns: fired is [T, F].")
    tensor(labels, right, hints)
    return "The paper's clusters look at weights alone. These need activations, as chapter 12's choice does."


@exercise("12.3")
def v_where_level(answer: Any) -> str:
    """v at which a layer by activations is as fast as by algorithms 1, 2: 1 + 5 / v = 2 / 1.5 + 4 / v."""
    number(
        answer,
        1 / (2 / flops.TWO_FOUR - 1),
        hints=[
            (0.75, "By activations product 1 is dense and counts as 1: 1 + 5 / v."),
            (1.5, "That is the speed-up of a 2:4 product."),
            (6, "Figure 4d has six such products. By activations there are five, and product 1 is dense."),
            (1 / 3, "That is 1 / v."),
            (8, "At Table 2's v = 8 the choice by activations is faster. At which v are they level?"),
            (2.25, "Two products are 2:4, each 1.5 times as fast: they take 2 / 1.5, not 1 / 1.5 + 1."),
        ],
    )
    return "Above it, by activations is the faster one; its limit is 6x, that of algorithms 1 and 2 is 4.5x."


@exercise("12.4")
def partial_results(answer: Any) -> str:
    """GiB of the partial results of y3, 16384 tokens, 8 of 32 clusters, d_model 4096, bf16."""
    tokens, d_model, d_ff, n, k = 16384, 4096, 16384, 32, 8
    gib = tokens * k * d_model * 2 / 2**30
    number(
        answer,
        gib,
        hints=[
            (gib * n / k, "You counted all 32 clusters. A token has results from its own 8 only."),
            (gib / k, "That is the sum, y3 itself. Before it there is one part for each of the 8 clusters."),
            (gib * 2, "In bf16 a number has two bytes."),
            (gib / 2, "In bf16 a number has two bytes. You counted one."),
            (tokens * k * d_model * 2 / 1e9, "That is in GB, of 10^9 bytes. A GiB has 2^30."),
            (tokens * k * d_ff * 2 / 2**30, "A part of y3 is as wide as the model, d_model, not d_ff."),
            (
                tokens * d_ff // n * k * 2 / 2**30,
                "That is the compact y2. A part of y3 has d_model numbers.",
            ),
            (
                tokens * d_ff * 2 / 2**30,
                "That is y2 of the dense layer. A part of y3 has d_model numbers.",
            ),
            (tokens * k * d_model * 2, "That is in bytes. Divide by 2^30."),
        ],
    )
    return (
        "Twice the dense y2, which is half a GiB, and the same again for dx: hence the memory of this format."
    )
