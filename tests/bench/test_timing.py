"""Times of functions in turns, and of the kernels of a step."""

import time

import torch

from replicate.bench import timing


def test_compare_orders_a_fast_and_a_slow_function_and_takes_turns():
    calls = []

    def fast():
        calls.append("fast")

    def slow():
        calls.append("slow")
        time.sleep(0.003)

    times = timing.compare({"fast": fast, "slow": slow}, "cpu", repeats=5)
    assert calls == ["fast"] * 2 + ["slow"] * 2 + ["fast", "slow"] * 5
    assert times["slow"]["ms"] >= 3 > times["fast"]["ms"]
    assert times["slow"]["ms_p10"] <= times["slow"]["ms"] <= times["slow"]["ms_p90"]


def test_kernels_of_a_step_are_timed():
    x = torch.randn(64, 64)
    times = timing.kernel_ms(lambda: torch.relu(x @ x), device="cpu")
    assert next(iter(times.values())) == max(times.values()) > 0
    assert "aten::mm" in times
