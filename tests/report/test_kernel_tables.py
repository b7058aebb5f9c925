"""The recorded kernel timings as tables, docs/kernels.md, and the pictures of notebooks 06 and 07."""

from types import SimpleNamespace

import pytest
import torch

from replicate.bench import ffn as ffn_bench
from replicate.bench import step
from replicate.kernels.two_four.tile24 import two_of_four
from replicate.report import kernel_plots, kernel_tables, kernels_page, layer_tables, pages, step_table
from replicate.study.records import RecordStore

PAGE = pages.PAGES["kernels"].path.read_text(encoding="utf-8")


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_nothing_recorded_is_refused():
    with pytest.raises(ValueError, match="no record of kind 'bench-nothing'"):
        kernel_tables.recorded("bench-nothing")


def test_the_page_s_prose_agrees_with_the_records(kernels, venom):
    prose = pages.BLOCK.sub("", PAGE)
    driver = kernel_tables.memory(kernels)["of copy"][0]
    assert f"ran at {100 * driver:.0f} % of the rate" in prose
    over = [kernel_tables.venom_formats(venom, d)["FFN over grouped"].max() for d in kernel_tables.MODELS]
    assert f"about {over[0]:.1f} times (7B) and up to {over[1]:.1f} times (1B)" in prose
    for d_model in kernel_tables.MODELS:
        assert kernel_tables.venom_formats(venom, d_model)["of dense"].max() < 1


def test_the_page_s_prose_on_the_layer_agrees_with_the_records():
    record = kernel_tables.recorded(kernel_tables.LAYER)
    large, small = (layer_tables.layer(record, d).set_index("arm") for d in kernel_tables.MODELS)
    assert f"took it to {large.loc['recipe', 'memory']:.2f}" in PAGE
    launches = next(s for s in record.results["shapes"] if s["shape"][1] == 2048)["launches"]
    host_ms = (launches["all24"]["ms"] - launches["act24"]["ms"]) / 4  # by one more 2:4 product and its pass
    assert 1 < host_ms < 2.5 and "one to two and a half milliseconds" in PAGE
    assert all(small.loc[n, "x"] > 0.8 * aim for n, aim in kernels_page.LAYER_AIMS.items())
    slower = small[small["launches"] < 1].index.drop(["dense", "dense, eager"])
    routed = ["recipe", "recipe32", "recipe64"]
    assert slower.tolist() == [*routed, "act24", "act24+tile", "all24"]
    others = large.drop(["dense", "dense, eager"])
    assert others["launches"].min() == 1, "only at the 1B shape do graphs decide"


def test_arithmetic_of_the_formats_by_hand():
    for name in ("venom16", "venom64"):
        assert kernel_tables.arithmetic(name) == pytest.approx(7)
    assert kernel_tables.arithmetic("recipe") == pytest.approx(6 / (2 / 1.5 + 4 / 7))
    assert kernel_tables.arithmetic("act24") == pytest.approx(6 / (2 / 1.5 + 4))
    assert kernel_tables.arithmetic("all24") == pytest.approx(1.5)


def test_figure_6_by_hand(kernels):
    row = kernel_tables.figure6(kernels)
    assert (row["m"], row["n"], row["k"]) == (4096, 16384, 4096)
    assert kernel_tables.amortised(row, "eager_ms", 1) == pytest.approx(row["with eager conversion"])
    assert kernel_tables.amortised(row, "convert_ms", 10**6) == pytest.approx(row["speedup"], rel=1e-4)
    n = kernel_tables.columns_to_repay(row, "eager_ms") / row["n"]
    assert n * row["dense_ms"] == pytest.approx(n * row["sparse_ms"] + row["eager_ms"])


def test_roofline_intensity_of_a_product_by_hand(kernels):
    point = next(p for p in kernel_tables.intensities(kernels) if p["name"] == "figure 6")
    m, n, k = 4096, 16384, 4096
    assert point["x"] == pytest.approx(2 * m * n * k / (2 * (m * k + k * n + m * n)))


def test_the_bytes_of_a_product_by_hand():
    assert kernel_tables.work(4, 3, 8) == (2 * 4 * 3 * 8, 2 * (4 * 8 + 8 * 3 + 4 * 3))
    assert kernel_tables.work(4, 3, 8, sparse=True)[1] == 2 * (4 * 8 * 9 / 16 + 8 * 3 + 4 * 3)


@pytest.mark.parametrize("d_model", kernel_tables.MODELS)
def test_stages_are_those_of_the_record(venom, d_model):
    times = kernel_tables.shape_of(venom, d_model)["products"]
    for name, key in (("dense", "dense"), ("4 of 32", "2")):
        own = times[key]
        total = sum(own.values()) + own.get(kernel_tables.PARTS_TWICE, 0)
        assert sum(kernel_tables.stages(venom, d_model)[name].values()) == pytest.approx(total)
    assert all(0 < share < 0.5 for share in kernel_tables.overhead_share(venom, d_model).values())


