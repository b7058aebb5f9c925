"""The notebooks as files: finding them, their parameters, and refreshing their stored outputs."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from replicate.system import paths
from replicate.system.files import write_atomic

FOLDED = "hide-input"  # the tag of cells that only draw: their code is folded
SLIDE_TYPES = {"slide": "slide", "slide-more": "-"}  # tags of cells that begin or continue a slide
_FILE = re.compile(r"(\d\d)_[a-z0-9_]+\.ipynb")
# Kernels are quiet, of this environment, and import the package of this checkout. Who runs notebooks by a
# command has chosen the scale, and is not asked again before long work.
KERNEL_ENV = {"JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "REPLICATE_LONG": "1"}
KERNEL_ENV["REPLICATE_STATIC"] = "1"  # no sliders: what is stored is a picture, see `chapter.touch`
KERNEL_ENV["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")  # as in reproduce.py
KERNEL_ENV["PYTHONPATH"] = os.pathsep.join(filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")]))


@dataclass(frozen=True)
class Notebook:
    """One notebook of the reading order."""

    path: Path

    @property
    def name(self) -> str:
        """File name without ending, like "03_minimal_gpt"."""
        return self.path.stem

    @property
    def number(self) -> str:
        """Its two digits."""
        return self.name[:2]

    @cached_property
    def content(self) -> dict[str, Any]:
        """The file as JSON."""
        return json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def title(self) -> str:
        """The first heading."""
        cells = (source(cell) for cell in self.content["cells"] if cell["cell_type"] == "markdown")
        found = re.search(r"^# (.+)$", "\n".join(cells), re.MULTILINE)
        return found[1].strip() if found else self.name

    def minutes(self, profile: str) -> float | None:
        """Minutes it says it takes at this profile (metadata `replicate.minutes`), if it says so."""
        return self.content["metadata"].get("replicate", {}).get("minutes", {}).get(profile)


def source(cell: dict[str, Any]) -> str:
    """A cell's text, which files hold as a string or as lines."""
    return "".join(cell["source"])


def tags(cell: dict[str, Any]) -> list[str]:
    """A cell's tags."""
    return cell.get("metadata", {}).get("tags", [])


def discover(folder: Path | None = None) -> list[Notebook]:
    """The notebooks NN_topic.ipynb of a folder (default: notebooks/) in reading order."""
    found = sorted((folder or paths.NOTEBOOKS).glob("*.ipynb"))
    return [Notebook(path) for path in found if _FILE.fullmatch(path.name)]


def select(books: list[Notebook], only: Iterable[str] | None = None) -> list[Notebook]:
    """The notebooks named by number ("3", "03") or name; all for None. Raises ValueError for others."""
    wanted = [str(name).zfill(2) for name in only or ()]
    for name in wanted:
        if not any(name in (book.number, book.name) for book in books):
            raise ValueError(f"no notebook {name!r}; there are {', '.join(b.name for b in books) or 'none'}")
    return [book for book in books if not wanted or {book.number, book.name} & set(wanted)]


def refresh(only: Iterable[str] | None = None, folder: Path | None = None) -> list[str]:
    """Execute notebooks at their default parameters and store the outputs in them; returns the names.

    Outputs are kept without what changes from run to run: timings, progress, stderr, versions in metadata.
    Raises ValueError if an output names a folder of this machine.
    """
    import nbclient
    import nbformat

    os.environ.update(KERNEL_ENV)
    names = []
    for book in select(discover(folder), only):
        content = nbformat.read(book.path, as_version=4)
        how = {"timeout": None, "kernel_name": "python3", "record_timing": False}
        nbclient.execute(content, cwd=str(book.path.parent), **how)
        text = nbformat.writes(clean(content)).rstrip("\n") + "\n"
        if str(paths.ROOT) in text or str(Path.home()) + os.sep in text:
            raise ValueError(f"{book.name} prints a path of this machine; print it relative to the checkout")
        write_atomic(book.path, text.encode())
        names.append(book.name)
    return names


def clean(content: Any) -> Any:
    """The notebook without what differs from run to run; changes and returns it.

    Of a cell's metadata its tags are kept; what JupyterLab and nbconvert read beside them follows from them.
    """
    kept = content["metadata"].get("replicate")
    content["metadata"] = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        **({"replicate": kept} if kept else {}),
    }
    has_slides = any("slide" in tags(cell) for cell in content["cells"])
    for cell in content["cells"]:
        cell["metadata"] = cell_metadata(tags(cell), has_slides)
        outputs: list[Any] = []
        for output in cell.get("outputs", ()):
            if output.get("name") == "stdout" and outputs and outputs[-1].get("name") == "stdout":
                outputs[-1]["text"] += output["text"]
            elif output.get("name") != "stderr":
                outputs.append(output)
        if cell["cell_type"] == "code":
            cell["outputs"] = outputs
    return content


def cell_metadata(tags: list[str], has_slides: bool) -> dict[str, Any]:
    """A cell's metadata: its tags, whether its code is folded, and its part in the notebook's slides.

    In a notebook with slides a cell begins one, continues it ("-") or is left out ("skip").
    """
    metadata: dict[str, Any] = {"tags": tags} if tags else {}
    if FOLDED in tags:
        metadata["jupyter"] = {"source_hidden": True}
    if has_slides:
        kinds = [SLIDE_TYPES[tag] for tag in tags if tag in SLIDE_TYPES]
        metadata["slideshow"] = {"slide_type": kinds[0] if kinds else "skip"}
    return metadata
