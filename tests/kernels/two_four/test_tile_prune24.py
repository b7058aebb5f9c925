"""tile_prune24 along both axes: by hand, against the reference, and on inputs made to break it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from replicate.ablations import transposable_mask
from replicate.kernels import matmul24, relu2_prune24, tile_prune24, unpack24
from replicate.kernels.two_four.tile_prune24 import CONFIG_BOTH, launch_tile_prune24, tile_prune24_reference
from replicate.sparsity import check24

# Activations and their gradients have 16 bits; float32 is for weights.
TYPES = [
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
    pytest.param(torch.float32, torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param(torch.bfloat16, torch.bfloat16, marks=pytest.mark.gpu),
]


def randn(rows, cols, dtype, device, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def bits(compressed):
    return compressed.buffer.view(torch.int16)


def test_golden_4x4(device):
    x = torch.zeros(64, 64, dtype=torch.float16, device=device)
    x[:4, :4] = torch.tensor([[9.0, -5, 1, 0], [0, 8, 4, -1], [1, 0, -7, 3], [-2, 1, 0, 6]])
    along_columns, along_rows = tile_prune24(x, backend="triton")
    # 9, 8, 7, 6 and then 5, 4, 3, 2 are in different rows and columns.
    expected = torch.tensor([[9.0, -5, 0, 0], [0, 8, 4, 0], [0, 0, -7, 3], [-2, 0, 0, 6]])
    assert unpack24(along_columns)[:4, :4].tolist() == expected.tolist()
    assert unpack24(along_rows)[:4, :4].tolist() == expected.t().tolist()
    for compressed, kept in (
        (along_columns, [(0, 1), (1, 2), (2, 3), (0, 3)]),
        (along_rows, [(0, 3), (0, 1), (1, 2), (2, 3)]),
    ):
        assert unpack24(compressed)[4:].count_nonzero() == unpack24(compressed)[:, 4:].count_nonzero() == 0
        nibbles = [int(compressed.metadata[8 * row] & 15) for row in range(4)]
        assert nibbles == [low | high << 2 for low, high in kept]


@pytest.mark.parametrize("dtype, out", TYPES)
@pytest.mark.parametrize("rows, cols", [(64, 128), (192, 64)])
def test_both_orientations_match_the_reference(rows, cols, dtype, out, device, poison):
    x = randn(rows, cols, dtype, device)
    ours = tile_prune24(x, dtype=out, backend="triton")
    plain = tile_prune24(x, dtype=out, backend="reference")
    dense, mask = tile_prune24_reference(x, out)
    assert torch.equal(mask, transposable_mask(x)) and mask.sum() == x.numel() // 2
    for compressed, in_torch, expected in zip(ours, plain, (dense, dense.t()), strict=True):
        assert compressed.shape == in_torch.shape == tuple(expected.shape)
        assert torch.equal(unpack24(compressed), expected)
        assert torch.equal(unpack24(in_torch), expected)
        assert torch.equal(bits(compressed), bits(in_torch))
        check24(expected)


@pytest.mark.parametrize("dtype, out", TYPES)
def test_one_orientation_alone_is_that_of_both(dtype, out, device, poison):
    x = randn(64, 64, dtype, device)
    both = tile_prune24(x, dtype=out, backend="triton")
    for backend in ("triton", "reference"):
        first, nothing = tile_prune24(x, along_rows=False, dtype=out, backend=backend)
        assert nothing is None and torch.equal(bits(first), bits(both[0]))
        nothing, second = tile_prune24(x, along_columns=False, dtype=out, backend=backend)
        assert nothing is None and torch.equal(bits(second), bits(both[1]))


@pytest.mark.parametrize("dtype, out", TYPES)
@pytest.mark.parametrize("ragged", [4, 76])
def test_the_axis_that_is_not_compressed_may_be_ragged(ragged, dtype, out, device, poison):
    x = randn(ragged, 64, dtype, device)
    for matrix, index in ((x, 0), (x.t(), 1), (x.t().contiguous(), 1)):
        axes = {"along_columns": index == 0, "along_rows": index == 1}
        ours = tile_prune24(matrix, **axes, dtype=out, backend="triton")[index]
        plain = tile_prune24(matrix, **axes, dtype=out, backend="reference")[index]
        assert ours.shape == plain.shape == (ragged, 64)
        expected = tile_prune24_reference(matrix, out)[0]
        expected = expected.t() if index else expected
        assert torch.equal(unpack24(ours), expected) and torch.equal(bits(ours), bits(plain))
        assert not ours.values[ragged:].any()


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_a_weight_gradient_from_pruned_activations(dtype, device, poison):
    """The main use: y2 is 2:4 along d_ff already, its tiles half empty; dW2 = P(y2)^T dy3."""
    y1, dy3 = randn(128, 64, dtype, device), randn(128, 64, dtype, device, seed=1)
    y2 = relu2_prune24(y1, dense=True, backend="triton").dense
    along_columns, along_tokens = tile_prune24(y2, backend="triton")
    expected, mask = tile_prune24_reference(y2)
    assert (y2 == 0).double().mean() > 0.5 and ((expected != 0) <= mask).all()
    assert torch.equal(unpack24(along_columns), expected) and torch.equal(
        unpack24(along_tokens), expected.t()
    )
    check24(unpack24(along_tokens))
    grad = matmul24(along_tokens, dy3)
    torch.testing.assert_close(grad, expected.t() @ dy3, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype, out", TYPES)
def test_adversarial_values(dtype, out, device, poison):
    """Ties, zeros of both signs, denormals, the largest numbers, infinities and NaN, in random places."""
    info = torch.finfo(dtype)
    tiny, big = info.smallest_normal * info.eps, min(info.max, 6e4)
    pools = [
        [0.0, 1, -1],
        [0.0, -0.0],
        [tiny, 2 * tiny, -3 * tiny, 0],
        [1, 2, float("inf"), -float("inf")],
        [1, -2, float("nan"), 0],
        [big, -big, 1, big / 2],
        [1, 1 + info.eps, 1 - info.eps, info.eps],  # sums round
        [float("nan"), float("inf"), big, -1],
    ]
    draw = torch.Generator().manual_seed(0)
    bands = [torch.tensor(p)[torch.randint(len(p), (8, 64), generator=draw)] for p in pools]
    x = torch.cat(bands).to(dtype).to(device)
    dense, _ = tile_prune24_reference(x, out)
    ours = tile_prune24(x, dtype=out, backend="triton")
    plain = tile_prune24(x, dtype=out, backend="reference")
    for compressed, in_torch, expected in zip(ours, plain, (dense, dense.t()), strict=True):
        assert torch.equal(compressed.metadata, in_torch.metadata)
        assert torch.equal(unpack24(compressed).nan_to_num(7), expected.nan_to_num(7))
        assert torch.equal(
            unpack24(compressed).signbit() & (expected == 0), expected.signbit() & (expected == 0)
        )


def test_a_lone_nan_survives(device):
    x = torch.ones(64, 64, dtype=torch.float16, device=device)
    x[5, 9] = float("nan")
    for out in tile_prune24(x, backend="triton"):
        assert unpack24(out).isnan().sum() == 1


@settings(max_examples=6, deadline=None)
@given(hnp.arrays("float16", (4, 64), elements=st.floats(-8, 8, width=16)), st.sampled_from([1.0, 1e-3, 1e3]))
def test_the_result_is_24_both_ways_and_keeps_the_most(values, scale):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = (torch.from_numpy(values) * scale).to(device)
    pruned = unpack24(tile_prune24(x, along_rows=False, backend="triton")[0])
    check24(pruned, 0)
    check24(pruned, 1)
    assert ((pruned == x) | (pruned == 0)).all()
    tiles = pruned.double().abs().view(4, 16, 4).sum((0, 2))
    # No pattern beats another by more than half of what there is: the 90 keep each element equally often.
    assert (tiles >= x.double().abs().view(4, 16, 4).sum((0, 2)) / 2 * (1 - 1e-6)).all()


@pytest.mark.parametrize("tile", [(64, 128), (128, 64), (128, 128)])
def test_every_tile_size_gives_the_same(tile, device, poison):
    x = randn(128, 128, torch.float16, device)
    expected = launch_tile_prune24(x, True, True, x.dtype, CONFIG_BOTH)
    config = {"TILE_R": tile[0], "TILE_C": tile[1], "num_warps": 8}
    for ours, other in zip(launch_tile_prune24(x, True, True, x.dtype, config), expected, strict=True):
        assert torch.equal(ours.view(torch.int16), other.view(torch.int16))


@pytest.mark.gpu
def test_a_large_matrix_on_the_gpu(device):
    """Many programs, and the layout that cuSPARSELt reads."""
    x = torch.randn(2048, 4096, device=device, dtype=torch.bfloat16)
    right = torch.randn(2048, 256, device=device, dtype=torch.bfloat16)
    dense, _ = tile_prune24_reference(x)
    along_columns, along_rows = tile_prune24(x)
    assert torch.equal(unpack24(along_columns), dense) and torch.equal(unpack24(along_rows), dense.t())
    error = (matmul24(along_rows, right) - dense.t() @ right).float().norm() / (
        dense.t() @ right
    ).float().norm()
    assert error < 1e-2


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"x": torch.zeros(64).half()}, "must be a matrix"),
        ({"x": torch.zeros(64, 72).half()}, "dim 1.*pad to 128"),
        ({"x": torch.zeros(72, 64).half()}, "dim 0.*pad to 128"),
        ({"x": torch.zeros(70, 64).half(), "along_rows": False}, r"\(70, 64\).*multiples of 4"),
        ({"x": torch.zeros(64, 66).half(), "along_columns": False}, r"\(64, 66\).*multiples of 4"),
        ({"x": torch.zeros(0, 64).half(), "along_rows": False}, "empty"),
        ({"x": torch.zeros(64, 64, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(64, 64), "dtype": torch.float32}, "float32"),
        ({"x": torch.zeros(64, 64).half(), "dtype": torch.bfloat16}, "cast x"),
        ({"x": torch.zeros(64, 64).half(), "along_rows": False, "along_columns": False}, "nothing is asked"),
    ],
)
def test_bad_input_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tile_prune24(**kwargs)


def test_operator_is_registered_right(device):
    x = randn(64, 128, torch.float16, device)
    op = torch.ops.replicate.tile_prune24.default
    for last, first in ((True, True), (False, True)):
        args = (x, last, first, torch.float16)
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
