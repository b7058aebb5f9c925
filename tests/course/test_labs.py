"""Labs are handed out and graded as a teacher does: solved, empty, imported, wrong in typical ways."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from typing import NamedTuple

import pytest

from replicate.system import locks
from replicate.system.paths import ROOT

pytest.importorskip("nbgrader")
from nbgrader.api import Gradebook

COURSE = ROOT / "course"
LABS = sorted(path.parent.name for path in (COURSE / "source").glob("*/*.ipynb"))
SOLUTION = re.compile(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", re.DOTALL)
HIDDEN = re.compile(r"### BEGIN HIDDEN TESTS\n(.*?)### END HIDDEN TESTS", re.DOTALL)
TASK = re.compile(r"## (\d+) · .+\n\n\*(\d+) points?, (\d+) minutes\*\n\n(?s:.{200,})")
MACHINE = {str(ROOT), str(Path.home()) + os.sep, sys.prefix, "site-packages", "ipykernel_"}
each_lab = pytest.mark.parametrize("lab", LABS)


class Task(NamedTuple):
    """A task of a lab: the cells from its statement to the next one."""

    name: str  # grade_id of the cell for the answer
    statement: str
    answer: str
    tests: dict[str, float]  # grade_id -> points
    hidden: str


def notebook(lab):
    (path,) = (COURSE / "source" / lab).glob("*.ipynb")
    return path


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def text(cell):
    return "".join(cell["source"])


def flags(cell):
    return cell["metadata"].get("nbgrader", {})


def tasks(lab):
    found, statement = [], ""
    for cell in cells(notebook(lab)):
        if cell["cell_type"] == "markdown":
            statement = text(cell)
        elif flags(cell).get("solution"):
            found.append(Task(flags(cell)["grade_id"], statement, text(cell), {}, ""))
        elif flags(cell).get("grade"):
            found[-1].tests[flags(cell)["grade_id"]] = flags(cell)["points"]
            found[-1] = found[-1]._replace(hidden=found[-1].hidden + "".join(HIDDEN.findall(text(cell))))
    return found


def mistakes(lab):
    """(what the package answers, {name: (task, code, part of the message)})."""
    module = importlib.import_module(f"course.wrong_labs.{lab}")
    return module.IMPORTED, module.WRONG


def submissions(lab):
    """Student -> {task: code}, mistake -> student. They share a notebook, one task of it stays right."""
    imported, wrong = mistakes(lab)
    shared = []
    for name, (task, _, _) in wrong.items():
        free = (names for names in shared if task not in [wrong[other][0] for other in names])
        room = next((names for names in free if len(names) < len(tasks(lab)) - 1), None)
        if room is None:
            shared.append(room := [])
        room.append(name)
    solved = {task.name: task.answer for task in tasks(lab)}
    students = {"solved": solved, "empty": {}, "imported": imported}
    for number, names in enumerate(shared):
        students[f"wrong{number}"] = solved | {wrong[name][0]: wrong[name][1] for name in names}
    return students, {name: f"wrong{number}" for number, names in enumerate(shared) for name in names}


def nbgrader(folder, *arguments, tries=3):
    """Run it as where its environment is active: it starts `alembic` by name."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    said = done.stdout + done.stderr
    if done.returncode and tries > 1 and "Address already in use" in said:
        # Another program took a kernel's port between its choice and its use. What is graded is kept.
        return nbgrader(folder, *arguments, tries=tries - 1)
    assert done.returncode == 0, said
    return said


class Graded(NamedTuple):
    """What a lab's folder holds after grading."""

    folder: Path
    points: dict[str, dict[str, float]]  # student -> grade_id -> points
    said: dict[str, dict[str, str]]  # student -> grade_id -> errors of the cell
    log: str


