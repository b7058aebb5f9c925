"""The pictures of notebook 12: what is drawn is what was recorded or computed."""

import math

import numpy as np
import pytest
import torch

from replicate import paper
from replicate.config import ModelConfig
from replicate.gpt import GPT
from replicate.paper import audit
from replicate.report import chapter_values, choice_plots, step_table, study_tables, time_to_loss
from replicate.study import plans, results
from replicate.study.statistics import Stats
from replicate.training import flops


def test_looking_keeps_more_than_guessing_and_less_than_the_best():
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=64, n_layer=2, d_model=32, d_ff=128, n_head=2, seq_len=32))
    text = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1))
    shares = choice_plots.kept_shares(model, text, [4, 8, 32], seed=1)
    assert list(shares.index) == [4, 8, 32]
    slack = 1e-6  # sums in float32, whose order hangs on the clusters and the processor
    assert (shares["router"] <= shares["own activations"] + slack).all()
    assert (shares["own activations"] <= shares["best"] + slack).all() and np.ptp(shares["best"]) < slack
    assert shares["own activations"].between(0.25, 1).all()
    fig = choice_plots.kept(shares, "t")
    assert list(fig.axes[0].lines[1].get_ydata()) == pytest.approx(100 * shares["router"])


def test_costs_stand_beside_the_papers(gpu):
    (ax,) = choice_plots.costs({"gpu": gpu}).axes
    gap = results.differences(gpu, column="final_loss")
    drawn = [bar[0].get_xdata()[0] for bar in ax.containers]
    assert drawn == pytest.approx([gap[arm].mean for arm in choice_plots.ARMS])
    assert study_tables.paper_costs()["venom16"] == pytest.approx(audit.table3_costs()["Venom"])
    assert [label.get_text() for label in ax.get_yticklabels()] == list(choice_plots.ARMS.values())


def test_speeds_are_those_of_the_step_and_the_layer():
    table = choice_plots.speeds().set_index("format")
    steps = step_table.speeds("llama1b")
    assert table.loc["by activations, 8 of 32 clusters", "step, 1B"] == steps["active16x32"]
    assert (table["layer, 7B"] > 1).all()


def test_the_switch_is_where_the_plan_has_it(gpu):
    assert choice_plots.switch_steps(gpu) == (200, 1600)  # 200 dense steps, then half of 2800
    (ax,) = choice_plots.switch("gpu", gpu).axes
    assert {text.get_text() for text in ax.texts[2:]} == {
        label for label, _ in choice_plots.SWITCHES.values()
    }


def test_every_open_question_has_a_row(gpu):
    answers = results.open_questions({"gpu": gpu})
    (ax,) = choice_plots.open_questions(answers).axes
    assert len(ax.get_yticklabels()) == sum(len(arms) for *_, arms in plans.OPEN)
    known = [found["gpu"].mean for *_, found in answers if "gpu" in found]
    drawn = [float(bar[0].get_xdata()[0]) for bar in ax.containers]
    assert [x for x in drawn if np.isfinite(x)] == pytest.approx(known)


def test_an_answer_that_tells_has_an_interval_without_zero():
    def stats(mean, half, n=3):
        return Stats(mean=mean, std=half, low=mean - half, high=mean + half, n=n)

    answers = [
        ("a", "dear once", "base", {"laptop": stats(0.5, 0.1), "gpu": stats(0.01, 0.02)}),
        ("b", "never told", "base", {"laptop": stats(0.2, 0.3), "gpu": stats(0.1, 0.2)}),
        ("c", "two seeds", "base", {"gpu": stats(0.9, 0.1, n=2)}),
        ("d", "helps", "base", {"gpu": stats(-0.2, 0.1)}),
        ("threshold", "of chapter 08", "base", {"gpu": stats(0.9, 0.1)}),
        ("e", "dear", "base", {"gpu": stats(0.3, 0.1)}),
    ]
    assert [arm for _, arm, *_ in choice_plots.telling(answers)] == ["dear", "dear once", "helps"]


def test_the_frontier_is_speed_and_loss_of_runs(gpu):
    found = time_to_loss.frontier(gpu)
    step, gaps = step_table.speeds("llama1b"), results.differences(gpu)
    x, stats, preset = found.points["by activations, 8 of 32: half"]
    assert x == pytest.approx(flops.run_speedup(0.5 * 2800 / 3000, step["active16x32"]))
    assert stats == gaps["active16x32, 50% sparse first"] and preset == "active16x32"
    assert len(found.table) == len(time_to_loss.ARMS) and found.planned[1.0] == 0
    assert len(found.planned) == 1 + len(plans.PLANNED)
    assert found.stopped["algorithms 1, 2, 4 of 16"].mean < stats.mean + gaps["recipe"].mean
    assert set(found.shorter) == {name for name, (x, *_) in found.points.items() if x <= max(found.planned)}
    without = time_to_loss.frontier(gpu[~gpu["arm"].isin(list(plans.PLANNED)[2:])])
    assert "figure 4d, 4 of 16" not in without.shorter, "nothing as short was planned"
    ax = time_to_loss.draw(found, "loss", "t").axes[0]
    assert list(ax.lines[-1].get_xdata()) == list(found.planned)


def test_numbers_of_the_text(gpu):
    gap, values = results.differences(gpu, column="final_loss"), chapter_values.values()
    saved = 1 - gap["active16x32"].mean / gap["venom16, 32 clusters"].mean
    assert values["looking saves, 32 clusters"] == f"{100 * saved:.0f} %"
    assert values["printed venom16"] == f"{audit.table3_costs()['Venom']:.3f}" == "0.031"
    assert values["run active16x32"] in time_to_loss.frontier(gpu).table["times as fast"].str[:4].tolist()
    assert paper.number("venom_speedup_table2") == 8, "the arithmetic in notebook 08's text"


def test_one_seed_is_a_hollow_mark_apart_from_the_line():
    three, one = Stats(0.1, 0.01, 0.08, 0.12, 3), Stats(0.2, math.nan, math.nan, math.nan, 1)
    (ax,) = choice_plots.by_size({"recipe": {"gpu": three, "gpu40m": three, "gpu100m": one}}).axes
    line, *marks = (x for x in ax.lines if len(set(x.get_ydata())) < 3 and x.get_label() != "dense")
    assert line.get_ydata().tolist() == [0.1, 0.1]
    faces = [mark.get_markerfacecolor() for mark in marks if mark.get_marker() == "v"]
    assert faces[2] == "white" and faces[0] == faces[1] != "white"
    for bar in ax.collections[:2]:
        assert bar.get_segments()[0][:, 1] == pytest.approx([0.08, 0.12])
