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
