"""The form of a chapter: short cells, findings as text, pictures in words, links, a readable length."""

import ast
import re
import subprocess

import pytest
from browsers import CHROMIUM

from replicate.report import notebooks

BOOKS = notebooks.discover()
LONGEST = 25  # lines of a code cell
LATER = {
    "08": 41,
    "12": 43,
}  # chapters in an older form: their longest
CHAPTERS = [book for book in BOOKS if book.number not in LATER]
SCREEN, SCREENS = 900, {"00": 5}  # pixels; screens of 1440 x 900 at most, 12 where nothing is said
each_book = pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
each_chapter = pytest.mark.parametrize("book", CHAPTERS, ids=lambda book: book.name)


def cells(book, kind):
    return [cell for cell in book.content["cells"] if cell["cell_type"] == kind]


@each_book
def test_code_cells_are_short(book):
    lengths = [len(notebooks.source(cell).splitlines()) for cell in cells(book, "code")]
    assert max(lengths) <= LATER.get(book.number, LONGEST)


@each_book
def test_links_lead_to_the_chapters_around_it(book):
    first, *_, last = [notebooks.source(cell) for cell in cells(book, "markdown")]
    place = BOOKS.index(book)
    assert "<!-- value: links -->" in first
    assert all(
        f"]({other.path.name})" in first for other in BOOKS[max(0, place - 1) : place + 2] if other != book
    )
    if place + 1 < len(BOOKS):
        assert last.rstrip().endswith(f"**Next:** [{BOOKS[place + 1].title}]({BOOKS[place + 1].path.name})")


@each_book
def test_links_of_the_text_lead_somewhere(book):
    for cell in cells(book, "markdown"):
        for place in re.findall(r"\]\(((?!https?:)[^)#]+)[^)]*\)", notebooks.source(cell)):
            assert (book.path.parent / place).exists(), place


@each_chapter
def test_findings_are_text(book):
    """Sentences stand in Markdown cells, with numbers that `replicate pages` fills, not in code."""
    for cell in cells(book, "code"):
        for node in ast.walk(ast.parse(notebooks.source(cell))):
            shown = isinstance(node, ast.Call) and ast.unparse(node.func) == "Markdown" and node.args
            assert not (shown and isinstance(node.args[0], ast.JoinedStr | ast.BinOp | ast.Constant)), (
                f"{ast.unparse(node)[:80]} belongs into a Markdown cell"
            )
    assert not [c for c in cells(book, "markdown") if re.search(r"(?m)^<!--", notebooks.source(c))], (
        "a line that begins with a marker is no text any more"
    )


@each_book
def test_pictures_are_told_in_words(book):
    for cell in cells(book, "code"):
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                assert len(output["metadata"].get("image/png", {}).get("alt", "")) > 20, notebooks.source(
                    cell
                )


@each_chapter
def test_cells_that_only_draw_are_folded(book):
    for cell in cells(book, "code"):
        folded = cell["metadata"].get("jupyter", {}).get("source_hidden", False)
        assert folded == (notebooks.FOLDED in notebooks.tags(cell))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to lay out a page")
@each_chapter
def test_a_chapter_is_not_too_long(book, tmp_path):
    """Its height above the exercises with all code open, exported to HTML, at 1440 pixels of width."""
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter(template_name="lab").from_filename(str(book.path))
    end = "document.getElementById('Exercises').getBoundingClientRect().top + scrollY"
    measure = f"document.documentElement.setAttribute('data-height', Math.round({end}))"
    page = tmp_path / "page.html"
    page.write_text(
        html.replace("</body>", f"<script>onload = () => {measure}</script></body>"), encoding="utf-8"
    )
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size=1440,{SCREEN}",
    ]
    command = [CHROMIUM, *options, "--virtual-time-budget=8000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True, timeout=120)
    height = int(re.search(r'data-height="(\d+)"', done.stdout).group(1))
    assert SCREEN < height <= SCREENS.get(book.number, 12) * SCREEN
