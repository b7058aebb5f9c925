"""The routed FFN of figure 4d against torch autograd, on adversarial routings, and as an operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate.kernels.venom.ffn import venom_ffn, venom_ffn_reference
from replicate.kernels.venom.token_lists import block_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def leaves(n_tokens, d_model, d_ff, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = ((n_tokens, d_model), (d_model, d_ff), (d_ff, d_model))
    scales = (1.0, d_model**-0.5, d_ff**-0.5)
    return [
        (torch.randn(size, generator=g) * scale).to(DEVICE, dtype).requires_grad_()
        for size, scale in zip(sizes, scales)
    ]


def compare(x, w1, w2, clusters, n, inner=True, block=16):
    """Relative errors of y3, dx, dW1, dW2 against autograd through the float32 reference."""
    y3 = venom_ffn(x, w1, w2, clusters, n, inner=inner, block=block)
    dy3 = torch.randn(y3.shape, generator=torch.Generator().manual_seed(9)).to(y3)
    ours = (y3, *torch.autograd.grad(y3, (x, w1, w2), dy3))
    wide = [t.detach().float().requires_grad_() for t in (x, w1, w2)]
    y3 = venom_ffn_reference(*wide, clusters, n, inner)
    reference = (y3, *torch.autograd.grad(y3, wide, dy3.float()))
    assert all(a.dtype == x.dtype and a.isfinite().all() for a in ours)
    return [((a.float() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(ours, reference)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("top_k", [1, 3])
def test_forward_and_gradients(device, dtype, inner, top_k):
    x, w1, w2 = leaves(50, 48, 160, dtype)
    clusters = torch.rand(50, 5).argsort(1)[:, :top_k].to(device)
    assert max(compare(x, w1, w2, clusters, 5, inner)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    "clusters",
    [
        torch.zeros(33, 1, dtype=torch.int64),  # all tokens to one cluster, the others empty
        torch.full((33, 1), 3),
        torch.tensor([[0, 1]] * 17 + [[3, 0]] * 16),  # one cluster empty
        torch.tensor([[2, 1, 0, 3]]),  # one token, every cluster
        torch.tensor([[1]]),
    ],
)
def test_adversarial_routings(device, clusters):
    x, w1, w2 = leaves(len(clusters), 32, 64)
    assert max(compare(x, w1, w2, clusters.to(device), 4)) <= TOLERANCE[torch.float32]


def test_every_cluster_and_no_inner_mask_is_the_dense_ffn(device):
    x, w1, w2 = leaves(20, 32, 64)
    every = torch.arange(4, device=device).expand(20, 4)
    y3 = venom_ffn(x, w1, w2, every, 4, inner=False, block=16)
    torch.testing.assert_close(y3, (x @ w1).relu().square() @ w2, rtol=1e-5, atol=1e-6)


def test_gradients_match_finite_differences(device):
    x, w1, w2 = leaves(8, 16, 32)
    clusters = torch.tensor([[0], [1]] * 4, device=device)
    dy3 = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(device)
    grads = torch.autograd.grad(venom_ffn(x, w1, w2, clusters, 2, block=16), (x, w1, w2), dy3)
    for leaf, grad in zip((x, w1, w2), grads):
        step = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(2)).to(device).double()
        both = []
        for sign in (1, -1):
            moved = [t.double() + (sign * 1e-6 * step if t is leaf else 0) for t in (x, w1, w2)]
            both.append((venom_ffn_reference(*moved, clusters, 2) * dy3).sum())
        numeric = (both[0] - both[1]) / 2e-6
        assert (grad * step).sum().item() == pytest.approx(numeric.item(), rel=1e-4)


def test_later_tokens_do_not_matter(device):
    x, w1, w2 = leaves(40, 32, 64)
    clusters = torch.rand(40, 4).argsort(1)[:, :2].to(device)
    before = venom_ffn(x, w1, w2, clusters, 4, block=16)
    with torch.no_grad():
        x[30:] = 100.0
    after = venom_ffn(
        x, w1, w2, clusters.clone().index_fill_(0, torch.arange(30, 40, device=device), 1), 4, block=16
    )
    torch.testing.assert_close(after[:30], before[:30], rtol=1e-6, atol=1e-6)


def test_no_tokens(device):
    x, w1, w2 = leaves(0, 16, 32)
    y3 = venom_ffn(x, w1, w2, torch.empty(0, 1, dtype=torch.int64, device=device), 2)
    grads = torch.autograd.grad(y3.sum(), (x, w1, w2))
    assert y3.shape == (0, 16)
    assert all((g == 0).all() for g in grads)


def test_runs_are_bit_identical(device):
    x, w1, w2 = leaves(64, 32, 64)
    clusters = torch.rand(64, 4).argsort(1)[:, :3].to(device)
    runs = []
    for _ in range(2):
        y3 = venom_ffn(x, w1, w2, clusters, 4, block=16)
        runs.append((y3, *torch.autograd.grad(y3.square().sum(), (x, w1, w2))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@given(st.data())
@settings(max_examples=8, deadline=None)
def test_any_routing(data):
    n = data.draw(st.integers(1, 4))
    top_k = data.draw(st.integers(1, n))
    rows = data.draw(st.lists(st.permutations(range(n)), min_size=1, max_size=30))
    clusters = torch.tensor([row[:top_k] for row in rows], device=DEVICE)
    d_model, width = (8 * data.draw(st.integers(1, 5)) for _ in range(2))
    x, w1, w2 = leaves(len(rows), d_model, n * width, seed=len(rows))
    assert max(compare(x, w1, w2, clusters, n)) <= TOLERANCE[torch.float32]


def test_compiled_is_the_same(device):
    x, w1, w2 = leaves(20, 16, 32)
    clusters = torch.rand(20, 2).argsort(1)[:, :1].to(device)

    def step(x, w1, w2):
        return 2 * venom_ffn(x, w1, w2, clusters, 2, block=16)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    runs = [(y := fn(x, w1, w2), *torch.autograd.grad(y.sum(), (x, w1, w2))) for fn in (step, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.gpu
def test_a_cuda_graph_replays_another_routing(device):
    x, w1, w2 = leaves(300, 64, 256, torch.bfloat16)
    clusters = torch.zeros(300, 2, dtype=torch.int64, device=device)
    clusters[:, 1] = 1
    venom_ffn(x, w1, w2, clusters, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y3 = venom_ffn(x, w1, w2, clusters, 4)
    clusters.copy_(torch.rand(300, 4).argsort(1)[:, :2])
    graph.replay()
    expected = venom_ffn_reference(x.float(), w1.float(), w2.float(), clusters, 4)
    assert (y3 - expected).norm() / expected.norm() < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize(("d_model", "d_ff", "n", "top_k"), [(1024, 4096, 16, 4), (640, 2560, 16, 2)])
def test_full_tiles(device, d_model, d_ff, n, top_k):
    x, w1, w2 = leaves(2000, d_model, d_ff, torch.bfloat16)
    clusters = torch.rand(2000, n).argsort(1)[:, :top_k].to(device)
    assert max(compare(x, w1, w2, clusters, n, block=0)) <= TOLERANCE[torch.bfloat16]


def test_block_rows_follow_the_lists():
    assert [block_rows(16 * mean, 16) for mean in (4096, 100, 40, 1)] == [128, 64, 32, 16]


def test_refuses(device):
    x, w1, w2 = leaves(20, 16, 64)
    clusters = torch.zeros(20, 1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="must be"):
        venom_ffn(x, w1, w2[:56], clusters, 2)
    with pytest.raises(ValueError, match=r"clusters must be \[20, k\]"):
        venom_ffn(x, w1, w2, clusters[:10], 2)
    with pytest.raises(ValueError, match="d_ff is 64"):
        venom_ffn(x, w1, w2, clusters, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter")
def test_interpreted_bfloat16_is_refused():
    x, w1, w2 = leaves(4, 16, 32, torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        venom_ffn(x, w1, w2, torch.zeros(4, 1, dtype=torch.int64), 2)
