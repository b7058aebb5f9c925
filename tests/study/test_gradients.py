"""The gradient that a backward pass sends against the true one, in small models."""

import math
from dataclasses import replace

import pytest
import torch

from replicate.config import ModelConfig
from replicate.ffn import SparseFFN
from replicate.gpt import GPT
from replicate.settings.presets import SPARSITY_PRESETS, train_preset
from replicate.sparsity import soft_threshold24
from replicate.study import gradients
from replicate.study.records import RecordStore

MODEL = ModelConfig(vocab_size=32, n_layer=2, d_model=16, d_ff=64, n_head=2, seq_len=8)


def model(name, phase="sparse", **changes):
    torch.manual_seed(0)
    net = GPT(replace(MODEL, sparsity=replace(SPARSITY_PRESETS[name], n_clusters=4, **changes))).double()
    for ffn in net.ffns():
        if ffn.config.activation == "venom":
            ffn.make_clusters(0)
    net.set_phase(phase)
    return net


def batch():
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 32, (2, 8), generator=draw) for _ in range(2)]


def gradient(net, reading):
    """Of the first block's W1, by the backward pass itself."""
    for ffn in net.ffns():
        ffn.config = replace(ffn.config, backward=reading)
    net.zero_grad()
    net(*batch())[1].backward()
    return net.blocks[0].ffn.w1.grad.clone()


@pytest.mark.parametrize("name", ["w1", "w2", "w1+w2"])
def test_rows_compare_the_two_backward_passes(name):
    net = model(name)
    rows = gradients.by_layer(net, *batch())
    assert len(rows) == 2
    assert {ffn.config.backward for ffn in net.ffns()} == {"whole"} and net.blocks[0].ffn.w1.grad is None
    assert all(row["length"] != 1 and 0 < row["cosine"] < 1 for row in rows)
    # the embedding is tied to the first block's input: its gradient there is dx of that block
    kept = {}
    for reading in ("same", "whole"):
        net.blocks[0].register_forward_pre_hook(lambda _, args: (kept.setdefault("x", args[0]), None)[1])
        for ffn in net.ffns():
            ffn.config = replace(ffn.config, backward=reading)
        kept.pop("x", None)
        loss = net(*batch())[1]
        kept[reading] = torch.autograd.grad(loss, kept["x"])[0]
    assert rows[0]["length"] == pytest.approx(float(kept["whole"].norm() / kept["same"].norm()))
    cosine = torch.cosine_similarity(kept["whole"].flatten(), kept["same"].flatten(), 0)
    assert rows[0]["cosine"] == pytest.approx(float(cosine))


def test_the_last_layers_own_weights_get_the_same_gradient_from_w1():
    """Only what lies before product 5 sees the difference: dW1 of the last layer does not."""
    net = model("w1")
    last = net.blocks[-1].ffn
    first = {}
    for reading in ("same", "whole"):
        gradient(net, reading)
        first[reading] = net.blocks[0].ffn.w1.grad.clone(), last.w1.grad.clone(), last.w2.grad.clone()
    assert torch.equal(first["same"][1], first["whole"][1]) and torch.equal(
        first["same"][2], first["whole"][2]
    )
    assert not torch.allclose(first["same"][0], first["whole"][0])


def test_where_there_is_nothing_to_compare_it_says_so():
    with pytest.raises(ValueError, match="dense phase"):
        gradients.by_layer(model("w1", "dense"), *batch())
    for name in ("act24", "w1, same", "recipe, same"):
        with pytest.raises(ValueError, match="nothing to compare"):
            gradients.by_layer(model(name), *batch())


def test_the_recipe_is_compared_with_the_gradient_of_its_own_forward_pass():
    """Its backward pass reads W1 whole and W2^T in 2:4; the forward pass read S24(W1) and W2 whole."""
    net = model("recipe", top_k=2)
    rows = gradients.by_layer(net, *batch())
    kept = []
    for config in (net.ffns()[0].config, replace(net.ffns()[0].config, w2_t=False, backward="same")):
        for ffn in net.ffns():
            ffn.config = config
        kept.append(net(*batch())[1].item())
    assert kept[0] == kept[1], "the forward pass is one"
    assert all(abs(row["length"] - 1) > 1e-6 for row in rows)


@pytest.mark.parametrize("name", ["w1+w1t", "w2+w2t"])
def test_a_transpose_of_its_own_pattern_sends_another_direction(name):
    rows = gradients.by_layer(model(name), *batch())
    assert all(row["cosine"] < 1 for row in rows)


def test_a_record_holds_every_layer_at_every_step(tmp_path, monkeypatch):
    config = train_preset(
        "smoke", "w1", steps=6, lr_warmup=1, dense_warmup=2, batch_size=2, eval_batches=1, final_window=1
    )
    record = gradients.measure(config, (3, 6))
    assert record.results["steps"] == [3, 6] and record.config["arm"] == "w1 seed 1"
    assert [len(rows) for rows in record.results["layers"]] == [3, 3]
    assert all(math.isfinite(loss) for loss in record.results["losses"])
    store = RecordStore(tmp_path / "own", recorded=tmp_path / "recorded")
    store.put(record, recorded=True)
    other = replace(record, config={**record.config, "arm": "w1+w1t seed 1"}, config_hash="0" * 16)
    store.put(other, recorded=True)  # any preset's arm may be measured
    monkeypatch.setattr(gradients.records, "RecordStore", lambda: store)
    assert gradients.ends() == dict.fromkeys(("w1", "w1+w1t"), record.results["layers"][-1])


def test_what_one_layer_sends_down():
    draw = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(64, 32, generator=draw).double() for _ in range(2))
    plain = SparseFFN(32, 128).double()
    true = gradients.sent_down(plain, SPARSITY_PRESETS["w1, same"], x, upstream)
    assert true["length"] == pytest.approx(1) and true["cosine"] == pytest.approx(1)
    ours = gradients.sent_down(plain, SPARSITY_PRESETS["w1"], x, upstream)
    sparse = soft_threshold24(plain.w1.detach(), dim=0)
    dy1 = 2 * (x @ sparse).relu() * (upstream @ plain.w2.detach().T)
    by_hand = (dy1 @ plain.w1.detach().T).norm() / (dy1 @ sparse.T).norm()
    assert ours["length"] == pytest.approx(float(by_hand)) and ours["output"] == true["output"] < 1
    with pytest.raises(ValueError, match="formats of weights"):
        gradients.sent_down(plain, SPARSITY_PRESETS["act24"], x, upstream)
