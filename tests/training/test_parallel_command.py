"""torchrun starts `python -m replicate train` in two processes: what is printed, once; restarts; Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from replicate.settings.presets import train_preset
from replicate.system.console import changes
from replicate.train import train

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="sends signals"),
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
    ),
]
SETTINGS = (
    *("corpus=synthetic", "model.vocab_size=32", "model.n_layer=1", "model.d_model=32", "model.d_ff=128"),
    *("model.n_head=2", "model.seq_len=16", "steps=14", "lr_warmup=2", "dense_warmup=4", "stats_every=0"),
    *("checkpoint_every=4", "device=cpu", "log_every=1", "model.sparsity.n_clusters=4"),
)
# Runs the command, and in the process of rank 1 what the test puts in, as a callback.
SCRIPT = """
    import os, sys, time
    from pathlib import Path
    from replicate import __main__, train

    class Trainer(train.Trainer):
        def _train_step(self):
            super()._train_step()
            {inside}

    from replicate.study import train_command
    train_command.Trainer = Trainer
    sys.exit(__main__.main(["train", *sys.argv[1:]]))
"""


def torchrun(folder, inside, *arguments, restarts=0, **variables):
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("{inside}", inside))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), str(script), "--sparsity", "recipe", *arguments]
    environment = os.environ | {"REPLICATE_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def one_process(folder, monkeypatch):
    monkeypatch.setenv("REPLICATE_RUNS", str(folder / "alone"))
    return train(train_preset("smoke", "recipe", **changes(SETTINGS)), progress=False)


def test_a_job_that_torchrun_restarts_continues(tmp_path, monkeypatch):
    dies = (
        "if self.step == 10 and self.group.rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':"
        " os._exit(3)"
    )
    file = tmp_path / "result.json"
    options = ("--json", str(file), "--restart", "--set", *SETTINGS, "parallel=fsdp")
    started = torchrun(tmp_path, dies, *options, restarts=1, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    out, err = started.communicate(timeout=200)
    assert out.count("train loss") == 1 and out.count("the model is kept in") == 1, err
    first = [line for line in err.splitlines() if line.startswith("train: ")]
    assert len(first) == 2 and all("2 processes, fsdp" in line for line in first), err
    assert first[1].endswith("continues after step 8"), "--restart is of the first start alone"
    result, expected = json.loads(file.read_text()), one_process(tmp_path, monkeypatch)
    assert result["steps"]["loss"] == pytest.approx(expected["steps"]["loss"], rel=1e-4)
    assert result["parallel"] == {"processes": 2, "engine": "fsdp"}


def test_a_restart_that_would_meet_dead_processes_is_refused(tmp_path):
    _, err = torchrun(tmp_path, "pass", "--set", *SETTINGS, restarts=1).communicate(timeout=100)
    said = {line for line in err.splitlines() if line.startswith("replicate: ")}
    assert len(said) == 1 and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said.pop(), err


def test_ctrl_c_ends_all_with_a_checkpoint(tmp_path):
    mark = tmp_path / "step-5"
    slow = f"(time.sleep(0.05), Path({str(mark)!r}).touch() if self.step == 5 else None)"
    process = torchrun(tmp_path, slow, "--set", *SETTINGS, "steps=2000", "checkpoint_every=1999")
    until = time.monotonic() + 100
    while not mark.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    said = [line for line in err.splitlines() if line.startswith("replicate: ")]
    assert len(said) == 1 and "is kept; run the same command again" in said[0], err
    (kept,) = (tmp_path / "runs" / "train").glob("*/step-*.json")
    assert 5 <= int(kept.stem.removeprefix("step-")) < 1999


def test_what_cannot_be_shared_out_is_said_once(tmp_path):
    process = torchrun(tmp_path, "pass", "--set", *SETTINGS, "batch_size=5")
    _, err = process.communicate(timeout=100)
    said = [line for line in err.splitlines() if line.startswith("replicate: ")]
    assert len(said) == 1 and "batch_size is 5" in said[0] and "batch_size=4" in said[0], err
    assert process.returncode
