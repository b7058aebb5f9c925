"""The pictures of FLOPs, of Amdahl's law and of the audit show the numbers they are given."""

import pandas as pd
import pytest

from replicate.report import flop_plots
from replicate.training import flops


def widths(ax):
    """Total length of the bars by row."""
    return [sum(group[row].get_width() for group in ax.containers) for row in range(3)]


@pytest.mark.parametrize(("r", "v", "p"), [(0.42, 7, 0.5), (0.75, 8, 0.2), (0.3, 1, 0), (0.9, 16, 1)])
def test_bars_of_amdahls_law_are_its_formula(r, v, p):
    step = flops.step_speedup(r, v)
    ax = flop_plots.times(r, v, p).axes[0]
    assert widths(ax) == pytest.approx([1, 1 / step, 1 / flops.run_speedup(p, step)])


def test_ceilings_mark_what_the_paper_prints():
    fig = flop_plots.ceilings({"formula": 0.75}, 7, {"step": (8, 2.087)}, {"run": (0.5, 1.352)})
    for ax, point in zip(fig.axes, ((8, 2.087), (0.5, 1.352)), strict=True):
        assert point in [tuple(line.get_xydata()[0]) for line in ax.lines]


def test_shares_fill_the_bars():
    frame = pd.DataFrame({"1B": {"ffn": 0.5, "projections": 0.2, "scores": 0.2, "head": 0.1}})
    (ax,) = flop_plots.shares({"complete": frame}).axes
    assert sum(bars[0].get_height() for bars in ax.containers) == pytest.approx(100)


def test_the_map_has_a_line_for_each_printed_number():
    fig = flop_plots.run_map({"a": 1.3, "b": 1.35}, {"in": (0.75, 8)}, {"complete": (0.42, 7)})
    assert [text.get_text() for text in fig.axes[0].get_legend().get_texts()] == ["a", "b", "in", "complete"]
