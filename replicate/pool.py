"""Worker processes that train, each with one thread, so that losses depend neither on the number of cores
nor on what else runs.

A worker reads configurations from its standard input and answers on its standard output, one JSON line
each; nothing is pickled, and the parent's `__main__` is not imported again. A worker that dies costs
the run it was at, which continues from its last checkpoint when it is asked for again. Workers end with
their parent, however that ends. All workers of a computer share its cores: see `locks`.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from replicate import evaluate, locks, paths, records
from replicate.config import TrainConfig
from replicate.config_text import config_hash, from_dict, to_dict
from replicate.data import TokenData
from replicate.train import Trainer

GPU_WORKERS = 1  # runs that share a GPU, which one fills: two or three together train no faster
WORKER = "from replicate.pool import work; work()"
COMPILE_THREADS = 4  # of a worker on a GPU; by default each would start as many processes as there are cores


def train_all(
    configs: Sequence[TrainConfig],
    workers: int | None = None,
    *,
    question: dict[str, int] | None = None,
    models: Collection[str] = (),
    admit: Callable[[TrainConfig], bool] | None = None,
    until: float | None = None,
    watch: Callable[[Mapping[str, Share]], None] | None = None,
) -> Iterator[tuple[TrainConfig, dict[str, Any]]]:
    """Train in parallel; yields (config, answer) as each finishes.

    An answer has `results`, `seconds` and `share`, or `error`, or `skipped`. Leaving the loop early, as an
    interrupt does, ends the processes; what they were at continues from its checkpoint another time.

    Args:
        configs: first come, first served.
        workers: processes; by default one a core, on GPUs GPU_WORKERS each.
        question: put to each finished model, see `ask`; `completion` in the answer is its reply.
        models: hashes of configurations whose finished model is kept, in `run_dir`. Of others there may be
            a checkpoint, to be removed once the answer is safe.
        admit: asked before a run starts, from several threads; where it says no, the run is skipped.
        until: when `time.monotonic()` passes this, the runs at work are ended and nothing more is yielded.
        watch: called twice a second with what is at work: hash -> Share.

    Raises ValueError for fewer than one process.
    """
    count = count_workers(configs, workers)
    gpu = on_gpu(configs)
    waiting: collections.deque[TrainConfig] = collections.deque(configs)
    answers: queue.Queue[tuple[TrainConfig, dict[str, Any]]] = queue.Queue()
    slots = [f"worker-{i}" for i in range(count)]
    hands = [
        _Hand(waiting, answers, environment(i, gpu), question, models, admit, slots)
        for i in range(min(count, len(configs)))
    ]

    def tick() -> None:
        if watch:
            there = [(hand.config, hand.share) for hand in hands]
            watch({config_hash(config): share for config, share in there if config})

    try:
        for hand in hands:
            hand.start()
        for _ in configs:
            answer = _next(answers, until, tick)
            if answer is None:
                return
            yield answer
    finally:
        waiting.clear()
        for hand in hands:
            hand.stop()


Share = tuple[float, float, float]  # of a run's steps: done when a worker began, done now; its seconds at it


def count_workers(configs: Sequence[TrainConfig], workers: int | None = None) -> int:
    """Processes that train these: `workers`, by default one a core, on GPUs GPU_WORKERS each."""
    if workers is not None:
        check_workers(workers)
    return workers or (GPU_WORKERS * torch.cuda.device_count() if on_gpu(configs) else _cores())


def on_gpu(configs: Sequence[TrainConfig]) -> bool:
    """True if one of these will train on a GPU."""
    return torch.cuda.is_available() and any(config.device != "cpu" for config in configs)


def check_workers(workers: int) -> None:
    """Raise ValueError for fewer than one process."""
    if workers < 1:
        raise ValueError(f"workers is {workers}; choose 1 or more")


def run_dir(config: TrainConfig, threads: int = 1) -> Path:
    """Folder of a run's checkpoints; other settings, other code or other threads give another folder."""
    name = f"{config_hash(config)}-{records.code_fingerprint()}" + (f"-{threads}" if threads > 1 else "")
    return paths.runs_dir() / "train" / name


def claim(config: TrainConfig) -> str:
    """Name of the claim on a run's folder, see `locks`."""
    return f"run-{run_dir(config).name}"


def ask(trainer: Trainer, question: dict[str, int]) -> dict[str, Any]:
    """How a trained model does on a completion task: `evaluate.completion`'s reply, `correct` as "0110...".

    `question` holds arguments of `evaluate.completion_task`, see `evaluate.question`.
    """
    task = evaluate.completion_task(trainer.data, **question)
    with trainer.autocast():
        reply = evaluate.completion(trainer.model, task, 256 if trainer.device.type == "cuda" else 32)
    return reply | {"correct": "".join(map(str, reply["correct"]))}


def work() -> None:
    """Be a worker: train what arrives on stdin until it closes."""
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a stray print must not mix with the answers
    requests: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    while (line := requests.get()) is not None:
        request = json.loads(line)

        def say(answer: dict[str, Any]) -> None:
            out.write(json.dumps(answer) + "\n")
            out.flush()

        say(_train_one(from_dict(request["config"]), request["question"], keep=request["keep"], say=say))


