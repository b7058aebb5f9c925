"""Colours by meaning, files that are the same each time, numbers that say they are measured."""

import math
import re
from itertools import combinations

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbval_by_tokens import masked

from replicate import figures
from replicate.report import study_plots as plots
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.study.statistics import Stats, summary


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICATE_FIGURES", str(tmp_path))
    return tmp_path


def draw():
    figures.theme()
    fig, ax = plt.subplots()
    ax.plot(np.arange(5), np.arange(5) ** 2, label="dense", **figures.style("dense"))
    ax.set_title("tokens → loss")
    ax.legend()
    return fig


def test_save_writes_png_and_svg_with_the_same_bytes_each_time(folder):
    contents = []
    for _ in range(2):
        fig = draw()
        figures.save(fig, "03_loss")
        plt.close(fig)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert sorted(contents[0]) == ["03_loss.png", "03_loss.svg"]
    assert contents[0] == contents[1]
    svg = contents[0]["03_loss.svg"].decode()
    assert "tokens → loss" in svg and not re.search(r"<dc:date>|matplotlib\.org", svg)


def test_png_has_150_dots_an_inch(folder):
    figures.save(draw(), "a")
    height, width, _ = plt.imread(folder / "a.png").shape
    assert (width, height) == (round(7.0 * 150), round(4.2 * 150))


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "a.png", "-a"])
def test_bad_names_are_refused(folder, name):
    with pytest.raises(ValueError, match="figure name"):
        figures.save(plt.figure(), name)
    with pytest.raises(ValueError, match="figure name"):
        figures.save_table(pd.DataFrame({"a": [1]}), name)
    assert not list(folder.iterdir())


def luminance(colour):
    r, g, b = mpl.colors.to_rgb(colour)
    return 0.2126 * r**2.2 + 0.7152 * g**2.2 + 0.0722 * b**2.2


def test_colours_differ_from_each_other_and_from_paper_white():
    for one, other in combinations(figures.PALETTE.values(), 2):
        distance = math.dist(mpl.colors.to_rgb(one), mpl.colors.to_rgb(other))
        assert distance > 0.25, (one, other)
    for name, colour in figures.PALETTE.items():
        assert luminance(colour) < 0.6, name
    assert len(set(figures.MARKERS.values())) == len(figures.PALETTE)


def test_every_preset_has_a_style():
    for name in SPARSITY_PRESETS:
        assert set(figures.style(name)) == {"color", "marker", "linestyle"}
    expected = {
        "dense": "dense", "w1+w2+t": "2:4 weights", "act24": "2:4 activations",
        "act24+wgrad": "2:4 activations", "venom32": "venom", "recipe64": "recipe", "static16": "control",
        "no-mask-reuse": "control", "paper": "paper",
    }  # fmt: skip
    assert {name: figures.family(name) for name in expected} == expected
    with pytest.raises(ValueError, match="'recip' has no colour"):
        figures.style("recip")


def test_table_keeps_full_precision_in_csv_and_rounds_in_markdown(folder):
    table = pd.DataFrame({"arm": ["dense", "a|b"], "loss": [2.123456789, float("nan")], "steps": [60000, 7]})
    figures.save_table(table, "t", columns={"steps": lambda n: f"{n:,}"})
    assert (folder / "t.csv").read_bytes() == b"arm,loss,steps\ndense,2.123456789,60000\na|b,,7\n"
    lines = (folder / "t.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert cells[0] == ["arm", "loss", "steps"]
    assert cells[2:] == [["dense", "2.123", "60,000"], [r"a\|b", "", "7"]]
    assert "\r" not in (folder / "t.md").read_text(encoding="utf-8")


def test_a_named_index_is_a_column(folder):
    figures.save_table(pd.DataFrame({"x": [1]}, index=pd.Index(["r"], name="row")), "t")
    assert (folder / "t.csv").read_text() == "row,x\nr,1\n"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((2.7581,), "≈2.76"),
        ((2.7581, 5), "≈2.7581"),
        ((-0.000123,), "≈-0.000123"),
        ((1234567.0,), "≈1.23e+06"),
        ((0.021, 2, 0.0042), "≈0.021 ± 0.0042"),
        ((float("nan"),), "≈nan"),
        ((None,), "not run"),
    ],
)
def test_about(args, text):
    assert figures.about(*args) == text


