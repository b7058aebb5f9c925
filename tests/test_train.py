import errno
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from replicate import schedule
from replicate.config import ModelConfig, SparsityConfig, TrainConfig
from replicate.data import TokenData
from replicate.evaluate import stats_rows
from replicate.settings.text import to_dict
from replicate.system import paths
from replicate.train import NonFiniteLoss, Trainer, train
from replicate.training import checkpoint
from replicate.training.device import pick_device
from replicate.training.progress import Progress
from replicate.training.step import OptimizerStep

MODEL = ModelConfig(vocab_size=32, n_layer=2, d_model=16, d_ff=64, n_head=2, seq_len=16)
VENOM = SparsityConfig(w1=True, w2_t=True, activation="venom", n_clusters=4, top_k=2)
RUN = TrainConfig(
    model=replace(MODEL, sparsity=VENOM),
    corpus="synthetic",
    steps=24,
    batch_size=4,
    lr=1e-2,
    lr_warmup=3,
    dense_warmup=8,
    sparse_share=0.5,
    stats_every=5,
    eval_every=10,
    eval_batches=2,
    final_window=6,
    log_every=4,
)


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return TokenData("synthetic", 32, 16, tmp_path_factory.mktemp("corpus"))


def with_sparsity(**fields):
    return replace(
        RUN, model=replace(MODEL, sparsity=SparsityConfig(**{"n_clusters": 4, "top_k": 2, **fields}))
    )


def run(config, data, **options):
    trainer = Trainer(config, data=data, progress=False, **options)
    trainer.run()
    return trainer


