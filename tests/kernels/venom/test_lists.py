"""Router and token lists: golden cases, against their references and replicate.router, and as properties."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate import router
from replicate.kernels.venom.route_active import route_active, route_active_reference
from replicate.kernels.venom.route_topk import route_topk, route_topk_reference
from replicate.kernels.venom.token_lists import max_rows, token_lists, token_lists_reference

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture
def poisoned(monkeypatch):
    """Every buffer a kernel is to fill starts as -7: no token, no cluster, no row."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(-7))


def assert_same_lists(ours, reference):
    used = int(reference.n_blocks) * reference.block
    for name, a, b in zip(reference._fields, ours, reference):
        stop = used if name == "tokens" else None
        assert torch.equal(a[:stop].cpu(), b[:stop]), name


def test_lists_of_four_tokens(device):
    lists = token_lists(torch.tensor([[1, 2], [1, 0], [3, 1], [1, 3]], device=device), 4, block=16)
    assert lists.counts.tolist() == [1, 4, 1, 2]
    assert lists.starts.tolist() == [0, 16, 32, 48]
    assert lists.block_cluster.tolist() == [0, 1, 2, 3]
    assert lists.n_blocks.tolist() == [4]
    assert lists.tokens[:2].tolist() == [1, -1]
    assert lists.tokens[16:21].tolist() == [0, 1, 2, 3, -1]
    assert lists.inverse.tolist() == [[16, 32], [17, 0], [48, 18], [19, 49]]


