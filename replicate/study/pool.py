"""Worker processes that train, each with one thread, so that losses depend neither on the number of cores
nor on what else runs.

A worker (`worker.py`) reads requests from its standard input and answers on its standard output, one JSON
line each; nothing is pickled, and the parent's `__main__` is not imported again. A worker that dies costs
the run it was at, which continues from its last checkpoint when it is asked for again. Workers end with
their parent, however that ends. All workers of a computer share its cores: see `locks`.
"""

import collections
import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from replicate.config import TrainConfig
from replicate.settings.text import config_hash, to_dict
from replicate.system import locks, paths

GPU_WORKERS = 1  # runs that share a GPU, which one fills: two or three together train no faster
WORKER = "from replicate.study.worker import work; work()"
COMPILE_THREADS = 4  # of a worker on a GPU; by default each would start as many processes as there are cores

Share = tuple[float, float]  # of a run's steps: done when a worker began, done now


def train_all(
    configs: Sequence[TrainConfig],
    workers: int | None = None,
    *,
    question: dict[str, int] | None = None,
    models: Collection[str] = (),
    admit: Callable[[TrainConfig], bool] = lambda config: True,
    until: float = math.inf,
    watch: Callable[[Mapping[str, Share]], None] = lambda at_work: None,
) -> Iterator[tuple[TrainConfig, dict[str, Any]]]:
    """Train in parallel, first come, first served; yields (config, answer) as each finishes.

    An answer has `results`, `seconds` and `share`, or `error`, or `skipped`. Leaving the loop early, as an
    interrupt does, ends the processes; what they were at continues from its checkpoint another time.

    Args:
        workers: see `count_workers`.
        question: put to each finished model, see `worker.ask`; `completion` in the answer is its reply.
        models: hashes of configurations whose finished model is kept, in `worker.run_dir`. Of others there
            may be a checkpoint, to be removed once the answer is safe.
        admit: asked before a run starts, from several threads; where it says no, the run is skipped.
        until: when `time.monotonic()` passes this, the runs at work are ended and nothing more is yielded.
        watch: called twice a second with what is at work: hash -> Share.
    """
    count, gpu = count_workers(configs, workers), on_gpu(configs)
    requests = (
        {"config": to_dict(c), "question": question, "keep": config_hash(c) in models} for c in configs
    )
    waiting: collections.deque[Request] = collections.deque(zip(configs, requests))
    answers: queue.Queue[tuple[TrainConfig, dict[str, Any]]] = queue.Queue()
    threads = [
        Worker(waiting, answers, slots(i, count, gpu), admit, environment(i, gpu))
        for i in range(min(count, len(configs)))
    ]

    def tick() -> None:
        there = [(thread.config, thread.share) for thread in threads]
        watch({config_hash(config): share for config, share in there if config})

    try:
        for thread in threads:
            thread.start()
        for _ in configs:
            answer = _next(answers, until, tick)
            if answer is None:
                return
            yield answer
    finally:
        waiting.clear()
        for thread in threads:
            thread.stop()


def count_workers(configs: Iterable[TrainConfig], workers: int | None = None) -> int:
    """Processes that train these: `workers`, by default one a core, on GPUs GPU_WORKERS each.

    Raises ValueError for fewer than one.
    """
    if workers is not None:
        check_workers(workers)
    return workers or (GPU_WORKERS * torch.cuda.device_count() if on_gpu(configs) else _cores())


def on_gpu(configs: Iterable[TrainConfig]) -> bool:
    """True if one of these will train on a GPU."""
    return torch.cuda.is_available() and any(config.device != "cpu" for config in configs)


def check_workers(workers: int) -> None:
    """Refuse fewer than one process."""
    if workers < 1:
        raise ValueError(f"workers is {workers}; choose 1 or more")


Request = tuple[TrainConfig, dict[str, Any]]  # and what a worker process is sent


