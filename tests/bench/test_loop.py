"""The benchmark of the training loop: the same training, by the trainer and by plain loops."""

import pytest
import torch

from replicate.bench import loop
from replicate.settings.text import from_dict
from replicate.train import Trainer

TINY = {"corpus": "synthetic", "model.n_layer": 1, "model.d_model": 16, "model.d_ff": 32, "model.n_head": 1,
        "model.seq_len": 16, "model.vocab_size": 64, "batch_size": 2, "device": "cpu"}  # fmt: skip


def test_the_trainer_is_compared_with_a_plain_loop():
    record = loop.run(loop.config(changes=TINY, repeats=2, turn=3))
    found = record.results
    assert found["low"] <= found["ratio"] <= found["high"] and found["fastest"] == "plain loop, not compiled"
    assert record.kind == "bench-train" and record.device.startswith("CPU") and found["threads"] == 1
    assert "ratio to the fastest plain loop" in loop.table(record)


def test_both_train_the_same():
    """But for rounding: the trainer divides a gradient by what the plain loop multiplies it with."""
    config = from_dict(loop.config(changes=TINY | {"min_lr_share": 1.0, "weight_decay": 0})["train"])
    ours, plain = (Trainer(config, progress=False) for _ in range(2))
    ours.run(4)
    loop.PlainLoop(plain).run(0, 4)
    for name, weight in ours.model.state_dict().items():
        torch.testing.assert_close(weight, plain.model.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_plain_loops_are_compiled_two_ways_and_large_vocabularies_drawn(monkeypatch):
    asked = []

    def compile(fn, mode=None, **_):
        asked.append(mode)
        return fn

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("replicate.train.compiled_loss", lambda model: model)
    large = TINY | {"model.vocab_size": 70_000, "compile": True}
    found = loop.run(loop.config(changes=large, repeats=1, turn=1)).results
    assert asked == ["default", "reduce-overhead"]
    assert list(found["tokens_per_s"]) == ["trainer", *(f"plain loop, {mode}" for mode in asked)]
    inputs, targets = loop.RandomTokens(from_dict(loop.config(changes=large)["train"])).batch(
        "train", 0, 2, 1
    )
    assert torch.equal(inputs[:, 1:], targets[:, :-1]) and inputs.max() > 1000


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("steps", "use --turn and --repeats"),
        ("lr_warmup", "it is 0"),
        ("eval_every", "it is 0"),
        ("model.sparsity.w1", "the model is dense"),
    ],
)
def test_what_the_benchmark_sets_is_refused(name, why):
    with pytest.raises(ValueError, match=f"{name} cannot be changed here; {why}"):
        loop.config(changes={name: "5"})


@pytest.mark.parametrize("changes", [{"model.dff": 3}, {"lr": "fast"}])
def test_unknown_fields_and_values_are_refused(changes):
    with pytest.raises(ValueError):
        loop.config(changes=changes)
