"""Exercises: every chapter has some, each is solved, and each typical mistake gets its hint."""

import importlib
import re

import exercises
import nbclient
import nbformat
import pytest
import torch
from exercises import compare

from replicate.report import notebooks
from replicate.system import paths

BOOKS = notebooks.discover()
SOLUTIONS = {book.number: book for book in notebooks.discover(paths.NOTEBOOKS / "solutions")}
CHAPTERS = [book for book in BOOKS if exercises.named(book.number)]
STATEMENT = re.compile(r"### (\d\d\.\d) · .+\n\n\*(\d+) minutes, (easy|medium|hard)\*\n\n(?s:.{40,})")
each_chapter = pytest.mark.parametrize("book", CHAPTERS, ids=lambda book: book.number)


def wrong(number):
    """(exercise, wrong answer, part of the hint) of a chapter; tests/course/wrong_answers/chapter_NN.py."""
    return importlib.import_module(f"course.wrong_answers.chapter_{number}").WRONG


def checked(book):
    """Exercises that a notebook's cells check, in order."""
    cells = [notebooks.source(cell) for cell in book.content["cells"] if cell["cell_type"] == "code"]
    return [name for text in cells for name in re.findall(r'exercises\.check\("([^"]+)"', text)]


@each_chapter
def test_every_exercise_is_stated_checked_and_solved(book):
    names = exercises.named(book.number)
    assert 3 <= len(names) <= 5 or book.number == "00"
    texts = [notebooks.source(cell) for cell in book.content["cells"] if cell["cell_type"] == "markdown"]
    assert [match[1] for match in map(STATEMENT.match, texts) if match] == names
    assert checked(book) == names
    assert checked(SOLUTIONS[book.number]) == names
    assert f"](solutions/{SOLUTIONS[book.number].path.name})" in texts[-1]


@each_chapter
def test_run_all_says_that_nothing_is_answered_yet(book):
    said = "".join(
        "".join(output.get("text", ""))
        for cell in book.content["cells"]
        if cell["cell_type"] == "code" and "exercises.check" in notebooks.source(cell)
        for output in cell["outputs"]
    )
    assert said == "".join(f"{name}: not answered yet.\n" for name in exercises.named(book.number))


@each_chapter
def test_the_solutions_are_right(book, monkeypatch, tmp_path):
    where = {"REPLICATE_RUNS": str(tmp_path / "runs"), "REPLICATE_FIGURES": str(tmp_path / "figures")}
    for name, value in (notebooks.KERNEL_ENV | where).items():
        monkeypatch.setenv(name, value)
    path = SOLUTIONS[book.number].path
    content = nbformat.read(path, as_version=4)
    nbclient.execute(content, cwd=str(path.parent), kernel_name="python3", timeout=600)
    outputs = [output for cell in content.cells if cell.cell_type == "code" for output in cell.outputs]
    said = re.findall(r"(?m)^(\d\d\.\d): (\w+)", "".join(output.get("text", "") for output in outputs))
    assert said == [(name, "right") for name in exercises.named(book.number)]


@each_chapter
def test_the_solutions_have_their_outputs(book):
    """Whoever reads them without running them sees that they are right."""
    cells = [cell for cell in SOLUTIONS[book.number].content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells), "run: python -m replicate notebooks refresh"
    said = "".join("".join(out.get("text", "")) for cell in cells for out in cell["outputs"])
    assert re.findall(r"(?m)^(\d\d\.\d): right", said) == exercises.named(book.number)


@each_chapter
def test_each_typical_mistake_gets_its_hint(book, capsys):
    mistakes = wrong(book.number)
    for name in exercises.named(book.number):
        assert sum(name == other for other, _, _ in mistakes) >= 2, f"{name} needs two typical mistakes"
    for name, answer, hint in mistakes:
        exercises.check(name, answer)
        said = capsys.readouterr().out
        assert said.startswith(f"{name}: not yet. ") and hint in said, said


@each_chapter
def test_no_answer_is_no_mistake(book, capsys):
    for name in exercises.named(book.number):
        for answer in (None, ...):
            exercises.check(name, answer)
            assert capsys.readouterr().out == f"{name}: not answered yet.\n"


def test_an_unknown_exercise_is_named():
    with pytest.raises(ValueError, match=r"no exercise '01\.77'; there are 01\.1"):
        exercises.check("01.77")
    with pytest.raises(ValueError, match=r"such as 05\.2"):
        exercises.check("first")


@pytest.mark.parametrize(
    "answer, hint",
    [
        ("many", "The answer is a number; this is a str"),
        (0.5, "forgot to square"),
        (25, "in percent; give the share, 0.25"),
        (-0.25, "the sign is not"),
        (0.26, "too large"),
    ],
)
def test_numbers(answer, hint):
    with pytest.raises(compare.Wrong, match=hint):
        compare.number(answer, 0.25, hints=[(0.5, "forgot to square")])


def test_tensors():
    right = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    compare.tensor(right.numpy(), right)
    compare.tensor(right.clone().requires_grad_(), right)
    for answer, hint in [
        (right.T, "transposed"),
        (right[0], r"shape is \(2,\); it should be \(2, 2\)"),
        (right + 1, r"index \[0, 0\] it is 2; it should be 1"),
        (right / 0, "not finite"),
        ("text", "The answer is a tensor; this is a str"),
    ]:
        with pytest.raises(compare.Wrong, match=hint):
            compare.tensor(answer, right, hints=[(right.T, "It is transposed.")])


def test_functions_get_copies_and_may_be_unanswered():
    given = torch.ones(3)
    assert compare.call(lambda x: x.zero_(), given).sum() == 0
    assert given.sum() == 3
    with pytest.raises(compare.NotAnswered):
        compare.call(lambda x: None, given)
    with pytest.raises(compare.Wrong, match="The answer is a function; this is a int"):
        compare.call(3, given)


def test_an_error_in_the_answer_is_told_and_stops_nothing(capsys):
    def fails(*arguments, **options):
        raise RuntimeError("boom")

    name = next(n for n, answer, _ in wrong("01") if callable(answer))
    exercises.check(name, fails)
    assert "not yet. Your function raised RuntimeError: boom" in capsys.readouterr().out


def test_an_exercise_has_one_check():
    exercises.named("01")
    with pytest.raises(ValueError, match="two checks"):
        exercises.exercise("01.1")(lambda answer: None)
