"""The synthetic source: its entropy by hand, and by counting."""

import math
from collections import Counter

import numpy as np
import pytest

from replicate.text import synthetic


def test_entropy_is_fifteen_eighths_of_a_bit():
    assert math.isclose(synthetic.entropy(64), 15 / 8 * math.log(2))


@pytest.mark.parametrize("vocab_size", [5, 64, 300])
def test_successors_and_their_shares(vocab_size):
    x = synthetic.tokens("valid", vocab_size)
    assert x.dtype == np.uint16 and len(x) == 100_000 and x.max() < vocab_size
    pairs = Counter(zip(x[:-1].tolist(), x[1:].tolist(), strict=True))
    # within the chance of a sample: conditional entropy from counts against the exact one
    singles = Counter(x[:-1].tolist())
    measured = -sum(n / (len(x) - 1) * math.log(n / singles[a]) for (a, _), n in pairs.items())
    assert abs(measured - synthetic.entropy(vocab_size)) < 0.02
    assert max(Counter(a for a, _ in pairs).values()) <= 5
    # every symbol is about equally frequent, so symbol counts alone tell nothing
    assert max(singles.values()) < 1.5 * len(x) / vocab_size


def test_splits_are_runs_of_one_chain():
    train, valid = (synthetic.tokens(split, 16) for split in ("train", "valid"))
    steps = [set(zip(x[:-1].tolist(), x[1:].tolist(), strict=True)) for x in (train[:50_000], valid[:50_000])]
    assert steps[0] == steps[1]
    assert not np.array_equal(train[:1000], valid[:1000])


def test_fixed_for_ever():
    assert synthetic.tokens("train", 16)[:8].tolist() == synthetic.tokens("train", 16)[:8].tolist()
    assert synthetic.tokens("train", 256)[:6].tolist() == GOLDEN


@pytest.mark.parametrize("vocab_size", [4, 65537])
def test_impossible_sizes(vocab_size):
    with pytest.raises(ValueError, match="5 to 65536 symbols"):
        synthetic.tokens("train", vocab_size)


GOLDEN = [252, 210, 242, 195, 227, 80]