def grade(lab, folder):
    """Hands the lab out, hands it in answered in each way, grades it: Graded without its folder."""
    shutil.copytree(
        COURSE / "source" / lab, folder / "source" / lab, ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(COURSE / "nbgrader_config.py", folder)
    log = nbgrader(folder, "generate_assignment", lab)
    students, _ = submissions(lab)
    for student, answers in students.items():
        handed_in = folder / "submitted" / student / lab
        shutil.copytree(folder / "release" / lab, handed_in)
        path = handed_in / notebook(lab).name
        content = json.loads(path.read_text(encoding="utf-8"))
        for cell in content["cells"]:
            if flags(cell).get("grade_id") in answers:
                cell["source"] = answers[flags(cell)["grade_id"]]
        path.write_text(json.dumps(content), encoding="utf-8")
    log += nbgrader(folder, "autograde", lab)
    log += nbgrader(folder, "generate_feedback", lab)
    points = {}
    with Gradebook(f"sqlite:///{folder / 'gradebook.db'}") as book:
        for student in students:
            graded = book.find_submission_notebook(notebook(lab).stem, lab, student)
            points[student] = {grade.name: grade.score for grade in graded.grades}
    said = {}
    for student in students:
        path = folder / "autograded" / student / lab / notebook(lab).name
        said[student] = {
            flags(cell).get("grade_id", ""): " ".join(
                f"{output['ename']}: {output['evalue']}"
                for output in cell.get("outputs", ())
                if output["output_type"] == "error"
            )
            for cell in cells(path)
        }
    return points, said, log


class AllGraded(dict):
    """Lab -> Graded. Each lab is graded when it is first asked for, by one worker of pytest-xdist."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def __missing__(self, lab):
        folder, start = self.base / f"lab-{lab}", time.monotonic()
        kept = folder / "graded.json"
        with locks.one_of([f"{self.base.name}-{lab}"]):
            if not kept.exists():
                result = grade(lab, folder)
                kept.write_text(json.dumps(result), encoding="utf-8")
                minutes = (time.monotonic() - start) / 60
                print(f"\n{lab}: {len(result[0])} notebooks graded in {minutes:.1f} minutes")
        self[lab] = Graded(folder, *json.loads(kept.read_text(encoding="utf-8")))
        return self[lab]


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Lab -> what came of it. Without workers two labs are graded at a time; each notebook has a kernel."""
    base, alone = tmp_path_factory.getbasetemp(), "PYTEST_XDIST_WORKER" not in os.environ
    results = AllGraded(base if alone else base.parent)
    if alone:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(results.__getitem__, LABS))
    return results


def lost(lab, graded, student):
    """Tasks of which the student did not get all points."""
    points = graded[lab].points[student]
    return [task.name for task in tasks(lab) if any(points[test] < full for test, full in task.tests.items())]


@each_lab
def test_every_task_is_stated_solved_and_tested(lab):
    found = tasks(lab)
    assert len(found) >= 3
    for number, task in enumerate(found, 1):
        number_said, points, _ = TASK.match(task.statement).groups()
        assert int(number_said) == number, task.name
        assert int(points) == sum(task.tests.values()), task.name
        code = [line for region in SOLUTION.findall(task.answer) for line in region.splitlines()]
        assert any(line.strip() and not line.strip().startswith("#") for line in code), task.name
        assert '"""' in SOLUTION.sub("", task.answer), f"{task.name} has a docstring outside of its solution"
        assert task.hidden.strip(), f"{task.name} has hidden tests"


@each_lab
def test_the_first_cell_says_how_much_there_is_to_do(lab):
    first = text(cells(notebook(lab))[0])
    stated = [TASK.match(task.statement).groups() for task in tasks(lab)]
    rows = re.findall(r"(?m)^\| (\d+) \| .+ \| (\d+) \| (\d+) \|$", first)
    assert rows == stated
    total = [sum(int(row[i]) for row in rows) for i in (1, 2)]
    assert f"| **{total[0]}** | **{total[1]}** |" in first
    assert "`replicate`" in first and "no points" in first, (
        "importing the answer earns nothing, and it says so"
    )


@each_lab
def test_cells_are_marked_as_nbgrader_reads_them(lab):
    marked = [flags(cell) for cell in cells(notebook(lab)) if flags(cell)]
    assert all(flag["schema_version"] == 3 for flag in marked)
    names = [flag["grade_id"] for flag in marked]
    assert len(names) == len(set(names))
    assert all(flag["locked"] != flag["solution"] for flag in marked), "students change answers alone"
    assert all(not (flag["grade"] and flag["solution"]) for flag in marked), "nothing to grade by hand"


