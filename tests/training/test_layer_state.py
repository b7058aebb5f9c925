"""What a sparse layer knows besides its weights goes with state dicts, copies, averages and processes."""

import copy
import pickle
from collections import OrderedDict
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from replicate.config import SparsityConfig
from replicate.ffn import SparseFFN
from replicate.settings.presets import SPARSITY_PRESETS

D, FF = 16, 128
SCALED = SparsityConfig(w1=True, w2=True, weight_scale=True)
CONFIGS = {
    **{name: SPARSITY_PRESETS[name] for name in ("act24", "recipe", "static16")},
    "scaled": SCALED,
    "learned": SparsityConfig(activation="24", selection="learned"),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(config, phase="sparse", seed=0):
    torch.manual_seed(seed)
    ffn = SparseFFN(D, FF, config)
    if config.activation == "venom":
        ffn.make_clusters(seed, normal(64, D, seed=5))
    ffn.phase = phase
    return ffn


# State dicts


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_carries_the_phase(name, assign):
    x, source = normal(32, D), layer(CONFIGS[name])
    state = source.state_dict()
    loaded = SparseFFN(D, FF, CONFIGS[name])
    loaded.load_state_dict(copy.deepcopy(state), assign=assign)
    assert loaded.phase == "sparse"
    assert torch.equal(loaded(x), source(x))
    source.phase = "dense"
    loaded.load_state_dict(source.state_dict())
    assert loaded.phase == "dense"
    assert torch.equal(loaded(x), source(x)) and not torch.equal(loaded(x), layer(CONFIGS[name])(x))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_goes_through_safetensors(name):
    source = layer(CONFIGS[name])
    loaded = SparseFFN(D, FF, CONFIGS[name])
    loaded.load_state_dict(safetensors.torch.load(safetensors.torch.save(source.state_dict())))
    assert loaded.phase == "sparse"
    assert torch.equal(loaded(normal(32, D)), source(normal(32, D)))


def test_a_state_without_any_buffer_leaves_the_phase():
    ffn = layer(CONFIGS["act24"])
    ffn.load_state_dict({"w1": torch.zeros(D, FF)}, strict=False)
    assert ffn.phase == "sparse"


def test_the_keys_of_a_state():
    names = ["w1", "w2", "sparse", "clustered", "scaled", "static_clusters", "scale"]
    assert list(SparseFFN(D, FF).state_dict()) == names


def stripped(state, **changes):
    """A state as safetensors leaves it, without metadata, with some tensors replaced."""
    return OrderedDict(state) | changes


@pytest.mark.parametrize(
    ("state", "config", "message"),
    [
        (layer(CONFIGS["act24"]).state_dict(), CONFIGS["recipe"], "its formats are {'activation': '24'}"),
        (layer(CONFIGS["recipe"]).state_dict(), SparsityConfig(), "this layer's {}"),
        (stripped(layer(CONFIGS["act24"]).state_dict()), CONFIGS["recipe"], "no clusters yet"),
        (stripped(layer(CONFIGS["act24"]).state_dict()), SCALED, "no scales yet"),
        (
            stripped(layer(CONFIGS["recipe"]).state_dict()),
            replace(CONFIGS["recipe"], n_clusters=8),
            "no clusters yet",
        ),
    ],
)
def test_a_sparse_state_that_does_not_fit_is_refused(state, config, message):
    ffn = SparseFFN(D, FF, config)
    with pytest.raises(RuntimeError, match=message):
        ffn.load_state_dict(state)
    assert ffn.phase == "dense"


def test_weights_go_to_other_formats_in_the_dense_phase():
    plain = SparseFFN(D, FF)
    for name in CONFIGS.keys() - {"learned"}:
        ffn = layer(CONFIGS[name], seed=3)
        ffn.load_state_dict(plain.state_dict())
        assert torch.equal(ffn.w1, plain.w1) and ffn.phase == "dense"
    clusters = layer(replace(CONFIGS["recipe"], n_clusters=8), "dense")
    ffn = SparseFFN(D, FF, CONFIGS["recipe"])
    ffn.load_state_dict(clusters.state_dict())
    with pytest.raises(RuntimeError, match="no clusters yet"):
        ffn.phase = "sparse"


OTHERS = {
    "venom32": SPARSITY_PRESETS["venom32"],
    "recipe": CONFIGS["recipe"],
    "act24": CONFIGS["act24"],
    "learned": CONFIGS["learned"],
    "experts": SparsityConfig(activation="venom", routing="learned", inner=False),
    "static": replace(CONFIGS["static16"], top_k=2),
}


@pytest.mark.parametrize("to", OTHERS)
@pytest.mark.parametrize("name", OTHERS)
def test_weights_go_from_any_formats_to_any_in_the_dense_phase(name, to):
    """Within a model too, and the state handed in stays as it is."""
    source, ours = (torch.nn.Sequential(layer(OTHERS[n], "dense", seed)) for n, seed in ((name, 0), (to, 1)))
    state = source.state_dict()
    keys, fixed, scores = list(state), ours[0].fixed_clusters(), copy.deepcopy(ours[0].score)
    ours.load_state_dict(state)
    assert list(state) == keys and torch.equal(ours[0].w1, source[0].w1) and ours[0].phase == "dense"
    if OTHERS[name].top_k != OTHERS[to].top_k:
        assert torch.equal(ours[0].fixed_clusters(), fixed)
    if name != to and scores is not None:
        assert torch.equal(ours[0].score, scores)
    anew = to == "static" and OTHERS[name].top_k != 2  # neurons are sorted once more, with a sample
    assert ours[0].clustered == (16 if OTHERS[name].activation == "venom" and not anew else 0)


@pytest.mark.parametrize("config", ["act24", {"activation": "24"}, SPARSITY_PRESETS, ""])
def test_formats_are_a_configuration(config):
    with pytest.raises(ValueError, match=r"sparsity is .*; give a SparsityConfig or one of SPARSITY_PRESETS"):
        SparseFFN(64, 256, config)
    ffn = SparseFFN(64, 256)
    with pytest.raises(ValueError, match="sparsity is "):
        ffn.config = config


# Copies, casts and devices


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ffn: pickle.loads(pickle.dumps(ffn))])  # noqa: S301
def test_a_copy_has_a_phase_of_its_own(copied):
    ffn = layer(CONFIGS["recipe"])
    other = copied(ffn)
    ffn.phase = "dense"
    assert (ffn.phase, other.phase) == ("dense", "sparse")
    other.phase, ffn.phase = ffn.phase, other.phase
    assert (ffn.phase, other.phase) == ("sparse", "dense")


