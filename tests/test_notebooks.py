"""The committed notebooks: their form, that they run, and that figures/ and stored outputs come out again.

Each is executed once by papermill at smoke; what it trains is cached, so that nbval then compares every
stored output with a re-execution in seconds, each under one thread, since two that share cores wait for each
other at every product. Measured numbers are masked (nbval_by_tokens.py), all else must be the same, also as
on another processor (`--processor`). With another seed (`--notebook-seed`) they must run and leave figures/
as it is; their outputs are then not the stored ones.
"""

import ast
import hashlib
import io
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from processors import PROCESSORS, variables

from replicate import figures, paper
from replicate.paper.table import write_claims
from replicate.report import notebooks, runner
from replicate.system import paths

HERE = Path(__file__).parent
BOOKS = notebooks.discover()
each_book = pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)

pytestmark = pytest.mark.timeout(1800)  # the first test waits for every notebook to run


def code_cells(book):
    return [cell for cell in book.content["cells"] if cell["cell_type"] == "code"]


def syntax(cell):
    """The cell's syntax tree without IPython's magics."""
    lines = notebooks.source(cell).splitlines()
    return ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines))


def calls(cell):
    """Names of what the cell calls, like "paper.show"."""
    return {ast.unparse(node.func) for node in ast.walk(syntax(cell)) if isinstance(node, ast.Call)}


# Form


@each_book
def test_has_a_title_parameters_a_check_cell_and_exercises(book):
    assert book.title.startswith(book.number), "the title starts with the notebook's number"
    (parameters,) = (notebooks.source(c) for c in code_cells(book) if "parameters" in notebooks.tags(c))
    assert re.findall(r"(?m)^(\w+) = (\S+)", parameters) == [("profile", '"smoke"'), ("seed", "1")]
    assert any({"paper.show", "paper.claim_table"} & calls(cell) for cell in code_cells(book)), (
        "no check cell"
    )
    prose = [notebooks.source(cell) for cell in book.content["cells"] if cell["cell_type"] == "markdown"]
    assert any(text.startswith("## Exercises") for text in prose)
    assert {"smoke", "laptop", "gpu"} <= set(book.content["metadata"]["replicate"]["minutes"])


@each_book
def test_was_run_from_top_to_bottom_without_an_error(book):
    cells = code_cells(book)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs, "no outputs are stored"
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    (check, *_) = [cell for cell in reversed(cells) if {"paper.show", "paper.claim_table"} & calls(cell)]
    assert check["outputs"], "the check cell shows nothing"


