"""The dense layer by hand: its two passes and its gradients against the layer's own, and what it keeps."""

import weakref

import pytest
import torch

from replicate.bench import dense_peers
from replicate.bench.dense_peers import (
    dense_by_hand,
    relu2_,
    relu2_backward_,
    relu2_backward_reference,
    relu2_reference,
)
from replicate.ffn import SparseFFN, relu2

DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(params=["triton", "reference"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_golden_pass(backend, device):
    y1 = torch.tensor([[3.0, -2, 0, 0.5], [-0.0, 1, -7, 4]], dtype=torch.float16, device=device)
    y2 = relu2_(y1, backend=backend)
    assert y2 is y1 and y1.tolist() == [[9, 0, 0, 0.25], [0, 1, 0, 16]]
    dy2 = torch.tensor([[1.0, 5, 5, 2], [5, -3, 5, -1]], dtype=torch.float16, device=device)
    dy1 = relu2_backward_(dy2, y2, backend=backend)
    assert dy1 is dy2 and dy2.tolist() == [[6, 0, 0, 2], [0, -6, 0, -8]]
    assert y2.tolist() == [[9, 0, 0, 0.25], [0, 1, 0, 16]], "only dy2's memory is written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (5, dense_peers.BLOCK), (2, 3 * dense_peers.BLOCK + 1)])
def test_passes_match_the_references(shape, dtype, backend, device):
    y1, dy2 = randn(*shape).to(dtype).to(device), randn(*shape, seed=1).to(dtype).to(device)
    y2 = relu2_(y1.clone(), backend=backend)
    assert torch.equal(y2, relu2_reference(y1)) and torch.equal(y2, relu2(y1))
    dy1 = relu2_backward_(dy2.clone(), y2, backend=backend)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(dy1, relu2_backward_reference(dy2, y2), rtol=4 * eps, atol=0)
    exact = 2 * dy2.double() * y1.double().relu()
    torch.testing.assert_close(dy1.double(), exact, rtol=4 * eps, atol=1e-3)


def test_nan_and_infinity_are_not_lost(backend, device):
    bad = torch.tensor([float("nan"), float("inf"), -float("inf"), -1], dtype=torch.float32, device=device)
    y2 = relu2_(bad.clone(), backend=backend)
    assert y2[0].isnan() and y2[1:].tolist() == [float("inf"), 0, 0]
    dy1 = relu2_backward_(torch.ones_like(bad), y2, backend=backend)
    assert dy1[0].isnan() and dy1[1:].tolist() == [float("inf"), 0, 0]


def test_an_empty_matrix_is_allowed(backend, device):
    nothing = torch.empty(0, 8, device=device)
    assert relu2_(nothing, backend=backend) is nothing
    assert relu2_backward_(nothing, nothing.clone(), backend=backend) is nothing


def layer_and_gradients(x, w1, w2, dy3, forward):
    y3 = forward(x, w1, w2)
    return y3, *torch.autograd.grad(y3, (x, w1, w2), dy3)


@pytest.mark.parametrize("weights", ["float32", "x's"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_dense_layer(dtype, weights, backend, device):
    """Outputs are the dense phase's bits; gradients agree with double precision as well as its own do."""
    kept = torch.float32 if weights == "float32" else dtype
    x, dy3 = (randn(37, 24, seed=s).to(dtype).to(device) for s in (0, 1))
    w1, w2 = ((randn(*n, seed=s) / 4).to(kept).to(device) for s, n in ((2, (24, 64)), (3, (64, 24))))
    for t in (x, w1, w2):
        t.requires_grad_()
    ffn = SparseFFN(24, 64)

    def own(x, w1, w2):
        ffn.w1, ffn.w2 = torch.nn.Parameter(w1.detach()), torch.nn.Parameter(w2.detach())
        return torch.func.functional_call(ffn, {"w1": w1, "w2": w2}, (x,))

    ours = layer_and_gradients(x, w1, w2, dy3, lambda *a: dense_by_hand(*a, backend=backend))
    theirs = layer_and_gradients(x, w1, w2, dy3, own)
    wide = [t.detach().double().requires_grad_() for t in (x, w1, w2)]
    exact = layer_and_gradients(*wide, dy3.double(), lambda x, w1, w2: relu2(x @ w1) @ w2)
    assert [t.dtype for t in ours] == [dtype, dtype, kept, kept]
    assert torch.equal(ours[0], theirs[0])
    for a, b, c in zip(ours, theirs, exact, strict=True):
        error, other = ((t.double() - c).norm() / c.norm() for t in (a, b))
        assert error <= 2 * other + torch.finfo(dtype).eps


def test_gradients_by_finite_differences(backend, device):
    x, w1, w2 = (randn(*n, seed=s).double() for s, n in enumerate(((6, 8), (8, 16), (16, 8))))
    dy3, steps = randn(6, 8, seed=9).double(), [randn(*t.shape, seed=7).double() for t in (x, w1, w2)]

    def loss(scale):
        moved = [t + scale * step for t, step in zip((x, w1, w2), steps, strict=True)]
        return float((relu2(moved[0] @ moved[1]) @ moved[2] * dy3).sum())

    numeric = (loss(1e-6) - loss(-1e-6)) / 2e-6
    own = [t.float().to(device).requires_grad_() for t in (x, w1, w2)]
    _, *gradients = layer_and_gradients(
        *own, dy3.float().to(device), lambda *a: dense_by_hand(*a, backend=backend)
    )
    found = sum(float((g.cpu().double() * step).sum()) for g, step in zip(gradients, steps, strict=True))
    assert found == pytest.approx(numeric, rel=1e-4)


def test_of_wide_matrices_only_y2_is_kept(monkeypatch, device):
    """From forward to backward pass, and from it on nothing."""
    seen, plain = [], dense_peers.relu2_

    def noted(y1, **options):
        seen.append(weakref.ref(y1))
        return plain(y1, **options)

    monkeypatch.setattr(dense_peers, "relu2_", noted)
    x = randn(16, 8).to(device).requires_grad_()
    w1, w2 = (
        randn(8, 32, seed=1).to(device).requires_grad_(),
        randn(32, 8, seed=2).to(device).requires_grad_(),
    )
    y3 = dense_by_hand(x, w1, w2)
    kept = [*y3.grad_fn.saved_tensors, *y3.grad_fn.kept]
    assert [tuple(t.shape) for t in kept] == [(16, 8), (8, 32), (32, 8), (16, 32)]
    assert len(seen) == 1 and seen[0]() is kept[-1]
    del kept
    torch.autograd.grad(y3, (x, w1, w2), torch.ones_like(y3))
    assert seen[0]() is None, "y2 is freed although y3 and its graph are still there"


@pytest.mark.gpu
def test_it_takes_less_memory_than_eager():
    from replicate.bench import ffn as ffn_bench
    from replicate.bench import timing

    p = ffn_bench.LayerCase((4096, 1024, 4096), 0, "cuda")
    arms = (p.forward(ffn_bench.BY_HAND), p.layer(ffn_bench.DENSE))
    by_hand, eager = (timing.peak_bytes(lambda forward=forward: p.step(forward)) for forward in arms)
    assert by_hand <= 0.6 * eager


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        (((4, 2, 8), (8, 16), (16, 8)), ("float32",) * 3, "must be"),
        (((4, 8), (16, 8), (16, 8)), ("float32",) * 3, "must be"),
        (((4, 8), (8, 16), (8, 16)), ("float32",) * 3, "must be"),
        (((4, 8), (8, 16), (16, 8)), ("float16", "bfloat16", "float32"), "choose x's"),
    ],
)
def test_bad_input_is_refused(shapes, dtypes, message):
    tensors = [torch.zeros(*n, dtype=getattr(torch, d)) for n, d in zip(shapes, dtypes, strict=True)]
    with pytest.raises(ValueError, match=message):
        dense_by_hand(*tensors)


def test_passes_refuse_what_they_cannot_overwrite():
    square = torch.ones(4, 4)
    wide = torch.ones(4, 8)
    for y1 in (wide[:, :4], wide.t()):
        with pytest.raises(ValueError, match="contiguous"):
            relu2_(y1)
    for dy2, y2, message in (
        (wide[:, :4], square, "contiguous"),
        (square, wide[:, :4], "contiguous"),
        (square, wide, "y2 is"),
        (square, square.half(), "y2 is"),
    ):
        with pytest.raises(ValueError, match=message):
            relu2_backward_(dy2, y2)
