"""Means over seeds with their 95 % intervals, differences of runs that share a seed, many comparisons."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Stats:
    """Mean, sample standard deviation, and the 95 % t interval [low, high] of n values.

    With one value std, low and high are NaN: one run says nothing about spread. `widened` makes the interval
    wider than std alone would; std stays that of the values.
    """

    mean: float
    std: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half of the interval's width; 0 for one value, which has none."""
        return (self.high - self.low) / 2 if self.n > 1 else 0.0

    @property
    def spread(self) -> float:
        """The standard deviation of n values that would give this interval; NaN for one value."""
        return self.half * math.sqrt(self.n) / t_quantile(self.n - 1) if self.n > 1 else math.nan


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


def widened(stats: Stats, floor: float = 0.0, shared: float = 0.0) -> Stats:
    """The same mean, in an interval that a few values which happen to agree cannot make too narrow.

    mean ± t(n - 1) sqrt(max(s, floor)² / n + shared), with s the values' own standard deviation. Of two or
    three values s is often far too small; the degrees of freedom stay those of the values. One value has no
    interval still.

    Args:
        floor: standard deviation of such a value as many others have shown it.
        shared: variance of an error that all values have in common, which more of them do not reduce.
    """
    if stats.n == 1:
        return stats
    half = t_quantile(stats.n - 1) * math.sqrt(max(stats.std, floor) ** 2 / stats.n + shared)
    return replace(stats, low=stats.mean - half, high=stats.mean + half)


def p_value(stats: Stats, null: float = 0.0) -> float:
    """Two-sided p of "the mean is `null`", of the interval's t test; NaN for one value."""
    if stats.n == 1 or stats.mean == null:
        return math.nan if stats.n == 1 else 1.0
    error = stats.spread / math.sqrt(stats.n)
    return 1 - _t_within(abs(stats.mean - null) / error, stats.n - 1) if error else 0.0


def holm(p: Mapping[Hashable, float], level: float = 0.05) -> set[Hashable]:
    """Those of a family of comparisons that stand after Holm's correction: at most `level` for one false.

    The smallest of m p-values must be at most level / m, the next level / (m - 1), and so on to the first
    that is not.
    """
    kept: set[Hashable] = set()
    for key, value in sorted(p.items(), key=lambda pair: pair[1]):
        if not value <= level / (len(p) - len(kept)):
            break
        kept.add(key)
    return kept


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
