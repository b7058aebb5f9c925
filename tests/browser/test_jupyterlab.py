"""The notebooks in JupyterLab, as people use them: Run All, an exercise, a slider, an interrupt."""

import json
import re

import pytest

from replicate.report import notebooks
from replicate.system import paths

MINUTE = 60_000  # milliseconds, playwright's unit

# Of the notebook that is in front: its cells as the page holds them, whether or not they are in view.
CELLS = """() => jupyterapp.shell.currentWidget.content.model.sharedModel.cells.map(cell => ({
    type: cell.cell_type, source: cell.source, count: cell.execution_count, state: cell.executionState,
    outputs: cell.outputs ?? []}))"""
IDLE = "() => jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
ACTIVE = "() => jupyterapp.shell.currentWidget.content.activeCellIndex"
SHOW = """place => { const book = jupyterapp.shell.currentWidget.content;
    book.activeCellIndex = place; book.deselectAll(); return book.scrollToItem(place, 'center'); }"""


class Lab:
    """One notebook, open in JupyterLab."""

    def __init__(self, page, address, name):
        self.page = page
        page.goto(f"{address}/lab/tree/notebooks/{name}.ipynb?reset")
        page.wait_for_selector(".jp-Notebook", timeout=2 * MINUTE)
        page.wait_for_function(IDLE, timeout=2 * MINUTE)
        self.menu("Edit", "Clear Outputs of All Cells")
        self.wait("cells.every(cell => cell.count == null)")

    def menu(self, name, entry):
        """Choose an entry of a menu, as a hand does."""
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{name}$")).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}$")).click()

    def wait(self, condition, minutes=5):
        """Until this holds of the code cells, `cells`."""
        settled = (
            f"() => {{ const cells = ({CELLS})().filter(cell => cell.type === 'code'); return {condition}; }}"
        )
        self.page.wait_for_function(settled, timeout=minutes * MINUTE)

    def run_all(self):
        """Run All Cells, by the menu, and wait for the last."""
        self.menu("Run", "Run All Cells")
        self.wait("cells.every(cell => cell.count != null && cell.state !== 'running')")

    def run_above(self, text):
        """Run the first cell that holds `text` and all above it, and wait for it."""
        self.show(text)
        self.menu("Run", "Run All Above Selected Cell")
        self.run(text)

    def cells(self):
        """Source, count, state and outputs of the code cells."""
        return [cell for cell in self.page.evaluate(CELLS) if cell["type"] == "code"]

    def outputs(self, text):
        """Outputs of the cell that holds `text`, as text."""
        found = self.cell(text)["outputs"]
        return ["".join(o.get("text", "")) or "\n".join(o.get("traceback", ())) for o in found]

    def place(self, text):
        """Position among all cells of the one that holds `text`."""
        sources = [cell["source"] for cell in self.page.evaluate(CELLS)]
        return next(place for place, source in enumerate(sources) if text in source)

    def show(self, text):
        """The cell that holds `text`, brought into view and made the active one."""
        self.page.evaluate(SHOW, self.place(text))
        cell = self.page.locator(".jp-Notebook-cell.jp-mod-active")
        cell.wait_for(timeout=MINUTE)
        return cell

    def start(self, text, source=None):
        """Run the cell that holds `text` by Shift+Enter, after writing `source` into it."""
        place = self.place(text)
        for _ in range(10):  # on a busy machine the page may move between aiming and clicking
            self.show(text).locator(".cm-content").click()
            if self.page.evaluate(ACTIVE) == place:
                break
            self.page.wait_for_timeout(1000)
        if source is not None:
            self.page.keyboard.press("Control+a")
            self.page.keyboard.insert_text(source)
        self.page.keyboard.press("Shift+Enter")

    def run(self, text, source=None):
        """`start`, and wait for the end."""
        before = self.cell(text)["count"]
        self.start(text, source)
        self.wait_for(text, f"cell.count != null && cell.count !== {before or 0} && cell.state !== 'running'")

    def cell(self, text):
        """The first code cell that holds `text`."""
        return next(cell for cell in self.cells() if text in cell["source"])

    def wait_for(self, text, condition):
        """Until this holds of the cell that holds `text`, `cell`."""
        self.wait(
            f"[cells.find(cell => cell.source.includes({json.dumps(text)}))].every(cell => {condition})"
        )


