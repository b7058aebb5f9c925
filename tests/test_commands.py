"""The command line: what each command hands on, what it prints, and how it ends when something is wrong."""

import errno
import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest

from replicate import __main__ as commands
from replicate.paper import command
from replicate.report import notebooks, runner
from replicate.study import records, train_command
from replicate.system import paths
from replicate.text import downloads
from replicate.training import checkpoint

TINY = ["steps=3", "lr_warmup=1", "dense_warmup=1", "corpus=synthetic", "model.n_layer=1", "model.d_model=16",
        "model.d_ff=32", "model.n_head=1", "model.seq_len=16", "model.vocab_size=64", "batch_size=2",
        "eval_batches=1"]  # fmt: skip


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of the command line."""
    status = commands.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_train_trains_and_writes_the_result(capsys, tmp_path):
    file = tmp_path / "result.json"
    status, out, _ = run(capsys, "train", "--sparsity", "act24", "--set", *TINY, "--json", str(file))
    assert status == 0 and out.startswith("train loss ") and "tokens/s" in out
    result = json.loads(file.read_text())
    assert result["steps"]["phase"] == ["dense", "sparse", "sparse"]
    assert f"{result['final_loss']:.4f}" in out


@pytest.mark.parametrize(
    ("command", "option", "place", "expected"),
    [
        ("train", "--json", "none/x.json", "cannot be written (No such file or directory)"),
        ("train", "--json", "", "cannot be written (it is a folder)"),
        ("train", "--json", "file/x.json", "cannot be written"),
        ("train", "--run-dir", "file", "cannot be written to"),
        ("train", "--run-dir", "file/run", "cannot be written to"),
        ("bench train", "--out", "file", "cannot be written to"),
        ("study run", "--out", "file", "cannot be written to"),
    ],
)
def test_places_that_cannot_be_written_are_refused_before_the_work(
    capsys, monkeypatch, tmp_path, command, option, place, expected
):
    def started(*args, **options):
        raise AssertionError("started")

    monkeypatch.setattr("replicate.train.Trainer", started)
    monkeypatch.setattr("replicate.bench.loop.run", started)
    monkeypatch.setattr("replicate.study.command.run", started)
    (tmp_path / "file").touch()
    status, _, err = run(capsys, *command.split(), option, str(tmp_path / place))
    assert status == 2 and err.startswith(f"replicate: {option} {tmp_path / place} ") and expected in err
    assert err.count("\n") == 1


def test_the_losses_are_printed_though_the_file_cannot_be_written(capsys, monkeypatch, tmp_path):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_command, "write_atomic", full)
    status, out, err = run(capsys, "train", "--set", *TINY, "--json", str(tmp_path / "x.json"))
    assert status == 1 and out.startswith("train loss ") and "the disk is full" in err


def fill_the_disk(monkeypatch, at):
    """Checkpoints from step `at` on find a full disk."""
    save = checkpoint.save

    def full(folder, step, *args, **options):
        if step >= at:
            raise OSError(errno.ENOSPC, f"{folder / str(step)} cannot be written (No space left on device)")
        return save(folder, step, *args, **options)

    monkeypatch.setattr(checkpoint, "save", full)


def test_a_last_checkpoint_that_cannot_be_written_costs_no_result(capsys, monkeypatch, tmp_path):
    fill_the_disk(monkeypatch, at=3)
    file = tmp_path / "result.json"
    where = ["--run-dir", str(tmp_path / "run"), "--json", str(file)]
    status, out, err = run(capsys, "train", "--set", *TINY, "checkpoint_every=2", *where)
    assert status == 1 and out.startswith("train loss ")
    assert json.loads(file.read_text())["valid_loss"] is not None
    last = err.splitlines()[-1]
    assert (
        last.startswith("replicate: the last checkpoint could not be written (") and "No space left" in last
    )
    assert last.endswith("; step 2 is kept; run the same command again to go on")


@pytest.mark.parametrize(
    ("at", "kept"), [(2, "; nothing was kept, no checkpoint was finished"), (4, "; step 2 is kept; run the")]
)
def test_a_full_disk_on_the_way_promises_only_what_is_kept(capsys, monkeypatch, tmp_path, at, kept):
    fill_the_disk(monkeypatch, at)
    options = ["--set", *TINY, "steps=6", "checkpoint_every=2", "--run-dir", str(tmp_path / "run")]
    status, out, err = run(capsys, "train", *options)
    last = err.splitlines()[-1]
    assert status == 1 and out == "" and last.startswith("replicate: the disk is full (") and kept in last


def test_a_result_is_written_though_nobody_reads_what_is_printed(monkeypatch, tmp_path):
    class Closed:
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Closed())
    file = tmp_path / "result.json"
    assert commands.main(["train", "--set", *TINY, "--json", str(file)]) == 141
    assert json.loads(file.read_text())["tokens"] == 96


@pytest.mark.skipif(os.name == "nt", reason="no such devices and links there")
def test_json_goes_through_links_and_to_pipes(tmp_path):
    file, link, pipe = tmp_path / "result.json", tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(file)
    assert commands.main(["train", "--set", *TINY, "--json", str(link)]) == 0
    assert link.is_symlink() and json.loads(file.read_text())["tokens"] == 96
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        text = pool.submit(pipe.read_text)
        assert commands.main(["train", "--set", *TINY, "--json", str(pipe)]) == 0
        assert pipe.is_fifo() and json.loads(text.result(60))["tokens"] == 96


def test_train_resumes_from_its_folder(capsys, tmp_path):
    arguments = ["train", "--set", *TINY, "checkpoint_every=1", "--run-dir", str(tmp_path)]
    first = run(capsys, *arguments)[1].split(",")[0]
    again = run(capsys, *arguments)[1].split(",")[0]
    restarted = run(capsys, *arguments, "--restart")[1].split(",")[0]
    assert first == again == restarted


OFTEN = """
import sys
from replicate.__main__ import main
from replicate.training import checkpoint
checkpoint.FIRST = 0.2
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_training_goes_on_with_the_same_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))
    command = ["train", "--set", *TINY, "steps=3000", "stats_every=0", "device=cpu", "--json"]
    here = [sys.executable, "-c", OFTEN, *command, str(tmp_path / "killed.json")]
    with subprocess.Popen(here, stderr=subprocess.DEVNULL, cwd=paths.ROOT) as process:
        while not list(tmp_path.glob("runs/train/*/step-*.json")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    done = subprocess.run(
        [*here[:-1], str(tmp_path / "a.json")], capture_output=True, text=True, cwd=paths.ROOT, check=True
    )
    assert "continues after step" in done.stderr and "the model is kept in " in done.stdout
    subprocess.run(
        [*here[:-1], str(tmp_path / "b.json"), "--restart"], capture_output=True, cwd=paths.ROOT, check=True
    )
    resumed, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert resumed["steps"]["loss"] == whole["steps"]["loss"]
    assert len(resumed["steps"]["tokens_per_s"]) == 3000 and resumed["valid_loss"] == whole["valid_loss"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--preset", "smok"], "unknown training preset 'smok'; known: smoke"),
        (["train", "--set", "model.dff=3"], "did you mean 'd_ff'"),
        (["train", "--set", "steps"], "no key=value"),
        (["train", "--set", "lr=fast"], "lr='fast'"),
        (["train", "--sparsity", "recipe", "--set", "model.d_ff=100"], "d_ff is 100"),
        (["bench", "train", "--repeats", "0"], "choose 1 or more"),
        (["study", "run", "--arms", "recip"], "no arm 'recip'"),
        (["study", "status", "--profile", "huge"], "choose one of smoke"),
        (["study", "run", "--set", "steps"], "no key=value"),
        (["claims", "--profile", "huge"], "choose one of smoke"),
        (["notebooks", "run", "--only", "99"], "no notebook '99'"),
        (["notebooks", "run", "--profile", "huge"], "choose one of smoke"),
        (["notebooks", "list", "--profile", "nope"], "profile is 'nope'; choose one of smoke"),
        (["bench", "kernels", "--shapes", "x"], "shape 'x' is not tokens,d_model,d_ff"),
        (["bench", "kernels", "--shapes", "64,64"], "shape '64,64' is not tokens,d_model,d_ff"),
        (["bench", "kernels", "--shapes", "64,64,65"], "in multiples of 64"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, expected):
    status, _, err = run(capsys, *arguments)
    assert status == 2 and expected in err and err.startswith("replicate: ") and err.count("\n") == 1


def test_a_download_that_fails_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path))
    monkeypatch.setattr(downloads, "SHAKESPEARE_URL", (tmp_path / "none").as_uri())
    status, _, err = run(capsys, "train", "--set", "corpus=shakespeare")
    assert status == 1 and err.startswith("replicate: corpus 'shakespeare' could not be downloaded")
    assert "file:PATH" in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["paint"], ["train", "--color", "red"]])
