"""The pictures of notebook 08, and the numbers of its text."""

import numpy as np
import pytest
import torch

from replicate import SPARSITY_PRESETS, SparseFFN, paper
from replicate.report import chapter_values, notebooks, study_tables, weight_plots
from replicate.study import gradients, results


def test_every_claim_of_table_3_has_its_arms(gpu):
    ids = {name for name in paper.claims() if name.startswith("table3-")}
    ids -= {"table3-printed-sum"}  # arithmetic on the paper's own numbers, notebook 11
    assert set(weight_plots.CLAIMS) == ids
    assert {arm for arms in weight_plots.CLAIMS.values() for arm in arms} <= set(gpu["arm"])
    stats = study_tables.contrast(gpu, weight_plots.CLAIMS["table3-additive"], study_tables.TRAIN)
    means = gpu.groupby("arm")["final_loss"].mean()
    extra = means["w1+w2+t"] - means["w1+w1t"] - means["w2+w2t"] + means["dense"]
    assert stats.mean == pytest.approx(extra)


def test_costs_are_the_papers_and_ours(gpu):
    table = weight_plots.cost_table({"gpu": gpu}, ["w1", "recipe, same", "never run"]).set_index("arm")
    gap = results.differences(gpu, column="final_loss")
    assert list(table.index) == ["w1", "recipe, same"] and list(table["paper"]) == ["+0.026", ""]
    assert table.loc["w1", "gpu"].startswith(f"{gap['w1'].mean:.3f} ± ")
    effects = weight_plots.effects(["gpu"]).set_index("effect")
    assert effects.loc["beyond the sum, with transposes", "paper"] == "+0.005"
    assert len(effects) == len(weight_plots.EFFECTS) == 7


def test_a_panel_a_scale_and_a_line_an_arm(gpu):
    fig = weight_plots.table3({"gpu": gpu, "gpu40m": study_tables.runs("gpu40m")})
    assert [ax.get_title(loc="left") or ax.get_title() for ax in fig.axes] == ["gpu scale", "gpu40m scale"]
    axes = weight_plots.gaps({"gpu": gpu}).axes
    assert len(axes) == len(weight_plots.PANELS)
    for ax, names in zip(axes, weight_plots.PANELS.values(), strict=True):
        assert {text.get_text() for text in ax.texts} == set(names)
        at = {text.get_text(): text.xy[1] for text in ax.texts}
        heights = sorted(at.values())
        assert min(np.diff(heights)) > 0.04, "names do not cover each other"
        ends = {name: results.gap_curve(gpu, name, window=200)[1].mean(0)[-1] for name in names}
        assert sorted(at, key=at.get) == sorted(ends, key=ends.get)


def test_gradients_by_layer_and_over_the_steps(gpu):
    by_layer = gradients.ends()
    axes = weight_plots.layers(by_layer, "gpu", gpu).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes[0].lines}
    assert drawn["w1+w2"] == [row["length"] for row in by_layer["w1+w2"]]
    steps, norms = weight_plots.norm_curve(gpu, "dense")
    last = [r.results["stats"][-1] for r in gpu.loc[gpu["arm"] == "dense", "record"]]
    assert steps[-1] == last[0]["step"] and norms[-1] == np.median([row["grad_norm"] for row in last])


def test_spikes_are_read_from_the_losses(gpu):
    (row,) = weight_plots.spikes("gpu", gpu, ["recipe", "never run"]).to_dict("records")
    losses = [r.results["steps"]["loss"] for r in gpu.loc[gpu["arm"] == "recipe", "record"]]
    assert row["first sparse step"] == pytest.approx(np.mean([loss[200] for loss in losses]))
    assert row["highest"] == pytest.approx(np.mean([max(loss[200:260]) for loss in losses]))
    assert row["before"] < row["first sparse step"] and 20 < row["steps until back"] < 40


def test_a_small_move_is_amplified_by_hard_pruning_alone(gpu):
    moved = weight_plots.moves([0.1, 0.001])
    assert moved["hard pruning"][1] > 5 * moved["hard pruning"][0] and moved["soft thresholding"][1] < 1.1
    left, right = weight_plots.flips("gpu", gpu, moved).axes
    steps, rates = weight_plots.flip_curve(gpu, "recipe")
    assert list(left.lines[3].get_ydata()) == pytest.approx(rates) and len(steps) == len(rates)
    assert list(right.lines[0].get_ydata()) == moved["hard pruning"]


def test_what_one_layer_sends_down():
    draw = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(64, 32, generator=draw).double() for _ in range(2))
    formats = {name: SPARSITY_PRESETS[name] for name in ("w1", "w1, same")}
    table = weight_plots.mismatch(formats, SparseFFN(32, 128).double(), x, upstream).set_index("arm")
    assert table.loc["w1, same", "dx sent down / true dx"] == "≈1"
    assert float(table.loc["w1", "dx sent down / true dx"][1:]) > 1.3


def test_numbers_of_the_text(gpu):
    book = notebooks.select(notebooks.discover(), ["08"])[0]
    values, gap = chapter_values.values(), results.differences(gpu, column="final_loss")
    assert values["over the paper's w1"] == f"{gap['w1'].mean / 0.026:.1f}"
    assert values["first layer, length w1"] == f"{gradients.ends()['w1'][0]['length']:.0f}"
    three = chapter_values.value(book, "training gpu: w1+w2+t - w1+w1t - w2+w2t")
    assert three == study_tables.brief(
        study_tables.contrast(gpu, ("w1+w2+t", "w1+w1t", "w2+w2t"), study_tables.TRAIN)
    )
    assert chapter_values.value(book, "no such value") == ""
