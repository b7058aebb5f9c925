"""Two processes on a CPU train as one does: DDP, FSDP2, checkpoints from one number of processes to another.

The processes start once for the whole file. Every preset by every engine, a minute or two:

    REPLICATE_LONG=1 python -m pytest -q tests/training/test_parallel.py -k every_preset
"""

import functools
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from replicate.config import ModelConfig, SparsityConfig, TrainConfig
from replicate.ffn import SparseFFN
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.train import NonFiniteLoss, Trainer
from replicate.training import checkpoint, compiled
from replicate.training.sharded import is_sharded, whole
from replicate.training.step import permute_moments

WORLD = 2
CLUSTERS = {"n_clusters": 4, "top_k": 2}
FORMATS = {
    "dense": SparsityConfig(),
    "recipe": replace(SPARSITY_PRESETS["recipe"], **CLUSTERS),
    "scaled": SparsityConfig(w1=True, w2_t=True, activation="venom", weight_scale=True, **CLUSTERS),
    "learned": SparsityConfig(activation="24", selection="learned"),
}
ENGINES = ("ddp", "fsdp")
SHAPE = ModelConfig(vocab_size=32, n_layer=2, d_model=16, d_ff=64, n_head=2, seq_len=16)
RUN = TrainConfig(
    model=SHAPE, corpus="synthetic", steps=10, batch_size=4, grad_accum=2, lr=1e-2, lr_warmup=2,
    dense_warmup=3, sparse_share=0.6, stats_every=4, eval_every=5, eval_batches=3, final_window=5,
    log_every=4, dtype="float64", device="cpu",
)  # fmt: skip
needs_gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)
pytestmark = needs_gloo


def run_of(name, **changes):
    formats = FORMATS.get(name) or tiny(SPARSITY_PRESETS[name])
    return replace(RUN, model=replace(SHAPE, sparsity=formats), **changes)


