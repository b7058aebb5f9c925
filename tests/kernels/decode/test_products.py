"""The products of decoding against their references: by rows, by neurons, dense and 2:4, whoever chose."""

import pytest
import torch

from replicate.kernels.decode.down import decode_down, decode_down_reference
from replicate.kernels.decode.route import Choice, chosen_reference, decode_scores
from replicate.kernels.decode.rows import Rows, compress_rows, rows_reference
from replicate.kernels.decode.up import decode_up, decode_up_reference
from replicate.router import route, scores
from replicate.sparsity import prune24, soft_threshold24

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TOKENS = [1, 3, 16, 64]
WAYS = [  # dtype and whether rows are compressed
    (torch.float32, False),
    *((torch.float16, two_of_four) for two_of_four in (False, True)),
    *(pytest.param(torch.bfloat16, two_of_four, marks=pytest.mark.gpu) for two_of_four in (False, True)),
]
# d_model, d_ff, clusters, top_k; the second has nothing that is a multiple of a tile
SHAPES = [(64, 128, 4, 2), (48, 120, 3, 1), (176, 192, 6, 2)]


@pytest.fixture
def poisoned(monkeypatch):
    """Every output starts as NaN: an entry that is read and was not written shows."""
    empty = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def rand(*size, dtype, device, seed=0):
    draw = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return (draw * size[-1] ** -0.5).to(device, dtype)


def problem(n_tokens, shape, dtype, device, two_of_four):
    """x [T, D], rows of W1^T and of W2, and a choice by random scores."""
    d_model, d_ff, n, top_k = shape
    x = rand(n_tokens, d_model, dtype=dtype, device=device) * d_model**0.5
    weights = [rand(d_ff, d_model, dtype=dtype, device=device, seed=seed) for seed in (1, 2)]
    rows = [compress_rows(soft_threshold24(w, 1)) if two_of_four else Rows(w) for w in weights]
    return x, *rows, Choice(rand(n_tokens, n, dtype=torch.float32, device=device, seed=3), top_k)


def assert_close(ours, reference):
    assert ours.isfinite().all() and ours.dtype == reference.dtype and reference.any()
    error = (ours.double() - reference.double()).norm() / reference.double().norm()
    assert error <= TOLERANCE[ours.dtype], f"relative error {error:.2e}"


def used(y, choice):
    """y without what no token uses."""
    use = chosen_reference(choice)[..., None]
    groups = y.unflatten(1, (use.shape[1], -1))
    return groups.where(use, groups.new_zeros(())).flatten(1)


def test_a_row_by_hand():
    """Four groups of a row: their kept numbers, first ones first, and the positions of all in one word."""
    row = torch.tensor([[0.0, 7, 0, -2, 0, 0, 0, 5, 1, 2, 0, 0, 0, 0, 3, 4]]).half()
    rows = compress_rows(row)
    assert rows.values.tolist() == [[[7, 0, 1, 3], [-2, 5, 2, 4]]]  # of the second group a zero is kept
    assert rows.positions.tolist() == [[(1 + 12) + 16 * (0 + 12) + 16**2 * (0 + 4) + 16**3 * (2 + 12)]]
    assert torch.equal(rows_reference(rows), row) and rows.size == (1, 16)


def test_nine_groups_take_two_words():
    """The eighth group's position reaches the sign of the first word; the ninth group begins the second."""
    row = torch.zeros(1, 48).half()
    row[0, [30, 31, 33, 34]] = torch.tensor([1.0, 2, 3, 4]).half()
    rows = compress_rows(row)
    zeros = sum((0 + 4 * 1) << 4 * i for i in range(7))  # of a group of zeros the first two are kept
    found = [word % 2**32 for word in rows.positions[0].tolist()]
    more = sum((0 + 4 * 1) << 4 * i for i in (1, 2, 3))
    assert found == [zeros + ((2 + 4 * 3) << 28), (1 + 4 * 2) + more]
    assert torch.equal(rows_reference(rows), row)


def test_nine_sixteenths_of_the_bytes():
    w = soft_threshold24(torch.randn(32, 64), 1).half()
    assert compress_rows(w).nbytes == w.nbytes * 9 // 16 and Rows(w).nbytes == w.nbytes
    assert torch.equal(rows_reference(compress_rows(w)), w)


def test_what_is_not_two_of_four_is_refused():
    with pytest.raises(ValueError, match="not 2:4 along dim 1: group 1"):
        compress_rows(torch.tensor([[0.0, 0, 1, 1, 1, 1, 1, 0] + 8 * [0]]).half())
    with pytest.raises(ValueError, match=r"\[1, 40\], not \[R, 16 m\]"):
        compress_rows(torch.zeros(1, 40).half())
    with pytest.raises(ValueError, match="float32; only float16 and bfloat16 are compressed"):
        compress_rows(torch.zeros(1, 16))


@pytest.mark.parametrize(("dtype", "two_of_four"), WAYS)
@pytest.mark.parametrize("n_tokens", TOKENS)
def test_products_in_the_chosen_clusters(poisoned, device, n_tokens, dtype, two_of_four):
    for shape in SHAPES:
        x, w1, w2, choice = problem(n_tokens, shape, dtype, device, two_of_four)
        y2 = decode_up(x, w1, choice)
        assert_close(used(y2, choice), decode_up_reference(x, w1, choice))
        for inner in (False, True):
            y3 = decode_down(y2, w2, choice, inner=inner)  # what is not used in y2 is NaN
            assert_close(y3, decode_down_reference(y2, w2, choice, inner))


