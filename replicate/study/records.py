"""One small store of results: plain JSON files, looked up by what was asked, with where they came from.

A record says what was run (kind and configuration), by which code, where, when, how long, on which
corpus, and what came out. `data/recorded/<kind>/<hash>.json` holds results shipped with the project,
measured on a GPU; `runs/records/<kind>/<hash>.json` holds this computer's own. A run of kind "train" that was
trained once more has the same hash and another kind, "rerun-1".
"""

import dataclasses
import gzip
import hashlib
import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replicate.settings import text as config_text
from replicate.system import paths, provenance
from replicate.system.files import write_atomic

CARD = "NVIDIA H200"  # whose timings the tables show: layers, kernels and whole steps come from one card
COMPRESS_ABOVE = 50_000  # characters of JSON
SUFFIXES = (".json", ".json.gz")


class RecordDamaged(ValueError):
    """A record file is not what was written."""


@dataclass(frozen=True)
class Record:
    """One result with its provenance; every field is of JSON types."""

    kind: str
    config: dict[str, Any]
    config_hash: str
    seed: int | None = None
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    date: str = ""
    seconds: float = 0.0
    corpus: dict[str, Any] | None = None
    results: dict[str, Any] = field(default_factory=dict)


def make_record(
    kind: str,
    config: Any,
    results: dict[str, Any],
    *,
    seconds: float = 0.0,
    corpus: dict | None = None,
    device: str = "auto",
) -> Record:
    """A record of `results`, which took `seconds`, with the provenance of this process.

    Args:
        config: dataclass or dictionary. corpus: provenance of the training text.
        device: where it was made, see `provenance.device_name`.
    """
    data = config_text.to_dict(config) if dataclasses.is_dataclass(config) else dict(config)
    return Record(
        kind=kind,
        config=data,
        config_hash=config_text.config_hash(config),
        seed=data.get("seed"),
        seconds=round(seconds, 3),
        corpus=corpus,
        results=results,
        **provenance.provenance(device),
    )


class RecordStore:
    """Records by kind and configuration: this computer's in `root`, the shipped ones in `recorded`."""

    def __init__(self, root: Path | str | None = None, recorded: Path | str = paths.RECORDED) -> None:
        self.root = Path(root) if root is not None else paths.runs_dir() / "records"
        self.recorded = Path(recorded)

    def find(self, kind: str, config: Any, corpus_sha256: str | None = None) -> tuple[Record, str] | None:
        """The record of `kind` for `config` and its origin, "recorded" or "cached"; None if there is none.

        A cached record counts only if this version of the training code made it and, when
        `corpus_sha256` is given, from that corpus. A recorded one is evidence and always counts.
        Raises RecordDamaged if a shipped record was altered; a damaged cached one is as good as none.
        """
        key = config_text.config_hash(config)
        for origin in ("recorded", "cached"):
            files = (self._folder(kind, origin) / f"{key}{suffix}" for suffix in SUFFIXES)
            path = next(filter(Path.exists, files), None)
            record = path and self._load(path, origin)
            if record and (origin == "recorded" or _is_current(record, corpus_sha256)):
                return record, origin
        return None

    def put(self, record: Record, *, recorded: bool = False) -> Path:
        """Write a record in one step, among the shipped ones if `recorded`; its path.

        Raises ValueError, with the place, for a value that JSON cannot hold (NaN, infinity).
        """
        body = _plain(dataclasses.asdict(record), "record")
        text = json.dumps({**body, "sha256": _checksum(body)}, indent=1, allow_nan=False) + "\n"
        folder = self._folder(record.kind, "recorded" if recorded else "cached")
        small, compressed = (folder / f"{record.config_hash}{suffix}" for suffix in SUFFIXES)
        large = len(text) > COMPRESS_ABOVE
        path, other = (compressed, small) if large else (small, compressed)
        write_atomic(path, gzip.compress(text.encode(), mtime=0) if large else text.encode())
        other.unlink(missing_ok=True)
        return path

    def all(self, kind: str) -> list[tuple[Record, str]]:
        """Every readable record of a kind with its origin, recorded ones first, by file name."""
        found = []
        for origin in ("recorded", "cached"):
            for path in sorted(self._folder(kind, origin).glob("*.json*")):
                if path.name.endswith(SUFFIXES) and (record := self._load(path, origin)):
                    found.append((record, origin))
        return found

    def latest(
        self, kind: str, *, timed: Sequence[str] = (), device: str | None = None, **config: Any
    ) -> Record:
        """The latest shipped record of a kind that fits.

        Args:
            timed: sparsity presets that it must have timed. config: values that its configuration must have,
                None for a setting that it must not have.
            device: name of the GPU that it must come from, such as "NVIDIA H200"; by default any.

        Raises ValueError if none fits.
        """
        found = self.widest_last(kind, device=device, **config)
        fits = [record for record in found if set(timed) <= set(record.config.get("sparsity", timed))]
        if not fits:
            asked = {"device": device, **config}.items()
            what = ", ".join([*timed, *(f"{name} {value}" for name, value in asked if value is not None)])
            raise ValueError(f"no record of kind {kind!r}{f' with {what}' if what else ''} is shipped")
        return max(fits, key=lambda record: record.date)

    def widest_last(self, kind: str, *, device: str | None = None, **config: Any) -> list[Record]:
        """The shipped records of a kind whose configuration has these values, that with most arms last.

        For putting several benchmarks together: where two have timed an arm, the last one's word counts.
        Name a `device` for that: ratios of two GPUs do not belong in one table.
        """
        fits = [
            record
            for record, origin in self.all(kind)
            if origin == "recorded" and device in (None, record.device)
            if all(record.config.get(name) == value for name, value in config.items())
        ]
        return sorted(fits, key=lambda r: (len(r.config.get("sparsity", ())), r.date))

    def _folder(self, kind: str, origin: str) -> Path:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", kind):
            raise ValueError(f"record kind {kind!r}: use lower-case letters, digits, - and _, like 'train'")
        return (self.recorded if origin == "recorded" else self.root) / kind

    def _load(self, path: Path, origin: str) -> Record | None:
        try:
            return read_record(path)
        except RecordDamaged as error:
            if origin == "recorded":
                raise
            warnings.warn(f"{error}; measuring again", stacklevel=3)
            return None


def read_record(path: Path | str) -> Record:
    """The record in a file. Raises RecordDamaged if it cannot be read or differs from what was written."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        body = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        stated = body.pop("sha256")
        record = Record(**body)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordDamaged(f"{path} is no readable record ({error})") from None
    if stated != _checksum(body):
        raise RecordDamaged(f"{path} was altered after it was written; restore it or delete it")
    if path.name.split(".")[0] != record.config_hash:
        raise RecordDamaged(f"{path} holds the record {record.config_hash}; rename or delete it")
    return record


def _is_current(record: Record, corpus_sha256: str | None) -> bool:
    same_text = corpus_sha256 is None or (record.corpus or {}).get("sha256") == corpus_sha256
    return same_text and record.versions.get("code") == provenance.code_fingerprint()


def _checksum(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any, where: str) -> Any:
    """`value` in JSON types; numpy and torch scalars become numbers, tuples lists."""
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), where)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; a record holds finite numbers, use None for 'no value'")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{where} is of type {type(value).__name__}; a record holds JSON types only")
