"""The pictures of notebook 07, and the numbers of its text and of notebook 06's."""

import re

import numpy as np
import pytest
from matplotlib import pyplot as plt

from replicate.report import (
    chapter_values,
    kernel_tables,
    kernels_page,
    layer_plots,
    layer_tables,
    notebooks,
)


@pytest.fixture(scope="module")
def layer():
    return kernel_tables.recorded(kernel_tables.LAYER)


def heights(ax):
    return [bars.datavalues for bars in ax.containers]


@pytest.mark.parametrize(("tokens", "clusters", "k"), [(1000, 16, 4), (130, 1, 1), (20, 64, 16)])
def test_blocks_hold_every_choice_and_end_at_whole_blocks(tokens, clusters, k):
    ax = layer_plots.blocks(tokens, clusters, k).axes[0]
    rows, padding = heights(ax)
    assert len(rows) == clusters and rows.sum() == tokens * k and rows.max() <= tokens
    assert ((rows + padding) % 128 == 0).all() and padding.max() < 128 and padding.min() >= 0
    shown, bound = re.search(r"(\d+)% of the rows.*\n.*most (\S+) times", ax.get_title()).groups()
    total = (rows + padding).sum()
    assert float(shown) == pytest.approx(100 * padding.sum() / total, abs=0.51)
    assert float(bound) == pytest.approx(tokens * clusters / total, rel=5e-3)


def test_more_clusters_than_there_are_cannot_be_chosen(capsys):
    with pytest.raises(ValueError, match="only 4 clusters for k = 16"):
        layer_plots.blocks(1024, 4, 16)
    layer_plots.try_blocks(1024, 4, 16)
    assert capsys.readouterr().out == "only 4 clusters for k = 16\n" and not plt.get_fignums()
    layer_plots.try_blocks(1024, 4, 2)
    assert len(plt.get_fignums()) == 1


def test_figure_7_draws_the_recorded_speed_ups(venom):
    axes = layer_plots.figure7(venom).axes
    for ax, d_model in zip(axes, kernel_tables.MODELS, strict=True):
        table = kernel_tables.venom_products(venom, d_model)
        drawn = dict(zip((bars.get_label() for bars in ax.containers), heights(ax), strict=True))
        assert list(drawn) == list(kernel_tables.FORMATS.values())
        assert all(drawn[form].tolist() == pytest.approx(table[form].tolist()) for form in drawn)


@pytest.mark.parametrize("colours", [layer_plots.GATHER, layer_plots.PEERS], ids=["gather", "peers"])
def test_compared_draws_the_columns_it_has_colours_for(venom, colours):
    for ax, d_model in zip(layer_plots.compared(venom, colours, "y").axes, kernel_tables.MODELS, strict=True):
        table = kernel_tables.venom_formats(venom, d_model)
        drawn = [bars.tolist() for bars in heights(ax)]
        assert drawn == [pytest.approx(table[column].tolist()) for column in colours]


def test_stages_and_memory_are_those_of_the_records(venom, layer):
    ax = layer_plots.breakdown(venom).axes[0]
    stages = kernel_tables.stages(venom, 4096)
    assert np.sum(heights(ax), axis=0)[0] == pytest.approx(sum(stages["4 of 16"].values()))
    seven = dict(zip(("dense", *kernel_tables.FORMATS), heights(layer_plots.memory(venom).axes[0])))
    peaks = kernel_tables.shape_of(venom, 4096)["peak_bytes"]
    assert {key: bars[0] for key, bars in seven.items()} == pytest.approx(
        {key: peak / 2**30 for key, peak in peaks.items()}
    )
    split = layer_tables.stages(layer, 2048).drop(columns=["stage, ms", layer_tables.NAMES["dense, eager"]])
    drawn = np.sum(heights(layer_plots.layer_stages(layer).axes[1]), axis=0)
    assert drawn.tolist() == pytest.approx(split.sum().tolist())


def test_the_layer_is_drawn_without_the_dense_arms(layer):
    speed, memory = layer_plots.layer(layer).axes
    names = [text.get_text() for text in speed.get_yticklabels()]
    frame = layer_tables.layer(layer, 4096)
    assert names == [name for name in frame["layer"] if not name.startswith("dense")]
    for ax, column in ((speed, "x"), (memory, "memory")):
        recorded = frame.set_index("layer").loc[names, column].tolist()
        assert heights(ax)[0].tolist() == pytest.approx(recorded)


def test_the_numbers_of_the_text_are_those_of_the_figures(kernels, venom, layer):
    row, shown = kernel_tables.figure6(kernels), kernels_page.values()
    assert shown["figure 6"] == f"{row['dense_ms'] / row['sparse_ms']:.2f}"
    assert shown["our conversion"] == f"{100 * row['convert_ms'] / row['sparse_ms']:.1f} %"
    shared, one = (
        float(kernel_tables.amortised(row, "eager_ms", t)) for t in (kernels_page.to_share(row), 1)
    )
    fewer = kernel_tables.amortised(row, "eager_ms", kernels_page.to_share(row) - 1)
    assert shared > 1 >= fewer and one == pytest.approx(row["with eager conversion"])
    formats = kernel_tables.venom_formats(venom, 4096).set_index("format")
    low, middle, high = (f"{x:.2f}" for x in formats["FFN"])
    assert shown["7B FFN"] == f"{low}, {middle} and {high}" and shown["7B FFN, 4 of 32"] == middle
    seven = layer_tables.layer(layer, 4096).set_index("arm")
    assert shown["layer 7B recipe, memory"] == f"{seven.loc['recipe', 'memory']:.2f}"
    book = notebooks.select(notebooks.discover(), ["07"])[0]
    assert chapter_values.value(book, "7B FFN") == shown["7B FFN"]
    assert chapter_values.value(book, "7B no such thing") == ""
    assert all(shown.values()), "an empty text is no number"
