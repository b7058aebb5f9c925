import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate.study import statistics
from replicate.system import provenance


# Student's t, 95 %, from the printed tables.
@pytest.mark.parametrize(
    ("df", "t"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (1000, 1.9623)],
)
def test_t_quantile_agrees_with_the_tables(df, t):
    assert statistics.t_quantile(df) == pytest.approx(t, abs=1e-4)


def test_summary_of_three_values_by_hand():
    s = statistics.summary([1.0, 2.0, 3.0])
    assert (s.mean, s.std, s.n) == (2.0, 1.0, 3)
    assert s.high - 2 == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert 2 - s.low == pytest.approx(s.high - 2)


def test_one_value_has_no_interval():
    s = statistics.summary([0.5])
    assert s.mean == 0.5
    assert math.isnan(s.std) and math.isnan(s.low)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [[1.0]]])
def test_summary_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="finite numbers"):
        statistics.summary(values)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-10, 10), min_size=2, max_size=8),
    st.floats(-5, 5),
    st.lists(st.floats(-100, 100), min_size=8, max_size=8),
)
def test_pairing_cancels_the_noise_that_both_share(base, shift, shared):
    noise = np.array(shared[: len(base)])
    ours = np.array(base) + shift
    clean, noisy = statistics.paired(ours, base), statistics.paired(ours + noise, np.array(base) + noise)
    assert noisy.mean == pytest.approx(clean.mean, abs=1e-9)
    assert noisy.std == pytest.approx(clean.std, abs=1e-6)
    assert clean.mean == pytest.approx(shift, abs=1e-9)


def test_pairs_need_equal_lengths():
    with pytest.raises(ValueError, match="2 values against 1"):
        statistics.paired([1.0, 2.0], [1.0])


def test_t_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        s = statistics.summary(rng.normal(3.0, 2.0, size=3))
        inside += s.low <= 3.0 <= s.high
    assert 0.93 < inside / 2000 < 0.97


def test_an_interval_is_no_narrower_than_its_floor_gives():
    three = statistics.summary([0.999, 1.0, 1.001])
    wide = statistics.widened(three, floor=0.3)
    assert wide.high - 1 == pytest.approx(4.3027 * 0.3 / math.sqrt(3), abs=1e-4) and wide.std == three.std
    assert statistics.widened(three, floor=1e-5).high == pytest.approx(three.high), "its own spread is larger"
    both = statistics.widened(three, floor=0.3, shared=0.01)
    assert both.high - 1 == pytest.approx(4.3027 * math.sqrt(0.03 + 0.01), abs=1e-4)
    assert both.spread == pytest.approx(math.sqrt(3 * 0.04)) and three.spread == pytest.approx(three.std)
    assert math.isnan(statistics.widened(statistics.summary([1.0]), floor=0.3).low)


def test_the_floor_keeps_the_promise_of_the_interval():
    """Means of three values whose own spread is often far too small."""
    rng = np.random.default_rng(1)
    draws = [statistics.summary(rng.normal(0.0, 1.0, 3)) for _ in range(2000)]
    inside = [[s.low <= 0 <= s.high for s in (one, statistics.widened(one, floor=1.0))] for one in draws]
    plain, floored = np.mean(inside, axis=0)
    assert 0.93 < plain < 0.97 < floored


def test_p_values_are_those_of_the_interval():
    s = statistics.summary([1.0, 2.0, 3.0])
    assert statistics.p_value(s, s.low) == pytest.approx(0.05) == statistics.p_value(s, s.high)
    assert statistics.p_value(s, 2.0) == 1 and 0.05 < statistics.p_value(s) < 0.1
    assert statistics.p_value(statistics.summary([1.0, 1.0])) == 0
    assert math.isnan(statistics.p_value(statistics.summary([1.0])))
    assert statistics.p_value(statistics.widened(s, floor=9.0)) > statistics.p_value(s)


def test_holm_by_hand():
    p = {"a": 0.01, "b": 0.02, "c": 0.03, "d": 0.005}
    assert statistics.holm(p) == {"d", "a", "b", "c"}  # .005 <= .05/4, .01 <= .05/3, .02 <= .05/2, .03 <= .05
    assert statistics.holm({"d": 0.013, "a": 0.013}) == {"d", "a"}
    assert statistics.holm({"a": 0.02, "b": 0.04, "c": 0.001}) == {"c", "a", "b"}
    assert statistics.holm({"a": 0.04, "b": 0.001, "c": 0.03}) == {"b"}, "the first that fails ends it"
    assert statistics.holm({}) == set() == statistics.holm({"a": math.nan})


def test_device_name_is_one_line():
    name = provenance.device_name()
    assert name
    assert "\n" not in name


def test_a_run_on_the_cpu_of_a_gpu_machine_names_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    name = provenance.device_name.__wrapped__  # past the cache
    assert name() == name("auto") == name("cuda") == "NVIDIA H200"
    assert name("cpu").startswith("CPU (")
