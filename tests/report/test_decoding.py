"""What a generated token costs: the formulas against a count by hand and against a model that runs."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from replicate import SPARSITY_PRESETS
from replicate.config import ModelConfig
from replicate.generate import KVCache
from replicate.gpt import GPT
from replicate.report import decoding

TINY = ModelConfig(vocab_size=50, n_layer=2, d_model=32, d_ff=128, n_head=4, seq_len=32)


def make(preset="venom16", **changes):
    torch.manual_seed(1)
    model = GPT(replace(TINY, sparsity=SPARSITY_PRESETS[preset], **changes)).double()
    for ffn in model.ffns():
        ffn.w1.data *= 20  # what the FFN adds decides the tokens
        ffn.w2.data *= 20
        if ffn.config.activation == "venom":
            ffn.make_clusters(1)
    model.set_phase("sparse")
    return model


def ids(batch, seq):
    return torch.randint(TINY.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(0))


def test_an_ffn_costs_two_flops_a_weight_and_token_and_two_bytes_a_weight():
    weights = 3 * 5 + 5 * 3
    assert decoding.ffn_cost(3, 5, tokens=7) == (2 * 7 * weights, 2 * weights)
    by_bytes, by_flops = decoding.Cost(989e12, 4e12).microseconds(2e12)
    assert (by_bytes, by_flops) == (pytest.approx(2e6), pytest.approx(1e6)), (
        "two seconds, and one at the peak"
    )


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2}])
def test_the_kv_cache_is_what_a_model_keeps(changes):
    model = make(**changes)
    caches = [KVCache() for _ in model.blocks]
    model.extend(ids(1, 9), caches)
    numbers = sum(cache.keys.numel() + cache.values.numel() for cache in caches)
    assert decoding.kv_bytes(model.config, 9) == 2 * numbers


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_every_weight_but_the_token_table(tied):
    model = make("dense", tie_embeddings=tied)
    numbers = sum(p.numel() for p in model.parameters()) - (0 if tied else model.embed.weight.numel())
    assert decoding.weight_bytes(model.config) == 2 * numbers


@pytest.mark.parametrize(("k", "n", "texts"), [(1, 3, 2), (2, 3, 2), (2, 4, 3), (3, 3, 1)])
def test_the_expected_share_is_the_mean_over_all_choices(k, n, texts):
    choices = [set(c) for c in product(range(n), repeat=k) if len(set(c)) == k]
    shares = [len(set().union(*some)) / n for some in product(choices, repeat=texts)]
    assert decoding.share_touched(k, n, texts) == pytest.approx(sum(shares) / len(shares))


def test_more_clusters_than_there_are_cannot_be_touched():
    with pytest.raises(ValueError, match="k is 5; choose 1 to the number of clusters, 4"):
        decoding.share_touched(5, 4, 1)


def test_reading_chosen_clusters_gives_the_tokens_of_the_full_pass():
    model, text = make(), ids(1, 5)
    with torch.no_grad():
        whole = model(text)[0]
        with decoding.reading_chosen(model) as calls:
            torch.testing.assert_close(model(text)[0], whole)
    assert [call.tokens for call in calls] == [5, 5]
    expected = text
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[0][:, -1:].argmax(-1)], 1)
    with decoding.reading_chosen(model):
        assert torch.equal(model.generate(text, 6, temperature=0), expected)
    assert not [ffn for ffn in model.ffns() if "forward" in vars(ffn)], "as before"


def test_the_clusters_that_are_not_read_may_hold_anything():
    model = make()
    (ffn, _), c = model.ffns(), SPARSITY_PRESETS["venom16"]
    x = torch.randn(1, 1, TINY.d_model, dtype=torch.float64)
    expected, used = ffn(x), ffn.clusters(x[0])[0]
    means = ffn.cluster_means()
    unused = [cluster for cluster in range(c.n_clusters) if cluster not in used.tolist()]
    ffn.cluster_means = lambda: means
    with torch.no_grad(), decoding.reading_chosen(model) as calls:
        ffn.w1.unflatten(1, (c.n_clusters, -1))[:, unused] = math.nan
        ffn.w2.unflatten(0, (c.n_clusters, -1))[unused] = math.nan
        torch.testing.assert_close(ffn(x), expected)
    assert calls == [(1, calls[0].whole // 4, 2 * 2 * TINY.d_model * TINY.d_ff)]


def test_a_step_of_several_texts_reads_the_clusters_of_any_of_them():
    model = make()
    x = torch.randn(3, 1, TINY.d_model, dtype=torch.float64)
    ffn = model.ffns()[0]
    with torch.no_grad(), decoding.reading_chosen(model) as calls:
        ffn(x)
    share = ffn.clusters(x[:, 0]).unique().numel() / 16
    assert calls[0].bytes == share * calls[0].whole and 0.25 < share < 0.75


@pytest.mark.parametrize("preset", ["dense", "active16", "recipe"])
def test_other_formats_are_refused(preset):
    with pytest.raises(ValueError, match="as in 'venom16'"), decoding.reading_chosen(make(preset)):
        pass
