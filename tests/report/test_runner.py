"""The runner on small notebooks of its own: order, parameters, failures, resuming, refreshing."""

import io
import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from replicate.report import notebooks, runner

PARAMETERS = 'profile = "smoke"\nseed = 1'
WRITES = """import os, pathlib, sys
print("noise", file=sys.stderr)
print(profile, seed)
pathlib.Path(os.environ["REPLICATE_FIGURES"], f"{name}.csv").write_text(f"{profile} {seed}")"""


def write_notebook(folder, name, *cells, title="A title"):
    book = new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
    )
    book.cells = [new_markdown_cell(f"# {title}\n\ntext"), new_code_cell(PARAMETERS)]
    book.cells[1].metadata["tags"] = ["parameters"]
    book.cells += [new_code_cell(f"name = {name!r}"), *(new_code_cell(cell) for cell in cells)]
    for index, cell in enumerate(book.cells):
        cell["id"] = f"cell{index}"
    nbformat.write(book, folder / f"{name}.ipynb")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("REPLICATE_FIGURES", str(tmp_path / "figures"))
    (tmp_path / "figures").mkdir()
    made = tmp_path / "notebooks"
    made.mkdir()
    return made


@pytest.fixture
def fake(monkeypatch):
    """Replace papermill by a function that writes the copy and a figure, and notes what it did."""
    seen = []

    def execute(book, given, output):
        seen.append((book.name, given))
        output.write_text("{}")
        figure = runner.paths.figures_dir() / f"{book.name}.png"
        figure.write_bytes(b"")
        return runner.Outcome(book.name, "done", 90.0, str(output), files=[figure.name])

    monkeypatch.setattr(runner, "_execute", execute)
    return seen


def test_discover_reads_numbers_and_titles(folder):
    write_notebook(folder, "10_last", title="The last")
    write_notebook(folder, "02_first")
    (folder / "scratch.ipynb").write_text("{}")
    books = notebooks.discover(folder)
    assert [book.name for book in books] == ["02_first", "10_last"]
    assert books[1].title == "The last" and books[1].number == "10"
    assert [b.number for b in notebooks.select(books, ["2"])] == ["02"]
    assert [b.number for b in notebooks.select(books, ["10_last"])] == ["10"]
    with pytest.raises(ValueError, match="no notebook '07'"):
        notebooks.select(books, ["7"])


def test_bad_requests_are_refused_before_anything_runs(folder, fake):
    write_notebook(folder, "01_a")
    with pytest.raises(ValueError, match="choose one of smoke, laptop, gpu"):
        runner.run("huge", folder=folder)
    with pytest.raises(ValueError, match="seed is -1; choose a whole number"):
        runner.run(folder=folder, seed=-1)
    with pytest.raises(ValueError, match="no notebook"):
        runner.run(folder=folder, only=["3"])
    assert not fake


def test_papermill_runs_in_order_with_parameters(folder, tmp_path):
    write_notebook(folder, "01_a", WRITES)
    write_notebook(folder, "02_b", WRITES)
    out = io.StringIO()
    outcomes = runner.run("laptop", 5, folder=folder, out=out)
    assert [(o.name, o.status, o.files) for o in outcomes] == [
        ("01_a", "done", ["01_a.csv"]),
        ("02_b", "done", ["02_b.csv"]),
    ]
    assert (tmp_path / "figures" / "02_b.csv").read_text() == "laptop 5"
    copy = nbformat.read(tmp_path / "runs" / "notebooks" / "laptop" / "01_a.ipynb", as_version=4)
    assert any(
        "laptop 5" in output.get("text", "") for cell in copy.cells for output in cell.get("outputs", [])
    )
    assert [line.split(" ... ")[0] for line in out.getvalue().splitlines()] == ["[1/2] 01_a", "[2/2] 02_b"]


def test_a_failure_is_named_and_ends_the_run_or_not(folder, tmp_path):
    write_notebook(folder, "01_a", "x = 1\n1 / 0")
    write_notebook(folder, "02_b", WRITES)
    out = io.StringIO()
    (failed,) = runner.run(folder=folder, out=out)
    assert (failed.status, failed.error) == ("failed", "ZeroDivisionError: division by zero")
    text = out.getvalue()
    assert f"In [{failed.cell}]" in text and "ZeroDivisionError" in text and failed.copy in text
    assert "1 / 0" in (tmp_path / "runs" / "notebooks" / "smoke" / "01_a.ipynb").read_text()
    outcomes = runner.run(folder=folder, keep_going=True, out=out)
    assert [o.status for o in outcomes] == ["failed", "done"]
    assert [o.status for o in runner.run(folder=folder, keep_going=True, out=out, only=["2"])] == [
        "unchanged"
    ]


def test_a_dead_kernel_is_a_failure(folder):
    write_notebook(folder, "01_a", "import os\nos._exit(1)")
    (failed,) = runner.run(folder=folder, out=io.StringIO())
    assert failed.status == "failed" and "DeadKernel" in failed.error


def statuses(folder, **kwargs):
    return [outcome.status for outcome in runner.run(folder=folder, out=io.StringIO(), **kwargs)]


def test_what_is_done_stays_done_until_something_changes(folder, fake, tmp_path, monkeypatch):
    write_notebook(folder, "01_a")
    assert statuses(folder) == ["done"]
    assert statuses(folder) == ["unchanged"] == statuses(folder)
    assert statuses(folder, seed=2) == ["done"]
    assert statuses(folder, fresh=True) == ["done"]
    (tmp_path / "figures" / "01_a.png").unlink()
    assert statuses(folder) == ["done"]
    write_notebook(folder, "01_a", "x = 1")
    assert statuses(folder) == ["done"]
    monkeypatch.setattr(runner, "_package_hash", lambda: "other code")
    assert statuses(folder) == ["done"]
    assert statuses(folder) == ["unchanged"]


