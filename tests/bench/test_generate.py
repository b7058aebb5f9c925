"""The benchmark of generation: bytes by formula, composed models, ratios; rehearsed on this processor."""

import pytest
import torch

from replicate.bench import generate
from replicate.bench.generate_cases import AGAIN, ARMS, DENSE, Layers, Model, bytes_read, check, used_share
from replicate.settings.presets import train_preset
from replicate.study import records

GPU = torch.cuda.is_available()


def made_up(batches=(1, 8)):
    """As a GPU would write it, of a copy of 4 TB/s: a step is 1 ms and 0.5 a layer, the arm's half of it."""
    c = generate.config("llama7b", ["venom16"], batches)
    whole = 2 * 2 * 4096 * 16384
    ffn, models = {}, {str(depth): {} for depth in c["layers"]}
    for batch in map(str, batches):
        used = 0.25 if batch == "1" else 1.0
        dense = {"dense": 2 * whole / 4e9, "dense, by hand": whole / 3.2e9}
        decode = dense | {"venom16": used * whole / 2e9 / (1 if batch == "1" else 2)}
        ffn[batch] = {
            "used": {"venom16": used},
            "decode": {name: {"ms": ms} for name, ms in decode.items()},
            "prefill": {"dense": {"ms": 3.0}, "venom16": {"ms": 1.0}},
        }
        for depth in c["layers"]:
            times = {DENSE: 1 + depth / 2, "venom16": (1 + depth / 2) / 2, AGAIN: 1.2 * (1 + depth / 2)}
            models[str(depth)][batch] = {
                name: {
                    "step": {"ms": ms},
                    "prefill": {"ms": 10 * ms},
                    "weight_bytes": 2**30 * (1 + depth),
                    "step_peak_bytes": 2**31,
                }
                for name, ms in times.items()
            }
    return records.make_record(generate.KIND, c, {"bandwidth": 4e12, "ffn": ffn, "models": models})


def test_bytes_of_a_step_by_hand():
    """D = 4, F = 8 in 16 bits: each weight is 64 bytes, 36 where it is compressed."""
    assert bytes_read(None, 4, 8, 1.0) == 128
    assert bytes_read(ARMS["venom16"], 4, 8, 0.25) == 32
    assert bytes_read(ARMS["active16"], 4, 8, 0.25) == 64 + 16
    assert bytes_read(ARMS["w1+w2"], 4, 8, 1.0) == 72
    assert bytes_read(ARMS["recipe, same"], 4, 8, 0.5) == 36
    assert bytes_read(ARMS["recipe"], 4, 8, 0.5) == 18 + 32


def test_ratios_are_over_the_fastest_dense_ffn_and_bytes_over_the_copy():
    found = {(row["batch"], row["arm"]): row for row in generate.rows(made_up())}
    one = found[1, "venom16"]
    assert one["x"] == pytest.approx(1 / 3.2 / (0.25 / 2)) and one["x limit"] == pytest.approx(4)
    assert one["of limit"] == pytest.approx(0.5) and found[1, "dense"]["of limit"] == pytest.approx(0.5)
    assert found[1, "dense, by hand"]["x"] == 1 and "step ms" not in found[1, "dense, by hand"]
    assert one["x prefill FFN"] == pytest.approx(3)


def test_a_deep_model_is_the_line_through_two_depths():
    row = next(row for row in generate.rows(made_up()) if row["arm"] == "venom16")
    assert row["step ms"] == pytest.approx((1 + 32 / 2) / 2) and row["x step"] == pytest.approx(2.2)
    assert row["prefill ms"] == pytest.approx(10 * row["step ms"])
    assert row["weights GiB"] == pytest.approx(33) and row["step peak GiB"] == 2


