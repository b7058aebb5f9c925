"""No token may see a later one: a model that trains with a leak cannot be served as it was trained."""

from dataclasses import replace

import pytest
import torch

from replicate.config import ModelConfig, SparsityConfig
from replicate.gpt import GPT
from replicate.settings.presets import SPARSITY_PRESETS

BATCH, SEQ, VOCAB = 2, 32, 50
SHAPE = ModelConfig(vocab_size=VOCAB, n_layer=2, d_model=16, d_ff=128, n_head=2, seq_len=SEQ)
CAUSAL = {name: config for name, config in SPARSITY_PRESETS.items() if config.causal}
CAUSAL |= {
    "l2": replace(SPARSITY_PRESETS["recipe"], metric="l2"),
    "cosine": replace(SPARSITY_PRESETS["recipe"], metric="cosine"),
    "soft": SparsityConfig(activation="24", selection="soft"),
    "learned": SparsityConfig(activation="24", selection="learned"),
    "mvue": SparsityConfig(activation="24", wgrad="mvue"),
    "clusters-only": replace(SPARSITY_PRESETS["venom64"], inner=False),
    "scaled": replace(SPARSITY_PRESETS["w1+w2+t"], weight_scale=True),
}


def make(sparsity, dtype=torch.float32, phase="sparse", **shape):
    """A model whose FFNs and routers have something to choose between, in the sparse phase."""
    torch.manual_seed(0)
    model = GPT(replace(SHAPE, sparsity=sparsity, **shape)).to(dtype)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(15)
    for ffn in model.ffns():
        if sparsity.activation == "venom":
            ffn.make_clusters(1)
        if ffn.score is not None:
            ffn.score.data.normal_()
    model.set_phase(phase)
    return model


def tokens(seed=1):
    return torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(seed))


def logits(model, idx):
    with torch.no_grad():
        return model(idx)[0]


def moved(model, place):
    """[B, S] bool: where the logits differ once sequence 0's token at `place` is another one."""
    idx = tokens()
    changed = idx.clone()
    changed[0, place] = (idx[0, place] + 1) % VOCAB
    return (logits(model, idx) != logits(model, changed)).any(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_later_token_leaves_earlier_logits_exactly_as_they_were(name, dtype):
    model = make(CAUSAL[name], dtype)
    for place in (1, 5, 18, SEQ - 1):
        changes = moved(model, place)
        assert not changes[0, :place].any()
        assert changes[0, place], "the changed token itself counts"
        assert not changes[1].any(), "another sequence of the batch is another text"
    assert moved(model, 0)[0].all()


@pytest.mark.parametrize("name", ["recipe", "act24", "w1+w2+t"])
def test_with_shared_keys_and_in_the_dense_phase_too(name):
    for model in (make(CAUSAL[name], n_kv_head=1), make(CAUSAL[name], phase="dense")):
        assert not moved(model, 9)[0, :9].any()


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prefix_alone_gives_the_same_logits(name):
    """So that text can be generated token by token with the trained routing."""
    model = make(CAUSAL[name], torch.float64)
    whole = logits(model, tokens())
    for length in (1, 7, SEQ - 1):
        torch.testing.assert_close(
            logits(model, tokens()[:, :length]), whole[:, :length], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("name", ["recipe", "act24+wgrad"])
def test_under_bfloat16_autocast(name):
    model = make(CAUSAL[name])
    with torch.autocast("cpu", torch.bfloat16):
        changes = moved(model, 20)
    assert not changes[0, :20].any() and changes[0, 20] and not changes[1].any()


def test_a_block_vote_leaks():
    """Rows of a block choose their columns together: the last token moves the logits of the first ones."""
    model = make(SPARSITY_PRESETS["block16"])
    changes = moved(model, SEQ - 1)
    assert changes[0, : SEQ - 1].any(), "earlier places of the sequence"
    assert changes[1].any(), "and the other sequence of the block"


def test_a_tile_leaks_within_its_four_tokens():
    model = make(SPARSITY_PRESETS["tile24"], n_layer=1)
    changes = moved(model, 23)  # of the tiles of places 20 to 23
    assert changes[0, 20:23].any()
    assert not changes[0, :20].any() and not changes[1].any()


def test_a_block_of_one_token_does_not_leak():
    """It is the vote over tokens that leaks, not the choice by magnitude."""
    model = make(replace(SPARSITY_PRESETS["block16"], v=1))
    changes = moved(model, 20)
    assert not changes[0, :20].any() and not changes[1].any()


def test_the_leak_of_a_block_stops_at_its_edge():
    model = make(replace(SPARSITY_PRESETS["block16"], v=8), n_layer=1)
    changes = moved(model, 20)  # of the block of places 16 to 23
    assert changes[0, 16:20].any()
    assert not changes[0, :16].any() and not changes[1].any()
