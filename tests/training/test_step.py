import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from replicate.config import ModelConfig, SparsityConfig, TrainConfig
from replicate.data import TokenData
from replicate.ffn import SparseFFN
from replicate.gpt import GPT
from replicate.settings.presets import SPARSITY_PRESETS, train_preset
from replicate.settings.text import with_changes
from replicate.train import Trainer
from replicate.training.step import (
    WARM,
    OptimizerStep,
    clipped_step,
    make_optimizer,
    permute_moments,
    set_rate,
    why_not_captured,
)

MODEL = ModelConfig(vocab_size=64, n_layer=2, d_model=64, d_ff=512, n_head=2, seq_len=64)
RUN = TrainConfig(
    model=MODEL, corpus="synthetic", steps=24, batch_size=16, lr=1e-2, lr_warmup=3, dense_warmup=8,
    stats_every=5, eval_every=10, eval_batches=2, device="cuda",
)  # fmt: skip


def config(sparsity="recipe", **changes):
    """A run with a sparsity preset."""
    return replace(RUN, model=replace(MODEL, sparsity=SPARSITY_PRESETS[sparsity]), **changes)


def trained(run, tmp_path, stop=None):
    """The trainer after the run."""
    trainer = Trainer(run, data=TokenData("synthetic", 64, 64, tmp_path), progress=False)
    trainer.run(stop)
    return trainer


def test_what_keeps_a_step_from_being_captured():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert why_not_captured(config(), gpu) == ""
    assert why_not_captured(config(), cpu) == "there is no CUDA graph on cpu"
    assert why_not_captured(config(cuda_graph="off"), gpu) == "cuda_graph is 'off'"
    draws = replace(RUN, model=replace(MODEL, sparsity=SparsityConfig(activation="24", wgrad="mvue")))
    assert "'mvue'" in why_not_captured(draws, gpu)


def test_a_graph_asked_for_where_there_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cuda_graph is 'on', but there is no CUDA graph on cpu; choose"):
        trained(config(cuda_graph="on", device="cpu"), tmp_path, 1)
    with pytest.raises(ValueError, match=r"cuda_graph is 'yes'; choose one of auto, on, off"):
        config(cuda_graph="yes")


def test_the_rate_is_set_in_every_group():
    model = torch.nn.LayerNorm(4)
    optimizer = make_optimizer(model, RUN)
    set_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    shared = torch.tensor(1.0)
    optimizer.param_groups[0]["lr"] = shared
    set_rate(optimizer, 0.25)
    assert shared == 0.25 and optimizer.param_groups[0]["lr"] is shared


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sparsity", SPARSITY_PRESETS)
def test_captured_losses_are_those_of_launched_steps(sparsity, compiled, tmp_path):
    run = config(sparsity, compile=compiled)
    captured, launched = (trained(replace(run, cuda_graph=how), tmp_path) for how in ("on", "off"))
    assert captured.optimizer_step.captured == 1, "a phase that is over gives its graph back"
    assert launched.optimizer_step.captured == 0
    assert captured.losses == launched.losses
    assert captured.valid_losses == launched.valid_losses
    assert captured.stats == launched.stats
    ours, theirs = captured.model.state_dict(), launched.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", ["dense", "recipe", "act24", "active16x32"])
def test_a_deterministic_run_is_captured_bit_for_bit_at_the_study_s_shape(sparsity, tmp_path):
    run = replace(train_preset("study10m", sparsity), corpus="synthetic", deterministic=True)
    run = replace(run, steps=24, dense_warmup=8, lr_warmup=3, stats_every=10, eval_every=0, eval_batches=2)
    data = TokenData("synthetic", run.model.vocab_size, run.model.seq_len, tmp_path)
    losses = []
    for how in ("on", "on", "off"):
        trainer = Trainer(replace(run, cuda_graph=how), data=data, progress=False)
        trainer.run()
        losses.append(trainer.losses)
    assert losses[0] == losses[1] == losses[2]


@pytest.fixture
def device(monkeypatch):
    """The GPU, or a CPU where a graph is a stand-in that launches what it was given when it is replayed."""
    if torch.cuda.is_available():
        return "cuda"

    class Graph:
        """Replays by launching; writes to the same tensor, as a graph does."""

        def __init__(self, step):
            self.step, self.result = step, torch.zeros(2)

        def replay(self):
            self.result.copy_(self.step._launch(self.step._batches))

    def capture(step, phases, batches):
        step._batches = step._batches or [tuple(part.clone() for part in batch) for batch in batches]
        graph = Graph(step)
        step._graphs[phases] = graph, graph.result
        return True

    monkeypatch.setattr(
        "replicate.training.step.why_not_captured",
        lambda config, _: "" if config.cuda_graph == "on" else "off",
    )
    monkeypatch.setattr(OptimizerStep, "_capture", capture)
    return "cpu"


