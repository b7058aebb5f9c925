"""Corpora that come over the network: fetched once, checked, kept as plain text files.

Everything is written under a temporary name and renamed when complete, so an interrupted download
leaves nothing half done and two processes may fetch the same corpus at once.
"""

from __future__ import annotations

import hashlib
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from replicate.system.files import replacing

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394

# Arguments of `datasets.load_dataset`; both sets have their text in the column "text".
STREAMS: dict[str, dict[str, str]] = {
    "fineweb-edu": {"path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT"},
    "dclm": {"path": "mlfoundations/dclm-baseline-1.0-parquet"},
}
STREAM_BYTES = "100MB"
STREAM_HELD_OUT = 50  # one document in so many, by the hash of its text


class CorpusUnavailable(OSError):
    """A corpus cannot be had here: no network, a missing package, or a download that fails its check."""


def shakespeare(folder: Path) -> Path:
    """The file of tiny Shakespeare (1,115,394 bytes) in `folder`, downloaded there if it is not.

    Raises CorpusUnavailable off-line, or if the text that arrives is not the known one.
    """
    file = folder / "tinyshakespeare.txt"
    if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == SHAKESPEARE_SHA256:
        return file
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as reply:
            data = reply.read(SHAKESPEARE_BYTES + 1)
    except OSError as error:
        raise CorpusUnavailable(
            f"corpus 'shakespeare' could not be downloaded ({error}); with the text at hand, use "
            "corpus 'file:PATH', and 'stdlib' needs no download"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise CorpusUnavailable(
            f"{SHAKESPEARE_URL} gave {len(data)} bytes with sha256 {found}, expected {SHAKESPEARE_SHA256}; "
            "try again, or use corpus 'file:PATH'"
        )
    with replacing(file) as out:
        out.write(data)
    return file


def stream(name: str, budget: str, folder: Path) -> dict[str, Path]:
    """Text files {"train", "valid"} with the first `budget` training bytes of a streamed data set.

    Documents end with a NUL byte; the one that reaches the budget, like "2GB", is kept whole. One in 50 is
    held out, by the hash of its text, so equal documents fall on the same side. What was fetched is kept in
    `folder` and checked before it is used again.

    Raises CorpusUnavailable for a missing package, no network, or a stream too short to hold anything out.
    """
    wanted = parse_bytes(budget)
    files = {split: folder / f"{name}-{budget}.{split}.txt" for split in ("train", "valid")}
    manifest = folder / f"{name}-{budget}.json"
    if _manifest_holds(manifest, files):
        return files
    digests = {split: hashlib.sha256() for split in files}
    with replacing(files["train"]) as train, replacing(files["valid"]) as valid:
        for data in _documents(name):
            held_out = int(hashlib.sha256(data).hexdigest()[-8:], 16) % STREAM_HELD_OUT == 0
            (valid if held_out else train).write(data)
            digests["valid" if held_out else "train"].update(data)
            if train.tell() >= wanted and valid.tell():
                break
        if not (train.tell() and valid.tell()):
            raise CorpusUnavailable(f"the stream of {name!r} ended before it filled both parts of the corpus")
    checks = {files[split].name: digest.hexdigest() for split, digest in digests.items()}
    with replacing(manifest) as out:
        out.write(json.dumps({"source": STREAMS[name], "sha256": checks}, indent=1).encode())
    return files


def parse_bytes(text: str) -> int:
    """Bytes in "1000", "500kB", "200MB" or "1.5GB" (powers of ten). Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2].lower()] if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is no number of bytes; write it like '200MB' or '2GB'")
    return int(size)


def _manifest_holds(manifest: Path, files: dict[str, Path]) -> bool:
    try:
        checks = json.loads(manifest.read_bytes())["sha256"]
        for file in files.values():
            with file.open("rb") as data:
                if hashlib.file_digest(data, "sha256").hexdigest() != checks[file.name]:
                    return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _documents(name: str) -> Iterator[bytes]:
    offline = "off-line use corpus 'stdlib', 'pysrc' or 'file:PATH'"
    try:
        from datasets import load_dataset

        for row in load_dataset(**STREAMS[name], split="train", streaming=True):
            yield row["text"].replace("\0", "").encode("utf-8", "replace") + b"\0"
    except ImportError as error:
        raise CorpusUnavailable(
            f"corpus {name!r} needs the package 'datasets': pip install datasets; {offline}"
        ) from error
    except Exception as error:  # `datasets` lets any of its many libraries' network errors through
        raise CorpusUnavailable(
            f"corpus {name!r} could not be streamed ({type(error).__name__}: {error}); {offline}"
        ) from error