def assert_same_state(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def timeless(result):
    """A result without what a clock measured."""
    steps = {k: v for k, v in result["steps"].items() if k != "tokens_per_s"}
    clock = ("seconds", "valid_seconds", "tokens_per_s")
    return {k: v for k, v in result.items() if k not in clock} | {"steps": steps}


def test_a_run_records_every_step(data):
    trainer = run(RUN, data)
    result = trainer.result()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    steps = result["steps"]
    assert {len(column) for column in steps.values()} == {24}
    assert steps["phase"] == ["dense"] * 8 + ["sparse"] * 8 + ["dense"] * 8
    assert steps["lr"] == [schedule.learning_rate(step, RUN) for step in range(24)]
    assert result["final_loss"] == sum(steps["loss"][-6:]) / 6
    assert result["final_loss"] < steps["loss"][0] - 0.1
    assert [step for step, _ in result["valid_losses"]] == [10, 20, 24]
    assert result["valid_loss"] == result["valid_losses"][-1][1]
    assert 0 < result["valid_seconds"][0] < result["valid_seconds"][1] < result["valid_seconds"][2]
    assert result["valid_seconds"][2] == pytest.approx(result["seconds"], abs=1e-3)
    assert result["tokens"] == 24 * 4 * 16
    assert result["tokens_per_s"] > 0
    assert result["corpus"]["sha256"] == data.corpus.sha256
    by = result["attention"], result["backend"], result["cuda_graph"]
    on_gpu = trainer.attention, trainer.backend, True
    assert by == (on_gpu if torch.cuda.is_available() else ("torch", "reference", False))


def test_a_record_names_the_engine_and_the_graph(data):
    assert run(replace(RUN, sparse_share=0.0), data).result()["backend"] is None, "no sparse step"
    trainer = Trainer(RUN, data=data, progress=False)
    trainer.optimizer_step.not_captured = ""
    trainer.backend, trainer.attention = "cusparselt", "cudnn"
    result = trainer.result()
    found = (result["attention"], result["backend"], result["cuda_graph"])
    assert found == ("cudnn", "cusparselt", True)


def test_statistics_come_at_intervals_and_at_the_end(data):
    rows = run(RUN, data).result()["stats"]
    assert [row["step"] for row in rows] == [0, 5, 10, 15, 20, 23]
    for row in rows:
        assert len(row["y2_sparsity"]) == len(row["kept_sparsity"]) == 2
        assert row["grad_norm"] > 0
        assert row["flip_rate"].keys() == {"w1", "w2_t"}
        assert all(0 <= rate <= 1 for rates in row["flip_rate"].values() for rate in rates)
        sparse = row["phase"] == "sparse"
        assert ("router_load" in row) == sparse
        assert all((kept >= 0.75) == sparse for kept in row["kept_sparsity"])
    assert any(rate > 0 for row in rows for rate in row["flip_rate"]["w1"])


def test_statistics_change_nothing(data):
    quiet = run(replace(RUN, stats_every=0, eval_every=0, log_every=100), data).result()
    assert quiet["stats"] == []
    assert quiet["steps"]["loss"] == run(RUN, data).result()["steps"]["loss"]


def test_a_run_repeats_itself_and_leaves_the_callers_random_state(data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    mvue = with_sparsity(activation="24", wgrad="mvue")
    losses = [run(mvue, data).losses for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] != run(replace(mvue, seed=2), data).losses


@pytest.mark.parametrize(
    "config",
    [
        RUN,
        with_sparsity(activation="24", wgrad="mvue"),
        replace(with_sparsity(activation="venom", routing="static", refresh_every=3), order="dense-sparse"),
        replace(with_sparsity(w1=True, weight_scale=True), order="interleaved", interleave=4, grad_accum=2),
        replace(with_sparsity(activation="24", selection="learned"), dtype="bfloat16"),
        replace(RUN, dtype="float64"),
    ],
    ids=["recipe", "mvue", "refresh", "interleaved", "learned", "float64"],
)
def test_a_resumed_run_is_bit_identical(config, data, tmp_path):
    whole = run(config, data)
    for stop in (5, 8, 13, 24):  # in the warm-up, at its end, in between, at the end
        part = Trainer(config, run_dir=tmp_path / "run", data=data, progress=False)
        part.run(stop)
        assert part.step == stop
    assert timeless(part.result()) == timeless(whole.result())
    again = Trainer(config, run_dir=tmp_path / "run", data=data, progress=False)
    assert_same_state(again.model.state_dict(), whole.model.state_dict())
    assert [f.phase for f in again.model.ffns()] == [f.phase for f in whole.model.ffns()]


# A process that has torch loaded and forks a training process for every line on its stdin.
FORKING = """
import json, os, sys, torch
from replicate.settings.text import from_dict
from replicate.train import train
torch.set_num_threads(1)
torch.optim.AdamW([torch.zeros(1)])  # imports what the first optimiser does
config = from_dict(json.loads(sys.argv[1]))
for _ in sys.stdin:
    pid = os.fork()
    if not pid:
        print(os.getpid(), flush=True)
        tell = lambda step, trainer: print(step, flush=True)
        result = train(config, run_dir=sys.argv[2], callback=tell, progress=False)
        print(json.dumps(result["steps"]["loss"]), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
    print("ended", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_run_killed_at_any_moment_resumes_to_the_same_losses(tmp_path):
    config = replace(RUN, steps=60, checkpoint_every=1)
    whole = train(config, progress=False)["steps"]["loss"]
    command = [sys.executable, "-c", FORKING, json.dumps(to_dict(config)), str(tmp_path / "run")]
    dice, first_steps = random.Random(), []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=paths.ROOT
    ) as process:

        def line(send=""):
            process.stdin.write(send)
            process.stdin.flush()
            return process.stdout.readline().strip()

        for _ in range(6):
            pid = int(line(send="go\n"))
            first_steps.append(int(line()))
            for _ in range(dice.randrange(6)):
                line()
            time.sleep(dice.random() * 0.02)  # into a step, or the writing of its checkpoint
            os.kill(pid, signal.SIGKILL)
            while line() != "ended":
                pass
        assert first_steps[0] == 1
        assert first_steps == sorted(set(first_steps))  # each went on from its predecessor
        line(send="go\n")
        while (last := line()).isdigit():
            pass
        process.stdin.close()
    assert json.loads(last) == whole


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_an_altered_checkpoint_is_refused_and_the_previous_one_used(kind, data, tmp_path):
    config = replace(RUN, checkpoint_every=4)
    whole = run(config, data, run_dir=tmp_path)
    newest = tmp_path / f"step-00000024.{kind}"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=re.escape(newest.name)):
        again = Trainer(config, run_dir=tmp_path, data=data, progress=False)
    assert again.step == 20
    again.run()
    assert again.losses == whole.losses


def test_checkpoints_come_by_time_and_seldom_where_saving_is_slow(data, tmp_path, monkeypatch):
    saved, save = [], checkpoint.save

    def slow(folder, step, *rest):
        saved.append(step)
        time.sleep(0.1)
        return save(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", slow)
    run(RUN, data, run_dir=tmp_path / "short", keep=False)
    assert saved == [] and not (tmp_path / "short").exists()  # it takes no time, and nobody wants the model
    monkeypatch.setattr(checkpoint, "FIRST", 0.0)
    monkeypatch.setattr(checkpoint, "BYTES_PER_S", math.inf)
    run(RUN, data, run_dir=tmp_path)
    assert saved == [1, RUN.steps]  # the next would be due 5 s later


def test_only_the_same_run_is_continued_exactly(data, tmp_path):
    Trainer(RUN, run_dir=tmp_path, data=data, progress=False).run(5)
    assert Trainer(RUN, run_dir=tmp_path, data=data, progress=False, resume="exactly").step == 5
    path = tmp_path / "step-00000005.json"
    step, tensors, state = checkpoint.load(path)
    checkpoint.save(tmp_path, step, tensors, state | {"corpus_sha256": "another"})
    assert Trainer(RUN, run_dir=tmp_path, data=data, progress=False, resume="exactly").step == 0
    with pytest.raises(ValueError, match="another corpus_sha256"):
        Trainer(RUN, run_dir=tmp_path, data=data, progress=False)


@pytest.fixture
def ctrl_c():
    """SIGINT raises KeyboardInterrupt, which a background job inherits ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_step_and_keeps_it(data, tmp_path, monkeypatch):
    through = timeless(run(RUN, data).result())
    call = OptimizerStep.__call__

    def interrupted(own, batches, lr, step):
        if step == 12:
            signal.raise_signal(signal.SIGINT)
        return call(own, batches, lr, step)

    monkeypatch.setattr(OptimizerStep, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(RUN, data, run_dir=tmp_path)
    assert checkpoint.steps(tmp_path) == [13]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert timeless(run(RUN, data, run_dir=tmp_path).result()) == through


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_twice_or_without_a_folder_ends_at_once(data, tmp_path, monkeypatch):
    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(OptimizerStep, "__call__", interrupted)
    for folder in (None, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            run(RUN, data, run_dir=folder)
    assert checkpoint.steps(tmp_path) == []


def test_a_checkpoint_of_another_run_is_refused(data, tmp_path):
    run(RUN, data, run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"another config_hash.*resume=False"):
        Trainer(replace(RUN, seed=2), run_dir=tmp_path, data=data, progress=False)
    fresh = Trainer(replace(RUN, seed=2), run_dir=tmp_path, data=data, progress=False, resume=False)
    assert fresh.step == 0
    assert checkpoint.steps(tmp_path) == []


def test_other_code_is_warned_about(data, tmp_path, monkeypatch):
    run(RUN, data, run_dir=tmp_path)
    monkeypatch.setattr("replicate.system.provenance.code_fingerprint", lambda: "other")
    with pytest.warns(UserWarning, match="made with code .* losses may differ"):
        Trainer(RUN, run_dir=tmp_path, data=data, progress=False)


def test_clustering_moves_the_optimisers_moments_with_the_neurons(data):
    trainer = Trainer(replace(RUN, dense_warmup=6), data=data, progress=False)
    trainer.run(6)
    twin = Trainer(replace(RUN, dense_warmup=6), data=data, progress=False)
    twin.run(6)
    idx = trainer.batch(0)[0]
    before = trainer.model(idx)[0].detach()
    trainer._make_clusters(6)
    torch.testing.assert_close(trainer.model(idx)[0], before)
    for ours, theirs in zip(trainer.model.ffns(), twin.model.ffns()):
        assert not torch.equal(ours.w1, theirs.w1)
        column = {tuple(c.tolist()): j for j, c in enumerate(theirs.w1.T)}
        perm = [column[tuple(c.tolist())] for c in ours.w1.T]
        for name in ("exp_avg", "exp_avg_sq"):
            moments = [
                [t.optimizer.state[w][name] for w in (f.w1, f.w2)]
                for t, f in ((trainer, ours), (twin, theirs))
            ]
            assert torch.equal(moments[0][0], moments[1][0][:, perm])
            assert torch.equal(moments[0][1], moments[1][1][perm])


def test_static_routing_is_calibrated_on_the_ffns_own_inputs(data, monkeypatch):
    from replicate.ffn import SparseFFN

    seen, original = [], SparseFFN.make_clusters
    monkeypatch.setattr(
        SparseFFN,
        "make_clusters",
        lambda ffn, seed, sample: (seen.append(sample), original(ffn, seed, sample))[1],
    )
    trainer = Trainer(with_sparsity(activation="venom", routing="static"), data=data, progress=False)
    trainer.run(9)
    assert [sample.shape for sample in seen] == [(2, 16, 16)] * 2
    assert not torch.equal(seen[0], seen[1])
    assert all(ffn.clustered for ffn in trainer.model.ffns())


def test_clusters_are_made_anew_every_so_many_sparse_steps(data, monkeypatch):
    steps = []
    monkeypatch.setattr(Trainer, "_make_clusters", _noting(steps, Trainer._make_clusters))
    run(with_sparsity(activation="venom", refresh_every=3), data)
    assert steps == [8, 11, 14]
    steps.clear()
    run(RUN, data)
    assert steps == [8]


@pytest.mark.parametrize("method", ["soft", "hard"])
def test_folding_leaves_the_weights_part_of_the_function_as_it_was(data, method):
    """Weights alone are sparse here, so a folded switch to dense changes nothing; an unfolded one does."""
    config = with_sparsity(w1=True, w2=True, w1_t=True, weight_method=method)
    losses = {}
    for fold in (True, False):
        trainer = Trainer(replace(config, fold=fold), data=data, progress=False)
        trainer.run(16)  # 8 of the 16 steps after the warm-up are sparse
        idx, targets = trainer.batch(16)
        assert trainer.model.ffns()[0].phase == "sparse"
        before = trainer.model(idx, targets)[1].item()
        trainer._enter_phase(16)
        assert trainer.model.ffns()[0].phase == "dense"
        losses[fold] = trainer.model(idx, targets)[1].item() - before
    assert abs(losses[True]) < 1e-6 < 1e-4 < abs(losses[False])


def test_a_folded_run_continues_as_if_never_stopped(data, tmp_path):
    config = replace(RUN, fold=True, checkpoint_every=4)
    whole = run(config, data)
    for stop in (16, 17):  # just before and just after the switch
        folder = tmp_path / str(stop)
        Trainer(config, run_dir=folder, data=data, progress=False).run(stop)
        again = Trainer(config, run_dir=folder, data=data, progress=False)
        again.run()
        assert again.losses == whole.losses


def _noting(steps, original):
    def noting(trainer, step):
        steps.append(step)
        original(trainer, step)

    return noting


class Sliced:
    """Micro-batches that are the parts of one big batch."""

    def __init__(self, data, parts):
        self.data, self.parts = data, parts

    def __getattr__(self, name):
        return getattr(self.data, name)

    def batch(self, split, step, batch_size, seed, micro=0, **where):
        whole = self.data.batch(split, step, batch_size * self.parts, seed, **where)
        return tuple(part[micro * batch_size : (micro + 1) * batch_size] for part in whole)


def test_accumulated_gradients_are_those_of_the_whole_batch(data):
    config = replace(RUN, dtype="float64", steps=12)
    big = run(replace(config, batch_size=8), data)
    small = run(replace(config, batch_size=2, grad_accum=4), Sliced(data, 4))
    torch.testing.assert_close(torch.tensor(big.losses), torch.tensor(small.losses), rtol=1e-9, atol=0)


def test_weight_decay_spares_vectors_and_clipping_bounds_the_norm(data):
    trainer = Trainer(replace(RUN, clip=0.01), data=data, progress=False)
    decayed, spared = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in spared["params"])
    norms = []
    original = trainer.optimizer.step

    def step():
        original()  # which leaves behind the gradients that it has clipped and read
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in trainer.model.parameters())))

    trainer.optimizer.step = step
    trainer.run(3)
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)


