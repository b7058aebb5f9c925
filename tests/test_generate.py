"""Text token by token: what is kept, fixed buffers, held weights, and the kernels of decoding."""

from dataclasses import replace

import pytest
import torch

from replicate import SPARSITY_PRESETS
from replicate.config import ModelConfig
from replicate.generate import StaticCache, TokenStep, generate, held
from replicate.gpt import GPT

TINY = ModelConfig(vocab_size=50, n_layer=2, d_model=32, d_ff=128, n_head=2, seq_len=16)
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def make(sparsity="dense", **changes):
    torch.manual_seed(1)
    model = GPT(replace(TINY, sparsity=SPARSITY_PRESETS[sparsity], **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)  # logits that differ clearly
    for ffn in model.ffns():
        ffn.w1.data *= 4  # and what the FFN adds
        if ffn.config.activation == "venom":
            ffn.make_clusters(1)
    model.set_phase("sparse")
    return model.to(DEVICE)


def ids(batch, seq, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, (batch, seq), generator=draw).to(DEVICE)


@pytest.mark.parametrize("sparsity", ["dense", "recipe, same", "active16"])
@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 1}])
@pytest.mark.parametrize("start", [1, 7, 16])
def test_fixed_buffers_change_no_token(sparsity, changes, start):
    """Within the window, at its end, and beyond, where all of it is read again."""
    model = make(sparsity, **changes)
    for n in (16 - start + 3, 4):
        expected = model.generate(ids(2, start), n, temperature=0)
        assert torch.equal(model.generate(ids(2, start), n, temperature=0, graph=True), expected)


def test_draws_are_the_same_with_fixed_buffers():
    model = make("venom16")
    one, two = (model.generate(ids(3, 4), 9, seed=5, graph=graph) for graph in (False, True))
    assert torch.equal(one, two) and len({tuple(row) for row in one[:, 4:].tolist()}) == 3


def test_a_step_gives_the_logits_of_the_whole_text():
    model, text = make(), ids(2, 12)
    step = TokenStep(model, 12)
    whole = model(text)[0]
    torch.testing.assert_close(step(text[:, :5]), whole[:, 4])
    for t in range(5, 12):
        torch.testing.assert_close(step(text[:, t : t + 1]), whole[:, t])
    with pytest.raises(ValueError, match="1 tokens after 12: there is room for 12"):
        step(text[:, :1])
    with pytest.raises(ValueError, match="after the first for one at a time"):
        step = TokenStep(model, 12)
        step(text[:, :2])
        step(text[:, :2])
    with pytest.raises(ValueError, match="17 tokens; seq_len is 16"):
        TokenStep(model, 20)(ids(1, 17))


def test_what_is_not_written_is_not_seen():
    """Places after the token's own hold rubbish."""
    at = torch.tensor([3])
    cache = StaticCache(6, at)
    keys = torch.randn(1, 2, 3, 4)
    got, _, mask = cache.take(keys, keys)
    assert got is keys and mask is None
    new = torch.randn(1, 2, 1, 4)
    got, values, mask = cache.take(new, 2 * new)
    assert torch.equal(got[:, :, :4], torch.cat([keys, new], 2)) and not got[:, :, 4:].any()
    assert torch.equal(values[:, :, 3:4], 2 * new) and mask.tolist() == [[True] * 4 + [False] * 2]
    table = torch.arange(10.0)[:, None]
    assert cache.places(table, 1).tolist() == [[3.0]]


def test_weights_are_held_meanwhile_and_only_then():
    model = make("venom16")
    seen = []
    model.blocks[0].ffn.register_forward_pre_hook(lambda ffn, _: seen.append(ffn.hold))
    model.generate(ids(1, 2), 3)
    assert seen == [True] * 3 and not any(ffn.hold for ffn in model.ffns())
    kept = model.ffns()[0]
    kept.hold, kept.decoder = True, ("kept", None)
    model.generate(ids(1, 2), 1)
    assert GPU or kept.decoder == ("kept", None)
    assert kept.hold and kept.decoder and not model.ffns()[1].hold
    with pytest.raises(RuntimeError), held(model):
        raise RuntimeError
    assert [ffn.hold for ffn in model.ffns()] == [True, False]


@pytest.mark.parametrize("sparsity", ["venom16", "recipe, same", "active16", "w1+w2"])
def test_kernels_of_decoding_give_the_references_tokens(sparsity, monkeypatch):
    """In float32, and after the weights have changed between two texts."""
    pytest.importorskip("triton")
    from replicate.kernels import layer
    from replicate.kernels.decode import ffn as decode

    model, prompt, calls, plain = make(sparsity), ids(1, 3), [], decode.decode_ffn
    monkeypatch.setattr(
        layer.decode, "decode_ffn", lambda ffn, x, w: calls.append(len(x)) or plain(ffn, x, w)
    )
    texts = []
    for _ in range(2):
        found = {}
        for backend in ("reference", "triton"):
            model.set_backend(backend)
            found[backend] = [model.generate(prompt, 3, temperature=0).tolist()]
            if sparsity == "venom16" and not texts:
                found[backend].append(model.generate(prompt, 2, seed=2, graph=True).tolist())
        assert found["triton"] == found["reference"]
        assert calls[:6] == [3, 3, 1, 1, 1, 1]  # the prompt's tokens, then one, in two layers
        calls.clear()
        texts.append(found["triton"][0])
        with torch.no_grad():
            for ffn in model.ffns():
                ffn.w2.mul_(-1)
    assert texts[0] != texts[1]


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", ["dense", "venom16", "recipe, same", "active16", "w1+w2"])
def test_a_captured_step_gives_the_launched_ones_tokens(sparsity):
    model = make(sparsity, d_model=256, d_ff=1024, seq_len=128)
    for seed in (0, 1):
        prompt = ids(2, 70, seed)  # more than decoding takes at once
        if sparsity in ("recipe, same", "w1+w2"):
            model.bfloat16()
        launched = model.generate(prompt, 20, temperature=0)
        captured = generate(model, prompt, 20, temperature=0, graph=True)
        assert (launched == captured).float().mean() > 0.9  # another kernel of attention may break a near tie
        with torch.no_grad():
            for ffn in model.ffns():
                ffn.w1.mul_(-1)
