import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from replicate.config import ModelConfig, SparsityConfig
from replicate.gpt import GPT, Attention, KVCache, RMSNorm, rope_tables, rotate
from replicate.settings.presets import MODEL_PRESETS, SPARSITY_PRESETS
from replicate.training.flops import param_count

TINY = ModelConfig(vocab_size=40, n_layer=2, d_model=24, d_ff=128, n_head=4, seq_len=16)


def make(config=TINY, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return GPT(config).to(dtype)


def ids(*shape, vocab=40, seed=3):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def sparse_model(name, seed=0):
    model = make(replace(TINY, sparsity=SPARSITY_PRESETS[name]), seed, torch.float64)
    for block in model.blocks:  # weights large enough for the masks to bite
        block.ffn.w1.data.mul_(20)
        if model.config.sparsity.activation == "venom":
            block.ffn.make_clusters(1)
    model.set_phase("sparse")
    return model


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, tie_embeddings=False),
        replace(TINY, n_kv_head=2),
        replace(TINY, activation="swiglu"),
        replace(TINY, activation="gelu", n_layer=3),
        replace(TINY, sparsity=SparsityConfig(activation="24", selection="learned")),
        replace(TINY, sparsity=SparsityConfig(selection="learned")),
        MODEL_PRESETS["smoke"],
    ],
)
def test_param_count_is_that_of_the_model(config):
    model = GPT(config)
    count = param_count(config)
    assert count["total"] == sum(p.numel() for p in model.parameters())
    heads = 0 if model.head is None else model.head.weight.numel()
    assert count["embedding"] == model.embed.weight.numel() + heads
    assert count["total"] == count["embedding"] + count["non_embedding"]


@pytest.mark.parametrize(("name", "billions"), [("llama1b", 1.37), ("llama7b", 7.49)])
def test_param_count_of_the_papers_models(name, billions):
    config = MODEL_PRESETS[name]
    with torch.device("meta"):
        model = GPT(config)
    total = sum(p.numel() for p in model.parameters())
    assert param_count(config)["total"] == total
    assert total / 1e9 == pytest.approx(billions, abs=0.005)


def test_loss_is_the_cross_entropy_and_starts_near_uniform():
    model, x, y = make(), ids(3, 16), ids(3, 16, seed=4)
    logits, loss = model(x, y)
    assert logits.shape == (3, 16, 40)
    by_hand = -logits.log_softmax(-1).gather(2, y[..., None]).mean()
    torch.testing.assert_close(loss, by_hand)
    assert loss.item() == pytest.approx(math.log(40), abs=0.2)
    assert model(x)[1] is None


@pytest.mark.parametrize("name", ["dense", "recipe", "act24", "w1+w2+t", "static16", "venom64"])
def test_no_token_sees_a_later_one(name):
    model = make(dtype=torch.float64) if name == "dense" else sparse_model(name)
    x = ids(2, 16)
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 7) % 40
    before, after = model(x)[0], model(changed)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_the_sparse_phase_differs_and_the_dense_one_does_not():
    x = ids(2, 16)
    model = sparse_model("recipe")
    sparse = model(x)[0]
    model.set_phase("dense")
    assert not torch.allclose(model(x)[0], sparse)
    assert [ffn.phase for ffn in model.ffns()] == ["dense", "dense"]
    with pytest.raises(ValueError, match=r"'half'.*dense, sparse"):
        model.set_phase("half")


def test_attention_is_softmax_of_rotated_products():
    torch.manual_seed(0)
    config = replace(TINY, n_kv_head=2)
    attn = Attention(config).double()
    x = torch.randn(1, 16, 24, dtype=torch.float64)
    cos, sin = (t.double() for t in rope_tables(6, 16, config.rope_theta))
    heads = attn.qkv(x).view(16, 8, 6)
    out = torch.zeros(16, 4, 6, dtype=torch.float64)
    for h in range(4):  # query heads 0, 1 share key-value head 0; 2, 3 share 1
        q, k = rotate(heads[:, h], cos, sin), rotate(heads[:, 4 + h // 2], cos, sin)
        scores = (q @ k.T / math.sqrt(6)).masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
        out[:, h] = scores.softmax(-1) @ heads[:, 6 + h // 2]
    torch.testing.assert_close(attn(x, cos, sin)[0], attn.proj(out.reshape(16, 24)))


def test_rotary_scores_depend_on_distance_only():
    cos, sin = rope_tables(8, 32, 10000.0)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    at = [rotate(v.expand(32, 8), cos, sin) for v in (q, k)]
    scores = at[0] @ at[1].T
    for distance in (0, 3, 11):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores[0, 0], q @ k)
    torch.testing.assert_close(at[0].norm(dim=1), q.norm().expand(32))


def test_residual_matrices_start_smaller_with_depth():
    wide = replace(TINY, d_model=128, d_ff=512, n_layer=8)
    block = make(wide).blocks[0]
    assert block.ffn.w2.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.attn.proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.ffn.w1.std().item() == pytest.approx(0.02, rel=0.05)


def test_tied_head_is_the_token_table():
    model = make()
    assert model.head is None
    hidden = torch.randn(24)
    torch.testing.assert_close(F.linear(hidden, model.embed.weight), model.embed.weight @ hidden)
    untied = make(replace(TINY, tie_embeddings=False))
    assert untied.head.weight.shape == untied.embed.weight.shape


def test_generate_draws_the_same_for_the_same_seed():
    model, prompt = make(), ids(2, 5)
    one, two = (model.generate(prompt, 20, seed=5) for _ in range(2))
    assert one.shape == (2, 25)
    assert torch.equal(one, two)
    assert torch.equal(one[:, :5], prompt)
    assert not torch.equal(one, model.generate(prompt, 20, seed=6))
    greedy = model.generate(prompt, 20, temperature=0)
    assert torch.equal(greedy, model.generate(prompt, 20, top_k=1, seed=9))
    assert torch.equal(greedy[:, 5], model(prompt)[0][:, -1].argmax(-1))


def windowed(model, idx, n):
    """The likeliest `n` tokens, every one from the whole window."""
    for _ in range(n):
        logits = model(idx[:, -model.config.seq_len :])[0][:, -1]
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], 1)
    return idx


