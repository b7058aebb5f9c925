"""How much of the held-out text stands verbatim in the training text, near-duplicate files included.

Whole files are held out, and equal files count once; two versions of one file are not equal.
"""

from __future__ import annotations

import numpy as np

WINDOW = 64  # tokens
CHUNK = 1 << 20  # of the training text hashed at a time
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def overlap(train: np.ndarray, valid: np.ndarray, window: int = WINDOW) -> float:
    """Share of the windows of `window` tokens of `valid`, at every place, that also stand in `train`.

    Args:
        train, valid: token ids, [N] each. Windows are compared by a 64-bit hash of all their tokens.

    Raises ValueError if there is no window in `valid`, or for a window of no token.
    """
    if window < 1 or len(valid) < window:
        raise ValueError(f"window is {window} tokens of {len(valid)}; choose 1 to {len(valid)}")
    known, places = np.unique(_hashes(valid, window), return_inverse=True)
    found = np.zeros(len(known), bool)
    for start in range(0, len(train) - window + 1, CHUNK):
        there = _hashes(train[start : start + CHUNK + window - 1], window)
        at = np.minimum(np.searchsorted(known, there), len(known) - 1)
        found[at[known[at] == there]] = True
    return float(found[places].mean())


def _hashes(tokens: np.ndarray, window: int) -> np.ndarray:
    """uint64 [N - window + 1]: the polynomial of each window's tokens at _FACTOR, modulo 2^64."""
    tokens = np.asarray(tokens).astype(np.uint64) + np.uint64(1)
    out = np.zeros(len(tokens) - window + 1, np.uint64)
    for i in range(window):
        out *= _FACTOR
        out += tokens[i : i + len(out)]
    return out
