"""The transformer's shapes and what steers it, flow matching's target, and samples."""

import math

import pytest
import torch
from torch import nn

from replicate.config import SparsityConfig
from replicate.diffusion.model import (
    Attention,
    DiT,
    DiTConfig,
    between,
    flow_loss,
    modulated,
    patchify,
    sample,
    unpatchify,
)
from replicate.gpt import DenseFFN
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.training.attention import settle

CLIP = {"frames": 4, "frame_patch": 2}


def awake(config, seed=0):
    """A model whose zeros are drawn, so that all its parts have a say."""
    torch.manual_seed(seed)
    model = DiT(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def inputs(config, n=3):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(n, *config.shape, generator=draw), torch.rand(n, generator=draw), torch.arange(n)


@pytest.mark.parametrize("clip", [{}, CLIP])
def test_a_velocity_has_the_shape_of_its_picture_and_uses_all_it_is_told(tiny, clip):
    config = tiny(**clip)
    assert config.seq_len == (16 if not clip else 2 * 16)
    model, (x, t, y) = awake(config), inputs(config)
    v = model(x, t, y)
    assert v.shape == x.shape
    for other in (model(x, t / 2, y), model(x, t, y + 1)):
        assert ((v - other).abs().flatten(1).amax(1) > 1e-3).all()
    moved = x.clone()
    moved[0, ..., -1, -1] += 1  # the last token: the first one sees it, and other pictures do not
    change = (model(moved, t, y) - v).abs()
    assert change[0, ..., 0, 0].max() > 1e-5 and change[1:].max() == 0


def test_a_new_model_says_zero_and_its_blocks_change_nothing(tiny):
    config = tiny()
    torch.manual_seed(0)
    model, (x, t, y) = DiT(config), inputs(config)
    assert model(x, t, y).abs().max() == 0
    h = model.tokens(x)
    assert torch.equal(model.blocks[0](h, model.condition(t, y)), h)


@pytest.mark.parametrize("clip", [{}, CLIP])
def test_patches_are_cut_and_joined(tiny, clip):
    config = tiny(channels=2, **clip)
    x = torch.arange(2 * math.prod(config.shape), dtype=torch.float32).view(2, *config.shape)
    p = patchify(x, config)
    assert p.shape == (2, config.seq_len, config.patch_numbers)
    corner = x[0, :, :2, :4, 4:8] if clip else x[0, :, :4, 4:8]  # second column of patches
    assert torch.equal(p[0, 1], corner.flatten())
    assert torch.equal(unpatchify(p, config).view_as(x), x)


def test_shapes_that_do_not_fit_are_refused(tiny):
    with pytest.raises(ValueError, match="size is 16, no multiple of patch = 5"):
        tiny(patch=5)
    with pytest.raises(ValueError, match="frames is 3, no multiple of frame_patch = 2"):
        tiny(frames=3, frame_patch=2)
    with pytest.raises(ValueError, match="d_ff is 48"):
        tiny(d_ff=48, sparsity=SPARSITY_PRESETS["venom16"])
    with pytest.raises(ValueError, match="sparsity needs activation='relu2'"):
        tiny(activation="gelu", sparsity=SPARSITY_PRESETS["act24"])
    for name in ("d_model", "d_ff"):
        with pytest.raises(ValueError, match=f"{name} is 0; choose 1 or more"):
            tiny(**{name: 0})
    model = DiT(tiny())
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\)"):
        model(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="phase is 'wet'"):
        model.set_phase("wet")


def test_modulation_by_hand():
    x = torch.tensor([[1.0, 3.0]])  # normalised: -1, 1
    out = modulated(x, torch.tensor([10.0, 20.0]), torch.tensor([1.0, 2.0]))
    assert torch.allclose(out, torch.tensor([[8.0, 23.0]]), atol=1e-4)


def test_the_path_is_straight_and_its_own_velocity_has_no_loss():
    x0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    path = between(x0, noise, t)
    assert torch.equal(path[0], x0[0]) and torch.equal(path[2], noise[2])
    assert torch.allclose(path[1], 0.75 * x0[1] + 0.25 * noise[1])
    velocity = (between(x0, noise, t + 1e-3) - path) / 1e-3  # of the path itself
    assert flow_loss(velocity, x0.float(), noise.float()) < 1e-9
    assert torch.isclose(flow_loss(velocity + 1, x0.float(), noise.float()), torch.tensor(1.0), atol=1e-4)


class Straight(nn.Module):
    """The velocity of straight paths from any noise to one picture: (x - picture) / t."""

    def __init__(self, config, picture):
        super().__init__()
        self.config, self.picture, self.seen = config, picture, []

    def forward(self, x, t, y):
        self.seen.append((t[0].item(), y.tolist()))
        target = self.picture + y.view(-1, 1, 1, 1).float()
        return (x - target) / t.view(-1, 1, 1, 1)


