import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from replicate import evaluate
from replicate.config import ModelConfig, SparsityConfig
from replicate.data import TokenData
from replicate.gpt import GPT
from replicate.study import completion
from replicate.study.transplant import with_sparsity

CONFIG = ModelConfig(vocab_size=16, n_layer=2, d_model=16, d_ff=64, n_head=2, seq_len=24)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return TokenData("synthetic", 16, 24, tmp_path_factory.mktemp("corpus"))


def make(**sparsity):
    torch.manual_seed(0)
    return GPT(replace(CONFIG, sparsity=SparsityConfig(n_clusters=4, top_k=1, **sparsity)))


class Oracle(torch.nn.Module):
    """Knows the answers: scores the token that follows the last 12 ones high, or low."""

    def __init__(self, task, score):
        super().__init__()
        self.embed = torch.nn.Embedding(1, 1)
        self.score, self.follows = score, {}
        for context, choices, answer in zip(task.contexts, task.choices, task.answers):
            text = torch.cat([context, choices[answer]]).tolist()
            self.follows |= {tuple(text[t - 12 : t]): text[t] for t in range(12, len(text))}

    def forward(self, idx, targets=None):
        logits = torch.zeros(*idx.shape, 16)
        for row, ids in enumerate(idx.tolist()):
            for t in range(12, len(ids)):
                token = self.follows.get(tuple(ids[t - 12 : t]))
                if token is not None:
                    logits[row, t - 1, token] = self.score
        return logits, None


def test_valid_loss_is_the_mean_over_the_held_out_batches(data):
    model = make()
    losses = [model(x, y)[1].item() for x, y in data.valid_batches(3, 4)]
    assert evaluate.valid_loss(model, data, 3, 4) == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert evaluate.valid_loss(model, data, 3, 4) == evaluate.valid_loss(model, data, 3, 4)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_valid_loss_is_that_of_the_present_phase(data):
    model = make(activation="venom")
    for ffn in model.ffns():
        ffn.w1.data.mul_(30)
        ffn.make_clusters(1)
    dense = evaluate.valid_loss(model, data, 2, 4)
    model.set_phase("sparse")
    assert evaluate.valid_loss(model, data, 2, 4) != dense


def test_completion_questions_come_from_the_held_out_text(data):
    task = completion.completion_task(data, 30, n_choices=5, length=4)
    assert task.contexts.shape == (30, 20)
    assert task.choices.shape == (30, 5, 4)
    assert len(task.answers.unique()) > 2
    text = np.asarray(data.valid).astype("<u2").tobytes()
    for context, choices, answer in zip(task.contexts, task.choices, task.answers):
        real = torch.cat([context, choices[answer]]).numpy().astype("<u2").tobytes()
        assert real in text
        assert all(piece.numpy().astype("<u2").tobytes() in text for piece in choices)
        assert len({tuple(piece.tolist()) for piece in choices}) == 5


def test_near_wrong_answers_come_from_the_next_tokens(data):
    task = completion.completion_task(data, 20, n_choices=3, length=4, near=12)
    text = data.valid.tolist()
    for context, choices, answer in zip(task.contexts.tolist(), task.choices.tolist(), task.answers.tolist()):
        start = next(i for i in range(len(text)) if text[i : i + 24] == [*context, *choices[answer]])
        after = text[start + 24 : start + 36]
        for place, choice in enumerate(choices):
            found = any(after[i : i + 4] == choice for i in range(9))
            assert found or place == answer
    with pytest.raises(ValueError, match="near is 8; choose 0, or at least"):
        completion.completion_task(data, 5, n_choices=3, length=4, near=8)


