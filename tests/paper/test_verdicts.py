import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate.paper.table import claims
from replicate.paper.verdicts import (
    DIRECTION,
    FAILS,
    HOLDS,
    PROFILES,
    SIZE,
    UNTESTABLE,
    VERDICTS,
    Claim,
    judge,
)
from replicate.study import statistics

BASE = Claim(
    id="x", place="Table 0", statement="s", paper=0.03, unit="nats", rule="effect", tolerance=0, how="h",
    notebook="00", stand_by=False, null=0.0,
)  # fmt: skip


def verdict(ours, spread=None, n=1, profile="gpu", **changes):
    return judge(replace(BASE, **changes), ours, spread, n, profile).text


def spread_for(half, n=3):
    """The standard deviation whose 95 % interval over n runs is +- half."""
    return half * math.sqrt(n) / statistics.t_quantile(n - 1)


@pytest.mark.parametrize(
    ("ours", "half", "expected"),
    [
        (0.03, 0.005, HOLDS),
        (0.04, 0.018, HOLDS),
        (0.036, 0.026, DIRECTION),  # the middle of the interval is of the paper's size, its ends are not
        (0.058, 0.006, DIRECTION),  # so far off that part of the interval is beyond twice
        (0.08, 0.01, DIRECTION),  # there, but much larger
        (0.012, 0.004, DIRECTION),
        (0.299, 0.01, DIRECTION),
        (0.301, 0.01, SIZE),
        (0.0029, 0.001, SIZE),
        (0.03, 0.031, UNTESTABLE),  # the interval includes zero
        (-0.001, 0.01, UNTESTABLE),
        (-0.03, 0.01, FAILS),
    ],
)
def test_a_signed_difference_gets_each_of_the_five_verdicts(ours, half, expected):
    assert verdict(ours, spread_for(half), 3) == expected
    mirrored = verdict(-ours, spread_for(half), 3, paper=-0.03)
    assert mirrored == expected


@pytest.mark.parametrize("ours", [0.012, 0.061, 0.08])
def test_noise_never_makes_an_effect_hold(ours):
    found = {verdict(ours, spread_for(half), 3) for half in (0.001, 0.01, 0.03, 0.1)}
    assert HOLDS not in found and DIRECTION in found


def test_an_effect_without_a_number_is_about_its_side_alone():
    up, down = {"paper": None, "sign": 1}, {"paper": None, "sign": -1}
    assert verdict(5.0, **up) == HOLDS
    assert verdict(5.0, **down) == FAILS
    assert verdict(0.0, **up) == FAILS
    assert verdict(0.1, 1.0, 3, **up) == UNTESTABLE


def test_a_ratio_is_judged_against_one():
    speed = {"paper": 1.5, "null": 1.0}
    assert [verdict(x, **speed) for x in (1.25, 1.2, 2.0, 2.1)] == [HOLDS, DIRECTION, HOLDS, DIRECTION]
    assert [verdict(x, **speed) for x in (1.05, 1.04, 6.0, 6.1, 0.9)] == [
        DIRECTION,
        SIZE,
        DIRECTION,
        SIZE,
        FAILS,
    ]


def test_the_factor_of_a_speed_is_that_of_its_gain():
    found = judge(replace(BASE, paper=1.352, null=1.0), 1.09, profile="gpu")
    assert found.text == DIRECTION and found.why == "0.26 times the paper's effect"


def test_every_verdict_on_an_effect_names_its_factor():
    for ours, factor in ((0.03, 1), (0.09, 3), (0.6, 20), (0.0015, 0.05)):
        found = judge(BASE, ours, spread_for(ours / 10), 3, "gpu")
        assert found.why == f"{factor:g} times the paper's effect ({0.9 * factor:.2g} to {1.1 * factor:.2g})"


