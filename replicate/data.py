"""Tokens of a corpus as one memory-mapped file, and batches that depend on nothing but their number."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from replicate import paths, synthetic, tokenizer
from replicate.corpora import SPLITS, Corpus, CorpusUnavailable, Document, load_corpus
from replicate.files import replacing
from replicate.synthetic import entropy as synthetic_entropy

__all__ = ["Corpus", "CorpusUnavailable", "TokenData", "load_corpus", "synthetic_entropy"]

END = np.zeros(1, dtype="<u2")  # after each document: the token of a NUL byte, which text does not contain
HEADER = 4096  # bytes before the tokens in a cache file: JSON, padded with blanks
BLOCK = 1 << 20  # bytes of text encoded at a time
FORMAT = 1


class TokenData:
    """A corpus as tokens, with seeded batches.

    `train` and `valid` are read-only np.memmap uint16 arrays of one cache file, which is built the
    first time, checked by size and SHA-256 every time, and built again if it does not hold.
    """

    def __init__(
        self, spec: str | Corpus, vocab_size: int, seq_len: int, cache_dir: Path | None = None
    ) -> None:
        """Open or build the tokens of a corpus.

        Args:
            spec: a corpus or its spec, see `replicate.corpora`.
            vocab_size: 256 to 4096, see `tokenizer.load`; "synthetic" takes 5 to 65536.
            seq_len: length S of the sequences in a batch.
            cache_dir: folder of the cache; by default "corpus" under `paths.runs_dir()`.
        Raises:
            ValueError: a bad setting, or a split too short for one sequence.
            CorpusUnavailable: a download that cannot be had.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; choose 1 or more")
        self.vocab_size, self.seq_len = vocab_size, seq_len
        if spec == "synthetic":
            self.tokenizer, self.vocab_sha256 = None, hashlib.sha256(b"symbols").hexdigest()
            synthetic_entropy(vocab_size)
        else:
            self.tokenizer = tokenizer.load(vocab_size)
            self.vocab_sha256 = self.tokenizer.sha256
        folder = Path(cache_dir or paths.runs_dir() / "corpus")
        self.corpus = load_corpus(spec, cache_dir=folder) if isinstance(spec, str) else spec
        name = re.sub(r"[^\w.-]+", "-", self.corpus.name)[:40]  # the hash tells corpora apart
        self.train, self.valid = self._open(folder / f"{name}-{self.corpus.sha256[:16]}-{vocab_size}.bin")
        self._windows = {}
        self._copies: dict[tuple[str, torch.device], torch.Tensor] = {}
        for split in SPLITS:
            tokens = getattr(self, split).view(np.ndarray)
            if len(tokens) <= seq_len:
                raise ValueError(
                    f"the {split} part of {self.corpus.name!r} has {len(tokens)} tokens, too few for "
                    f"seq_len {seq_len}; choose seq_len below {len(tokens)} or a larger corpus"
                )
            self._windows[split] = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)

    def batch(
        self,
        split: str,
        step: int,
        batch_size: int,
        seed: int,
        micro: int = 0,
        *,
        device: torch.device | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Random sequences (inputs, targets), int64 [batch_size, S]; targets are one token ahead.

        The places come from a counter-based generator at (split, seed, step, micro): any step's batch
        without those before it, hence resuming needs no state. A smaller batch is a prefix of a larger.
        With a `device` they are gathered there, from a copy of the split's tokens that is made once (2
        bytes a token) and kept. Raises ValueError for an unknown split or a negative number.
        """
        windows = self._windows_of(split)
        if min(step, seed, micro) < 0 or batch_size < 1:
            raise ValueError(
                f"step {step}, seed {seed}, micro {micro}, batch_size {batch_size}: choose 0 or more, "
                "and a batch_size of 1 or more"
            )
        random = np.random.Philox(key=[seed, SPLITS.index(split)], counter=[0, micro, step, 0])
        share = (random.random_raw(batch_size) >> np.uint64(11)) * 2.0**-53
        starts = (share * len(windows)).astype(np.int64)
        return _pair(windows[starts]) if device is None else self._gather(split, starts, device)

    def valid_batches(self, n: int, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Up to `n` fixed batches of the held-out text, evenly spread over it and nowhere overlapping.

        Fewer if the text has no more; with less than one batch of text, one smaller batch.
        """
        if n < 1 or batch_size < 1:
            raise ValueError(f"n is {n} and batch_size {batch_size}; choose 1 or more")
        windows = self._windows["valid"][:: self.seq_len]
        rows = min(n, max(1, len(windows) // batch_size)) * batch_size
        rows = min(rows, len(windows))
        chosen = windows[np.arange(rows) * len(windows) // rows]
        return [_pair(chosen[i : i + batch_size]) for i in range(0, rows, batch_size)]

    def provenance(self) -> dict[str, Any]:
        """What a result must say about its text, in JSON types."""
        tokens = len(self.train) + len(self.valid)
        return {
            "corpus": self.corpus.name,
            "bytes": self.corpus.bytes,
            "sha256": self.corpus.sha256,
            "tokens": tokens,
            "train_tokens": len(self.train),
            "valid_tokens": len(self.valid),
            "bytes_per_token": self.corpus.bytes / tokens,
            "vocab_sha256": self.vocab_sha256,
            "skipped_files": len(self.corpus.skipped),
        }

    def _gather(
        self, split: str, starts: np.ndarray, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sequences that begin at `starts`, as `_pair` makes them, built on the device."""
        if (split, device) not in self._copies:
            tokens = np.array(getattr(self, split)).view(np.int16)  # torch can index no uint16
            self._copies[split, device] = torch.from_numpy(tokens).to(device)
        places = torch.from_numpy(starts)
        places = places.pin_memory() if device.type == "cuda" else places
        columns = torch.arange(self.seq_len + 1, device=device)
        places = places.to(device, non_blocking=True).unsqueeze(1) + columns
        rows = self._copies[split, device][places].long() & 0xFFFF
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _windows_of(self, split: str) -> np.ndarray:
        if split not in self._windows:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        return self._windows[split]

    def _open(self, file: Path) -> tuple[np.memmap, np.memmap]:
        """The two splits of the cache file, built first if it is missing or does not hold."""
        problem = self._problem(file)
        if problem:
            if file.exists():
                warnings.warn(f"the token cache {file} {problem}; building it again", stacklevel=3)
            self._build(file)
            problem = self._problem(file)
            if problem:
                raise OSError(f"the token cache {file} {problem} right after it was written; check the disk")
        count = _header(file)["tokens"]
        train = np.memmap(file, "<u2", "r", offset=HEADER, shape=(count["train"],))
        return train, np.memmap(file, "<u2", "r", HEADER + 2 * count["train"], shape=(count["valid"],))

    def _identity(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "corpus": self.corpus.sha256,
            "vocab": self.vocab_sha256,
            "vocab_size": self.vocab_size,
        }

    def _problem(self, file: Path) -> str:
        """Why the cache file cannot be used; "" if it can."""
        try:
            header = _header(file)
            if any(header[key] != value for key, value in self._identity().items()):
                return "is of another corpus or vocabulary"
            if file.stat().st_size != HEADER + 2 * sum(header["tokens"][split] for split in SPLITS):
                return "has the wrong length"
            with file.open("rb") as data:
                data.seek(HEADER)
                if hashlib.file_digest(data, "sha256").hexdigest() != header["sha256"]:
                    return "does not match its checksum"
        except FileNotFoundError:
            return "is missing"
        except (ValueError, KeyError, TypeError):
            return "has no readable header"
        return ""

    def _build(self, file: Path) -> None:
        digest, count = hashlib.sha256(), {}
        if self.corpus.bytes > 50_000_000:
            print(f"tokenising {self.corpus.name}: {self.corpus.bytes / 1e6:.0f} MB, once", file=sys.stderr)
        with replacing(file) as out:
            out.write(b" " * HEADER)
            for split in SPLITS:
                start = out.tell()
                for tokens in self._tokens(split):
                    data = tokens.astype("<u2", copy=False).tobytes()
                    digest.update(data)
                    out.write(data)
                count[split] = (out.tell() - start) // 2
            out.seek(0)
            out.write(
                json.dumps({**self._identity(), "tokens": count, "sha256": digest.hexdigest()}).encode()
            )

    def _tokens(self, split: str) -> Iterator[np.ndarray]:
        if self.tokenizer is None:
            yield synthetic.tokens(split, self.vocab_size)
            return
        # Threads suffice, since tiktoken releases the interpreter lock; map keeps the order.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from pool.map(self._encode, _blocks(self.corpus.files[split]))

    def _encode(self, block: list[tuple[Document, bool]]) -> np.ndarray:
        parts = []
        for document, ends in block:
            parts.append(self.tokenizer.encode(document.read()))
            if ends:
                parts.append(END)
        return np.concatenate(parts)


def _blocks(documents: Iterable[Document]) -> Iterator[list[tuple[Document, bool]]]:
    """Documents in groups of about BLOCK bytes; longer ones in pieces, of which the last one ends it."""
    block, size = [], 0
    for document in documents:
        while document.size > 2 * BLOCK:
            piece, document = document.cut(BLOCK)
            yield [*block, (piece, False)]
            block, size = [], 0
        block.append((document, True))
        size += document.size
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as data:
        return json.loads(data.read(HEADER))


def _pair(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [B, S + 1] as inputs and targets, each int64 and contiguous."""
    return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))