def test_completion_questions_repeat_for_a_seed(data):
    one, two, other = (completion.completion_task(data, 10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.choices, two.choices)
    assert torch.equal(one.contexts, two.contexts)
    assert not torch.equal(one.contexts, other.contexts)


def test_who_knows_the_text_answers_right_and_who_knows_nothing_guesses(data):
    task = completion.completion_task(data, 40, length=8)
    assert completion.completion(Oracle(task, 5.0), task)["accuracy"] == 1
    assert completion.completion(Oracle(task, -5.0), task)["accuracy"] == 0
    random = completion.completion(make(), completion.completion_task(data, 200))
    assert random["chance"] == 0.25
    assert random["accuracy"] == pytest.approx(0.25, abs=5 * random["stderr"])
    p = random["accuracy"]
    assert random["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 200))
    assert sum(random["correct"]) / 200 == p


def test_completion_scores_do_not_depend_on_the_batch_size(data):
    model, task = make(), completion.completion_task(data, 20)
    assert completion.completion(model, task, 3) == completion.completion(model, task, 20)


def test_impossible_tasks_are_named(data):
    with pytest.raises(ValueError, match=r"context 20 \+ length 8 tokens.*at most seq_len = 24"):
        completion.completion_task(data, 5, context=20, length=8)
    with pytest.raises(ValueError, match="n_choices 1"):
        completion.completion_task(data, 5, n_choices=1)

    class Monotone:
        seq_len, valid = 24, np.zeros(500, np.uint16)

    with pytest.raises(ValueError, match="repeats itself"):
        completion.completion_task(Monotone(), 2)
    Monotone.valid = np.zeros(20, np.uint16)
    with pytest.raises(ValueError, match="20 held-out tokens are too few"):
        completion.completion_task(Monotone(), 2)


def test_a_transplanted_model_is_the_same_but_for_its_format(data):
    """The fixed clusters of routing "static" are those with most activation on the sample."""
    model = make().train()
    sample = data.valid_batches(1, 4)[0][0]
    before = {name: value.clone() for name, value in model.named_parameters()}
    formats = SparsityConfig(activation="venom", n_clusters=4, top_k=1, routing="static", inner=False)
    copy = with_sparsity(model, formats, sample)
    assert model.training and not copy.training
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert {ffn.phase for ffn in copy.ffns()} == {"sparse"}
    read = evaluate.ffn_inputs(model, sample)
    for ffn, x in zip(copy.ffns(), read, strict=True):
        energy = (x @ ffn.w1).relu().square().unflatten(-1, (4, -1)).sum((0, 1, 3))
        assert ffn.static_clusters.tolist() == [int(energy.argmax())]
    copy.set_phase("dense")
    torch.testing.assert_close(copy(sample)[0], model(sample)[0])


def test_layer_statistics_are_those_of_the_layers(data):
    model = make(activation="venom", w1=True)
    x = data.valid_batches(1, 4)[0][0]
    inputs = evaluate.ffn_inputs(model, x)
    rows = evaluate.layer_stats(model, x)
    assert len(rows) == len(inputs) == 2
    for row, ffn, read in zip(rows, model.ffns(), inputs):
        assert read.shape == (4, 24, 16)
        zeros = (torch.relu(read @ ffn.w1) == 0).float().mean().item()
        assert row["y2_sparsity"] == pytest.approx(zeros, abs=1e-3)
        assert row["kept_sparsity"] == row["y2_sparsity"]  # the dense phase masks nothing
        assert row["w1_max"] == ffn.w1.abs().max().item()
        assert not ffn.collect
    model.blocks[1].register_forward_hook(lambda *call: torch.full_like(call[2], 7.0))
    assert evaluate.layer_stats(model, x)[1]["output_max"] == 7
    for ffn in model.ffns():
        ffn.make_clusters(1)
    model.set_phase("sparse")
    sparse = evaluate.layer_stats(model, x)
    assert all(row["kept_sparsity"] >= 0.75 and row["router_load"] >= 1 for row in sparse)


def test_flip_rates_count_changed_masks():
    model = make(w1=True, w2=True)
    before = [ffn.weight_masks() for ffn in model.ffns()]
    assert evaluate.weight_flips(before, model) == {"w1": [0, 0], "w2": [0, 0]}
    with torch.no_grad():
        ffn = model.ffns()[1]
        group = ffn.w1[:4, 0]
        group.copy_(
            torch.tensor([1.0, 2.0, 3.0, 4.0]) if before[1]["w1"][0, 0] else torch.tensor([4.0, 3, 2, 1])
        )
    flips = evaluate.weight_flips(before, model)
    assert flips["w2"] == [0, 0]
    assert flips["w1"][0] == 0
    assert 0 < flips["w1"][1] <= 4 / ffn.w1.numel()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_layer_statistics_of_nothing_are_nan(shape):
    rows = evaluate.layer_stats(GPT(CONFIG), torch.zeros(shape, dtype=torch.long))
    assert len(rows) == CONFIG.n_layer and all(math.isnan(row["output_max"]) for row in rows)
    assert all(math.isnan(row["kept_energy"]) and row["w1_max"] > 0 for row in rows)
