"""Means over seeds with their 95 % intervals, and differences of runs that share a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


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


def summary(values: Sequence[float]) -> Stats:
    """Mean with its 95 % t interval. Raises ValueError for no values or values that are not finite."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"values must be one or more finite numbers in a row, not {values!r}")
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
    if len(ours) != len(base):
        raise ValueError(f"{len(ours)} values against {len(base)}: pairs need one of each, in the same order")
    return summary(np.subtract(ours, base, dtype=np.float64))


@lru_cache(maxsize=256)
def t_quantile(df: int) -> float:
    """The t with P(|X| <= t) = 0.95 for Student's distribution with df >= 1 (whole) degrees of freedom."""
    low, high = 0.0, 16.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, df) < 0.95 else (low, middle)
    return high


def _t_within(t: float, df: int) -> float:
    """P(|X| <= t), the closed form for whole degrees of freedom (Abramowitz and Stegun 26.7.3-4)."""
    theta = math.atan(t / math.sqrt(df))
    odd, total = df % 2, 0.0
    term = math.cos(theta) if odd else 1.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (k - 1) / k
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total