def test_unknown_commands_show_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        commands.main(arguments)
    assert stop.value.code == 2 and "usage: replicate" in capsys.readouterr().err


def test_set_may_be_repeated():
    args = train_command._parser().parse_args(["--set", "steps=50", "--set", "lr=0.01", "model.d_ff=512"])
    assert args.set == ["steps=50", "lr=0.01", "model.d_ff=512"]


def test_claims_print_and_write(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("REPLICATE_FIGURES", str(tmp_path))
    status, out, _ = run(capsys, "claims", "--write")
    assert status == 0 and "verdict" in out.splitlines()[0] and "of them our own:" in out
    assert {path.name for path in tmp_path.iterdir()} == {"claims.md", "claims.csv"}
    status, out, _ = run(capsys, "claims")  # nothing was run here: the shipped verdicts
    assert status == 0 and "not run" not in out
    status, out, _ = run(capsys, "claims", "--judged", "--profile", "laptop")
    assert status == 0 and "not run" not in "".join(out.splitlines()[:-1]) and "not run" in out
    status, out, _ = run(capsys, "claims", "--markdown", "--profile", "gpu")
    assert status == 0 and "|---|" in out


@pytest.mark.parametrize("width", [80, 120, 200])
def test_claim_table_fits_the_terminal(width):
    row = {
        "place": "Table 2",
        "claim": "word " * 60,
        "paper": "1.35x",
        "ours": "1.2 ± 0.1x",
        "verdict": "holds",
    }
    lines = command.claim_text(pd.DataFrame([row]), width).splitlines()
    assert max(map(len, lines)) == width and "…" in lines[2] and lines[2].endswith("holds")


def outcome(name, status):
    return runner.Outcome(name, status, 1.0)


@pytest.mark.parametrize(("states", "status"), [(["done", "unchanged"], 0), (["done", "failed"], 1)])
def test_a_run_ends_with_the_claims_and_says_what_failed(capsys, monkeypatch, tmp_path, states, status):
    monkeypatch.setenv("REPLICATE_FIGURES", str(tmp_path))
    seen = []

    def fake(*args, **kwargs):
        seen.append((args, kwargs))
        return [outcome(f"0{i}_x", state) for i, state in enumerate(states)]

    monkeypatch.setattr(runner, "run", fake)
    code, out, _ = run(capsys, "notebooks", "run", "--seed", "3", "--only", "01", "--keep-going", "--fresh")
    assert code == status and seen == [(("smoke", 3, ["01"], True), {"fresh": True})]
    assert "of them our own:" in out and (tmp_path / "claims.md").exists()
    assert ("failed: 01_x" in out) == (status == 1)


def test_notebooks_list_and_refresh(capsys, monkeypatch, tmp_path):
    book = {"cells": [{"cell_type": "markdown", "source": "# 04 The FFN", "metadata": {}}],
            "metadata": {"replicate": {"minutes": {"smoke": 2.5}}}}  # fmt: skip
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "04_ffn.ipynb").write_text(json.dumps(book))
    monkeypatch.setattr(paths, "NOTEBOOKS", folder)
    assert run(capsys, "notebooks", "list")[1] == "04 The FFN (2.5 min)\n"
    monkeypatch.setattr(notebooks, "refresh", lambda only, folder: [f"{only} of {folder.name}"])
    said = "refreshed: ['4'] of notebooks ['4'] of solutions\n"
    assert run(capsys, "notebooks", "refresh", "--only", "4")[1] == said


