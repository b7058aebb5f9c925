"""The site, built once from stored outputs: every link leads somewhere, and it reads without a network."""

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import browsers
import pytest

from replicate.system.paths import ROOT

pytest.importorskip("myst_nb")
for needed in ("sphinx_book_theme", "sphinx_exercise", "sphinxcontrib.bibtex"):
    pytest.importorskip(needed)

LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "object": "data"}
RELATED = ("next", "prev", "index", "search", "author")  # <link>s that a browser does not load
SKIPPED = ("script", "style", "pre", "code", "math")  # whose text is not the page's prose


class Page(HTMLParser):
    """What the tests ask of one page: its links, its anchors, what it loads, its title and its prose."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors, self.prose, self.count = [], [], set(), [], {}
        self.title, self.inside = "", []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.count[tag] = self.count.get(tag, 0) + 1
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if values.get(LOADED.get(tag)) and values.get("rel") not in RELATED:
            self.loaded.append(values[LOADED[tag]])
        if tag in SKIPPED or tag == "title":
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, text):
        if self.inside == ["title"]:
            self.title += text
        elif not self.inside:
            self.prose.append(text)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of a site that has just been built; Sphinx's warnings are errors."""
    out = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, str(ROOT / "site" / "build.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    """Each page of the site, by its path."""
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}


def load(name):
    """A file of site/ as a module."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def external(url):
    return bool(urlsplit(url).scheme or urlsplit(url).netloc) and not url.startswith("data:")


def test_every_chapter_lab_and_page_is_there(site, pages):
    for folder, pattern in (("notebooks", "[0-9]*.ipynb"), ("docs", "*.md"), ("course/source", "*/L*.ipynb")):
        for source in (ROOT / folder).glob(pattern):
            assert (site / source.relative_to(ROOT)).with_suffix(".html") in pages


def test_internal_links_images_and_anchors_exist(pages):
    broken = []
    for path, page in pages.items():
        for url in [*page.links, *page.loaded]:
            if external(url) or url.startswith("data:"):
                continue
            parts = urlsplit(url)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file():
                broken.append(f"{path.name}: {url}")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                broken.append(f"{path.name}: {url} (no such place)")
    assert not broken, "\n".join(broken)


def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert [(path.name, url) for path, page in pages.items() for url in page.loaded if external(url)] == []
    for sheet in site.rglob("*.css"):
        urls = re.findall(r"url\(\s*['\"]?([^'\")]+)", sheet.read_text(encoding="utf-8"))
        imports = re.findall(r"@import\s+['\"]([^'\"]+)", sheet.read_text(encoding="utf-8"))
        assert [url for url in urls + imports if external(url)] == [], sheet.name
    for path, page in pages.items():
        inline = re.findall(r"<script\b[^>]*>(.*?)</script>", path.read_text(encoding="utf-8"), re.S)
        assert not any("http" in text for text in inline), (path.name, page.title)


def test_formulas_are_mathml(pages):
    written = {path.stem: page for path, page in pages.items() if "_modules" not in path.parts}
    for name, page in written.items():
        prose = "".join(page.prose)
        assert not re.search(r"\$[^$\s][^$\n]*\$|\\[(\[]|\\(frac|mathrm|sum|cdot)\b", prose), name
    assert written["02_where_the_flops_go"].count["math"] > 20


def test_each_page_has_a_title_of_its_own(pages):
    titles = [page.title for path, page in pages.items() if "_modules" not in path.parts]
    assert all("replicate" in title and "<no title>" not in title for title in titles)
    assert len(set(titles)) == len(titles)


def test_the_front_page_takes_its_numbers_from_the_readme(site, pages):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = "".join(pages[site / "index.html"].prose)
    values = re.findall(r"<!-- value: [^>]*-->(.*?)<!-- end -->", readme.split("\n## ")[0])
    assert len(values) > 10
    assert [value for value in values if value not in prose] == []


def test_question_findings_and_a_chapter_in_three_clicks(site, pages):
    front = site / "index.html"
    links = {(front.parent / urlsplit(url).path).resolve() for url in pages[front].links if not external(url)}
    assert site / "findings.html" in links
    assert site / "notebooks" / "00_start_here.html" in links
    assert "Can the feed-forward layers" in pages[front].title


def test_the_search_finds_the_router(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(index[index.index("{") : index.rindex("}") + 1])
    for kind, page in (("titleterms", "notebooks/05_the_neuron_level_router"), ("terms", "docs/glossary")):
        found = index[kind]["router"]  # a page's number, or a list of them
        assert index["docnames"].index(page) in (found if isinstance(found, list) else [found])


@pytest.fixture(scope="module")
def browser():
    """The running browser."""
    with browsers.running() as found:
        yield found


@pytest.mark.parametrize("width", [1440, 390])
def test_no_page_scrolls_sideways(pages, browser, width):
    tab, scrolling = browser.new_page(viewport={"width": width, "height": 900}), []
    for path in pages:
        tab.goto(path.as_uri())
        wide = tab.evaluate("document.scrollingElement.scrollWidth - document.documentElement.clientWidth")
        scrolling += [f"{path.name}: {wide} pixels too wide"] if wide > 0 else []
    assert not scrolling, "\n".join(scrolling)


def test_the_menu_opens_on_a_telephone(site, browser):
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    tab.goto((site / "index.html").as_uri())
    tab.click("button.primary-toggle")
    tab.click("#pst-primary-sidebar-modal a:has-text('05 · The neuron-level router')")
    tab.wait_for_url("**/05_the_neuron_level_router.html")


def test_the_search_page_lists_the_router(site, browser):
    tab = browser.new_page()
    tab.goto((site / "search.html").as_uri() + "?q=router")
    tab.wait_for_selector("#search-results a:has-text('05 · The neuron-level router')", timeout=20_000)


def test_every_exercise_is_a_box_with_a_link_to_its_solution(site, pages):
    numbers, found = load("notebook_pages").numbers, ROOT / "notebooks" / "solutions"
    solved = {number for path in found.glob("*.ipynb") for number in numbers(path)}
    for source in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        page = pages[(site / source.relative_to(ROOT)).with_suffix(".html")]
        for number in numbers(source):
            name = number.replace(".", "-")
            assert f"exercise-{name}" in page.anchors
            assert number not in solved or any(url.endswith(f"#solution-{name}") for url in page.links), (
                number
            )


def test_a_lab_shows_no_answer(site):
    for source in (ROOT / "course" / "source").glob("*/L*.ipynb"):
        page = (site / source.relative_to(ROOT)).with_suffix(".html").read_text(encoding="utf-8")
        text = re.sub("<[^>]*>", "", page)
        assert not re.search("BEGIN SOLUTION|HIDDEN TESTS", text), source.name


def test_released_cells_lose_answers_hidden_tests_and_outputs():
    released = load("notebook_pages").released
    answer = "def f(x):\n    ### BEGIN SOLUTION\n    return 41 + x\n    ### END SOLUTION\n\n\nf(1)"
    tests = "assert f(1) == 42\n### BEGIN HIDDEN TESTS\nassert f(2) == 43\n### END HIDDEN TESTS"
    marks = {"nbgrader": {"solution": True, "grade": False}}
    cell = {"cell_type": "code", "metadata": marks, "source": answer, "outputs": ["42"]}
    left = "    # Write your answer here, in place of the next line.\n    raise NotImplementedError()"
    assert released(cell)["source"] == f"def f(x):\n{left}\n\n\nf(1)"
    assert released(cell)["outputs"] == []
    graded = {"cell_type": "code", "metadata": {}, "source": tests, "outputs": []}
    assert released(graded)["source"] == "assert f(1) == 42"
    text = {"cell_type": "markdown", "metadata": marks, "source": "Because 42."}
    assert "42" not in released(text)["source"]
    whole = {"cell_type": "code", "metadata": marks, "source": "answer = 42", "outputs": []}
    assert "42" not in released(whole)["source"]


def test_an_exercise_becomes_a_box_that_links_to_its_solution():
    boxed = load("notebook_pages").boxed
    text = "## Exercises\n\n### 05.2 · Balance\n\n*10 minutes*\n\nCount them.\n\n### 05.3 · More\n\nAnd now?"
    shown = boxed(text, "exercise", {"05.2"})
    head = "`````{exercise} 05.2 · Balance\n:label: exercise-05-2\n:nonumber:\n"
    assert shown.startswith(f"## Exercises\n\n{head}")
    assert "Count them.\n\n[Solution](#solution-05-2)\n`````" in shown
    assert "{exercise} 05.3 · More" in shown and "solution-05-3" not in shown
    answers = boxed(text, "solution", {"05.2"})
    assert "{solution} exercise-05-2\n:label: solution-05-2\n" in answers and "\n## 05.3 · More" in answers


def test_a_flowchart_has_its_boxes_and_arrows_in_order():
    chart = load("flowchart")
    text = 'flowchart LR\na["one<br>small"] --> b["two"]\nb --> c["three"]\nx["side"] -. maybe .-> b\nx --> c'
    labels, edges = chart.read(text)
    places = chart.place(labels, edges)
    assert [places[node] for node in ("a", "b", "c")] == [(0, 0), (1, 0), (2, 0)]
    assert places["x"] == (0, 1)
    drawn = chart.svg(text)
    assert drawn.count("<rect") == 4 and drawn.count("marker-end") == 4 and ">maybe<" in drawn
    with pytest.raises(ValueError, match="cannot read"):
        chart.read("flowchart LR\n  a ==> b")


def test_another_folder_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    command = [sys.executable, str(Path(ROOT, "site", "build.py")), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0 and "holds other things" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_the_reference_describes_each_argument_by_itself(site):
    page = (site / "api" / "replicate.ffn.html").read_text(encoding="utf-8")
    for name in ("d_model", "d_ff", "sparsity", "backend"):
        assert f"<strong>{name}</strong>" in page, name