@each_book
def test_metadata_is_clean_and_the_kernel_is_everyones(book):
    metadata = book.content["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"
    assert set(metadata) == {"kernelspec", "language_info", "replicate"}
    assert all(set(cell["metadata"]) <= {"tags", "jupyter", "slideshow"} for cell in book.content["cells"])
    has_slides = any("slide" in notebooks.tags(cell) for cell in book.content["cells"])
    for cell in book.content["cells"]:  # run `python -m replicate notebooks refresh` after a change of tags
        assert cell["metadata"] == notebooks.cell_metadata(notebooks.tags(cell), has_slides)
    assert "raises-exception" not in [tag for cell in book.content["cells"] for tag in notebooks.tags(cell)]
    assert book.path.stat().st_size < 3_000_000


def test_no_function_is_defined_twice():
    seen = {}
    for book in BOOKS:
        for cell in code_cells(book):
            for node in ast.walk(syntax(cell)):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    other = seen.setdefault(node.name, book.name)
                    assert other == book.name, f"{node.name} is defined in {other} and in {book.name}"


# Running


@pytest.fixture(scope="session")
def environment(tmp_path_factory, request):
    """Variables that send what notebooks write to a temporary folder, and say what to compute as."""
    folder = tmp_path_factory.mktemp("notebooks")
    where = {"REPLICATE_RUNS": str(folder / "runs"), "REPLICATE_FIGURES": str(folder / "figures")}
    return where | variables(request.config.getoption("--processor"))


def drawn():
    """A seed that follows from the content of notebooks and package: new with each change, but repeatable."""
    digest = hashlib.sha256()
    files = sorted((paths.ROOT / "replicate").rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in files]
    texts += [notebooks.source(cell) for book in BOOKS for cell in book.content["cells"]]
    for text in texts:
        digest.update(text.encode() + b"\0")
    return int.from_bytes(digest.digest()[:4], "big") % 1_000_000


@pytest.fixture(scope="session")
def seed(request):
    """The notebooks' seed."""
    asked = request.config.getoption("--notebook-seed")
    return drawn() if asked == "drawn" else int(asked)


@pytest.fixture(scope="session")
def executed(environment, seed, request):
    """Outcome of each notebook by name."""
    processor = request.config.getoption("--processor")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nnotebooks with seed {seed}, as on processor: {processor}", flush=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        outcomes = runner.run(seed=seed, keep_going=True, out=io.StringIO())
        write_claims(paper.claim_table(shipped=None))
    return {outcome.name: outcome for outcome in outcomes}


@pytest.fixture(scope="session")
def comparisons(environment, executed):
    """nbval on each notebook, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {book.name: pool.submit(compare, book.path, environment) for book in BOOKS}


def compare(path, environment):
    """nbval in a process of its own; (exit status, output)."""
    options = ["-c", str(HERE / "nbval.ini")]  # not the project's pytest settings
    for plugin in ("nbval.plugin", "nbval_by_tokens", "no:cacheprovider"):
        options += ["-p", plugin]
    options += ["--color=no", "-q", "-rf", "--nbval", "--nbval-current-env"]
    env = {**os.environ, **notebooks.KERNEL_ENV, **environment, "PYTHONUTF8": "1"}
    env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", *options, str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", check=False)
    return done.returncode, done.stdout + done.stderr


@each_book
def test_runs_at_smoke(book, executed):
    outcome = executed[book.name]
    assert outcome.status == "done", outcome.error


def test_figures_come_out_as_they_are_tracked(environment, executed):
    made, tracked = Path(environment["REPLICATE_FIGURES"]), paths.ROOT / "figures"
    there, here = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".csv", ".md", ".png")}
        for folder in (tracked, made)
    )
    assert sorted(here) == sorted(there), "tracked figures are those that the notebooks draw from records"
    texts = [name for name in there if not name.endswith(".png")]
    assert [name for name in texts if here[name] != there[name]] == [], "they depend on the run"
    pins = (paths.ROOT / "requirements.txt").read_text(encoding="utf-8")
    if all(f"{name}=={metadata.version(name)} " in pins for name in ("matplotlib", "pillow", "seaborn")):
        pictures = set(there) - set(texts)
        assert [n for n in sorted(pictures) if not figures._looks_alike(here[n], there[n])] == []


def test_processors_are_told_apart(environment):
    for name in PROCESSORS:
        code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
        env = {**os.environ, **variables(name)}
        found = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        asked = variables(name).get("ATEN_CPU_CAPABILITY")
        assert asked is None or found.stdout.strip().lower() in (asked, "default"), found


@each_book
def test_stored_outputs_come_out_again(book, seed, request):
    if seed != 1:
        pytest.skip("the stored outputs are those of seed 1")
    comparisons = request.getfixturevalue("comparisons")
    status, output = comparisons[book.name].result()
    assert status == 0, output[-6000:]


# The comparison itself


def test_comparison_sees_what_matters(tmp_path):
    cells = [  # code, stored output, whether they agree
        ("print('sparsity 87.5 %')", "sparsity 87.5 %\n", True),
        ("print('sparsity 87.5 %')", "sparsity 87.4 %\n", False),
        (
            "import sys\nprint('noise', file=sys.stderr)\nprint('loss ≈2.8912, in ≈12 s')",
            "loss ≈2.9e-05, in ≈3 s\n",
            True,
        ),
        ("print('loss ≈2.8912 in 12 s')", "loss ≈2.8912 in 3 s\n", False),
        ("print(1)\n1 / 0", "1\n", False),
    ]
    made = [
        new_code_cell(code, outputs=[new_output("stream", name="stdout", text=stored)], execution_count=1)
        for code, stored, _ in cells
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=made, metadata={"kernelspec": kernel}), tmp_path / "a.ipynb")
    status, output = compare(tmp_path / "a.ipynb", {})
    failed = [int(number) for number in re.findall(r"^FAILED .*::Cell (\d+)", output, re.MULTILINE)]
    assert status == 1 and failed == [i for i, (_, _, same) in enumerate(cells) if not same], output
