"""Training in compiled pieces: the same numbers, few compilations, and statistics that still work."""

from dataclasses import replace

import pytest
import torch

from replicate import evaluate
from replicate.config import ModelConfig, SparsityConfig, TrainConfig
from replicate.data import TokenData
from replicate.gpt import GPT
from replicate.train import Trainer
from replicate.training import compiled

VENOM = SparsityConfig(w1=True, w2_t=True, activation="venom", n_clusters=4, top_k=2)
RUN = TrainConfig(
    model=ModelConfig(vocab_size=32, n_layer=2, d_model=16, d_ff=64, n_head=2, seq_len=16, sparsity=VENOM),
    corpus="synthetic",
    steps=14,
    batch_size=4,
    lr=1e-2,
    lr_warmup=3,
    dense_warmup=4,
    sparse_share=0.5,
    stats_every=5,
    eval_every=6,
    eval_batches=2,
    log_every=4,
)


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Pieces are traced as for a GPU but run as plain torch; the list grows with every compilation."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled.compiled_piece.cache_clear()
    monkeypatch.setattr(compiled, "BACKEND", backend)
    yield graphs
    torch._dynamo.reset()
    compiled.compiled_piece.cache_clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return TokenData("synthetic", 32, 16, tmp_path_factory.mktemp("corpus"))


def trained(config, data):
    trainer = Trainer(config, data=data, progress=False)
    trainer.run()
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "residual": "bfloat16"},
        {"order": "interleaved", "interleave": 4},
    ],
)
def test_compiled_pieces_train_the_same(data, traced, changes):
    config = replace(RUN, **changes)
    plain, pieces = trained(config, data).result(), trained(replace(config, compile=True), data).result()
    assert len(traced) > 0
    assert pieces["steps"]["phase"] == plain["steps"]["phase"]
    assert pieces["steps"]["loss"] == plain["steps"]["loss"]
    assert pieces["valid_losses"] == plain["valid_losses"]
    assert pieces["stats"] == plain["stats"]
    assert all(len(row["output_max"]) == 2 for row in pieces["stats"])


def test_another_model_in_the_process_compiles_nothing(data, traced):
    config = replace(RUN, compile=True)
    trained(config, data)
    count = len(traced)
    # A layer of each phase and the head, with and without gradients, and the parts of one that is watched.
    assert 0 < count <= 8
    trained(replace(config, seed=2), data)
    assert len(traced) == count
    trained(replace(config, model=replace(config.model, sparsity=SparsityConfig(w1=True))), data)
    assert len(traced) <= count + 4  # the sparse layer of other formats


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_baselines_and_untied_heads_have_pieces_too(data, activation):
    shape = replace(RUN.model, activation=activation, sparsity=SparsityConfig(), tie_embeddings=False)
    torch.manual_seed(1)
    model = GPT(shape)
    idx, targets = data.batch("train", 0, 4, 1)
    logits, loss = compiled.compiled_loss(model)(idx, targets)
    assert logits is None
    assert loss.item() == model(idx, targets)[1].item()


def test_a_stand_in_for_the_model_is_evaluated(data):
    model = GPT(RUN.model)
    shifted = lambda x, y: (None, model(x, y)[1] + 1)  # noqa: E731
    plain = evaluate.valid_loss(model, data, 2, 4)
    assert evaluate.valid_loss(model, data, 2, 4, forward=shifted) == pytest.approx(plain + 1)
