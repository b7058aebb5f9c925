"""How far runs are apart by chance, from records: pooled over arms, between runs that should be one."""

import math
from dataclasses import replace

import numpy as np
import pytest

from replicate import study
from replicate.settings.presets import train_preset
from replicate.study import noise, plans, records, results, statistics


def made(arm, seed, loss, kind="train", scale="laptop", **changes):
    (config,) = study.arms(scale, [arm], [seed], **changes)
    return records.make_record(kind, config, {"final_loss": loss, "valid_loss": loss + 0.1})


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is remembered of other records."""
    for function in (noise.recorded, noise.pooled, noise.drift, noise.apart):
        function.cache_clear()
    yield monkeypatch
    for function in (noise.recorded, noise.pooled, noise.drift, noise.apart):
        getattr(function, "cache_clear", lambda: None)()


def test_the_pooled_spread_by_hand(fresh):
    found = [("dense", made("dense", seed, 2.0)) for seed in (1, 2, 3, 11, 12)]
    found += [("w1", made("w1", seed, 2.0 + x)) for seed, x in ((1, 0.01), (2, 0.02), (3, 0.03))]
    found += [("w2", made("w2", seed, 2.0 + x)) for seed, x in ((1, 0.05), (11, 0.01), (12, 0.03))]
    found += [("recipe", made("recipe", seed, 3.0 + seed)) for seed in (1, 2, 3)]  # far above dense
    found += [("w1, lr x 2", made("w1", seed, 2.0 + seed / 50, lr=6e-3)) for seed in (1, 2, 3)]
    gelu = {"model.activation": "gelu"}
    found += [("GELU", made("dense", seed, 2.0 + seed / 50, **gelu)) for seed in (1, 2, 3)]
    fresh.setattr(noise, "recorded", lambda scale: found)
    # w1: variance 1e-4 of 2 degrees of freedom; w2 on the CPU's text: 2e-4 of 1; seed 1 alone says nothing
    assert noise.pooled("laptop", "final_loss") == pytest.approx(math.sqrt((2 * 1e-4 + 2e-4) / 3))
    assert noise.pooled("laptop", "y2_sparsity") == 0
    fresh.setattr(noise, "recorded", lambda scale: ())
    assert noise.pooled("smoke", "final_loss") == 0 and noise.drift("smoke") == (0, 0)


def test_a_scale_without_runs_to_tell_takes_the_floor_of_the_next_smaller(fresh):
    pooled, apart, drift = {"laptop": 0.009, "gpu": 0.003}, {"gpu": 0.002, "gpu40m": 0.005}, {"gpu40m": 0.02}
    fresh.setattr(noise, "pooled", lambda scale, column: pooled.get(scale, 0.0))
    fresh.setattr(noise, "apart", lambda scale, column: apart.get(scale, 0.0))
    fresh.setattr(noise, "drift", lambda scale: (drift.get(scale, 0.0), 0.0))
    names = ("dense", "experts x4, 8 of 64", "recipe")
    largest = [plans.everything("gpu100m", (1,))[arm][0] for arm in names]
    assert noise.floor(largest[:2], "valid_loss") == 0.005, "what gpu40m's equal runs are apart by"
    apart["gpu40m"] = 0.001
    assert noise.floor(largest[:2], "valid_loss") == 0.003, "gpu's pooled, not laptop's, which is larger"
    assert noise.floor(largest[1:], "valid_loss") == pytest.approx(0.02 / math.sqrt(2))
    assert noise.floor(plans.everything("gpu", (1,))["dense"] * 2, "valid_loss") == 0.003, "no larger one"


def test_the_floor_of_arms_that_drift_as_the_recipe_does(fresh):
    fresh.setattr(noise, "pooled", lambda scale, column: 0.003)
    fresh.setattr(noise, "drift", lambda scale: (0.01, 0.02))
    fresh.setattr(noise, "apart", lambda scale, column: 0.0)
    dense, venom, recipe, hard = (
        plans.everything("gpu", (1,))[arm][0] for arm in ("dense", "venom16", "recipe", "recipe, hard")
    )
    assert noise.floor([dense, venom], "final_loss") == 0.003
    assert noise.floor([dense, recipe], "final_loss") == pytest.approx(0.01 / math.sqrt(2))
    assert noise.floor([recipe, hard], "final_loss") == pytest.approx(0.01), "both are off"
    assert noise.floor([recipe, hard], "accuracy") == 0 == noise.floor([], "final_loss")
    assert noise.floor([train_preset("llama1b")], "final_loss") == 0
    fresh.setattr(noise, "apart", lambda scale, column: 0.004)
    assert noise.floor([dense, venom], "final_loss") == 0.004, "runs trained twice"
    assert noise.floor([dense, dense, dense, venom], "final_loss") == pytest.approx(0.004 * math.sqrt(2))


@pytest.mark.parametrize("scale", ["laptop", "gpu", "gpu40m"])
def test_no_interval_of_the_study_is_narrower(scale):
    runs = results.recorded_study(scale, plans.EVERY_SEED)
    least = noise.pooled(scale, "final_loss")
    assert 0.002 < least < 0.006
    for arm, s in results.differences(runs, column="final_loss").items():
        if s.n > 1:
            half = statistics.t_quantile(s.n - 1) * least / math.sqrt(s.n)
            assert (s.high - s.low) / 2 >= half * (1 - 1e-9), arm
            assert s.spread >= s.std * (1 - 1e-9)
            same = results.contrast(runs, (arm,), "final_loss")
            assert (same.low, same.high) == pytest.approx((s.low, s.high)), "tables and verdicts agree"


def test_runs_trained_again_are_set_beside_the_first(fresh, tmp_path):
    store = records.RecordStore(tmp_path / "own", tmp_path / "recorded")
    fresh.setattr(noise, "RecordStore", lambda: store)
    assert noise.reruns("laptop").empty and noise.apart("laptop", "final_loss") == 0
    again = made("dense", 1, 2.004, "rerun-1")
    again = replace(again, results=again.results | {"valid_loss": 2.106})
    for record in (made("dense", 1, 2.0), made("w1", 1, 2.1), again):
        store.put(record, recorded=True)
    store.put(made("w1", 2, 2.1, "rerun-1"), recorded=True)  # of a run that is not recorded
    noise.recorded.cache_clear()
    noise.apart.cache_clear()
    assert noise.apart("laptop", "final_loss") == pytest.approx(0.004)
    assert noise.apart("laptop", "valid_loss") == pytest.approx(0.006)
    (row,) = noise.reruns("laptop").to_dict("records")
    assert (row["arm"], row["seed"], row["first on"]) == ("dense", 1, row["again on"])
    assert np.allclose([row["training"], row["held-out"]], [0.004, 0.006])
    for record in (made("dense", 2, 2.0), made("dense", 2, 1.988, "rerun-1"), made("dense", 3, 2.0)):
        store.put(record, recorded=True)
    store.put(made("dense", 3, 2.001, "rerun-1"), recorded=True)
    noise.recorded.cache_clear()
    noise.apart.cache_clear()
    root = math.sqrt((0.004**2 + 0.012**2 + 0.001**2) / 3)
    assert noise.apart("laptop", "final_loss") == pytest.approx(root), "of squares, of either sign"
