"""One run in a process of its own: what a worker of the pool does, and where it keeps checkpoints."""

import functools
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from replicate.config import TrainConfig
from replicate.data import TokenData
from replicate.settings.text import config_hash, from_dict
from replicate.study import completion
from replicate.system import paths, provenance
from replicate.train import Trainer


def run_dir(config: TrainConfig, threads: int = 1) -> Path:
    """Folder of a run's checkpoints; other settings, other code or other threads give another folder."""
    name = f"{config_hash(config)}-{provenance.code_fingerprint()}" + (f"-{threads}" if threads > 1 else "")
    return paths.runs_dir() / "train" / name


def claim(config: TrainConfig) -> str:
    """Name of the claim on a run's folder, see `locks`."""
    return f"run-{run_dir(config).name}"


def ask(trainer: Trainer, question: dict[str, int]) -> dict[str, Any]:
    """`completion.completion` of a trained model on one of `completion.QUESTIONS`; `correct` is "0110..."."""
    task = completion.completion_task(trainer.data, **question)
    with trainer.autocast():
        reply = completion.completion(trainer.model, task, 256 if trainer.device.type == "cuda" else 32)
    return reply | {"correct": "".join(map(str, reply["correct"]))}


def work() -> None:
    """Be a worker: train what arrives on stdin until it closes."""
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a stray print must not mix with the answers
    requests: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    while (line := requests.get()) is not None:
        request = json.loads(line)
        say(train_one(from_dict(request["config"]), request["question"], keep=request["keep"], say=say))


def _read_requests(requests: queue.Queue[str | None]) -> None:
    for line in sys.stdin:
        requests.put(line)
    requests.put(None)
    time.sleep(2)
    os._exit(1)  # still training, for a parent that is gone


def train_one(
    config: TrainConfig,
    question: dict[str, int] | None = None,
    *,
    keep: bool = False,
    say: Callable[[dict[str, Any]], None] = lambda answer: None,
) -> dict[str, Any]:
    """The answer of `pool.train_all` for one run; `say` takes {"share": ...} about once a second."""
    start, last, began = time.perf_counter(), 0.0, 0.0

    def note(step: int, trainer: Trainer) -> None:
        nonlocal last
        if (now := time.perf_counter()) - last >= 1 or step == config.steps:
            last = now
            say({"share": [began, step / config.steps]})

    options = {"run_dir": run_dir(config), "resume": "exactly", "keep": keep, "progress": False}
    try:
        data = _tokens(config.corpus, config.model.vocab_size, config.model.seq_len, paths.runs_dir())
        trainer = Trainer(config, **options, callback=note, data=data)
        began, earlier = trainer.step / config.steps, trainer.seconds
        trainer.run()
        answer = {"results": trainer.result()}
        if question:
            answer["completion"] = ask(trainer, question)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return answer | {"seconds": earlier + time.perf_counter() - start}


@functools.lru_cache(maxsize=2)
def _tokens(corpus: str, vocab_size: int, seq_len: int, runs: Path) -> TokenData:
    """A corpus as `Trainer` opens it, once a process: many thousand files take seconds to hash."""
    return TokenData(corpus, vocab_size, seq_len, runs / "corpus")
