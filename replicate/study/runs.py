"""Many runs side by side: look each up among the records, train the missing ones in parallel, store each.

A run that fails costs only itself. What is finished is stored at once, so that an interrupted study
continues where it stopped.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from replicate import data
from replicate.config import TrainConfig
from replicate.settings.text import config_hash
from replicate.study import pool
from replicate.study.estimate import TimeLimit, ask_first
from replicate.study.plans import describe
from replicate.study.progress import StudyProgress
from replicate.study.records import Record, RecordStore, make_record
from replicate.study.worker import claim, run_dir
from replicate.system import locks
from replicate.system.console import say
from replicate.train import Trainer
from replicate.training import checkpoint

LONG = 1000  # steps from which on a run's record is `compact`


class StudyFailed(RuntimeError):
    """Some runs failed; `failures` has each one's error text, by name and hash. The others are stored."""

    def __init__(self, failures: dict[str, str], total: int):
        lines = "\n".join(f"  {name}: {text}" for name, text in failures.items())
        super().__init__(f"{len(failures)} of {total} arms failed; the others are stored\n{lines}")
        self.failures = failures


@dataclass(frozen=True)
class Outcome:
    """What became of runs, by config hash."""

    done: dict[str, tuple[Record, str]] = field(default_factory=dict)  # with origin
    failed: dict[str, str] = field(default_factory=dict)  # with what went wrong
    left: list[str] = field(default_factory=list)  # did not fit into the time, or were not finished in it


def run(
    configs: Sequence[TrainConfig],
    workers: int | None = None,
    store: RecordStore | None = None,
    *,
    names: Mapping[str, str] | None = None,
    **options: Any,
) -> list[tuple[Record, str]]:
    """The records of `configs` in their order, each with its origin: "recorded", "cached" or "fresh".

    Args:
        configs: equal ones are trained once.
        workers: see `pool.count_workers`. store: where to look and to put; by default the project's.
        names: hash -> what a run is called in progress lines, by default as `describe` does.
        options: further ones of `Study`, but for minutes.

    Raises:
        LongWork: before anything is trained.
        StudyFailed: naming the runs that failed, once all others are done and stored.
    """
    by_hash = {config_hash(config): config for config in configs}
    names = {key: describe(config) for key, config in by_hash.items()} | dict(names or {})
    outcome = Study(by_hash, store or RecordStore(), names, workers, **options).finish()
    if outcome.failed:
        failures = {f"{names[key]} ({key})": text for key, text in outcome.failed.items()}
        raise StudyFailed(failures, len(failures) + len(outcome.done))
    return [outcome.done[config_hash(config)] for config in configs]


@dataclass
class Study:
    """Runs to look up or to train side by side.

    Args:
        configs: hash -> configuration. names: hash -> what its run is called.
        workers: processes at a time, see `pool.count_workers`.
        minutes: no run starts that would not end in these, see `estimate.TimeLimit`; what runs on is ended.
        fresh: train even what is stored. keep: write to data/recorded, to be shipped with the project.
        models: hashes of runs whose model is kept. question: put to each model, see `pool.train_all`.
        consent: train also what takes long here, see `estimate.ask_first`.
        label: before progress lines. progress: show it.
        kind: of the records, "train"; another one, "rerun-1", trains runs again beside those that are stored.
    """

    configs: Mapping[str, TrainConfig]
    store: RecordStore
    names: Mapping[str, str]
    workers: int | None = None
    minutes: float | None = None
    fresh: bool = False
    keep: bool = False
    models: Collection[str] = ()
    question: dict[str, int] | None = None
    consent: bool = False
    label: str = ""
    progress: bool = True
    kind: str = "train"

    def finish(self) -> Outcome:
        """Look the runs up, train the missing ones in their order, and store each once it is finished.

        What another process is at is waited for; should that fail or end, it is trained here. Raises
        LongWork, see `estimate.ask_first`.
        """
        self.limit, self.outcome, self.shown = TimeLimit(self.minutes), Outcome(), None
        self.pending = dict(self.configs)
        try:
            while self.pending and not self.limit.over():
                self._take_stored()
                if self.pending:
                    self.shown = self.shown or self._begin()
                    self._train_unclaimed()
        finally:
            if self.shown:
                self.shown.bar.close()
        done = {*self.outcome.done, *self.outcome.failed}
        return replace(self.outcome, left=[key for key in self.configs if key not in done])

    def _take_stored(self) -> None:
        for key, found in self._look_up(self.pending).items():
            self.limit.learn(self.pending.pop(key), found[0], fresh=False)
            self.outcome.done[key] = found
            if self.shown:
                self.shown.finished(key, "another process has trained it")

    def _look_up(self, configs: dict[str, TrainConfig]) -> dict[str, tuple[Record, str]]:
        return {} if self.fresh else look_up(configs, self.store, self.kind)

    def _begin(self) -> StudyProgress:
        count = pool.count_workers(self.pending.values(), self.workers)
        expected = ask_first(self.pending, self.names, count, self.consent)
        return StudyProgress(self.progress, self.label, self.pending, self.names, count, expected)

    def _train_unclaimed(self) -> None:
        """Train what no other process is at; if there is none, wait a second."""
        with ExitStack() as stack:
            claims = {k: lock for k, c in self.pending.items() if (lock := locks.take(claim(c)))}
            for lock in claims.values():
                stack.callback(lock.close)
            there = self._look_up({key: self.pending[key] for key in claims})
            mine = [self.pending[key] for key in claims if key not in there]
            for config in mine:
                if self.fresh or (self.kind != "train" and config.steps in checkpoint.steps(run_dir(config))):
                    checkpoint.clear(run_dir(config))  # a finished model would be taken for the new run
            answers = pool.train_all(
                mine, self.workers, question=self.question, models=self.models,
                admit=self.limit.admits, until=self.limit.until, watch=self.shown.watch,
            )  # fmt: skip
            for config, answer in stack.enter_context(closing(answers)):
                key = config_hash(config)
                del self.pending[key]
                if "skipped" not in answer:
                    self._end(key, config, answer)
                claims[key].close()
        if self.pending and not claims:
            self.shown.wait(self.pending)
            time.sleep(1)

    def _end(self, key: str, config: TrainConfig, answer: dict[str, Any]) -> None:
        """Store a worker's answer, or note why there is no result."""
        try:
            if "error" in answer:
                raise ValueError(answer["error"])
            record = self.put_answer(config, answer)
        except ValueError as error:
            self.outcome.failed[key] = str(error)
            self.shown.finished(key, f"FAILED, {error}")
            return
        self.limit.learn(config, record, fresh=True)
        self.outcome.done[key] = record, "fresh"
        self.shown.finished(key, _summary(record, answer), answer.get("share", (0.0, 1.0))[0])
        if key not in self.models:
            checkpoint.clear(run_dir(config))

    def put_answer(self, config: TrainConfig, answer: dict[str, Any]) -> Record:
        """The training record of a worker's answer, stored; so is its completion's, if one was asked for."""
        results = answer["results"]
        made = {"corpus": results["corpus"], "device": config.device}
        results = compact(results) if config.steps >= LONG else results
        record = make_record(self.kind, config, results, seconds=answer["seconds"], **made)
        self.store.put(record, recorded=self.keep)
        if self.question:
            asked = {"train": record.config_hash, **self.question}
            made["corpus"] = {**made["corpus"]}
            made["corpus"].pop("packages", None)  # the run's has them
            self.store.put(make_record("completion", asked, answer["completion"], **made), recorded=self.keep)
        return record


