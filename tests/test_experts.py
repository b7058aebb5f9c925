"""The learned router: its formula expert by expert, its load, and what it refuses."""

import pytest
import torch

from replicate.config import ModelConfig, SparsityConfig
from replicate.experts import RATE, LearnedRouter
from replicate.ffn import SparseFFN
from replicate.gpt import GPT
from replicate.training.flops import param_count

FORMATS = SparsityConfig(activation="venom", routing="learned", inner=False, n_clusters=4, top_k=2)


def layer(seed=0):
    torch.manual_seed(seed)
    ffn = SparseFFN(8, 64, FORMATS).double()
    ffn.make_clusters(0)
    ffn.phase = "sparse"
    return ffn


def test_each_chosen_expert_adds_its_layer_times_its_gate():
    ffn, x = layer(), torch.randn(5, 8, dtype=torch.float64)
    scores = torch.sigmoid(x @ ffn.experts.weight.T)
    expected = torch.zeros_like(x)
    for t in range(len(x)):
        best = scores[t].argsort(descending=True)[:2]
        for e in best:
            own = slice(16 * e, 16 * e + 16)
            y2 = torch.relu(x[t] @ ffn.w1[:, own]) ** 2
            expected[t] += 2 * scores[t, e] / scores[t, best].sum() * (y2 @ ffn.w2[own])
    torch.testing.assert_close(ffn(x), expected)


def test_gradients_reach_the_router_and_all_weights():
    ffn, x = layer(), torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    parameters = [x, ffn.w1, ffn.w2, ffn.experts.weight]

    def run(x, w1, w2, r):
        new = {"w1": w1, "w2": w2, "experts.weight": r}
        return torch.func.functional_call(ffn, new, (x,))

    with torch.no_grad():
        ffn.experts.bias.copy_(torch.tensor([9.0, 0.0, 9.0, 0.0]))  # the choice stays as it is
    assert torch.autograd.gradcheck(run, parameters)


def test_the_bias_moves_towards_an_even_load_and_only_with_gradients():
    router = LearnedRouter(8, 4, 2)
    router.even_out(torch.tensor([[0, 1], [0, 1], [0, 2]]))
    torch.testing.assert_close(router.bias, RATE * torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    ffn = layer()
    x = torch.randn(64, 8, dtype=torch.float64)
    with torch.no_grad():
        ffn(x)
    assert not ffn.experts.bias.any()
    ffn(x)
    assert ffn.experts.bias.any()


def test_training_evens_the_load():
    ffn = layer()
    x = torch.randn(256, 8, dtype=torch.float64) + 1

    def load():
        return torch.bincount(ffn.clusters(x).flatten(), minlength=4).max() / (len(x) * 2 / 4)

    before = load()
    for _ in range(600):
        ffn(x)
    assert before > 1.3 > 1.1 > load()


@pytest.mark.parametrize(
    "name, value", [("inner", True), ("w1", True), ("activation", "24"), ("refresh_every", 5)]
)
def test_only_dense_experts(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; routing"):
        SparsityConfig(**{**vars(FORMATS), name: value})


def test_parameters_are_counted():
    config = ModelConfig(d_ff=384, sparsity=FORMATS)
    assert param_count(config)["total"] == sum(p.numel() for p in GPT(config).parameters())