def test_venom_against_24_pairs_the_same_products(kernels, venom):
    frame = kernel_tables.venom_over_24(kernels, venom, 4096, "4 of 32")
    assert [name[0] for name in frame["product"]] == list("1235")
    assert (frame["2:4 time / Venom time"] > 3).all()


def test_every_aim_is_compared(kernels, venom):
    goals = kernels_page.goals(kernels, venom, kernel_tables.recorded(kernel_tables.LAYER))
    assert set(goals["reached"]) == {"yes", "no"}
    assert goals["7B shape"].str.fullmatch(r"[\d.]+(%|x)?").all()
    assert "Speed aims are reached at the 7B shape" in PAGE
    missed = goals.loc[goals["reached"] == "no", "what"].tolist()
    assert missed == [f"peak memory, {layer_tables.NAMES[name]}" for name in ("act24+tile", "all24")], (
        "the page's prose says so"
    )


def test_layer_ratios_are_those_of_the_times():
    record = kernel_tables.recorded(kernel_tables.LAYER)
    for d_model in kernel_tables.MODELS:
        frame = layer_tables.layer(record, d_model).set_index("arm")
        (shape,) = [s for s in record.results["shapes"] if s["shape"][1] == d_model]
        base = ffn_bench.baseline(shape["graph"])
        assert frame.loc[base, "x"] == 1 and frame.loc["dense", "memory"] == 1
        assert (frame["x"] * frame["ms"]).tolist() == pytest.approx([frame.loc[base, "ms"]] * len(frame))
        stages = layer_tables.stages(record, d_model).set_index("stage, ms")
        assert 0.7 < stages[layer_tables.NAMES["recipe"]].sum() / frame.loc["recipe", "ms"] < 1.05
    with pytest.raises(ValueError, match="no shape with d_model 64"):
        layer_tables.layer(record, 64)


def test_the_curves_of_both_backends_agree():
    assert (layer_tables.agreement(kernel_tables.recorded(kernel_tables.BACKENDS))["within"] == "yes").all()


def test_excerpt_is_the_kernel_s_own_text():
    text = kernel_plots.excerpt(two_of_four, "both_ab", "both_cd")
    assert text.startswith("```python\nboth_ab = ") and text.count("\n") == 3
    assert "def two_of_four" in kernel_plots.excerpt(two_of_four)
    with pytest.raises(ValueError, match="no line"):
        kernel_plots.excerpt(two_of_four, "not there")


def test_pictures_say_what_the_layout_says(ax):
    kernel_plots.draw_metadata_word(ax)
    assert sorted(texts(ax)) == sorted(f"byte {b}\n{half}" for b in range(8) for half in ("low", "high"))
    ax.clear()
    kernel_plots.draw_group(ax, [3, -1, 2, -4])
    assert "nibble i1, i0 = 12" in texts(ax)
    ax.clear()
    kernel_plots.draw_metadata_tile(ax)
    assert {int(text) for text in texts(ax)} == set(range(64))


def test_stacks_end_at_their_sum(ax):
    kernel_plots.draw_stacks(ax, {"a": {"x": 1.0, "y": 2.5}, "b": {"x": 0.5, "y": 0.25}}, ["C0", "C1"])
    assert {"3.50 ms", "0.750 ms"} <= set(texts(ax))


