"""Rows and weights in FP8 against their formulas, and Venom's products with such operands."""

import pytest
import torch

from replicate.kernels.venom.common import FP8
from replicate.kernels.venom.down import venom_down, venom_down_reference
from replicate.kernels.venom.quantise import quantise_rows, quantise_weight
from replicate.kernels.venom.token_lists import token_lists
from replicate.kernels.venom.up import (
    venom_up,
    venom_up_backward,
    venom_up_backward_reference,
    venom_up_reference,
)

# tokens, d_model, d_ff, clusters, top_k, block
SHAPES = [(60, 64, 256, 4, 2, 32), (37, 96, 96, 3, 1, 16), (1, 32, 64, 2, 2, 16), (150, 160, 768, 4, 3, 64)]


@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (600, 64), (3, 1056)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows(device, poison, shape, dtype):
    t = (torch.randn(shape) * torch.randn(shape[0], 1).exp()).to(device, dtype)
    values, scale = quantise_rows(t)
    assert values.dtype == FP8 and (values.float().abs().amax(1) == 448).all()
    same(scale, t.float().abs().amax(1) / 448)
    nearest(values, t.float() / scale[:, None])


@pytest.mark.parametrize("shape", [(32, 64), (96, 160), (516, 72), (1024, 2048)])
def test_weights(device, poison, shape):
    w = torch.randn(shape, device=device) * 0.02
    values, turned, scale = quantise_weight(w)
    assert torch.equal(values.view(torch.uint8).T, turned.view(torch.uint8)) and turned.is_contiguous()
    assert scale.dim() == 0
    same(scale, w.abs().max() / 448)
    nearest(values, w / scale)


def test_every_number_of_e4m3_and_what_lies_between(device, poison):
    """Numbers, midpoints and their neighbours; 448 is among them, so the scale is 1."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    numbers = numbers[numbers.isfinite()].unique()
    middle = (numbers[1:] + numbers[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(end)) for end in (1e9, -1e9)]
    t = torch.cat([numbers, middle, *near, torch.tensor([-0.0])])
    t = torch.cat([t, t.new_zeros(-len(t) % 124)]).view(-1, 31)  # 124: whole rows, four at a time
    t = torch.cat([t, t.new_full((len(t), 1), 448)], 1)
    want = t.to(FP8).view(torch.uint8)
    assert len(want.unique()) == 254, "256 without two NaN"
    rows, turned = quantise_rows(t.to(device))[0], quantise_weight(t.to(device))[1]
    assert torch.equal(rows.view(torch.uint8).cpu(), want)
    assert torch.equal(turned.view(torch.uint8).T.cpu(), want)


def same(ours, reference):
    assert torch.allclose(ours, reference, rtol=1e-6, atol=0)


def nearest(values, exact):
    """`values` are `exact` to the nearest number of 3 bits, or of 2^-9 if below 2^-6; on a GPU division may
    be off by a bit, and turn a tie."""
    wrong = values.float() != exact.to(FP8).float()
    assert wrong.float().mean() <= (1e-3 if values.is_cuda else 0)
    off = (values.float() - exact).abs()
    assert (off <= (exact.abs() / 16).clamp(min=2**-10) * 1.001).all()


def test_zeros_and_what_is_no_number(device, poison):
    t = torch.zeros(4, 32, device=device)
    t[1, 3], t[2, 5], t[3] = float("nan"), float("inf"), 2.0
    values, scale = quantise_rows(t)
    assert scale[0] == 1 and (values[0].float() == 0).all()
    assert values[1, 3].float().isnan() and values[2, 5].float().isnan()
    assert (values[3].float() * scale[3] == 2).all()
    assert quantise_weight(torch.zeros(32, 32, device=device))[2] == 1


@pytest.mark.parametrize("wrong", [(64,), "turned"])
def test_what_is_no_matrix_is_refused(device, wrong):
    t = torch.zeros(32, 64).T if wrong == "turned" else torch.zeros(wrong)
    for function in (quantise_rows, quantise_weight):
        with pytest.raises(ValueError, match="contiguous matrix"):
            function(t.to(device))


def problem(shape, device):
    n_tokens, d_model, d_ff, n, top_k, block = shape
    clusters = torch.rand(n_tokens, n).argsort(1)[:, :top_k].to(device)
    x, dy3 = torch.randn(2, n_tokens, d_model, device=device)
    w1, w2 = (torch.randn(size, device=device) * 0.1 for size in ((d_model, d_ff), (d_ff, d_model)))
    return x, w1, w2, dy3, token_lists(clusters, n, block)


def used(y, lists):
    return y[: int(lists.n_blocks) * lists.block]


def of_rows(scale, lists):
    return scale[lists.tokens.clamp(0, len(scale) - 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_fp8_operands(device, poison, shape):
    """Against the same products of the dequantised operands."""
    x, w1, w2, dy3, lists = problem(shape, device)
    (x8, of_x), (dy8, of_dy) = quantise_rows(x), quantise_rows(dy3)
    (w1_8, w1_t, of_w1), (w2_8, w2_t, of_w2) = quantise_weight(w1), quantise_weight(w2)
    x, dy3 = x8.float() * of_x[:, None], dy8.float() * of_dy[:, None]
    w1, w2 = w1_8.float() * of_w1, w2_8.float() * of_w2

    def close(ours, reference, error=2e-3):
        assert ours.isfinite().all()
        assert (ours.float() - reference).norm() <= error * reference.norm()

    half = torch.bfloat16 if device == "cuda" else torch.float16
    y2 = venom_up(x8, w1_t, lists, transposed=True, factor=of_rows(of_x * of_w1, lists), dtype=half)
    assert y2.dtype == half
    error = 1e-2 if device == "cuda" else 2e-3
    close(used(y2, lists), used(venom_up_reference(x, w1, lists), lists), error)
    dy1 = venom_up_backward(dy8, w2_8, y2, lists, factor=of_rows(of_dy * of_w2, lists))
    reference = venom_up_backward_reference(dy3, w2, used(y2, lists).float(), lists)
    close(used(dy1, lists), reference, error)
    for y, w8, of_w, w, transposed in ((y2, w2_t, of_w2, w2, False), (dy1, w1_8, of_w1, w1, True)):
        y8, of_y = quantise_rows(y)
        out = venom_down(y8, w8, lists, transposed=True, factor=of_y * of_w, dtype=half)
        close(
            out,
            venom_down_reference(used(y8.float() * of_y[:, None], lists), w, lists, transposed),
            error,
        )


def test_shapes_that_fp8_cannot_have_are_refused(device):
    with pytest.raises(ValueError, match="w has 18 rows"):
        quantise_weight(torch.zeros(18, 32, device=device))
    x, w1, _, _, lists = problem((16, 40, 64, 2, 2, 16), device)
    with pytest.raises(ValueError, match="multiple of 32"):
        venom_up(quantise_rows(x)[0], quantise_weight(w1)[1], lists, transposed=True)