def test_casts_and_emptying_keep_what_the_layer_knows():
    config = SparsityConfig(activation="venom", routing="static", n_clusters=512, w1=True, weight_scale=True)
    ffn = SparseFFN(4, 2048, config)
    ffn.clustered.fill_(512)
    ffn.static_clusters.copy_(torch.tensor([511, 509, 507, 257]))
    ffn.phase = "sparse"
    beta = ffn.beta(0).item()
    ffn.to_empty(device="cpu")
    ffn.bfloat16()  # rounds 511 to 512
    assert ffn.fixed_clusters().tolist() == [511, 509, 507, 257]
    assert ffn.phase == "sparse" and ffn.scale.dtype == torch.bfloat16
    assert ffn.beta(0).item() == pytest.approx(beta, rel=5e-3)


@pytest.mark.parametrize("name", SPARSITY_PRESETS)
def test_passes_on_the_meta_device(name):
    with torch.device("meta"):
        ffn, x = SparseFFN(64, 256, SPARSITY_PRESETS[name]), torch.empty(64, 64, requires_grad=True)
        for phase in ("dense", "sparse"):
            ffn.phase = phase
            y3 = ffn(x)
            y3.sum().backward()
            assert y3.is_meta and y3.shape == x.grad.shape == x.shape


def test_a_layer_from_the_meta_device_is_new():
    with torch.device("meta"):
        ffn = SparseFFN(D, FF, CONFIGS["static16"])
        ffn.phase = "sparse"
    garbage = lambda like, **options: torch.full_like(like, 77, **options)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", garbage)  # what uninitialised memory may hold
        ffn.to_empty(device="cpu")
    assert ffn.phase == "dense" and ffn.fixed_clusters().tolist() == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="no clusters"):
        ffn.phase = "sparse"
    source = layer(CONFIGS["static16"])
    ffn.load_state_dict(source.state_dict())
    assert torch.equal(ffn(normal(32, D)), source(normal(32, D)))


def test_under_inference_mode_and_vmap():
    x = normal(8, D)
    with torch.inference_mode():
        ffn = layer(CONFIGS["act24"])
        assert torch.equal(ffn(x), layer(CONFIGS["act24"])(x))
    models = [layer(CONFIGS["act24"], "dense", seed) for seed in range(3)]
    state = stack_module_state(models)
    together = vmap(lambda *state: functional_call(models[0], state, (x,)))(*state)
    torch.testing.assert_close(together, torch.stack([model(x) for model in models]))


# Averages

AVERAGES = {
    "swa": {},
    "swa, multi": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "ema": {"avg_fn": get_ema_avg_fn(0.9)},
    "ema, multi": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
}


