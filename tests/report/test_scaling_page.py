"""docs/scaling.md: what two GPUs gained, and what may be expected of more."""

import re
from dataclasses import replace

import pytest

from replicate.bench import scale
from replicate.report import scaling_page, step_table
from replicate.settings.presets import train_preset
from replicate.study.records import RecordStore, make_record
from replicate.system.paths import ROOT
from replicate.training.flops import param_count
from replicate.training.memory import memory

COUNT = (6, 1), (6, 4), (22, 1)  # layers and micro-batches


def cases(layers, micro):
    return {
        (case["processes"], case["engine"], case["sparsity"]): case
        for case in scaling_page.recorded(layers, micro).results["cases"]
    }


def longer(layers, micro, engine, sparsity):
    found = cases(layers, micro)
    return found[2, engine, sparsity]["ms"] - found[1, "", sparsity]["ms"]


def models():
    """The whole 1B model and the one that was cut."""
    whole = train_preset(step_table.MODELS["1B"][0]).model
    return whole, replace(whole, n_layer=6)


def ends(name):
    return [float(text) for text in scaling_page.values()[name].split(" to ")]


def test_numbers_are_the_records():
    values = scaling_page.values()
    shown = {"scale": (22, 1, ("ddp", "fsdp")), "scale, cut": (6, 1, ("ddp", "fsdp"))}
    shown |= {f"scale, cut x 4 {engine}": (6, 4, (engine,)) for engine in ("ddp", "fsdp")}
    for name, (layers, micro, engines) in shown.items():
        found = cases(layers, micro)
        times = [
            found[2, engine, arm]["tokens_per_s"] / found[1, "", arm]["tokens_per_s"]
            for engine in engines
            for arm in ("dense", "recipe")
        ]
        assert ends(name) == [round(end(times), 2) for end in (min, max)]
        assert max(times) < 2, "more than linear is a mistake of the clock"
    found = cases(22, 1)
    for engine, count in (("ddp", 2), ("fsdp", 2), ("one process", 1)):
        key = "" if count == 1 else engine
        dense, sparse = (found[count, key, arm]["tokens_per_s"] for arm in ("dense", "recipe"))
        assert values[f"over dense {engine}"] == f"{sparse / dense:.2f}"
    for name, model in zip(("vocabulary", "vocabulary, cut"), models()):
        share = model.vocab_size * model.d_model / param_count(model)["total"]
        assert model.tie_embeddings and values[name] == f"{share:.0%}"
    assert values["peak"] == f"{found[2, 'ddp', 'dense']['peak_bytes'] / 1e9:.0f}"


def test_every_setting_is_a_record_of_its_own():
    table = scaling_page.measured()
    settings = table[["layers", "micro-batches"]].drop_duplicates().values.tolist()
    assert settings == [list(pair) for pair in COUNT] and len(table) == 18 == len(set(table.index))


@pytest.mark.parametrize("change", [
    {"processes": 4}, {"sparsity": ["dense", "recipe", "act24"]}, {"engines": ["ddp"]}, {"preset": "llama7b"},
    {"batch_size": 1},
])  # fmt: skip
def test_other_benchmarks_are_not_taken_for_these(tmp_path, change):
    """On a host of eight GPUs `bench scale` times eight: it must not stand for two."""
    store, ours = RecordStore(tmp_path / "cached", tmp_path / "recorded"), scaling_page.recorded(6)
    config = ours.config | {key: value for key, value in change.items() if key in ours.config}
    train = ours.config["train"] | {
        key: value for key, value in change.items() if key in ours.config["train"]
    }
    other = make_record(scale.KIND, config | {"train": train}, ours.results, device="cpu")
    store.put(replace(other, device=ours.device), recorded=True)
    with pytest.raises(ValueError, match=r"6 layers, 1 micro-batches and 2 GPUs is shipped"):
        scaling_page.recorded(6, store=store)
    store.put(ours, recorded=True)
    assert scaling_page.recorded(6, store=store).config == ours.config


def test_what_is_added_is_told_apart_by_the_step_and_by_the_micro_batch():
    table = scaling_page.added().set_index(["engine", "formats"])
    for (engine, _), arm in zip(table.index, ("dense", "recipe") * 2):
        name = {"DDP": "ddp", "FSDP2": "fsdp"}[engine]
        each = (longer(6, 4, name, arm) - longer(6, 1, name, arm)) / 3
        row = table.loc[engine].iloc[("dense", "recipe").index(arm)]
        assert row["each micro-batch, ms"] == pytest.approx(each)
        assert row["once a step, ms"] == pytest.approx(longer(6, 1, name, arm) - each)
    once, each = table["once a step, ms"], table["each micro-batch, ms"]
    assert (once > each)["DDP"].all(), "the page: most of what DDP adds is paid once"
    assert each["FSDP2"].iloc[0] > 5 * once["FSDP2"].iloc[0], "and most of FSDP2's with every micro-batch"


def test_the_vocabulary_alone_does_not_explain_it():
    grows = [longer(22, 1, *case) / longer(6, 1, *case) for case in scaling_page.fixed()]
    assert ends("added grows") == [round(end(grows), 1) for end in (min, max)]
    assert min(grows) > 1.5 and max(grows) < float(scaling_page.values()["parameters grow"])
    for (engine, arm), fixed in scaling_page.fixed().items():
        a_layer = (longer(22, 1, engine, arm) - longer(6, 1, engine, arm)) / 16
        assert fixed == pytest.approx(longer(22, 1, engine, arm) - 22 * a_layer)
        assert fixed < 0.5 * longer(22, 1, engine, arm)


def test_what_is_added_grows_with_parameters_and_the_share_that_is_sent():
    table = scaling_page.expected().set_index(["model", "engine"])
    assert list(table.index) == [("1B", "DDP"), ("1B", "FSDP2"), ("7B", "FSDP2")]  # 7B does not fit with DDP
    whole, big = models()[0], train_preset("llama7b").model
    for name, engine, model in (("1B", "ddp", whole), ("1B", "fsdp", whole), ("7B", "fsdp", big)):
        row = table.loc[name, scaling_page.ENGINES[engine]]
        more = (longer(22, 1, engine, "dense") + longer(22, 1, engine, "recipe")) / 2
        more *= param_count(model)["total"] / param_count(whole)["total"] * 7 / 4  # of 7/8 instead of 1/2
        columns = [column for column in table if column.endswith(", ms")]
        times = [[float(text) for text in row[column].split(" + ")] for column in columns]
        assert all(added == pytest.approx(more, abs=0.5) for _, added in times)
        if name == "1B":
            assert [alone for alone, _ in times] == [
                round(cases(22, 1)[1, "", arm]["ms"]) for arm in ("dense", "recipe")
            ]
        peak = cases(22, 1)[2, engine, "dense"]["peak_bytes"]
        size = peak * memory(model, 2, 8, engine)["total"] / memory(whole, 2, 2, engine)["total"]
        assert float(row["dense, peak GB of a GPU"]) == pytest.approx(size / 1e9, abs=0.5)
    one, eight = table["times as fast as dense, one GPU"].astype(float), table["on 8"].astype(float)
    assert (eight < one).all() and (eight - 1 > 0.6 * (one - 1)).all()


def test_the_page_names_commands_that_make_its_records():
    page = (ROOT / "docs" / "scaling.md").read_text()
    for layers, micro in COUNT:
        repeats = scaling_page.recorded(layers, micro).config["repeats"]
        options = f"--layers {layers}" + (f" --micro {micro}" if micro > 1 else "")
        assert re.search(options + (rf" --repeats {repeats}`" if repeats != 20 else "`"), page), options