def test_a_range_accepts_all_of_it():
    speed = {"paper": [6, 8], "null": 1.0}
    assert [verdict(x, **speed) for x in (3.5, 6.0, 7.3, 15.0)] == [HOLDS] * 4
    assert [verdict(x, **speed) for x in (3.4, 15.1, 0.5)] == [DIRECTION, DIRECTION, FAILS]
    assert [verdict(x, **speed) for x in (1.5, 1.49, 71, 72)] == [DIRECTION, SIZE, DIRECTION, SIZE]
    whys = [judge(replace(BASE, **speed), x, profile="gpu").why for x in (2.0, 7.0, 15.0)]
    assert whys == [
        "0.2 times the paper's effect, lower end", "within the paper's range",
        "2 times the paper's effect, upper end",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "half", "expected"),
    [(0.467, None, HOLDS), (0.4674, None, HOLDS), (0.508, None, FAILS), (0.467, 0.01, UNTESTABLE)],
)
def test_equals(ours, half, expected):
    spread = None if half is None else spread_for(half)
    assert verdict(ours, spread, 3 if half else 1, rule="equals", paper=0.467, tolerance=0.0005) == expected


def test_equals_takes_the_tolerance_itself_in():
    assert verdict(0.3, rule="equals", paper=0.2, tolerance=0.1) == HOLDS  # 0.2 + 0.1 > 0.3 in binary
    assert verdict(0.1 + 0.2, rule="equals", paper=0.2, tolerance=0.1) == HOLDS


def test_at_most_is_a_margin_for_no_loss():
    same = {"rule": "at most", "paper": 0.0, "tolerance": 0.01, "null": None}
    assert verdict(-0.2, spread_for(0.05), 3, **same) == HOLDS  # better than dense is no loss
    assert verdict(0.005, spread_for(0.004), 3, **same) == HOLDS
    assert verdict(0.03, spread_for(0.005), 3, **same) == FAILS
    assert verdict(0.005, spread_for(0.02), 3, **same) == UNTESTABLE


def test_at_least_with_a_null_knows_a_smaller_effect():
    sparse = {"rule": "at least", "paper": 0.9, "tolerance": 0.0, "null": 0.5}
    assert [verdict(x, **sparse) for x in (0.95, 0.7, 0.5, 0.4)] == [HOLDS, DIRECTION, FAILS, FAILS]
    assert verdict(0.52, spread_for(0.05), 3, **sparse) == UNTESTABLE
    assert verdict(0.7, **{**sparse, "null": None}) == FAILS
    assert verdict(0.53, **sparse) == SIZE
    assert judge(replace(BASE, **sparse), 0.7).why == "0.5 times the least effect that the paper says"
    around = judge(replace(BASE, **sparse), 0.897, spread_for(0.01), 3)
    assert around.text == DIRECTION and around.why.endswith("our interval includes the paper's")


def test_true_or_false():
    assert verdict(True, rule="true", paper=True) == HOLDS
    assert verdict(np.bool_(False), rule="true", paper=True) == FAILS
    with pytest.raises(ValueError, match="true or false"):
        verdict(1, rule="true", paper=True)


def test_what_was_not_measured_cannot_be_judged():
    found = judge(replace(BASE, needs="a larger model"), None)
    assert (found.text, found.why) == (UNTESTABLE, "needs a larger model")


def test_a_noisy_claim_says_nothing_after_one_run():
    assert verdict(0.03, noisy=True) == UNTESTABLE
    assert verdict(0.03, spread_for(0.005), 3, noisy=True) == HOLDS


def test_a_small_scale_confirms_only_in_direction_and_refutes_nothing():
    gpu = {"holds_from": "gpu", "fails_from": "laptop", "paper": None, "sign": 1}
    for profile, right, wrong in (
        ("smoke", DIRECTION, UNTESTABLE),
        ("laptop", DIRECTION, FAILS),
        ("gpu", HOLDS, FAILS),
        ("paper", HOLDS, FAILS),
    ):
        assert verdict(1.0, profile=profile, **gpu) == right
        assert verdict(-1.0, profile=profile, **gpu) == wrong
    assert "smoke scale" in judge(replace(BASE, **gpu), 1.0, profile="smoke").why


def test_the_default_scale_is_the_smallest():
    assert judge(replace(BASE, holds_from="laptop"), 0.03).text == DIRECTION