@pytest.mark.parametrize("run_dir", [None, "run"])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_explained(run_dir, data, tmp_path):
    trainer = Trainer(
        replace(RUN, log_every=50, stats_every=0, eval_every=0),
        data=data,
        progress=False,
        run_dir=run_dir and tmp_path / run_dir,
    )
    trainer.run(11)
    healthy = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    original = trainer.forward

    def poisoned(*batch):
        logits, loss = original(*batch)
        return logits, loss * (math.nan if trainer.step == 11 else 1)

    trainer.optimizer_step.forward = poisoned
    with pytest.raises(NonFiniteLoss, match=r"loss nan.*step 11 \(sparse phase") as caught:
        trainer.run()
    with pytest.raises(NonFiniteLoss, match=r"loss nan.*step 11"):
        trainer.run()  # there is no way on
    assert trainer.step > 12  # noticed later, yet the weights stayed those that made the loss
    assert_same_state(trainer.model.state_dict(), healthy)
    report = json.loads(caught.value.path.read_text())
    assert (report["step"], report["phase"], report["loss"]) == (11, "sparse", "nan")
    assert len(report["losses"]) == 11
    assert {"output_max", "w1_max", "w2_max", "y2_sparsity"} <= report["layers"][0][1].keys()
    assert report["config"] == json.loads(json.dumps(to_dict(trainer.config)))
    folder = tmp_path / run_dir if run_dir else paths.runs_dir() / "nonfinite"
    assert caught.value.path.parent == folder


