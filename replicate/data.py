"""Batches of a corpus's tokens that depend on nothing but their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from replicate.system import paths
from replicate.text import synthetic, token_cache, tokenizer
from replicate.text.corpora import SPLITS, Corpus, CorpusUnavailable, load_corpus
from replicate.text.synthetic import entropy as synthetic_entropy

__all__ = ["Corpus", "CorpusUnavailable", "TokenData", "load_corpus", "synthetic_entropy"]

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets


class TokenData:
    """A corpus as tokens, with seeded batches.

    `train` and `valid` are read-only np.memmap uint16 arrays of one cache file, see `text.token_cache`.
    """

    def __init__(
        self, spec: str | Corpus, vocab_size: int, seq_len: int, cache_dir: Path | None = None
    ) -> None:
        """Open the tokens of a corpus, made first if need be.

        Args:
            spec: a corpus or its spec, see `replicate.text.corpora`.
            vocab_size: 256 to 4096, see `tokenizer.load`; "synthetic" takes 5 to 65536.
            seq_len: length S of the sequences in a batch.
            cache_dir: folder of the cache; by default "corpus" under `paths.runs_dir()`.
        Raises:
            ValueError: a bad setting, or a split too short for one sequence.
            CorpusUnavailable: a download that cannot be had.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; choose 1 or more")
        self.seq_len = seq_len
        self.tokenizer = None if spec == "synthetic" else tokenizer.load(vocab_size)
        folder = Path(cache_dir or paths.runs_dir() / "corpus")
        self.corpus = load_corpus(spec, cache_dir=folder) if isinstance(spec, str) else spec
        self._tokens = token_cache.open_tokens(self.corpus, vocab_size, self.tokenizer, folder)
        self.train, self.valid = (self._tokens[split] for split in SPLITS)
        self._copies: dict[tuple[str, torch.device], torch.Tensor] = {}
        for split, tokens in self._tokens.items():
            if len(tokens) <= seq_len:
                raise ValueError(
                    f"the {split} part of {self.corpus.name!r} has {len(tokens)} tokens, too few for "
                    f"seq_len {seq_len}; choose seq_len below {len(tokens)} or a larger corpus"
                )

    def batch(
        self,
        split: str,
        step: int,
        batch_size: int,
        seed: int,
        micro: int = 0,
        device: torch.device | None = None,
    ) -> Batch:
        """Random sequences (inputs, targets), int64 [batch_size, S]; targets are one token ahead.

        The places come from a counter-based generator at (split, seed, step, micro), so resuming needs no
        state, and a smaller batch is a prefix of a larger. With a `device` they are gathered there, from
        a copy of the split's tokens (2 bytes each). Raises ValueError for a bad split or number.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        if min(step, seed, micro) < 0 or batch_size < 1:
            numbers = f"step {step}, seed {seed}, micro {micro}, batch_size {batch_size}"
            raise ValueError(f"{numbers}: choose 0 or more, and a batch_size of 1 or more")
        random = np.random.Philox(key=[seed, SPLITS.index(split)], counter=[0, micro, step, 0])
        share = (random.random_raw(batch_size) >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
        starts = share * (len(self._tokens[split]) - self.seq_len)
        return self._sequences(split, starts.astype(np.int64), device)

    def valid_batches(self, n: int, batch_size: int) -> list[Batch]:
        """Up to `n` fixed batches, evenly spread over the held-out text; fewer if they would overlap."""
        if n < 1 or batch_size < 1:
            raise ValueError(f"n is {n} and batch_size {batch_size}; choose 1 or more")
        starts = np.arange(0, len(self.valid) - self.seq_len, self.seq_len)
        rows = min(min(n, max(1, len(starts) // batch_size)) * batch_size, len(starts))
        starts = starts[np.arange(rows) * len(starts) // rows]
        return [self._sequences("valid", starts[i : i + batch_size]) for i in range(0, rows, batch_size)]

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
            "vocab_sha256": self.tokenizer.sha256 if self.tokenizer else synthetic.VOCAB_SHA256,
            "skipped_files": len(self.corpus.skipped),
            "files": sum(map(len, self.corpus.files.values())),
            "packages": list(self.corpus.packages),
        }

    def _sequences(self, split: str, starts: np.ndarray, device: torch.device | None = None) -> Batch:
        """The sequences that begin at `starts` [B], gathered in main memory or on the device."""
        if device is None:
            rows = self._tokens[split][starts[:, None] + np.arange(self.seq_len + 1)]
            rows = torch.from_numpy(rows.astype(np.int64))
        else:
            if (split, device) not in self._copies:
                tokens = np.array(self._tokens[split]).view(np.int16)  # torch can index no uint16
                self._copies[split, device] = torch.from_numpy(tokens).to(device)
            places = torch.from_numpy(starts)
            places = places.pin_memory() if device.type == "cuda" else places
            columns = torch.arange(self.seq_len + 1, device=device)
            places = places.to(device, non_blocking=True).unsqueeze(1) + columns
            rows = self._copies[split, device][places].long() & 0xFFFF
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
