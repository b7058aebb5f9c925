import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from replicate import study
from replicate.config import ModelConfig, TrainConfig
from replicate.data import load_corpus
from replicate.settings.text import config_hash, to_dict
from replicate.study import pool, runs, worker
from replicate.study.progress import StudyProgress
from replicate.study.records import make_record
from replicate.system import locks, paths
from replicate.text import downloads
from replicate.train import train
from replicate.training import checkpoint

RUN = TrainConfig(
    model=ModelConfig(vocab_size=32, n_layer=1, d_model=16, d_ff=64, n_head=2, seq_len=16),
    corpus="synthetic",
    steps=8,
    batch_size=2,
    lr_warmup=2,
    dense_warmup=4,
    eval_batches=1,
)
LONG = replace(RUN, steps=10**6, stats_every=0)


def test_arms_are_presets_times_seeds():
    configs = study.arms("smoke", ["dense", "recipe"], [1, 2], steps=60)
    assert [study.describe(c) for c in configs] == [
        f"{name} seed {seed}" for seed in (1, 2) for name in ("dense", "recipe")
    ]
    assert {c.steps for c in configs} == {60}
    half = study.arms("gpu", ["venom16"], sparse_share=0.5)[0]
    assert half.corpus == "pysrc"
    assert study.describe(half) == "venom16 sparse-dense 50% seed 1"
    swiglu = replace(RUN, model=replace(RUN.model, activation="swiglu"))
    assert study.describe(swiglu) == "dense swiglu seed 1"
    with pytest.raises(ValueError, match="unknown sparsity preset 'recipes'"):
        study.arms("smoke", ["recipes"])


def test_a_failing_arm_is_named_and_costs_only_itself(store, capfd):
    other = replace(RUN, seed=2)
    broken = replace(RUN, corpus="stdlib")
    with pytest.raises(
        study.StudyFailed, match=r"1 of 3 arms failed.*\n  dense seed 1 .*vocab_size is 32"
    ) as e:
        study.run([RUN, broken, other, RUN], workers=2, store=store, label="three")
    assert list(e.value.failures) == [f"dense seed 1 ({config_hash(broken)})"]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("three 3 runs to train, 2 at a time, about 00:0")
    assert lines[1].startswith("three 1/3 dense seed ")
    assert sum("FAILED" in line for line in lines) == 1
    found = study.run([other, RUN, other], store=store)  # nothing left to train
    assert [(record.seed, origin) for record, origin in found] == [(s, "cached") for s in (2, 1, 2)]
    assert found[1][0].results["steps"]["loss"] == train(RUN, progress=False)["steps"]["loss"]
    assert found[0][0].corpus["corpus"] == "synthetic"
    assert found[0][0].seconds > 0


def test_a_corpus_that_cannot_be_had_makes_a_cached_run_missing(store, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "SHAKESPEARE_URL", (tmp_path / "none").as_uri())
    config = replace(RUN, corpus="shakespeare")
    store.put(make_record("train", config, {"final_loss": 1.0}, corpus={"sha256": "x"}))
    store.put(make_record("train", RUN, {}, corpus={"sha256": load_corpus("synthetic").sha256}))
    found = study.look_up({config_hash(c): c for c in (config, RUN)}, store)
    assert list(found) == [config_hash(RUN)]


def test_records_name_the_device_that_the_run_asked_for(store, monkeypatch):
    monkeypatch.setattr("replicate.system.provenance.device_name", lambda kind="auto": f"the {kind} device")
    results = {"final_loss": 1.0, "corpus": {"sha256": "x"}}
    answer = {"results": results, "seconds": 1.0, "completion": {"accuracy": 0.5}}
    asked = {"n": 4}
    for device in ("cpu", "auto"):
        study_ = runs.Study({}, store, {}, question=asked)
        record = study_.put_answer(replace(RUN, device=device), answer)
        reply, _ = store.find("completion", {"train": record.config_hash, **asked})
        assert record.device == reply.device == f"the {device} device"