def test_an_interrupted_notebook_is_run_again(folder, fake, monkeypatch):
    write_notebook(folder, "01_a")
    write_notebook(folder, "02_b")
    assert statuses(folder) == ["done", "done"]
    working = runner._execute

    def interrupt(book, given, output):
        if book.number == "02":
            raise KeyboardInterrupt
        return working(book, given, output)

    monkeypatch.setattr(runner, "_execute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        statuses(folder, fresh=True)
    monkeypatch.setattr(runner, "_execute", working)
    assert statuses(folder) == ["unchanged", "done"]


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_damaged_state_file_is_no_state(folder, fake, tmp_path, content):
    write_notebook(folder, "01_a")
    statuses(folder)
    (tmp_path / "runs" / "notebooks" / "smoke" / "01_a.json").write_text(content)
    assert statuses(folder) == ["done"]


def test_the_estimate_uses_the_last_run_then_the_notebooks_word(folder, fake):
    for name in ("01_a", "02_b"):
        write_notebook(folder, name)
    path = folder / "02_b.ipynb"
    content = json.loads(path.read_text())
    content["metadata"]["replicate"] = {"minutes": {"smoke": 4, "laptop": 20}}
    path.write_text(json.dumps(content))
    out = io.StringIO()
    runner.run(folder=folder, out=out)
    assert "01_a (about 8 min to the end)" in out.getvalue() and "02_b (about 4 min" in out.getvalue()
    runner.run(folder=folder, out=out, fresh=True)
    assert "01_a (about 3 min to the end)" in out.getvalue()  # 90 s each, as last time
    out = io.StringIO()
    write_notebook(folder, "03_c")
    runner.run(folder=folder, out=out)
    assert (
        "01_a ... " in out.getvalue() and "03_c ... " in out.getvalue()
    )  # nothing known of the only one left


def test_the_package_hash_sees_every_source(tmp_path, monkeypatch):
    package, data = tmp_path / "replicate", tmp_path / "data"
    (package / "kernels").mkdir(parents=True)
    data.mkdir()
    monkeypatch.setattr(runner.paths, "ROOT", tmp_path)
    monkeypatch.setattr(runner.paths, "DATA", data)
    seen = {runner._package_hash()}
    for path in (package / "a.py", package / "kernels" / "b.py", data / "paper.json", data / "bpe.tiktoken"):
        path.write_text("1")
        seen.add(runner._package_hash())
        path.write_text("2")
        seen.add(runner._package_hash())
    assert len(seen) == 9


def test_refresh_stores_outputs_without_what_changes(folder):
    write_notebook(folder, "01_a", WRITES + "\nprint('more')\n3 + 4")
    assert notebooks.refresh(folder=folder) == ["01_a"]
    first = (folder / "01_a.ipynb").read_bytes()
    book = json.loads(first)
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    assert book["metadata"]["language_info"] == {"name": "python"}
    assert [cell["metadata"] for cell in book["cells"]] == [{}, {"tags": ["parameters"]}, {}, {}]
    outputs = book["cells"][3]["outputs"]
    assert [o["output_type"] for o in outputs] == ["stream", "execute_result"]
    assert "".join(outputs[0]["text"]) == "smoke 1\nmore\n"
    notebooks.refresh(folder=folder)
    assert (folder / "01_a.ipynb").read_bytes() == first


def test_refresh_refuses_paths_of_this_machine(folder):
    write_notebook(folder, "01_a", "from pathlib import Path\nprint(Path.home() / 'x')")
    before = (folder / "01_a.ipynb").read_bytes()
    with pytest.raises(ValueError, match="01_a prints a path"):
        notebooks.refresh(folder=folder)
    assert (folder / "01_a.ipynb").read_bytes() == before


def tagged(*tags_of_cells):
    """The cells' metadata after `clean`, of a notebook whose cells have these tags, and more metadata."""
    cells = []
    for tags in tags_of_cells:
        cells.append(new_markdown_cell("text", metadata={"tags": tags, "slideshow": {"slide_type": "notes"}}))
    content = notebooks.clean(new_notebook(cells=cells))
    return [cell["metadata"] for cell in content["cells"]]


def test_slides_follow_from_tags():
    found = tagged(["slide"], ["hide-input", "slide-more"], [], ["parameters"])
    assert [metadata["slideshow"]["slide_type"] for metadata in found] == ["slide", "-", "skip", "skip"]
    assert found[1]["tags"] == ["hide-input", "slide-more"] and found[1]["jupyter"] == {"source_hidden": True}
    assert found[2] == {"slideshow": {"slide_type": "skip"}}


def test_a_notebook_without_slides_says_nothing_of_them():
    assert tagged(["check"], ["slide-more"], []) == [{"tags": ["check"]}, {"tags": ["slide-more"]}, {}]


def test_slides_are_what_nbconvert_shows(tmp_path):
    from nbconvert import SlidesExporter

    book = new_notebook(cells=[new_markdown_cell(f"text {i}") for i in range(5)])
    for cell, tag in zip(book.cells, (None, "slide", "slide-more", "slide", None)):
        cell.metadata["tags"] = [tag] if tag else []
    html, _ = SlidesExporter().from_notebook_node(notebooks.clean(book))
    slides = [text.split("</section>")[0] for text in html.split("<section><section>")[1:]]
    assert [[i for i in range(5) if f"text {i}" in slide] for slide in slides] == [[1, 2], [3]]
