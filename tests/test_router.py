import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate.config import METRICS
from replicate.router import (
    cluster_mask,
    cluster_means,
    cluster_neurons,
    load_stats,
    ordered_cluster_mask,
    permuted_venom,
    route,
    scores,
    token_permutation,
)
from replicate.sparsity import check_venom, mask24

few = settings(max_examples=40, deadline=None)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(*shape, low=-2, high=3, seed=0):
    """Whole numbers: every sum is exact and ties are common."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def spread(w1, labels):
    """Sum of squared distances of the columns to their clusters' means, naively."""
    total = 0.0
    for c in labels.unique():
        points = w1[:, labels == c].double()
        total += (points - points.mean(1, keepdim=True)).square().sum().item()
    return total


@st.composite
def cluster_lists(draw):
    """(clusters [T, k], n): each token's k different clusters."""
    n = draw(st.integers(1, 6))
    k = draw(st.integers(1, n))
    rows = draw(st.lists(st.permutations(range(n)), max_size=12))
    return torch.tensor([row[:k] for row in rows], dtype=torch.long).view(-1, k), n


# Clusters


@given(
    n=st.integers(1, 6),
    size=st.integers(1, 8),
    d=st.integers(1, 5),
    seed=st.integers(0, 99),
    low=st.integers(-2, 0),
)
@few
def test_balanced_clusters_have_equal_sizes(n, size, d, seed, low):
    w1 = integers(d, n * size, low=low, high=low + 3, seed=seed)  # many duplicate columns
    labels = cluster_neurons(w1, n, seed=seed)
    assert labels.dtype == torch.long and labels.shape == (n * size,)
    assert torch.bincount(labels, minlength=n).tolist() == [size] * n