def _summary(record: Record, answer: dict[str, Any]) -> str:
    results = record.results
    parts = [f"loss {results['final_loss']:.4f}", f"held-out {results['valid_loss']:.4f}"]
    if "completion" in answer:
        parts.append(f"accuracy {answer['completion']['accuracy']:.3f}")
    return ", ".join([*parts, f"{results['tokens_per_s'] / 1000:,.0f}k tokens/s"])


def compact(results: dict[str, Any]) -> dict[str, Any]:
    """A run's results: losses of a step to 5 decimals, statistics to 5 significant digits.

    The columns step, lr and phase are left out: the configuration gives them, see `schedule`.
    """
    steps = {
        "loss": [round(loss, 5) for loss in results["steps"]["loss"]],
        "tokens_per_s": [round(speed) for speed in results["steps"]["tokens_per_s"]],
    }
    return results | {"steps": steps, "stats": _rounded(results["stats"])}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def trained(config: TrainConfig, *, progress: bool = True) -> Trainer:
    """The trainer of a finished run, with model and data: from its checkpoint, else trained now.

    Its losses are those of `run`, one thread included; use it where a notebook needs the model itself.
    Waits for another process that trains the same. Raises LongWork as `run` does.
    """
    threads, key = torch.get_num_threads(), config_hash(config)
    with locks.one_of([claim(config)], waits=lambda: progress and say(locks.WAITS)):
        if config.steps not in checkpoint.steps(run_dir(config)):
            ask_first({key: config}, {key: describe(config)}, 1)
        trainer = Trainer(config, run_dir=run_dir(config), resume="exactly", progress=progress)
        if trainer.step == config.steps:
            return trainer
        try:
            torch.set_num_threads(1 if trainer.device.type == "cpu" else threads)
            trainer.run()
        finally:
            torch.set_num_threads(threads)
    return trainer


def look_up(
    by_hash: Mapping[str, TrainConfig], store: RecordStore, kind: str = "train"
) -> dict[str, tuple[Record, str]]:
    """config hash -> (record, origin) of those configurations that are stored, as records of a kind.

    Cached ones count if they were made from the corpus as it is now, recorded ones always do.
    """
    found = {}
    corpora: dict[str, str] = {}
    for key, config in by_hash.items():
        record = store.find(kind, config)
        if record and record[1] == "cached":
            if config.corpus not in corpora:  # hashing one can take a while
                try:
                    corpora[config.corpus] = data.load_corpus(config.corpus).sha256
                except (ValueError, OSError):
                    corpora[config.corpus] = "unavailable"
            record = store.find(kind, config, corpora[config.corpus])
        if record:
            found[key] = record
    return found
