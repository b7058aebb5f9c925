import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from replicate import ablations
from replicate import sparsity as sp
from replicate.ablations import mvue24, select24, transposable_mask
from replicate.sparsity import (
    check24,
    check_venom,
    flip_rate,
    mask24,
    prune24,
    soft_scale,
    soft_threshold24,
    venom_mask,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
coordinate = st.floats(-4, 4)
few = settings(max_examples=40, deadline=None)
# Many ties and both zeros, infinities and the smallest denormals of half precision and float32.
values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, math.inf, -math.inf, 6e-8, -6e-8, 1.4e-45]),
    st.floats(-8, 8, width=16),
)
groups = st.lists(st.lists(values, min_size=4, max_size=4), min_size=1, max_size=6)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_magnitude(four):
    """Positions of a group by falling magnitude: NaN first, the earlier of equals first."""
    return sorted(range(4), key=lambda i: (not math.isnan(four[i]), -abs(four[i]), i))


def slow_mask24(x, dim):
    """mask24 by sorting each group of four with Python's sort."""
    rows = x.movedim(dim, -1)
    out = torch.zeros(rows.shape, dtype=torch.bool)
    for place in itertools.product(*map(range, rows.shape[:-1])):
        for start in range(0, rows.shape[-1], 4):
            four = rows[place][start : start + 4].tolist()
            for i in by_magnitude(four)[:2]:
                out[place][start + i] = True
    return out.movedim(-1, dim)


def slow_soft(four):
    """Section 2.2 on one group, as the paper prints it: three cases."""
    t = sorted(abs(a) for a in four)[1]
    return [a - t if a > t else a + t if a < -t else 0.0 for a in four]


def slow_venom(x, v, m, n):
    """V:N:M by loops over blocks and rows."""
    out = torch.zeros(x.shape, dtype=torch.bool)
    for top, left in itertools.product(range(0, x.shape[0], v), range(0, x.shape[1], m)):
        block = x[top : top + v, left : left + m].tolist()
        total = [sum(abs(row[j]) for row in block) for j in range(m)]
        columns = sorted(sorted(range(m), key=lambda j: (-total[j], j))[:4])
        for r, row in enumerate(block):
            for j in sorted(columns, key=lambda j: (-abs(row[j]), j))[:n]:
                out[top + r, left + j] = True
    return out


GOLDEN = torch.tensor([[1.0, -4.0, 2.0, 3.0], [2, 2, 2, 2], [0, 0, 0, -5], [-1, 1, -3, 1]])


def test_mask24_by_hand():
    expected = [[0, 1, 0, 1], [1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 1, 0]]
    assert mask24(GOLDEN).tolist() == torch.tensor(expected).bool().tolist()
    # columns (1 2 0 -1), (-4 2 0 1), (2 2 0 -3), (3 2 -5 1)
    expected = [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert mask24(GOLDEN, 0).tolist() == torch.tensor(expected).bool().tolist()


def test_prune24_by_hand():
    assert prune24(GOLDEN).tolist() == [[0, -4, 0, 3], [2, 2, 0, 0], [0, 0, 0, -5], [-1, 0, -3, 0]]


def test_soft_threshold_by_hand():
    # thresholds, the second-smallest magnitudes: 2, 2, 0, 1
    expected = [[0, -2, 0, 1], [0, 0, 0, 0], [0, 0, 0, -5], [0, 0, -2, 0]]
    assert soft_threshold24(GOLDEN).tolist() == expected
    half = [[0, -1, 0, 0.5], [0, 0, 0, 0], [0, 0, 0, -2.5], [0, 0, -1, 0]]
    assert soft_threshold24(GOLDEN, scale=0.5).tolist() == half


def test_soft_threshold_along_columns_by_hand():
    # thresholds of the columns: 1, 1, 2, 2
    expected = [[0, -3, 0, 1], [1, 1, 0, 0], [0, 0, 0, -3], [0, 0, -1, 0]]
    assert soft_threshold24(GOLDEN, 0).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=groups)