@given(n=st.integers(1, 8), extra=st.integers(0, 9), d=st.integers(1, 4), seed=st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_unbalanced_clusters_leave_none_empty(n, extra, d, seed):
    w1 = integers(d, n + extra, low=-1, high=2, seed=seed)
    labels = cluster_neurons(w1, n, balanced=False, seed=seed)
    assert labels.min() >= 0 and labels.max() < n
    assert (torch.bincount(labels, minlength=n) > 0).all()


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_columns_that_are_all_equal(fill, balanced):
    labels = cluster_neurons(torch.full((3, 12), fill), 4, balanced=balanced, seed=0)
    counts = torch.bincount(labels, minlength=4)
    assert (counts > 0).all() and (not balanced or (counts == 3).all())


@pytest.mark.parametrize("balanced", [True, False])
def test_planted_clusters_are_found(balanced):
    """k-means++ seeds one centre a cluster when clusters are far apart."""
    truth = torch.arange(48) % 6
    w1 = 100 * normal(8, 6)[:, truth] + 0.1 * normal(8, 48, seed=1)
    for seed in range(5):
        labels = cluster_neurons(w1, 6, balanced=balanced, seed=seed)
        pairs = set(zip(truth.tolist(), labels.tolist()))
        assert len(pairs) == 6  # the same partition, whatever the names


def test_clusters_by_hand():
    """Six points on a line; the far one must join the pair it is nearest to, to make sizes equal."""
    w1 = torch.tensor([[0.0, 0.1, 0.2, 10.0, 10.1, 100.0]])
    labels = cluster_neurons(w1, 2, seed=0)
    assert labels[:3].unique().numel() == 1 and labels[3:].unique().numel() == 1 and labels[0] != labels[3]


@pytest.mark.parametrize("balanced", [True, False])
def test_clusters_are_tighter_than_random_ones(balanced):
    w1 = normal(6, 128)
    labels = cluster_neurons(w1, 8, balanced=balanced, seed=3)
    for seed in range(5):
        shuffled = labels[torch.randperm(128, generator=torch.Generator().manual_seed(seed))]
        assert spread(w1, labels) < 0.8 * spread(w1, shuffled)
    assert spread(w1, labels) <= spread(w1, cluster_neurons(w1, 8, balanced=balanced, seed=3, iterations=1))


def test_a_converged_balanced_assignment_is_stable():
    """No neuron is nearer to another centre than one of that centre's own neurons (deferred acceptance)."""
    w1 = normal(4, 60, dtype=torch.float64)
    labels = cluster_neurons(w1, 5, seed=1, iterations=500)
    assert torch.equal(labels, cluster_neurons(w1, 5, seed=1, iterations=501))
    distance = (w1.T[:, None] - cluster_means(w1, labels, 5)[None]).norm(dim=-1)
    own = distance.gather(1, labels[:, None])[:, 0]
    for f, c in itertools.product(range(60), range(5)):
        if distance[f, c] < own[f] - 1e-4:
            assert distance[labels == c, c].max() <= distance[f, c] + 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_labels_depend_on_the_arguments_only(dtype):
    w1 = normal(8, 64, dtype=dtype)
    before = w1.clone()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = cluster_neurons(w1, 8, seed=5)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.manual_seed(2)
    assert torch.equal(first, cluster_neurons(w1.clone(), 8, seed=5))
    assert torch.equal(first, cluster_neurons(w1.T.contiguous().T, 8, seed=5)), "whatever the strides"
    assert torch.equal(w1, before)
    assert any(not torch.equal(first, cluster_neurons(w1, 8, seed=s)) for s in range(6, 10))


def test_a_parameter_can_be_clustered():
    w1 = torch.nn.Parameter(normal(4, 16))
    assert not cluster_neurons(w1, 4, seed=0).requires_grad and w1.grad is None


@pytest.mark.parametrize(
    ("w1", "n", "balanced", "pattern"),
    [
        (torch.ones(4, 16), 3, True, "3 equal clusters do not divide d_ff = 16"),
        (torch.ones(4, 16), 0, True, "n_clusters is 0; choose 1 to d_ff = 16"),
        (torch.ones(4, 16), 17, False, "n_clusters is 17"),
        (torch.ones(16), 2, True, r"\(16,\)"),
        (torch.ones(2, 4, 16), 2, True, r"\(2, 4, 16\)"),
        (torch.ones(4, 16, dtype=torch.long), 2, True, "int64"),
        (torch.full((4, 16), math.nan), 2, True, "NaN"),
        (torch.full((4, 16), math.inf), 2, True, "infinite"),
        (normal(4, 16) * 1e30, 2, True, "squares"),
    ],
)
def test_what_cannot_be_clustered(w1, n, balanced, pattern):
    with pytest.raises(ValueError, match=pattern):
        cluster_neurons(w1, n, balanced=balanced, seed=0)


def test_cluster_means_by_hand():
    w1 = torch.tensor([[1.0, 2, 3, 4], [0, 10, 20, 30]])
    labels = torch.tensor([2, 0, 2, 0])
    assert cluster_means(w1, labels, 4).tolist() == [[3, 20], [0, 0], [2, 10], [0, 0]]
    assert cluster_means(w1.double(), labels, 3).dtype == torch.float64
    with pytest.raises(ValueError, match=r"\(3,\) do not fit w1 of shape \(2, 4\)"):
        cluster_means(w1, labels[:3], 4)


# Scores and routing


def slow_score(x, mean, metric):
    x, mean = x.tolist(), mean.tolist()
    dot = math.fsum(a * b for a, b in zip(x, mean))
    if metric == "dot":
        return dot
    if metric == "cosine":
        return dot / (math.hypot(*x) * math.hypot(*mean))
    return -(math.dist(x, mean) ** 2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_the_formulas(metric, dtype):
    x, means = normal(7, 12, dtype=dtype), normal(5, 12, seed=1, dtype=dtype)
    out = scores(x, means, metric)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    naive = torch.tensor([[slow_score(a, b, metric) for b in means] for a in x], dtype=torch.float64)
    if metric == "l2":  # up to |x|^2, the same for every cluster
        naive += x.double().square().sum(1, keepdim=True)
    torch.testing.assert_close(out.double(), naive, rtol=1e-5, atol=1e-5)


def test_the_three_metrics_differ_by_hand():
    x = torch.tensor([[1.0, 0.0]])
    means = torch.tensor([[10.0, 10.0], [1.0, 0.5], [0.1, 0.0]])
    assert route(x, means, 3, metric="dot").tolist() == [[0, 1, 2]]
    assert route(x, means, 3, metric="l2").tolist() == [[1, 2, 0]]
    assert route(x, means, 3, metric="cosine").tolist() == [[2, 1, 0]]


@pytest.mark.parametrize("metric", METRICS)
def test_zero_vectors_give_finite_scores(metric):
    assert scores(torch.zeros(2, 3), torch.zeros(4, 3), metric).isfinite().all()
    assert route(torch.zeros(2, 3), torch.zeros(4, 3), 2, metric=metric).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("metric", ["dot", "l2"])
@given(seed=st.integers(0, 999), n=st.integers(1, 7), k=st.integers(1, 7))
@few
def test_route_is_the_sorted_list_with_ties_to_the_lower_id(metric, seed, n, k):
    x, means = integers(5, 3, seed=seed), integers(n, 3, seed=seed + 1)
    table = [[slow_score(a, b, metric) for b in means] for a in x]
    table = [[round(value, 6) for value in row] for row in table]
    expected = [sorted(range(n), key=lambda e: (-row[e], e))[: min(k, n)] for row in table]
    assert route(x, means, min(k, n), metric=metric).tolist() == expected


@pytest.mark.parametrize("metric", METRICS)
def test_a_token_is_routed_by_itself_alone(metric):
    x, means = normal(20, 4, seed=2), normal(8, 4, seed=3)
    together = route(x, means, 3, metric=metric)
    for t in range(20):
        assert torch.equal(route(x[t : t + 1], means, 3, metric=metric)[0], together[t])


def test_many_ties_keep_their_order():
    """An unstable sort shows only beyond some sixteen equal elements."""
    clusters = route(torch.ones(64, 2), torch.ones(200, 2), 200)
    assert torch.equal(clusters, torch.arange(200).expand(64, -1))


def test_route_arguments():
    x, means = torch.ones(3, 4), torch.ones(5, 4)
    for top_k in (0, 6, -1):
        with pytest.raises(ValueError, match=f"top_k is {top_k}; choose 1 to .*5"):
            route(x, means, top_k)
    with pytest.raises(ValueError, match="metric is 'l1'; choose one of dot, l2, cosine"):
        route(x, means, 1, metric="l1")
    for bad in (torch.ones(4), torch.ones(3, 5), torch.ones(1, 3, 4)):
        with pytest.raises(ValueError, match=r"must be \[T, D\] and \[n, D\]"):
            route(bad, means, 1)


@given(data=cluster_lists(), size=st.integers(1, 3), seed=st.integers(0, 99))
@few
def test_cluster_mask_against_loops(data, size, seed):
    clusters, n = data
    labels = torch.arange(n).repeat(size)[
        torch.randperm(n * size, generator=torch.Generator().manual_seed(seed))
    ]
    mask = cluster_mask(clusters, labels, n)
    slow = [[labels[f].item() in row for f in range(n * size)] for row in clusters.tolist()]
    assert mask.dtype == torch.bool and mask.tolist() == slow
    assert mask.sum() == clusters.numel() * size
    in_order = cluster_mask(clusters, torch.arange(n).repeat_interleave(size), n)
    assert torch.equal(ordered_cluster_mask(clusters.int(), n * size, n), in_order)


# Permutation


def test_token_permutation_by_hand():
    lists = token_permutation(torch.tensor([[2, 0], [0, 1], [2, 1]]), 4)
    assert lists.tokens.tolist() == [0, 1, 1, 2, 0, 2]  # clusters 0: 0 1, 1: 1 2, 2: 0 2, 3: none
    assert lists.offsets.tolist() == [0, 2, 4, 6, 6]
    assert lists.inverse.tolist() == [[4, 0], [1, 2], [5, 3]]


@given(data=cluster_lists())
@few
def test_token_permutation_against_lists(data):
    clusters, n = data
    lists = token_permutation(clusters, n)
    rows = clusters.tolist()
    expected = [[t for t, row in enumerate(rows) if e in row] for e in range(n)]
    starts = lists.offsets.tolist()
    assert starts[0] == 0 and len(starts) == n + 1
    assert [lists.tokens[a:b].tolist() for a, b in itertools.pairwise(starts)] == expected
    assert lists.inverse.shape == clusters.shape
    for t, row in enumerate(rows):
        for j, e in enumerate(row):
            place = lists.inverse[t, j]
            assert lists.tokens[place] == t and starts[e] <= place < starts[e + 1]


@given(choice=st.lists(st.integers(0, 3), max_size=30))
@few
def test_permutation_and_inverse_restore_the_order(choice):
    lists = token_permutation(torch.tensor(choice, dtype=torch.long).view(-1, 1), 4)
    y = normal(len(choice), 3)
    permuted = y[lists.tokens]
    assert torch.equal(permuted[lists.inverse[:, 0]], y)
    assert [choice[t] for t in lists.tokens] == sorted(choice)


@pytest.mark.parametrize("function", [token_permutation, load_stats])
def test_an_cluster_beyond_the_last_raises(function):
    with pytest.raises(ValueError, match=r"cluster 4.*n_clusters = 4"):
        function(torch.tensor([[1], [4]]), 4)
    with pytest.raises(ValueError, match="cluster -1; n_clusters = 4 counts from 0"):
        function(torch.tensor([[1], [-1]]), 4)
    with pytest.raises(ValueError, match=r"\[T, k\].*\(2,\)"):
        token_permutation(torch.tensor([0, 1]), 2)


@given(data=cluster_lists(), v=st.integers(1, 5), quads=st.integers(1, 3), seed=st.integers(0, 99))
@few
def test_permuted_venom_is_venom_and_loses_nothing(data, v, quads, seed):
    clusters, n = data
    width = 4 * quads
    y = normal(len(clusters), n * width, seed=seed)
    y = torch.where(mask24(y), y, torch.zeros_like(y))
    lists = token_permutation(clusters, n)
    matrix, row = permuted_venom(y, lists, v)
    assert matrix.shape[1] == n * width and matrix.shape[0] % v == 0
    check_venom(matrix, v, 4 * n)
    # the columns in the order the docstring gives: four of each cluster in turn
    order = [e * width + 4 * q + i for q in range(quads) for e in range(n) for i in range(4)]
    for t, chosen in enumerate(clusters.tolist()):
        for j, e in enumerate(chosen):
            full = torch.zeros(n * width)
            full[e * width : (e + 1) * width] = y[t, e * width : (e + 1) * width]
            assert torch.equal(matrix[row[lists.inverse[t, j]]], full[order])
    used = torch.zeros(len(matrix), dtype=torch.bool)
    used[row] = True
    assert used.sum() == clusters.numel() and not matrix[~used].any()


def test_permuted_venom_arguments():
    lists = token_permutation(torch.tensor([[0], [1]]), 2)
    with pytest.raises(ValueError, match="d_ff is 12, no multiple of 4 n = 8"):
        permuted_venom(torch.ones(2, 12), lists, 4)
    for v in (0, -3):
        with pytest.raises(ValueError, match=f"v is {v}; choose 1 or more"):
            permuted_venom(torch.ones(2, 8), lists, v)


# Load


def test_load_stats_by_hand():
    stats = load_stats(torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1]]), 4)
    assert stats["load"] == [0.5, 0.375, 0.125, 0.0]
    assert stats["max_over_mean"] == 2.0
    expected = -sum(p * math.log(p) for p in (0.5, 0.375, 0.125)) / math.log(4)
    assert stats["entropy"] == pytest.approx(expected, rel=1e-12)