@pytest.mark.parametrize("name", ["study", "bench", "tokenizer"])
def test_some_commands_have_their_own_arguments(monkeypatch, capsys, name):
    module = importlib.import_module(commands.COMMANDS[name][0])
    monkeypatch.setattr(module, "main", lambda arguments: print(arguments) or 7)
    assert run(capsys, name, "train", "--size", "300") == (7, "['train', '--size', '300']\n", "")


@pytest.mark.parametrize(
    ("problem", "status", "expected"),
    [
        (KeyboardInterrupt(), 130, "to go on"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "/x"),
    ],
)
def test_other_ends_are_one_line(capsys, monkeypatch, problem, status, expected):
    def fail(*args, **kwargs):
        raise problem

    monkeypatch.setattr(runner, "run", fail)
    code, _, err = run(capsys, "notebooks", "run")
    assert code == status and expected in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("steps", "options", "expected"),
    [
        ([], [], "interrupted; nothing was kept, no checkpoint was finished"),
        ([8], [], "interrupted; step 8 is kept; run the same command again to go on"),
        ([8], ["--restart"], "step 8 is kept; run the same command again without --restart to go on"),
    ],
)
def test_an_interrupted_training_says_what_is_kept(capsys, monkeypatch, tmp_path, steps, options, expected):
    def stop(config, run_dir, resume):
        for step in steps:
            checkpoint.save(run_dir, step, {}, {})
        raise KeyboardInterrupt

    monkeypatch.setattr("replicate.study.train_command.Trainer", stop)
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))
    for where in ([], ["--run-dir", str(tmp_path / "here")]):
        code, _, err = run(capsys, "train", *where, *options)
        assert code == 130 and expected in err and err.count("\n") == 1