@few
def test_mask24_is_the_sorted_top_two(dtype, data):
    x = torch.tensor(data, dtype=torch.float64).to(dtype)
    mask = mask24(x)
    assert mask.dtype == torch.bool and mask.shape == x.shape
    assert torch.equal(mask, slow_mask24(x, -1))
    assert (mask.sum(-1) == 2).all()


@given(data=groups)
@few
def test_prune24_is_idempotent_and_changes_nothing_it_keeps(data):
    x = torch.tensor(data)
    once = prune24(x)
    check24(once)
    assert torch.equal(prune24(once), once)
    assert torch.equal(mask24(once) | (once == 0), mask24(x) | (once == 0))
    assert torch.equal(once[mask24(x)], x[mask24(x)])


def test_every_order_of_four_magnitudes():
    for order in itertools.product(range(4), repeat=4):  # all 256 patterns of ties
        x = torch.tensor(order, dtype=torch.float32) - 4  # negative: magnitudes 1 to 4
        assert torch.equal(mask24(x), slow_mask24(x, 0)), order
        assert soft_threshold24(x).tolist() == slow_soft(x.tolist()), order


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("function", [mask24, prune24, soft_threshold24])
def test_any_dim_is_the_last_dim_of_the_transpose(function, dim):
    x = normal(8, 12, 4)
    assert torch.equal(function(x, dim), function(x.movedim(dim, -1).contiguous()).movedim(-1, dim))
    if function is mask24:
        assert torch.equal(mask24(x, dim), slow_mask24(x, dim))


