"""The study in portions: order, budget, what is stored, and the table of what is missing."""

import collections
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from replicate import __main__ as commands
from replicate import schedule, study
from replicate.config import ModelConfig, TrainConfig
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.settings.text import config_hash
from replicate.study import command, completion, plans, pool, results, runs, worker
from replicate.study.estimate import TimeLimit
from replicate.study.records import make_record
from replicate.study.runs import Outcome
from replicate.training import checkpoint

RUN = TrainConfig(
    model=ModelConfig(vocab_size=32, n_layer=1, d_model=16, d_ff=64, n_head=2, seq_len=16),
    corpus="synthetic",
    steps=4,
    batch_size=2,
    lr_warmup=2,
    dense_warmup=2,
    eval_batches=1,
)
W1 = replace(RUN, model=replace(RUN.model, sparsity=SPARSITY_PRESETS["w1"]))


def test_a_worker_imports_nothing_from_the_current_folder(tmp_path, monkeypatch):
    """A file there may be named as one of Python's modules, and an empty entry of PYTHONPATH means it too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep + os.environ.get("PYTHONPATH", ""))
    (tmp_path / "queue.py").write_text("raise SystemExit('poisoned')")
    monkeypatch.chdir(tmp_path)
    ((_, answer),) = pool.train_all([RUN], 1)
    assert answer.get("error") is None and answer["results"]["tokens"] == RUN.steps * RUN.tokens_per_step


def seeds_of(config, *seeds):
    return [replace(config, seed=seed) for seed in seeds]


def named(name, *configs):
    return [(name, config) for config in configs]


def trained(outcome):
    """Hashes of the runs that were trained."""
    return [key for key, (_, origin) in outcome.done.items() if origin == "fresh"]


def hashes(*configs):
    return [config_hash(config) for config in configs]


def test_a_portion_trains_what_is_missing_and_asks_the_model(store, capsys):
    runs = named("dense", *seeds_of(RUN, 1, 2)) + named("w1", W1)
    question = completion.QUESTION | {"n": 20, "context": 6, "length": 4}
    first = command.run(runs[:2], store, workers=1, question=question, keep=True)
    assert trained(first) == hashes(*seeds_of(RUN, 1, 2))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("2 runs to train, 1 at a time, about 00:0")
    assert lines[1].startswith("1/2 dense, seed 1: loss ") and "accuracy" in lines[1]
    again = command.run(runs, store, workers=1, question=question)
    assert (trained(again), again.failed, again.left) == (hashes(W1), {}, [])
    asked = {"train": config_hash(RUN), **question}
    reply, origin = store.find("completion", asked)
    assert origin == "recorded"
    correct = [int(digit) for digit in reply.results["correct"]]
    assert len(correct) == reply.results["n"] == 20
    assert sum(correct) / 20 == reply.results["accuracy"]
    assert worker.ask(study.trained(RUN, progress=False), question) == reply.results
    table = command.status([*runs, ("w1", replace(W1, seed=2))], store)
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["arm", "tokens", "seed", "1", "seed", "2"]
    assert rows[1] == ["dense", "0.0M", "recorded", "recorded"]
    assert rows[2] == ["w1", "0.0M", "cached", "missing"]
    assert table.splitlines()[-1].startswith("2 recorded, 1 cached, 1 missing")
    other = make_record("train", replace(W1, seed=3), {}, corpus={"sha256": "f" * 64})
    store.put(other, recorded=True)
    assert "their texts differ" in command.status([*runs, ("w1", replace(W1, seed=3))], store)


def test_the_recorded_answers_are_those_the_notebooks_look_up(store, monkeypatch):
    question = completion.QUESTIONS["gpu"]
    record = make_record("train", RUN, {"final_loss": 1.0, "valid_loss": 1.0}, corpus={"sha256": "x"})
    reply = make_record("completion", {"train": record.config_hash, **question}, {"accuracy": 0.625})
    store.put(reply, recorded=True)
    monkeypatch.setattr(results, "RecordStore", lambda: store)
    runs = results.frame([(record, "recorded")])
    assert results.completions(runs, completion.QUESTIONS["gpu"])["accuracy"].tolist() == [0.625]
    assert set(completion.QUESTIONS) == set(study.PRESET_OF)


def here(answers):
    """A stand-in for `pool.train_all` that takes `answers`'s seconds for each run."""

    def train_all(configs, workers, *, admit, **options):
        for config in configs:
            if not admit(config):
                yield config, {"skipped": True}
                continue
            time.sleep(answers[config_hash(config)])
            result = {"final_loss": 1.0, "valid_loss": 1.0, "tokens_per_s": 5.0, "corpus": {"sha256": "x"}}
            yield config, {"results": result, "seconds": answers[config_hash(config)]}

    return train_all