@pytest.mark.parametrize("sparsity", ["dense", "act24", "recipe, same", "active16"])
@pytest.mark.parametrize("start", [1, 9, 20])
def test_what_is_kept_changes_no_token(sparsity, start):
    model = sparse_model(sparsity)
    prompt, limit = ids(2, start), model.config.seq_len
    n = limit - start + 4 if start < limit else 4  # beyond the window
    assert torch.equal(model.generate(prompt, n, temperature=0), windowed(model, prompt, n))


def test_a_further_token_reads_one_token(monkeypatch):
    model, read = make(), []
    model.blocks[0].ffn.register_forward_pre_hook(lambda _, x: read.append(x[0].shape[1]))
    limit = model.config.seq_len
    model.generate(ids(1, 5), limit - 3)
    assert read == [5, *[1] * (limit - 5), limit, limit][: len(read)] and read[-1] == limit
    read.clear()
    caches = [KVCache() for _ in model.blocks]
    whole = model(prompt := ids(2, limit))[0]
    for first, last in ((0, 3), (3, 4), (4, limit)):
        logits = model.extend(prompt[:, first:last], caches)
        torch.testing.assert_close(logits, whole[:, last - 1])
    with pytest.raises(ValueError, match=f"the text has {limit + 1} tokens; seq_len is {limit}"):
        model.extend(ids(2, 1), caches)


