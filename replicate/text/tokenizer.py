"""Byte-level BPE: the shipped rank file, its tiktoken encoder, and the trainer that made it.

`python -m replicate tokenizer train` makes the rank file again, byte for byte, from the same corpus.
A smaller vocabulary is a prefix of the ranks, since encoding always merges the lowest rank first.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import heapq
import re
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from replicate.system import paths
from replicate.system.console import check_file
from replicate.system.files import write_atomic
from replicate.text.corpora import load_corpus

RANK_FILE = paths.DATA / "bpe.tiktoken"
RANKS = 4096
RANKS_SHA256 = "33a0ad5b98c894513d812ce57b950ef66c277d25ba79fc28d62225a51dca3ed2"
# `load_corpus("stdlib").sha256` under CPython 3.11.7 on Linux, whose training part gave the ranks.
TRAINED_ON = "cade2dbdb1918c41328a574a07760bd726e1cb540861b764d243e4a72cf76128"

# Merges never cross the pieces this pattern cuts text into: a word with one character before it (" self",
# ".append", "_name"), up to three digits, punctuation with the space before it, line breaks with the
# indentation after them, other blanks. Non-ASCII counts as letters, and every class is spelt out, so that
# Python's `re` (trainer) and tiktoken's engine (encoder) cannot disagree about Unicode.
LETTER, BLANK = r"A-Za-z_\u0080-\U0010ffff", r" \t\r\n\f\v"
PATTERN = "|".join((
    rf"[^{LETTER}0-9\r\n]?[{LETTER}]+",
    r"[0-9]{1,3}",
    rf" ?[^{LETTER}0-9{BLANK}]+",
    rf"[{BLANK}]*\n[ \t]*",
    rf"[{BLANK}]+",
))  # fmt: skip
NOT_UTF8 = re.compile(r"([\udc80-\udcff]+)")  # where "surrogateescape" put bytes that are no UTF-8


class Tokenizer:
    """Byte-level BPE over a prefix of a rank file; `decode(encode(data)) == data` for any bytes."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        """Of token byte strings in rank order, the 256 single bytes first."""
        self.vocab_size = len(tokens)
        self.sha256 = hashlib.sha256(PATTERN.encode() + b"\n" + _rank_lines(tokens)).hexdigest()
        self._encoding = tiktoken.Encoding(
            f"replicate-{self.vocab_size}",
            pat_str=PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, data: bytes | str) -> np.ndarray:
        """The token ids of `data` as uint16 [tokens]; bytes that are no UTF-8 become one token each."""
        ids: list[int] = []
        for text, raw in _spans(data):
            ids += raw or self._encoding.encode_ordinary(text)
        return np.array(ids, dtype=np.uint16)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of token ids (list, array or tensor). Raises ValueError for an id out of range."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for i in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"token id {i} is outside the vocabulary; ids are 0 to {self.vocab_size - 1}"
                )
        return self._encoding.decode_bytes(ids)


def load(vocab_size: int) -> Tokenizer:
    """The tokenizer of the first `vocab_size` shipped ranks; ValueError for less than 256, or too many."""
    if vocab_size < 256:
        raise ValueError(f"vocab_size is {vocab_size}; bytes alone need 256, so choose 256 to {RANKS}")
    if vocab_size > RANKS:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the shipped vocabulary has {RANKS} ranks; larger sizes serve "
            f"only to count parameters and FLOPs: to train, set model.vocab_size to 256 to {RANKS}"
        )
    data = RANK_FILE.read_bytes().replace(b"\r\n", b"\n")
    if hashlib.sha256(data).hexdigest() != RANKS_SHA256:
        raise ValueError(f"{RANK_FILE} was altered; restore it (git checkout -- data/{RANK_FILE.name})")
    # Read here, because tiktoken's reader caches local files by name alone.
    return Tokenizer([base64.b64decode(line.split()[0]) for line in data.splitlines()[:vocab_size]])


def train(documents: Iterable[bytes], vocab_size: int) -> list[bytes]:
    """Learn byte-pair merges: tokens in rank order, the 256 bytes first.

    Each round adds the byte string that occurs most often as two neighbouring tokens inside a piece,
    ties to the smaller string, and re-encodes the distinct words that contain it exactly as the encoder
    will. So the result depends on the words' counts alone, not on their order, and a smaller
    `vocab_size` gives a prefix. Raises ValueError below 256, or if the documents have too few pairs to merge.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size is {vocab_size}; bytes alone need 256")
    words = _Words(count_words(documents))
    counts = words.counts
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    ranks = {bytes([i]): i for i in range(256)}
    while len(ranks) < vocab_size:
        if not heap:
            raise ValueError(
                f"the text has only {len(ranks)} ranks; choose vocab_size <= {len(ranks)} or more text"
            )
        count, token = heapq.heappop(heap)
        if token in ranks or counts[token] != -count:  # an entry that later merges outdated
            continue
        ranks[token] = len(ranks)
        for pair in words.merge(token, ranks):
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
    return list(ranks)


