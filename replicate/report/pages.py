"""The generated tables and numbers of README.md, docs/ and the notebooks: `python -m replicate pages`.

`<!-- table: NAME -->…<!-- end -->` holds a table, `<!-- value: NAME -->…<!-- end -->` a number in a sentence.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from replicate.report import (
    artifact_page,
    chapter_values,
    kernels_page,
    notebooks,
    readme_page,
    replication_page,
    scaling_page,
)
from replicate.system import paths
from replicate.system.files import write_atomic

BLOCK = re.compile(r"(<!-- (table|value): (.+?) -->).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """A file with generated blocks, and functions that give its tables in Markdown and a value by name.

    A notebook's blocks stand in its Markdown cells. A value that does not exist is "".
    """

    path: Path
    tables: Callable[[], dict[str, str]] = dict
    value: Callable[[str], str] = lambda name: ""


def _lookup(values: Callable[[], dict[str, str]]) -> Callable[[str], str]:
    return lambda name: values().get(name, "")


DOCS = paths.ROOT / "docs"
PAGES = {
    "readme": Page(paths.ROOT / "README.md", readme_page.tables, readme_page.value),
    "commands": Page(DOCS / "commands.md"),
    "kernels": Page(DOCS / "kernels.md", kernels_page.tables, _lookup(kernels_page.values)),
    "artifact": Page(DOCS / "artifact.md", artifact_page.tables, _lookup(artifact_page.values)),
    "questions": Page(DOCS / "questions.md", value=_lookup(replication_page.values)),
    "replication": Page(DOCS / "replication.md", replication_page.tables, _lookup(replication_page.values)),
    "scaling": Page(DOCS / "scaling.md", scaling_page.tables, _lookup(scaling_page.values)),
    "teaching": Page(DOCS / "teaching.md", value=readme_page.value),
}
PAGES |= {b.name: Page(b.path, value=partial(chapter_values.value, b)) for b in notebooks.discover()}


def filled(page: Page) -> str:
    """The file's text with every table and value between its markers.

    Raises ValueError for a table that is unknown, missing or there twice, an unknown or empty value, or a
    marker without its end.
    """
    text = page.path.read_text(encoding="utf-8")
    if page.path.suffix != ".ipynb":
        return _filled(text, page)
    content: dict[str, Any] = json.loads(text)
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = _filled(notebooks.source(cell), page).splitlines(keepends=True)
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _filled(text: str, page: Page) -> str:
    tables = page.tables()
    marked = re.findall(r"<!-- table: (.+?) -->", text)
    if sorted(marked) != sorted(tables):
        raise ValueError(f"{page.path.name} marks the tables {sorted(marked)}; there are {sorted(tables)}")
    values = {name: page.value(name) for name in re.findall(r"<!-- value: (.+?) -->", text)}
    if unknown := [name for name, value in values.items() if not value]:
        raise ValueError(f"{page.path.name} asks for {unknown[0]!r}; there is no such value")
    begun = len(re.findall(r"<!-- (?:table|value): ", text))
    if not text.count("<!-- end -->") == len(BLOCK.findall(text)) == begun:
        raise ValueError(f"{page.path.name}: every marker needs one <!-- end -->")

    def block(found: re.Match[str]) -> str:
        start, kind, name, end = found.groups()
        return start + (f"\n\n{tables[name].rstrip()}\n\n" if kind == "table" else values[name]) + end

    return BLOCK.sub(block, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the generated tables and numbers of README.md, docs/ and notebooks/ anew, from the records."""
    argparse.ArgumentParser(prog="replicate pages", description=main.__doc__).parse_args(argv)
    try:
        texts = [(page.path, filled(page)) for page in PAGES.values()]
    except FileNotFoundError as error:
        remedy = "write figures/ anew by `python -m replicate notebooks run`"
        raise ValueError(f"{error.filename} is missing; restore it, or {remedy}") from None
    for path, text in texts:
        write_atomic(path, text.encode())
        print(path.relative_to(paths.ROOT))
    return 0
