"""Training a DiT: the arms, their phases, what is learned, and the loss on what is held out."""

from dataclasses import replace

import pytest
import torch

from replicate import swap
from replicate.diffusion import train as training
from replicate.diffusion.glyphs import SPLITS, Glyphs
from replicate.diffusion.model import DiT
from replicate.diffusion.train import ARMS, PRESETS, DiffusionConfig, config_of, held_out, stretches, train
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.settings.text import config_hash
from replicate.training import compiled

SMALL = {
    "steps": 4, "batch_size": 8, "lr_warmup": 1, "dense_warmup": 2, "eval_batches": 1, "final_window": 2,
    "model.size": 16, "model.d_model": 16, "model.d_ff": 64, "model.n_head": 2, "log_every": 2,
}  # fmt: skip


def small(arm, kind="image", seed=1, **changes):
    changes = {**SMALL, **({"batch_size": 4} if kind == "video" else {}), **changes}
    return config_of(kind, "smoke", arm, seed, **changes)


@pytest.fixture
def phases(monkeypatch):
    """The phases of the FFNs in each step, as the optimiser's step meets them."""
    seen = []

    class Watched(training.OptimizerStep):
        def __call__(self, batches, lr, step=0):
            seen.append({ffn.phase for ffn in self.model.ffns()})
            return super().__call__(batches, lr, step)

    monkeypatch.setattr(training, "OptimizerStep", Watched)
    return seen


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_switches(arm, kind, phases):
    model, results = train(small(arm, kind), progress=False)
    sparse = {"dense"} if arm == "dense" else {"sparse"}
    assert phases == ([set()] * 4 if arm == "gelu" else [{"dense"}, {"dense"}, sparse, sparse])
    assert 0 < results["valid"]["poses"]["loss"] < 4 and len(results["losses"]) == 4
    assert results["final_loss"] == pytest.approx(sum(results["losses"][-2:]) / 2, abs=1e-4)
    assert (results["engine"] is None) == (arm in ("dense", "gelu"))
    assert results["cuda_graph"] == torch.cuda.is_available()
    if ARMS[arm].get("sparsity", SPARSITY_PRESETS["dense"]).activation == "venom":
        assert all(ffn.clustered == 16 for ffn in model.ffns())


def test_dense_steps_may_come_last_and_fold_weights(phases, monkeypatch):
    folded = []
    monkeypatch.setattr("replicate.ffn.SparseFFN.fold", lambda ffn: folded.append(ffn))
    config = small("act24", steps=4, dense_warmup=1, sparse_share=0.5, fold=True)
    model, _ = train(config, progress=False)
    assert phases == [{"dense"}, {"sparse"}, {"sparse"}, {"dense"}] and folded == model.ffns()


def test_the_moments_follow_the_neurons(monkeypatch):
    before, after, orders = [], [], []
    permute = swap.permute_moments

    def watched(optimizer, ffn, order):
        moment = optimizer.state[ffn.w1]["exp_avg"]
        before.append(moment.clone())
        permute(optimizer, ffn, order)
        after.append(moment.clone())
        orders.append(order)

    monkeypatch.setattr(swap, "permute_moments", watched)
    train(small("venom16", steps=7, dense_warmup=6), progress=False)  # the first gradients stop at zeros
    assert len(orders) == 2, "once a layer"
    for old, new, order in zip(before, after, orders, strict=True):
        assert old.abs().max() > 0 and torch.equal(new, old[:, order]) and not torch.equal(new, old)


@pytest.mark.parametrize("arm", ["gelu", "venom16", "block16", "tile24"])
def test_compiled_blocks_train_as_they_are(arm, monkeypatch):
    graphs = []
    torch._dynamo.reset()
    compiled.compiled_piece.cache_clear()
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward)
    plain, whole = (train(small(arm, compile=on), progress=False)[1]["losses"] for on in (False, True))
    torch._dynamo.reset()
    compiled.compiled_piece.cache_clear()
    assert whole == pytest.approx(plain, abs=1e-4)
    assert 1 <= len(graphs) <= (6 if arm == "tile24" else 2), "a block a phase, not a block a layer"


def test_a_sparse_arm_has_sparse_steps():
    with pytest.raises(ValueError, match="no step is sparse: dense_warmup is 4, steps 4"):
        train(small("act24", dense_warmup=4), progress=False)


def test_runs_repeat_and_seeds_differ():
    first, again, other = (train(small("act24", seed=s), progress=False)[1]["losses"] for s in (1, 1, 2))
    assert first == again and first != other


def test_arms_of_a_seed_see_the_same_batches():
    one, two = small("dense"), small("venom16")
    data = Glyphs(size=16)
    for a, b in zip(training.batch_at(data, one, 5), training.batch_at(data, two, 5), strict=True):
        assert torch.equal(a, b)
    other = training.batch_at(data, replace(one, seed=2), 5)
    assert not torch.equal(other[1], training.batch_at(data, one, 5)[1])