def averaged(config, use_buffers, kind, sparse_from, steps=6):
    """(average, model, mean weights) after `steps` updates, sparse from one of them on."""
    model = layer(config, "dense")
    average = AveragedModel(model, use_buffers=use_buffers, **AVERAGES[kind])
    mean = None
    for step in range(steps):
        if step == sparse_from:
            model.phase = "sparse"
        with torch.no_grad():
            model.w1.add_(normal(D, FF, seed=step), alpha=0.01)
        average.update_parameters(model)
        share = 0.1 if "ema" in kind else 1 / (step + 1)
        w1 = model.w1.detach().double()
        mean = w1 if mean is None else mean + share * (w1 - mean)
    return average, model, mean


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_average_of_a_sparse_model_is_sparse(name, kind, use_buffers):
    x = normal(32, D, seed=9)
    average, model, mean = averaged(CONFIGS[name], use_buffers, kind, sparse_from=0)
    assert average.module.phase == "sparse"
    torch.testing.assert_close(average.module.w1.double(), mean, rtol=1e-5, atol=1e-6)
    model.w1.data = average.module.w1.data.clone()
    torch.testing.assert_close(average(x), model(x), rtol=1e-5, atol=1e-7)
    model.phase = "dense"
    assert not torch.allclose(average(x), model(x), rtol=1e-2)


@pytest.mark.parametrize("name", ["act24", "scaled"])
def test_an_average_follows_a_switch(name):
    average, model, _ = averaged(CONFIGS[name], False, "ema, multi", sparse_from=5)
    assert average.module.phase == "sparse"  # at once, since buffers are copied
    model.phase = "dense"
    average.update_parameters(model)
    assert average.module.phase == "dense"


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize(("sparse_from", "phase"), [(1, "sparse"), (5, "dense")])
def test_averaged_buffers_are_sparse_where_most_of_them_was(sparse_from, phase, kind):
    steps = 12 if "ema" in kind else 6
    average, model, _ = averaged(SCALED, True, kind, sparse_from if phase == "sparse" else steps - 1, steps)
    assert average.module.phase == phase
    assert average.module.scale.isfinite().all()
    for index in range(4):  # the scales are those of the switch, not on the way to them
        assert average.module.beta(index).item() == pytest.approx(model.beta(index).item(), rel=1e-5)


def test_a_cast_after_an_update_does_not_lose_the_phase():
    model = layer(CONFIGS["act24"], "dense")
    average = AveragedModel(model)
    model.phase = "sparse"
    average.update_parameters(model)
    assert average.double().module.phase == "sparse"


# Several processes

LEARNED = SparsityConfig(activation="venom", selection="learned", n_clusters=4, top_k=2)


def train(model, ffn, batches, optimizer=torch.optim.SGD):
    """Two dense steps, clusters, two sparse ones, two dense ones; the losses."""
    adam, losses = optimizer(ffn.parameters(), lr=0.05), []
    for step, x in enumerate(batches):
        if step == 2:
            ffn.make_clusters(1)
            ffn.phase = "sparse"
        if step == 4:
            ffn.phase = "dense"
        adam.zero_grad()
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


def batches():
    return [3 * normal(24, D, seed=step).double() for step in range(6)]


def worker(rank, folder):
    torch.set_num_threads(1)
    where = f"file://{folder}/together"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    torch.manual_seed(rank)  # DDP hands out the weights of process 0
    ffn = SparseFFN(D, FF, LEARNED).double()
    train(DistributedDataParallel(ffn), ffn, [x.chunk(2)[rank] for x in batches()])
    torch.save(ffn.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


@needs_gloo
def test_two_processes_train_as_one(tmp_path):
    torch.multiprocessing.spawn(worker, (tmp_path.as_posix(),), nprocs=2)
    torch.manual_seed(0)
    ffn = SparseFFN(D, FF, LEARNED).double()
    train(ffn, ffn, batches())
    assert ffn.score.abs().sum() > 0
    for rank in range(2):
        for name, tensor in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(tensor, ffn.state_dict()[name], rtol=1e-9, atol=1e-11)


@needs_gloo
def test_one_process_has_the_same_losses_and_leaves_untrained_scores(tmp_path):
    alone = SparseFFN(D, FF, LEARNED).double()
    ffn = copy.deepcopy(alone)
    expected = train(alone, alone, batches()[:2], torch.optim.AdamW)
    assert alone.score.grad is None  # an optimiser counts no steps for it
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        losses = train(DistributedDataParallel(ffn), ffn, batches()[:2], torch.optim.AdamW)
        ffn.score.data[0] = float("nan")  # nothing of the scores reaches the output
        assert ffn(batches()[0]).isfinite().all()
    finally:
        torch.distributed.destroy_process_group()
    assert losses == expected
    assert torch.equal(ffn.w1, alone.w1) and not ffn.score[1:].any()
    assert torch.equal(ffn.score.grad, torch.zeros_like(ffn.score.grad))
