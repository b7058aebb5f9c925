#!/usr/bin/env python3
"""Build the site: README, chapters, labs, docs and the package's reference as HTML that reads offline.

    python site/build.py                  into site/_build/html
    python site/build.py --out FOLDER

Notebooks are shown with their stored outputs; nothing is executed. The pages are copies of the project's own
files, laid out as the project is. Only links change, and what notebook_pages.py and flowchart.py say. Sphinx
reads the copies; a warning is an error. An earlier site stays until the new one is complete.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import flowchart
import notebook_pages

SITE = Path(__file__).resolve().parent
ROOT = SITE.parent
FRONT, REST = "index.md", "findings.md"  # README up to this heading, and from it on
SPLIT = "## What holds"
REST_TITLE = "# What holds, what it gains, and how to use it"
DOCS_FIRST = (
    *("replication", "artifact", "questions", "kernels"),
    *("glossary", "commands", "architecture", "teaching"),
)
METHOD = ("config", "sparsity", "router", "ffn", "gpt", "data", "schedule", "train", "evaluate", "ablations")
MODULES = (
    *METHOD,
    *("experts", "swap"),
    *("settings.presets", "kernels.layer", "kernels.backend", "training.flops", "text.corpora"),
    *("study.plans", "study.runs", "study.records", "study.results", "study.statistics"),
    *("paper.table", "paper.verdicts", "paper.audit", "figures"),
)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"^ *(?P<ticks>```+)(?P<kind>\w*)\n(?P<body>.*?)^ *(?P=ticks) *$", re.S | re.M)
ARXIV = re.compile(r"https://arxiv.org/abs/(\d{4}\.\d{5})")


def slug(heading):
    """The anchor that a heading gets on GitHub and on the site."""
    text = re.sub(r"[`*]|\]\([^)]*\)", "", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


class Stage:
    """The folder Sphinx reads, and what the pages in it need to know of each other."""

    def __init__(self, folder):
        self.folder = folder
        self.chapters = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
        self.solutions = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
        self.labs = sorted((ROOT / "course" / "source").glob("*/L*.ipynb"))
        self.docs = sorted((ROOT / "docs").glob("*.md"), key=in_order)
        self.course = [path for path in [ROOT / "course" / "README.md"] if path.exists()]
        self.texts = [*self.docs, *self.course, ROOT / "figures" / "claims.md"]
        self.pages = {named(path) for path in [*self.chapters, *self.solutions, *self.labs, *self.texts]}
        self.modules = [f"replicate.{name}" for name in MODULES]
        self.broken = []  # links that lead nowhere
        self.cited = set(re.findall(r"@\w+\{([^,]+),", (SITE / "references.bib").read_text(encoding="utf-8")))
        self.repository = project().get("urls", {}).get("Repository")
        self.solved = {number for path in self.solutions for number in notebook_pages.numbers(path)}
        self.asked = {number for path in self.chapters for number in notebook_pages.numbers(path)}
        self.front, self.rest = (ROOT / "README.md").read_text(encoding="utf-8").split(f"\n{SPLIT}\n")
        self.rest = f"{REST_TITLE}\n\n{SPLIT}\n{self.rest}"
        on_front = {slug(line.lstrip("#")) for line in self.front.splitlines() if line.startswith("#")}
        self.readme = lambda anchor: FRONT if anchor in on_front or not anchor else REST

    def build(self):
        """Write every page."""
        self.write(FRONT, front_page(self.markdown(self.front, FRONT)) + self.contents())
        self.write(REST, self.markdown(self.rest, REST))
        for path in self.texts:
            text = self.markdown(path.read_text(encoding="utf-8"), named(path))
            self.write(named(path), text if text.startswith("# ") else f"# All claims\n\n{text}")
        for kind, paths in {"exercise": self.chapters, "solution": self.solutions, "lab": self.labs}.items():
            for path in paths:
                text = partial(self.markdown, page=named(path), seen=set())
                notebook_pages.stage(path, self.folder / named(path), text, kind, self.solved & self.asked)
        for module in self.modules:
            directive = f".. automodule:: {module}\n   :members:"
            self.write(f"api/{module}.md", f"# {module}\n\n```{{eval-rst}}\n{directive}\n```\n")
        self.write("api/index.md", reference(self.modules))
        self.write("references.md", "# References\n\n```{bibliography}\n:all:\n```\n")
        shutil.copy(SITE / "references.bib", self.folder)
        if self.broken:
            raise SystemExit("\n".join(["site/build.py cannot go on:", *self.broken]))

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def markdown(self, text, page, seen=None):
        """A page's text, or a notebook cell's: with the site's links, citations and flowcharts.

        Args:
            page: path of the page within the project, from which its links start.
            seen: papers cited on this page before; each is cited once.
        """
        seen = set() if seen is None else seen
        pieces, end = [], 0
        for fence in FENCE.finditer(text):
            shown = flowchart.svg(fence["body"]) if fence["kind"] == "mermaid" else fence[0]
            pieces += [self.links(text[end : fence.start()], page, seen), shown]
            end = fence.end()
        return "".join([*pieces, self.links(text[end:], page, seen)])

    def links(self, text, page, seen):
        """Text without code blocks: marks for generated values go, links are those of the site."""

        def link(match):
            image, label, target = match.groups()
            paper = ARXIV.match(target)
            if paper and paper[1] in self.cited - seen:
                seen.add(paper[1])
                return f"{match[0]} {{cite:p}}`{paper[1]}`"
            return match[0] if "://" in target else self.link(image, label, target, page)

        return LINK.sub(link, re.sub(r"<!--.*?-->", "", text, flags=re.S))

    def link(self, image, label, target, page):
        """A link within the project as one within the site."""
        path, _, anchor = unquote(target).partition("#")
        folder = PurePosixPath(page).parent
        name = os.path.normpath(folder / path).replace(os.sep, "/") if path else page
        up = "../" * len(folder.parts)
        if name == "README.md" or (page in (FRONT, REST) and not path):
            return f"[{label}]({up}{self.readme(anchor)}{'#' + anchor if anchor else ''})"
        number = re.match(r"(\d\d\.\d+)-|", anchor)[1]
        kind, boxes = ("solution", self.solved) if "solutions/" in name else ("exercise", self.asked)
        if number in boxes & self.asked and name.endswith(".ipynb"):
            return f"[{label}](#{notebook_pages.label(kind, number)})"
        if name in self.pages or (image and (ROOT / name).is_file()):
            self.bring(name)
            return f"{image}[{label}]({path}{'#' + slug(anchor) if anchor else ''})"
        module = name.removesuffix(".py").replace("/", ".")
        if name.startswith("replicate/") and name.endswith(".py") and (ROOT / name).is_file():
            if module not in self.modules:
                self.modules.append(module)
            return f'<a href="{up}_modules/{module.replace(".", "/")}.html">{label}</a>'
        if (ROOT / name).is_file():
            self.bring(name)
            return f"[{label}]({path})"
        if not (ROOT / name).exists():
            self.broken.append(f"{page} links to {target}, which does not exist.")
        return f"[{label}]({self.repository}/tree/HEAD/{name})" if self.repository else label

    def bring(self, name):
        """Copy a picture or a file to download to where its page is; a table becomes a page of its own."""
        if name in self.pages:
            return
        path = ROOT / name
        if path.suffix == ".md":
            title = f"Table {path.stem.replace('_', ' ')}"
            text = path.read_text(encoding="utf-8")
            self.write(name, f"---\norphan: true\n---\n\n# {title}\n\n{text}")
            return
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, self.folder / name)

    def contents(self):
        """The site's table of contents, which stands at the side of every page."""
        names = {
            "Read": [REST, *self.chapters],
            "Look up": [*self.docs, "figures/claims.md", "api/index.md", "references.md"],
            "Labs": [*self.course, *self.labs],
            "Solutions": self.solutions,
        }
        text = ""
        for caption, entries in names.items():
            lines = [named(entry) if isinstance(entry, Path) else entry for entry in entries]
            if lines:
                text += "\n".join(["\n\n```{toctree}", ":hidden:", f":caption: {caption}", "", *lines, "```"])
        return text