def test_stats_bring_their_own_spread():
    stats = statistics.paired([0.031, 0.029, 0.030], [0.0, 0.0, 0.0])
    found = judge(BASE, stats, profile="gpu")
    assert found.text == HOLDS
    assert (found.low, found.high) == pytest.approx((stats.low, stats.high))
    wide = statistics.widened(stats, floor=0.02)
    found = judge(BASE, wide, profile="gpu")
    assert (found.low, found.high) == pytest.approx((wide.low, wide.high)), (
        "the interval, not the seeds' spread"
    )
    assert found.text == UNTESTABLE
    assert judge(replace(BASE, noisy=True), statistics.summary([0.03]), profile="gpu").text == UNTESTABLE


@pytest.mark.parametrize(
    ("ours", "spread", "n", "profile", "message"),
    [
        (math.nan, None, 1, "gpu", "finite"),
        (math.inf, None, 1, "gpu", "finite"),
        (True, None, 1, "gpu", "finite"),
        (0.1, 0.1, 1, "gpu", "n >= 2"),
        (0.1, -0.1, 3, "gpu", "n >= 2"),
        (0.1, None, 1, "GPU", "profile"),
    ],
)
def test_bad_numbers_are_refused(ours, spread, n, profile, message):
    with pytest.raises(ValueError, match=message):
        judge(BASE, ours, spread, n, profile)


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": "roughly"},
        {"holds_from": "desk"},
        {"fails_from": "desk"},
        {"expected": DIRECTION},
        {"null": None},
        {"tolerance": 0.01},
        {"paper": None, "sign": None},
        {"rule": "equals", "paper": None},
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(changes):
    with pytest.raises(ValueError, match="claim x"):
        replace(BASE, **changes)


@settings(max_examples=40, deadline=None)
@given(
    ours=st.floats(-1, 1),
    half=st.floats(0, 1),
    value=st.floats(-1, 1).filter(lambda x: x != 0),
    profile=st.sampled_from(PROFILES),
)
def test_no_sign_is_claimed_that_the_interval_does_not_show(ours, half, value, profile):
    found = judge(replace(BASE, paper=value), ours, spread_for(half), 3, profile)
    assert found.text in VERDICTS
    if found.low <= 0 <= found.high:
        assert found.text == (FAILS if found.low == found.high == 0 else UNTESTABLE)
    else:
        assert found.text != UNTESTABLE
        assert (found.text == FAILS) == ((found.low < 0) != (value < 0))  # a product may underflow


@settings(max_examples=40, deadline=None)
@given(ours=st.floats(-0.1, 0.1), half=st.floats(0, 0.05), wider=st.floats(1, 3))
def test_more_noise_never_turns_a_refutation_into_support(ours, half, wider):
    near = verdict(ours, spread_for(half), 3)
    far = verdict(ours, spread_for(half * wider), 3)
    assert not (near == FAILS and far in (HOLDS, DIRECTION, SIZE))
    assert not (near in (HOLDS, DIRECTION, SIZE) and far == FAILS)


def spoil(claim):
    """A number with which a claim does not hold."""
    if claim.rule == "true":
        return False
    if claim.rule == "effect":
        middle = claim.paper if not isinstance(claim.paper, list) else claim.paper[0]
        sign = claim.sign or (1 if middle > claim.null else -1)
        return claim.null - sign
    far = abs(claim.paper) + claim.tolerance + 10
    return claim.paper + (far if claim.rule == "at most" else -far)


def support(claim):
    """A number with which a claim holds."""
    if claim.rule == "true":
        return True
    if claim.paper is None:
        return claim.null + claim.sign
    if claim.rule == "at most" and claim.noisy:
        return claim.paper - 0.001  # at the limit itself, any noise reaches across
    return claim.paper[0] if isinstance(claim.paper, list) else claim.paper


@pytest.mark.parametrize("claim", claims().values(), ids=lambda claim: claim.id)
def test_every_claim_of_the_paper_can_hold_and_can_fail(claim):
    noise = (1e-6, 3) if claim.noisy else (None, 1)
    assert judge(claim, support(claim), *noise, "paper").text == HOLDS
    assert judge(claim, spoil(claim), *noise, "paper").text == FAILS
    assert judge(claim, None).text == UNTESTABLE
    if claim.stand_by:
        assert judge(claim, spoil(claim), *noise, "smoke").text == FAILS, "a check that cannot fail"