def test_other_interruptions_promise_nothing(capsys, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("replicate.study.command.run", stop)
    assert "what was finished is kept; run the same command again to go on" in run(capsys, "study", "run")[2]
    assert "again without --fresh to go on" in run(capsys, "study", "run", "--fresh")[2]
    monkeypatch.setattr("replicate.bench.loop.run", stop)
    assert run(capsys, "bench", "train") == (130, "", "replicate: interrupted\n")


@pytest.mark.parametrize("arguments", [["--help"], ["--profile", "gpu"], ["page.md"]])
def test_pages_are_written_only_when_asked(capsys, monkeypatch, arguments):
    monkeypatch.setattr("replicate.report.pages.filled", lambda page: pytest.fail("written"))
    with pytest.raises(SystemExit) as stop:
        commands.main(["pages", *arguments])
    said = capsys.readouterr()
    assert stop.value.code == (0 if arguments == ["--help"] else 2)
    assert "usage: replicate pages" in said.out + said.err


@pytest.mark.parametrize(
    ("problem", "status", "expected"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "figures/claims.csv"), 2, "claims.csv is missing; "),
        (records.RecordDamaged("x.json was altered"), 2, "x.json was altered"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "/x"),
    ],
)
def test_pages_that_cannot_be_written_say_so_in_one_line(capsys, monkeypatch, problem, status, expected):
    def fail(page):
        raise problem

    monkeypatch.setattr("replicate.report.pages.filled", fail)
    code, _, err = run(capsys, "pages")
    assert code == status and err.startswith("replicate: ") and expected in err and err.count("\n") == 1


def test_it_is_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "replicate", "--help"],
        cwd=paths.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    for name in ("train", "bench", "study", "claims", "notebooks", "overlap", "tokenizer"):
        assert name in done.stdout