def count_words(documents: Iterable[bytes]) -> Counter[bytes]:
    """How often each piece of PATTERN occurs in the documents."""
    pattern = re.compile(PATTERN)
    words: Counter[str] = Counter()
    for document in documents:
        for text, _ in _spans(document):
            words.update(pattern.findall(text))
    return Counter({word.encode(): count for word, count in words.items()})


class _Words:
    """All words as one chain of tokens, so that a merge costs what it changes, however long the word."""

    def __init__(self, freq: Mapping[bytes, int]) -> None:
        self.tokens: list[bytes] = [b""]  # an empty one before, between and after the words
        self.freq = array("q", [0])  # of each token's word
        for word, count in freq.items():
            self.tokens += [word[i : i + 1] for i in range(len(word))] + [b""]
            self.freq.extend([count] * len(word) + [0])
        self.left = array("q", range(-1, len(self.tokens) - 1))
        self.right = array("q", range(1, len(self.tokens) + 1))
        self.counts: dict[bytes, int] = defaultdict(int)  # how often two neighbours would merge into a string
        self.places: dict[bytes, array] = defaultdict(lambda: array("q"))  # of the first of two, now or once
        for at in range(1, len(self.tokens) - 1):
            self._count(at, 1)

    def merge(self, token: bytes, ranks: Mapping[bytes, int]) -> set[bytes]:
        """Re-encode the words in which two neighbours make `token`; the strings whose count changed.

        In each the lowest-ranked neighbours merge first, leftmost first, until none has a rank: tiktoken's
        rule. The words do not touch, so one heap serves them all.
        """
        heap = [(ranks[token], at) for at in self.places.pop(token)]
        heapq.heapify(heap)
        touched: set[bytes] = set()
        while heap:
            rank, at = heapq.heappop(heap)
            if ranks.get(self._pair(at)) != rank:  # one of the two has merged already
                continue
            before, gone = self.left[at], self.right[at]
            around = (before, at, gone)
            touched.update(self._count(place, -1) for place in around)
            self.tokens[at] += self.tokens[gone]
            self.tokens[gone] = b""
            self.right[at] = self.right[gone]
            self.left[self.right[gone]] = at
            for place in (before, at):
                pair = self._count(place, 1)
                touched.add(pair)
                if pair in ranks:
                    heapq.heappush(heap, (ranks[pair], place))
        return touched

    def _pair(self, at: int) -> bytes:
        """What the token at a place and the next would merge into; b"" for none."""
        first, second = self.tokens[at], self.tokens[self.right[at]]
        return first + second if first and second else b""

    def _count(self, at: int, sign: int) -> bytes:
        """Add the pair at a place to the counts, or take it away; returns it."""
        pair = self._pair(at)
        if pair:
            self.counts[pair] += sign * self.freq[at]
            if sign > 0:
                self.places[pair].append(at)
        return pair


def _spans(data: bytes | str) -> Iterator[tuple[str, bytes]]:
    """Cut data into (text, b"") and (empty text, bytes that are no UTF-8), in order."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogateescape")
    text = data.decode("utf-8", "surrogateescape")
    for i, span in enumerate([text] if text.isascii() else NOT_UTF8.split(text)):
        yield ("", span.encode("utf-8", "surrogateescape")) if i % 2 else (span, b"")


def _rank_lines(tokens: Sequence[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m replicate tokenizer train`: learn the ranks again, and compare with those shipped."""
    parser = argparse.ArgumentParser(prog="replicate tokenizer", description=main.__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser("train")
    command.add_argument("--corpus", default="stdlib", help="see replicate.text.corpora (default: stdlib)")
    command.add_argument("--vocab-size", type=int, default=RANKS)
    command.add_argument("--out", type=Path, help=f"default: {RANK_FILE.name}, for its own corpus only")
    args = parser.parse_args(argv)
    if args.out:
        check_file("--out", args.out)
    start = time.perf_counter()
    corpus = load_corpus(args.corpus)
    if args.out is None and (corpus.sha256, args.vocab_size) != (TRAINED_ON, RANKS):
        raise ValueError(
            f"{RANK_FILE.name} has {RANKS} ranks of the corpus with sha256 {TRAINED_ON[:16]}..., this is "
            f"{corpus.sha256[:16]}...; name another file with --out"
        )
    tokens = train((document.read() for document in corpus.files["train"]), args.vocab_size)
    out, data = args.out or RANK_FILE, _rank_lines(tokens)
    write_atomic(out, data)
    sha256 = hashlib.sha256(data).hexdigest()
    print(f"{len(tokens)} ranks in {time.perf_counter() - start:.0f} s from {corpus.name} {corpus.sha256}")
    print(f"{out}: sha256 {sha256}{', as shipped' if sha256 == RANKS_SHA256 else ''}")
    return 0
