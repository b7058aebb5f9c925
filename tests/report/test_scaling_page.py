"""docs/scaling.md: what two GPUs gained, and what may be expected of more."""

from dataclasses import replace

import pytest

from replicate.bench import step
from replicate.report import scaling_page, step_table
from replicate.settings.presets import train_preset
from replicate.training.flops import param_count


def test_numbers_are_the_records():
    cases = {
        (case["processes"], case["engine"], case["sparsity"]): case["tokens_per_s"]
        for case in scaling_page.recorded().results["cases"]
    }
    values = scaling_page.values()
    count = int(values["scale, GPUs"])
    times = []
    for engine in ("ddp", "fsdp"):
        dense, sparse = cases[count, engine, "dense"], cases[count, engine, "recipe"]
        assert values[f"over dense {engine}"] == f"{sparse / dense:.2f}"
        times += [dense / cases[1, "", "dense"], sparse / cases[1, "", "recipe"]]
    assert values["scale"] == f"{min(times):.2f} to {max(times):.2f}"
    (recipe,) = (r for r in step.rows(step_table.recorded("llama1b")) if r["arm"] == "recipe")
    assert (
        values["launching"] == f"{recipe['x'] / recipe['x launched'] - 1:.0%}"
    )  # over one and the same dense
    for name, model in zip(("vocabulary", "vocabulary, cut"), models()):
        share = model.vocab_size * model.d_model / param_count(model)["total"]
        assert model.tie_embeddings and values[name] == f"{share:.0%}"
    assert max(times) < count, "more than linear is a mistake of the clock"


def test_every_setting_is_a_record_of_its_own():
    table = scaling_page.measured()
    settings = table[["layers", "micro-batches"]].drop_duplicates().values.tolist()
    assert settings == [[6, 1], [6, 4], [22, 1]] and len(table) == 18
    with pytest.raises(ValueError, match="no bench-scale of 5 layers and 1 micro-batches"):
        scaling_page.recorded(5)


def test_what_is_added_is_told_apart_by_the_step_and_by_the_micro_batch():
    table = scaling_page.added()
    once, each = table["once a step, ms"], table["each micro-batch, ms"]
    assert (once + each - table["ms, 1 micro-batch"]).abs().max() < 1e-9
    assert (once + 4 * each - table["ms, 4 micro-batches"]).abs().max() < 1e-9
    ddp, fsdp = (table[table["engine"] == name] for name in ("DDP", "FSDP2"))
    assert (ddp["once a step, ms"] > ddp["each micro-batch, ms"]).all()  # the page's sentence
    assert (fsdp["once a step, ms"] < fsdp["each micro-batch, ms"]).all()


def test_the_vocabulary_alone_does_not_explain_it():
    grows = [float(text) for text in scaling_page.values()["added grows"].split(" to ")]
    assert grows[0] > 1.5 and grows[1] < float(scaling_page.values()["parameters grow"])
    assert float(scaling_page.values()["scale"].split(" to ")[1]) < 1.9
    ddp = scaling_page.values()["scale 6 x 4 ddp"].split(" to ")
    assert [round(float(text), 1) for text in ddp] == [1.9, 1.9]


def test_what_is_added_grows_with_parameters_and_the_share_that_is_sent():
    table = scaling_page.expected().set_index(["model", "engine"])
    assert list(table.index) == [("1B", "DDP"), ("1B", "FSDP2"), ("7B", "FSDP2")]  # 7B does not fit with DDP
    ms = {
        (case["processes"], case["engine"], case["sparsity"]): case["ms"]
        for case in scaling_page.recorded().results["cases"]
    }
    parts = {
        name: list(map(float, row["dense, compiled, ms"].split(" + "))) for name, row in table.iterrows()
    }
    big = param_count(train_preset("llama7b").model)["total"] / param_count(models()[0])["total"]
    for name, engine, grown in (("1B", "ddp", 1), ("1B", "fsdp", 1), ("7B", "fsdp", big)):
        alone, added = parts[name, scaling_page.ENGINES[engine]]
        more = ms[2, engine, "dense"] - ms[1, "", "dense"]
        assert added == pytest.approx(more * grown * 7 / 4, rel=0.02)  # 7/8 instead of 1/2
        assert name != "1B" or alone == round(ms[1, "", "dense"])
    speeds = table["times as fast as dense, one GPU"].astype(float), table["on 8"].astype(float)
    assert (speeds[1] - 1 > 0.8 * (speeds[0] - 1)).all()


def models():
    """The whole 1B model and the one that was cut."""
    whole = train_preset(step_table.MODELS["1B"][0]).model
    return whole, replace(whole, n_layer=scaling_page.CUT)
