"""Comparing an answer with the right one, and with the wrong ones that are often given."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Hints = Iterable[tuple[Any, str]]


class Wrong(Exception):
    """The answer is wrong; the message says why, and what to try."""


class NotAnswered(Exception):
    """The answer still has the placeholder in it."""


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the student's function gives. Tensors are passed as copies, so that it cannot change ours.

    Raises Wrong if it is no function, NotAnswered if it returns None or `...`.
    """
    if not callable(function):
        raise Wrong(f"The answer is a function; this is {_kind(function)}.")
    copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    result = function(*copies, **options)
    if result is None or result is ...:
        raise NotAnswered
    return result


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers, the same on every processor (those of torch.randn are not)."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@contextmanager
def given(example: str) -> Iterator[None]:
    """Put the example that a hint is about before the hint: "For w = [3, 1]: ...".

    The example is what to try by hand, so it is small, or says how it was made.
    """
    try:
        yield
    except Wrong as wrong:
        raise Wrong(f"For {example}: {wrong}") from None


def number(answer: Any, right: float, hints: Hints = (), tolerance: float = 1e-3) -> None:
    """The answer is this number, to a relative `tolerance` (absolute if `right` is 0). Raises Wrong.

    Args:
        hints: (wrong number, what to say about it), tried in order.
    """
    value = _as_float(answer)
    if math.isnan(value):
        raise Wrong("The answer is not a number (NaN).")
    if _near(value, right, tolerance):
        return
    for wrong, hint in hints:
        if _near(value, wrong, tolerance):
            raise Wrong(hint)
    if right and _near(value, 100 * right, tolerance):
        raise Wrong(f"{value:g} is in percent; give the share, {value / 100:g}.")
    if right and _near(value, -right, tolerance):
        raise Wrong("The size is right, the sign is not.")
    side = "too large" if value > right else "too small"
    if _near(value, right, 0.02):
        raise Wrong(f"{value:g} is close, but {side}. Is it rounded, or is a small part missing?")
    raise Wrong(f"{value:g} is {side}.")


def tensor(
    answer: Any, right: Tensor, hints: Hints = (), tolerance: float = 1e-5, otherwise: str = ""
) -> None:
    """The answer is this tensor: shape, then values. Raises Wrong.

    Args:
        hints: (wrong tensor, what to say about it), tried in order.
        otherwise: what to say about other wrong values; if empty, the first wrong one is shown beside the
            right one, which gives away a short answer.
    """
    value = _as_tensor(answer)
    if value.shape == right.shape and _close(value, right, tolerance):
        return
    for wrong, hint in hints:
        if value.shape == wrong.shape and _close(value, wrong, tolerance):
            raise Wrong(hint)
    if value.shape != right.shape:
        raise Wrong(f"Its shape is {tuple(value.shape)}; it should be {tuple(right.shape)}.")
    if value.is_floating_point() and not value.isfinite().all():
        raise Wrong("It holds values that are not finite (inf or nan).")
    if otherwise:
        raise Wrong(otherwise)
    place = tuple((~_equal(value, right, tolerance)).nonzero()[0].tolist())
    got, wanted = value[place].item(), right[place].item()
    raise Wrong(f"At index {list(place)} it is {got:.6g}; it should be {wanted:.6g}.")


def one_of(answer: Any, choices: Sequence[str], right: str, hints: dict[str, str]) -> None:
    """The answer is one word of `choices`. Raises Wrong with the hint that belongs to a wrong word."""
    word = str(answer).strip().lower()
    if word not in choices:
        raise Wrong(f"Answer with one of {', '.join(choices)}; this is {answer!r}.")
    if word != right:
        raise Wrong(hints[word])


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _as_float(answer: Any) -> float:
    try:
        return float(answer)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"The answer is a number; this is {_kind(answer)}.") from None


def _as_tensor(answer: Any) -> Tensor:
    try:
        return answer.detach() if isinstance(answer, Tensor) else torch.as_tensor(answer)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"The answer is a tensor; this is {_kind(answer)}.") from None


def _near(value: float, other: float, tolerance: float) -> bool:
    return abs(value - other) <= tolerance * (abs(other) or 1)


def _equal(value: Tensor, other: Tensor, tolerance: float) -> Tensor:
    return torch.isclose(value.double(), other.double(), rtol=tolerance, atol=tolerance)


def _close(value: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool(_equal(value, other, tolerance).all())