def test_bad_input_is_named():
    model = make()
    with pytest.raises(ValueError, match=r"17 tokens; seq_len is 16"):
        model(ids(1, 17))
    for arguments, message in (
        ({"temperature": -1}, "temperature is -1; choose 0 or more"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; choose 1 or more"),
        ({"top_k": -1}, "top_k is -1"),
        ({"n": -1}, "n is -1; choose 0 or more"),
        ({"idx": ids(1, 0)}, r"idx has shape \(1, 0\); give \[B, S\]"),
        ({"idx": ids(1, 4)[0]}, r"idx has shape \(4,\); give \[B, S\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**({"idx": ids(1, 2), "n": 1} | arguments))


@pytest.mark.parametrize(("name", "way"), [("block16", "oracle-block"), ("tile24", "tile")])
def test_no_text_is_written_where_tokens_choose_together(name, way):
    model, prompt = sparse_model(name), ids(1, 5)
    with pytest.raises(ValueError, match=rf"choose together by .*{way}.*set_phase\('dense'\)"):
        model.generate(prompt, 2)
    model.set_phase("dense")
    assert torch.equal(model.generate(prompt, 4, temperature=0), windowed(model, prompt, 4))


def test_baselines_have_no_sparse_ffn():
    model = make(replace(TINY, activation="swiglu"))
    assert model.ffns() == []
    model.set_phase("sparse")  # nothing to switch
    assert model(ids(1, 4))[0].shape == (1, 4, 40)


# The meta device, and batches of nothing


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2, "tie_embeddings": False}, {"activation": "swiglu"}])
@pytest.mark.parametrize("way", ["to_empty", "assign", "emptied"])
def test_a_model_without_memory_gets_the_right_tables(monkeypatch, way, changes):
    """The rotary tables are in no state: they must be computed wherever they could hold anything."""
    config = replace(TINY, **changes)
    model, idx = make(config), ids(2, 16)
    with torch.device("cpu" if way == "emptied" else "meta"):
        other = GPT(config)
    garbage = lambda like, **options: torch.full_like(like, 0.5, **options)  # noqa: E731
    if way != "assign":
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", garbage)
            other.to_empty(device="cpu")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other.load_state_dict(state, assign=way == "assign")
    assert torch.equal(other(idx)[0], model(idx)[0])
    assert torch.equal(other.double()(idx)[0], model.double()(idx)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_tables_have_the_weights_dtype_and_are_in_no_state(dtype):
    model = make(dtype=dtype)
    cos, sin = rope_tables(6, 16, TINY.rope_theta)
    assert torch.equal(model.cos, cos.to(dtype)) and torch.equal(model.sin, sin.to(dtype))
    assert not {"cos", "sin"} & model.state_dict().keys()
    assert torch.equal(model.float().cos, cos)  # not as rounded before


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", ["dense", "act24", "recipe", "static16", "block16", "act24+tile"])
def test_an_empty_batch_has_no_logits_and_no_loss(name, shape):
    """As torch's own: an empty result, and NaN where there is no mean."""
    model = sparse_model(name).train()
    idx = torch.zeros(shape, dtype=torch.long)
    logits, loss = model(idx, idx)
    assert logits.shape == (*shape, 40) and loss.isnan()
    model(idx)[0].sum().backward()
    assert all(not p.grad.any() for p in model.parameters())


def test_an_empty_batch_continues_to_an_empty_one():
    assert make().generate(torch.zeros(0, 3, dtype=torch.long), 2).shape == (0, 5)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_the_average_of_a_sparse_model_computes_sparse(use_buffers):
    model, idx = sparse_model("recipe"), ids(2, 16)
    model.set_phase("dense")
    average = AveragedModel(model, use_buffers=use_buffers, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    model.set_phase("sparse")
    for _ in range(3):
        average.update_parameters(model)
    torch.testing.assert_close(average(idx)[0], model(idx)[0])
    model.set_phase("dense")
    assert not torch.allclose(average(idx)[0], model(idx)[0], rtol=1e-3)


def test_a_loaded_model_is_in_the_phase_it_was_saved_in():
    model, idx = sparse_model("recipe"), ids(2, 16)
    other = make(model.config, seed=5, dtype=torch.float64)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(idx)[0], model(idx)[0])


def on_the_stream(model, idx, autocast=True):
    """(loss, dtypes of what each layer, its attention and its FFN read and give out)."""
    seen = []
    hooks = [
        part.register_forward_hook(lambda _, args, out: seen.extend([args[0].dtype, out.dtype]))
        for block in model.blocks
        for part in (block, block.attn, block.ffn)
    ]
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(idx, idx)[1]
    for hook in hooks:
        hook.remove()
    return loss, set(seen)


@pytest.mark.parametrize(
    "config",
    [
        *(replace(TINY, sparsity=sparsity) for sparsity in SPARSITY_PRESETS.values()),
        replace(TINY, activation="gelu"),
        replace(TINY, activation="swiglu", tie_embeddings=False),
    ],
)
def test_a_bfloat16_stream_is_bfloat16_throughout_and_gives_about_the_same_loss(config):
    narrow, wide = make(config), make(config)
    narrow.stream = torch.bfloat16
    for model in (narrow, wide):
        if config.sparsity.activation == "venom":
            for ffn in model.ffns():
                ffn.make_clusters(1)
        model.set_phase("sparse")
    (loss, dtypes), (expected, before) = (on_the_stream(m, ids(4, 16)) for m in (narrow, wide))
    assert dtypes == {torch.bfloat16} and torch.float32 in before
    assert loss.dtype == torch.float32 and loss.item() != expected.item()
    assert loss.item() == pytest.approx(expected.item(), abs=5e-3)
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
            continue
        assert ours.grad.dtype == torch.float32 and ours.grad.isfinite().all(), name
        if config.sparsity == SPARSITY_PRESETS["dense"]:  # masks of 2:4 jump
            assert (ours.grad - theirs.grad).norm() < 0.03 * theirs.grad.norm(), name


def test_without_autocast_a_stream_has_the_weights_dtype():
    narrow, wide = make(), make()
    narrow.stream = torch.bfloat16
    (loss, dtypes), (expected, _) = (on_the_stream(m, ids(4, 16), autocast=False) for m in (narrow, wide))
    assert torch.equal(loss, expected) and dtypes == {torch.float32}
    assert narrow.generate(ids(1, 4), 3).shape == (1, 7)


@pytest.mark.parametrize("autocast", [True, False])
def test_norms_compute_in_float32_and_round_once(autocast, monkeypatch):
    """By hand; torch is given one dtype, since it has fast kernels for no mixture."""
    plain, dtypes = F.rms_norm, []

    def note(x, shape, weight, eps):
        dtypes.append((x.dtype, weight.dtype))
        return plain(x, shape, weight, eps)

    monkeypatch.setattr(F, "rms_norm", note)
    norm, x = RMSNorm(64, eps=1e-5), torch.randn(8, 64).bfloat16()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        narrow, same = norm(x), norm(x.float())
    assert dtypes == 2 * [(torch.float32, torch.float32)]
    assert narrow.dtype == torch.bfloat16 and same.dtype == torch.float32
    torch.testing.assert_close(same.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(narrow, same.bfloat16())
