"""Pictures of the measured step: what is drawn is what the records say."""

import numpy as np
import pandas as pd
import pytest

from replicate.bench import step
from replicate.report import step_plots, step_table
from replicate.study import statistics
from replicate.training import flops


@pytest.fixture(scope="module")
def steps():
    return {preset: step_table.recorded(preset) for preset in ("llama1b", "llama7b")}


@pytest.fixture(scope="module")
def records():
    return step_table.models()


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_depths_lie_on_the_line_that_composes_the_model(ax, steps):
    step_plots.draw_depths(ax, steps["llama7b"], ("dense", "recipe"))
    line, points = ax.lines[:2]
    at = np.interp(points.get_xdata(), line.get_xdata(), line.get_ydata())
    assert points.get_ydata() == pytest.approx(at, rel=0.01)
    with pytest.raises(ValueError, match="llama1b was timed whole"):
        step_plots.draw_depths(ax, steps["llama1b"], ("dense",))


def test_bars_start_at_dense_and_say_their_speed(ax):
    step_plots.draw_speeds(ax, {"1B": {"recipe": 1.25}, "7B": {"recipe": 0.9}}, {"1B": "C0", "7B": "C1"})
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [(1, 0.25), (1, pytest.approx(-0.1))]
    assert texts(ax) == ["1.25", "0.90"]


@pytest.mark.parametrize("preset", ["llama1b", "llama7b"])
def test_the_parts_fill_every_step(ax, steps, preset):
    step_plots.draw_parts(ax, steps[preset], ("recipe",))
    times = step.step_times(steps[preset])
    parts, sparse = zip(*((bar.get_width() for bar in bars) for bars in ax.containers), strict=True)
    assert sum(parts) == pytest.approx(times[step.baseline(times)]["ms"])
    assert sum(sparse) == pytest.approx(times["recipe"]["ms"], rel=0.05)  # parts timed alone
    (free,) = {*ax.lines[0].get_xdata()}
    assert free == pytest.approx(sum(parts) - parts[list(step_plots.PART_COLOURS).index("ffn")])


def test_amdahl_draws_the_law_and_the_points(ax):
    step_plots.draw_amdahl(ax, {"the paper": 0.75, "1B": 0.4}, {"1B": {"recipe": (2.0, 1.2)}}, {"1B": "o"})
    paper, curve, point = ax.lines
    for line, r in ((paper, 0.75), (curve, 0.4)):
        assert line.get_ydata()[-1] == pytest.approx(flops.run_speedup(r, line.get_xdata()[-1]))
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (2.0, 1.2)
    assert texts(ax) == ["the paper: r = 0.75", "1B: r = 0.40"]


def test_the_frontier_shows_every_point_and_the_dense_line(ax):
    gap = statistics.summary([0.04, 0.05, 0.06])
    step_plots.draw_frontier(ax, {"figure 4d": (1.3, gap, "venom16")}, (np.array([1, 2]), np.array([0, 0.2])))
    assert texts(ax) == ["figure 4d"]
    assert ax.lines[0].get_label() == "dense, stopped early"
    left, right = ax.get_xlim()
    low, high = ax.get_ylim()
    assert left < 1 and right > 1.3 and low < 0 and high > gap.high
    assert not ax.containers[0].has_xerr


def test_the_frontier_shows_the_error_of_the_timing(ax):
    points = {"a": (1.3, statistics.summary([0.04, 0.06]), "venom16")}
    step_plots.draw_frontier(ax, points, (np.array([1, 2]), np.array([0, 0.2])), {"a": (1.25, 1.4)})
    bars = [segment for line in ax.containers[0].lines[2] for segment in line.get_segments()]
    assert [1.25, 1.4] in [sorted(segment[:, 0].tolist()) for segment in bars]


@pytest.mark.parametrize("preset", ["llama1b", "llama7b"])
def test_the_ranges_of_a_speed_hold_it(preset):
    ranges = step_table.speed_ranges(preset)
    for arm, x in step_table.speeds(preset).items():
        low, high = ranges[arm]
        assert low <= x <= high and high / low < 1.1


def test_the_ranges_are_those_of_the_timings():
    record = step_table.recorded("llama1b")
    times = step.step_times(record)
    dense, sparse = times[step.baseline(times)], times["recipe"]
    low, high = step_table.speed_ranges("llama1b")["recipe"]
    assert low <= dense["ms_p10"] / sparse["ms_p90"] < dense["ms_p90"] / sparse["ms_p10"] <= high


def test_labels_of_what_is_above_the_line_stand_left():
    gap, early = statistics.summary([0.04, 0.05, 0.06]), (np.array([1, 2]), np.array([0, 0.2]))
    points = {"above": (1.1, gap, "venom16"), "below": (1.8, gap, "venom32")}
    for ax in step_plots.loss_and_time({"1B": points, "7B": points}, early, "10M").axes:
        assert [text.get_ha() for text in ax.texts] == ["right", "left"]


def test_the_pictures_of_notebook_10_draw_its_tables(records):
    law = step_table.law(records)
    lines = step_plots.amdahl(records).axes[0].lines
    drawn = sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in lines if len(line.get_xdata()) == 1)
    found = [
        pair
        for model in records
        for pair in zip(law[f"{model}: layer"], law[f"{model}: step measured"], strict=True)
    ]
    assert np.array(drawn) == pytest.approx(np.array(sorted(found)))
    runs = step_table.three_ways(records).set_index(["format", "model", "way"])
    for ax, model in zip(step_plots.three_ways(records).axes, records, strict=True):
        for line, way in zip(ax.lines, step_table.WAYS, strict=False):
            row = runs.loc[("algorithms 1, 2, 4 of 16", model, way)]
            assert list(line.get_ydata())[1:] == [row[mix] for mix in step_table.table4_mixes()]
    bars = step_plots.steps(records).axes[1].patches
    speeds = step_table.sparse_speeds(records)
    assert {round(1 + bar.get_width(), 9) for bar in bars} >= {round(x, 9) for x in speeds["7B"].values()}
    assert len(step_plots.parts(records).axes) == 2
    title = step_plots.widths(pd.DataFrame(step_table.widths())).axes[0].get_title()
    assert title.startswith("A sparse step pays from d_model 1024 on")


def test_shares_and_steps_are_those_of_the_record(records):
    shares = step_table.shares(records)
    times = step.step_times(records["1B"])
    part = next(row for row in step_table.parts(records["1B"]) if row["arm"] == "dense")
    assert shares.loc["1B", "time, measured"] * times[step.baseline(times)]["ms"] == pytest.approx(
        part["ffn"]
    )
    table = step_table.steps(records).set_index(["model", "format"])
    assert table.loc[("1B", "dense, compiled"), "how"].startswith("p10 ")
    assert " a layer, within " in table.loc[("7B", "dense, compiled"), "how"]
    measured = step_table.law(records).set_index("format")["7B: step measured"]
    assert table.loc["7B"].loc[measured.index, "times as fast"].tolist() == pytest.approx(measured.tolist())
