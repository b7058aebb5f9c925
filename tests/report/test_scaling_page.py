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
        assert values[f"scale {engine} recipe"] == f"{times[-1]:.2f}"
    assert values["scale"] == f"{min(times):.2f} to {max(times):.2f}"
    (recipe,) = (r for r in step.rows(step_table.recorded("llama1b")) if r["arm"] == "recipe")
    assert (
        values["launching"] == f"{recipe['x'] / recipe['x launched'] - 1:.0%}"
    )  # over one and the same dense
    whole = models()[1]
    share = whole.vocab_size * whole.d_model / param_count(whole)["total"]
    assert whole.tie_embeddings and values["vocabulary"] == f"{share:.0%}"
    assert max(times) < count, "more than linear is a mistake of the clock"


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
    for name, engine in (("DDP", "ddp"), ("FSDP2", "fsdp")):
        added = ms[2, engine, "dense"] - ms[1, "", "dense"]
        times = float(parts["1B", name][1]) / added / (7 / 4)  # of 7/8 instead of 1/2
        whole, cut = (param_count(model)["total"] for model in models())
        assert times == pytest.approx(whole / cut, rel=0.02)
    speeds = table["times as fast as dense, one GPU"].astype(float), table["on 8"].astype(float)
    assert (speeds[1] <= speeds[0]).all() and (speeds[1] > 1).all()


def models():
    whole = train_preset(step_table.MODELS["1B"][0]).model
    return whole, replace(whole, n_layer=int(scaling_page.values()["scale, layers"]))