def test_a_diverging_run_stops_by_itself(data):
    config = replace(RUN, clip=0, lr=1.0, lr_warmup=0, stats_every=1, model=replace(RUN.model, n_layer=1))
    trainer = Trainer(config, data=data, progress=False)
    with torch.no_grad():
        trainer.model.blocks[0].ffn.w1.mul_(1e20)
    with pytest.raises(NonFiniteLoss, match=r"step 0 \(dense phase, lr 1\)"):
        trainer.run()


def test_baselines_train_without_sparse_layers(data):
    config = replace(RUN, model=replace(MODEL, activation="swiglu"))
    result = run(config, data).result()
    assert set(result["steps"]["phase"]) == {"dense"}
    assert "y2_sparsity" not in result["stats"][0]


@pytest.mark.parametrize("changes", [{"dense_warmup": 24}, {"dense_warmup": 99}, {"sparse_share": 0.01}])
def test_a_sparse_run_without_a_sparse_step_is_refused(changes, data):
    with pytest.raises(ValueError, match=r"no step is sparse: dense_warmup is .*, steps 24, sparse_share"):
        Trainer(replace(RUN, **changes), data=data, progress=False)
    for dense in ({"sparse_share": 0.0}, {"model": MODEL}):
        Trainer(replace(RUN, **changes | dense), data=data, progress=False)


