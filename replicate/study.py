"""Many runs side by side: look each up among the records, train the missing ones in parallel.

A run that fails costs only itself. What is finished is stored at once, so that an interrupted study
continues where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from replicate import data, pool, records
from replicate.config import TrainConfig
from replicate.config_text import config_hash
from replicate.pool import run_dir
from replicate.presets import SPARSITY_PRESETS, train_preset
from replicate.records import Record, RecordStore
from replicate.runtime import clock
from replicate.train import Trainer

PRESET_OF = {"smoke": "smoke", "laptop": "laptop", "gpu": "study10m", "gpu40m": "study40m"}  # ascending
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
    preset, names = PRESET_OF.get(profile, profile), list(sparsity)
    return [train_preset(preset, name, **{**changes, "seed": seed}) for seed in seeds for name in names]


def describe(config: TrainConfig) -> str:
    """A short name of an arm: sparsity preset, seed, and the share of sparse steps if not all."""
    sparsity = config.model.sparsity
    name = next((name for name, preset in SPARSITY_PRESETS.items() if preset == sparsity), "own sparsity")
    share = f" {config.order} {config.sparse_share:.0%}" if sparsity.any and config.sparse_share < 1 else ""
    activation = "" if config.model.activation == "relu2" else f" {config.model.activation}"
    return f"{name}{activation}{share} seed {config.seed}"


def run(
    configs: Sequence[TrainConfig],
    workers: int | None = None,
    store: RecordStore | None = None,
    *,
    fresh: bool = False,
    keep: bool = False,
    label: str = "",
    progress: bool = True,
) -> list[tuple[Record, str]]:
    """The records of `configs` in their order, each with its origin: "recorded", "cached" or "fresh".

    Args:
        configs: equal ones are trained once.
        workers: processes at a time; by default one a core, on a GPU a few that share it.
        store: where to look and to put; by default the project's.
        fresh: train even what is stored.
        keep: write what is trained to data/recorded, to be shipped with the project.
        label: of the study, at the start of its progress lines.
        progress: print a line on stderr as each arm finishes.

    Raises:
        StudyFailed: naming the arms that failed, once all others are done and stored.
    """
    store = store or RecordStore()
    by_hash = {config_hash(config): config for config in configs}
    done = {} if fresh else look_up(by_hash, store)
    missing = [config for key, config in by_hash.items() if key not in done]
    failures: dict[str, str] = {}
    say = _announcer(label, len(missing)) if progress else lambda *finished: None
    for config, answer in pool.train_all(missing, workers):
        try:
            if "error" in answer:
                raise RuntimeError(answer["error"])
            record = put_answer(store, config, answer, keep=keep)
            results = record.results
            done[config_hash(config)] = (record, "fresh")
            say(f"{describe(config)}: loss {results['final_loss']:.4f}, held-out {results['valid_loss']:.4f}")
        except (RuntimeError, ValueError) as error:
            failures[f"{describe(config)} ({config_hash(config)})"] = str(error)
            say(f"{describe(config)}: FAILED, {error}")
    if failures:
        raise StudyFailed(failures, done)
    return [done[config_hash(config)] for config in configs]


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
    """
    threads = torch.get_num_threads()
    trainer = Trainer(config, run_dir=run_dir(config), progress=progress)
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


def _announcer(label: str, total: int) -> Callable[[str], None]:
    """Prints a numbered line an arm, with an estimate of the time left."""
    begun, count = time.monotonic(), iter(range(1, total + 1))

    def say(text: str) -> None:
        n, elapsed = next(count), time.monotonic() - begun
        left = f", about {clock(elapsed / n * (total - n))} left" if n < total else ""
        print(f"{label}{' ' if label else ''}{n}/{total} {text}, {clock(elapsed)}{left}", file=sys.stderr)

    return say
