"""What the paper prints: its tables, numbers and models, all from `data/paper.json`."""

import difflib
import json
from functools import lru_cache
from typing import Any

from replicate.config import ModelConfig
from replicate.system import paths


@lru_cache(maxsize=1)
def data() -> dict[str, Any]:
    """Everything in `data/paper.json`."""
    return json.loads((paths.DATA / "paper.json").read_text(encoding="utf-8"))


def rows(table: int) -> list[dict[str, Any]]:
    """The rows of one of the paper's tables (1 to 5) as dictionaries."""
    tables = data()["tables"]
    if str(table) not in tables:
        raise ValueError(f"the paper has no table {table}; choose one of {', '.join(tables)}")
    found = tables[str(table)]
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def number(name: str) -> Any:
    """A number the paper prints outside its tables, by its name in `data/paper.json`."""
    return named(data()["numbers"], name, "number")


def model(name: str) -> ModelConfig:
    """The shapes of a model the paper speaks of: "1B", "7B", "70B" or "405B", at sequence 8192."""
    return ModelConfig(**named(data()["models"], name, "model"))


def named(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        near = difflib.get_close_matches(name, table, 3)
        known = f"near: {', '.join(near)}" if near else f"known: {', '.join(table)}"
        raise ValueError(f"unknown {what} {name!r}; {known}")
    return table[name]
