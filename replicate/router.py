"""The neuron-level router (section 3.1, algorithm 3): clusters of neurons, chosen per token.

A cluster, which the paper also calls an expert, is a group of similar columns of W1, known by their mean. A
token's scores against the means choose its top-k clusters. Only their neurons may be non-zero, which after
sorting tokens by cluster is V:N:M. The choice reads one token alone, so it is causal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from replicate.ffn import SparseFFN

METRICS = ("dot", "l2", "cosine")


class TokenLists(NamedTuple):
    """Tokens sorted by cluster, algorithm 3 as printed; kernels read `BlockLists`, padded to blocks.

    tokens: [T k] token ids, those of cluster 0 first, in token order inside a cluster.
    offsets: [n + 1] cluster e owns tokens[offsets[e]:offsets[e + 1]].
    inverse: [T, k] position in `tokens` of token t's j-th choice.
    """

    tokens: Tensor
    offsets: Tensor
    inverse: Tensor


def cluster_neurons(
    w1: Tensor, n_clusters: int, *, balanced: bool = True, seed: int, iterations: int = 20
) -> Tensor:
    """Clusters of neurons: k-means of W1's columns by L2 distance, of equal sizes if `balanced`.

    Equal sizes come from deferred acceptance in each assignment step: every neuron asks its nearest
    centre, each centre keeps its nearest F / n and turns the others away to their next choice.

    Args:
        w1: [D, F], column f is neuron f. n_clusters: n; must divide F if balanced.
        seed: fixes the k-means++ start; equal arguments give equal labels on any device.
        iterations: at most this many k-means steps.

    Returns:
        labels [F], long, in 0 to n - 1.

    Raises:
        ValueError: n does not fit, or w1 is no matrix or not finite.
    """
    if w1.dim() != 2 or not w1.is_floating_point():
        raise ValueError(
            f"w1 must be a [d_model, d_ff] float matrix, got {w1.dtype} of shape {tuple(w1.shape)}"
        )
    d_ff = w1.shape[1]
    if not 1 <= n_clusters <= d_ff:
        raise ValueError(f"n_clusters is {n_clusters}; choose 1 to d_ff = {d_ff}")
    if balanced and d_ff % n_clusters:
        raise ValueError(
            f"{n_clusters} equal clusters do not divide d_ff = {d_ff}; use a divisor or balanced=False"
        )
    points = w1.detach().to("cpu", torch.float32).T.contiguous()
    if not (4 * points.square().sum(1)).isfinite().all():
        raise ValueError("w1 has NaN or infinite entries, or their squares overflow; it cannot be clustered")
    centres = _spread_start(points, n_clusters, seed)
    labels = torch.full((d_ff,), -1)
    for _ in range(max(1, iterations)):
        distance = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
        new = _equal_assignment(distance) if balanced else _filled(distance)
        if torch.equal(new, labels):
            break
        labels = new
        centres = cluster_means(points.T, labels, n_clusters)
    return labels.to(w1.device)


def cluster_means(w1: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """ExpertMeans [n, D]: the mean of each cluster's columns of w1 [D, F]; zero for an empty cluster.

    Args:
        labels: [F], long, in 0 to n - 1. n_clusters: n.

    Raises:
        ValueError: labels are not one a column.
    """
    if labels.shape != w1.shape[1:]:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit w1 of shape {tuple(w1.shape)}")
    sums = w1.new_zeros(n_clusters, w1.shape[0]).index_add(0, labels, w1.T)
    return sums / torch.bincount(labels, minlength=n_clusters).clamp_min(1).to(w1.dtype).unsqueeze(1)


def scores(x: Tensor, means: Tensor, metric: str = "dot") -> Tensor:
    """Affinity of each token to each cluster, [T, n], larger is closer, in at least float32.

    "dot" is x . mu; "l2" is 2 x . mu - |mu|^2, which orders clusters as -|x - mu|^2 does; "cosine" is
    x . mu / (|x| |mu|).

    Args:
        x: [T, D]. means: [n, D]. metric: one of METRICS.

    Raises:
        ValueError: shapes or metric do not fit.
    """
    if x.dim() != 2 or means.dim() != 2 or x.shape[1] != means.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and means {tuple(means.shape)} must be [T, D] and [n, D]")
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; choose one of {', '.join(METRICS)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    x, means = x.to(wide), means.to(wide)
    if metric == "cosine":
        x, means = torch.nn.functional.normalize(x), torch.nn.functional.normalize(means)
    dot = x @ means.T
    return 2 * dot - means.square().sum(1) if metric == "l2" else dot


def tokens_of(sample: Tensor, w1: Tensor) -> Tensor:
    """A sample of inputs [..., D] as tokens [T, D] in w1's dtype; ValueError if w1 is not [D, F]."""
    if sample.shape[-1:] != w1.shape[:1]:
        raise ValueError(f"sample is of shape {tuple(sample.shape)}; give inputs [..., d_model = {len(w1)}]")
    return sample.reshape(-1, len(w1)).to(w1.dtype)


