"""Run the notebooks with papermill, one line each, resuming where an earlier run stopped.

An executed copy and a state file go to runs/notebooks/<profile>/. A notebook counts as done while its
cells, the package, the data and the parameters are those it ran with, and its figures are still there.
"""

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from replicate.report.notebooks import KERNEL_ENV, Notebook, discover, select, source
from replicate.system import paths
from replicate.system.files import write_atomic

PROFILES = ("smoke", "laptop", "gpu")


@dataclass
class Outcome:
    """What came of one notebook: "done", "unchanged" since an earlier run, or "failed"."""

    name: str
    status: str
    seconds: float = 0.0
    copy: str = ""
    cell: int | None = None
    error: str = ""
    files: list[str] = field(default_factory=list)


def run(
    profile: str = "smoke",
    seed: int = 1,
    only: Iterable[str] | None = None,
    keep_going: bool = False,
    *,
    fresh: bool = False,
    folder: Path | None = None,
    out: TextIO | None = None,
) -> list[Outcome]:
    """Execute notebooks in order, a line each, and return what came of each.

    Args:
        profile: scale, one of PROFILES. only: numbers or names; None is all.
        keep_going: go on after a notebook that fails. fresh: run also what is done already.
        folder: where the notebooks are. out: where lines go; default stdout.
    Raises ValueError for an unknown profile or notebook and a bad seed, before anything runs.
    """
    check_profile(profile)
    check_seed(seed)
    books = select(discover(folder), only)
    given = {"profile": profile, "seed": seed}
    out, outcomes, known = out or sys.stdout, [], [_package_hash(), json.dumps(given)]
    keys = {book.name: _hash([*known, *map(source, book.content["cells"])]) for book in books}
    done = {} if fresh else {book.name: _done_before(book, profile, keys[book.name]) for book in books}
    for place, book in enumerate(books):
        outcome = done.get(book.name)
        left = [] if outcome else [other for other in books[place:] if not done.get(other.name)]
        out.write(f"[{place + 1}/{len(books)}] {book.name}{_remaining(left, profile)} ... ")
        out.flush()
        if outcome is None:
            _keep(book, profile, {**_state(book, profile), "key": None})  # not done, if interrupted
            outcome = _execute(book, given, _output(book, profile))
            _keep(book, profile, {"key": keys[book.name], **asdict(outcome)})
        outcomes.append(outcome)
        out.write(_line(outcome) + "\n")
        out.flush()
        if outcome.status == "failed" and not keep_going:
            break
    return outcomes


def check_profile(profile: str) -> None:
    """Raise ValueError if there is no such scale."""
    if profile not in PROFILES:
        raise ValueError(f"profile is {profile!r}; choose one of {', '.join(PROFILES)}")


def check_seed(seed: Any) -> None:
    """Raise ValueError unless it is a whole number that notebooks can count up from."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ValueError(f"seed is {seed!r}; choose a whole number from 0 to {2**31 - 1}, like seed = 1")


def _execute(book: Notebook, given: dict[str, Any], output: Path) -> Outcome:
    """One notebook through papermill; a failure is an outcome, not an exception."""
    import papermill

    outcome = Outcome(book.name, "done", copy=str(output))
    before, start = _figure_times(), time.monotonic()
    os.environ.update(KERNEL_ENV)
    try:
        how = {"kernel_name": "python3", "progress_bar": False, "cwd": str(book.path.parent)}
        papermill.execute_notebook(str(book.path), str(output), given, **how)
    except papermill.PapermillExecutionError as error:
        outcome.status, outcome.cell = "failed", error.exec_count
        outcome.error = f"{error.ename}: {error.evalue}"
    except OSError:
        raise  # a full disk is no fault of the notebook
    except Exception as error:  # the kernel died, or did not start
        outcome.status, outcome.error = "failed", f"{type(error).__name__}: {error}"
    outcome.seconds = round(time.monotonic() - start, 1)
    outcome.files = [name for name, at in _figure_times().items() if before.get(name) != at]
    return outcome


def _done_before(book: Notebook, profile: str, key: str) -> Outcome | None:
    """The outcome of an earlier run that still stands, or None."""
    state = _state(book, profile)
    if state.pop("key", None) != key or state["status"] != "done":
        return None
    outcome = Outcome(**{**state, "status": "unchanged"})
    there = [Path(outcome.copy), *(paths.figures_dir() / name for name in outcome.files)]
    return outcome if all(path.exists() for path in there) else None


def _state(book: Notebook, profile: str) -> dict[str, Any]:
    try:
        return dict(json.loads(_output(book, profile, ".json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _keep(book: Notebook, profile: str, state: dict[str, Any]) -> None:
    write_atomic(_output(book, profile, ".json"), json.dumps(state, indent=1).encode())


def _output(book: Notebook, profile: str, ending: str = ".ipynb") -> Path:
    folder = paths.runs_dir() / "notebooks" / profile
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (book.name + ending)


def _remaining(books: list[Notebook], profile: str) -> str:
    """How long notebooks may take, by their last run or by their own word, for the progress line."""
    minutes = [_state(book, profile).get("seconds", 0) / 60 or book.minutes(profile) for book in books]
    known = [one for one in minutes if one]
    whole = round(sum(known) / max(1, len(known)) * len(books))
    return f" (about {max(1, whole)} min to the end)" if known else ""


def _line(outcome: Outcome) -> str:
    if outcome.status == "failed":
        where = "" if outcome.cell is None else f", cell In [{outcome.cell}]"
        return f"FAILED\n{outcome.name}{where}: {outcome.error}\nexecuted copy: {outcome.copy}"
    took = "done before" if outcome.status == "unchanged" else f"{outcome.seconds:.0f} s"
    return f"{took}, {len(outcome.files)} files"


def _figure_times() -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(paths.figures_dir().iterdir())}


def _package_hash() -> str:
    """Hash of everything but the notebook that its results depend on."""
    package = paths.ROOT / "replicate"
    files = [*package.rglob("*.py"), *paths.DATA.rglob("*.json*"), *paths.DATA.glob("*.tiktoken")]
    parts = [str(path.relative_to(paths.ROOT)) + _hash([path.read_bytes()]) for path in sorted(files)]
    return _hash([*parts, platform.python_version(), metadata.version("torch")])


def _hash(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()