def tiny(formats):
    """A preset with so many clusters that SHAPE has them."""
    if formats.activation != "venom":
        return formats
    return replace(formats, n_clusters=4, top_k=max(1, formats.top_k // 4), v=min(formats.v, 16))


def trained(config, stop_after=None, **options):
    trainer = Trainer(config, progress=False, **options)
    trainer.run(stop_after)
    return trainer


def start(rank, folder, job):
    """One of the processes: `job` of this file, whose answer by rank goes to a file."""
    torch.set_num_threads(1)
    where, backend = f"file://{folder}/{job}-meet", "cpu:gloo,cuda:nccl" if job == "on_gpus" else "gloo"
    distributed.init_process_group(backend, init_method=where, rank=rank, world_size=WORLD)
    try:
        torch.save(globals()[job](Path(folder)), f"{folder}/{job}-{rank}.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def together(job, folder):
    """The answers of two processes to `job`, by rank. Unless it is about GPUs, they see none."""
    with pytest.MonkeyPatch.context() as patch:
        if job != "on_gpus":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        torch.multiprocessing.spawn(start, (folder.as_posix(), job), nprocs=WORLD)
    return [torch.load(folder / f"{job}-{rank}.pt", weights_only=False) for rank in range(WORLD)]


def whole_state(trainer):
    """All tensors of a trainer, full."""
    state = checkpoint.pack(trainer.model, trainer.optimizer)
    return {name: whole(tensor).clone() for name, tensor in state.items()}


def everything(folder):
    """All that the tests below look at, in one start of the processes."""
    return {
        "runs": {(engine, name): one_run(engine, name) for engine in ENGINES for name in FORMATS},
        "compiled": {engine: compiled_run(engine) for engine in ENGINES},
        "checkpoints": {engine: checkpoints(folder, engine) for engine in ENGINES},
        "damaged": continued_from_damaged(folder),
        "refused": {name: refusal(changes) for name, changes in REFUSED.items()},
        "not finite": {engine: not_finite(folder, engine) for engine in ENGINES},
        "sharded by hand": sharded_by_hand(),
        "gathered": written_while_gathered(),
        "communication": {engine: watched_communication(engine) for engine in ENGINES},
    }


def one_run(engine, name):
    trainer = trained(run_of(name, parallel=engine))
    result = trainer.result()
    state = whole_state(trainer)
    sharded = [is_sharded(p) for p in trainer.model.parameters()]
    return {"result": result, "state": state, "sharded": sharded, "said": str(trainer.group)}


def compiled_run(engine):
    compiled.BACKEND = "aot_eager"
    try:
        return trained(run_of("recipe", parallel=engine, compile=True, steps=8)).losses
    finally:
        compiled.BACKEND = "inductor"


def checkpoints(folder, engine):
    """Leave a checkpoint for one process, and continue one process's."""
    trained(run_of("recipe", parallel=engine), 6, run_dir=folder / f"two-{engine}")
    return trained(run_of("recipe", parallel=engine), run_dir=folder / f"one-{engine}").losses


def continued_from_damaged(folder):
    """The newest checkpoint of two sharded processes loses a byte; the one before serves."""
    where, config = folder / "damaged", run_of("recipe", parallel="fsdp", checkpoint_every=3)
    trained(config, 7, run_dir=where)  # of steps 6 and 7
    if distributed.get_rank() == 0:
        part = max((where / "step-00000007.parts").iterdir())
        part.write_bytes(part.read_bytes()[:-1] + b"?")
    distributed.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(config, progress=False, run_dir=where)
    step, said = trainer.step, [str(w.message) for w in caught if "refused" in str(w.message)]
    trainer.run()
    return {"step": step, "said": said, "losses": trainer.losses}


REFUSED = {
    "batch": {"batch_size": 3},
    "device": {"device": "cuda:0"},
    "wgrad": {"model": replace(SHAPE, sparsity=SPARSITY_PRESETS["act24+wgrad"])},
    "learned": {"model": replace(SHAPE, sparsity=SparsityConfig(
        activation="venom", routing="learned", inner=False, **CLUSTERS))},
    "blocks": {"model": replace(SHAPE, sparsity=SparsityConfig(
        activation="venom", routing="oracle-block", v=64, **CLUSTERS))},
}  # fmt: skip


def refusal(changes):
    try:
        Trainer(replace(RUN, **changes), progress=False)
    except ValueError as error:
        return str(error)
    return ""


def not_finite(folder, engine):
    """One process's rows alone give a loss that is not finite: what each process raises, and where it is."""
    trainer = Trainer(run_of("dense", parallel=engine), progress=False, run_dir=folder / f"nan-{engine}")
    trainer.run(5)
    before = whole_state(trainer)
    if distributed.get_rank() == 1:
        forward = trainer.optimizer_step.forward
        trainer.optimizer_step.forward = Worse(forward)
    try:
        trainer.run()
    except NonFiniteLoss as error:
        same = all(torch.equal(t, before[name]) for name, t in whole_state(trainer).items() if t.dim())
        return {"says": str(error), "step": error.report["step"], "unchanged": same}
    return None


class Worse:
    """A forward function, its loss times infinity."""

    def __init__(self, forward):
        self.forward = forward

    def __call__(self, *batch):
        return None, self.forward(*batch)[1] * math.inf

    def __getattr__(self, name):
        return getattr(self.forward, name)


def sharded_by_hand():
    """A user's own model, sharded by `fully_shard`, next to the same one in whole."""
    from torch.distributed.fsdp import fully_shard

    plain, ours = own_model(), own_model()
    for model in (plain, ours):
        if model is ours:
            fully_shard(model[1])
            fully_shard(model)
        ffn, optimizer = model[1], torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(2):
            model(TOKENS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        permute_moments(optimizer, ffn, ffn.make_clusters(1, TOKENS))
        ffn.phase = "sparse"
        model(TOKENS).square().mean().backward()
        optimizer.step()
        model.masks, model.moments = ffn.weight_masks(), moments(optimizer, ffn)
        model.read, model.means = ffn.sparse_weight("w1", torch.float64), ffn.cluster_means()
        ffn.fold()
    pairs = {name: (t, whole(ours.state_dict()[name])) for name, t in plain.state_dict().items()}
    pairs |= {f"mask {name}": (mask, ours[1].weight_masks()[name]) for name, mask in plain.masks.items()}
    pairs |= {f"moment {i}": pair for i, pair in enumerate(zip(plain.moments, ours.moments, strict=True))}
    return pairs | {"read": (plain.read, ours.read), "means": (plain.means, ours.means)}


TOKENS = torch.randn(24, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def own_model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(16, 16), SparseFFN(16, 64, FORMATS["scaled"])).double()


def moments(optimizer, ffn):
    states = [optimizer.state[p] for p in (ffn.w1, ffn.w2)]
    return [whole(state[name]).clone() for state in states for name in ("exp_avg", "exp_avg_sq")]


def written_while_gathered():
    """Clusters made after a pass without gradients, which leaves a root's weights gathered."""
    from torch.distributed.fsdp import fully_shard

    ffn = SparseFFN(16, 64, FORMATS["scaled"]).double()
    distributed.broadcast(ffn.w1.data, 0)
    before = ffn.w1.detach().clone()
    fully_shard(ffn)
    with torch.no_grad():
        ffn(TOKENS)
    gathered = not is_sharded(ffn.w1)
    perm = ffn.make_clusters(1)
    ffn.reshard()
    return {"gathered": gathered, "moved": torch.equal(whole(ffn.w1), before[:, perm]), "perm": perm}


def watched_communication(engine):
    with pytest.MonkeyPatch.context() as patch:
        return communication(engine, patch)


def communication(engine, patch):
    """Calls that reduce gradients after one micro-batch of three, and after all."""
    config = run_of("dense", parallel=engine, grad_accum=3)
    trainer, counts, calls = Trainer(config, progress=False), [], [0]
    forward = trainer.optimizer_step.forward

    def counted(reduce):
        @functools.wraps(reduce)
        def call(*args, **options):
            calls[0] += 1
            return reduce(*args, **options)

        return call

    if engine == "ddp":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        forward.register_comm_hook(None, counted(allreduce_hook))
    else:
        from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

        patch.setattr(fsdp, "foreach_reduce", counted(fsdp.foreach_reduce))

    class Watched(Worse):
        def __call__(self, *batch):
            counts.append(calls[0])
            return self.forward(*batch)

    trainer.optimizer_step.forward = Watched(forward)
    trainer.optimizer_step([trainer.group.share(trainer.batch(0, m)) for m in range(3)], 1e-3)
    return [*counts, calls[0]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPLICATE_RUNS", str(tmp_path_factory.mktemp("alone")))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield {name: trained(run_of(name)) for name in FORMATS}
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def answers(alone, folder):
    """What two processes answer; one process has left checkpoints for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPLICATE_RUNS", str(folder / "runs"))
        for engine in ENGINES:
            trained(run_of("recipe"), 6, run_dir=folder / f"one-{engine}")
        yield together("everything", folder)


close = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(engine, name, answers, alone):
    expected = alone[name].result()
    for answer in answers:
        found = answer["runs"][engine, name]["result"]
        assert found["steps"]["loss"] == pytest.approx(expected["steps"]["loss"], rel=1e-9)
        assert found["valid_losses"] == [
            [step, pytest.approx(loss, rel=1e-9)] for step, loss in expected["valid_losses"]
        ]
        norms = [row["grad_norm"] for row in expected["stats"]]
        assert [row["grad_norm"] for row in found["stats"]] == pytest.approx(norms, rel=1e-9)
        assert found["parallel"] == {"processes": 2, "engine": engine}
    assert "parallel" not in expected


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("engine", ENGINES)
def test_weights_scales_and_moments_are_those_of_one_process(engine, name, answers, alone):
    expected = whole_state(alone[name])
    for answer in answers:
        state = answer["runs"][engine, name]["state"]
        assert state.keys() == expected.keys() and any("exp_avg_sq" in key for key in state)
        for key, tensor in expected.items():
            torch.testing.assert_close(state[key], tensor, **close, msg=f"{key} of {engine}, {name}")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_shards_or_does_not(engine, answers):
    for answer in answers:
        run = answer["runs"][engine, "recipe"]
        assert run["sharded"] == [engine == "fsdp"] * len(run["sharded"])
        assert run["said"] == f"2 processes, {engine}"


def test_the_slowest_process_says_how_full_its_fullest_cluster_is(answers):
    for engine in ENGINES:
        first, second = (answer["runs"][engine, "recipe"]["result"]["stats"] for answer in answers)
        sparse = [row for row in first if row["phase"] == "sparse"]
        assert sparse and all(len(row["router_load_slowest"]) == SHAPE.n_layer for row in sparse)
        assert [r.get("router_load_slowest") for r in first] == [r.get("router_load_slowest") for r in second]


@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_layers_train_as_others(engine, answers, alone):
    expected = trained(run_of("recipe", steps=8)).losses
    for answer in answers:
        assert answer["compiled"][engine] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_continues_what_two_have_begun(engine, answers, alone, folder):
    where = folder / f"two-{engine}"
    assert (where / "step-00000006.parts").is_dir() == (engine == "fsdp")
    trainer = Trainer(run_of("recipe"), progress=False, run_dir=where)
    assert trainer.step == 6 and trainer.model.ffns()[0].phase == "sparse"
    trainer.run()
    assert trainer.losses == pytest.approx(alone["recipe"].losses, rel=1e-9)
    assert not (where / "step-00000006.parts").exists() or 6 in checkpoint.steps(where)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_continue_what_one_has_begun(engine, answers, alone):
    for answer in answers:
        assert answer["checkpoints"][engine] == pytest.approx(alone["recipe"].losses, rel=1e-9)


def test_a_damaged_part_is_refused_once_and_the_checkpoint_before_serves(answers, alone):
    first, second = (answer["damaged"] for answer in answers)
    assert first["step"] == second["step"] == 6
    assert len(first["said"]) == 1 and not second["said"]
    assert "step-00000007.parts" in first["said"][0] and "SHA-256 does not match" in first["said"][0]
    for found in (first, second):
        assert found["losses"] == pytest.approx(alone["recipe"].losses, rel=1e-9)


def test_what_would_not_be_one_run_is_refused(answers):
    first, second = (answer["refused"] for answer in answers)
    assert first == second
    assert first["batch"] == (
        "batch_size is 3, the rows of a micro-batch of all 2 processes together, and no multiple of 2; set "
        "batch_size=4, or start as many processes as divide 3"
    )
    assert first["device"].startswith("device is 'cuda:0' in 2 processes; choose 'auto'")
    assert "wgrad '24' picks among the tokens" in first["wgrad"]
    assert "routing 'learned' evens out" in first["learned"]
    assert "v is 64; blocks of v rows must divide the 32 tokens of one process" in first["blocks"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_is_not_finite_in_one_stops_all(engine, answers, folder):
    first, second = (answer["not finite"][engine] for answer in answers)
    assert first == second and first["step"] == 5 and first["unchanged"]
    assert len(list((folder / f"nan-{engine}").glob("nonfinite-*.json"))) == 1


def test_a_layer_that_somebody_else_has_sharded_is_looked_at_as_a_whole(answers):
    for answer in answers:
        for name, (expected, found) in answer["sharded by hand"].items():
            torch.testing.assert_close(found, expected, **close, msg=name)
    scale = answers[0]["sharded by hand"]["1.scale"][1]
    assert scale.min() > 0.5, "no scale of half a matrix"


def test_nothing_is_written_to_a_gathered_copy(answers):
    first, second = (answer["gathered"] for answer in answers)
    assert first["gathered"] and first["moved"] and second["moved"]
    assert torch.equal(first["perm"], second["perm"])


@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_communicate_once(engine, answers):
    *before, after = answers[0]["communication"][engine]
    assert before == [0, 0, 0] and after > 0


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("REPLICATE_LONG") != "1", reason="REPLICATE_LONG=1 runs it")
@pytest.mark.parametrize("engine", ENGINES)
def test_every_preset_by_every_engine(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))
    assert len(SHARED) > 20
    for losses in together(f"every_preset_{engine}", tmp_path):
        for name in SHARED:
            assert losses[name] == pytest.approx(trained(run_of(name)).losses, rel=1e-9), name


SHARED = [name for name, formats in SPARSITY_PRESETS.items() if formats.wgrad == "dense"]


def every_preset_ddp(_):
    return {name: trained(run_of(name, parallel="ddp")).losses for name in SHARED}


def every_preset_fsdp(_):
    return {name: trained(run_of(name, parallel="fsdp")).losses for name in SHARED}


WIDE = replace(SHAPE, d_model=64, d_ff=256, seq_len=64)


def run_on_gpu(name, **changes):
    model = replace(WIDE, sparsity=FORMATS["recipe"])
    return replace(RUN, device="auto", dtype=name, model=model, **changes)


def on_gpus(folder):
    """The recipe by kernels and in float64, by each engine, with a checkpoint on the way."""
    found = {}
    for engine in ENGINES:
        for name in ("float64", "bfloat16"):
            where = folder / f"{engine}-{name}"
            trained(run_on_gpu(name, parallel=engine), 6, run_dir=where)
            found[engine, name] = trained(run_on_gpu(name, parallel=engine), run_dir=where).losses
        compiled_too = run_on_gpu("bfloat16", parallel=engine, compile=True)
        found[engine, "compiled"] = trained(compiled_too).losses
    return found


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))
    exact, near = (trained(run_on_gpu(name)).losses for name in ("float64", "bfloat16"))
    for answer in together("on_gpus", tmp_path):
        for engine in ENGINES:
            assert answer[engine, "float64"] == pytest.approx(exact, rel=1e-7)
            for name in ("bfloat16", "compiled"):
                assert answer[engine, name] == pytest.approx(near, rel=2e-2)
