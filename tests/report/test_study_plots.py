"""The picture of Table 3 under both readings."""

import matplotlib as mpl

from replicate import paper
from replicate.report import study_plots as plots
from replicate.study import plans, statistics

mpl.use("agg")


def test_every_row_of_table_3_is_there_with_its_arms_and_the_paper_s_number(ax):
    arms = [arm for row in plots.ROWS.values() for arm in row.values()]
    assert {row["preset"] for row in paper.rows(3)} - {"dense"} <= set(arms)
    assert set(plans.SAME) <= set(arms) and len(set(arms)) == len(arms)
    costs = {arm: statistics.summary([0.01 * i, 0.012 * i + 0.001]) for i, arm in enumerate(arms, 1)}
    plots.draw_readings(ax, costs, {"w1": 0.026}, title="t")
    assert [label.get_text() for label in ax.get_yticklabels()] == list(plots.ROWS)
    drawn = {round(float(bar[0].get_xdata()[0]), 9) for bar in ax.containers}
    assert drawn == {round(stats.mean, 9) for stats in costs.values()}
    assert [0.026, 0.026] in [list(line.get_xdata()) for line in ax.lines]
    assert "as printed" in " ".join(ax.get_legend_handles_labels()[1])


def test_an_arm_that_was_not_run_is_left_out(ax):
    plots.draw_readings(ax, {"w1": statistics.summary([0.2])}, {})
    assert len(ax.containers) == 1
