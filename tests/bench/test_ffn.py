"""The benchmark of one FFN: what it compares, that it refuses wrong results, and how it shows a record."""

import json

import pytest
import torch

from replicate.bench import ffn as ffn_bench
from replicate.bench import timing
from replicate.ffn import SparseFFN
from replicate.gpt import DenseFFN
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.study import records
from replicate.training.compiled import RECOMPILE_LIMIT

SHAPE = (64, 64, 256)
SMALL = ffn_bench.config([SHAPE], ("venom16", "recipe", "act24"), 1)


@pytest.fixture
def problem():
    return ffn_bench.LayerCase(SHAPE, 0, "cpu")


@pytest.fixture(scope="module")
def record():
    return ffn_bench.run(SMALL, "cpu")


def spread(ms):
    return {"ms": ms, "ms_p10": 0.9 * ms, "ms_p90": 1.1 * ms}


def made_up(by_hand=None):
    """A record as a GPU would write it; without `by_hand` milliseconds, as before that arm was there."""
    arms = {"dense": 12.0, "dense, eager": 15.0, "recipe": 6.0}
    arms |= {} if by_hand is None else {"dense, by hand": by_hand}
    error = {"y3": 0.001, "dx": 0.002, "dW1": 0.009, "dW2": 0.003}
    shape = {
        "shape": [16384, 4096, 16384],
        "engines": {"recipe": "2:4 by cusparselt"},
        "errors": {"recipe": {"error": error, "limit": dict.fromkeys(error, 0.02)}},
        "load": {"recipe": 1.25},
        "peak_bytes": dict.fromkeys(arms, 4 * 2**30)
        | {"dense, eager": 5 * 2**30, "recipe": 3 * 2**30}
        | ({} if by_hand is None else {"dense, by hand": 2 * 2**30}),
        "graph": {name: spread(ms) for name, ms in arms.items()},
        "launches": {name: spread(ms + 2) for name, ms in arms.items()},
        "sustained": {name: ms + 1 for name, ms in arms.items()},
        "kernels": {
            "dense": {"nvjet_hsh_256x128": 10.0, "triton_poi_fused_relu": 2.0},
            "recipe": {
                "_venom_down_kernel": 2.0,
                "sm90_xmma_sparse_gemm_bf16bf16": 2.5,
                "_soft_threshold_prune24_kernel": 0.25,
                "bfloat16_copy_kernel": 0.5,
                "_route_topk_kernel": 0.125,
                "_venom_select_kernel": 0.5,
                "_quantise_rows_kernel": 0.75,
            },
        },
    }
    return records.make_record(ffn_bench.KIND, ffn_bench.config(sparsity=["recipe"]), {"shapes": [shape]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([SHAPE], ["venom8"]), "'venom8' is none of the presets w1, .*, fp8, venom16, fp8"),
        (([SHAPE], ["dense"]), "'dense' is none of the presets w1"),
        (([(8, 64, 96)], ["venom16"]), "multiple of 64"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ffn_bench.config(*arguments)


def test_defaults_are_the_paper_s_shapes_and_exist():
    assert ffn_bench.config()["shapes"] == [[16384, 4096, 16384], [16384, 2048, 8192]]
    assert set(ffn_bench.PROFILED) <= set(ffn_bench.SPARSITIES)


def test_all_arms_compute_on_the_same_weights(problem):
    dense = DenseFFN(64, 256)
    dense.w1, dense.w2 = problem.w1, problem.w2
    with torch.autocast("cpu", torch.bfloat16):
        expected = dense(problem.x)
    ours, *gradients = problem.step(problem.layer("dense"))
    assert torch.equal(ours, expected)
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    sparse = problem.layer("recipe")
    assert sparse.w1 is problem.w1 and sparse.phase == "sparse"
    assert not torch.equal(problem.step(sparse)[0], expected)


def test_the_arm_by_hand_is_the_dense_layer(problem):
    by_hand, dense = (problem.step(problem.forward(name)) for name in ("dense, by hand", "dense"))
    assert torch.equal(by_hand[0], dense[0]) and [g.dtype for g in by_hand] == [g.dtype for g in dense]
    assert not torch.equal(by_hand[2], dense[2]), (
        "sqrt(y2) is not relu(y1) to the last bit: it is another arm"
    )
    layer = problem.forward("dense, by hand", "reference")
    assert isinstance(layer, SparseFFN) and layer.phase == "dense" and layer.w1 is problem.w1


def test_arms_in_fp8_are_compared_with_the_reference_in_fp8(problem):
    found = ffn_bench.check(problem, ["fp8", "venom16, fp8"])["errors"]
    for errors in found.values():
        assert all(1e-4 < error <= 0.03 for error in errors["error"].values()), errors
    dense, eight, both = (problem.layer(name) for name in ("dense", *ffn_bench.FP8))
    assert (eight.phase, both.phase) == ("dense", "sparse") and eight.config.fp8 and both.config.fp8
    apart = timing.relative_error(problem.step(eight)[0], problem.step(dense)[0])
    assert 0.03 < apart < 0.1, "far more than bfloat16's rounding"
    assert set(ffn_bench.FP8) <= set(ffn_bench.SPARSITIES)


def test_on_a_gpu_dense_layers_are_compiled_and_others_are_not(monkeypatch, problem):
    made = []
    monkeypatch.setattr(torch, "compile", lambda layer, **how: made.append((layer, how)) or layer)
    problem.forward("fp8")
    assert not made, "on a CPU nothing is"
    problem.device = "cpu:0"  # any name but "cpu"
    for name in ("fp8", "dense", "venom16, fp8", "dense, by hand"):
        problem.forward(name)
    problem.forward("fp8", "reference")
    assert [layer.config for layer, _ in made] == [SPARSITY_PRESETS["fp8"], SPARSITY_PRESETS["dense"]]
    assert [how for _, how in made] == 2 * [{"dynamic": False}]
    assert torch._dynamo.config.recompile_limit >= RECOMPILE_LIMIT


def test_errors_are_small_where_backends_agree(problem):
    found = ffn_bench.check(problem, ["dense, by hand", "venom16", "act24+tile", "w1+w2+t"])
    assert set(found["engines"]) | {"dense, by hand"} == set(found["errors"])
    assert len(found["engines"]) == 3
    for errors in found["errors"].values():
        for part in ffn_bench.PARTS:
            assert 1e-4 < errors["error"][part] <= errors["limit"][part]
            assert ffn_bench.TOLERANCE <= errors["limit"][part] <= ffn_bench.LIMIT


@pytest.mark.parametrize("wrong", [lambda y: 1.25 * y, lambda y: y.roll(1, 0), lambda y: y * float("nan")])
def test_a_wrong_result_raises_before_any_figure(monkeypatch, capsys, wrong):
    right = SparseFFN._sparse

    def sparse(ffn, x):
        return right(ffn, x) if ffn.backend == "reference" else wrong(right(ffn, x))

    monkeypatch.setattr(SparseFFN, "_sparse", sparse)
    with pytest.raises(AssertionError, match=r"\[64, 64, 256\] differs .*recipe, y3"):
        ffn_bench.run(SMALL, "cpu")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("part", range(4))
def test_a_wrong_dense_peer_raises_too(monkeypatch, part):
    right = ffn_bench.LayerCase.step

    def step(p, forward, x=None):
        found = list(right(p, forward, x))
        if not isinstance(forward, SparseFFN):
            found[part] = found[part] * 1.25
        return tuple(found)

    monkeypatch.setattr(ffn_bench.LayerCase, "step", step)
    with pytest.raises(AssertionError, match=f"differs .*dense, by hand, {ffn_bench.PARTS[part]}"):
        ffn_bench.run(SMALL, "cpu")


def test_plain_torch_is_not_measured_on_a_gpu(problem):
    problem.device = "cuda"
    problem.layer = lambda name: ffn_bench.LayerCase(SHAPE, 0, "cpu").layer(name)
    with pytest.raises(ValueError, match="no kernels to measure"):
        ffn_bench.check(problem, ["recipe"])


def test_a_run_measures_every_arm(record):
    (shape,) = record.results["shapes"]
    arms = {"dense", "dense, by hand", "dense, eager", *SMALL["sparsity"]}
    assert set(shape["launches"]) == arms and "graph" not in shape
    assert set(shape["load"]) == {"venom16", "recipe"} and min(shape["load"].values()) >= 1
    fastest = min(shape["launches"][name]["ms"] for name in ("dense", "dense, by hand"))
    for row in ffn_bench.rows(record):
        assert 0 < row["ms_p10"] <= row["ms"] <= row["ms_p90"]
        assert row["x"] == fastest / row["ms"]
        assert ("error" in row) == (row["arm"] not in ("dense", "dense, eager"))
    assert record.kind == "bench-ffn" and record.versions["torch"] and record.seconds > 0
    json.dumps(record.results, allow_nan=False)


def test_on_a_gpu_there_are_graphs_and_memory_too(monkeypatch, problem):
    replayed = []
    monkeypatch.setattr(torch, "compile", lambda layer, **_: lambda x: layer(x))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(timing, "graphed", lambda call, pool: lambda: replayed.append(call()))
    monkeypatch.setattr(timing, "sustained_ms", lambda call, seconds: 1.0)
    monkeypatch.setattr(timing, "peak_bytes", lambda call: 2**30)
    problem.device = "cpu:0"  # any name but "cpu"
    out = ffn_bench.measure(SMALL, problem)
    assert set(out["graph"]) == set(out["sustained"]) == set(out["peak_bytes"]) == set(out["launches"])
    assert len(replayed) == len(out["graph"]) * (SMALL["repeats"] + 2)


def test_stages_add_up():
    shape = made_up().results["shapes"][0]
    found = ffn_bench.stages(shape, "recipe")
    assert found == {
        "weight refresh": 0.25,
        "routing and lists": 0.125,
        "FP8 rounding": 0.75,
        "Venom products": 2.0,
        "2:4 products": 2.5,
        "dense products": 0.0,
        "element-wise": 0.5 + 0.5,
    }
    assert sum(found.values()) == sum(shape["kernels"]["recipe"].values())
    dense = ffn_bench.stages(shape, "dense")
    assert (dense["dense products"], dense["element-wise"], dense["weight refresh"]) == (10, 2, 0)


def test_rows_compare_with_dense():
    row = {row["arm"]: row for row in ffn_bench.rows(made_up())}["recipe"]
    assert (row["x"], row["x eager"], row["x launches"]) == (2.0, 2.5, 14 / 8)
    assert (row["x sustained"], row["peak GiB"], row["of dense"], row["error"]) == (13 / 7, 3, 0.75, 0.009)


@pytest.mark.parametrize("ms, base", [(10.0, 10.0), (13.0, 12.0)])
def test_rows_compare_with_the_faster_dense_arm(ms, base):
    rows = {row["arm"]: row for row in ffn_bench.rows(made_up(ms))}
    row = rows["recipe"]
    assert (row["x"], row["x launches"], row["x sustained"]) == (base / 6, (base + 2) / 8, (base + 1) / 7)
    assert (row["x eager"], row["of dense"]) == (2.5, 0.75), "over eager, and the compiled layer's memory"
    assert (rows["dense"]["x"], rows["dense, by hand"]["x"]) == (base / 12, base / ms)
    assert (rows["dense"]["of dense"], rows["dense, by hand"]["of dense"]) == (1, 0.5)


def test_each_way_of_timing_has_its_own_baseline():
    record = made_up(13.0)
    record.results["shapes"][0]["launches"]["dense, by hand"] = spread(4.0)
    row = {row["arm"]: row for row in ffn_bench.rows(record)}["recipe"]
    assert (row["x"], row["x launches"]) == (2.0, 0.5)


def test_the_baseline_is_dense_and_not_eager():
    times = {name: {"ms": ms} for name, ms in (("recipe", 1.0), ("dense, eager", 2.0), ("dense", 3.0))}
    assert ffn_bench.baseline(times) == "dense"
    assert ffn_bench.baseline(times | {"dense, by hand": {"ms": 2.5}}) == "dense, by hand"
    assert ffn_bench.baseline(times | {"dense, by hand": {"ms": 3.5}}) == "dense"


def test_the_table_has_all_of_it():
    text = ffn_bench.table(made_up())
    assert "tokens 16384, d_model 4096, d_ff 16384" in text
    line = next(line for line in text.splitlines() if line.startswith("recipe "))
    shown = ["recipe", "6", "5.4", "6.6", "2", "1.75", "2.5", "1.857", "3", "0.75", "0.009"]
    assert line.split() == shown
    assert "weight refresh" in text and "busiest cluster over the mean: at most 1.25" in text