class Worker(threading.Thread):
    """Feeds one worker process, and starts another if it dies.

    Args:
        waiting: requests, which all workers share. answers: where to put (config, answer).
        slots: names of the claims on cores, of which a run needs one. environment: of the process.
    """

    def __init__(
        self,
        waiting: collections.deque[Request],
        answers: queue.Queue,
        slots: Sequence[str],
        admit: Callable[[TrainConfig], bool],
        environment: dict[str, str],
    ):
        super().__init__(daemon=True)
        self.waiting, self.answers, self.slots = waiting, answers, slots
        self.admit, self.environment = admit, environment
        self.config: TrainConfig | None = None  # that it is at
        self.share: Share = (0.0, 0.0)
        self.process: subprocess.Popen | None = None
        self.stopped, self.lock = False, threading.Lock()  # of `stopped` and of starting a process
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process it logs

    def run(self) -> None:
        """Take runs from the list until it is empty, each when a core is free."""
        while self.waiting:
            with locks.one_of(self.slots, wanted=lambda: bool(self.waiting)):
                try:
                    config, request = self.waiting.popleft()
                except IndexError:
                    return
                answer = self._train(config, request) if self.admit(config) else {"skipped": True}
                self.config = None
                self.answers.put((config, answer))

    def stop(self) -> None:
        """End the process, at once if it is at work, else by closing its input; none starts after that."""
        with self.lock:
            self.stopped = True
        if self.is_alive():
            if process := self.process:
                process.kill()
            self.join(timeout=10)
        if self.is_alive():
            return
        if self.process:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            self._post_mortem()
        self.log.close()

    def _train(self, config: TrainConfig, request: dict[str, Any]) -> dict[str, Any]:
        try:
            with self.lock:
                if self.stopped:
                    raise OSError
                self.process = self.process or self._spawn()
            self.share, self.config = (0.0, 0.0), config
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            while "share" in (answer := json.loads(self.process.stdout.readline())):
                self.share = tuple(answer["share"])
            return answer | {"share": self.share}
        except (OSError, ValueError):  # a broken pipe, or no whole line: the process died
            return {"error": f"its process ended {self._post_mortem()}"}

    def _spawn(self) -> subprocess.Popen:
        # Apart from the terminal: Ctrl-C in the terminal reaches the parent only, which ends its workers.
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        command = [sys.executable, "-c", WORKER]
        return subprocess.Popen(command, **pipes, env=self.environment, text=True, start_new_session=True)

    def _post_mortem(self) -> str:
        process, self.process = self.process, None
        try:
            status = process.wait(timeout=10) if process else "before it began"
        except subprocess.TimeoutExpired:
            process.kill()
            status = "late"
        for stream in (process.stdin, process.stdout) if process else ():
            with contextlib.suppress(OSError):
                stream.close()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f"(status {status}){': ' + lines[-1] if lines else ''}"


def slots(index: int, count: int, gpu: bool) -> list[str]:
    """Names of the claims of which worker `index` of `count` takes one to train.

    On CPUs all workers of a computer share its cores; on GPUs those of a GPU, by its number or name.
    """
    if not gpu:
        return [f"worker-{i}" for i in range(count)]
    gpus = _visible()
    place = index % len(gpus)
    return [f"worker-gpu-{gpus[place]}-{i}" for i in range(len(range(place, count, len(gpus))))]


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
        gpus = _visible()
        environment["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(COMPILE_THREADS))
    return environment


def _visible() -> list[str]:
    """Numbers or names of the GPUs that this process may use."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [name.strip() for name in visible.split(",")][:count]


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _next(answers: queue.Queue, until: float, tick: Callable[[], None]) -> Any:
    """The next answer; None once `time.monotonic()` passes `until`. `tick` is called while waiting."""
    while True:  # waking now and then lets Ctrl-C through on Windows
        try:
            return answers.get(timeout=0.5)
        except queue.Empty:
            tick()
            if time.monotonic() > until:
                return None
