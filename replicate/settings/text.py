"""Configurations as text: overrides from a command line, JSON types and back, and the hash of a run.

Unknown keys raise `ValueError` with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from replicate.config import ModelConfig, SparsityConfig, TrainConfig

# Settings of how a run is computed, not of what: they do not enter its hash.
NOT_HASHED = (
    *("device", "backend", "compile", "attention", "cuda_graph", "deterministic"),
    *("log_every", "checkpoint_every", "parallel"),
)
# Settings younger than some records: at the value that says what was done before, they do not enter the hash.
# `SparsityConfig.backward` is one too, see `config_hash`.
YOUNGER = {"fold": False, "residual": "float32"}
# Settings of `SparsityConfig` and `DiTConfig`, younger too, at the value that no configuration in text says.
SILENT = (("fp8", False), ("qk_norm", False))
# A setting that is gone, at the only value that records have.
GONE = {"outputs": "full"}


def with_changes(config: Any, changes: dict[str, Any]) -> Any:
    """A copy of a config with `changes`, keys dotted for nested fields: {"model.d_ff": 512}.

    A change may be a string, as on the command line; it is read as the type of the field. Changes
    that only fit together (d_ff and n_clusters) are applied together. Raises ValueError for unknown keys.
    """
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    names = [f.name for f in fields(config)]
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if head not in names:
            raise ValueError(_unknown(head, names, type(config).__name__))
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            flat[head] = _as_type(key, value, getattr(config, head))
    for head, inner in nested.items():
        part = flat.get(head, getattr(config, head))
        if not dataclasses.is_dataclass(part):
            raise ValueError(
                f"{head} of {type(config).__name__} has no parts, so {head}.{next(iter(inner))} is unknown"
            )
        flat[head] = with_changes(part, inner)
    return replace(config, **flat)


def refuse(changes: Iterable[str], instead: Mapping[str, str]) -> None:
    """Raise ValueError for a change of a setting, or of its parts, that `instead` names; it says why."""
    for key in changes:
        for own, way in instead.items():
            if f"{key}.".startswith(f"{own}."):
                raise ValueError(f"{key} cannot be changed here; {way}")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON types; `from_dict` inverts it.

    SILENT settings go unsaid, so that records, and hashes of all that a configuration is part of, stay.
    """
    return dataclasses.asdict(
        config, dict_factory=lambda pairs: {k: v for k, v in pairs if (k, v) not in SILENT}
    )


def from_dict(data: dict[str, Any]) -> TrainConfig:
    """A TrainConfig from `to_dict`'s form. Raises ValueError for unknown keys.

    Configurations from before `backward` was a setting mean "whole" where it matters.
    """
    data = dict(data)
    model = dict(data.pop("model", {}))
    formats = {k: v for k, v in model.pop("sparsity", {}).items() if k not in GONE}
    sparsity = _build(SparsityConfig, formats)
    if "backward" not in formats and sparsity.reading_matters:
        sparsity = replace(sparsity, backward="whole")
    return _build(TrainConfig, {**data, "model": _build(ModelConfig, {**model, "sparsity": sparsity})})


def config_hash(config: Any) -> str:
    """First 16 hex digits of SHA-256 over the canonical JSON, without the fields that say only how.

    Works for TrainConfig and for plain dictionaries of JSON types. What is YOUNGER counts once it is used,
    and `SparsityConfig.backward` where it matters and is not "whole".
    """
    data = to_dict(config) if dataclasses.is_dataclass(config) else dict(config)
    if isinstance(config, TrainConfig):
        unused = {k for k, default in YOUNGER.items() if data[k] == default}
        data = {k: v for k, v in data.items() if k not in {*NOT_HASHED, *unused}}
        sparsity = config.model.sparsity
        data["model"]["sparsity"] |= GONE
        if sparsity.backward == "whole" or not sparsity.reading_matters:
            del data["model"]["sparsity"]["backward"]
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def same_formats(a: SparsityConfig, b: SparsityConfig) -> bool:
    """True if two configurations compute the same: equal, but for `backward` where it does not matter."""
    return a == b if a.reading_matters else a == replace(b, backward=a.backward)


def _build(cls: type, data: dict[str, Any]) -> Any:
    names = [f.name for f in fields(cls)]
    for key in data:
        if key not in names:
            raise ValueError(_unknown(key, names, cls.__name__))
    return cls(**data)


def _as_type(key: str, value: Any, old: Any) -> Any:
    """Read a command-line string as the type of the value it replaces."""
    if not isinstance(value, str) or isinstance(old, str):
        return value
    try:
        if isinstance(old, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                value.lower()
            ]
        if isinstance(old, (int, float)):
            return type(old)(value)
    except (KeyError, ValueError):
        raise ValueError(f"{key}={value!r} is no {type(old).__name__}; its value now is {old!r}") from None
    raise ValueError(f"{key} cannot be set from text; set its parts, like {key}.name=value")


def _unknown(key: str, names: list[str], owner: str) -> str:
    near = difflib.get_close_matches(key, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
    return f"{owner} has no setting {key!r}{hint}"