def test_no_run_starts_that_would_not_finish(store, monkeypatch):
    slow, quick = seeds_of(RUN, 1, 2, 3), seeds_of(W1, 1, 2)
    unknown = replace(RUN, lr=1e-4)
    seconds = dict.fromkeys(hashes(*slow, unknown), 0.5) | dict.fromkeys(hashes(*quick), 0.05)
    monkeypatch.setattr(pool, "train_all", here(seconds))
    order = named("", quick[0], *slow, unknown, quick[1])
    outcome = command.run(order, store, minutes=0.9 / 60, progress=False)
    assert trained(outcome) == hashes(quick[0], slow[0], quick[1])
    assert outcome.left == hashes(*slow[1:], unknown)  # expected to take as long as the longest
    resumable = [(name, replace(config, checkpoint_every=1)) for name, config in order]
    outcome = command.run(resumable[2:4], store, minutes=0.1 / 60, progress=False)
    assert trained(outcome) == hashes(slow[1])  # starts, since it can be continued; then the time is up


def test_earlier_records_tell_how_long_a_run_takes(monkeypatch):
    monkeypatch.setattr("replicate.system.provenance.device_name", lambda kind="auto": f"the {kind} device")
    limit, other = TimeLimit(), replace(RUN, lr=1e-4)
    assert limit.expected(RUN) == 0
    for config, seconds in ((RUN, 40.0), (W1, 90.0)):
        elsewhere = make_record("train", config, {}, seconds=1000.0, device="cpu")
        limit.learn(config, elsewhere, fresh=False)
        limit.learn(config, make_record("train", config, {}, seconds=seconds), fresh=False)
    assert [limit.expected(config) for config in (replace(RUN, seed=7), W1, other)] == [40.0, 90.0, 90.0]
    limit.learn(RUN, make_record("train", RUN, {}, seconds=50.0), fresh=True)
    assert [limit.expected(config) for config in (RUN, W1, other)] == [50.0, 90.0, 50.0]


def test_the_portion_ends_on_time_and_can_be_continued(store):
    long = replace(RUN, steps=10**6, stats_every=0, checkpoint_every=5)
    begun, twins = time.monotonic(), seeds_of(long, 1, 2)
    outcome = command.run(named("long", *twins), store, minutes=12 / 60, workers=1, progress=False)
    assert time.monotonic() - begun < 25
    assert outcome.left == hashes(*twins) and store.all("train") == []
    continued = runs.Trainer(long, run_dir=worker.run_dir(long), progress=False)
    assert continued.step >= 5


def test_a_result_that_cannot_be_stored_costs_only_its_run(store, monkeypatch):
    one, two = seeds_of(RUN, 1, 2)
    answers = here(dict.fromkeys(hashes(one, two), 0.0))

    def train_all(configs, workers, **options):
        for config, answer in answers(configs, workers, **options):
            if config.seed == 1:
                answer["results"]["final_loss"] = float("nan")
            yield config, answer

    monkeypatch.setattr(pool, "train_all", train_all)
    outcome = command.run(named("dense", one, two), store, progress=False)
    assert (trained(outcome), outcome.left) == (hashes(two), [])
    assert "final_loss is nan" in outcome.failed[config_hash(one)]


@pytest.mark.parametrize("workers", ["0", "-1"])
def test_fewer_than_one_process_is_refused(capsys, workers):
    assert commands.main(["study", "run", "--workers", workers]) == 2
    assert capsys.readouterr().err == f"replicate: workers is {workers}; choose 1 or more\n"
    with pytest.raises(ValueError, match=f"workers is {workers}; choose 1 or more"):
        next(pool.train_all([RUN], int(workers)))


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--minutes", "-1"], "--minutes is -1; choose a positive number"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--set", "seed=7"], "seed cannot be changed here; use --seeds"),
    ],
)
def test_bad_options_end_in_one_line(capsys, monkeypatch, option, expected):
    monkeypatch.setattr(command, "run", lambda *_, **__: pytest.fail("began"))
    assert commands.main(["study", "run", *option]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"replicate: {expected}") and err.count("\n") == 1


def test_tokens_of_a_run_with_two_names_are_counted_once(store):
    one = replace(RUN, steps=10**6, lr_warmup=0)
    table = command.status(named("dense", *seeds_of(one, 1, 2)) + named("again", one), store)
    assert table.splitlines()[-1] == "0 recorded, 0 cached, 3 missing: 64.0M tokens to train"


class Sleeper(pool.Worker):
    """Its process sleeps, and takes `delay` to start."""

    delay = 0.0

    def _spawn(self):
        self.spawns = True
        time.sleep(self.delay)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.made = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], text=True, **pipes
        )
        return self.made


def sleeper(delay):
    found = Sleeper(collections.deque([(RUN, {})]), queue.Queue(), ["slot"], lambda config: True, {})
    found.spawns, found.made, found.delay = False, None, delay
    found.start()
    return found


