"""Weight gradients from compressed activations: by hand, against the reference, and how much is unpacked."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate.kernels import Compressed24, relu2_prune24, relu2_prune24_backward, unpack24
from replicate.kernels.two_four import wgrad24
from replicate.kernels.two_four.compressed24 import pack24_reference
from replicate.kernels.two_four.wgrad24 import (
    column_blocks,
    product_into,
    weight_gradient24,
    weight_gradient24_reference,
)
from replicate.sparsity import prune24

DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def operands(rows, cols, d_model, dtype, device, seed=0):
    """A [rows, cols], compressed, and B [rows, d_model]."""
    draw = torch.Generator().manual_seed(seed)
    a = prune24(torch.randn(rows, cols, generator=draw)).to(dtype).to(device)
    b = torch.randn(rows, d_model, generator=draw).to(dtype).to(device)
    return Compressed24(pack24_reference(a), rows, cols), b


def test_golden_2_tokens(device):
    a = torch.zeros(2, 128, dtype=torch.float16, device=device)
    a[0, :4], a[1, 64:68] = torch.tensor([0.0, 2, 0, 3]), torch.tensor([5.0, 0, 7, 0])
    b = torch.tensor([[1, 10], [100, 1000]], dtype=torch.float16, device=device)
    sparse = Compressed24(pack24_reference(a), 2, 128)
    expected = {1: [2, 20], 3: [3, 30], 64: [500, 5000], 66: [700, 7000]}
    for blocks in (1, 2):
        for transpose in (False, True):
            found = weight_gradient24(sparse, b, blocks=blocks, transpose=transpose, backend="triton")
            found = found.t() if transpose else found
            assert {f: found[f].tolist() for f in found.any(1).nonzero().view(-1).tolist()} == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows, cols, d_model", [(64, 64, 8), (1, 128, 24), (70, 320, 40)])
def test_matches_the_reference(rows, cols, d_model, transpose, dtype, device, poison):
    sparse, b = operands(rows, cols, d_model, dtype, device)
    expected = weight_gradient24_reference(sparse, b, transpose)
    assert expected.shape == ((d_model, cols) if transpose else (cols, d_model))
    for blocks in (1, 2, 3, 4, 99):
        for wanted in (None, dtype, torch.float32):
            for backend in ("triton", "reference"):
                found = weight_gradient24(
                    sparse, b, blocks=blocks, transpose=transpose, dtype=wanted, backend=backend
                )
                assert found.dtype == (wanted or dtype) and found.is_contiguous()
                tolerance = 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_they_are_the_gradients_of_both_weights(backend, dtype, device):
    """Of sum(y3 dy3), by autograd in double precision on the weights of a 2:4 FFN."""
    draw = torch.Generator().manual_seed(3)
    x, w1, w2, dy3 = (torch.randn(*n, generator=draw) for n in ((20, 16), (16, 128), (128, 16), (20, 16)))
    x, w1, w2, dy3 = (t.to(dtype).to(device) for t in (x, w1 / 4, w2 / 8, dy3))
    y2 = relu2_prune24(x @ w1, backend=backend)
    dy1 = relu2_prune24_backward(dy3 @ w2.t(), y2, backend=backend)
    kept = (unpack24(y2, backend=backend) != 0).double()
    wide1, wide2 = w1.double().requires_grad_(), w2.double().requires_grad_()
    y3 = ((x.double() @ wide1).relu().square() * kept) @ wide2
    exact1, exact2 = torch.autograd.grad(y3, (wide1, wide2), dy3.double())
    dw2 = weight_gradient24(y2, dy3, blocks=2, dtype=torch.float32, backend=backend)
    dw1 = weight_gradient24(dy1, x, blocks=2, transpose=True, dtype=torch.float32, backend=backend)
    for ours, exact in ((dw1, exact1), (dw2, exact2)):
        assert (ours.double() - exact).norm() < 8 * torch.finfo(dtype).eps * exact.norm()


@given(st.integers(1, 40), st.integers(1, 60))
@settings(deadline=None)
def test_blocks_cover_all_columns_once_in_whole_tiles(tiles, blocks):
    found = column_blocks(64 * tiles, blocks)
    assert [i for s in found for i in range(64 * tiles)[s]] == list(range(64 * tiles))
    widths = [s.stop - s.start for s in found]
    assert len(found) == min(blocks, tiles) and {w % 64 for w in widths} == {0}
    assert min(widths) > 0 and max(widths) - min(widths) <= 64


@pytest.mark.parametrize("transpose", [False, True])
def test_one_block_is_unpacked_at_a_time(transpose, device, monkeypatch):
    alive, widths, plain = [], [], wgrad24.unpack24

    def counted(sparse, columns, **options):
        assert not [block for block in alive if block() is not None], "an earlier block is still in memory"
        out = plain(sparse, columns, **options)
        alive.append(weakref.ref(out))
        widths.append(out.shape[1])
        return out

    monkeypatch.setattr(wgrad24, "unpack24", counted)
    sparse, b = operands(64, 512, 16, torch.float16, device)
    weight_gradient24(sparse, b, blocks=4, transpose=transpose, backend="triton")
    assert widths == [128] * 4


def test_a_dense_form_is_read_whole_and_not_copied(device, monkeypatch):
    sparse, b = operands(64, 256, 16, torch.float16, device)
    full, seen, plain = unpack24(sparse, backend="triton"), [], wgrad24.unpack24
    monkeypatch.setattr(wgrad24, "unpack24", lambda *a, **o: seen.append(plain(*a, **o)) or seen[-1])
    expected = weight_gradient24_reference(sparse, b)
    seen.clear()
    ours = weight_gradient24(sparse.with_dense(full), b, dtype=torch.float32, backend="triton")
    torch.testing.assert_close(ours, expected, rtol=4e-3, atol=4e-3)
    assert [block.data_ptr() for block in seen] == [full.data_ptr()] and seen[0].shape == full.shape


def test_a_product_is_written_where_it_belongs(device):
    a, b = (torch.randn(8, 8, generator=torch.Generator().manual_seed(s)).half().to(device) for s in (0, 1))
    for dtype in (torch.float16, torch.float32):
        whole = torch.full((8, 24), 7.0, dtype=dtype, device=device)
        out = product_into(whole[:, 8:16], a, b)
        torch.testing.assert_close(out.float(), a.float() @ b.float(), rtol=4e-3, atol=4e-3)
        assert out.data_ptr() == whole[:, 8:].data_ptr()
        assert (whole[:, :8] == 7).all() and (whole[:, 16:] == 7).all()


@pytest.mark.gpu
def test_float32_keeps_the_sums_and_saves_memory():
    sparse, b = operands(4096, 4096, 1024, torch.bfloat16, "cuda")
    exact = weight_gradient24_reference(sparse, b)
    errors, peaks = [], []
    for dtype in (torch.float32, torch.bfloat16):
        found = weight_gradient24(sparse, b, dtype=dtype)
        errors.append(float((found.double() - exact.double()).norm() / exact.double().norm()))
    assert errors[0] < 1e-4 < errors[1]
    for blocks in (1, 4):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = weight_gradient24(sparse, b, blocks=blocks, transpose=True, dtype=torch.float32)
        peaks.append(torch.cuda.max_memory_allocated() - before - out.nbytes)
    assert peaks[1] < 0.3 * peaks[0]


@pytest.mark.parametrize(
    "dense, options, message",
    [
        (torch.zeros(64, dtype=torch.float16), {}, "must be a matrix"),
        (torch.zeros(63, 8, dtype=torch.float16), {}, "differ in tokens"),
        (torch.zeros(64, 8), {}, "cast one"),
        (torch.zeros(64, 8, dtype=torch.float16), {"dtype": torch.bfloat16}, "choose torch.float16"),
        (torch.zeros(64, 8, dtype=torch.float16), {"blocks": 0}, "blocks is 0"),
    ],
)
def test_bad_input_is_refused(dense, options, message):
    sparse, _ = operands(64, 64, 8, torch.float16, "cpu")
    with pytest.raises(ValueError, match=message):
        weight_gradient24(sparse, dense, **options)
    with pytest.raises(ValueError, match="vendor"):
        opaque = Compressed24(sparse.buffer, 64, 64, "vendor")
        weight_gradient24(opaque, torch.zeros(64, 8, dtype=torch.float16))
