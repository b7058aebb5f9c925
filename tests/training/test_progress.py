"""Progress in a notebook: what is shown, stored and compared; and how an interrupted cell ends."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbclient
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from replicate.config import ModelConfig, TrainConfig
from replicate.report import notebooks
from replicate.settings.text import to_dict
from replicate.study.records import RecordStore
from replicate.system import paths

HERE = Path(__file__).parent.parent
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


CODE = """
import json, sys
from replicate import study
from replicate.settings.text import from_dict
from replicate.training.interrupts import quiet_interrupts
quiet_interrupts()
configs = [from_dict(c) for c in json.loads({configs!r})]
"""
STUDY = 'print("before")\nfound = study.run(configs, workers=1, label="00", consent=True)\nprint("after")'


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Kernels import this package, write to a folder of their own and have no GPU."""
    path = os.pathsep.join(filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")]))
    changes = {"PYTHONPATH": path, "REPLICATE_RUNS": str(tmp_path / "runs"), "CUDA_VISIBLE_DEVICES": ""}
    for name, value in {**notebooks.KERNEL_ENV, **changes}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("REPLICATE_LONG")
    return tmp_path


def setup(*configs):
    return CODE.format(configs=json.dumps([to_dict(config) for config in configs]))


def test_a_notebook_shows_progress_that_is_not_stored_and_not_compared(environment):
    """Real kernels: nbclient runs and cleans a notebook, nbval compares it with a run that trains again."""
    training = "trainer = study.trained(configs[1])\nprint(trainer.step)"
    two = setup(RUN, replace(RUN, seed=2))
    book = new_notebook(cells=[new_code_cell(text) for text in (two, STUDY, training)])
    nbclient.NotebookClient(book, kernel_name="python3", timeout=120).execute()
    _, ran, trained = book.cells
    shown = ["".join(o.text for o in cell.outputs if o.name == "stderr") for cell in (ran, trained)]
    assert "00 2/2 dense seed 2: loss " in shown[0] and "step 8/8, loss " in shown[1]
    notebooks.clean(book)
    assert [[o.text for o in cell.outputs] for cell in book.cells] == [[], ["before\nafter\n"], ["8\n"]]
    file = environment / "book.ipynb"
    nbformat.write(book, file)
    assert _compare(file, environment / "other") == 0
    ran.outputs[0].text = "before\nafterwards\n"
    nbformat.write(book, file)
    assert _compare(file, environment / "third") == 1


def _compare(file, runs):
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(HERE / "nbval.ini"), "-p", "nbval.plugin"]
    command += [
        "-p",
        "nbval_by_tokens",
        "-p",
        "no:cacheprovider",
        "--nbval",
        "--nbval-current-env",
        str(file),
    ]
    path = os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]])
    changes = {"PYTHONPATH": path, "REPLICATE_RUNS": str(runs), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, env=os.environ | changes, capture_output=True, check=False).returncode


@pytest.fixture
def kernel(environment):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run_cell(client, code, until=None, then=None):
    """(status, messages) of a cell; `then` is called when a message's text contains `until`."""
    messages, asked = [], client.execute(code)
    while True:
        message = client.get_iopub_msg(timeout=120)
        if message["parent_header"].get("msg_id") != asked:
            continue
        messages.append((message["msg_type"], message["content"]))
        if until and until in message["content"].get("text", ""):
            then()
            until = None
        if message["content"].get("execution_state") == "idle":
            break
    while (reply := client.get_shell_msg(timeout=60))["parent_header"]["msg_id"] != asked:
        pass
    return reply["content"]["status"], messages


@pytest.mark.skipif(os.name != "posix", reason="looks for processes")
def test_an_interrupted_cell_says_in_one_line_how_to_go_on(environment, kernel):
    manager, client = kernel
    assert run_cell(client, setup(RUN, LONG))[0] == "ok"
    status, messages = run_cell(client, STUDY, "1/2 dense seed 1", manager.interrupt_kernel)
    assert status == "error"  # cells after it do not run
    assert not [content for kind, content in messages if kind == "error"]
    said = "".join(content["text"] for kind, content in messages if content.get("name") == "stdout")
    assert said == "before\nInterrupted. Run the cell again: it continues where it stopped.\n"
    store = RecordStore(environment / "runs" / "records", environment / "none")
    assert [record.config["steps"] for record, _ in store.all("train")] == [RUN.steps]
    workers = _workers_of(manager.provisioner.pid)
    end = time.monotonic() + 10
    while workers and time.monotonic() < end:
        time.sleep(0.1)
        workers = _workers_of(manager.provisioner.pid)
    assert workers == []
    again = "configs = configs[:1]\n" + STUDY
    status, messages = run_cell(client, again)
    assert status == "ok" and not [content for _, content in messages if content.get("name") == "stderr"]


def _workers_of(pid):
    """Process ids of the children of `pid` that train."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            found += [child] if b"replicate.study.pool" in command else []
    return found


def test_long_work_is_one_line_in_a_notebook(environment, kernel):
    _, client = kernel
    code = "from replicate import study\nstudy.run(study.arms('gpu', ['dense'], [99]))"
    status, messages = run_cell(client, code)
    (error,) = [content for kind, content in messages if kind == "error"]
    assert status == "error" and error["ename"] == "LongWork"
    (line,) = error["traceback"]
    assert line.startswith("LongWork: 1 run is missing (dense)") and "\n" not in line