def test_eulers_method_follows_a_straight_path_to_its_end(tiny):
    config = tiny()
    model = Straight(config, torch.randn(1, 16, 16))
    y = torch.tensor([0, 2])
    for steps in (1, 5):
        x = sample(model, y, steps=steps)
        assert torch.allclose(x, model.picture + y.view(-1, 1, 1, 1), atol=1e-5)
    assert [t for t, _ in model.seen] == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2])
    with pytest.raises(ValueError, match="steps is 0"):
        sample(model, y, steps=0)


def test_guidance_leads_away_from_the_velocity_without_a_class(tiny):
    config = tiny(n_classes=10)
    model = Straight(config, torch.zeros(1, 16, 16))
    y = torch.tensor([3])
    x = sample(model, y, steps=1, guidance=2.0)  # target 10 + 2 (3 - 10)
    assert torch.allclose(x, torch.full_like(x, -4.0), atol=1e-5)
    assert model.seen[1][1] == [10], "n_classes stands for none"


def test_samples_depend_on_the_seed_alone(tiny):
    model, y = awake(tiny()), torch.tensor([1, 2])
    first = sample(model, y, steps=3, seed=5)
    assert torch.equal(first, sample(model, y, steps=3, seed=5))
    assert not torch.equal(first, sample(model, y, steps=3, seed=6))


def test_the_dense_phase_is_the_dense_ffn(tiny):
    model, (x, t, y) = awake(tiny(sparsity=SPARSITY_PRESETS["act24"])), inputs(tiny())
    ours = model(x, t, y)
    model.set_phase("sparse")
    assert not torch.equal(ours, model(x, t, y))
    for block in model.blocks:
        dense = DenseFFN(16, 64, "relu2")
        dense.w1, dense.w2 = block.ffn.w1, block.ffn.w2
        block.ffn = dense
    assert torch.equal(ours, model(x, t, y))


def test_gelu_has_no_sparse_ffn(tiny):
    model = DiT(tiny(activation="gelu"))
    assert model.ffns() == [] and isinstance(model.blocks[0].ffn, DenseFFN)


def test_tokens_that_vote_in_blocks_of_a_picture_leave_other_pictures_alone(tiny):
    """A block of v = 16 tokens is a picture here, so a sample does not depend on its batch."""
    votes = SparsityConfig(activation="venom", top_k=4, n_clusters=4, routing="oracle-block", v=16)
    config = tiny(d_ff=64, sparsity=votes)
    model, (x, t, y) = awake(config), inputs(config)
    for ffn in model.ffns():
        ffn.make_clusters(1)
    model.set_phase("sparse")
    together, alone = model(x, t, y), model(x[:1], t[:1], y[:1])
    assert torch.allclose(together[:1], alone, atol=1e-5)
    swapped = model(x.flip(0), t.flip(0), y.flip(0)).flip(0)
    assert torch.allclose(together, swapped, atol=1e-5)


def test_the_models_of_the_gpu_scale_have_10_to_30_million_parameters():
    with torch.device("meta"):
        count = sum(p.numel() for p in DiT(DiTConfig()).parameters())
    assert 10e6 < count < 30e6


def test_normalised_queries_and_keys_bound_the_scores(monkeypatch):
    """However large the weights are: a token then cannot look at one other token alone."""
    seen = []

    def watched(q, k, v):
        seen.append((q @ k.mT).abs().max().item() / math.sqrt(q.shape[-1]))
        return v

    monkeypatch.setattr("replicate.diffusion.model.F.scaled_dot_product_attention", watched)
    torch.manual_seed(0)
    plain, bounded = Attention(32, 2), Attention(32, 2, qk_norm=True)
    x = torch.randn(2, 8, 32)
    with torch.no_grad():
        for layer in (plain, bounded):
            layer.qkv.weight.mul_(100)
            layer(x)
    assert seen[0] > 100 and 2 < seen[1] <= 4 + 1e-4, "sqrt(d_head) is 4"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_low_scores_have_gradients(device):
    """All scores of 64 tokens about -120: cuDNN's backward pass, torch's own choice on an H200, gives NaN."""
    torch.manual_seed(0)
    layer = Attention(384, 6)
    with torch.no_grad():
        q, k, _ = layer.qkv.bias.view(3, 6, 64)
        q[:, 0], k[:, 0] = 1.0, -120 * math.sqrt(64)
    layer.to(device)
    settle(torch.device(device))
    with torch.autocast(device, torch.bfloat16):
        y = layer(torch.randn(4, 64, 384, device=device))
    y.square().mean().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