def test_train_returns_the_record_and_calls_back(tmp_path):
    seen = []
    config = replace(RUN, steps=6, dense_warmup=3)
    result = train(config, progress=False, callback=lambda step, trainer: seen.append((step, trainer.step)))
    assert seen == [(n, n) for n in range(1, 7)]
    assert len(result["steps"]["loss"]) == 6
    part = train(config, progress=False, stop_after=2, run_dir=tmp_path / "part")
    assert len(part["steps"]["loss"]) == 2
    assert part["valid_loss"] is None


def test_only_the_last_checkpoint_can_fail_without_the_result(tmp_path, monkeypatch):
    def full(folder, step, tensors, state, group):
        if step == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    config = replace(RUN, steps=6, dense_warmup=3, checkpoint_every=3)
    failing = 6
    with pytest.warns(UserWarning, match=r"the last checkpoint could not be written: .*No space left"):
        result = train(config, progress=False, run_dir=tmp_path)
    assert len(result["steps"]["loss"]) == 6 and result["valid_loss"] is not None
    failing = 3
    with pytest.raises(OSError, match="No space left"):
        train(config, progress=False, run_dir=tmp_path, resume=False)


def test_progress_in_a_log_file_is_whole_lines(data):
    log = io.StringIO()
    trainer = Trainer(RUN, data=data, progress=False)
    trainer.progress = Progress(True, RUN, log, every=0)
    trainer.run()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert lines[0].startswith("train: ")
    assert "24 steps of 64 tokens; 8 sparse, the first is step 8" in lines[0]
    assert "step 8: sparse steps begin" in lines
    assert "step 16: dense steps begin" in lines
    assert any(
        re.match(r"step 12/24 sparse, loss \d\.\d{4}, lr \d\.\d\de-\d\d, .*k tokens/s, 00:\d\d left", x)
        for x in lines
    )
    assert re.match(r"step 24/24, loss \d\.\d{4}, held-out loss \d\.\d{4}, 00:\d\d", lines[-1])
    quiet = io.StringIO()
    trainer = Trainer(RUN, data=data, progress=False)
    trainer.progress = Progress(False, RUN, quiet, every=0)
    trainer.run()
    assert quiet.getvalue() == ""