def route(x: Tensor, means: Tensor, top_k: int, *, metric: str = "dot") -> Tensor:
    """Each token's top-k clusters (algorithm 3, step 2), from that token alone.

    Args:
        x: [T, D] inputs of the FFN. means: [n, D] ExpertMeans. top_k: 1 to n.

    Returns:
        [T, top_k] cluster ids, best first; ties go to the lower id.

    Raises:
        ValueError: shapes, top_k or metric do not fit.
    """
    if not 1 <= top_k <= means.shape[0]:
        raise ValueError(f"top_k is {top_k}; choose 1 to the number of clusters, {means.shape[0]}")
    return scores(x, means, metric).argsort(dim=1, descending=True, stable=True)[:, :top_k]


def top_clusters(y: Tensor, n_clusters: int, top_k: int) -> Tensor:
    """[T, top_k] clusters of the largest summed magnitude in y [T, F], neurons in cluster order."""
    return energy(y, n_clusters).argsort(dim=1, descending=True, stable=True)[:, :top_k]


def energy(y: Tensor, n_clusters: int) -> Tensor:
    """[T, n]: the magnitudes of each cluster's neurons in y [T, F], summed."""
    return y.abs().unflatten(1, (n_clusters, -1)).to(torch.float32).sum(2)


def by_token(ffn: SparseFFN, x: Tensor, y2: Tensor | None = None) -> Tensor:
    """The paper's rule (algorithm 3): the clusters whose means score highest with the token, see `scores`."""
    return route(x, ffn.cluster_means().to(x.dtype), ffn.config.top_k, metric=ffn.config.metric)


def by_activation(ffn: SparseFFN, x: Tensor, y2: Tensor | None = None) -> Tensor:
    """The clusters in which the token fires most, known once product 1 is there in full."""
    y2 = ffn.product("w1", x).relu().square() if y2 is None else y2
    return top_clusters(y2, ffn.config.n_clusters, ffn.config.top_k)


def fixed(ffn: SparseFFN, x: Tensor, y2: Tensor | None = None) -> Tensor:
    """The same clusters for every token, chosen once by `make_clusters`: the control."""
    return ffn.fixed_clusters().expand(len(x), -1)


def by_experts(ffn: SparseFFN, x: Tensor, y2: Tensor | None = None) -> Tensor:
    """A learned router's choice, the peer from mixtures of experts, see `experts`."""
    return ffn.experts(x)[0]


# Who chooses a token's clusters, by the name in `SparsityConfig.routing`. A rule reads the layer, its inputs
# x [T, D] and, if they are there already, the activations y2 [T, F] before any mask; it returns k different
# clusters [T, k] a token, and depends on that token alone, else a token would see later ones.
RULES: dict[str, Callable[[SparseFFN, Tensor, Tensor | None], Tensor]] = {
    "token": by_token,
    "activation": by_activation,
    "static": fixed,
    "learned": by_experts,
}
READS_Y2 = {"activation"}  # rules that need product 1 in full


