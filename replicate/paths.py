"""Where things are: one place for every folder the project reads or writes.

The working directory plays no role, so notebooks, tests and the command line agree.
`REPLICATE_RUNS` and `REPLICATE_FIGURES` redirect what is written; nothing else moves.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
RECORDED = DATA / "recorded"
NOTEBOOKS = ROOT / "notebooks"


def runs_dir() -> Path:
    """Folder of caches, checkpoints, executed notebooks and fresh records (made if missing)."""
    return _made(Path(os.environ.get("REPLICATE_RUNS") or ROOT / "runs"))


def figures_dir() -> Path:
    """Folder of figures and tables (made if missing)."""
    return _made(Path(os.environ.get("REPLICATE_FIGURES") or ROOT / "figures"))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()
