"""docs/scaling.md: what two GPUs gained, and what may be expected of more."""

import pytest

from replicate.report import pages, scaling_page, step_table
from replicate.settings.presets import train_preset
from replicate.training.flops import param_count


def test_numbers_are_the_records():
    cases = {
        (case["processes"], case["engine"], case["sparsity"]): case["tokens_per_s"]
        for case in scaling_page.recorded().results["cases"]
    }
    values = scaling_page.values()
    count = int(values["GPUs"])
    times = []
    for engine in ("ddp", "fsdp"):
        dense, sparse = cases[count, engine, "dense"], cases[count, engine, "recipe"]
        assert values[f"over dense {engine}"] == f"{sparse / dense:.2f}"
        times += [dense / cases[1, "", "dense"], sparse / cases[1, "", "recipe"]]
        assert values[f"scale {engine} recipe"] == f"{times[-1]:.2f}"
    assert values["scale"] == f"{min(times):.2f} to {max(times):.2f}"
    assert max(times) < count, "more than linear is a mistake of the clock"


def test_a_step_lies_between_all_hidden_and_nothing_hidden():
    table = scaling_page.expected().set_index(["model", "engine", "GPUs"])
    assert len(table) == 8
    preset = step_table.MODELS["1B"][0]
    parameters = param_count(train_preset(preset).model)["total"]
    row = table.loc["1B", "DDP", 64]
    assert float(row["travels, ms"]) == pytest.approx(8 * parameters * 63 / 64 / 50e9 * 1e3, abs=0.5)
    low, high = map(float, row["step, dense, compiled, ms"].split(" to "))
    assert high - low == pytest.approx(float(row["travels, ms"]), abs=1.01)
    assert (table["travels, ms"].astype(float) > 0).all()


def test_the_page_shows_them():
    text = pages.PAGES["scaling"].path.read_text(encoding="utf-8")
    assert pages.filled(pages.PAGES["scaling"]) == text