@each_lab
def test_a_lab_needs_nothing_but_its_folder(lab):
    folder = COURSE / "source" / lab
    for path in [*folder.glob("*.py"), *folder.glob("*.ipynb")]:
        code = path.read_text(encoding="utf-8")
        assert not re.search(r"(from|import) (replicate|exercises)\b", code), path


def test_what_labs_share_is_the_same_file():
    shared = {path.read_bytes() for path in (COURSE / "source").glob("*/marking.py")}
    assert len(shared) == 1


@each_lab
def test_typical_mistakes_are_written_down(lab):
    imported, wrong = mistakes(lab)
    names = [task.name for task in tasks(lab)]
    assert list(imported) == names
    assert len(wrong) >= 3 and {task for task, _, _ in wrong.values()} <= set(names)


@each_lab
def test_what_is_handed_out_has_no_solution(lab, graded):
    release = graded[lab].folder / "release" / lab
    out = "\n".join(
        path.read_text(encoding="utf-8") for path in release.rglob("*") if path.suffix != ".ipynb"
    )
    handed_out = cells(release / notebook(lab).name)
    out += "\n".join(text(cell) for cell in handed_out)
    assert "BEGIN" not in out and out.count("raise NotImplementedError()") >= len(tasks(lab))
    assert not any(cell.get("outputs") for cell in handed_out)
    lines = {line.strip() for line in out.splitlines()}
    for task in tasks(lab):
        for line in map(str.strip, "".join(SOLUTION.findall(task.answer)).splitlines()):
            assert len(line) < 25 or line not in lines, f"{task.name}: {line}"
        assert task.hidden not in out, task.name


@each_lab
def test_the_solution_gets_all_points(lab, graded):
    assert lost(lab, graded, "solved") == []
    assert not "".join(graded[lab].said["solved"].values())


@each_lab
@pytest.mark.parametrize("student", ["empty", "imported"])
def test_no_points_without_own_work(lab, student, graded):
    assert set(graded[lab].points[student].values()) == {0.0}
    said = graded[lab].said[student]
    for task in tasks(lab):
        for test in task.tests:
            assert "Timeout" not in said[test] and "replicate" * (student == "imported") in said[test], said[
                test
            ]


@each_lab
def test_each_typical_mistake_is_named_and_costs_its_task_alone(lab, graded):
    _, wrong = mistakes(lab)
    _, students = submissions(lab)
    for name, (task, _, hint) in wrong.items():
        (of,) = (other for other in tasks(lab) if other.name == task)
        said = " ".join(graded[lab].said[students[name]][test] for test in of.tests)
        assert hint in said, f"{name}: {said}"
    for student in set(students.values()):
        made = {wrong[name][0] for name, by in students.items() if by == student}
        assert set(lost(lab, graded, student)) == made, student


@each_lab
def test_the_feedback_tells_points_and_mistakes(lab, graded):
    _, wrong = mistakes(lab)
    _, students = submissions(lab)
    folder = graded[lab].folder / "feedback"
    for name, (_, _, hint) in wrong.items():
        page = (folder / students[name] / lab / f"{notebook(lab).stem}.html").read_text(encoding="utf-8")
        words = " ".join(unescape(re.sub(r"<[^>]+>", "", page)).split())
        assert " ".join(hint.split()) in words, name
    full = sum(points for task in tasks(lab) for points in task.tests.values())
    page = (folder / "solved" / lab / f"{notebook(lab).stem}.html").read_text(encoding="utf-8")
    assert f"(Score: {full:.1f} / {full:.1f})" in page


@each_lab
def test_nothing_names_this_machine(lab, graded):
    folder = graded[lab].folder
    for part in ("release", "feedback"):
        for path in (folder / part).rglob("*"):
            if path.is_file():
                content = path.read_bytes().decode("utf-8", errors="ignore")
                assert not [name for name in MACHINE | {str(folder)} if name in content], path


@each_lab
def test_a_teacher_sees_no_warning(lab, graded):
    noise = [line for line in graded[lab].log.splitlines() if re.search(r"WARN|ERROR|Error|Warning", line)]
    assert noise == []
