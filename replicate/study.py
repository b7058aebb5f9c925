"""Many runs side by side: look each up among the records, train the missing ones in parallel.

A run that fails costs only itself. What is finished is stored at once, so that an interrupted study
continues where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch

from replicate import checkpoint, data, locks, pool, records
from replicate.config import TrainConfig
from replicate.config_text import config_hash, same_formats
from replicate.estimate import LongWork, ask_first
from replicate.pool import run_dir
from replicate.presets import PRESET_OF, SPARSITY_PRESETS, preset_of, train_preset
from replicate.progress import Display, StudyProgress
from replicate.records import Record, RecordStore
from replicate.train import Trainer

__all__ = ["PRESET_OF", "LongWork"]
LONG = 1000  # steps from which on a run's record is `compact`


class StudyFailed(RuntimeError):
    """Some arms failed; the message names each with its error. The others are stored.

    failures: arm's name (and hash) to error text. done: {config hash: (record, origin)} of the others.
    """

    def __init__(self, failures: dict[str, str], done: dict[str, tuple[Record, str]]):
        lines = "\n".join(f"  {name}: {text}" for name, text in failures.items())
        total = len(failures) + len(done)
        super().__init__(f"{len(failures)} of {total} arms failed; the others are stored\n{lines}")
        self.failures, self.done = failures, done


def arms(
    profile: str, sparsity: Iterable[str], seeds: Iterable[int] = (1,), **changes: Any
) -> list[TrainConfig]:
    """Configurations of every sparsity preset with every seed, seeds outermost.

    Args:
        profile: a scale of PRESET_OF, or the name of a training preset.
        sparsity: names of sparsity presets. seeds: of the runs.
        changes: fields to change in each, as in `train_preset`: steps=50.
    """
    preset, names = preset_of(profile), list(sparsity)
    return [train_preset(preset, name, **{**changes, "seed": seed}) for seed in seeds for name in names]


def describe(config: TrainConfig) -> str:
    """A short name of an arm: sparsity preset, seed, and the share of sparse steps if not all."""
    sparsity = config.model.sparsity
    alike = (name for name, preset in SPARSITY_PRESETS.items() if same_formats(preset, sparsity))
    name = next(alike, "own sparsity")
    share = f" {config.order} {config.sparse_share:.0%}" if sparsity.any and config.sparse_share < 1 else ""
    activation = "" if config.model.activation == "relu2" else f" {config.model.activation}"
    return f"{name}{activation}{share} seed {config.seed}"


def run(
    configs: Sequence[TrainConfig],
    workers: int | None = None,
    store: RecordStore | None = None,
    *,
    names: Mapping[str, str] | None = None,
    consent: bool = False,
    **options: Any,
) -> list[tuple[Record, str]]:
    """The records of `configs` in their order, each with its origin: "recorded", "cached" or "fresh".

    Args:
        configs: equal ones are trained once.
        workers: processes at a time; by default one a core, on GPUs one each.
        store: where to look and to put; by default the project's.
        names: hash -> what a run is called in progress lines, by default as `describe` does.
        consent: train also what takes long here, see `estimate.ask_first`.
        options: further ones of `finish`.

    Raises:
        LongWork: before anything is trained.
        StudyFailed: naming the arms that failed, once all others are done and stored.
    """
    by_hash = {config_hash(config): config for config in configs}
    names = {key: describe(config) for key, config in by_hash.items()} | dict(names or {})
    done, failures = {}, {}
    settings = {"names": names, "workers": workers, "consent": consent, **options}
    with closing(finish(by_hash, store or RecordStore(), **settings)) as ended:
        for key, record, said in ended:
            if record:
                done[key] = record, said
            else:
                failures[f"{names[key]} ({key})"] = said
    if failures:
        raise StudyFailed(failures, done)
    return [done[config_hash(config)] for config in configs]


def finish(
    configs: Mapping[str, TrainConfig],
    store: RecordStore,
    *,
    names: Mapping[str, str],
    workers: int | None = None,
    fresh: bool = False,
    keep: bool = False,
    models: Collection[str] = (),
    question: dict[str, int] | None = None,
    admit: Callable[[TrainConfig], bool] | None = None,
    until: float | None = None,
    consent: bool = False,
    label: str = "",
    progress: bool = True,
) -> Iterator[tuple[str, Record | None, str]]:
    """Look runs up, train the missing ones side by side and store each: yields (hash, record, origin).

    A run that failed is yielded as (hash, None, error). What another process is at is waited for; should
    that fail or end, it is trained here.

    Args:
        configs: hash -> configuration. names: hash -> what its run is called.
        fresh: train even what is stored. keep: write to data/recorded, to be shipped with the project.
        models, question, admit, until: as for `pool.train_all`; skipped runs are not yielded.
        consent: see `estimate.ask_first`. label: of the study, before its progress lines.
        progress: show it.
    """
    pending, shown = dict(configs), None
    while pending and (until is None or time.monotonic() < until):
        for key, (record, origin) in ({} if fresh else look_up(pending, store)).items():
            del pending[key]
            if shown:
                shown.finished(key, "another process has trained it")
            yield key, record, origin
        if pending and not shown:
            count = pool.count_workers(list(pending.values()), workers)
            expected = ask_first(pending, names, count, consent)
            shown = StudyProgress(progress, label, pending, names, count, expected)
        with ExitStack() as stack:
            claims = {k: lock for k, config in pending.items() if (lock := locks.take(pool.claim(config)))}
            for lock in claims.values():
                stack.callback(lock.close)
            there = {} if fresh else look_up({key: pending[key] for key in claims}, store)
            mine = [pending[key] for key in claims if key not in there]
            for config in mine if fresh else ():
                checkpoint.clear(run_dir(config))
            options = {"question": question, "models": models, "admit": admit, "until": until}
            watch = shown.watch if mine else None
            answers = stack.enter_context(closing(pool.train_all(mine, workers, watch=watch, **options)))
            for config, answer in answers:
                key = config_hash(config)
                del pending[key]
                if "skipped" not in answer:
                    record, said = _stored(store, config, answer, keep, question)
                    text = _summary(record, answer) if record else f"FAILED, {said}"
                    shown.finished(key, text, answer.get("share"))
                    if record and key not in models:
                        checkpoint.clear(run_dir(config))
                    yield key, record, said
                claims[key].close()
        if pending and not claims:
            shown.wait(pending)
            time.sleep(1)


def _stored(
    store: RecordStore, config: TrainConfig, answer: dict[str, Any], keep: bool, question: dict | None
) -> tuple[Record | None, str]:
    """The record of an answer, once stored, and "fresh"; or None and what went wrong."""
    if "error" in answer:
        return None, answer["error"]
    try:
        return put_answer(store, config, answer, keep=keep, question=question), "fresh"
    except ValueError as refused:
        return None, str(refused)


def _summary(record: Record, answer: dict[str, Any]) -> str:
    results = record.results
    parts = [f"loss {results['final_loss']:.4f}", f"held-out {results['valid_loss']:.4f}"]
    if "completion" in answer:
        parts.append(f"accuracy {answer['completion']['accuracy']:.3f}")
    return ", ".join([*parts, f"{results['tokens_per_s'] / 1000:,.0f}k tokens/s"])


def put_answer(
    store: RecordStore,
    config: TrainConfig,
    answer: dict[str, Any],
    *,
    keep: bool = False,
    question: dict[str, int] | None = None,
) -> Record:
    """Store what a worker of `pool.train_all` answered, as a training record and, if asked, a completion's.

    Args:
        keep: write to data/recorded. question: the one put, if any.

    Returns:
        The training record.
    """
    results, corpus = answer["results"], answer["results"]["corpus"]
    results = compact(results) if config.steps >= LONG else results
    made = {"corpus": corpus, "device": config.device}
    record = records.make_record("train", config, results, seconds=answer["seconds"], **made)
    store.put(record, recorded=keep)
    if question:
        asked = {"train": record.config_hash, **question}
        reply = records.make_record("completion", asked, answer["completion"], **made)
        store.put(reply, recorded=keep)
    return record


def compact(results: dict[str, Any]) -> dict[str, Any]:
    """A run's results in fewer digits: losses of a step to 5 decimals, statistics to 5 significant digits.

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
    with locks.one_of([pool.claim(config)], waits=lambda: Display(progress).line(locks.WAITS)):
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


def look_up(by_hash: dict[str, TrainConfig], store: RecordStore) -> dict[str, tuple[Record, str]]:
    """config hash -> (record, origin) of those configurations that are stored.

    Cached ones count if they were made from the corpus as it is now, recorded ones always do.
    """
    found = {}
    corpora: dict[str, str | None] = {}
    for key, config in by_hash.items():
        record = store.find("train", config)
        if record is None or record[1] == "recorded":
            found |= {key: record} if record else {}
            continue
        if config.corpus not in corpora:  # hashing one can take a while
            try:
                corpora[config.corpus] = data.load_corpus(config.corpus).sha256
            except (ValueError, OSError):
                corpora[config.corpus] = None  # not to be had here; a recorded result still counts
        record = store.find("train", config, corpora[config.corpus] or "unavailable")
        if record:
            found[key] = record
    return found