def test_progress_in_a_terminal_renews_one_line():
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    progress = Progress(True, RUN, terminal)
    progress.start(1000, 0, torch.device("cpu"), torch.float32)
    progress.bar.mininterval = 0
    progress.update(4, 2.0, 1000.0)
    progress.update(8, 1.9, 1000.0)
    progress.finish(24, 1.5, None, 3.0)
    text = terminal.getvalue()
    assert "step 4/24 dense, loss 2.0000" in text and "step 8/24 dense, loss 1.9000" in text
    assert text.count("\n") == 2 and "step 24/24, loss 1.5000, 00:03\n" in text


@pytest.mark.parametrize(
    ("why", "steps"), [("", "a step is one CUDA graph"), ("off", "launched kernel by kern")]
)
def test_the_first_line_on_a_gpu_names_its_kernels(monkeypatch, why, steps):
    monkeypatch.setattr("replicate.training.progress.backend.report", lambda device: "backend b on g")
    log = io.StringIO()
    Progress(True, RUN, log).start(1000, 0, torch.device("cuda"), torch.bfloat16, why, "cudnn")
    line = log.getvalue()
    assert "; cuda bfloat16; backend b on g; attention by cudnn; " in line and steps in line


@pytest.mark.parametrize(
    ("batch", "seq_len", "v", "rows"),
    [(8, 128, 64, 4), (64, 512, 64, 8), (2, 16, 32, 2), (1, 8, 8, 1), (6, 16, 48, 3)],
)
def test_statistics_read_few_sequences_in_whole_blocks(batch, seq_len, v, rows):
    model = replace(
        MODEL, seq_len=seq_len, sparsity=SparsityConfig(activation="venom", routing="oracle-block", v=v)
    )
    assert stats_rows(replace(RUN, batch_size=batch, model=model)) == rows


