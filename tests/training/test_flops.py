import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from replicate import paper
from replicate.config import ModelConfig
from replicate.gpt import GPT
from replicate.settings.presets import MODEL_PRESETS, SPARSITY_PRESETS
from replicate.training import flops

models = st.builds(
    lambda layers, heads, groups, width, ff, seq, vocab: ModelConfig(
        n_layer=layers, d_model=8 * heads * groups * width, d_ff=ff, n_head=heads * groups, n_kv_head=heads,
        seq_len=seq, vocab_size=vocab,
    ),
    st.integers(1, 40), st.integers(1, 8), st.integers(1, 4), st.integers(1, 16), st.integers(1, 50_000),
    st.integers(1, 10_000), st.integers(1, 200_000),
)  # fmt: skip


@pytest.mark.parametrize(
    ("size", "expected"), [("1B", (0.750, 0.667, 0.50, 0.42)), ("7B", (0.750, 0.667, 0.57, 0.53))]
)
def test_the_ffn_share_under_the_four_counts(size, expected):
    counts = list(flops.counts(paper.model(size)).values())
    digits = (3, 3, 2, 2)
    assert [round(count, d) for count, d in zip(counts, digits)] == list(expected)


@pytest.mark.parametrize(("size", "ceiling"), [("1B", 1.41), ("7B", 1.57)])
def test_honest_ceilings_with_v_7(size, ceiling):
    assert round(flops.step_speedup(flops.honest_share(paper.model(size)), 7), 2) == ceiling


def test_the_papers_speed_arithmetic():
    step = flops.step_speedup(0.75, 8)
    assert round(step, 3) == 2.087
    assert round(flops.run_speedup(0.5, step), 3) == 1.352
    text = flops.step_speedup(0.80, 7)
    assert round(text, 1) == 2.2
    assert math.floor(100 * flops.run_speedup(0.5, text)) == 137
    assert round(flops.run_speedup(10 / 48, 2.2), 2) == 1.13
    assert round(flops.run_speedup(10 / 48, math.inf), 3) == 1.263


def test_the_count_agrees_with_torchs_own_counter():
    config = ModelConfig(n_layer=2, d_model=64, d_ff=160, n_head=4, n_kv_head=2, seq_len=32, vocab_size=96)
    model, batch = GPT(config), 3
    ids = torch.randint(0, 96, (batch, config.seq_len))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(ids, ids)[1].backward()
    counted = counter.get_total_flops() / (batch * config.seq_len)
    # The counter multiplies the masked half of the scores too.
    assert sum(flops.flops_per_token(config, attention="full").values()) == pytest.approx(counted, rel=1e-12)


@pytest.mark.parametrize("name", ["dense", "act24", "recipe"])
def test_the_count_of_the_papers_largest_model(name):
    """On the meta device: 7B parameters without memory. Masked products count in full; the router is more."""
    config = replace(MODEL_PRESETS["llama7b"], sparsity=SPARSITY_PRESETS[name])
    with torch.device("meta"):
        model, ids = GPT(config), torch.zeros(1, config.seq_len, dtype=torch.long)
    counted = {}
    for phase in ("dense", "sparse"):
        model.set_phase(phase)
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            model(ids, ids)[1].backward()
        counted[phase] = counter.get_total_flops() / config.seq_len
    total = sum(flops.flops_per_token(config, attention="full").values())
    routed = config.sparsity.activation == "venom"
    router = 2 * config.n_layer * config.d_model * config.sparsity.n_clusters if routed else 0
    assert counted == {"dense": total, "sparse": total + router}


def test_swiglu_has_three_matrices():
    config = ModelConfig(activation="swiglu")
    plain = replace(config, activation="relu2")
    assert flops.flops_per_token(config)["ffn"] == 1.5 * flops.flops_per_token(plain)["ffn"]
    assert "3 FFN matrices" in flops.counts(config)
    assert flops.formula_share(config) == flops.formula_share(plain)


@settings(max_examples=40, deadline=None)
@given(models)
def test_shares_sum_to_one_and_shrink_as_more_is_counted(model):
    assert sum(flops.shares(model).values()) == pytest.approx(1)
    counts = list(flops.counts(model).values())
    assert counts == sorted(counts, reverse=True)
    full = flops.shares(model, attention="full")["scores"]
    assert full > flops.shares(model)["scores"] > flops.shares(model, attention="none")["scores"] == 0


@settings(max_examples=40, deadline=None)
@given(models)
def test_the_total_is_the_papers_formula(model):
    """6 L (3 D F + 2 D (N + K) H) a token, of which 18 D F L are the FFN's."""
    d, f, layers, head = model.d_model, model.d_ff, model.n_layer, model.d_model // model.n_head
    count = flops.flops_per_token(model, ffn_matrices=3, attention="none", head=False)
    assert count["ffn"] == 18 * d * f * layers
    assert sum(count.values()) == 6 * layers * (3 * d * f + 2 * d * (model.n_head + model.kv_heads) * head)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 1), st.floats(1.01, 50), st.floats(0.01, 1))
def test_what_is_needed_inverts_what_follows(r, v, share):
    step = flops.step_speedup(r, v)
    assert 1 <= step <= 1 / (1 - r * (1 - 1 / (3 * flops.TWO_FOUR))) + 1e-9
    assert flops.venom_needed(step, r) == pytest.approx(v, rel=1e-6)
    run = flops.run_speedup(share, step)
    assert flops.step_needed(run, share) == pytest.approx(step, rel=1e-6)
    assert flops.share_needed(run, step) == pytest.approx(share, rel=1e-6)


def test_what_cannot_be_reached_is_none():
    assert flops.step_needed(1.387, 10 / 48) is None
    assert flops.share_needed(3.0, 2.2) is None
    assert flops.venom_needed(4.2, 0.82) is None
    assert flops.venom_needed(1.5, 0) is None
    assert flops.step_speedup(1.0, math.inf, math.inf) == math.inf


def test_a_recipe_is_counted_by_its_products():
    assert flops.product_counts(SPARSITY_PRESETS["recipe"]) == {
        "2:4": 2,
        "venom": 4,
        "sampled": 0,
        "dense": 0,
    }
    assert flops.product_counts(SPARSITY_PRESETS["dense"])["dense"] == 6
    assert flops.ffn_speedup(8) == pytest.approx(6 / (2 / 1.5 + 4 / 8))
    assert flops.ffn_speedup(8, n24=0, n_venom=0) == 1
    assert flops.ffn_speedup(1, n24=6, n_venom=0) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flops.ffn_speedup(0), "v is 0"),
        (lambda: flops.ffn_speedup(math.nan), "v is nan"),
        (lambda: flops.ffn_speedup(8, n24=3), "six in all"),
        (lambda: flops.step_speedup(1.2, 8), "r is 1.2"),
        (lambda: flops.run_speedup(-0.1, 2), "share is -0.1"),
        (lambda: flops.run_speedup(0.5, 0), "step is 0"),
        (lambda: flops.step_needed(0, 0.5), "run is 0; a speed-up is positive"),
        (lambda: flops.step_needed(-1, 0.5), "run is -1"),
        (lambda: flops.step_needed(math.nan, 0.5), "run is nan"),
        (lambda: flops.share_needed(1.5, 1.0), "step is 1.0"),
        (lambda: flops.venom_needed(0.5, 0.8), "step is 0.5"),
        (lambda: flops.shares(ModelConfig(), attention="half"), "attention is 'half'"),
        (lambda: flops.shares(ModelConfig(), ffn_matrices=0), "ffn_matrices is 0"),
    ],
)
def test_bad_input_is_refused_with_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
