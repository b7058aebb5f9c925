"""Checks of settings: each error names the setting, its value, and a value that would work."""

from __future__ import annotations

import numbers
from dataclasses import fields
from typing import Any


def near(value: int, unit: int) -> int:
    """The multiple of a unit next to a value, at least one unit."""
    return max(unit, round(value / unit) * unit)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless a setting has one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")


def at_least(name: str, value: float, low: float) -> None:
    """Raise ValueError if a setting is below its lowest value."""
    if not value >= low:
        raise ValueError(f"{name} is {value}; choose {low} or more")


def alone(config: Any, what: str, **allowed: tuple) -> None:
    """Raise ValueError for the first setting that has none of the values which go with `what`."""
    for name, values in allowed.items():
        if (ours := getattr(config, name)) not in values:
            raise ValueError(f"{name} is {ours!r}; {what} needs {name}={' or '.join(map(repr, values))}")


def check_types(config: Any) -> None:
    """Refuse values of a wrong type; 1 becomes 1.0 where a float stands, so that equal configs hash alike."""
    numeric = {"int": numbers.Integral, "float": numbers.Real}
    for f in fields(config):
        value, owner = getattr(config, f.name), type(config).__name__
        if f.type in numeric and isinstance(value, numeric[f.type]) and not isinstance(value, bool):
            object.__setattr__(config, f.name, int(value) if f.type == "int" else float(value))
        elif type(value).__name__ != f.type:
            raise ValueError(f"{f.name} of {owner} is {value!r}; it must be of type {f.type}")