def named(path):
    """A file's path within the project, with slashes."""
    return path.relative_to(ROOT).as_posix()


def in_order(path):
    """Where a page of docs/ stands among the others."""
    return (DOCS_FIRST.index(path.stem) if path.stem in DOCS_FIRST else len(DOCS_FIRST), path.stem)


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def front_page(text):
    """README's beginning with the question as its title and the results as cards."""
    text = re.sub(r"\A# .*\n+\*(.+?\?)\*\s", r"# \1\n\n", text)
    return re.sub(r"((?:^\d\. .*\n)+)", r"::::{container} results\n\n\1\n::::\n", text, count=1, flags=re.M)


def reference(modules):
    """The reference's first page: the names that `import replicate` gives, then the modules."""
    tree = ast.parse((ROOT / "replicate" / "__init__.py").read_text(encoding="utf-8"))
    origins = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    lines = ["# Reference", "", "## What `import replicate` gives", ""]
    for node in origins:
        page = f"[{node.module}]({node.module}.md)"
        lines += [f"- {{py:obj}}`{one.name} <{node.module}.{one.name}>`, in {page}" for one in node.names]
    lines += ["", "## Modules", "", "```{toctree}", ":maxdepth: 1", *modules, "```", ""]
    return "\n".join(lines)


def main():
    """Build the site; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=SITE / "_build" / "html", help="folder of the site")
    out = parser.parse_args().out.resolve()
    if out.exists() and any(out.iterdir()) and not (out / ".buildinfo").exists():
        raise SystemExit(f"site/build.py: {out} holds other things than a site; name another folder.")
    with tempfile.TemporaryDirectory() as work:
        pages, html = Path(work, "pages"), Path(work, "html")
        Stage(pages).build()
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(SITE)]
        status = subprocess.call([*command, "-d", str(Path(work, "doctrees")), str(pages), str(html)])
        if status:
            return status
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(html, out)
    print(f"The site: {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