def _read_requests(requests: queue.Queue[str | None]) -> None:
    for line in sys.stdin:
        requests.put(line)
    requests.put(None)
    time.sleep(2)
    os._exit(1)  # still training, for a parent that is gone


def _train_one(
    config: TrainConfig,
    question: dict[str, int] | None = None,
    *,
    keep: bool = False,
    say: Callable[[dict[str, Any]], None] = lambda answer: None,
) -> dict[str, Any]:
    """The answer of `train_all` for one run; `say` takes {"share": ...} about once a second."""
    start, last, began = time.perf_counter(), 0.0, 0.0

    def note(step: int, trainer: Trainer) -> None:
        nonlocal last
        if (now := time.perf_counter()) - last >= 1 or step == config.steps:
            last = now
            say({"share": [began, step / config.steps, now - start]})

    try:
        data = tokens(config.corpus, config.model.vocab_size, config.model.seq_len, paths.runs_dir())
        trainer = Trainer(
            config,
            run_dir=run_dir(config),
            resume="exactly",
            keep=keep,
            progress=False,
            callback=note,
            data=data,
        )
        began, earlier = trainer.step / config.steps, trainer.seconds
        trainer.run()
        answer = {"results": trainer.result()}
        if question:
            answer["completion"] = ask(trainer, question)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return answer | {"seconds": earlier + time.perf_counter() - start}


@functools.lru_cache(maxsize=2)
def tokens(corpus: str, vocab_size: int, seq_len: int, runs: Path) -> TokenData:
    """A corpus as `Trainer` opens it, once a process: many thousand files take seconds to hash."""
    return TokenData(corpus, vocab_size, seq_len, runs / "corpus")


class _Hand(threading.Thread):
    """Feeds one worker process, and starts another if it dies."""

    def __init__(
        self,
        waiting: collections.deque,
        answers: queue.Queue,
        environment: dict[str, str],
        question: dict[str, int] | None,
        models: Collection[str],
        admit: Callable[[TrainConfig], bool] | None,
        slots: Sequence[str],
    ):
        super().__init__(daemon=True)
        self.waiting, self.answers, self.environment = waiting, answers, environment
        self.question, self.models, self.admit, self.slots = question, models, admit, slots
        self.config: TrainConfig | None = None  # that it is at
        self.share: Share = (0.0, 0.0, 0.0)
        self.process: subprocess.Popen | None = None
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process it logs

    def run(self) -> None:
        """Take runs from the list until it is empty, each when a core is free."""
        while self.waiting:
            with locks.one_of(self.slots, wanted=lambda: bool(self.waiting)):
                try:
                    config = self.waiting.popleft()
                except IndexError:
                    return
                admitted = self.admit is None or self.admit(config)
                answer = self._ask(config) if admitted else {"skipped": True}
                self.config = None
                self.answers.put((config, answer))

    def stop(self) -> None:
        """End the process: at once if it is at work, else by closing its input."""
        if self.process is None:
            return
        if self.is_alive():
            self.process.kill()
        try:
            self.process.stdin.close()
            self.process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()

    def _ask(self, config: TrainConfig) -> dict[str, Any]:
        try:
            if self.process is None:
                self.process = _spawn(self.environment, self.log)
            self.config, self.share = config, (0.0, 0.0, 0.0)
            keep = config_hash(config) in self.models
            request = {"config": to_dict(config), "question": self.question, "keep": keep}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            while "share" in (answer := json.loads(self.process.stdout.readline())):
                self.share = tuple(answer["share"])
            return answer | {"share": self.share}
        except (OSError, ValueError):  # a broken pipe, or no whole line: the process died
            return {"error": f"its process ended {self._post_mortem()}"}

    def _post_mortem(self) -> str:
        process, self.process = self.process, None
        try:
            status = process.wait(timeout=10) if process else "before it began"
        except subprocess.TimeoutExpired:
            process.kill()
            status = "late"
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f"(status {status}){': ' + lines[-1] if lines else ''}"


def _spawn(environment: dict[str, str], log: Any) -> subprocess.Popen:
    # In a session of its own: Ctrl-C in the terminal reaches the parent only, which ends its workers.
    return subprocess.Popen(
        [sys.executable, "-c", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        text=True,
        start_new_session=True,
    )


def environment(index: int, gpu: bool) -> dict[str, str]:
    """The parent's environment, with one thread, this package importable, and one GPU of several.

    With PYTHONSAFEPATH a file in the current folder, `queue.py` say, is not taken for a module, neither by
    a worker nor by the processes that it starts.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(filter(None, [str(paths.ROOT), *given]))  # an empty entry is the current folder
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {**os.environ, **threads, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    if gpu:
        count = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index % count]
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(COMPILE_THREADS))
    return environment


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _next(answers: queue.Queue, until: float | None = None, tick: Callable[[], None] = lambda: None) -> Any:
    """The next answer; None once `time.monotonic()` passes `until`. `tick` is called while waiting."""
    while True:  # waking now and then lets Ctrl-C through on Windows
        try:
            return answers.get(timeout=0.5)
        except queue.Empty:
            tick()
            if until is not None and time.monotonic() > until:
                return None
