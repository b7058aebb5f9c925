"""A corpus as tokens in one memory-mapped file: made the first time, checked every time.

The file is a header of 4096 bytes, JSON that says what it holds, then the 16-bit tokens of the training
and of the validation text. Each document ends with the token of a NUL byte, which text does not contain.
"""

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

from replicate.system.files import replacing
from replicate.text import synthetic
from replicate.text.corpora import SPLITS, Corpus, Document
from replicate.text.tokenizer import Tokenizer

HEADER_BYTES = 4096
FORMAT = 1
BLOCK_BYTES = 1 << 20  # of text encoded at a time
END = np.zeros(1, dtype=np.uint16)


def open_tokens(
    corpus: Corpus, vocab_size: int, tokenizer: Tokenizer | None, folder: Path
) -> dict[str, np.memmap]:
    """Read-only uint16 tokens of each split; `tokenizer` is None for the synthetic source.

    A file that is damaged is made again, with a warning.
    """
    name = re.sub(r"[^\w.-]+", "-", corpus.name)[:40]  # the hash tells corpora apart
    file = folder / f"{name}-{corpus.sha256[:16]}-{vocab_size}.bin"
    vocab = tokenizer.sha256 if tokenizer else synthetic.VOCAB_SHA256
    identity = {"format": FORMAT, "corpus": corpus.sha256, "vocab": vocab, "vocab_size": vocab_size}
    if problem := _problem(file, identity):
        if file.exists():
            warnings.warn(f"the token cache {file} {problem}; building it again", stacklevel=3)
        _build(file, identity, {split: _tokens(corpus, split, vocab_size, tokenizer) for split in SPLITS})
        if problem := _problem(file, identity):
            raise OSError(f"the token cache {file} {problem} right after it was written; check the disk")
    count = _header(file)["tokens"]
    offsets = {"train": HEADER_BYTES, "valid": HEADER_BYTES + 2 * count["train"]}
    return {split: np.memmap(file, "<u2", "r", offsets[split], (count[split],)) for split in SPLITS}


def _problem(file: Path, identity: dict[str, Any]) -> str:
    """Why the file cannot be used; "" if it can."""
    try:
        header = _header(file)
        if any(header[key] != value for key, value in identity.items()):
            return "is of another corpus or vocabulary"
        if file.stat().st_size != HEADER_BYTES + 2 * sum(header["tokens"][split] for split in SPLITS):
            return "has the wrong length"
        with file.open("rb") as data:
            data.seek(HEADER_BYTES)
            if hashlib.file_digest(data, "sha256").hexdigest() != header["sha256"]:
                return "does not match its checksum"
    except FileNotFoundError:
        return "is missing"
    except (ValueError, KeyError, TypeError):
        return "has no readable header"
    return ""


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as data:
        return json.loads(data.read(HEADER_BYTES))


def _build(file: Path, identity: dict[str, Any], tokens: dict[str, Iterable[np.ndarray]]) -> None:
    """Write the file in one step; one that another process holds open, which Windows protects, stays."""
    digest, count = hashlib.sha256(), dict.fromkeys(SPLITS, 0)
    try:
        with replacing(file) as out:
            out.write(b" " * HEADER_BYTES)
            for split in SPLITS:
                for part in tokens[split]:
                    data = part.astype("<u2", copy=False).tobytes()
                    digest.update(data)
                    out.write(data)
                    count[split] += len(part)
            out.seek(0)
            out.write(json.dumps({**identity, "tokens": count, "sha256": digest.hexdigest()}).encode())
    except PermissionError:
        if not file.exists():
            raise


def _tokens(corpus: Corpus, split: str, vocab_size: int, tokenizer: Tokenizer | None) -> Iterator[np.ndarray]:
    """The split's tokens in parts, in order."""
    if tokenizer is None:
        yield synthetic.tokens(split, vocab_size)
        return

    def encode(block: list[tuple[Document, bool]]) -> np.ndarray:
        parts = []
        for document, ends in block:
            parts += [tokenizer.encode(document.read())] + ([END] if ends else [])
        return np.concatenate(parts)

    size = sum(document.size for document in corpus.files[split])
    if size > 50_000_000:
        print(f"tokenising {corpus.name}, {split}: {size / 1e6:.0f} MB, once", file=sys.stderr)
    # Threads suffice, since tiktoken releases the interpreter lock; map keeps the order.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(encode, _blocks(corpus.files[split]))


def _blocks(documents: Iterable[Document]) -> Iterator[list[tuple[Document, bool]]]:
    """Documents in groups of about BLOCK_BYTES; of a longer one's pieces only the last is marked its end."""
    block, size = [], 0
    for document in documents:
        while document.size > 2 * BLOCK_BYTES:
            piece, document = document.cut(BLOCK_BYTES)
            yield [*block, (piece, False)]
            block, size = [], 0
        block.append((document, True))
        size += document.size
        if size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block
