"""The generated tables and numbers of README.md and docs/: `python -m replicate pages` writes them anew.

`<!-- table: NAME -->…<!-- end -->` holds a table, `<!-- value: NAME -->…<!-- end -->` a number in a sentence.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from replicate.report import kernels_page, readme_page, replication_page
from replicate.system import paths
from replicate.system.files import write_atomic

BLOCK = re.compile(r"(<!-- (table|value): (.+?) -->).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """A file with generated blocks, and what gives its tables in Markdown and its values, by name."""

    path: Path
    tables: Callable[[], dict[str, str]]
    values: Callable[[], dict[str, str]] = dict


DOCS = paths.ROOT / "docs"
PAGES = {
    "readme": Page(paths.ROOT / "README.md", readme_page.tables),
    "kernels": Page(DOCS / "kernels.md", kernels_page.tables),
    "replication": Page(DOCS / "replication.md", replication_page.tables, replication_page.values),
}


def filled(page: Page) -> str:
    """The page's text with every table and value between its markers.

    Raises ValueError for a table that is unknown, missing or there twice, an unknown or empty value, or a
    marker without its end.
    """
    text, tables, values = page.path.read_text(encoding="utf-8"), page.tables(), page.values()
    marked = re.findall(r"<!-- table: (.+?) -->", text)
    if sorted(marked) != sorted(tables):
        raise ValueError(f"{page.path.name} marks the tables {sorted(marked)}; there are {sorted(tables)}")
    asked = re.findall(r"<!-- value: (.+?) -->", text)
    if unknown := [name for name in asked if not values.get(name)]:
        raise ValueError(f"{page.path.name} asks for {unknown[0]!r}; there is no such value")
    if not text.count("<!-- end -->") == len(BLOCK.findall(text)) == len(marked) + len(asked):
        raise ValueError(f"{page.path.name}: every marker needs one <!-- end -->")

    def block(found: re.Match[str]) -> str:
        start, kind, name, end = found.groups()
        return start + (f"\n\n{tables[name].rstrip()}\n\n" if kind == "table" else values[name]) + end

    return BLOCK.sub(block, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the generated tables and numbers of README.md and docs/ anew, from data/ and figures/."""
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
