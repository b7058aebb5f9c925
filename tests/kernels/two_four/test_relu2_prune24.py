"""relu2_prune24 and its backward: by hand, against the references, and on inputs made to break them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from replicate.kernels import Compressed24, relu2_prune24, relu2_prune24_backward, unpack24
from replicate.kernels.two_four.relu2_prune24 import (
    relu2_prune24_backward_reference,
    relu2_prune24_reference,
)
from replicate.sparsity import check24

DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SHAPES = [(64, 64), (1, 64), (70, 192)]


def randn(rows, cols, dtype, device, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def same(a, b):
    """Equal to the bit, any NaN equal to any NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_golden_4x4(device):
    y1 = torch.zeros(64, 64, dtype=torch.float16, device=device)
    y1[:4, :4] = torch.tensor([[9, 1, 7, 4], [1, 2, 3, 0], [8, -3, 5, -4], [2, 2, -2, 2]])
    y2 = relu2_prune24(y1, dense=True, backend="triton")
    assert y2.dense[:4, :4].tolist() == [[81, 0, 49, 0], [0, 4, 9, 0], [64, 0, 25, 0], [4, 4, 0, 0]]
    values, metadata = y2
    assert values[:4, :2].tolist() == [[81, 49], [4, 9], [64, 25], [4, 4]]
    nibbles = [int(metadata[8 * row] & 15) for row in range(4)]
    assert nibbles == [0 | 2 << 2, 1 | 2 << 2, 0 | 2 << 2, 0 | 1 << 2]
    dy2 = torch.ones_like(y1)
    dy1 = relu2_prune24_backward(dy2, y2, form="dense", backend="triton")
    assert dy1[:4, :4].tolist() == [[18, 0, 14, 0], [0, 4, 6, 0], [16, 0, 10, 0], [4, 4, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_forward_matches_the_reference(rows, cols, dtype, device, poison):
    y1 = randn(rows, cols, dtype, device)
    expected, mask = relu2_prune24_reference(y1)
    for dense in (False, True):
        ours = relu2_prune24(y1, dense=dense, backend="triton")
        torch_path = relu2_prune24(y1, dense=dense, backend="reference")
        assert torch.equal(unpack24(Compressed24(ours.buffer, rows, cols)), expected)
        assert torch.equal(ours.metadata, torch_path.metadata) and torch.equal(ours.values, torch_path.values)
        assert (ours.dense is None) == (not dense)
        if dense:
            assert torch.equal(ours.dense, expected) and torch.equal(torch_path.dense, expected)
    assert mask.view(rows, -1, 4).sum(-1).eq(2).all()
    check24(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_backward_matches_the_reference(rows, cols, dtype, device, poison):
    y1, dy2 = randn(rows, cols, dtype, device), randn(rows, cols, dtype, device, seed=1)
    y2 = relu2_prune24(y1, backend="triton")
    expected = relu2_prune24_backward_reference(dy2, *relu2_prune24_reference(y1))
    one_ulp = torch.finfo(dtype).eps
    for backend in ("triton", "reference"):
        dense = relu2_prune24_backward(dy2, y2, form="dense", backend=backend)
        compressed = relu2_prune24_backward(dy2, y2, backend=backend)
        both = relu2_prune24_backward(dy2, y2, form="both", backend=backend)
        torch.testing.assert_close(dense, expected, rtol=one_ulp, atol=0)
        assert torch.equal(compressed.metadata, y2.metadata) and compressed.dense is None
        assert torch.equal(unpack24(compressed), dense)
        assert torch.equal(both.dense, dense) and torch.equal(both.buffer, compressed.buffer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_backward_in_the_memory_of_dy2(backend, dtype, device):
    y1, dy2 = randn(70, 192, dtype, device), randn(70, 192, dtype, device, seed=1)
    y2 = relu2_prune24(y1, backend=backend)
    expected = relu2_prune24_backward(dy2, y2, form="both", backend=backend)
    for form in ("dense", "both"):
        memory = dy2.clone()
        out = relu2_prune24_backward(memory, y2, form=form, overwrite=True, backend=backend)
        assert (out if form == "dense" else out.dense).data_ptr() == memory.data_ptr()
        assert torch.equal(memory, expected.dense)
        assert form == "dense" or torch.equal(out.buffer.view(torch.int16), expected.buffer.view(torch.int16))
    with pytest.raises(ValueError, match="dense form"):
        relu2_prune24_backward(dy2, y2, overwrite=True, backend=backend)
    with pytest.raises(ValueError, match="contiguous"):
        wide = torch.zeros(70, 384, dtype=dtype, device=device)[:, :192]
        relu2_prune24_backward(wide, y2, form="dense", overwrite=True, backend=backend)


@pytest.mark.gpu
def test_backward_in_the_memory_of_dy2_at_size():
    y1, dy2 = (torch.randn(4096, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    y2 = relu2_prune24(y1)
    expected = relu2_prune24_backward(dy2, y2, form="both")
    ours = relu2_prune24_backward(dy2, y2, form="both", overwrite=True)
    assert torch.equal(ours.dense, expected.dense) and torch.equal(ours.metadata, expected.metadata)
    assert torch.equal(ours.values, expected.values) and ours.dense is dy2


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_is_the_derivative(dtype, device):
    y1 = randn(64, 64, torch.float32, "cpu").double().requires_grad_()
    dy2 = randn(64, 64, torch.float32, "cpu", seed=1)
    _, mask = relu2_prune24_reference(y1.detach())
    (y1.clamp_min(0).square() * mask * dy2).sum().backward()
    y2 = relu2_prune24(y1.detach().to(dtype).to(device), backend="triton")
    ours = relu2_prune24_backward(dy2.to(dtype).to(device), y2, form="dense", backend="triton")
    error = (ours.cpu().double() - y1.grad).norm() / y1.grad.norm()
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_differences(dtype, device):
    """The loss of the double-precision reference moves as dy1 says."""
    y1 = randn(64, 64, torch.float32, "cpu").double()
    dy2 = randn(64, 64, torch.float32, "cpu", seed=1).double()
    step = torch.zeros_like(y1)
    step[0, :4], step[63, 60:] = 1e-6, 1e-6

    def loss(x):
        _, mask = relu2_prune24_reference(x)
        return (x.clamp_min(0).square() * mask * dy2).sum()

    numeric = (loss(y1 + step) - loss(y1 - step)) / 2e-6
    y2 = relu2_prune24(y1.to(dtype).to(device), backend="triton")
    dy1 = relu2_prune24_backward(dy2.to(dtype).to(device), y2, form="dense", backend="triton").cpu()
    assert math.isclose(dy1[0, :4].sum() + dy1[63, 60:].sum(), numeric, rel_tol=0.02, abs_tol=0.02)


def adversarial(dtype, device):
    """Groups with ties, zeros of both signs, infinities, NaN of both signs, denormals and huge values."""
    info = torch.finfo(dtype)
    nan, inf, tiny, big = float("nan"), float("inf"), info.smallest_normal * info.eps, info.max
    groups = torch.tensor(
        [
            [1, 1, 1, 1],
            [-0.0, 0.0, -0.0, 0.0],
            [0.0, -1, -2, -3],
            [inf, inf, inf, 1],
            [-inf, inf, 2, 3],
            [nan, 1, 2, 3],
            [1, 2, 3, nan],
            [nan, nan, nan, 1],
            [nan, inf, inf, -inf],
            [tiny, 2 * tiny, tiny, -tiny],
            [big, big, -big, big],
            [big, inf, tiny, 0],
            [0, 0, 0, 5],
            [5, 0, 5, 5],
            [1, 2, 2, 1],
            [3, 1, 1, 2],
        ],
        dtype=dtype,
    )
    y1 = groups.view(1, -1).repeat(64, 1)
    y1[1] = y1[1].roll(3)
    as_bits = y1[2].view(torch.int16)
    as_bits[y1[2].isnan()] |= -32768  # NaN with the sign bit, as some CPUs make them
    return y1.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adversarial_values(dtype, device, poison):
    y1 = adversarial(dtype, device)
    expected, mask = relu2_prune24_reference(y1)
    ours = relu2_prune24(y1, dense=True, backend="triton")
    assert same(ours.dense, expected)
    assert torch.equal(ours.metadata, relu2_prune24(y1, backend="reference").metadata)
    groups = y1.view(64, -1, 4)
    assert torch.equal(groups.isnan().any(-1), ours.dense.view(64, -1, 4).isnan().any(-1))
    dy1 = relu2_prune24_backward(torch.full_like(y1, 0.5), ours, form="dense", backend="triton")
    assert same(dy1, relu2_prune24_backward_reference(torch.full_like(y1, 0.5), expected, mask))


@settings(max_examples=10, deadline=None)
@given(hnp.arrays("float16", (3, 64), elements=st.floats(-256, 256, width=16)))
def test_result_is_24_and_keeps_the_largest(values):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    y1 = torch.from_numpy(values).to(device)
    y2 = relu2_prune24(y1, dense=True, backend="triton").dense
    check24(y2)
    full = y1.float().clamp_min(0).square().to(y2.dtype).view(3, -1, 4)
    top = full.sort(-1, descending=True).values[..., :2]
    assert torch.equal(y2.view(3, -1, 4).sort(-1, descending=True).values[..., :2], top)


def test_one_token_whose_row_stride_is_no_whole_word(device):
    row = randn(1, 64, torch.float16, device)
    odd = torch.empty_strided((1, 64), (67, 1), dtype=row.dtype, device=device).copy_(row)
    assert odd.is_contiguous() and odd.stride() == (67, 1)
    y2 = relu2_prune24(odd, backend="triton")
    assert torch.equal(unpack24(y2), unpack24(relu2_prune24(row, backend="triton")))
    expected = relu2_prune24_backward(row, y2, form="dense", backend="triton")
    for overwrite in (False, True):
        dy1 = relu2_prune24_backward(odd, y2, form="dense", overwrite=overwrite, backend="triton")
        assert torch.equal(dy1, expected)


def test_strided_input(device):
    y1 = randn(64, 128, torch.float16, device).t()
    assert not y1.is_contiguous()
    y2 = relu2_prune24(y1, dense=True, backend="triton")
    assert torch.equal(y2.dense, relu2_prune24_reference(y1)[0])
    dy1 = relu2_prune24_backward(y1, y2, form="dense", backend="triton")
    assert torch.equal(dy1, relu2_prune24_backward(y1.contiguous(), y2, form="dense", backend="triton"))


def test_input_that_starts_inside_a_word(device):
    y1 = randn(1, 64 * 64 + 1, torch.float16, device)[0, 1:].view(64, 64)
    assert torch.equal(relu2_prune24(y1, dense=True, backend="triton").dense, relu2_prune24_reference(y1)[0])


@pytest.mark.parametrize(
    "y1, message",
    [
        (torch.zeros(64), "must be a matrix"),
        (torch.zeros(4, 64), "float32"),
        (torch.zeros(4, 72, dtype=torch.float16), "no multiple of 64; pad to 128"),
        (torch.zeros(0, 64, dtype=torch.float16), "empty"),
    ],
)
def test_bad_input_is_refused(y1, message):
    with pytest.raises(ValueError, match=message):
        relu2_prune24(y1)


def test_bad_backward_input_is_refused():
    y2 = relu2_prune24(torch.ones(64, 64, dtype=torch.float16), backend="reference")
    with pytest.raises(ValueError, match="form"):
        relu2_prune24_backward(torch.ones(64, 64, dtype=torch.float16), y2, form="sparse")
    with pytest.raises(ValueError, match="shape"):
        relu2_prune24_backward(torch.ones(64, 128, dtype=torch.float16), y2)
    with pytest.raises(ValueError, match="bfloat16"):
        relu2_prune24_backward(torch.ones(64, 64, dtype=torch.bfloat16), y2)


def test_the_interpreter_refuses_bfloat16(device):
    if device == "cuda":
        pytest.skip("a GPU computes bfloat16")
    with pytest.raises(ValueError, match="bfloat16"):
        relu2_prune24(torch.ones(64, 64, dtype=torch.bfloat16), backend="triton")


def test_operators_are_registered_right(device):
    y1 = randn(70, 128, torch.float16, device)
    y2 = relu2_prune24(y1, backend="triton").buffer
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.replicate
    torch.library.opcheck(ops.relu2_prune24.default, (y1, True, True), test_utils=checks)
    torch.library.opcheck(ops.relu2_prune24_backward.default, (y1, y2, True, False), test_utils=checks)
    torch.library.opcheck(ops.relu2_prune24_backward_.default, (y1.clone(), y2, True), test_utils=checks)
    for columns in ((0, 128), (64, 128)):
        torch.library.opcheck(ops.unpack24.default, (y2, 70, 128, *columns), test_utils=checks)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_without_a_graph_break(backend, device):
    def step(y1, dy2):
        y2 = relu2_prune24(y1, dense=True, backend=backend)
        dy1 = relu2_prune24_backward(dy2, y2, form="both", backend=backend)
        return y2.dense, dy1.buffer, dy1.dense

    y1, dy2 = randn(64, 64, torch.float16, device), randn(64, 64, torch.float16, device, seed=1)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(y1, dy2), step(y1, dy2), strict=True):
        assert torch.equal(ours.view(torch.int16), expected.view(torch.int16))
