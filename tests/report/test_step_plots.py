"""Pictures of the measured step: what is drawn is what the records say."""

import numpy as np
import pytest

from replicate.bench import step
from replicate.report import step_plots, step_table
from replicate.study import statistics
from replicate.training import flops


@pytest.fixture(scope="module")
def steps():
    return {preset: step_table.recorded(preset) for preset in ("llama1b", "llama7b")}


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
    assert texts(ax) == ["the paper\nr = 0.75", "1B\nr = 0.40"]


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
