"""Feed-forward blocks of other people's models: swapped, trained, restored."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from replicate import SparsityConfig
from replicate.ffn import relu2
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.swap import ReLU2, restore_ffn, start_sparse, swap_ffn

VENOM = SparsityConfig(activation="venom", n_clusters=4, top_k=2)


class Block(nn.Module):
    """A block as Nemotron's, with or without biases, of some activation."""

    def __init__(self, bias=True, act=None, d_model=8, d_ff=32):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(d_model, d_ff, bias), nn.Linear(d_ff, d_model, bias)
        self.act_fn = act or ReLU2()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)))


def model(n=2, **options):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(**options) for _ in range(n)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sparsity", ["act24", "recipe, same", VENOM], ids=str)
def test_the_dense_phase_computes_what_the_model_did(bias, sparsity):
    net, x = model(bias=bias, d_ff=64), torch.randn(3, 5, 8)
    before = net(x)
    report = swap_ffn(net, sparsity)
    torch.testing.assert_close(net(x), before)
    assert report.blocks == ("0", "1") and report.activation == "" and report.biases == bias


def test_the_sparse_phase_is_that_of_the_formats():
    net, x = model(n=1), torch.randn(6, 8)
    first, second = net[0].up_proj, net[0].down_proj
    w1, b1, w2, b2 = (t.detach().clone() for t in (first.weight.T, first.bias, second.weight.T, second.bias))
    swap_ffn(net, "act24")
    start_sparse(net)
    y2 = relu2(x @ w1 + b1)
    groups = y2.unflatten(-1, (-1, 4))
    rank = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    kept = torch.where(rank < 2, groups, 0.0).flatten(-2)
    torch.testing.assert_close(net(x), kept @ w2 + b2)


def test_what_is_added_for_the_bias_stays_zero_in_training():
    net, x = model(n=1), torch.randn(64, 8)
    swap_ffn(net, VENOM)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(6):
        if step == 3:
            start_sparse(net, optimizer=optimizer)
        (net(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ffn = net[0].up_proj.ffn
    assert not ffn.w1[9:].any() and not ffn.w2[:, 8:].any() and ffn.phase == "sparse"
    assert ffn.w1[8].any(), "the bias is trained"


def test_moments_follow_the_neurons():
    net, x = model(n=1, d_ff=64), torch.randn(64, 8)
    swap_ffn(net, VENOM)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    (net(x) - x).square().mean().backward()
    optimizer.step()
    ffn = net[0].up_proj.ffn
    pairs = {(w.item(), m.item()) for w, m in zip(ffn.w1[0], optimizer.state[ffn.w1]["exp_avg"][0])}
    start_sparse(net, optimizer=optimizer)
    assert {(w.item(), m.item()) for w, m in zip(ffn.w1[0], optimizer.state[ffn.w1]["exp_avg"][0])} == pairs


@pytest.mark.parametrize("bias", [True, False])
def test_restored_it_is_the_model_it_was_with_the_weights_it_has(bias):
    net, x = model(bias=bias, d_ff=64), torch.randn(4, 8)
    names, before = {k: v.shape for k, v in net.state_dict().items()}, net(x)
    swap_ffn(net, VENOM)
    start_sparse(net)
    assert restore_ffn(net) == 2
    assert {k: v.shape for k, v in net.state_dict().items()} == names
    torch.testing.assert_close(net(x), before)
    swap_ffn(net, VENOM)
    with torch.no_grad():
        net[1].up_proj.bias.add_(1) if bias else net[1].up_proj.ffn.w2.mul_(2)
    changed = net(x)
    restore_ffn(net)
    torch.testing.assert_close(net(x), changed)
    assert restore_ffn(net) == 0


def test_another_activation_is_refused_or_replaced_in_so_many_words():
    net, x = model(n=1, act=nn.GELU()), torch.randn(4, 8)
    with pytest.raises(ValueError, match="these blocks compute GELU, not squared ReLU; activation='relu2'"):
        swap_ffn(net, "act24")
    net.config = type("Config", (), {"hidden_act": "gelu"})()
    expected = net[0].down_proj(relu2(net[0].up_proj(x)))
    report = swap_ffn(net, "act24", activation="relu2")
    torch.testing.assert_close(net(x), expected)
    assert str(report) == "1 feed-forward blocks are sparse FFNs: squared ReLU instead of GELU"
    restore_ffn(net)
    torch.testing.assert_close(net(x), expected)
    assert net.config.hidden_act == "relu2" and isinstance(net[0].act_fn, ReLU2)


def gated():
    block = Block()
    block.gate_proj = nn.Linear(8, 32)
    return block


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (
            lambda: nn.Linear(4, 4),
            {},
            "Linear has no block of two matrices with these parts: c_fc, c_proj, act",
        ),
        (gated, {}, "has three matrices .gate_proj.: a gated block"),
        (model, {"sparsity": "act25"}, "sparsity is 'act25'; choose one of dense"),
        (model, {"activation": "gelu"}, "activation is 'gelu'; choose 'same' or 'relu2'"),
        (lambda: model(d_ff=36), {"sparsity": VENOM}, "d_ff is 36"),
    ],
)
def test_refuses(net, options, message):
    with pytest.raises(ValueError, match=message):
        swap_ffn(net(), **options)