@pytest.mark.parametrize(
    ("changes", "graphs"),
    [
        ({"grad_accum": 3}, 1),
        ({"clip": 0.0}, 1),
        ({"order": "interleaved", "interleave": 6, "sparse_share": 0.5}, 2),  # one a phase, kept
        ({"order": "sparse-dense", "sparse_share": 0.5}, 1),  # a phase that is over gives its memory back
        ({"model.sparsity.refresh_every": 6}, 1),
    ],
)
def test_captured_micro_batches_and_alternating_phases(changes, graphs, device, tmp_path):
    run = with_changes(config(device=device), changes)
    captured, launched = (trained(replace(run, cuda_graph=how), tmp_path) for how in ("on", "off"))
    assert captured.optimizer_step.captured == graphs
    assert launched.optimizer_step.captured == 0
    assert captured.losses == launched.losses
    assert captured.stats == launched.stats


def test_a_changed_layer_is_captured_anew(device, tmp_path):
    trainer = trained(config(cuda_graph="on", stats_every=0, steps=60, device=device), tmp_path, 20)
    step = trainer.optimizer_step
    assert step.captured == 1

    def anew():
        """Captured again after some steps that were launched."""
        trainer.run(trainer.step + 1)
        before = step.captured
        trainer.run(trainer.step + WARM)
        return before == 0 and step.captured == 1

    trainer.run(trainer.step + 1)
    assert step.captured == 1, "nothing has changed"
    ffn = trainer.model.blocks[0].ffn
    ffn.config = SPARSITY_PRESETS["venom16"]
    assert anew()
    with torch.no_grad():
        ffn.w1.data = ffn.w1.data.clone()
    assert anew()
    trainer._make_clusters(trainer.step)
    assert anew()
    embed = trainer.model.embed.weight.requires_grad_(False)
    frozen = embed.clone()
    assert anew() and torch.equal(embed, frozen)
    embed.requires_grad_()
    assert anew() and not torch.equal(embed, frozen)
    ffn.backend = "reference"
    assert anew()


def test_hooks_run_in_every_step(device, tmp_path):
    run = config(cuda_graph="on", stats_every=0, steps=60, device=device)
    trainer = trained(run, tmp_path, 20)
    seen = []
    handle = trainer.model.blocks[0].ffn.register_forward_hook(lambda *_: seen.append(trainer.step))
    trainer.run(24)
    handle.remove()
    trainer.run(26)
    assert seen == [20, 21, 22, 23]
    weight = trainer.model.embed.weight
    handle = weight.register_post_accumulate_grad_hook(lambda _: seen.append(trainer.step))
    trainer.run(28)
    handle.remove()
    assert seen[4:] == [26, 27]
    assert trainer.losses == trained(replace(run, cuda_graph="off"), tmp_path, 28).losses


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_an_interrupted_step_leaves_nothing_behind(grad_accum, device, tmp_path):
    run = config(cuda_graph="on", device=device, grad_accum=grad_accum, stats_every=0)
    trainer = trained(run, tmp_path, 12)
    forward, count = trainer.optimizer_step.forward, []

    def interrupted(*batch):
        loss = forward(*batch)
        count.append(loss)
        if len(count) == grad_accum:
            loss[1].backward()
            raise KeyboardInterrupt
        return loss

    trainer.optimizer_step.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.run(14)
    trainer.optimizer_step.forward = forward
    assert not any(ffn.hold or ffn.operands for ffn in trainer.model.ffns())
    trainer.run()
    assert trainer.losses == trained(replace(run, cuda_graph="off"), tmp_path).losses


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_goes_on_launched(tmp_path):
    trainer = trained(config(), tmp_path, 3)
    step, plain = trainer.optimizer_step, trainer.optimizer_step.forward

    def waits(*batch):
        loss = plain(*batch)[1]
        loss.item()
        return None, loss

    step.forward = waits
    with pytest.warns(UserWarning, match="launched one by one; capture failed"):
        trainer.run(8)
    reference = trained(config(cuda_graph="off"), tmp_path, 8)
    assert trainer.losses == reference.losses
    assert step.captured == 0
    assert torch.rand(8, device="cuda").std() > 0, "torch draws again"


def by_hand(gradients, clip, dtype=torch.float32, loss=1.0, bad=0.0):
    """(reported, weights, optimiser, bad) after `clipped_step` of weights that are 1, one a gradient."""
    weights = [torch.nn.Parameter(torch.ones(len(g or [0]), dtype=dtype)) for g in gradients]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = torch.tensor(gradient, dtype=dtype) if gradient else None
    optimizer = torch.optim.AdamW(weights, lr=0.1, betas=(0.9, 0.95), fused=True)
    bad = torch.tensor(bad)
    return clipped_step(optimizer, weights, torch.tensor(loss), clip, bad), weights, optimizer, bad