def test_fresh_trains_again(store, monkeypatch):
    def here(configs, workers, **options):
        yield from [
            (config, {"results": train(config, progress=False), "seconds": 1.0}) for config in configs
        ]

    monkeypatch.setattr(pool, "train_all", here)
    store.put(
        make_record("train", RUN, {"final_loss": 0.0}, corpus={"sha256": load_corpus("synthetic").sha256})
    )
    assert study.run([RUN], store=store)[0][0].results == {"final_loss": 0.0}
    record, origin = study.run([RUN], store=store, fresh=True, progress=False)[0]
    assert origin == "fresh"
    assert record.results["final_loss"] > 1


def test_a_killed_worker_costs_one_arm(store):
    """Kill the first worker at work; the arm after it is trained by another."""
    answers = pool.train_all([LONG, RUN], workers=1)
    threads, start = [], pool.Worker.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool.Worker, "start", lambda thread: (threads.append(thread), start(thread)))
        patch.setattr(pool, "_next", _killing(threads, pool._next))
        found = {config.steps: answer for config, answer in answers}
    assert "its process ended (status" in found[LONG.steps]["error"]
    assert len(found[RUN.steps]["results"]["steps"]["loss"]) == 8


OFTEN = "from replicate.training import checkpoint; checkpoint.FIRST = 0.1; "


def test_an_arm_whose_worker_was_killed_goes_on(store, monkeypatch):
    """SIGKILL in the middle; run again, it continues, and its record is that of a run never stopped."""
    monkeypatch.setattr(pool, "WORKER", OFTEN + pool.WORKER)
    config = replace(RUN, steps=1200, stats_every=100)
    threads, start, folder = [], pool.Worker.start, worker.run_dir(config)
    with monkeypatch.context() as patch:
        patch.setattr(pool.Worker, "start", lambda thread: (threads.append(thread), start(thread)))

        def kill(at_work):
            if checkpoint.steps(folder):
                threads[0].process.kill()

        ((_, answer),) = pool.train_all([config], watch=kill)
    assert "its process ended (status" in answer["error"]
    began = checkpoint.steps(folder)[-1]
    assert 0 < began < config.steps
    seen, watch = [], StudyProgress.finished
    monkeypatch.setattr(
        StudyProgress,
        "finished",
        lambda self, key, text, began: (seen.append(began), watch(self, key, text, began)),
    )
    ((record, origin),) = study.run([config], store=store)
    assert origin == "fresh" and seen[0] == pytest.approx(began / config.steps)
    whole = runs.compact(worker.train_one(config)["results"])
    assert record.results["steps"]["loss"] == whole["steps"]["loss"]
    assert (
        record.results["stats"] == whole["stats"] and record.results["valid_losses"] == whole["valid_losses"]
    )
    assert len(record.results["steps"]["tokens_per_s"]) == config.steps
    assert record.seconds > record.results["seconds"] > 0
    assert not folder.exists()  # nobody asked for the model


TWIN = """
import json, sys
from replicate import study
from replicate.settings.text import from_dict
from replicate.study.records import RecordStore
configs = [from_dict(config) for config in json.loads(sys.argv[1])]
print("ready", flush=True)
sys.stdin.readline()
found = study.run(configs, workers=1, store=RecordStore(sys.argv[2], sys.argv[3]), consent=True)
print(*(origin for _, origin in found))
"""


def twin(store, *configs):
    """Another process that runs these once it is told to by `begin`; it has imported all it needs."""
    arguments = [json.dumps([to_dict(config) for config in configs]), str(store.root), str(store.recorded)]
    command = [sys.executable, "-c", TWIN, *arguments]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, **pipes, text=True, cwd=paths.ROOT)
    assert process.stdout.readline() == "ready\n"
    return process


def begin(process):
    """Let a twin begin."""
    process.stdin.write("\n")
    process.stdin.flush()