def test_the_table_says_what_is_reached_and_where_the_gain_is_gone():
    text = generate.table(made_up())
    assert "venom16, decode FFN at batch 1: 2.50 x dense, aim 3.0: not reached" in text
    assert "venom16, prefill FFN at batch 1: 3.00 x dense, aim 2.5: reached" in text
    assert "venom16: the gain of its FFN at decoding is still there at batch 8" in text
    record = made_up()
    record.results["ffn"]["8"]["decode"]["venom16"]["ms"] *= 2
    assert "gone at batch 8" in generate.table(record)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "llama1b", "arms": ["venom8"]}, "no arm 'venom8'; choose from venom16"),
        ({"preset": "llama1b", "batches": [65]}, r"batches \[65\]: choose 1 to 64"),
        ({"preset": "llama1b", "layers": [3]}, r"layers \[3\]: give two depths"),
        ({"preset": "smoke", "arms": ["venom16x64"]}, "d_ff is 384; 64 equal clusters"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate.config(**arguments)


@pytest.mark.skipif(GPU, reason="rehearses on a CPU")
def test_it_times_layers_and_models_on_this_processor():
    arms = ["venom16", "recipe, same"]
    c = generate.config("smoke", arms, [1, 3], prompt=5, repeats=1)
    record = generate.run(c, "cpu", compile=False)
    ffn = record.results["ffn"]["3"]
    assert ffn["checked"]["venom16, prefill"]["error"] <= ffn["checked"]["venom16, prefill"]["limit"]
    assert 0.25 < ffn["used"]["venom16"] <= 0.75 and record.results["ffn"]["1"]["used"]["venom16"] == 0.25
    assert set(ffn["decode"]) == {"dense", "dense, weights transposed", "dense, by hand", *arms}
    assert set(record.results["models"]["2"]["3"]) == {DENSE, *arms, AGAIN}
    assert "recipe, same" in generate.table(record)


@torch.no_grad()
def test_a_wrong_layer_is_not_timed():
    layers = Layers(64, 256, torch.float32, 0, "cuda" if GPU else "cpu")
    ffn, x = layers.sparse("active16")[0], layers.inputs(3)
    assert check("active16", ffn, x)["error"] <= 2e-2 and 0.25 < used_share([ffn], x) < 0.75
    plain = ffn.forward
    ffn.forward = lambda x: 1.1 * plain(x)
    with pytest.raises(AssertionError, match=r"active16, 3 tokens: error 1.00e-01, at most 2.00e-02"):
        check("active16", ffn, x)


@torch.no_grad()
def test_one_of_several_tokens_may_have_got_other_clusters():
    layers = Layers(64, 256, torch.float32, 0, "cuda" if GPU else "cpu")
    ffn, x = layers.sparse("active16")[0], layers.inputs(5)
    plain = ffn.forward
    ffn.forward = lambda x: torch.cat([-plain(x[:1]), plain(x[1:])])
    assert check("active16", ffn, x)["off"] == 1
    ffn.forward = lambda x: torch.cat([-plain(x[:2]), plain(x[2:])])
    with pytest.raises(AssertionError, match=r"2 tokens off by 0\.2"):
        check("active16", ffn, x)


@torch.no_grad()
def test_layers_by_the_kernels_of_decoding(monkeypatch):
    """Of both arms interpreted, in float32, and dense by the same kernels: what a GPU is to time."""
    pytest.importorskip("triton")
    if not GPU:
        monkeypatch.setenv("REPLICATE_BACKEND", "triton")
    layers = Layers(32, 256, torch.float32, 0, "cuda" if GPU else "cpu")
    x = layers.inputs(2)
    for name in ("venom16", "recipe, same"):
        assert check(name, layers.sparse(name, 1)[0], x)["engine"].startswith(
            "decoding of 2 tokens by triton"
        )
    by_rows, plain = (layers.dense(name, 1)[0](x) for name in ("dense, our kernels", "dense"))
    torch.testing.assert_close(by_rows, plain)


@torch.no_grad()
def test_a_model_is_each_arm_in_turn_and_counts_what_it_holds():
    device = "cuda" if GPU else "cpu"
    model = Model(train_preset("smoke").model, 1, 40, torch.float32, device)
    ids = torch.arange(6, device=device).view(2, 3)
    texts = []
    for name in (DENSE, "active16", DENSE):
        model.use(name)
        texts.append(model.gpt(ids)[0])
    assert torch.equal(texts[0], texts[2]) and not torch.equal(texts[0], texts[1])
    plain = sum(p.nbytes for p in model.gpt.parameters())
    model.use("venom16")
    assert model.weight_bytes() == plain
    ffn = model.gpt.ffns()[0]
    from replicate.kernels.decode.ffn import prepare

    ffn.decoder = None, prepare(ffn, torch.float32)
    own = ffn.w1.nbytes + 16 * 96 * 4  # W1 by neuron and the means; W2 is the layer's own
    assert model.weight_bytes() == plain + own


@pytest.mark.gpu
def test_a_small_run():
    c = generate.config(
        "width256", ["venom16", "recipe, same", "active16", "w1+w2"], [1, 8], prompt=64, repeats=2
    )
    text = generate.table(generate.run(c, compile=False))
    assert "batch 8" in text and "dense, our kernels" in text
