"""Timing and statistics: medians on CPU and GPU, comparisons within one run, intervals.

Two numbers are compared only within one run: the candidates take turns, so that clock changes and
neighbours hit them alike.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

FLUSH_BYTES = 256 * 2**20  # larger than any L2 cache


@dataclass(frozen=True)
class Timing:
    """Times of one function in milliseconds: median, 10th and 90th percentile, number of repeats."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Stats:
    """Mean, sample standard deviation, and the 95 % t interval [low, high] of n values.

    With one value std, low and high are NaN: one run says nothing about spread.
    """

    mean: float
    std: float
    low: float
    high: float
    n: int


def time_ms(
    fn: Callable[[], object], *, device: str = "cpu", repeats: int = 20, warmup: int = 3, flush: bool = True
) -> Timing:
    """Median time of `fn()` in milliseconds; see `compare`."""
    return compare({"fn": fn}, device=device, repeats=repeats, warmup=warmup, flush=flush)["fn"]


def compare(
    functions: dict[str, Callable[[], object]],
    *,
    device: str = "cpu",
    repeats: int = 20,
    warmup: int = 3,
    flush: bool = True,
) -> dict[str, Timing]:
    """Median times of several functions, which take turns in every repeat.

    Args:
        functions: name -> function without arguments.
        device: "cpu" (clock) or "cuda" (events, so the launch overhead hides as it does in training).
        repeats: timed calls of each function, after `warmup` untimed ones.
        flush: on a GPU, clear the L2 cache before each call, as cold as inside a training step.

    Raises ValueError for no function, fewer than one repeat, or an unknown or absent device.
    """
    if not functions or repeats < 1 or warmup < 0:
        raise ValueError(f"{len(functions)} functions, {repeats} repeats, {warmup} warm-ups: need >= 1, 1, 0")
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device is {device!r}; choose 'cpu', or 'cuda' where there is a GPU")
    for fn in functions.values():
        for _ in range(warmup):
            fn()
    once = _once_cuda(flush, device) if kind == "cuda" else _once_cpu
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, fn in functions.items():
            times[name].append(once(fn))
    return {name: _timing(values) for name, values in times.items()}


def summary(values: Sequence[float]) -> Stats:
    """Mean with its 95 % t interval. Raises ValueError for no values or values that are not finite."""
    x = _finite(values, "values")
    n, mean = len(x), float(x.mean())
    if n == 1:
        return Stats(mean, math.nan, math.nan, math.nan, 1)
    std = float(x.std(ddof=1))
    half = t_quantile(n - 1) * std / math.sqrt(n)
    return Stats(mean, std, mean - half, mean + half, n)


def paired(ours: Sequence[float], base: Sequence[float]) -> Stats:
    """Statistics of ours - base, pair by pair (same seed or same batch), so that shared noise cancels.

    Raises ValueError if the lengths differ.
    """
    a, b = _finite(ours, "ours"), _finite(base, "base")
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}: pairs need one of each, in the same order")
    return summary(a - b)


@lru_cache(maxsize=256)
def t_quantile(df: int, level: float = 0.95) -> float:
    """The t with P(|X| <= t) = level for Student's distribution with df (whole) degrees of freedom.

    Raises ValueError for df below 1, or a level that is not between 0 and 1.
    """
    if df < 1 or not 0 < level < 1:
        raise ValueError(f"df {df}, level {level}: df is 1 or more, level lies between 0 and 1")
    low, high = 0.0, 1.0
    while _t_within(high, df) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, df) < level else (low, middle)
    return high


@lru_cache(maxsize=8)
def device_name(kind: str = "auto") -> str:
    """The GPU's name, or the processor's where there is none or `kind` is "cpu"."""
    if kind != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({_processor()})"


def _once_cpu(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return 1e3 * (time.perf_counter() - start)


def _once_cuda(flush: bool, device: str) -> Callable[[Callable[[], object]], float]:
    cache = torch.empty(FLUSH_BYTES if flush else 0, dtype=torch.int8, device=device)

    def once(fn: Callable[[], object]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        start.record()
        fn()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    return once


def _timing(values: list[float]) -> Timing:
    low, median, high = (float(q) for q in np.quantile(values, [0.1, 0.5, 0.9]))
    return Timing(median, low, high, len(values))


def _finite(values: Sequence[float], name: str) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"{name} must be one or more finite numbers in a row, not {values!r}")
    return x


def _t_within(t: float, df: int) -> float:
    """P(|X| <= t), the closed form for whole degrees of freedom (Abramowitz and Stegun 26.7.3-4)."""
    theta = math.atan(t / math.sqrt(df))
    cos2, term, total = math.cos(theta) ** 2, 1.0, 0.0
    if df % 2:
        if df == 1:
            return 2 * theta / math.pi
        term = math.cos(theta)
        for k in range(3, df + 1, 2):
            total += term
            term *= cos2 * (k - 1) / k
        return 2 / math.pi * (theta + math.sin(theta) * total)
    for k in range(2, df + 1, 2):
        total += term
        term *= cos2 * (k - 1) / k
    return math.sin(theta) * total


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"
