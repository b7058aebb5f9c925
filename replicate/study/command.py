"""The study in portions: what is recorded, what is missing, and the rest of it in the time there is.

python -m replicate study status --profile gpu
python -m replicate study run --profile gpu --minutes 9 --record
python -m replicate study run --profile gpu --arms dense recipe --rerun 1 --record
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from replicate.config import TrainConfig
from replicate.settings.presets import PRESET_OF
from replicate.settings.text import config_hash, refuse, with_changes
from replicate.study import completion, estimate, plans, pool
from replicate.study.progress import clock
from replicate.study.records import RecordStore
from replicate.study.runs import Outcome, Study, look_up
from replicate.system.console import again, changes, check_folder, check_minutes

Runs = Sequence[tuple[str, TrainConfig]]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m replicate study run | status`; returns the exit status."""
    args = _parser().parse_args(argv)
    if args.workers is not None:
        pool.check_workers(args.workers)
    if args.profile not in PRESET_OF:
        raise ValueError(f"profile is {args.profile!r}; choose one of {', '.join(PRESET_OF)}")
    refuse(changed := changes(args.set), {"seed": "use --seeds"})
    check_minutes(args.minutes)
    runs = [(n, with_changes(c, changed)) for n, c in plans.queue(args.profile, args.seeds, args.arms)]
    if args.rerun < 0:
        raise ValueError(f"--rerun is {args.rerun}; choose 1 or more, or leave it out for the study itself")
    store, kind = RecordStore(root=args.out), f"rerun-{args.rerun}" if args.rerun else "train"
    if args.action == "status":
        print(status(runs, store, kind))
        return 0
    check_folder("--record" if args.record else "--out", store.recorded if args.record else store.root)
    try:
        outcome = run(
            runs, store, minutes=args.minutes, workers=args.workers, keep=args.record, fresh=args.fresh,
            question=None if args.rerun else completion.QUESTIONS.get(args.profile), kind=kind,
        )  # fmt: skip
    except KeyboardInterrupt:
        kept = f"what was finished is kept; {again('--fresh' if args.fresh else '')}"
        raise KeyboardInterrupt(kept) from None
    _print(outcome, plans.names_of(runs))
    return 1 if outcome.failed else 0


def run(runs: Runs, store: RecordStore, **options: object) -> Outcome:
    """Train those of `runs` (arm name, configuration) that are missing; `options` of `Study`."""
    configs = {config_hash(config): config for _, config in runs}
    return Study(configs, store, plans.names_of(runs), consent=True, **options).finish()


def outlook(profile: str, seed: int) -> str:
    """One line: what of the study with three seeds is not stored, and how long it would take here."""
    configs = {config_hash(config): config for _, config in plans.queue(profile, range(seed, seed + 3))}
    found = look_up(configs, RecordStore())
    missing = {key: config for key, config in configs.items() if key not in found}
    if not missing:
        return f"{profile}: all {len(configs)} runs of the study are stored"
    expected = estimate.seconds(missing, pool.count_workers(missing.values()))
    return (
        f"{profile}: {len(missing)} of {len(configs)} runs of the study are not stored; what notebooks need "
        f"of them is trained, which takes at most about {clock(expected)} here"
    )


def status(runs: Runs, store: RecordStore, kind: str = "train") -> str:
    """A table: an arm a line with its tokens a run and, a seed a column, recorded, cached or missing."""
    found = look_up({config_hash(config): config for _, config in runs}, store, kind)
    states = {name: {} for name, _ in runs}
    tokens, missing = {}, {}  # missing: by hash, since two arms may have one run
    for name, config in runs:
        _, state = found.get(config_hash(config), (None, "missing"))
        states[name][config.seed], tokens[name] = state, config.steps * config.tokens_per_step
        if state == "missing":
            missing[config_hash(config)] = tokens[name]
    seeds, width = sorted({config.seed for _, config in runs}), max(map(len, states))
    lines = [f"{'arm':{width}}  {'tokens':>8}  " + "  ".join(f"{f'seed {seed}':8}" for seed in seeds)]
    for name, by_seed in states.items():
        cells = "  ".join(f"{by_seed.get(seed, '-'):8}" for seed in seeds)
        lines.append(f"{name:{width}}  {tokens[name] / 1e6:7.1f}M  {cells}".rstrip())
    every = [state for by_seed in states.values() for state in by_seed.values()]
    total = ", ".join(f"{every.count(state)} {state}" for state in ("recorded", "cached", "missing"))
    lines.append(f"{total}: {sum(missing.values()) / 1e6:,.1f}M tokens to train")
    texts = {record.corpus["sha256"][:8] for record, _ in found.values() if record.corpus}
    if len(texts) > 1:
        lines.append(f"careful: their texts differ ({', '.join(sorted(texts))})")
    return "\n".join(lines)


def _print(outcome: Outcome, names: dict[str, str]) -> None:
    for key in filter(outcome.done.__contains__, names):
        record, origin = outcome.done[key]
        losses = f"train {record.results['final_loss']:.4f}  validation {record.results['valid_loss']:.4f}"
        print(f"{names[key]:44} {losses}  {origin} {key}")
    trained = sum(origin == "fresh" for _, origin in outcome.done.values())
    print(f"{trained} trained, {len(outcome.failed)} failed, {len(outcome.left)} left")
    for key, error in outcome.failed.items():
        print(f"replicate: {names[key]}: {error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="replicate study", description=main.__doc__)
    parser.add_argument("action", choices=["run", "status"])
    parser.add_argument("--profile", default="smoke", help=f"scale: {', '.join(PRESET_OF)}")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="default: all, most important first")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float, help="start no run that takes longer; end what runs on")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--record", action="store_true", help="keep the results in data/recorded")
    where.add_argument("--out", type=Path, metavar="DIR", help="keep the results here, not in runs/records")
    parser.add_argument("--workers", type=int, help="processes at a time")
    parser.add_argument("--fresh", action="store_true", help="train also what is stored")
    again = "train runs once more, beside the stored ones, to see how far apart equal runs end; N counts"
    parser.add_argument("--rerun", type=int, default=0, metavar="N", help=again)
    return parser