def test_a_backend_nobody_knows_is_refused_before_anything_runs(data, monkeypatch):
    monkeypatch.setenv("REPLICATE_BACKEND", "fast")
    with pytest.raises(ValueError, match="REPLICATE_BACKEND is 'fast'; choose one of auto"):
        Trainer(RUN, data=data, progress=False)
    Trainer(replace(RUN, backend="reference"), data=data, progress=False)


def test_a_backend_that_cannot_run_here_is_refused_before_the_warm_up(data):
    config = replace(RUN, device="cpu", backend="cusparselt")
    with pytest.raises(ValueError, match="'cusparselt' cannot run on cpu"):
        Trainer(config, data=data, progress=False)
    for dense in (replace(config, model=MODEL), replace(config, sparse_share=0.0)):
        Trainer(dense, data=data, progress=False)


def test_a_run_with_a_bfloat16_residual_stream_trains_as_one_with_a_float32_one(data):
    """And a precision without bfloat16 refuses it, saying what to set."""
    narrow = run(replace(RUN, dtype="bfloat16", residual="bfloat16"), data)
    wide = run(replace(RUN, dtype="bfloat16"), data)
    assert narrow.model.stream == torch.bfloat16 and wide.model.stream is None
    assert narrow.losses[0] == pytest.approx(wide.losses[0], abs=0.01) and narrow.losses != wide.losses
    assert narrow.losses[-1] == pytest.approx(wide.losses[-1], abs=0.1) and narrow.losses[-1] < 3
    assert narrow.valid_losses[-1][1] == pytest.approx(wide.valid_losses[-1][1], abs=0.1)
    with pytest.raises(ValueError, match="the run computes in float32; set dtype='bfloat16'"):
        Trainer(replace(RUN, device="cpu", residual="bfloat16"), data=data, progress=False)


def test_devices_that_are_not_here_are_refused():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match=r"'gpu0'.*choose 'auto' or 'cpu'"):
        pick_device("gpu0")
    with pytest.raises(
        ValueError, match="'meta', on which nothing trains here; choose 'auto', 'cpu' or 'cuda'"
    ):
        pick_device("meta")


GPU_RUN = replace(
    RUN,
    model=replace(
        MODEL, vocab_size=64, d_model=64, d_ff=256, seq_len=64, sparsity=replace(VENOM, n_clusters=16)
    ),
    batch_size=16,
    device="cuda",
)


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", [GPU_RUN.model.sparsity, SparsityConfig(activation="24", wgrad="mvue")])
def test_a_resumed_run_on_a_gpu_is_bit_identical(sparsity, tmp_path):
    config = replace(GPU_RUN, model=replace(GPU_RUN.model, sparsity=sparsity))
    data = TokenData("synthetic", 64, 64, tmp_path)
    whole = run(config, data)
    for stop in (7, 13, 24):
        part = Trainer(config, run_dir=tmp_path / "run", data=data, progress=False)
        part.run(stop)
    assert timeless(part.result()) == timeless(whole.result())
    assert_same_state(part.model.state_dict(), whole.model.state_dict())


@pytest.mark.gpu
def test_a_loss_that_is_not_finite_is_noticed_on_a_gpu(tmp_path):
    data = TokenData("synthetic", 64, 64, tmp_path)
    trainer = Trainer(replace(GPU_RUN, log_every=50, stats_every=0), data=data, progress=False)
    trainer.run(11)
    healthy = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    original = trainer.forward
    trainer.optimizer_step.forward = lambda *batch: (None, original(*batch)[1] * math.inf)
    with pytest.raises(NonFiniteLoss, match=r"loss inf.*step 11 \(sparse phase"):
        trainer.run()
    assert_same_state(trainer.model.state_dict(), healthy)
