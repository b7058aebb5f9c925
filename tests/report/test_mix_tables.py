"""Runs that mix sparse and dense steps: what is compared, drawn and said in notebook 09."""

import numpy as np
import pandas as pd
import pytest

from replicate import paper
from replicate.report import chapter_values, mix_plots, mix_tables, notebooks
from replicate.report import study_tables as tables
from replicate.study import plans, results

SAME_HALF = "recipe, same, 50% sparse first"


@pytest.fixture(scope="module")
def recorded():
    return mix_tables.recorded()


def pretended(runs, arm, like, seeds=(1, 2, 3), shift=0.0):
    """The runs with one more arm, whose records are those of another."""
    more = runs[(runs["arm"] == like) & runs["seed"].isin(seeds)].assign(arm=arm)
    kept = runs[runs["arm"] != arm]
    return pd.concat([kept, more.assign(valid_loss=more["valid_loss"] + shift)])


def test_every_mix_is_an_arm_of_the_study():
    assert set(mix_tables.ARMS) <= set(plans.everything("gpu"))
    assert set(mix_tables.SMOKE) == set(mix_tables.plan("smoke", (1, 2)))
    assert not [arm for arm in mix_tables.plan("laptop", (1,)) if "same" in arm], (
        "nothing unrecorded is trained"
    )
    assert list(mix_tables.shares().values()) == pytest.approx([0, 1 / 2, 2 / 3, 5 / 6, 1])


def test_comparisons_are_paired_by_seed(recorded):
    runs = recorded["gpu"].pivot(index="seed", columns="arm", values="valid_loss")
    found = mix_tables.compare(recorded["gpu"])
    assert found["table4-recovers"].mean == pytest.approx((runs[tables.HALF] - runs["dense"]).mean())
    assert found["table4-helps"].mean == pytest.approx((runs["recipe"] - runs[tables.HALF]).mean())
    rises = runs[list(mix_tables.shares())].diff(axis=1).mean()
    assert found["figure5"].mean == pytest.approx(rises.min())
    without = recorded["gpu"].query("arm != 'recipe, 67% sparse first'")
    assert mix_tables.compare(without)["figure5"] is None
    assert mix_tables.above(without, "recipe, 67% sparse first") is None


def test_a_switch_is_where_the_phase_changes(recorded):
    steps, losses = mix_tables.switch_on("gpu", "recipe")
    config = plans.everything("gpu", (1,))["recipe"][0]
    record = tables.runs("gpu").query("arm == 'recipe'")["record"]
    first = np.mean([run.results["steps"]["loss"][config.dense_warmup] for run in record])
    assert losses[steps == 0] == pytest.approx(first) and losses[steps == 0] > losses[steps == -1] + 2
    start, gap = mix_tables.switch_off("gpu", recorded["gpu"], tables.HALF)
    assert len(gap) == config.steps and start == config.steps - 1400
    assert gap[start] > gap[start - 20 : start].max() + 2


def test_what_did_not_run_is_left_out(recorded):
    part = {"gpu": recorded["gpu"].query("not arm.str.contains('same')")}
    table = mix_tables.endings(part)
    assert set(table["reading"]) == {"backward as printed"} and "not run" not in set(table["gpu"])
    assert len(mix_plots.recovery(part).axes) == 1
    both = {"gpu": pretended(part["gpu"], SAME_HALF, tables.HALF)}
    assert len(mix_plots.recovery(both).axes) == 2
    assert len(mix_tables.endings(both)) == len(table) + 1
    axes = mix_plots.recovery({"laptop": recorded["laptop"].query("arm in ('dense', 'recipe')")} | part).axes
    assert [ax.get_title() for ax in axes] == ["gpu: backward as printed"], "no panel without a mix"


def test_endings_are_drawn_where_they_lie(recorded):
    fig = mix_plots.endings(recorded)
    for ax, (scale, runs) in zip(fig.axes, recorded.items(), strict=True):
        there = [arm for arm in mix_tables.ARMS[1:] if arm in set(runs["arm"])]
        drawn = sorted(float(bar[0].get_xdata()[0]) for bar in ax.containers)
        assert drawn == pytest.approx(sorted(mix_tables.above(runs, arm).mean for arm in there)), scale


def test_figure_5_has_all_accounts_and_only_whole_scales(recorded):
    fig = mix_plots.figure5(recorded)
    whole = [scale for scale, runs in recorded.items() if {*mix_tables.shares()} <= {*runs["arm"]}]
    assert [ax.get_title() for ax in fig.axes[1:]] == [f"Ours, {scale} scale" for scale in whole]
    for line, found in zip(fig.axes[0].lines, mix_tables.speeds().values(), strict=False):
        assert list(line.get_xdata()) == pytest.approx(list(found.values()))
    table = mix_tables.figure5(recorded)
    assert table["speed-up, the paper's count"].iloc[1] == f"{paper.rows(2)[1]['speedup']:.3f}"


def test_phases_and_switches_are_drawn(recorded):
    top, bars = mix_plots.phases().axes
    assert max(top.lines[0].get_ydata()) == pytest.approx(1)
    ends = [text.get_text() for text in bars.texts if text.get_text().endswith(" sparse")]
    assert ends == [
        "1,400 sparse",
        "1,867 sparse",
        "2,333 sparse",
        "2,800 sparse",
        "1,400 sparse",
        "1,400 sparse",
    ]
    on, off = mix_plots.switches("gpu", recorded["gpu"]).axes
    peaks = [max(line.get_ydata()) for line in on.lines[:6]]
    assert peaks == sorted(peaks, reverse=True), "the legend stands in the order of the lines"
    assert len(off.lines) == 5


@pytest.mark.parametrize(
    ("seeds", "shift", "says"),
    [
        ((1, 2, 3), 0.0, "too, a dense end"),
        ((1, 2, 3), -0.056, "include zero"),
        ((1, 2), 0.0, "first sign"),
    ],
)
def test_the_second_reading_is_said_as_far_as_it_ran(recorded, monkeypatch, seeds, shift, says):
    runs = pretended(recorded["gpu"], SAME_HALF, tables.HALF, seeds, shift)
    monkeypatch.setattr(mix_tables, "recorded", lambda: {"gpu": runs})
    assert says in chapter_values.second_reading()
    printed = recorded["gpu"].query("arm != @SAME_HALF")
    monkeypatch.setattr(mix_tables, "recorded", lambda: {"gpu": printed})
    assert chapter_values.second_reading().startswith("No mix of this kind is recorded yet")


def test_accuracy_is_above_dense_by_seed(recorded):
    answered = mix_tables.answered(recorded)
    assert "laptop" not in answered and set(answered["gpu"]["arm"]) == set(mix_tables.shares())
    table = mix_tables.accuracies(answered).query("scale == 'gpu'")
    gap = results.differences(answered["gpu"], column="accuracy")["recipe"]
    assert table["above dense"].iloc[-1] == tables.brief(gap)


def test_the_numbers_of_the_text_are_those_of_the_records(recorded):
    values = chapter_values.values()
    start, gap = mix_tables.switch_off("gpu", recorded["gpu"], tables.HALF)
    assert values["off gpu 50 %, 0"] == f"{gap[start]:.2f}" and values["dense end gpu 50 %"] == "1,400"
    assert all(values.values()), "an empty text is no number"
    book = notebooks.select(notebooks.discover(), ["09"])[0]
    assert (
        chapter_values.value(book, "all sparse, measured")
        == f"{mix_tables.speeds()['measured']['recipe']:.2f}"
    )
    assert chapter_values.value(book, "spike recipe, never") == ""