@settings(max_examples=40, deadline=None)
@given(
    st.floats(allow_infinity=False),
    st.floats(allow_infinity=False),
    st.none() | st.floats(0, 1e6),
    st.integers(1, 6),
)
def test_the_notebook_tests_mask_measured_numbers_and_nothing_else(one, other, spread, digits):
    frame = "loss {} nats |  7.5 | {}<td>"
    texts = [
        masked(frame.format(figures.about(v, digits, spread), v2)) for v, v2 in ((one, "a"), (other, "a"))
    ]
    assert texts[0] == texts[1]
    assert texts[0] == "loss ≈# nats | 7.5 | a<td>"


@pytest.mark.parametrize(
    "text", ["87.5 %, 60000 steps, -0.03", "0.2 ms, 3.1 tokens/s", "2026-11-25", "fresh, cached"]
)
def test_other_text_is_compared_as_it_is(text):
    assert masked(text) == text


def test_a_second_set_of_intervals_lies_below_the_first():
    fig, ax = plt.subplots()
    a, b = Stats(1.0, 0.3, 0.5, 1.5, 3), Stats(2.0, 0.1, 1.9, 2.1, 3)
    plots.draw_intervals(ax, {"a": a, "b": b})
    plots.draw_intervals(ax, {"a": summary([3.0]), "b": None}, shift=0.2, label="other")
    dots = [(x, y) for line in ax.lines if line.get_marker() == "o" for x, y in line.get_xydata().tolist()]
    assert dots[:3] == [(1.0, 0.0), (2.0, 1.0), (3.0, 0.2)] and math.isnan(dots[3][0]) and dots[3][1] == 1.2
    bars = [bar.get_segments() for bar in ax.collections]
    widths = [segment[1][0] - segment[0][0] for segments in bars for segment in segments if len(segment)]
    assert widths[:3] == pytest.approx([1.0, 0.2, 0.0])
    assert ax.get_legend_handles_labels()[1] == ["ours", "other"]
    plt.close(fig)


def test_a_measured_number_ends_where_its_digits_end():
    assert masked("≈0.012, then") == masked("≈6.7e-05, then") != masked("≈0.012 then")
    assert masked("≈1,234.5.") == masked("≈7 ± 0.2.")


def test_what_a_run_trained_stands_beside_what_is_tracked(folder):
    drawn = []

    def draw_studies(studies):
        drawn.append(list(studies))
        return draw()

    figures.both(
        draw_studies, "08_curves", recorded={"gpu": 1, "laptop": 2}, fresh={"smoke": 3}, alt="a line"
    )
    assert drawn == [["gpu", "laptop"], ["smoke"]]
    figures.both(draw_studies, "08_more", recorded={"gpu": 1}, fresh={}, alt="a line")
    figures.save_table(pd.DataFrame({"a": [1]}), "08_table", fresh=True)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.suffix != ".svg"}
    assert names == {"08_curves.png", "08_more.png"} | {
        f"fresh/{name}" for name in ("08_curves.png", "08_table.csv", "08_table.md")
    }


def test_a_picture_that_looks_the_same_is_left_as_it_is(folder):
    from PIL import Image

    path = folder / "03_loss.png"
    figures.save(draw(), "03_loss")
    picture = np.asarray(Image.open(path)).copy()
    for shade, stays in ((2, True), (40, False)):  # rounding on another processor; another picture
        picture[5, 5, 0] = 255 - shade
        Image.fromarray(picture).save(path)
        before = path.read_bytes()
        figures.save(draw(), "03_loss")
        assert (path.read_bytes() == before) == stays
