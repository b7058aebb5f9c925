"""docs/teaching.md: a lecturer finds goals, a lecture whose slides are there, quiz and projects, all true."""

import json
import re

import numpy as np
import pytest
import torch

from replicate import paper
from replicate.report import notebooks, pages, readme_page, study_tables
from replicate.sparsity import mask24, prune24, soft_threshold24
from replicate.study import statistics
from replicate.system import paths
from replicate.training import flops

PAGE = pages.PAGES["teaching"]
TEXT = PAGE.path.read_text(encoding="utf-8")
BOOKS = {book.number: book for book in notebooks.discover()}


def section(title):
    """The text below a heading of the second level."""
    return re.search(rf"(?ms)^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT)[1]


def rows(title):
    """The cells of the tables in a section, without heads."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = [i - 1 for i, row in enumerate(cells) if set("".join(row)) <= set("-: ")]
    return [row for i, row in enumerate(cells) if i not in heads and i - 1 not in heads]


LECTURE = {row[1]: row for row in rows("A lecture of 90 minutes")}


def slides(book):
    """The tags that make slides, cell by cell, none left out."""
    found = [set(notebooks.tags(cell)) & set(notebooks.SLIDE_TYPES) for cell in book.content["cells"]]
    return [tags.pop() for tags in found if tags]


def test_every_chapter_has_a_goal():
    goals = dict(rows("What they can do afterwards"))
    assert list(goals) == [f"[{number}](../notebooks/{book.path.name})" for number, book in BOOKS.items()]
    assert all(len(goal) > 40 for goal in goals.values())


def test_the_lecture_takes_90_minutes_and_the_lab_three_hours():
    assert list(LECTURE) == ["02", "01", "03", "04", "05", "10"]
    assert sum(int(row[0]) for row in LECTURE.values()) == 90
    assert sum(int(row[0]) for row in rows("A lab session of three hours")) == 180


@pytest.mark.parametrize("number", LECTURE)
def test_the_slides_of_the_lecture_are_there(number):
    minutes, _, count, *_ = LECTURE[number]
    tags = slides(BOOKS[number])
    assert tags[0] == "slide", "the first tagged cell begins a slide"
    assert tags.count("slide") == int(count)
    assert 1.5 <= int(minutes) / int(count) <= 2, "minutes a slide"


@pytest.mark.parametrize("number", LECTURE)
def test_each_section_of_the_lecture_is_on_a_slide(number):
    cells = BOOKS[number].content["cells"]
    heads = [  # (heading, index of its cell)
        (head, i)
        for i, cell in enumerate(cells)
        if cell["cell_type"] == "markdown"
        for head in re.findall(r"(?m)^##+ (.+)$", notebooks.source(cell))
    ]
    for name in LECTURE[number][3].split("; "):
        first = next((i for head, i in heads if head.startswith(name)), None)
        assert first is not None, f"chapter {number} has no section {name!r}"
        end = min([i for _, i in heads if i > first], default=len(cells))
        assert any(set(notebooks.tags(cell)) & set(notebooks.SLIDE_TYPES) for cell in cells[first:end]), name


def test_other_chapters_have_no_slides():
    assert not [number for number, book in BOOKS.items() if number not in LECTURE and slides(book)]


def test_ten_questions_have_answers():
    text = section("Ten quiz questions")
    questions = re.split(r"(?m)^\*\*\d+\.\*\* ", text)[1:]
    assert re.findall(r"(?m)^\*\*(\d+)\.\*\* ", text) == [str(i) for i in range(1, 11)]
    for question in questions:
        asked, answer = re.fullmatch(
            r"(.+?)\n\n<details><summary>Answer</summary>\n\n(.+?)\n\n</details>\n*", question, re.DOTALL
        ).groups()
        assert "?" in asked and len(answer) > 40


def test_the_answers_are_right():
    text = section("Ten quiz questions")
    group = torch.tensor([[3.0, 0, 0, -1, 0, 2, 5, 1], [0, 0, 4, 4, 7, 0, 0, 0]])
    assert (prune24(group) == group).all(1).tolist() == [False, True]
    assert f"`[{_row(prune24(group)[0, :4])} | {_row(prune24(group)[0, 4:])}]`" in text
    weights = torch.tensor([3.0, -1, 2, -4])
    assert f"`{_row(prune24(weights))}`" in text and f"`{_row(soft_threshold24(weights))}`" in text
    before, after = (torch.tensor([3.0, -1, w, -4]) for w in (2.999, 3.001))
    assert mask24(before).tolist() == [True, False, False, True]
    assert mask24(after).tolist() == [False, False, True, True]
    assert (soft_threshold24(after) - soft_threshold24(before)).abs().max() < 0.01
    step = 1 / (0.65 + 0.35 / 1.9)
    for part in (
        f"= {step:.2f} times",
        f"= {1 / 0.65:.2f} times",
        f"= {flops.run_speedup(0.5, step):.2f} times",
    ):
        assert part in text
    assert f"about {6 * 2 * 1024 * 4096 / 1e6:.0f} million" in text
    shares = {size: flops.honest_share(paper.model(size)) for size in ("1B", "7B")}
    assert ", ".join(f"{r:.0%}" for r in shares.values()) == "42%, 53%" and "42 % (1B) and 53 % (7B)" in text
    gaps = statistics.summary([0.02, 0.03, 0.07])
    assert f"{gaps.std:.4f}" in text and f"t = {statistics.t_quantile(2):.3f}" in text
    assert f"{gaps.low:.3f} to {gaps.high:.3f}" in text


def _row(values):
    return " ".join(f"{value:g}" for value in (values + 0.0).tolist())


def test_there_are_six_projects_with_their_hours():
    projects = re.findall(r"(?m)^(\d)\. \*\*.+$", section("Six projects"))
    assert projects == list("123456")
    hours = re.findall(r"(?m)^\d\. .+(\d+ runs|No training): .*(?:CPU|GPU) hour", section("Six projects"))
    assert len(hours) == 6


def test_hours_follow_from_the_records():
    seconds = [record.seconds for record in study_tables.runs("gpu40m")["record"]]
    assert readme_page.value("minutes gpu40m") == f"{np.median(seconds) / 60:.1f}"
    assert readme_page.value("hours gpu40m 15") == f"{np.median(seconds) * 15 / 3600:.1f}"
    devices = {record.device[:3] for record in study_tables.every_run("laptop")["record"]}
    assert devices == {"CPU", "NVI"} and study_tables.run_seconds("laptop") > 100, "a CPU's alone"
    assert readme_page.value("minutes") == readme_page.value("days gpu 3") == ""


def test_the_container_installs_as_a_newcomer_does():
    container = json.loads((paths.ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert container["postCreateCommand"] == "python3 reproduce.py install"
    assert container["forwardPorts"] == [8888] and re.search(r"python:3\.1[12]$", container["image"])


def test_both_licences_are_named():
    licence = (paths.ROOT / "LICENSE-text").read_text(encoding="utf-8")
    assert "https://creativecommons.org/licenses/by/4.0/legalcode" in licence
    for page in ("README.md", "docs/teaching.md"):
        assert "LICENSE-text)" in (paths.ROOT / page).read_text(encoding="utf-8")
