"""The three block-sparse product shapes against their references, in every direction and on ragged shapes."""

import pytest
import torch

from replicate.kernels.venom import common as venom_common
from replicate.kernels.venom.down import gather_sum, venom_down, venom_down_reference
from replicate.kernels.venom.select import venom_select, venom_select_reference
from replicate.kernels.venom.token_lists import token_lists
from replicate.kernels.venom.up import (
    venom_up,
    venom_up_backward,
    venom_up_backward_reference,
    venom_up_reference,
)
from replicate.kernels.venom.wgrad import venom_wgrad, venom_wgrad_reference
from replicate.sparsity import check24, prune24

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# tokens, d_model, d_ff, clusters, top_k, block
SHAPES = [
    (60, 64, 256, 4, 2, 32),
    (37, 40, 96, 4, 1, 16),  # nothing a multiple of anything
    (1, 32, 64, 2, 2, 16),
    (70, 136, 240, 3, 3, 64),
    (40, 32, 576, 2, 1, 32),  # tiles that reach into the next cluster
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every output starts as NaN (or -7): an entry that is read and was not written shows."""
    empty = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else -7)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def problem(shape, dtype, device, seed=0):
    """x, w1, w2, dy3 and the lists of a random routing."""
    n_tokens, d_model, d_ff, n, top_k, block = shape
    g = torch.Generator().manual_seed(seed)

    def rand(*size):
        return (torch.randn(size, generator=g) * size[-2] ** -0.5).to(device, dtype)

    clusters = torch.rand(n_tokens, n, generator=g).argsort(1)[:, :top_k].to(device)
    x, dy3 = rand(n_tokens, d_model) * n_tokens**0.5, rand(n_tokens, d_model) * n_tokens**0.5
    return x, rand(d_model, d_ff), rand(d_ff, d_model), dy3, token_lists(clusters, n, block)


def used(y, lists):
    return y[: int(lists.n_blocks) * lists.block]


def assert_close(ours, reference, dtype):
    assert ours.isfinite().all()
    error = (ours.double() - reference.double()).norm() / reference.double().norm()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize(
    ("columns", "wide"),
    [(32, 32), (64, 64), (96, 128), (160, 256), (256, 256), (320, 128), (864, 256), (1152, 256), (1024, 256)],
)
def test_tiles_stay_wide_where_their_width_does_not_divide_the_columns(columns, wide):
    """864 = 13824 / 16 of a video model once got tiles of 32, the only width that divides it.

    For 96 to 1152 columns, figure 4d's layer was timed with all four widths on one NVIDIA H200: these won.
    """
    like = torch.empty(1, dtype=torch.bfloat16)
    assert venom_common.fit_tile(like, columns, 4096).n == wide


@pytest.mark.parametrize(("triton", "problem"), [(True, "tensors are on cpu"), (False, "not installed")])
def test_where_there_is_no_kernel_the_way_out_is_named(monkeypatch, triton, problem):
    monkeypatch.setattr(venom_common, "HAVE_TRITON", triton)
    monkeypatch.setattr(venom_common, "interpreted", lambda: False)
    with pytest.raises(ValueError, match=problem) as refused:
        venom_common.check_operands(x=torch.zeros(8, 8))
    assert str(refused.value).endswith("*_reference function, or SparseFFN(..., backend='reference')")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inner", [True, False])
def test_up(device, dtype, shape, inner):
    x, w1, _, _, lists = problem(shape, dtype, device)
    ours = used(venom_up(x, w1, lists, inner=inner), lists)
    assert_close(ours, used(venom_up_reference(x.float(), w1.float(), lists, inner), lists), dtype)
    assert (ours[used(lists.tokens, lists) < 0] == 0).all()
    if inner:
        check24(ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_up_backward_carries_the_forward_mask(device, dtype, shape):
    x, w1, w2, dy3, lists = problem(shape, dtype, device)
    y2 = venom_up(x, w1, lists)
    ours = used(venom_up_backward(dy3, w2, y2, lists), lists)
    reference = venom_up_backward_reference(dy3.float(), w2.float(), used(y2, lists).float(), lists)
    assert_close(ours, reference, dtype)
    assert (ours[used(y2, lists) == 0] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_factors_multiply_rows_before_the_activation_and_its_derivative(device, shape, transposed):
    x, w1, w2, dy3, lists = problem(shape, torch.float32, device)
    factor = torch.rand(len(lists.tokens), device=device) + 0.5
    factor[used(lists.tokens, lists).lt(0).nonzero()[:, 0]] = float("nan")  # of padding rows
    w = w1.T.contiguous() if transposed else w1
    y2 = venom_up(x, w, lists, inner=False, transposed=transposed, factor=factor)
    square = factor[: int(lists.n_blocks) * lists.block, None].nan_to_num().square()
    plain = used(venom_up_reference(x, w1, lists, False), lists)
    assert_close(used(y2, lists), plain * square, torch.float32)
    dy1 = used(venom_up_backward(dy3, w2, y2, lists, factor=factor), lists)
    without = used(venom_up_backward(dy3, w2, y2, lists), lists)
    assert_close(dy1, without * square.sqrt(), torch.float32)


@pytest.mark.parametrize("wrong", [(3,), (1, 16), torch.float16])
def test_a_factor_that_does_not_fit_is_named(device, wrong):
    x, w1, _, _, lists = problem((16, 32, 64, 2, 2, 16), torch.float32, device)
    dtype = wrong if isinstance(wrong, torch.dtype) else torch.float32
    shape = wrong if isinstance(wrong, tuple) else lists.tokens.shape
    with pytest.raises(ValueError, match=r"factor must be \[\d+\] float32"):
        venom_up(x, w1, lists, factor=torch.ones(shape, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_down(device, dtype, shape, transposed):
    x, w1, w2, _, lists = problem(shape, dtype, device)
    y, w = venom_up(x, w1, lists), w1 if transposed else w2
    ours = venom_down(y, w, lists, transposed=transposed)
    reference = venom_down_reference(used(y, lists).float(), w.float(), lists, transposed)
    assert_close(ours, reference, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_wgrad(device, dtype, shape, transposed):
    x, w1, _, dy3, lists = problem(shape, dtype, device)
    y = venom_up(x, w1, lists)
    ours = venom_wgrad(dy3, y, lists, transposed=transposed)
    reference = venom_wgrad_reference(dy3.float(), used(y, lists).float(), lists, transposed)
    assert_close(ours, reference, dtype)
    unrounded = venom_wgrad(dy3, y, lists, transposed=transposed, dtype=torch.float32)
    assert unrounded.dtype == torch.float32 and torch.equal(unrounded.to(dtype), ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_select_from_full_products(device, dtype, shape):
    x, w1, w2, dy3, lists = problem(shape, dtype, device)
    y1, dy2 = x @ w1, dy3 @ w2.T
    y2 = used(venom_select(y1, lists), lists)
    assert_close(y2, used(venom_select_reference(y1.float(), lists), lists), dtype)
    check24(y2)
    y2 = torch.nn.functional.pad(y2, (0, 0, 0, len(lists.tokens) - len(y2)))
    dy1 = used(venom_select(dy2, lists, y2), lists)
    assert_close(dy1, used(venom_select_reference(dy2.float(), lists, y2.float()), lists), dtype)


def test_two_of_four_by_hand(device):
    """Identity weights show the epilogue alone: relu, square, top 2 of 4 with ties to the lower column."""
    rows = torch.tensor(
        [
            [1.0, 2.0, 3.0, 4.0, 4.0, 3.0, 2.0, 1.0],
            [1.0, 1.0, 1.0, 1.0, -1.0, -2.0, -3.0, 5.0],
            [2.0, 1.0, 2.0, 1.0, 0.0, 0.0, -1.0, 0.5],
            [1.0, 2.0, 2.0, 2.0, 3.0, 1.0, 1.0, 1.0],
        ],
        device=device,
    )
    lists = token_lists(torch.zeros(4, 1, dtype=torch.int64, device=device), 1, 16)
    assert venom_up(rows, torch.eye(8, device=device), lists)[:4].tolist() == [
        [0, 0, 9, 16, 16, 9, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 25],
        [4, 0, 4, 0, 0, 0, 0, 0.25],
        [0, 4, 4, 0, 9, 1, 0, 0],
    ]


@pytest.mark.parametrize("seed", range(3))
def test_ties_follow_the_specification(device, seed):
    x = torch.randint(-2, 3, (48, 64), generator=torch.Generator().manual_seed(seed)).float().to(device)
    lists = token_lists(torch.zeros(48, 1, dtype=torch.int64, device=device), 1, 16)
    ours = venom_up(x, torch.eye(64, device=device), lists)[:48]
    assert torch.equal(ours, prune24(x.relu().square()))


def test_nan_in_means_nan_out(device):
    x, w1, w2, dy3, lists = problem((40, 32, 64, 2, 1, 16), torch.float32, device)
    x[5, 3] = float("nan")
    y2 = venom_up(x, w1, lists)
    row = int(lists.inverse[5, 0])
    assert y2[row].isnan().view(-1, 4).sum(1).eq(2).all()
    others = used(lists.tokens, lists) != 5
    assert used(y2, lists)[others].isfinite().all()
    assert venom_up_backward(dy3, w2, y2, lists)[row].isnan().any()
    y3 = venom_down(y2, w2, lists)
    assert y3[5].isnan().all()
    assert y3[torch.arange(40, device=device) != 5].isfinite().all()


def test_padding_does_not_spread_infinite_tokens(device):
    """Padding rows read token 0; its infinities must not reach clusters that do not own it."""
    x, w1, _, _, _ = problem((20, 32, 64, 2, 1, 16), torch.float32, device)
    x[0] = float("inf")
    clusters = torch.ones(20, 1, dtype=torch.int64, device=device)
    clusters[0] = 0
    lists = token_lists(clusters, 2, 16)
    dw1 = venom_wgrad(x, venom_up(x, w1, lists), lists)
    assert dw1[:, 32:].isfinite().all()


def test_neighbouring_cluster_with_infinite_weights(device):
    """40 neurons a cluster is no multiple of a tile: the tile's rest belongs to the next cluster."""
    x, w1, w2, _, _ = problem((20, 32, 80, 2, 1, 16), torch.float32, device)
    lists = token_lists(torch.zeros(20, 1, dtype=torch.int64, device=device), 2, 16)
    w1[:, 40:], w2[40:] = float("inf"), float("nan")
    y = venom_up(x, w1, lists)
    assert venom_down(y, w2, lists).isfinite().all()
    assert venom_down(y, w1, lists, transposed=True).isfinite().all()


def test_cluster_without_tokens_gets_zero_gradient(device):
    x, w1, _, _, _ = problem((20, 32, 96, 3, 1, 16), torch.float32, device)
    lists = token_lists(torch.full((20, 1), 2, device=device), 3, 16)
    y = venom_up(x, w1, lists)
    dw = venom_wgrad(x, y, lists)
    assert (dw[:, :64] == 0).all()
    assert dw[:, 64:].abs().sum() > 0


def test_gather_sum_skips_choices_without_a_row(device):
    parts = torch.arange(1, 5, device=device)[:, None].expand(-1, 8).float().contiguous()
    out = gather_sum(parts, torch.tensor([[0, 3], [2, -1], [-1, -1]], dtype=torch.int32, device=device))
    assert out[:, 0].tolist() == [5, 3, 0]


def test_products_refuse(device):
    x, w1, w2, _, lists = problem((20, 32, 64, 2, 1, 16), torch.float32, device)
    y2 = venom_up(x, w1, lists)
    with pytest.raises(ValueError, match="d_model"):
        venom_up(x[:, :24].contiguous(), w1, lists)
    with pytest.raises(ValueError, match="contiguous"):
        venom_up(x, w2.T, lists)
    with pytest.raises(ValueError, match="float64"):
        venom_up(x, w1.double(), lists)
    with pytest.raises(ValueError, match="multiple of 8"):
        venom_up(x[:, :30].contiguous(), w1[:30], lists)
    with pytest.raises(ValueError, match="try 64"):
        venom_up(x, torch.cat([w1, w1[:, :8]], 1), lists)
    with pytest.raises(ValueError, match="need"):
        venom_down(y2[:16], w2, lists)
    with pytest.raises(ValueError, match="rows"):
        venom_wgrad(x, y2[:16], lists)