@pytest.mark.parametrize(
    ("clip", "factor"),
    [
        (0.0, 1.0),  # off
        (0.5, 0.1),
        (4.0, 0.8),
        (5.1, 1.0),  # a norm below the limit stays
        (100.0, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_norm_5_is_clipped_by_hand(clip, factor, dtype):
    """The moments show it: Adam's first change of a weight is the same for any length of the gradient."""
    result, weights, optimizer, bad = by_hand([[3.0, 0.0], None, [4.0]], clip, dtype)
    assert result.tolist() == [1.0, 5.0] and bad == 0, "the norm before clipping"
    first, second = (optimizer.state[weights[i]] for i in (0, 2))
    torch.testing.assert_close(
        first["exp_avg"], torch.tensor([0.3 * factor, 0.0], dtype=dtype), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        second["exp_avg"], torch.tensor([0.4 * factor], dtype=dtype), rtol=1e-6, atol=0
    )
    expected = torch.tensor([0.8 * factor**2], dtype=dtype)
    torch.testing.assert_close(second["exp_avg_sq"], expected, rtol=1e-6, atol=0)
    assert weights[1] not in optimizer.state and weights[1] == 1, "no gradient, no step"
    assert optimizer.grad_scale is None and optimizer.found_inf is None


def test_tiny_norms_are_clipped_as_torch_clips_them():
    """clip / (norm + 1e-6) is a third of 1 here, and not half."""
    _, (weight,), optimizer, _ = by_hand([[2e-6]], 1e-6)
    torch.testing.assert_close(
        optimizer.state[weight]["exp_avg"], torch.tensor([2e-7 / 3]), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("gradient", "loss", "bad"),
    [([math.nan], 1.0, 0.0), ([math.inf], 1.0, 0.0), ([1.0], math.nan, 0.0), ([1.0], 1.0, 1.0)],
)
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_weights_and_moments_stay_from_the_first_step_that_is_not_finite(gradient, loss, bad, clip):
    _, (weight,), optimizer, now = by_hand([gradient], clip, loss=loss, bad=bad)
    assert now == 1 and weight == 1
    assert all(value == 0 for value in optimizer.state[weight].values())


def test_an_optimiser_that_would_not_clip_is_refused():
    weight = torch.nn.Parameter(torch.ones(1))
    for plain in (torch.optim.SGD([weight]), torch.optim.AdamW([weight])):
        with pytest.raises(ValueError, match=r"is not fused; take the one of make_optimizer"):
            clipped_step(plain, [weight], torch.tensor(1.0), 1.0, torch.tensor(0.0))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("clip", [0.0, 0.05, 1.0])
def test_steps_are_those_of_clipping_and_then_adamw(clip, tied, device):
    """Weights equal to rounding over several steps, with an embedding that is also the head."""
    run = replace(config("dense", device=device), clip=clip)
    run = replace(run, model=replace(run.model, tie_embeddings=tied))
    torch.manual_seed(1)
    ours = GPT(run.model).to(device)
    theirs = copy.deepcopy(ours)
    for model in (ours, theirs):
        model.blocks[0].attn.proj.weight.requires_grad_(False)
    step = OptimizerStep(ours, ours, make_optimizer(ours, run), replace(run, cuda_graph="off"))
    optimizer, norms = make_optimizer(theirs, run), []
    for seed in range(6):
        torch.manual_seed(seed)
        batch = torch.randint(64, (2, 4, 64)).to(device).unbind()
        found = step([batch], 1e-3)
        set_rate(optimizer, 1e-3)
        loss = theirs(*batch)[1]
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf))
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(found, torch.stack([loss.detach(), norms[-1]]), rtol=1e-4, atol=1e-6)
    assert (clip == 0.05) == all(norm > clip > 0 for norm in norms)
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Six steps move a weight by up to 6e-3. A GPU adds gradients up in no fixed order.
        torch.testing.assert_close(weight, other, rtol=0, atol=6e-6 if device == "cpu" else 2e-4, msg=name)


def test_a_launched_step_reports_loss_and_norm(tmp_path):
    trainer = trained(config("dense", device="cpu"), tmp_path, 0)
    inputs, targets = trainer.batch(0)
    expected = trainer.model(inputs, targets)[1]
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
    trainer.model.zero_grad()
    step = OptimizerStep(trainer.model, trainer.model, trainer.optimizer, RUN, nullcontext)
    before = trainer.model.embed.weight.clone()
    loss, found = step([(inputs, targets)], 1e-3)
    torch.testing.assert_close(found, norm)
    torch.testing.assert_close(loss, expected)
    assert not torch.equal(before, trainer.model.embed.weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
    ],
)
def test_all_of_a_weights_shape_that_an_optimiser_keeps_follows_the_neurons(make):
    formats = SparsityConfig(activation="venom", selection="learned", n_clusters=4, top_k=2)
    ffn = SparseFFN(16, 64, formats)
    ffn.make_clusters(1)
    ffn.phase = "sparse"  # where scores have gradients
    optimizer = make(ffn.parameters())
    ffn(torch.randn(32, 16)).square().sum().backward()
    optimizer.step()
    before = {p: {k: copy.deepcopy(t) for k, t in optimizer.state[p].items()} for p in ffn.parameters()}
    perm = torch.randperm(64)
    permute_moments(optimizer, ffn, perm)
    for parameter, axis in ((ffn.w1, 1), (ffn.w2, 0), (ffn.score, 0)):
        for name, old in before[parameter].items():
            new = optimizer.state[parameter][name]
            follows = isinstance(old, torch.Tensor) and old.shape == parameter.shape
            assert torch.equal(new, old.index_select(axis, perm)) if follows else new == old, name