def at_work(config):
    """Wait until somebody trains it."""
    end = time.monotonic() + 60
    while (lock := locks.take(worker.claim(config))) and time.monotonic() < end:
        lock.close()
        time.sleep(0.02)
    assert lock is None


def test_two_processes_train_each_arm_once(store):
    configs = [replace(RUN, steps=600, stats_every=0, seed=seed) for seed in (1, 2)]
    with twin(store, *configs) as one, twin(store, *configs) as two:
        begin(one)
        at_work(configs[0])
        begin(two)
        said = [process.communicate(timeout=120) for process in (one, two)]
    assert [out for out, _ in said] == ["fresh fresh\n", "cached cached\n"]
    assert "waits for another process, which trains dense seed 1; dense seed 2" in said[1][1]


def test_a_dead_owner_s_arm_is_trained_by_who_waits(store):
    config = replace(RUN, steps=800, stats_every=0)
    with twin(store, config) as one, twin(store, config) as two:
        begin(one)
        at_work(config)
        begin(two)
        while "waits for another process" not in two.stderr.readline():
            assert two.poll() is None
        one.kill()
        assert two.communicate(timeout=120)[0] == "fresh\n"


def test_two_processes_share_the_cores(monkeypatch):
    """While somebody has the only core, nothing starts; then it does."""
    monkeypatch.setattr(pool, "_cores", lambda: 1)
    core = locks.take("worker-0")
    answers = []

    def watch(at_work):
        answers.append(dict(at_work))
        if len(answers) == 3:
            core.close()

    ((_, answer),) = pool.train_all([RUN], watch=watch)
    assert answers[:3] == [{}, {}, {}] and "results" in answer


def _killing(threads, original):
    def kill_first(answers, *options):
        if threads:
            thread = threads.pop()
            while thread.process is None:
                time.sleep(0.01)
            thread.process.kill()
        return original(answers, *options)

    return kill_first


def test_workers_take_turns_with_the_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    environments = [pool.environment(i, gpu=True) for i in range(5)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["3", "5", "3", "5", "3"]
    names = [pool.slots(i, 5, True) for i in range(5)]
    assert names[:2] == [[f"worker-gpu-3-{i}" for i in range(3)], ["worker-gpu-5-0", "worker-gpu-5-1"]]
    assert names[2:] == [names[0], names[1], names[0]], "a study on other GPUs waits for none of these"
    assert pool.slots(1, 2, False) == ["worker-0", "worker-1"]
    assert {e["TORCHINDUCTOR_COMPILE_THREADS"] for e in environments} == {"4"}
    assert "TORCHINDUCTOR_COMPILE_THREADS" not in pool.environment(0, gpu=False)


STUDY = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
from replicate import study
from replicate.settings.text import from_dict
from replicate.study.records import RecordStore
store = RecordStore(sys.argv[2], sys.argv[3])
study.run([from_dict(config) for config in json.loads(sys.argv[1])], workers=1, store=store, consent=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_an_interrupted_study_keeps_what_is_done_and_leaves_no_process(store):
    configs = json.dumps([to_dict(RUN), to_dict(LONG)])
    command = [sys.executable, "-c", STUDY, configs, str(store.root), str(store.recorded)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=paths.ROOT) as process:
        assert "2 runs to train, 1 at a time" in process.stderr.readline()
        assert "1/2 dense seed 1: loss" in process.stderr.readline()
        worker = _child_of(process.pid)
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.stderr.read()
    assert [record.config["steps"] for record, _ in store.all("train")] == [RUN.steps]
    assert worker is None or not _alive(worker)


def _child_of(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_trained_gives_the_model_and_keeps_it():
    first = study.trained(RUN, progress=False)
    assert first.result()["steps"]["loss"] == train(RUN, progress=False)["steps"]["loss"]
    again = study.trained(RUN, progress=False)
    assert again.step == RUN.steps
    assert again.result() == first.result()