@pytest.mark.parametrize("function", [mask24, prune24, soft_threshold24, select24])
def test_strided_input_gives_what_a_copy_gives(function):
    x = normal(16, 8).T[::2]
    first = function(x)
    second = function(x.contiguous())
    for a, b in zip(
        first if isinstance(first, tuple) else [first], second if isinstance(second, tuple) else [second]
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_kept(dtype):
    x = normal(8, 16, dtype=dtype)
    assert prune24(x).dtype == dtype
    assert soft_threshold24(x).dtype == dtype
    assert soft_threshold24(x, scale=torch.tensor(1.5)).dtype == dtype
    assert mvue24(x).dtype == dtype
    assert select24(x, "magnitude")[0].dtype == dtype
    assert select24(x, "soft")[0].dtype == dtype
    assert select24(x, "static")[0].dtype == dtype
    assert select24(x, "learned", torch.zeros(16))[0].dtype == dtype
    assert mask24(x).dtype == torch.bool


@pytest.mark.parametrize("dtype", DTYPES)
@given(four=st.lists(values, min_size=4, max_size=4), bad=st.integers(0, 3), sign=st.sampled_from([1, -1]))
@few
def test_nan_in_means_nan_out(dtype, four, bad, sign):
    x = torch.tensor([*four, 1, 2, 3, 4], dtype=torch.float64).to(dtype)
    x[bad] = math.copysign(1, sign) * math.nan
    assert mask24(x)[bad]
    assert (mask24(x)[:4].sum(), mask24(x)[4:].sum()) == (2, 2)
    for out in (
        prune24(x),
        soft_threshold24(x),
        mvue24(x),
        select24(x, "magnitude")[0],
        select24(x, "soft")[0],
    ):
        assert out[:4].isnan().any() and not out[4:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_soft_thresholding_takes_nan_for_the_largest(dtype, dim):
    n = math.nan
    x = torch.tensor([[1, n, 5, -3], [n, 1, 2, -n], [n, 3, n, n], [n, n, n, n], [2, n, math.inf, 1]])
    expected = torch.tensor([[0, n, 2, 0], [n, 0, 0, n], [n, 0, n, 0], [n, n, 0, 0], [0, n, math.inf, 0]])
    if dim == 0:
        x, expected = x.t().contiguous(), expected.t()
    x = x.to(dtype)
    x[x.isnan()] = n  # of the same bits, which conversion does not see to
    out = soft_threshold24(x, dim)
    torch.testing.assert_close(out, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
    check24(out, dim)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_survive_selection(dtype):
    x = torch.tensor([1, -math.inf, 2, math.inf], dtype=dtype)
    assert mask24(x).tolist() == [False, True, False, True]
    assert soft_threshold24(x).tolist() == [0, -math.inf, 0, math.inf]
    x = torch.tensor([math.inf, 1, -math.inf, math.inf], dtype=dtype)
    assert prune24(x).tolist() == [math.inf, 0, -math.inf, 0]
    assert soft_threshold24(x).tolist() == [0, 0, 0, 0]  # none exceeds the threshold, infinity


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_are_ranked_by_their_bits(dtype):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.tensor([1, 3, 2, 0], dtype=torch.float64).to(dtype) * tiny
    assert mask24(x).tolist() == [False, True, True, False]
    assert soft_threshold24(x).tolist() == [0, (2 * tiny), tiny, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_either_sign_tie(dtype):
    x = torch.tensor([-0.0, 0.0, -0.0, 0.0, 0.0, 0.0, -1.0, 0.0], dtype=dtype)
    assert mask24(x).tolist() == [True, True, False, False, True, False, True, False]
    assert (soft_threshold24(x) == torch.tensor([0, 0, 0, 0, 0, 0, -1, 0])).all()


@given(data=st.lists(st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4), min_size=1, max_size=6))
@few
def test_soft_threshold_is_the_printed_formula(data):
    x = torch.tensor(data, dtype=torch.float64)
    out = soft_threshold24(x)
    assert out.tolist() == [slow_soft(four) for four in x.tolist()]
    check24(out)
    assert (out.abs() <= x.abs()).all() and ((out == 0) | (out.sign() == x.sign())).all()
    assert ((out == 0) | mask24(x)).all()


@given(
    a=st.lists(st.floats(-4, 4), min_size=4, max_size=4), b=st.lists(st.floats(-4, 4), min_size=4, max_size=4)
)
@few
def test_soft_threshold_is_continuous(a, b):
    """|f(a) - f(b)| <= 2 |a - b| in the maximum norm: a and t move by no more than |a - b| each."""
    share = torch.linspace(0, 1, 200, dtype=torch.float64).unsqueeze(1)
    line = torch.tensor(a, dtype=torch.float64) * (1 - share) + torch.tensor(b, dtype=torch.float64) * share
    out = soft_threshold24(line)
    step = line.diff(dim=0).abs().amax(1)
    assert (out.diff(dim=0).abs().amax(1) <= 2 * step + 1e-12).all()


def test_hard_pruning_jumps_where_the_soft_threshold_does_not():
    just_below, just_above = torch.tensor([[3.0, 1, 0.9999, 0], [3.0, 0.9999, 1, 0]])
    assert (prune24(just_below) - prune24(just_above)).abs().max() == 1
    assert (soft_threshold24(just_below) - soft_threshold24(just_above)).abs().max() < 2.1e-4


def test_soft_threshold_rounds_once():
    """In float16 the difference mag - t and the scale are exact before the one rounding."""
    x = normal(64, 64, dtype=torch.float16)
    exact = soft_threshold24(x.double(), scale=1.37)
    assert torch.equal(soft_threshold24(x, scale=1.37), exact.float().half())


def test_scale_multiplies_and_minimises_the_distance():
    w = normal(16, 32)
    for dim in (0, 1):
        beta = soft_scale(w, dim)
        assert isinstance(beta, float)
        f = soft_threshold24(w, dim)
        assert beta == pytest.approx(((w * f).sum() / f.square().sum()).item(), rel=1e-12)
        best = (beta * f - w).square().sum()
        for other in (0.9 * beta, 1.1 * beta, 1.0):
            assert best <= (other * f - w).square().sum()
        assert torch.equal(soft_threshold24(w, dim, scale=beta), f * beta)
    assert beta > 1 and soft_scale(w) == beta  # the threshold only shrinks; groups run along the last axis
    assert soft_scale(torch.ones(4, 8)) == 1.0  # f is all zero
    assert soft_scale(w.half()) == pytest.approx(soft_scale(w), rel=1e-2)


@given(
    data=st.data(),
    v=st.integers(1, 4),
    m=st.integers(4, 12),
    n=st.integers(1, 4),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
@few
def test_venom_mask_against_loops(data, v, m, n, blocks):
    rows, cols = v * blocks[0], m * blocks[1]
    numbers = data.draw(st.lists(st.integers(-3, 3), min_size=rows * cols, max_size=rows * cols))
    x = torch.tensor(numbers, dtype=torch.float32).view(rows, cols)  # integers: sums are exact, ties common
    mask = venom_mask(x, v, m, n)
    assert torch.equal(mask, slow_venom(x, v, m, n))
    assert mask.sum() == n * rows * cols // m
    check_venom(x * mask, v, m, n)


def test_venom_mask_by_hand():
    x = torch.tensor([[9.0, 1, 1, 5, 0, 2], [0, 1, 1, 4, 3, 2]])
    # column sums 9 2 2 9 3 4: columns 0, 3, 5, 4; the best two of them in each row
    assert venom_mask(x, 2, 6).int().tolist() == [[1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0]]
    # rows on their own: columns 0 3 5 and, of the ties, 1; then 3 4 5 1
    assert venom_mask(x, 1, 6, n=3).int().tolist() == [[1, 0, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1]]
    assert venom_mask(x, 1, 6, n=4).int().tolist() == [[1, 1, 0, 1, 0, 1], [0, 1, 0, 1, 1, 1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "percent"), [(16, 87.5), (32, 93.75), (64, 96.875)])
def test_table_5_is_exact(m, percent, dtype):
    mask = venom_mask(normal(128, 256, dtype=dtype), 64, m)
    assert 100 * sp.sparsity(mask.double()) == percent
    check_venom(mask.double(), 64, m)


@pytest.mark.parametrize("dtype", DTYPES)
def test_venom_of_four_columns_is_2_of_4(dtype):
    x = normal(8, 32, dtype=dtype)
    assert torch.equal(venom_mask(x, 4, 4), mask24(x))
    assert torch.equal(venom_mask(x, 1, 4), mask24(x))


def test_venom_mask_keeps_nan():
    x = torch.ones(4, 32)
    x[2, 31] = math.nan
    assert venom_mask(x, 4, 32)[2, 31]


def test_half_precision_columns_are_summed_in_float32():
    """In float16 a sum of ones stops at 2048, and a column of 3000 ones would tie with one of 2048."""
    x = torch.zeros(4096, 8, dtype=torch.float16)
    for j, height in enumerate([2048, 2049, 2050, 2051, 3000, 3001, 3002, 3003]):
        x[:height, j] = 1
    assert venom_mask(x, 4096, 8, n=4)[0].tolist() == [False] * 4 + [True] * 4


def test_check24_names_the_first_violation():
    x = torch.zeros(3, 8)
    check24(x)
    x[1, 4:7] = 1
    x[2, :4] = math.nan
    with pytest.raises(ValueError, match=r"group 1 \(elements 4 to 7\) at \(1,\) has 3 non-zeros"):
        check24(x)
    with pytest.raises(ValueError, match=r"group 0 .* at \(2,\) has 4"):
        check24(x[[0, 0, 2]])
    with pytest.raises(ValueError, match=r"dim 0: group 1 .* at \(2,\) has 4"):
        column = torch.zeros(8, 3)
        column[4:, 2] = -1
        check24(column, 0)


def test_check_venom_names_the_first_violation():
    x = torch.zeros(4, 16)
    x[:2, 0], x[:2, 1] = 1, 2
    check_venom(x, 2, 8)
    wide = x.clone()
    wide[2, 8], wide[2, 9], wide[3, 10], wide[3, 11] = 1, 1, 1, 1
    check_venom(wide, 2, 8)
    wide[3, 12] = 1
    with pytest.raises(ValueError, match=r"rows 2 to 3, columns 8 to 15 uses 5 columns"):
        check_venom(wide, 2, 8)
    tall = x.clone()
    tall[3, 8:11] = 1
    with pytest.raises(ValueError, match=r"row 3 has 3 non-zeros in columns 8 to 15, at most n = 2"):
        check_venom(tall, 2, 8)
    check_venom(tall, 2, 8, n=3)


def test_flip_rate_and_sparsity():
    a = torch.tensor([[True, False], [True, True]])
    assert flip_rate(a, a) == 0
    assert flip_rate(a, ~a) == 1
    assert flip_rate(a, torch.ones(2, 2, dtype=torch.bool)) == 0.25
    w = normal(64, 64)
    assert flip_rate(mask24(w), mask24(1.5 * w)) == 0
    assert 0 < flip_rate(mask24(w), mask24(w + 0.1 * normal(64, 64, seed=1))) < 0.2
    assert sp.sparsity(prune24(w)) == 0.5
    assert sp.sparsity(torch.tensor([0.0, -0.0, math.nan, 1e-45])) == 0.5
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(4,\)"):
        flip_rate(a, torch.ones(4, dtype=torch.bool))
    for function in (lambda x: flip_rate(x, x), sp.sparsity):
        with pytest.raises(ValueError, match="empty"):
            function(torch.zeros(0, 4))


def inclusion(four):
    """min(1, c |x_i|) with sum 2, by bisection on c."""
    low, high = 0.0, 1e6
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if sum(min(1, c * abs(a)) for a in four) < 2 else (low, c)
    return [min(1, high * abs(a)) for a in four]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "four",
    [
        (1, 1, 1, 1),
        (4, 3, 2, 1),
        (1, -2, 3, -4),
        (10, 1, 1, 1),
        (1, 10, 2, 0.5),
        (5, 5, 0.1, 0),
        (7, 0, 1, 0),
        (2, 2, 0, 0),
        (0, 0, 0, 3),
        (0.5, 0.25, 0.125, 9),
        (1e9, 1, 1, 1),  # in float32 the sum is 1e9, and the rest 0 by subtraction
    ],
)
def test_mvue_is_unbiased_with_the_best_inclusion_probabilities(four, dtype):
    """40 000 draws: the mean within five standard errors, every draw 2:4 and divided by its p."""
    draws = 40_000
    x = torch.tensor(four, dtype=dtype).repeat(draws, 1)
    out = mvue24(x, generator=torch.Generator().manual_seed(7))
    check24(out)
    p = inclusion(four) if sum(map(bool, four)) > 2 else [float(bool(a)) for a in four]
    for i in range(4):
        drawn = out[:, i] != 0
        rate, error = drawn.double().mean().item(), math.sqrt(max(p[i] * (1 - p[i]), 1e-12) / draws)
        assert abs(rate - p[i]) <= 5 * error + 1e-6, (four, i)
        expected = torch.full_like(out[drawn, i], four[i] / p[i] if p[i] else 0)
        torch.testing.assert_close(out[drawn, i], expected, rtol=1e-5, atol=0)
    mean, spread = out.double().mean(0), out.double().std(0) / math.sqrt(draws)
    assert ((mean - x[0].double()).abs() <= 5 * spread + 1e-5).all()


@given(data=groups, seed=st.integers(0, 2**31))
@few
def test_mvue_is_always_2_of_4_and_keeps_signs(data, seed):
    x = torch.tensor(data).clamp(-100, 100)
    out = mvue24(x, generator=torch.Generator().manual_seed(seed))
    check24(out)
    assert ((out == 0) | (out.sign() == x.sign())).all() and out.isfinite().all()


@pytest.mark.parametrize("u", [0.0, 2**-24, 2**-23, 0.5, 1 - 2**-24])
def test_mvue_draws_no_third_element_at_the_edges_of_the_unit_interval(u, monkeypatch):
    """Rounded probabilities may sum to a little more than 2; the first and the last draw must not see it."""
    monkeypatch.setattr(torch, "rand", lambda shape, dtype, **_: torch.full(shape, u, dtype=dtype))
    check24(mvue24(normal(20_000, 4, dtype=torch.float32)))


@pytest.mark.parametrize("bad", range(4))
def test_mvue_does_not_lose_an_infinity(bad):
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x[bad] = -math.inf
    out = mvue24(x)
    assert out[bad] == -math.inf
    check24(out)


def test_mvue_is_reproducible_and_works_along_any_dim():
    x = normal(8, 12)
    out = mvue24(x, 0, torch.Generator().manual_seed(3))
    check24(out, 0)
    assert torch.equal(out, mvue24(x, 0, torch.Generator().manual_seed(3)))
    assert torch.equal(out, mvue24(x.T.contiguous(), 1, torch.Generator().manual_seed(3)).T)
    torch.manual_seed(5)
    first = mvue24(x)
    torch.manual_seed(5)
    assert torch.equal(first, mvue24(x))


def all_90_patterns():
    """Every 4 x 4 0/1 matrix with row and column sums 2, from all 2^16."""
    found = []
    for bits in range(2**16):
        rows = [(bits >> s) & 15 for s in (12, 8, 4, 0)]
        if all(r.bit_count() == 2 for r in rows):
            tile = [[(r >> (3 - j)) & 1 for j in range(4)] for r in rows]
            if all(sum(c) == 2 for c in zip(*tile)):
                found.append(torch.tensor(tile).bool())
    return found


PATTERNS = all_90_patterns()


def test_venom_mask_scatters_nothing():
    """In torch's deterministic mode a scatter sorts all of its indices: votes took three times as long."""
    traced = make_fx(lambda x: venom_mask(x, 4, 8))(torch.randn(8, 16))
    names = {str(node.target) for node in traced.graph.nodes}
    assert any("gather" in name for name in names) and not any("scatter" in name for name in names)


@given(data=st.lists(st.integers(-4, 4), min_size=64, max_size=64))
@few
def test_transposable_mask_is_the_best_of_90(data):
    w = torch.tensor(data, dtype=torch.float32).view(8, 8)
    mask = transposable_mask(w)
    for dim in (0, 1):
        assert (mask.movedim(dim, -1).unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    assert len(PATTERNS) == 90
    for i, j in itertools.product((0, 4), repeat=2):
        tile = w[i : i + 4, j : j + 4].abs()
        kept = tile[mask[i : i + 4, j : j + 4]].sum()
        assert kept == max(tile[p].sum() for p in PATTERNS)


def test_patterns_that_were_made_on_the_meta_device_have_values():
    ablations.transposable_patterns.cache_clear()
    with torch.device("meta"):
        assert transposable_mask(torch.empty(8, 8)).is_meta
    assert ablations.transposable_patterns().sum() == 90 * 8


def test_transposable_mask_by_hand():
    # 9, 8, 7 and 6 are in different rows and columns, 5 to 2 go round a second time: two everywhere.
    w = torch.tensor([[9.0, -5, 1, 0], [0, 8, 4, -1], [1, 0, -7, 3], [-2, 1, 0, 6]])
    expected = [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]
    assert transposable_mask(w).int().tolist() == expected
    # Every row would rather keep columns 0 and 1, which have room for two. Row 2 gives up 17 for 14, row 3
    # 3 for 0, rows 0 and 1 17 for 1: rows 2 and 3 move over.
    w = torch.tensor([[9.0, 8, 1, 0], [9, 8, 0, 1], [9, 8, 7, 7], [2, 1, 0, 0]])
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert transposable_mask(w).int().tolist() == expected


def order_of_patterns():
    """The 90 patterns in the order in which ties are decided: by kind, rows 0 and 1, rows 2 and 3."""
    pairs = list(itertools.combinations(range(4), 2))
    apart = [(0, 2), (0, 3), (1, 2), (1, 3), (0, 1), (2, 3)]

    def halves(counts):
        """The pairs of two rows that use each column so often, the first row's lower choice first."""
        found = [(p, q) for p in pairs for q in pairs if [(*p, *q).count(c) for c in range(4)] == counts]
        return sorted(found, key=lambda h: apart.index(h[0])) if counts == [1] * 4 else found

    kinds = [[2 * (c in p) for c in range(4)] for p in pairs]
    kinds += [[1 + (c == i) - (c == j) for c in range(4)] for i, j in itertools.permutations(range(4), 2)]
    found = []
    for counts in [*kinds, [1] * 4]:
        for top, bottom in itertools.product(halves(counts), halves([2 - n for n in counts])):
            found.append(torch.tensor([[c in row for c in range(4)] for row in (*top, *bottom)]))
    return found


@given(data=st.lists(st.integers(0, 2), min_size=16, max_size=16))
@few
def test_transposable_mask_ties_take_the_first_pattern(data):
    """Small integers: sums are exact, and most tiles have several best patterns."""
    order = order_of_patterns()
    assert {tuple(p.flatten().tolist()) for p in order} == {tuple(p.flatten().tolist()) for p in PATTERNS}
    w = torch.tensor(data, dtype=torch.float32).view(4, 4)
    sums = [w[p].sum().item() for p in order]
    assert torch.equal(transposable_mask(w), order[sums.index(max(sums))])
    for same in (torch.zeros(4, 4), torch.ones(4, 4), -torch.zeros(4, 4)):
        assert torch.equal(transposable_mask(same), order[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposable_mask_is_optimal_up_to_rounding(dtype):
    w = normal(64, 64, dtype=dtype)
    w[:, ::3] *= 1e-3  # sums of different magnitudes round
    w = torch.where(mask24(w[:, :32]).repeat(1, 2), w, torch.zeros_like(w))  # zeros, as activations have
    mask = transposable_mask(w)
    tiles = w.double().abs().view(16, 4, 16, 4).transpose(1, 2)
    best = torch.stack([(tiles * p).sum((-1, -2)) for p in PATTERNS]).amax(0)
    kept = (tiles * mask.view(16, 4, 16, 4).transpose(1, 2)).sum((-1, -2))
    torch.testing.assert_close(kept, best, rtol=1e-6, atol=0)
    pruned = torch.where(mask, w, torch.zeros_like(w))
    check24(pruned, 0)
    check24(pruned, 1)
    check24(mask.double(), 0)
    assert (mask.view(64, 16, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_transposable_mask_keeps_what_is_not_finite(value):
    w = torch.ones(4, 4)
    w[0, 3] = w[1, 3] = w[3, 0] = value
    mask = transposable_mask(w)
    assert mask[0, 3] and mask[1, 3] and mask[3, 0]
    assert (mask.sum(0) == 2).all() and (mask.sum(1) == 2).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposable_mask_in_every_dtype(dtype):
    w = normal(16, 8, dtype=dtype)
    assert torch.equal(transposable_mask(w), transposable_mask(w.double()))


def test_select24_by_hand():
    y = torch.tensor([[1.0, 4, 2, 3]])
    assert select24(y, "magnitude")[0].tolist() == [[0, 4, 0, 3]]
    values_, mask = select24(y, "soft")
    assert values_.tolist() == [[0, 2, 0, 1]] and mask.tolist() == [[False, True, False, True]]
    assert select24(y, "static")[0].tolist() == [[1, 4, 0, 0]]
    deep = select24(y.expand(3, 1, 4), "static")[1]
    assert deep.tolist() == 3 * [[[True, True, False, False]]]
    # criteria 1 * 8, 4 * 1, 2 * 1, 3 * 1: the values themselves are not scaled
    score = torch.tensor([math.log(8), 0, 0, 0])
    assert select24(y, "learned", score)[0].tolist() == [[1, 4, 0, 0]]


@given(data=groups, shift=st.floats(-3, 3))
@few
def test_a_learned_score_that_is_equal_everywhere_is_magnitude(data, shift):
    x = torch.tensor(data)
    x = x.clamp(-100, 100)
    x = torch.where(x.abs() < 1e-30, torch.zeros_like(x), x)  # products with denormals round
    assert torch.equal(select24(x, "learned", torch.zeros(4))[1], mask24(x))
    score = torch.full((4,), 2.0 ** round(shift)).log()
    values_, mask = select24(x, "learned", score)
    assert (mask.sum(-1) == 2).all() and torch.equal(values_, torch.where(mask, x, torch.zeros_like(x)))


@pytest.mark.parametrize("method", ["magnitude", "soft", "learned", "static", "tile"])
def test_select24_gives_exactly_two_and_zero_elsewhere(method):
    y = torch.relu(normal(32, 16, dtype=torch.float32))
    kept, mask = select24(y, method, normal(16, seed=1, dtype=torch.float32))
    assert (mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    assert (kept[~mask] == 0).all()
    if method != "soft":
        assert torch.equal(kept[mask], y[mask])
    assert mask.shape == y.shape and kept.shape == y.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_learned_criteria_are_compared_in_float32(dtype):
    y = torch.tensor([0.0, 1, 2, 3], dtype=dtype)
    score = torch.tensor([20.0, 0, 0, 0])  # exp(20) is infinite in float16; 0 times it is no NaN
    assert select24(y, "learned", score)[1].tolist() == [False, False, True, True]
    close = torch.ones(4, dtype=dtype)
    assert select24(close, "learned", torch.tensor([0, 1e-5, 0, 2e-5]))[1].tolist() == [
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("function", [mask24, prune24, soft_threshold24, mvue24, select24, check24])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 10])
def test_sizes_that_are_no_multiple_of_four_raise_with_a_fix(function, size):
    with pytest.raises(ValueError, match=f"size {size}.*pad it to {size + (-size) % 4}"):
        function(torch.ones(3, size))


@pytest.mark.parametrize("dim", [2, -3])
@pytest.mark.parametrize("function", [mask24, prune24, soft_threshold24, mvue24, check24])
def test_a_dim_that_is_not_there_raises(function, dim):
    with pytest.raises(ValueError, match=f"dim {dim}"):
        function(torch.ones(4, 4), dim)
    with pytest.raises(ValueError, match="dim"):
        function(torch.tensor(1.0))


@pytest.mark.parametrize(
    "function",
    [mask24, prune24, soft_threshold24, mvue24, transposable_mask, lambda x: venom_mask(x, 2, 4)],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_integers_raise(function, dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        function(torch.ones(4, 4, dtype=dtype))


@pytest.mark.parametrize("shape", [(4,), (4, 6), (2, 8), (4, 4, 4)])
def test_transposable_mask_needs_tiles(shape):
    fix = r"pad it to \(4, 8\)" if len(shape) == 2 else "use a matrix"
    with pytest.raises(ValueError, match=f"4 x 4; {fix}"):
        transposable_mask(torch.ones(shape))


@pytest.mark.parametrize("function", [venom_mask, check_venom])
def test_venom_shapes(function):
    x = torch.ones(6, 24)
    for v, m, n in [
        (4, 8, 2),
        (2, 16, 2),
        (0, 8, 2),
        (2, 3, 2),
        (2, 8, 0),
        (2, 8, 5),
        (12, 8, 2),
        (-1, 8, 2),
    ]:
        with pytest.raises(ValueError, match=r"v.*m"):
            function(x, v, m, n)
    with pytest.raises(ValueError, match=r"\(2, 6, 24\)"):
        function(torch.ones(2, 6, 24), 2, 8)


def test_select24_arguments():
    y = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"magnitud.*magnitude, soft, learned, static"):
        select24(y, "magnitud")
    with pytest.raises(ValueError, match=r"\(8,\), got None"):
        select24(y, "learned")
    with pytest.raises(ValueError, match=r"\(8,\), got \(4,\)"):
        select24(y, "learned", torch.zeros(4))


@pytest.mark.parametrize("function", [mask24, prune24, soft_threshold24, mvue24])
def test_no_rows_is_fine_and_inputs_are_untouched(function):
    assert function(torch.ones(0, 8)).shape == (0, 8)
    x = normal(4, 8)
    before = x.clone()
    function(x)
    assert torch.equal(x, before)
