"""Exercises that answer back: `exercises.check("05.2", answer)` says right, or names the mistake.

An exercise is a function of the answer, in the module of its chapter (chapter_05.py). It raises Wrong with a
hint, or returns what there is to add to a right answer. The modules hold the answers: read them last.
"""

import importlib.util
import inspect
import linecache
import re
from collections.abc import Callable
from typing import Any

from exercises.compare import NotAnswered, Wrong

__all__ = ["NotAnswered", "Wrong", "check", "exercise", "named"]
_CHECKS: dict[str, Callable[[Any], str | None]] = {}


def exercise(name: str) -> Callable[[Callable[[Any], str | None]], Callable[[Any], str | None]]:
    """Decorator: the check of exercise `name`, like "05.2". Raises ValueError if there is one already."""

    def keep(function: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        if name in _CHECKS:
            raise ValueError(f"exercise {name} has two checks")
        _CHECKS[name] = function
        return function

    return keep


def named(chapter: str) -> list[str]:
    """The exercises of a chapter ("05") that have a check, in order; none if there is no such chapter."""
    module = f"exercises.chapter_{chapter}"
    if importlib.util.find_spec(module) is None:
        return []
    importlib.import_module(module)
    return sorted(name for name in _CHECKS if name.startswith(f"{chapter}."))


def check(name: str, answer: Any = ...) -> None:
    """Print what an answer is worth: right, not answered yet, or not yet and why.

    Args:
        name: of the exercise, like "05.2".
        answer: what the exercise asks for, a value, several or a function; `...` or None counts as no answer.

    Raises ValueError for an exercise that does not exist. A mistake in the answer raises nothing, so that
    the cells below run.
    """
    chapter = re.match(r"\d\d(?=\.\d+$)", str(name))
    known = named(chapter[0]) if chapter else []
    if name not in known:
        raise ValueError(f"no exercise {name!r}; there are {', '.join(known) or 'such as 05.2'}")
    print(f"{name}: {_verdict(name, answer)}")


def _verdict(name: str, answer: Any) -> str:
    parts = answer if isinstance(answer, (tuple, list)) else [answer]
    if any(part is None or part is ... for part in parts):
        return "not answered yet."
    try:
        comment = _CHECKS[name](answer)
    except NotAnswered:
        return "not answered yet."
    except Wrong as wrong:
        return f"not yet. {wrong}"
    except Exception as error:
        what = "Your function" if inspect.isroutine(answer) else "The check of your answer"
        return f"not yet. {what} raised {type(error).__name__}: {error}{_place(error)}"
    return f"right. {comment or ''}".rstrip()


def _place(error: Exception) -> str:
    """The student's line that an error comes from, if it is known, and what helps with a known error."""
    text, step = "", error.__traceback__
    while step:
        if step.tb_frame.f_globals.get("__name__") == "__main__":
            line = linecache.getline(step.tb_frame.f_code.co_filename, step.tb_lineno).strip()
            text = f"\nIt happened in this line of yours: {line}" if line else ""
        step = step.tb_next
    if isinstance(error, TypeError) and str(error).startswith("argsort()"):
        text += "\ntorch wants dim by name: argsort(dim=1, descending=True, stable=True)."
    return text
