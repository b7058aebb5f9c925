"""The benchmark of a training step: arms on the same weights, composed models, speed-ups three ways."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from replicate.bench import ffn, step_cases
from replicate.bench import step as step_bench
from replicate.bench.step_cases import DENSE, WHOLE, TrainingStep
from replicate.report import step_table
from replicate.settings.presets import MODEL_PRESETS, SPARSITY_PRESETS, WIDTHS
from replicate.settings.text import config_hash
from replicate.study import records
from replicate.training import compiled, flops


@pytest.fixture
def case():
    return TrainingStep("smoke", 2, device="cpu", compile=False)


@pytest.fixture(scope="module")
def record():
    c = step_bench.config("smoke", ["dense", "venom16", "act24"], repeats=1)
    return step_bench.run(c, "cpu", compile=False)


def spread(ms):
    return {"ms": ms, "ms_p10": 0.9 * ms, "ms_p90": 1.1 * ms}


def made_up(layers=(2, 4, 6), preset="llama7b"):
    """A record as a GPU would write it: dense 100 + 40 a layer, recipe 100 + 20 a layer."""
    depths = {}
    for n in layers:
        ms = {DENSE: 110.0 + 40 * n, WHOLE: 100.0 + 40 * n, "recipe": 100.0 + 20 * n}
        depths[str(n)] = {
            "parameters": 10**9,
            "ms": {name: spread(value) for name, value in ms.items()},
            "launched": {name: spread(2 * value) for name, value in ms.items()},
            "busy_ms": {name: 0.8 * value for name, value in ms.items()},
            "loss": dict.fromkeys(ms, 11.8),
            "load": {"recipe": [1.5] * n},
            "peak_bytes": dict.fromkeys(ms, n * 2**30),
        }
    depths[str(max(layers))]["components"] = {
        "attention": spread(12.0),
        "head and loss": spread(80.0),
        "optimiser": spread(2.0),
        "ffn": {DENSE: spread(25.0), "recipe": spread(6.0)},
    }
    results = {"ffn": {}, "attention": {"flash": 3.0, "cudnn": 2.0}, "attention_used": "cudnn"}
    c = step_bench.config(preset, ["recipe"], layers)
    return records.make_record(step_bench.KIND, c, results | {"depths": depths})


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_a_line_is_fitted_with_its_deviation(noise):
    layers = [2, 4, 6]
    ms = [100.0 + 40 * n for n in layers]
    ms[1] += noise
    a, b, residual = step_bench.fit(layers, ms)
    assert b == pytest.approx(40) and a == pytest.approx(100 + noise / 3)
    assert residual == pytest.approx(max(abs(a + b * n - t) / t for n, t in zip(layers, ms)), abs=1e-12)
    assert (residual > 0.005) == bool(noise)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "llama3b"}, "unknown training preset"),
        ({"preset": "llama1b", "sparsity": ["venom8"]}, "unknown sparsity preset"),
        ({"preset": "llama1b", "layers": [2, 4]}, "give 22, the model's"),
        ({"preset": "llama1b", "layers": [0, 2, 4]}, "give 22, the model's"),
        (
            {"preset": "llama1b", "residual": "float16"},
            "residual is 'float16'; choose one of float32, bfloat16",
        ),
        ({"preset": "llama1b", "attention": "xformers"}, "choose one of auto, torch, flash, cudnn"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        step_bench.config(**arguments)


def test_defaults():
    whole, fitted = step_bench.config("llama1b"), step_bench.config("llama7b", ["dense", "recipe", "recipe"])
    assert whole["layers"] == [22] == [whole["n_layer"]]
    assert fitted["layers"] == [2, 4, 6] and fitted["n_layer"] == 32 and fitted["sparsity"] == ["recipe"]


@pytest.mark.parametrize("arm", ["recipe", "act24", "fp8", "venom16, fp8", DENSE, WHOLE])
def test_an_arm_is_the_model_of_its_configuration(case, arm):
    loss = case.loss(arm)
    assert [ffn.config for ffn in case.model.ffns()] == 2 * [SPARSITY_PRESETS[DENSE if arm == WHOLE else arm]]
    with torch.autocast("cpu", torch.bfloat16):
        expected = case.model(case.inputs, case.targets)[1]
        case.model.set_phase("dense")
        dense = case.model(case.inputs, case.targets)[1]
    assert torch.equal(loss, expected)
    assert torch.equal(loss, dense) == (arm in (DENSE, WHOLE, "fp8"))


def test_compiled_arms_take_turns_on_one_model(case, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    turned = TrainingStep("smoke", 2, device="cpu")
    for arm in (DENSE, "recipe", "fp8", WHOLE, "act24", "venom16, fp8", DENSE):
        assert torch.equal(turned.loss(arm), case.loss(arm)), arm


def test_a_step_changes_every_weight_and_keeps_no_gradient(case):
    before = [p.detach().clone() for p in case.parameters]
    assert math.isfinite(case.step("recipe"))
    assert all((p != old).any() for p, old in zip(case.parameters, before, strict=True))
    assert all(p.grad is None for p in case.parameters)


def test_parts_of_a_step_are_the_step_s(case):
    block, (x, cos, sin) = case.model.blocks[0], case._hidden()
    with case.autocast():
        whole = block(x, cos, sin)
        parts = step_cases.ffn_half(block, step_cases.attention_half(block, x, cos, sin))
        weight = case.model.embed.weight
        loss = compiled.head_loss(case.model.norm, weight, x, 0 * x, case.targets)
    assert torch.equal(parts, whole)
    assert loss.dtype == torch.float32 and 4 < loss < 12
    found = case.components([DENSE, "recipe"], 1)
    assert set(found["ffn"]) == {DENSE, "recipe"} and found["optimiser"]["ms"] > 0
    assert all(p.grad is None for p in case.parameters)


@pytest.mark.parametrize("arm", [DENSE, WHOLE, "recipe", "act24", "venom16"])
def test_every_arm_runs_with_a_bfloat16_residual_stream(case, arm):
    narrow = TrainingStep("smoke", 2, device="cpu", compile=False, residual="bfloat16")
    seen = []
    for block in narrow.model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.extend([args[0].dtype, out.dtype]))
    assert narrow.loss(arm).item() == pytest.approx(case.loss(arm).item(), abs=0.02)
    assert seen == 4 * [torch.bfloat16] and narrow._hidden()[0].dtype == torch.bfloat16
    assert case._hidden()[0].dtype == torch.float32
    before = [p.detach().clone() for p in narrow.parameters]
    assert math.isfinite(narrow.step(arm))
    assert all((p != old).any() for p, old in zip(narrow.parameters, before, strict=True))
    if arm == "recipe":
        test_parts_of_a_step_are_the_step_s(narrow)


def test_the_residual_stream_is_a_setting_that_old_records_lack(monkeypatch):
    plain, narrow = (step_bench.config("smoke", ["act24"], repeats=1, residual=r) for r in
                     ("float32", "bfloat16"))  # fmt: skip
    assert plain == step_bench.config("smoke", ["act24"], repeats=1) and "residual" not in plain
    assert narrow == plain | {"residual": "bfloat16"}
    monkeypatch.setattr(step_bench, "measure_depth", lambda c, case: case.model.stream)
    for c, expected in ((plain, None), (narrow, torch.bfloat16)):
        assert step_bench.run(c, "cpu", compile=False).results["depths"] == {"3": expected}


def test_every_recorded_step_is_still_found():
    names = ("preset", "sparsity", "layers", "repeats", "whole", "attention", "residual")
    shipped = [r for r, origin in records.RecordStore().all(step_bench.KIND) if origin == "recorded"]
    assert len(shipped) > 5
    for record in shipped:
        c = step_bench.config(**{name: record.config[name] for name in names if name in record.config})
        assert config_hash(c) == record.config_hash, record.config["preset"]


def test_load_is_the_busiest_cluster_s(case):
    load = case.load("venom64")
    assert len(load) == 2 and all(1 <= value <= 16 for value in load)


def test_a_run_measures_every_arm(record):
    depth = record.results["depths"]["3"]
    assert list(depth["ms"]) == [DENSE, WHOLE, "venom16", "act24"] == list(depth["loss"])
    assert all(abs(loss - math.log(512)) < 1 for loss in depth["loss"].values())
    assert set(depth["load"]) == {"venom16"} and set(record.results["ffn"]["errors"]) == {"venom16", "act24"}
    assert depth["peak_bytes"] == {} and record.kind == "bench-step" and record.config["layers"] == [3]
    json.dumps(record.results, allow_nan=False)
    text = step_bench.table(record)
    assert "3 layers, all of them timed" in text and "COMPOSED" not in text


def test_a_wrong_ffn_stops_the_run(monkeypatch):
    monkeypatch.setattr(ffn, "TOLERANCE", 0)
    monkeypatch.setattr(ffn, "SLACK", 0)
    with pytest.raises(AssertionError, match="differs from the reference"):
        step_bench.run(step_bench.config("smoke", ["act24"], repeats=1), "cpu", compile=False)


def test_a_loss_that_is_not_finite_stops_the_run(case):
    with torch.no_grad():
        case.model.norm.weight.fill_(math.nan)
    c = step_bench.config("smoke", [], repeats=1)
    with pytest.raises(AssertionError, match="not finite"):
        step_bench.measure_depth(c, case)


@pytest.mark.parametrize(
    ("asked", "works", "used"),
    [
        ("auto", {"flash": 3.0, "cudnn": 2.0}, "cudnn"),
        ("auto", {"flash": 3.0}, "flash"),
        ("auto", {}, None),
        ("torch", {"flash": 3.0, "cudnn": 2.0}, None),
        ("flash", {"flash": 3.0, "cudnn": 2.0}, "flash"),
    ],
)
def test_one_kernel_serves_all_arms_and_depths(monkeypatch, asked, works, used):
    seen = []

    class Case(TrainingStep):
        """On a CPU that says it is a GPU."""

        def __init__(self, preset, n_layer, **options):
            super().__init__("smoke", n_layer, device="cpu", compile=False)
            self.device = "cuda"

    def measure(c, case):
        seen.append([block.attn.kernel for block in case.model.blocks])
        return {}

    monkeypatch.setattr(step_cases.attention, "times_ms", lambda shape, device: works)
    pick = lambda asked, shape, device: "torch" if asked == "auto" else asked  # noqa: E731
    monkeypatch.setattr(step_cases.attention, "pick", pick)
    monkeypatch.setattr(step_bench.ffn, "LayerCase", lambda *_: None)
    monkeypatch.setattr(step_bench.ffn, "check", lambda case, sparsity: {})
    monkeypatch.setattr(step_bench, "TrainingStep", Case)
    monkeypatch.setattr(step_bench, "measure_depth", measure)
    results = step_bench.run(step_bench.config("llama7b", layers=[1, 2, 3], attention=asked)).results
    assert results["attention_used"] == used and results["attention"] == (works if asked == "auto" else {})
    assert seen == [n * [used or "torch"] for n in (1, 2, 3)]


def test_a_whole_model_is_composed_from_depths():
    times = step_table.step_times(made_up())
    assert times["recipe"]["ms"] == pytest.approx(100 + 32 * 20)
    assert times["recipe"]["layer_ms"] == pytest.approx(20) and times["recipe"]["residual"] < 1e-9
    assert step_table.baseline(times) == WHOLE  # the faster dense one
    row = {row["arm"]: row for row in step_table.rows(made_up())}["recipe"]
    assert row["x"] == pytest.approx((100 + 32 * 40) / (100 + 32 * 20)) and row["peak GiB"] == 6


def test_a_whole_model_that_fits_is_measured():
    times = step_table.step_times(made_up([22], "llama1b"))
    assert times[DENSE] == spread(110 + 22 * 40)


def test_the_paper_s_arithmetic_and_the_corrected_one():
    recipe = step_table.arithmetic("llama1b", "recipe")
    assert recipe["paper"] == pytest.approx(2.087, abs=1e-3)  # Table 2's step
    share = flops.honest_share(MODEL_PRESETS["llama1b"])
    assert recipe["corrected"] == flops.step_speedup(share, 8) < 1.5
    selected = step_table.arithmetic("llama1b", "venom16")
    assert selected["paper"] == pytest.approx(1 / (0.25 + 0.75 / 8))  # six Venom products
    assert step_table.arithmetic("llama1b", "act24")["paper"] == pytest.approx(
        1 / (0.25 + 0.75 * (4 + 2 / 1.5) / 6)
    )


def test_runs_three_ways():
    assert step_table.mixes() == pytest.approx(
        {
            "30k of 60k": 1 / 2,
            "40k of 60k": 2 / 3,
            "50k of 60k": 5 / 6,
            "60k of 60k": 1,
            "10k of 48k": 10 / 48,
        }
    )
    rows = {row["way"]: row for row in step_table.runs(made_up([22], "llama1b"))}
    assert rows["paper"]["30k of 60k"] == pytest.approx(1.352, abs=1e-3)  # Table 2's run
    measured = rows["measured"]
    assert measured["step"] == 980 / 540 and measured["60k of 60k"] == pytest.approx(980 / 540)
    assert measured["30k of 60k"] == flops.run_speedup(0.5, 980 / 540)


def test_parts_add_up_to_the_step():
    rows = {row["arm"]: row for row in step_table.parts(made_up([22], "llama1b"))}
    assert rows["recipe"]["ffn"] == 22 * 6 and rows[DENSE]["attention"] == 22 * 12
    for arm, step in ((DENSE, 980), ("recipe", 540)):
        assert rows[arm].pop("step") == step and rows[arm].pop("arm") == arm
        assert sum(rows[arm].values()) == pytest.approx(step)


def test_the_table_says_what_was_composed():
    text = step_bench.table(made_up())
    assert "32 layers, COMPOSED from 2, 4, 6" in text
    line = next(line for line in text.splitlines() if line.startswith("recipe "))
    shown = "740.000 100.000 20.000 0.000 1.865 1480.000 1.865 6.000 1.250"
    assert line.split()[1:] == shown.split()
    assert "ffn, recipe" in text and "busiest cluster over the mean: at most 1.50" in text
    assert "attention: cudnn" in text.splitlines()[-1]


def test_tables_show_one_card_s_steps(tmp_path, monkeypatch):
    """A later and wider record of another GPU, or of another residual stream, changes nothing."""
    store = records.RecordStore(recorded=tmp_path)
    monkeypatch.setattr(step_table, "RecordStore", lambda: store)
    record = made_up(preset="llama1b")
    ours = replace(record, device=step_table.CARD, date="2026-01-01T00:00:00Z")
    store.put(ours, recorded=True)
    depths = {n: depth | {"ms": depth["ms"] | {"recipe": spread(1.0)}} for n, depth in
              record.results["depths"].items()}  # fmt: skip
    other = step_bench.config("llama1b", ["recipe", "act24"], (2, 4, 6))
    other = records.make_record(step_bench.KIND, other, record.results | {"depths": depths})
    store.put(replace(other, device="NVIDIA A100", date="2026-02-01T00:00:00Z"), recorded=True)
    narrow = step_bench.config("llama1b", ["recipe", "act24"], (2, 4, 6), residual="bfloat16")
    narrow = records.make_record(step_bench.KIND, narrow, other.results)
    store.put(replace(narrow, device=step_table.CARD, date="2026-03-01T00:00:00Z"), recorded=True)
    assert step_table.recorded("llama1b", ["recipe"]) == ours
    assert step_table.speeds("llama1b")["recipe"] == step_table.rows(ours)[-1]["x"]
    with pytest.raises(ValueError, match=f"act24, device {step_table.CARD}"):
        step_table.recorded("llama1b", ["act24"])


def test_from_which_width_on_a_step_pays():
    x = {256: 0.9, 384: 1.05, 640: 1.01, 1024: 1.2, 2048: 1.4}
    found = pd.DataFrame({"d_model": list(x), "arm": "recipe", "x": list(x.values()), "x launched": 0.5})
    assert step_table.pays_from(found, "recipe") == 1024, "not from 384: a wider one is level"
    assert step_table.pays_from(found, "recipe", "x launched") is None
    assert [step_table.size(n) for n in (4_240_000, 155e6, 1.1e9)] == ["4.2M", "155M", "1.1B"]


def test_every_width_is_recorded_on_one_card():
    found = pd.DataFrame(step_table.widths())
    assert list(found["d_model"].unique()) == list(WIDTHS)
    assert {record.device for record in step_table.width_records()} == {step_table.CARD}
    assert (found["over busy"] < 1.08).all(), "the GPU never waits"
    table = step_table.width_table(found)
    assert table["d_model"].tolist() == list(WIDTHS) and len(table.columns) == 3 + 2 * len(
        step_table.AT_WIDTHS
    )


@pytest.mark.parametrize("preset", ["study10m", "study40m", "llama1b", "llama7b"])
def test_recorded_steps_run_at_the_speed_of_their_kernels(preset):
    rows = step_table.rows(step_table.recorded(preset, ()))
    assert len(rows) > 10 and all(0.95 < row["over busy"] < 1.08 for row in rows)
