"""Where things are: one place for every folder the project reads or writes.

The working directory plays no role, so notebooks, tests and the command line agree.
`REPLICATE_RUNS` and `REPLICATE_FIGURES` redirect what is written; nothing else moves.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = ROOT / "data"
RECORDED = DATA / "recorded"
NOTEBOOKS = ROOT / "notebooks"
DEFAULTS = {"REPLICATE_RUNS": ROOT / "runs", "REPLICATE_FIGURES": ROOT / "figures"}


def runs_dir() -> Path:
    """Folder of caches, checkpoints, executed notebooks and fresh records (made if missing)."""
    return _made("REPLICATE_RUNS")


def figures_dir() -> Path:
    """Folder of figures and tables (made if missing)."""
    return _made("REPLICATE_FIGURES")


def elsewhere(path: Path) -> str:
    """How to have what goes to `path` written to another place; "" if no variable moves it."""
    path = path.resolve()
    for variable in DEFAULTS:
        if path.is_relative_to(_folder(variable).resolve()):
            return f"the variable {variable} can name another folder"
    return ""


def _folder(variable: str) -> Path:
    return Path(os.environ.get(variable) or DEFAULTS[variable])


def _made(variable: str) -> Path:
    folder = _folder(variable)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno, f"{folder} cannot be made ({error.strerror}); {elsewhere(folder)}"
        ) from error
    return folder.resolve()
