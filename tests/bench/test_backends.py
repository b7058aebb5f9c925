"""The comparison of training curves by kernels and by the reference."""

import numpy as np
import pytest

from replicate.bench import backends as bench
from replicate.study import records


def curves(seed_gap, backend_gap, arm="a"):
    """Losses of both seeds and backends, constant gaps apart."""
    base = 3 - np.linspace(0, 1, 200)
    return {
        (arm, seed, backend): base + seed_gap * (seed == 2) + backend_gap * (backend == "auto")
        for seed in bench.SEEDS
        for backend in bench.BACKENDS
    }


def test_gaps_are_the_largest_of_the_smoothed_curves_and_of_the_ends():
    losses = curves(0.1, 0.02)
    losses["a", 2, "auto"] = losses["a", 2, "auto"] + np.where(np.arange(200) < 60, 0.3, 0)  # early only
    row = bench.compare("a", losses)
    assert row["seeds"] == pytest.approx(0.1) and row["final_seeds"] == pytest.approx(0.1)
    assert row["backends"] == pytest.approx(0.32) and row["final_backends"] == pytest.approx(0.02)
    assert set(row["final"]) == {"reference 1", "reference 2", "auto 1", "auto 2"}


@pytest.mark.parametrize(("gap", "within"), [(0.05, True), (0.09, False)])
def test_a_row_is_within_the_spread_of_seeds_pooled_over_arms(gap, within):
    rows = [bench.compare("a", curves(0.1, 0.01)), bench.compare("b", curves(0.0, gap, "b"))]
    result = bench.judge(rows)
    assert result["seeds"] == pytest.approx((0.1**2 / 2) ** 0.5)
    assert [row["within"] for row in result["arms"]] == [True, within]
    record = records.make_record(bench.KIND, bench.config(), result)
    assert ("False" in bench.table(record)) != within


@pytest.mark.parametrize("name", ["seed", "backend", "model.sparsity.w1"])
def test_what_the_benchmark_sets_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} cannot be changed here; "):
        bench.config(changes={name: "1"})


def test_both_backends_of_a_cpu_train_the_same_curve():
    changes = {"steps": 6, "dense_warmup": 2, "lr_warmup": 2, "final_window": 4, "dtype": "float32"}
    c = bench.config(("act24",), changes | {"model.n_layer": 1, "batch_size": 2})
    assert {config.backend for config in bench.runs(c).values()} == {"reference", "auto"}
    (row,) = bench.run(c, 2).results["arms"]
    assert row["backends"] == 0 and row["seeds"] > 0 and row["within"]