@pytest.mark.parametrize(
    ("n_tokens", "top_k", "n", "block"),
    [(1, 1, 1, 16), (1, 4, 4, 16), (700, 4, 16, 128), (300, 5, 7, 32), (3000, 1, 3, 64)],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lists_against_reference_and_router(device, poisoned, n_tokens, top_k, n, block, dtype):
    clusters = torch.rand(n_tokens, n).argsort(1)[:, :top_k].to(dtype)
    lists = token_lists(clusters.to(device), n, block)
    assert_same_lists(lists, token_lists_reference(clusters, n, block))
    plain = router.token_permutation(clusters.long(), n)
    assert torch.equal(lists.tokens.cpu()[lists.inverse.cpu().long()].long(), plain.tokens[plain.inverse])


def test_lists_of_more_chunks_than_are_summed_at_a_time(device, poisoned, monkeypatch):
    monkeypatch.setattr(importlib.import_module("replicate.kernels.venom.token_lists"), "SCAN", 2)
    clusters = torch.rand(500, 8).argsort(1)[:, :3]
    assert_same_lists(token_lists(clusters.to(device), 8, 16), token_lists_reference(clusters, 8, 16))


@pytest.mark.parametrize("own", [0, 2, 4])
def test_lists_all_tokens_to_one_cluster(device, poisoned, own):
    clusters = torch.full((40, 1), own)
    assert_same_lists(token_lists(clusters.to(device), 5, 16), token_lists_reference(clusters, 5, 16))


def test_lists_without_tokens(device):
    lists = token_lists(torch.empty(0, 2, dtype=torch.int64, device=device), 4, 16)
    assert lists.counts.tolist() == [0] * 4
    assert lists.n_blocks.tolist() == [0]
    assert lists.tokens.numel() == 0


def test_lists_leave_out_ids_that_name_no_cluster(device):
    lists = token_lists(torch.tensor([[0], [2**32 + 1], [-1], [2], [3]], device=device), 3, 16)
    assert lists.counts.tolist() == [1, 0, 1]
    assert lists.inverse.flatten().tolist() == [0, -1, -1, 16, -1]
    assert lists.n_blocks.tolist() == [2]


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_lists_hold_every_choice_once(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, n))
    rows = data.draw(st.lists(st.permutations(range(n)), min_size=1, max_size=40))
    clusters = torch.tensor([row[:top_k] for row in rows], device=device)
    lists = token_lists(clusters, n, 16)
    token = torch.arange(len(rows), device=device, dtype=torch.int32)[:, None].expand(-1, top_k)
    assert torch.equal(lists.tokens[lists.inverse.long()], token)
    assert len(lists.inverse.unique()) == lists.inverse.numel()
    assert torch.equal(lists.block_cluster[lists.inverse.long() // 16], clusters.int())
    assert (lists.starts % 16 == 0).all()
    assert int(lists.n_blocks) * 16 <= max_rows(clusters.numel(), n, 16)


@pytest.mark.parametrize(
    ("clusters", "n", "block", "match"),
    [
        (torch.zeros(4, dtype=torch.int64), 4, 16, "T, k"),
        (torch.zeros(4, 1), 4, 16, "float32"),
        (torch.zeros(4, 1, dtype=torch.int64), 4, 24, "block is 24"),
        (torch.zeros(4, 1, dtype=torch.int64), 0, 16, "n_clusters is 0"),
    ],
)
def test_lists_refuse(device, clusters, n, block, match):
    with pytest.raises(ValueError, match=match):
        token_lists(clusters.to(device), n, block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_tokens", "d_model", "n", "top_k"), [(1, 8, 1, 1), (100, 72, 16, 4), (65, 200, 5, 5)]
)
def test_route_against_reference(device, dtype, n_tokens, d_model, n, top_k):
    x = torch.randn(n_tokens, d_model, device=device).to(dtype)
    means = torch.randn(n, d_model, device=device).to(dtype)
    clusters = route_topk(x, means, top_k)
    ours, best = (
        (x.float() @ means.float().T).gather(1, e.long())
        for e in (clusters, route_topk_reference(x, means, top_k))
    )
    # Scores that differ by rounding alone may change places.
    torch.testing.assert_close(ours, best, rtol=1e-4, atol=1e-4)
    assert all(len(set(row)) == top_k for row in clusters.tolist())


def test_route_ties_nan_and_infinity(device):
    x = torch.tensor([[1.0] * 8, [float("nan")] * 8, [float("inf")] * 8], device=device)
    means = torch.ones(4, 8, device=device)
    means[2] = 2
    means[3] = -1
    assert route_topk(x, means, 3).tolist() == [[2, 0, 1], [0, 1, 2], [0, 1, 2]]


def test_route_agrees_with_the_router(device):
    x, means = torch.randn(64, 32, device=device), torch.randn(16, 32, device=device)
    assert torch.equal(route_topk(x, means, 4).long().cpu(), router.route(x.cpu(), means.cpu(), 4))


def test_route_refuses(device):
    x = torch.randn(4, 16, device=device)
    with pytest.raises(ValueError, match="top_k is 5"):
        route_topk(x, torch.randn(4, 16, device=device), 5)
    with pytest.raises(ValueError, match="d_model"):
        route_topk(x, torch.randn(4, 24, device=device), 1)


def test_active_by_hand(device):
    """Two clusters of eight: energies 4 + 1 and 9, then 1 and 0; a negative y1 does not fire."""
    y1 = torch.zeros(3, 16, device=device)
    y1[0, 0], y1[0, 7], y1[0, 8] = 2, 1, 3
    y1[1, 3], y1[1, 12] = 1, -5
    assert route_active(y1, 2, 2).tolist() == [[1, 0], [0, 1], [0, 1]]
    assert route_active(y1, 2, 1).tolist() == [[1], [0], [0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_tokens", "d_ff", "n", "top_k"), [(1, 8, 1, 1), (100, 384, 16, 4), (65, 160, 5, 5), (33, 1200, 2, 1)]
)
def test_active_against_reference(device, poison, dtype, n_tokens, d_ff, n, top_k):
    y1 = torch.randn(n_tokens, d_ff, device=device).to(dtype)
    clusters = route_active(y1, n, top_k)
    energy = y1.float().relu().square().unflatten(1, (n, -1)).sum(2)
    ours, best = (energy.gather(1, e.long()) for e in (clusters, route_active_reference(y1, n, top_k)))
    torch.testing.assert_close(ours, best, rtol=1e-4, atol=1e-4)
    assert all(len(set(row)) == top_k for row in clusters.tolist())


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_active_keeps_the_largest_energies(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, width = data.draw(st.integers(1, 6)), 8 * data.draw(st.integers(1, 3))
    top_k = data.draw(st.integers(1, n))
    values = data.draw(st.lists(st.integers(-9, 9), min_size=n * width, max_size=n * width))
    y1 = torch.tensor([values], device=device, dtype=torch.float32)
    energy = y1.relu().square().unflatten(1, (n, -1)).sum(2)[0].tolist()
    chosen = route_active(y1, n, top_k)[0].tolist()
    assert chosen == sorted(range(n), key=lambda e: (-energy[e], e))[:top_k]


def test_active_nan_and_infinity(device):
    y1 = torch.ones(2, 32, device=device)
    y1[0, 9], y1[1, 20] = float("nan"), float("inf")
    assert route_active(y1, 4, 4).tolist() == [[1, 0, 2, 3], [2, 0, 1, 3]]
    assert torch.equal(route_active(y1, 4, 4).cpu(), route_active_reference(y1.cpu(), 4, 4))
    assert route_active(y1[:0], 4, 1).shape == (0, 1)


def test_active_refuses(device):
    y1 = torch.randn(4, 32, device=device)
    with pytest.raises(ValueError, match="top_k is 5"):
        route_active(y1, 4, 5)
    with pytest.raises(ValueError, match="d_ff is 32; 3 clusters need a multiple of 24"):
        route_active(y1, 3, 1)
    with pytest.raises(ValueError, match="contiguous"):
        route_active(y1.t(), 1, 1)
