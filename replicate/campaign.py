"""The study in portions: what is recorded, what is missing, and the rest of it in the time there is.

python -m replicate study status --profile gpu
python -m replicate study run --profile gpu --minutes 9 --record
python -m replicate study probe --profile gpu --arms dense recipe act24 --workers 1 2 3
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from replicate import estimate, evaluate, measure, plans, pool, study
from replicate.config import TrainConfig
from replicate.config_text import config_hash, with_changes
from replicate.progress import clock, names_of
from replicate.records import Record, RecordStore

MARGIN = 1.1  # a run is started if this times its expected duration is left

Runs = Sequence[tuple[str, TrainConfig]]


@dataclass
class Durations:
    """How long runs take, learnt from finished ones of the same scale and device: arm name to seconds."""

    earlier: dict[str, float] = field(default_factory=dict)
    now: dict[str, float] = field(default_factory=dict)

    def learn(self, arm: str, record: Record, device: str) -> None:
        """Note the duration of a stored run if it is from a device such as `device` is here."""
        if record.seconds and record.device == measure.device_name(device):
            self.earlier[arm] = record.seconds

    def expect(self, arm: str) -> float:
        """Seconds a run of this arm will take; for an arm not yet seen the longest seen, at first 0."""
        if arm in self.now or arm in self.earlier:
            return self.now.get(arm, self.earlier.get(arm, 0.0))
        return max((self.now or self.earlier).values(), default=0.0)


@dataclass(frozen=True)
class Outcome:
    """What became of a portion: arm names with seeds, and error texts of `failed`."""

    trained: list[str]
    failed: dict[str, str]
    left: list[str]  # did not fit into the time, or were not finished in it


def run(
    runs: Runs,
    store: RecordStore,
    *,
    minutes: float | None = None,
    workers: int | None = None,
    keep: bool = False,
    fresh: bool = False,
    question: dict[str, int] | None = None,
    progress: bool = True,
) -> Outcome:
    """Train those of `runs` that are missing, in their order, and store each as soon as it is finished.

    Args:
        runs: (arm name, configuration).
        store: where to look and to put.
        minutes: no run starts that would not finish in these (reckoned from finished runs of the same
            arm, else from the longest known), and what runs on is ended. A run with checkpoint_every > 0
            starts nevertheless, since it can be continued.
        workers, keep, fresh, question, progress: as for `study.finish`.
    """
    until = None if minutes is None else time.monotonic() + 60 * minutes
    arms = {config_hash(config): name for name, config in runs}
    configs, labels = {config_hash(config): config for _, config in runs}, names_of(runs)
    durations, trained, failed, found = Durations(), [], {}, set()

    def admit(config: TrainConfig) -> bool:
        if until is None or config.checkpoint_every:
            return until is None or time.monotonic() < until
        return time.monotonic() + MARGIN * durations.expect(arms[config_hash(config)]) < until

    options = {"workers": workers, "keep": keep, "fresh": fresh, "question": question, "progress": progress}
    options |= {"names": labels, "admit": admit, "until": until, "consent": True}
    with closing(study.finish(configs, store, **options)) as ended:
        for key, record, said in ended:
            if record is None:
                failed[labels[key]] = said
            elif said == "fresh":
                trained.append(labels[key])
                durations.now[arms[key]] = record.seconds
            else:
                found.add(labels[key])
                durations.learn(arms[key], record, configs[key].device)
    left = [label for label in map(labels.get, configs) if label not in {*trained, *failed, *found}]
    return Outcome(trained, failed, left)


def outlook(profile: str, seed: int) -> str:
    """One line: what of the study with three seeds is not stored, and how long it would take here."""
    runs = plans.queue(profile, range(seed, seed + 3))
    configs = {config_hash(config): config for _, config in runs}
    found = study.look_up(configs, RecordStore())
    missing = {key: config for key, config in configs.items() if key not in found}
    if not missing:
        return f"{profile}: all {len(configs)} runs of the study are stored"
    expected = estimate.seconds(missing, pool.count_workers(list(missing.values())))
    return (
        f"{profile}: {len(missing)} of {len(configs)} runs of the study are not stored; what notebooks need "
        f"of them is trained, which takes at most about {clock(expected)} here"
    )


def status(runs: Runs, store: RecordStore) -> str:
    """A table: an arm a line with its tokens a run and, a seed a column, recorded, cached or missing."""
    configs = {config_hash(config): config for _, config in runs}
    found = study.look_up(configs, store)
    seeds = sorted({config.seed for config in configs.values()})
    arms: dict[str, dict[int, TrainConfig]] = {}
    for name, config in runs:
        arms.setdefault(name, {})[config.seed] = config
    width = max(map(len, arms))
    lines = [f"{'arm':{width}}  {'tokens':>8}  " + "  ".join(f"{f'seed {seed}':8}" for seed in seeds)]
    count = dict.fromkeys(("recorded", "cached", "missing"), 0)
    missing = 0
    for name, by_seed in arms.items():
        tokens = next(c.steps * c.tokens_per_step for c in by_seed.values())
        states = {s: found.get(config_hash(c), (None, "missing"))[1] for s, c in by_seed.items()}
        for state in states.values():
            count[state] += 1
            missing += tokens * (state == "missing")
        cells = "  ".join(f"{states.get(seed, '-'):8}" for seed in seeds)
        lines.append(f"{name:{width}}  {tokens / 1e6:7.1f}M  {cells}".rstrip())
    total = ", ".join(f"{n} {state}" for state, n in count.items())
    lines.append(f"{total}: {missing / 1e6:,.1f}M tokens to train")
    texts = {record.corpus["sha256"][:8] for record, _ in found.values() if record.corpus}
    if len(texts) > 1:
        lines.append(f"careful: their texts differ ({', '.join(sorted(texts))})")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m replicate study run | status | probe`; returns the exit status."""
    args = _parser().parse_args(argv)
    for workers in args.workers or ():
        pool.check_workers(workers)
    if args.action == "probe":
        from replicate import probe

        runs = plans.queue(args.profile, [1], args.arms or ["dense", "recipe"])
        probe.show(runs, args.workers or [1], steps=args.steps, changes=_changes(args.set))
        return 0
    runs = _chosen(args)
    store = RecordStore(root=args.out)
    if args.action == "status":
        print(status(runs, store))
        return 0
    from replicate.cli import again, check_folder

    check_folder("--record" if args.record else "--out", store.recorded if args.record else store.root)
    workers = args.workers[0] if args.workers else None
    try:
        outcome = run(
            runs, store, minutes=args.minutes, workers=workers, keep=args.record, fresh=args.fresh,
            question=evaluate.QUESTIONS.get(args.profile),
        )  # fmt: skip
    except KeyboardInterrupt:
        kept = f"what was finished is kept; {again('--fresh' if args.fresh else '')}"
        raise KeyboardInterrupt(kept) from None
    _print_results(runs, store)
    print(f"{len(outcome.trained)} trained, {len(outcome.failed)} failed, {len(outcome.left)} left")
    for label, error in outcome.failed.items():
        print(f"replicate: {label}: {error}", file=sys.stderr)
    return 1 if outcome.failed else 0


