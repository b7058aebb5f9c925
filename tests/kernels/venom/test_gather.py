"""V:N:M with any columns: compression against replicate.sparsity, the product against its reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate.kernels.venom.gather import (
    venom_compress,
    venom_decompress,
    venom_gather_matmul,
    venom_gather_matmul_reference,
)
from replicate.sparsity import venom_mask

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def poisoned(like, *args, empty=torch.Tensor.new_empty, **kwargs):
    out = empty(like, *args, **kwargs)
    return out.fill_(float("nan")) if out.is_floating_point() else out


def test_compress_by_hand():
    y = torch.tensor([[1.0, 0, 5, 0, 2, 3, 9, 0], [1.0, 0, 5, 4, 2, 8, 0, 0]])
    values, columns = venom_compress(y, v=2, m=8)
    assert columns.tolist() == [[2, 3, 5, 6]]  # 3 and 4 tie
    assert values.tolist() == [[5, 0, 0, 9], [5, 0, 8, 0]]
    assert venom_decompress(values, columns, 2, 8)[0].tolist() == [0, 0, 5, 0, 0, 0, 9, 0]


@given(st.integers(1, 3), st.sampled_from([4, 8, 16]), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_compress_is_the_specification(blocks, m, n, seed):
    y = torch.randn(4 * blocks, 2 * m, generator=torch.Generator().manual_seed(seed))
    values, columns = venom_compress(y, 4, m, n)
    expected = torch.where(venom_mask(y, 4, m, n), y, torch.zeros_like(y))
    assert torch.equal(venom_decompress(values, columns, 4, 2 * m), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_tokens", "d_ff", "d_model", "v", "m"),
    [(64, 256, 128, 32, 16), (50, 96, 40, 16, 8), (1, 64, 16, 64, 32)],
)
def test_gather_matmul(device, monkeypatch, dtype, n_tokens, d_ff, d_model, v, m):
    y = torch.randn(n_tokens, d_ff, device=device).to(dtype)
    w = (torch.randn(d_ff, d_model, device=device) * d_ff**-0.5).to(dtype)
    values, columns = venom_compress(y, v, m)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        ours = venom_gather_matmul(values, columns, w, v).double()
    expected = venom_gather_matmul_reference(values.double(), columns, w.double(), v)
    assert ((ours - expected).norm() / expected.norm()) <= TOLERANCE[dtype]


def test_rows_of_w_that_are_not_kept_do_not_matter(device):
    y = torch.zeros(16, 64, device=device)
    y[:, 8:16] = torch.randn(16, 8, device=device)
    w = torch.full((64, 16), float("nan"), device=device)
    values, columns = venom_compress(y, 16, 64)
    w[columns[0].long()] = 1.0
    ours = venom_gather_matmul(torch.cat([values, torch.zeros_like(values)], 1), columns.repeat(1, 2), w, 16)
    torch.testing.assert_close(ours[:, 0], values.sum(1))


def test_refuses(device):
    values, columns = venom_compress(torch.randn(20, 64, device=device), 16, 16)
    w = torch.randn(64, 16, device=device)
    with pytest.raises(ValueError, match="v is 20"):
        venom_gather_matmul(values, columns, w, 20)
    with pytest.raises(ValueError, match="columns must be"):
        venom_gather_matmul(values, columns[:1], w, 16)
    with pytest.raises(ValueError, match="whole blocks"):
        venom_compress(torch.randn(4, 20), 4, 16)
    with pytest.raises(ValueError, match="n is 5"):
        venom_compress(torch.randn(4, 16), 4, 16, 5)
