"""A random source whose entropy is known exactly: the loss no model can go below.

A Markov chain over the symbols 0 to V - 1. In a hidden order of the symbols (a random permutation p)
each step advances by one of five fixed random strides d_k with probability q_k:

    x_(t+1) = p[(p^-1[x_t] + d_k) mod V],    q = 1/2, 1/4, 1/8, 1/16, 1/16

Given x_t the five successors are distinct, so a symbol carries H(q) = 15/8 bits = 1.2997 nats whatever V,
and a model that has learnt the table of successors reaches that loss and no less.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

LENGTH = {"train": 2_000_000, "valid": 100_000}  # symbols
SHARES = (8, 4, 2, 1, 1)  # the q_k in sixteenths
SEED = 2402
MOST_SYMBOLS = 65536  # that a 16-bit token can name
VOCAB_SHA256 = hashlib.sha256(b"symbols").hexdigest()  # in the place of a tokenizer's


def entropy(vocab_size: int) -> float:
    """Entropy rate in nats a symbol, -sum q_k ln q_k. Raises ValueError for V below 5 or above 65536."""
    _check(vocab_size)
    return -sum(share / 16 * math.log(share / 16) for share in SHARES)


def tokens(split: str, vocab_size: int) -> np.ndarray:
    """The source's symbols as uint16 [LENGTH[split]]; the splits are separate runs of one chain."""
    _check(vocab_size)
    order = np.argsort(_random("order", vocab_size, vocab_size), kind="stable")
    strides = np.argsort(_random("strides", vocab_size, vocab_size), kind="stable")[: len(SHARES)]
    which = np.repeat(np.arange(len(SHARES)), SHARES)  # sixteen equally likely entries
    draws = _random(split, vocab_size, LENGTH[split])
    place = np.cumsum(strides[which[(draws >> np.uint64(60)).astype(np.int64)]]) % vocab_size
    return order[place].astype(np.uint16)


def sha256() -> str:
    """Pins the definition of the source, as a corpus's hash pins its files."""
    return hashlib.sha256(repr((LENGTH, SHARES, SEED)).encode()).hexdigest()


def _random(purpose: str, vocab_size: int, size: int) -> np.ndarray:
    """Raw 64-bit draws [size], the same in every NumPy version, one stream for each purpose."""
    stream = {"order": 0, "strides": 1, "train": 2, "valid": 3}[purpose]
    return np.random.Philox(key=[SEED, stream], counter=[0, vocab_size, 0, 0]).random_raw(size)


def _check(vocab_size: int) -> None:
    if not len(SHARES) <= vocab_size <= MOST_SYMBOLS:
        raise ValueError(
            f"vocab_size is {vocab_size}; the synthetic source has {len(SHARES)} to {MOST_SYMBOLS} symbols"
        )