def _chosen(args: argparse.Namespace) -> Runs:
    """The runs that the arguments name, with the `--set` changes."""
    if args.profile not in study.PRESET_OF:
        raise ValueError(f"profile is {args.profile!r}; choose one of {', '.join(study.PRESET_OF)}")
    changes = _changes(args.set)
    runs = plans.queue(args.profile, args.seeds, args.arms)
    return [(name, with_changes(config, changes)) for name, config in runs]


def _print_results(runs: Runs, store: RecordStore) -> None:
    found = study.look_up({config_hash(config): config for _, config in runs}, store)
    for name, config in runs:
        key = config_hash(config)
        if key in found:
            (record, origin), label = found[key], f"{name}, seed {config.seed}"
            results = record.results
            print(
                f"{label:44} train {results['final_loss']:.4f}  validation {results['valid_loss']:.4f}  "
                f"{origin} {key}"
            )


def _changes(pairs: Sequence[str]) -> dict[str, str]:
    from replicate.cli import changes

    return changes(pairs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="replicate study", description=main.__doc__)
    parser.add_argument("action", choices=["run", "status", "probe"])
    parser.add_argument("--profile", default="smoke", help=f"scale: {', '.join(study.PRESET_OF)}")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="default: all, most important first")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float, help="start no run that takes longer; end what runs on")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--record", action="store_true", help="keep the results in data/recorded")
    where.add_argument("--out", type=Path, metavar="DIR", help="keep the results here, not in runs/records")
    parser.add_argument("--workers", nargs="+", type=int, help="processes; probe: numbers of them on a GPU")
    parser.add_argument("--fresh", action="store_true", help="train also what is stored")
    parser.add_argument("--steps", type=int, default=60, help="probe: steps that are timed")
    return parser