def cluster_mask(clusters: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """[T, F] bool: neuron f may fire for token t, because its cluster is among clusters[t]."""
    return _chosen(clusters, n_clusters)[:, labels]


def ordered_cluster_means(w1: Tensor, n_clusters: int) -> Tensor:
    """ExpertMeans [n, D] of W1 [D, F] with neurons in cluster order: each cluster's mean column."""
    return w1.detach().unflatten(1, (n_clusters, -1)).mean(2).T


def ordered_cluster_mask(clusters: Tensor, d_ff: int, n_clusters: int) -> Tensor:
    """`cluster_mask` [T, F] of neurons in cluster order, as `SparseFFN.make_clusters` leaves them."""
    return _chosen(clusters, n_clusters).repeat_interleave(d_ff // n_clusters, 1)


def token_permutation(clusters: Tensor, n_clusters: int) -> TokenLists:
    """Sort tokens by cluster (algorithm 3, step 3); with top-k a token stands in k lists.

    With k = 1, `y[lists.tokens]` permutes and `permuted[lists.inverse[:, 0]]` restores the order.

    Args:
        clusters: [T, k] cluster ids. n_clusters: of all clusters; some may get no token.

    Raises:
        ValueError: clusters is no matrix, or names a cluster that does not exist.
    """
    if clusters.dim() != 2:
        raise ValueError(f"clusters must be [T, k], got shape {tuple(clusters.shape)}")
    top_k = clusters.shape[1]
    counts = _counts(clusters, n_clusters)
    order = clusters.flatten().argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return TokenLists(order // top_k, offsets, inverse.view(-1, top_k))


def permuted_venom(y: Tensor, lists: TokenLists, v: int) -> tuple[Tensor, Tensor]:
    """The routed activations as a V:N:M matrix: rows by cluster, columns interleaved (figure 4c).

    One row stands for one (token, cluster) pair and holds that cluster's neurons only. Each cluster's rows
    are padded with zeros to a multiple of v. Columns are taken four at a time from each cluster in turn,
    so that every block of M = 4 n columns has exactly 4 of the row's cluster: V:N:M with M = 4 n.

    Args:
        y: [T, F] activations, neurons in cluster order (`SparseFFN.make_clusters`), F a multiple of 4 n.
        lists: from `token_permutation`. v: rows of a block.

    Returns:
        (matrix [R, F], row [T k] of each entry of lists.tokens in the matrix).

    Raises:
        ValueError: F does not divide into n groups of a multiple of four, or v is below 1.
    """
    if v < 1:
        raise ValueError(f"v is {v}; choose 1 or more rows of a block")
    n = len(lists.offsets) - 1
    d_ff = y.shape[1]
    if d_ff % (4 * n):
        raise ValueError(f"d_ff is {d_ff}, no multiple of 4 n = {4 * n} columns")
    counts = lists.offsets.diff()
    padded = (counts + v - 1) // v * v
    starts = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
    cluster = torch.arange(n, device=y.device).repeat_interleave(counts)
    row = torch.arange(len(lists.tokens), device=y.device) - lists.offsets[cluster] + starts[cluster]
    owner = torch.arange(d_ff, device=y.device) // (d_ff // n)
    own = torch.where(owner == cluster.unsqueeze(1), y[lists.tokens], torch.zeros_like(y[:1]))
    interleaved = own.unflatten(1, (n, -1, 4)).transpose(1, 2).flatten(1)
    return y.new_zeros(int(starts[-1]), d_ff).index_copy(0, row, interleaved), row


def load_stats(clusters: Tensor, n_clusters: int) -> dict[str, float | list[float]]:
    """How evenly tokens spread: share of choices a cluster, max / mean, and entropy / log n (1 is even)."""
    load = _counts(clusters, n_clusters).double() / max(1, clusters.numel())
    entropy = -(load * load.clamp_min(1e-30).log()).sum().item()
    return {
        "load": load.tolist(),
        "max_over_mean": load.max().item() * n_clusters,
        "entropy": entropy / math.log(n_clusters) if n_clusters > 1 else 1.0,
    }


def _chosen(clusters: Tensor, n_clusters: int) -> Tensor:
    """[T, n] bool: cluster c is among clusters[t]."""
    chosen = torch.zeros(len(clusters), n_clusters, dtype=torch.bool, device=clusters.device)
    return chosen.scatter(1, clusters.long(), True)


def _counts(clusters: Tensor, n_clusters: int) -> Tensor:
    """Choices [n] each cluster got."""
    wrong = clusters[(clusters < 0) | (clusters >= n_clusters)]
    if len(wrong):
        raise ValueError(f"clusters name cluster {wrong[0]}; n_clusters = {n_clusters} counts from 0")
    return torch.bincount(clusters.flatten(), minlength=n_clusters)


def _spread_start(points: Tensor, n: int, seed: int) -> Tensor:
    """k-means++: each next centre is drawn in proportion to the squared distance to the nearest one."""
    generator = torch.Generator().manual_seed(seed)
    picks = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = (points - points[picks[0]]).square().sum(1)
    for _ in range(n - 1):
        weight = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        picks.append(int(torch.multinomial(weight, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[picks[-1]]).square().sum(1))
    return points[picks]


def _equal_assignment(distance: Tensor) -> Tensor:
    """Labels [F] with exactly F / n a cluster, by deferred acceptance on distance [F, n]."""
    n_points, n = distance.shape
    size = n_points // n
    open_distance = distance.clone()
    while True:
        nearest, choice = open_distance.min(1)
        order = nearest.argsort(stable=True)
        order = order[choice[order].argsort(stable=True)]  # by cluster, then by distance
        counts = torch.bincount(choice, minlength=n)
        rank = torch.arange(n_points) - (counts.cumsum(0) - counts)[choice[order]]
        refused = order[rank >= size]
        if len(refused) == 0:
            return choice
        open_distance[refused, choice[refused]] = math.inf


def _filled(distance: Tensor) -> Tensor:
    """Nearest-centre labels [F]; an empty cluster takes the point farthest from its own centre.

    Each cluster's nearest point stays, so that filling one cluster empties no other.
    """
    nearest, labels = distance.min(1)
    counts = torch.bincount(labels, minlength=distance.shape[1])
    empty = (counts == 0).nonzero().flatten()
    order = nearest.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]  # by cluster, then by distance
    nearest[order[(counts.cumsum(0) - counts)[counts > 0]]] = -1
    labels[nearest.argsort(descending=True, stable=True)[: len(empty)]] = empty
    return labels