def test_a_share_of_pictures_loses_its_class():
    config = small("dense", batch_size=400, class_drop=0.25)
    *_, y = training.batch_at(Glyphs(size=16), config, 0)
    assert 0.15 < (y == config.model.n_classes).double().mean() < 0.35
    *_, y = training.batch_at(Glyphs(size=16), replace(config, class_drop=0.0), 0)
    assert y.max() < config.model.n_classes


def test_the_held_out_loss_by_hand():
    """The velocity 0 has loss E|noise - x0|^2, by time as a whole; better velocities have less."""
    config, data = small("dense", batch_size=64), Glyphs(size=16)
    for split in SPLITS:
        zero = held_out(None, data, config, split)
        ink = data.batch(split, 0, 64)[0].square().mean().item()
        assert zero["loss"] == pytest.approx(1 + ink, abs=0.05)
        assert sum(zero["by_time"]) / len(zero["by_time"]) == pytest.approx(zero["loss"])
    model = DiT(config.model)
    assert held_out(model, data, config, "poses") == held_out(None, data, config, "poses")
    with torch.no_grad():
        model.out.bias.fill_(0.9)  # the mean of -x0, nearly all black
    better = held_out(model, data, config, "poses")
    assert better["loss"] < zero["loss"] - 0.5 and better == held_out(model, data, config, "poses")


def test_a_toy_learns():
    """Held-out loss well below that of the velocity 0 and of the best constant, about 1, in few steps."""
    config = small("venom16", steps=60, dense_warmup=30, lr_warmup=5, lr=1e-2, batch_size=16)
    _, results = train(config, progress=False)
    assert results["zero_loss"] > 1.7
    assert all(results["valid"][split]["loss"] < 0.85 for split in ("poses", "fonts"))


def test_a_loss_that_is_not_finite_ends_the_run(monkeypatch):
    monkeypatch.setattr(training, "flow_loss", lambda velocity, x0, noise: velocity.mean() * torch.nan)
    with pytest.raises(RuntimeError, match=r"loss nan, gradient norm nan at step 0; .*: out.bias"):
        train(small("dense"), progress=False)


def test_a_gradient_that_is_not_finite_is_named(monkeypatch):
    class Poisoned(training.DiT):
        def __init__(self, config):
            super().__init__(config)
            self.steps = 0
            self.blocks[0].attn.proj.weight.register_hook(self.poison)

        def poison(self, gradient):
            self.steps += 1
            return gradient * (torch.nan if self.steps > 3 else 1)

    monkeypatch.setattr(training, "DiT", Poisoned)
    with pytest.raises(
        RuntimeError, match=r"loss \d.*, gradient norm nan at step 3; .*back: blocks.0.attn.proj.weight;"
    ):
        train(small("dense"), progress=False)


def test_configurations_are_checked_and_hashed():
    with pytest.raises(ValueError, match="there is no 'sound' 'smoke'"):
        config_of("sound", "smoke", "dense", 1)
    with pytest.raises(ValueError, match="arm is 'w9'; choose of dense, gelu"):
        config_of("image", "smoke", "w9", 1)
    with pytest.raises(ValueError, match=r"class_drop is 1\.0"):
        DiffusionConfig(class_drop=1.0)
    with pytest.raises(ValueError, match="blocks of v rows"):
        small("block16", batch_size=3)
    for name, value in (
        ("grad_accum", 2), ("residual", "bfloat16"), ("stats_every", 5), ("eval_every", 5),
        ("checkpoint_every", 5), ("corpus", "stdlib"), ("attention", "torch"), ("parallel", "ddp"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} is {value!r}; a diffusion run, .* no effect, needs"):
            small("dense", **{name: value})
    configs = [
        config_of(kind, "gpu", arm, seed) for kind in ("image", "video") for arm in ARMS for seed in (1, 2)
    ]
    assert len({config_hash(config) for config in configs}) == len(configs)
    assert config_hash(configs[0]) == config_hash(replace(configs[0], device="cuda:1", compile=False))
    assert {config.kind for config in configs} == {"image", "video"}


@pytest.mark.parametrize(("kind", "profile"), PRESETS)
def test_presets_have_shapes_that_kernels_take(kind, profile):
    config = PRESETS[kind, profile]
    tokens, model = config.tokens_per_step, config.model
    assert tokens % 64 == 0 and model.seq_len % 64 == 0, "a vote of 64 tokens is within a picture"
    assert model.d_model % 32 == 0 and model.d_ff % 128 == 0
    if profile == "gpu":
        assert tokens == 16384 and model.d_model % 64 == 0


def test_stretches_of_losses():
    assert stretches([1.0, 2.0]) == [1.0, 2.0]
    long = stretches([float(i) for i in range(1000)])
    assert len(long) == 100 and long[0] == 4.5 and long[-1] == 994.5
