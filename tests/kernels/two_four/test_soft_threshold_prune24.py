"""soft_threshold_prune24 along both axes: by hand, against the reference, and on inputs made to break it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from replicate.kernels import soft_threshold_prune24, soft_threshold_prune24_both, unpack24
from replicate.kernels.two_four.soft_threshold_prune24 import soft_threshold_prune24_reference
from replicate.sparsity import check24, soft_scale, soft_threshold24

# Weights are float32 masters or already 16 bits; the result has 16 bits.
TYPES = [
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
    pytest.param(torch.float32, torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param(torch.bfloat16, torch.bfloat16, marks=pytest.mark.gpu),
]


def randn(rows, cols, dtype, device, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def test_golden_4x4(device):
    w = torch.zeros(64, 64, device=device)
    w[:4, :4] = torch.tensor([[9, 1, 7, 4], [1, -2, 3, 0], [-8, 3, 5, -4], [2, 2, -2, 2]])
    along_last, along_first = soft_threshold_prune24_both(w, dtype=torch.float16, backend="triton")
    # t by rows: 4, 1, 4, 2; by columns: 2, 2, 3, 2 (of |9 1 -8 2|, |1 -2 3 2|, |7 3 5 -2|, |4 0 -4 2|).
    assert unpack24(along_last)[:4, :4].tolist() == [[5, 0, 3, 0], [0, -1, 2, 0], [-4, 0, 1, 0], [0, 0, 0, 0]]
    assert unpack24(along_first)[:4, :4].tolist() == [
        [7, 0, -6, 0],
        [0, 0, 1, 0],
        [4, 0, 2, 0],
        [2, 0, -2, 0],
    ]
    nibbles = [int(along_last.metadata[8 * row] & 15) for row in range(4)]
    assert nibbles == [0 | 2 << 2, 1 | 2 << 2, 0 | 2 << 2, 0 | 1 << 2]
    hard = soft_threshold_prune24(w, method="hard", dtype=torch.float16, backend="triton")
    assert unpack24(hard)[:4, :4].tolist() == [[9, 0, 7, 0], [0, -2, 3, 0], [-8, 0, 5, 0], [2, 2, 0, 0]]


@pytest.mark.parametrize("dtype, out", TYPES)
@pytest.mark.parametrize("method", ["soft", "hard"])
@pytest.mark.parametrize("rows, cols", [(64, 128)])
def test_both_orientations_match_the_reference(rows, cols, method, dtype, out, device, poison):
    w = randn(rows, cols, dtype, device)
    scales = (1.25, torch.tensor(0.7, device=device))
    for pair in ((None, None), scales):
        ours = soft_threshold_prune24_both(w, scales=pair, method=method, dtype=out, backend="triton")
        plain = soft_threshold_prune24_both(w, scales=pair, method=method, dtype=out, backend="reference")
        for compressed, in_torch, dim, scale in zip(ours, plain, (1, 0), pair, strict=True):
            dense, _ = soft_threshold_prune24_reference(w, dim, scale, method, out)
            assert torch.equal(unpack24(compressed), dense if dim == 1 else dense.t())
            assert torch.equal(compressed.buffer.view(torch.int16), in_torch.buffer.view(torch.int16))
            alone = soft_threshold_prune24(
                w, dim == 0, scale=scale, method=method, dtype=out, backend="triton"
            )
            assert torch.equal(alone.buffer.view(torch.int16), compressed.buffer.view(torch.int16))
            check24(unpack24(compressed))


@pytest.mark.parametrize("dtype, out", TYPES)
@pytest.mark.parametrize("rows", [1, 70])
def test_ragged_rows(rows, dtype, out, device, poison):
    w = randn(rows, 128, dtype, device)
    for matrix, transpose in ((w, False), (w.t().contiguous(), True), (w.t(), True)):
        ours = soft_threshold_prune24(matrix, transpose, dtype=out, backend="triton")
        assert ours.shape == (rows, 128)
        assert torch.equal(unpack24(ours), soft_threshold24(w.float()).to(out))
        assert not ours.values[rows:].any()


@pytest.mark.parametrize("dtype, out", TYPES)
@pytest.mark.parametrize("method", ["soft", "hard"])
def test_nan_is_where_the_reference_has_it(method, dtype, out, device, poison):
    """Every number of NaN, from none to four of a group, at every place, in both orientations."""
    w = randn(64, 64, dtype, device)
    which = torch.arange(16, device=device)[:, None] >> torch.arange(4, device=device) & 1
    w.view(-1, 16, 4)[:, which.bool()] = float("nan")
    w = torch.cat([w, w.t()])
    both = soft_threshold_prune24_both(w, method=method, dtype=out, backend="triton")
    for dim, compressed in ((1, both[0]), (0, both[1])):
        expected, _ = soft_threshold_prune24_reference(w, dim, None, method, out)
        assert torch.isnan(expected).any()
        check24(expected, dim)
        found = unpack24(compressed) if dim == 1 else unpack24(compressed).t()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype, out", TYPES)
def test_adversarial_values(dtype, out, device, poison):
    info = torch.finfo(dtype)
    nan, inf, tiny, big = float("nan"), float("inf"), info.smallest_normal * info.eps, info.max
    groups = torch.tensor(
        [
            [1, -1, 1, 1],
            [0.0, -0.0, 0.0, 0.0],
            [inf, -inf, 1, 2],
            [inf, inf, -inf, 1],
            [nan, 1, 2, 3],
            [1, nan, inf, -2],
            [nan, nan, 1, 2],
            [tiny, 2 * tiny, -3 * tiny, 4 * tiny],
            [big, -big, tiny, 0],
            [0, 0, 0, -5],
            [2, 1, 1, -2],
            [1, 2, 2, 1],
            [3, 3, -3, 2],
            [-0.0, -1, 0.0, 1],
            [1, 2, 3, 4],
            [4, 3, 2, 1],
        ],
        dtype=dtype,
    )
    w = groups.view(1, -1).repeat(64, 1).to(device)
    ours = soft_threshold_prune24_both(w, dtype=out, backend="triton")
    for compressed, dim in zip(ours, (1, 0), strict=True):
        dense, mask = soft_threshold_prune24_reference(w, dim, dtype=out)
        dense = torch.where(mask, dense, torch.zeros_like(dense))
        oriented, expected = (w, dense) if dim == 1 else (w.t(), dense.t())
        got, bad = unpack24(compressed).view(64, -1, 4), oriented.reshape(64, -1, 4).isnan().any(-1)
        assert torch.equal(got.isnan().any(-1), bad)  # NaN in a group, NaN in its result
        assert torch.equal(got[~bad], expected.reshape(64, -1, 4)[~bad])


def test_float32_masters_are_compared_as_float32(device):
    """Magnitudes that differ only in float32 are ordered right, not tied by rounding first."""
    w = torch.ones(64, 64, device=device)
    w[:, 2::4] += 2**-20
    w[:, 3::4] += 2**-21
    dense = unpack24(soft_threshold_prune24(w, method="hard", dtype=torch.float16, backend="triton"))
    assert not dense[:, 0::4].any() and not dense[:, 1::4].any() and (dense[:, 2::4] == 1).all()


def test_scale_is_s_stes(device):
    w = randn(64, 64, torch.float32, device)
    beta = soft_scale(w, 0)
    ours = unpack24(soft_threshold_prune24(w, True, scale=beta, dtype=torch.float16, backend="triton"))
    assert torch.equal(ours.t(), (soft_threshold24(w, 0, torch.tensor(beta))).half())
    assert beta > 1


@settings(max_examples=8, deadline=None)
@given(hnp.arrays("float32", (2, 64), elements=st.floats(-1e4, 1e4, width=32)))
def test_shrinks_towards_zero_and_is_24(values):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    w = torch.from_numpy(values).to(device)
    dense = unpack24(soft_threshold_prune24(w, dtype=torch.float16, backend="triton")).float()
    check24(dense)
    ulp = 2.0**-24  # of the smallest float16 numbers
    assert (dense.abs() <= w.abs() * 1.001 + ulp).all() and ((dense == 0) | (dense.sign() == w.sign())).all()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"w": torch.zeros(64)}, "must be a matrix"),
        ({"w": torch.zeros(64, 72)}, "dim 1.*pad to 128"),
        ({"w": torch.zeros(72, 64), "transpose": True}, "dim 0.*pad to 128"),
        ({"w": torch.zeros(64, 64, dtype=torch.float64)}, "float64"),
        ({"w": torch.zeros(64, 64), "dtype": torch.float32}, "float32"),
        ({"w": torch.zeros(64, 64), "method": "firm"}, "'firm'"),
        ({"w": torch.zeros(64, 64), "scale": torch.ones(2)}, "one number"),
    ],
)
def test_bad_input_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        soft_threshold_prune24(**kwargs)


def test_operator_is_registered_right(device):
    w = randn(64, 128, torch.float32, device)
    scale = torch.ones(1, device=device)
    op = torch.ops.replicate.soft_threshold_prune24.default
    for last, first in ((True, True), (False, True)):
        args = (w, last, first, scale if last else None, None, True, torch.float16)
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