@pytest.fixture
def page(chromium):
    page = chromium.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(MINUTE)
    yield page
    page.close()


def code(book):
    return [cell for cell in book.content["cells"] if cell["cell_type"] == "code"]


def images(cells):
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])


@pytest.mark.parametrize("book", notebooks.select(notebooks.discover(), ["00", "01"]), ids=lambda b: b.number)
def test_run_all_ends_without_an_error(page, lab, screenshot, book):
    stored = code(book)
    opened = Lab(page, lab, book.name)
    opened.run_all()
    cells = opened.cells()
    assert [cell["count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    said = "".join(output.get("text", "") for output in outputs if output.get("name") == "stderr")
    assert not re.search("Warning|Traceback", said), said  # progress is written there too
    assert images(cells) == images(stored) > 0
    screenshot(page, f"lab_{book.number}")


TOUCH = "chapter.touch("
TOUCHED = [book for book in notebooks.discover() if any(TOUCH in notebooks.source(c) for c in code(book))]


@pytest.mark.parametrize("book", TOUCHED, ids=lambda book: book.number)
def test_a_control_draws_anew(page, lab, screenshot, book):
    """The first slider or list of a chapter, and its button if it has one: another value, another picture."""
    opened = Lab(page, lab, f"{book.number}_touched")
    opened.run_above(TOUCH)
    cell = opened.show(TOUCH)
    drawn, handle = cell.locator(".widget-output"), cell.locator(".noUi-handle").first
    menu, button = cell.locator(".widget-dropdown select").first, cell.locator(".widget-interact button")
    cell.locator(".widget-interact").first.wait_for()
    readout = cell.locator(".widget-readout").first

    def seen():
        value = readout.inner_text() if handle.count() else menu.input_value()
        return value, drawn.inner_html()

    before = seen()
    for _ in range(60):  # JupyterLab may still lay out the page, and a slider that is drawn anew loses a key
        if handle.count():
            handle.press("ArrowRight")
        else:
            menu.select_option(index=1)
        if button.count():
            button.click()
        page.wait_for_timeout(1000)
        now = seen()
        if now[1] != before[1] and now[0] != before[0]:
            break
    screenshot(page, f"lab_touched_{book.number}")
    state = page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.status")
    assert now[0] != before[0], f"the value stayed at {now[0]} (kernel {state})"
    assert now[1] != before[1], f"{before[0]} became {now[0]}, and the picture stayed (kernel {state})"
    assert "Error" not in drawn.inner_text()


def test_an_exercise_names_the_mistake_and_then_says_right(page, lab, screenshot):
    name, check = "01.1", 'exercises.check("01.1"'
    (solutions,) = notebooks.select(notebooks.discover(paths.NOTEBOOKS / "solutions"), ["01"])
    sources = [notebooks.source(cell) for cell in solutions.content["cells"]]
    right = next(source for source in sources if check in source)
    wrong = f"def two_of_four(w, dim):\n    return w\n\n\n{check}, two_of_four)"
    opened = Lab(page, lab, "01_exercise")
    for source in (None, wrong, right):
        opened.run(check, source if source is None else f"import exercises\nimport torch\n\n{source}")
        said = "".join(opened.outputs(check))
        verdict = {None: "not answered yet", wrong: "not yet. ", right: "right"}[source]
        assert said.startswith(f"{name}: {verdict}"), said
        screenshot(page, f"lab_exercise_{verdict.split()[0]}_{len(said)}")


def test_an_interrupt_is_one_line_and_the_cell_runs_again(page, lab, screenshot):
    training = 'arms = ["dense", "venom16"'
    opened = Lab(page, lab, "05_the_neuron_level_router")
    opened.run('profile = "smoke"', 'profile = "smoke"\nseed = 3')  # no other test has trained it
    opened.run("chapter.begin(")
    opened.start(training)
    opened.wait_for(training, "cell.outputs.length > 0")
    page.wait_for_timeout(3000)
    opened.menu("Kernel", "Interrupt Kernel")
    opened.wait_for(training, "cell.state !== 'running'")
    said = "".join(opened.outputs(training))
    assert "Interrupted. Run the cell again" in said and "Traceback" not in said
    screenshot(page, "lab_interrupt")
    opened.run(training)
    assert "share of zeros" in "".join(opened.outputs(training))
