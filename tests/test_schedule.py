from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate.config import ORDERS, TrainConfig
from replicate.schedule import learning_rate, phase_at, phase_plan, sparse_before, sparse_steps
from replicate.settings.presets import train_preset

RUN = train_preset("smoke", "recipe", steps=100, dense_warmup=20, lr_warmup=10)


def counts(cfg):
    return [phase_at(step, cfg) for step in range(cfg.steps)].count("sparse")


def test_the_papers_order_is_warmup_sparse_dense():
    half = replace(RUN, sparse_share=0.5)
    assert phase_plan(half) == [("dense", 0, 20), ("sparse", 20, 60), ("dense", 60, 100)]
    assert phase_plan(replace(half, order="dense-sparse")) == [("dense", 0, 60), ("sparse", 60, 100)]
    assert phase_plan(RUN) == [("dense", 0, 20), ("sparse", 20, 100)]


def test_interleaved_alternates_within_each_period():
    plan = phase_plan(replace(RUN, sparse_share=0.5, order="interleaved", interleave=10))
    assert plan[:4] == [("dense", 0, 20), ("sparse", 20, 25), ("dense", 25, 30), ("sparse", 30, 35)]
    assert len(plan) == 17


def test_a_dense_model_has_no_sparse_steps():
    dense = replace(RUN, model=train_preset("smoke").model)
    assert sparse_steps(dense) == 0
    assert phase_plan(dense) == [("dense", 0, 100)]


def test_a_warmup_longer_than_the_run_is_dense_throughout():
    assert phase_plan(replace(RUN, dense_warmup=500)) == [("dense", 0, 100)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(0, 100), st.floats(0, 1), st.sampled_from(ORDERS), st.integers(1, 30))
def test_every_order_has_exactly_the_sparse_steps_asked_for(steps, warmup, share, order, period):
    cfg = replace(
        RUN, steps=steps, lr_warmup=0, dense_warmup=warmup, sparse_share=share, order=order, interleave=period
    )
    rest = max(0, steps - warmup)
    assert counts(cfg) == sparse_steps(cfg)
    assert abs(sparse_steps(cfg) - share * rest) <= 0.5
    assert all(phase_at(step, cfg) == "dense" for step in range(min(warmup, steps)))
    assert [sparse_before(step, cfg) for step in range(steps + 1)] == [
        sum(phase_at(s, cfg) == "sparse" for s in range(step)) for step in range(steps + 1)
    ]
    plan = phase_plan(cfg)
    assert plan[0][1] == 0
    assert plan[-1][2] == steps
    assert all(a[2] == b[1] and a[0] != b[0] for a, b in pairwise(plan))


def test_learning_rate_climbs_then_follows_a_cosine_to_its_share():
    rates = [learning_rate(step, RUN) for step in range(100)]
    assert rates[:10] == pytest.approx([RUN.lr * (i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(RUN.lr)
    assert rates[-1] == pytest.approx(RUN.lr * RUN.min_lr_share)
    assert all(a > b for a, b in pairwise(rates[10:]))
    middle = (rates[10] + rates[-1]) / 2
    assert (rates[54] + rates[55]) / 2 == pytest.approx(middle, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(0, 50), st.floats(0, 1, allow_subnormal=False))
def test_learning_rate_stays_in_bounds(steps, warmup, share):
    cfg = TrainConfig(steps=steps, lr_warmup=min(warmup, steps), min_lr_share=share)
    for step in range(steps):
        rate = learning_rate(step, cfg)
        assert 0 < rate <= cfg.lr * (1 + 1e-12) or (share == 0 and rate == 0)
        assert step < cfg.lr_warmup or rate >= cfg.lr * share * (1 - 1e-9)