def test_a_second_swap_and_a_failed_one_leave_the_model_as_it_is():
    net = model()
    swap_ffn(net)
    with pytest.raises(ValueError, match="swapped already"):
        swap_ffn(net)
    odd, x = model(d_ff=36), torch.randn(2, 8)
    before = odd(x)
    with pytest.raises(ValueError, match="d_ff is 36"):
        swap_ffn(odd, VENOM)
    torch.testing.assert_close(odd(x), before)


def test_copies_and_states():
    net, x = model(), torch.randn(3, 8)
    swap_ffn(net, VENOM)
    start_sparse(net)
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin(x), net(x))
    fresh = model()
    swap_ffn(fresh, VENOM)
    fresh.load_state_dict(net.state_dict())
    torch.testing.assert_close(fresh(x), net(x))


def test_a_block_refused_after_others_leaves_these_their_weights():
    net, x = nn.Sequential(Block(d_ff=64), Block(d_ff=36)), torch.randn(2, 8)
    before, ids = net(x), [id(p) for p in net.parameters()]
    with pytest.raises(ValueError, match="d_ff is 36"):
        swap_ffn(net, VENOM)
    assert torch.equal(net(x), before) and [id(p) for p in net.parameters()] == ids


class Mapped(nn.Module):
    """Parts by the names of OPT's, whatever they are."""

    def __init__(self, fc1, fc2, act):
        super().__init__()
        self.fc1, self.fc2, self.activation_fn = fc1, fc2, act


@pytest.mark.parametrize(
    ("first", "second", "act", "message"),
    [
        (
            nn.Conv2d(8, 32, 1),
            nn.Conv2d(32, 8, 1),
            ReLU2(),
            r"0 has weights \(32, 8, 1, 1\) and \(8, 32, 1, 1\)",
        ),
        (nn.Linear(8, 32), nn.Linear(32, 4), ReLU2(), r"weights \(8, 32\) and \(32, 4\)"),
        (nn.Linear(8, 32), nn.Linear(64, 8), ReLU2(), r"weights \(8, 32\) and \(64, 8\)"),
        (nn.Identity(), nn.Linear(32, 8), ReLU2(), r"weights \(\) and \(32, 8\)"),
        (nn.Linear(8, 32), nn.Linear(32, 8), "relu", r"activation 'relu'; only maps \[D, F\] and \[F, D\]"),
        (nn.Linear(8, 32), nn.Linear(32, 8), nn.PReLU(32), "these blocks compute PReLU, not squared ReLU"),
        (nn.Linear(8, 32), nn.Linear(32, 8), lambda x, gate: x, "compute <lambda>, not squared ReLU"),
    ],
)
def test_blocks_that_match_by_name_alone_are_refused(first, second, act, message):
    net = nn.Sequential(Mapped(first, second, act))
    with pytest.raises(ValueError, match=message):
        swap_ffn(net, "act24")
    assert (net[0].fc1, net[0].fc2, net[0].activation_fn) == (first, second, act)


def test_an_activation_of_one_width_is_replaced():
    net = nn.Sequential(Mapped(nn.Linear(8, 32), nn.Linear(32, 8), nn.PReLU(32)))
    assert swap_ffn(net, "act24", activation="relu2").activation == "PReLU"


def test_to_start_needs_a_layer():
    with pytest.raises(ValueError, match="Sequential has no SparseFFN; call swap_ffn first"):
        start_sparse(model())


def test_static_clusters_are_fixed_by_a_sample():
    net, x = model(d_ff=64), torch.randn(3, 5, 8)
    swap_ffn(net, replace(VENOM, routing="static"))
    ffns = [block.up_proj.ffn for block in net]
    with pytest.raises(ValueError, match="routing is 'static', whose clusters are fixed by a sample"):
        start_sparse(net)
    assert [ffn.phase for ffn in ffns] == ["dense"] * 2 and not any(ffn.clustered for ffn in ffns)
    dense, read = net(x), [x, net[0](x)]
    start_sparse(net, sample=x)
    for ffn, inputs in zip(ffns, read, strict=True):
        inputs = torch.cat([inputs.view(-1, 8), torch.ones(15, 1), torch.zeros(15, 63)], 1)
        strength = relu2(inputs @ ffn.w1).view(15, 4, 16).sum((0, 2))
        assert ffn.fixed_clusters().tolist() == strength.argsort(descending=True)[:2].tolist()
    assert not torch.equal(net(x), dense) and net.training and not ffns[0]._forward_pre_hooks
    start_sparse(net)  # they are fixed


def test_an_optimiser_of_other_weights_is_refused_before_anything_changes():
    net = model(d_ff=64)
    old = torch.optim.AdamW(net.parameters())
    swap_ffn(net, VENOM)
    ffn = net[1].up_proj.ffn
    half = torch.optim.AdamW(net[0].parameters())
    for optimizer in (old, half):
        with pytest.raises(ValueError, match="AdamW lacks w1 of this FFN; make it after swap_ffn"):
            start_sparse(net, optimizer=optimizer)
        assert not any(block.up_proj.ffn.clustered for block in net)
    for parameter in net[1].parameters():
        parameter.requires_grad_(False)  # frozen: nobody trains it
    start_sparse(net, optimizer=half)
    assert ffn.phase == "sparse"


def test_sparsity_is_one_of_the_formats():
    with pytest.raises(ValueError, match=r"sparsity is {'dense': .*; give a SparsityConfig"):
        swap_ffn(model(), SPARSITY_PRESETS)
