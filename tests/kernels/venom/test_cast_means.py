"""W1 cast and the router's means from one read, against torch."""

import pytest
import torch

from replicate.kernels.venom.cast_means import cast_means, cast_means_reference, means_and_largest

DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_ff", "n"), [(8, 32, 2), (24, 384, 16), (40, 64, 1), (136, 3072, 2)])
def test_both_are_torchs(d_model, d_ff, n, dtype, device, poison):
    w1 = torch.randn(d_model, d_ff, generator=torch.Generator().manual_seed(d_ff)).to(device)
    cast, means = cast_means(w1, n, dtype)
    expected_cast, expected_means = cast_means_reference(w1, n, dtype)
    assert cast.dtype == means.dtype == dtype
    assert torch.equal(cast, expected_cast)
    assert (means - expected_means).abs().max() <= torch.finfo(dtype).eps * w1.abs().max()
    same, largest = means_and_largest(w1, n, dtype)
    assert torch.equal(same, means) and largest.dtype == torch.float32
    assert largest.shape == () and largest == w1.abs().max()


@pytest.mark.parametrize(
    ("bad", "where"), [(float("nan"), (0, 0)), (float("-inf"), (7, 31)), (-9.0, (3, 17))]
)
def test_one_number_sets_the_largest(bad, where, device, poison):
    w1 = torch.ones(8, 32, device=device)
    w1[where] = bad
    assert means_and_largest(w1, 2, torch.float32)[1] == (9 if bad == -9 else float("inf"))


def test_a_hand_made_matrix(device):
    w1 = torch.zeros(8, 32, device=device)
    w1[0, :16], w1[0, 16:], w1[7, 31] = 1.0, 3.0, 16.0
    _, means = cast_means(w1, 2, torch.float32)
    assert means[:, 0].tolist() == [1.0, 3.0]
    assert means[:, 7].tolist() == [0.0, 1.0]


def test_bad_input_is_refused(device):
    with pytest.raises(ValueError, match="contiguous matrix"):
        cast_means(torch.zeros(32, 8, device=device).t(), 1, torch.float16)
    with pytest.raises(ValueError, match="need a multiple of 24"):
        cast_means(torch.zeros(8, 32, device=device), 3, torch.float16)