def test_load_stats_at_the_extremes():
    even = load_stats(torch.arange(8).view(8, 1), 8)
    assert even["max_over_mean"] == 1 and even["entropy"] == pytest.approx(1)
    one = load_stats(torch.zeros(9, 1, dtype=torch.long), 8)
    assert one["max_over_mean"] == 8 and one["entropy"] == pytest.approx(0, abs=1e-12)
    assert load_stats(torch.zeros(9, 1, dtype=torch.long), 1)["entropy"] == 1


@given(data=cluster_lists())
@few
def test_load_is_a_distribution(data):
    clusters, n = data
    stats = load_stats(clusters, n)
    assert len(stats["load"]) == n and all(isinstance(share, float) for share in stats["load"])
    if clusters.numel():
        assert sum(stats["load"]) == pytest.approx(1)
        assert 1 - 1e-9 <= stats["max_over_mean"] <= n + 1e-9
        assert -1e-9 <= stats["entropy"] <= 1 + 1e-9


@pytest.mark.parametrize(
    "w1", [torch.zeros(8), torch.zeros(4, 8, dtype=torch.long)], ids=["vector", "integers"]
)
def test_what_is_no_matrix_of_floats_is_not_clustered(w1):
    with pytest.raises(ValueError, match=r"w1 must be a \[d_model, d_ff\] float matrix, got torch\."):
        cluster_neurons(w1, 2, seed=0)