@pytest.mark.parametrize(("dtype", "two_of_four"), WAYS)
@pytest.mark.parametrize("n_tokens", [1, 3, 64])
def test_products_over_all_rows(poisoned, device, n_tokens, dtype, two_of_four):
    x, w1, w2, _ = problem(n_tokens, SHAPES[0], dtype, device, two_of_four)
    y1 = decode_up(x, w1, relu2=False)
    assert_close(y1, decode_up_reference(x, w1, relu2=False))
    y2 = y1.relu().square()
    assert_close(decode_up(x, w1), y2)
    assert_close(decode_down(y2, w2), decode_down_reference(y2, w2))
    assert_close(decode_down(y2, w2, inner=True), prune24(y2) @ rows_reference(w2))


@pytest.mark.parametrize("n_tokens", [1, 2, 5])
def test_equal_scores_choose_the_lower_cluster_and_nan_comes_first(device, n_tokens):
    """Of n = 4 and k = 2 with one token or two a slot is a choice, with five a cluster."""
    w = Rows(torch.eye(16, device=device))
    x, nan = torch.ones(n_tokens, 16, device=device), float("nan")
    for row, expected in (
        ([0.5, 1.0, 1.0, 1.0], [1, 2]),
        ([1.0, 1.0, 1.0, 2.0], [0, 3]),
        ([3.0, nan, nan, 9.0], [1, 2]),
        ([float("inf"), nan, nan, 9.0], [0, 1]),
        ([-float("inf"), nan, -float("inf"), -float("inf")], [0, 1]),
    ):
        choice = Choice(
            torch.tensor([row], device=device).expand(n_tokens, -1), 2
        )  # one row for all: stride 0
        y3 = decode_down(x, w, choice)
        assert torch.equal(y3, decode_down_reference(x, w, choice))
        assert y3.view(n_tokens, 4, 4).amax(2).nonzero()[:, 1].tolist() == expected * n_tokens


def test_equal_activations_keep_the_lower_neuron(device):
    y, w = torch.full((3, 16), 2.0, device=device), Rows(torch.eye(16, device=device))
    assert decode_down(y, w, inner=True).view(3, 4, 4)[0, 0].tolist() == [2, 2, 0, 0]


def test_a_weight_that_is_not_finite_stays_with_those_who_use_it(device):
    x, w1, w2, _ = problem(2, (64, 128, 4, 1), torch.float32, device, False)
    w2.values[64:] = float("inf")
    y3 = decode_down(
        decode_up(x, w1), w2, Choice(torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]], device=device), 1)
    )
    assert y3[0].isfinite().all() and not y3[1].isfinite().any()


@pytest.mark.parametrize(("dtype", "two_of_four"), WAYS)
@pytest.mark.parametrize("n_tokens", [1, 3, 20])
def test_rows_longer_than_a_tile(device, n_tokens, dtype, two_of_four):
    x, w1, w2, choice = problem(n_tokens, (1040, 64, 4, 2), dtype, device, two_of_four)
    assert_close(used(decode_up(x, w1, choice), choice), decode_up_reference(x, w1, choice))
    y2 = x[:, :64].abs().contiguous()
    assert_close(decode_down(y2, w2, choice), decode_down_reference(y2, w2, choice))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_tokens", "width"), [(5, 88), (5, 1032), (1, 88), (1, 8200)])
def test_scores_are_the_routers(device, dtype, n_tokens, width):
    x, means = (rand(n, width, dtype=dtype, device=device, seed=n) for n in (n_tokens, 6))
    found = decode_scores(x, means)
    torch.testing.assert_close(found, scores(x, means))
    assert torch.equal(chosen_reference(Choice(found, 2)).sum(1), torch.full((n_tokens,), 2, device=device))
    assert all(chosen_reference(Choice(found, 2)).gather(1, route(x, means, 2)).flatten())


@pytest.mark.gpu  # a CPU reads at any address
def test_a_token_that_begins_anywhere_in_memory(device):
    w = compress_rows(soft_threshold24(rand(32, 64, dtype=torch.float16, device=device), 1))
    for start in range(4):
        x = rand(64 + start, dtype=torch.float16, device=device)[start:].view(1, 64)
        assert_close(decode_up(x, w), decode_up_reference(x, w))


def test_twice_the_same(device):
    x, w1, w2, choice = problem(3, SHAPES[0], torch.float16, device, True)
    one, two = (decode_down(used(decode_up(x, w1, choice), choice), w2, choice) for _ in range(2))
    assert torch.equal(one, two)


def test_what_does_not_fit_is_named(device):
    x, w1, w2, choice = problem(3, SHAPES[0], torch.float32, device, False)
    with pytest.raises(ValueError, match="65 tokens; decoding takes 1 to 64"):
        decode_up(x[:1].expand(65, -1).contiguous(), w1)
    with pytest.raises(ValueError, match="128 rows do not divide into 3 clusters"):
        decode_up(x, w1, Choice(choice.scores[:, :3].contiguous(), 2))
    with pytest.raises(ValueError, match=r"scores must be float32 \[3, n\]"):
        decode_up(x, w1, Choice(choice.scores[:2], 2))
    with pytest.raises(ValueError, match="top_k is 5"):
        decode_down(x.new_zeros(3, 128), w2, Choice(choice.scores, 5))
    packed = compress_rows(soft_threshold24(w1.values, 1).half())
    with pytest.raises(ValueError, match=r"positions must be int32 \[128, 2\]"):
        decode_up(x.half(), packed._replace(positions=packed.positions.to(torch.uint8)))
    with pytest.raises(ValueError, match="does not fit rows of 64 columns"):
        decode_up(x.new_zeros(3, 128), w1)
    with pytest.raises(ValueError, match="does not fit 128 rows"):
        decode_down(x, w2)