def test_rows_show_their_numbers_and_marks(ax):
    rows = {"a": {"x": 1.0, "y": 2.5}, "b": {"x": 0.5, "y": 0.25}}
    kernel_plots.draw_rows(ax, rows, {"x": "C0", "y": "C1"}, marks={"b": 3.0}, mark="theirs")
    assert sorted(texts(ax)) == ["0.25", "0.50", "1.00", "2.50"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b"]
    assert ax.collections[0].get_offsets().tolist() == [[3.0, 1.0]] and ax.get_xlim()[1] > 3


def test_a_tile_shows_how_many_are_kept(ax):
    kept = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool().numpy()
    kernel_plots.draw_tile(ax, torch.arange(9.0).reshape(3, 3).numpy(), kept)
    assert texts(ax) == [*"012345678", "2", "1", "3", "3", "2", "1"]


def test_figure_6_adds_the_conversion_to_the_product(kernels):
    row = kernel_tables.figure6(kernels)
    product, conversion = (bars.datavalues for bars in kernel_plots.figure6(row).axes[0].containers)
    assert product.tolist() == [row["dense_ms"]] + 4 * [row["sparse_ms"]]
    assert conversion.tolist() == [0, row["eager_ms"], row["convert_ms"], row["convert_ms"] / 8, 0]


def test_bounds_are_the_longer_of_computing_and_moving():
    for n, gain in ((1, "1.78"), (16384, "2.00")):  # bytes alone: almost 16/9; multiplications: twice
        (ax,) = kernel_plots.bounds(4096, n, 4096, 4.0).axes
        assert f"at most {gain} times" in ax.get_title()
        flops, moved = kernel_tables.work(4096, n, 4096)
        compute, move, compute24, move24 = 1e-6 * ax.containers[0].datavalues  # in seconds
        assert compute == pytest.approx(flops / (1e12 * kernel_plots.PEAK_DENSE))
        assert compute24 == pytest.approx(flops / (1e12 * kernel_plots.PEAK_SPARSE))
        assert move == pytest.approx(moved / 4e12) and move24 < move


def timed(date, **ms):
    """A record of the layer at the 7B shape, its arms' milliseconds by name."""
    ms = {"dense": 16.0, "dense, eager": 20.0} | {name.replace("_", ", "): t for name, t in ms.items()}
    spreads = {name: {"ms": t, "ms_p10": t, "ms_p90": t} for name, t in ms.items()}
    shape = {"shape": [16384, 4096, 16384], "graph": spreads, "launches": spreads, "errors": {}}
    shape |= {"sustained": ms, "peak_bytes": dict.fromkeys(ms, 1)}
    return SimpleNamespace(date=date, config={"sparsity": list(ms)}, results={"shapes": [shape]})


def stored(records):
    """A store of these records, all of one NVIDIA H200."""
    return SimpleNamespace(widest_last=lambda kind, device: records if device == "NVIDIA H200" else [])


def test_what_fp8_gains_is_read_where_all_were_timed_together(monkeypatch):
    alone = [timed("2026-03", venom16=5.0), timed("2026-04", venom16_fp8=3.0, fp8=9.0)]
    monkeypatch.setattr(layer_tables, "RecordStore", lambda: stored(alone))
    assert layer_tables.fp8_gain(4096) is None
    assert layer_tables.in_fp8().empty and not layer_tables.fp8_values()
    whole = timed("2026-02", fp8=12.0, venom16=5.0, venom16_fp8=4.0)
    older = timed("2026-01", fp8=1.0, venom16=1.0, venom16_fp8=1.0)
    monkeypatch.setattr(layer_tables, "RecordStore", lambda: stored([*alone, whole, older]))
    assert layer_tables.fp8_gain(4096) == 1.25 and layer_tables.fp8_gain(2048) is None
    found = layer_tables.in_fp8()
    assert list(found.columns) == ["7B"] and list(found["7B"]) == pytest.approx([16 / 12, 16 / 5, 16 / 4])
    values = layer_tables.fp8_values()
    assert values["beside FP8 7B fp8"] == "1.33" and values["FP8 gains 7B"] == "1.25"
    assert values["memory FP8 7B venom16"] == "1.00"


def test_every_stage_of_the_layer_has_a_colour():
    assert list(kernel_plots.LAYER_COLOURS) == list(ffn_bench.STAGES)


def test_curves_can_be_drawn(kernels):
    for figure in (kernel_plots.where_it_pays(kernels), kernel_plots.roofline(kernels)):
        assert all(torch.tensor(ax.get_xlim()).isfinite().all() for ax in figure.axes)


def test_steps_in_fp8_are_over_the_dense_step_of_their_own_record():
    record = step_table.fp8_record()
    ms = {row["arm"]: row["ms"] for row in step.rows(record)}
    dense = min(ms["dense"], ms["dense, in one piece"])
    values = step_table.fp8_values()
    assert record.device == layer_tables.CARD
    for name, arm in (("dense", "fp8"), ("venom16", "venom16"), ("venom16, fp8", "venom16, fp8")):
        assert values[f"step FP8 {name}"] == f"{dense / ms[arm]:.2f}"
    assert values["step FP8 gains"] == f"{ms['venom16'] / ms['venom16, fp8']:.2f}"


def test_layers_of_video_models_are_those_of_their_record():
    table = layer_tables.video().set_index("layer")
    assert list(table.columns) == ["Wan 2.1 14B, 5120 x 13824", "HunyuanVideo, 3072 x 12288"]
    record = RecordStore().latest(kernel_tables.LAYER, shapes=[list(shape) for shape in ffn_bench.VIDEO])
    for column, d_model in zip(table.columns, (5120, 3072), strict=True):
        frame = layer_tables.layer(record, d_model).set_index("arm")
        dense = frame.loc[["dense", "dense, by hand"], "ms"].min()
        for arm in ("venom16", "act24"):
            assert table.loc[layer_tables.NAMES[arm], column] == pytest.approx(dense / frame.loc[arm, "ms"])
    assert layer_tables.video_values()["HunyuanVideo venom16"] == f"{table.iloc[0, -1]:.2f}"