@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_no_process_outlives_its_worker(delay):
    """Neither one that trains nor one that is just starting."""
    worker = sleeper(delay)
    while not (worker.spawns if delay else worker.config):
        time.sleep(0.01)
    worker.stop()
    worker.join(5)
    assert worker.made.wait(5) and worker.process is None
    assert worker.log.closed and worker.made.stdin.closed and worker.made.stdout.closed
    assert "error" in worker.answers.get_nowait()[1]


def test_no_process_starts_after_the_end(monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(Sleeper, "start", lambda worker: None)
    worker = sleeper(0.0)
    worker.admit = lambda config: asked.set() or time.sleep(0.5) or True  # the end comes in this moment
    threading.Thread.start(worker)
    asked.wait(5)
    worker.stop()
    worker.join(5)
    assert not worker.spawns and worker.log.closed


def test_workers_leave_nothing_open(monkeypatch):
    made, init = [], pool.Worker.__init__
    monkeypatch.setattr(pool.Worker, "__init__", lambda self, *a: made.append(self) or init(self, *a))
    streams, spawn = [], pool.Worker._spawn
    monkeypatch.setattr(pool.Worker, "_spawn", lambda self: streams.append(spawn(self)) or streams[-1])
    ((_, answer),) = pool.train_all([RUN], 1)
    assert "results" in answer and streams[0].returncode is not None
    assert made[0].log.closed and streams[0].stdin.closed and streams[0].stdout.closed


def test_records_of_long_runs_are_small():
    rows = {"loss": [1 / 3, 2 / 3], "tokens_per_s": [1000.5, 2000.1], "lr": [1, 1], "phase": ["dense"] * 2}
    stats = [{"step": 0, "flip_rate": {"w1": [1 / 7]}, "phase": "dense"}]
    compact = runs.compact({"steps": rows, "stats": stats, "final_loss": 1 / 3})
    assert compact == {
        "steps": {"loss": [0.33333, 0.66667], "tokens_per_s": [1000, 2000]},
        "stats": [{"step": 0, "flip_rate": {"w1": [0.14286]}, "phase": "dense"}],
        "final_loss": 1 / 3,
    }


@pytest.mark.parametrize("profile", list(study.PRESET_OF))
def test_every_scale_has_a_queue_of_runs_that_differ(profile):
    runs = plans.queue(profile)
    assert len({config_hash(config) for _, config in runs}) == len(runs)
    assert {"dense", "recipe"} <= {name for name, _ in runs}
    for _, config in runs:
        schedule.phase_plan(config)
    with pytest.raises(ValueError, match="no arm 'recipes'; it has dense, w1"):
        plans.queue(profile, [1], ["recipes"])


def test_the_queue_begins_with_what_matters():
    runs = [(name, config.seed) for name, config in plans.queue("gpu")]
    assert runs[:3] == [("dense", 1), ("dense, lr x 0.5", 1), ("dense, lr x 2", 1)]
    costs = [*plans.TABLE3, *plans.SAME]
    assert runs[3:18] == [(name, 1) for name in costs[1:]]
    assert runs[18:34] == [(name, 2) for name in costs]
    assert [seed for _, seed in runs[50:80]] == [1] * 10 + [2] * 10 + [3] * 10  # Table 4's mixes
    assert runs[80:85] == [(name, 1) for name in plans.ACTIVE]
    assert runs[95:100] == [(name, 1) for name in plans.PLANNED]
    planned = [plans.everything("gpu", [1])[name][0].steps for name in plans.PLANNED]
    assert planned == [2727, 2500, 2143, 1935, 1765]
    assert runs[110] == ("recipe, no warm-up", 1)
    assert set(plans.everything("gpu")) == {name for name, _ in runs}
    for scale, names, width in (("gpu40m", plans.AT_40M, 640), ("gpu100m", plans.AT_100M, 896)):
        large = plans.queue(scale, [1, 2])
        assert [(n, c.seed) for n, c in large] == [(n, s) for s in (1, 2) for n in names]
        assert {c.model.d_model for _, c in large} == {width}


def test_open_questions_are_arms():
    plan = plans.everything("gpu", [1])
    by_clusters = {plan[f"venom16, {n} clusters"][0].model.sparsity.m for n in (8, 32, 64)}
    assert by_clusters == {16}  # all keep a quarter of the neurons
    warmups = [plan[f"recipe, {name} warm-up"][0].dense_warmup for name in ("no", "short", "long")]
    assert warmups == [0, 50, 600]
    assert plan["venom16, refreshed"][0].model.sparsity.refresh_every == 600
    late = plan["recipe, hard, 50% sparse first"][0]
    assert (late.sparse_share, late.model.sparsity.weight_method) == (0.5, "hard")
    assert "venom16, 64 clusters" not in plans.everything("smoke", [1])


def test_the_command_runs_and_shows_the_study(capsys, monkeypatch, tmp_path):
    seen = {}

    def fake(runs, store, **options):
        seen.update(options, runs=runs, root=store.root)
        results = {"final_loss": 2.0, "valid_loss": 2.5}
        done = {config_hash(c): (make_record("train", c, results), "fresh") for _, c in runs[:3]}
        return Outcome(done, {config_hash(runs[3][1]): "loss nan"}, [])

    monkeypatch.setattr(command, "run", fake)
    arguments = ["--profile", "gpu", "--arms", "dense", "recipe", "--seeds", "1", "2", "--out", str(tmp_path)]
    options = ["--minutes", "9", "--workers", "6", "--set", "lr=1e-3"]
    status = commands.main(["study", "run", *arguments, *options])
    out, err = capsys.readouterr()
    assert status == 1 and err == "replicate: recipe, seed 2: loss nan\n"
    assert [(name, c.seed, c.lr) for name, c in seen["runs"]] == [
        (name, seed, 1e-3) for seed in (1, 2) for name in ("dense", "recipe")
    ]
    assert (seen["minutes"], seen["workers"], seen["question"]["n"], seen["root"]) == (9, 6, 4000, tmp_path)
    assert "dense, seed 1" in out and "validation 2.5000  fresh" in out
    assert out.endswith("3 trained, 1 failed, 0 left\n")
    assert commands.main(["study", "status", *arguments, "--seeds", "98", "99"]) == 0  # seeds nobody has run
    assert "0 recorded, 0 cached, 4 missing: 393.2M tokens" in capsys.readouterr().out


def test_a_run_trained_again_stands_beside_the_first(store, capsys):
    (key,) = hashes(RUN)
    question = completion.QUESTION | {"n": 20, "context": 6, "length": 4}
    command.run(named("dense", RUN), store, workers=1, question=question, keep=True)
    first = (store.recorded / "train" / f"{key}.json").read_bytes()
    again = command.run(named("dense", RUN), store, workers=1, keep=True, kind="rerun-1")
    assert trained(again) == [key], "it is trained, though it is stored"
    assert (store.recorded / "train" / f"{key}.json").read_bytes() == first
    ((record, origin),) = store.all("rerun-1")
    assert (record.kind, record.config_hash, origin) == ("rerun-1", key, "recorded")
    losses = [store.find(kind, RUN)[0].results["steps"]["loss"] for kind in ("train", "rerun-1")]
    assert losses[0] == losses[1], "on a CPU equal runs are equal"
    assert trained(command.run(named("dense", RUN), store, workers=1, kind="rerun-1")) == []
    assert "1 recorded" in command.status(named("dense", RUN), store, "rerun-1")
    assert "1 missing" in command.status(named("dense", RUN), store, "rerun-2")
    assert len(store.all("completion")) == 1


def test_a_finished_model_is_not_taken_for_the_run_trained_again(store):
    results.run_plan({"dense": [RUN]}, models=["dense"])
    assert checkpoint.steps(worker.run_dir(RUN)) == [RUN.steps]
    outcome = command.run(named("dense", RUN), store, workers=1, kind="rerun-1")
    (found,) = outcome.done.values()
    assert found[1] == "fresh" and checkpoint.steps(worker.run_dir(RUN)) == []


def test_the_command_s_reruns_ask_no_question(monkeypatch, capsys, tmp_path):
    seen = {}
    monkeypatch.setattr(
        command, "run", lambda runs, store, **options: seen.update(options) or Outcome({}, {}, [])
    )
    arguments = ["study", "run", "--profile", "gpu", "--arms", "dense", "--out", str(tmp_path)]
    assert commands.main([*arguments, "--rerun", "2"]) == 0
    assert (seen["kind"], seen["question"]) == ("rerun-2", None)
    assert commands.main(arguments) == 0 and seen["kind"] == "train" and seen["question"]
    assert commands.main([*arguments, "--rerun", "-1"]) == 2
    assert "--rerun is -1; choose 1 or more" in capsys.readouterr().err


def test_a_larger_scale_says_first_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("replicate.study.estimate._rate", lambda *shape: 50e9)
    monkeypatch.setattr("replicate.report.runner.run", lambda *_, **__: pytest.fail("asked first"))
    with pytest.raises(pytest.fail.Exception, match="asked first"):
        commands.main(["notebooks", "run", "--profile", "gpu", "--seed", "777"])
    said = capsys.readouterr().out
    count = len(plans.queue("gpu", range(777, 780)))
    assert said.startswith(f"gpu: {count} of {count} runs of the study are not stored; ")
    assert "at most about" in said and said.count("\n") == 1
