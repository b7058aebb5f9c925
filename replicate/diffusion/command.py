"""`python -m replicate diffusion`: train the arms on pictures or clips of glyphs, score their samples.

python -m replicate diffusion --kind image
python -m replicate diffusion --kind video --profile gpu --seeds 1 2 3 --minutes 9 --record
python -m replicate diffusion --kind image --profile gpu --device cuda:1 --part 2/8 --record
python -m replicate diffusion --kind image --profile gpu --status
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from replicate.diffusion.glyphs import CLASSES, Glyphs
from replicate.diffusion.model import DiT, sample
from replicate.diffusion.score import Judge, pack
from replicate.diffusion.train import ARMS, PRESETS, DiffusionConfig, config_of, train
from replicate.evaluate import evaluating
from replicate.settings.text import refuse
from replicate.study.records import Record, RecordStore, make_record
from replicate.system.console import changes, check_folder, check_minutes, say
from replicate.training.device import pick_device, pick_dtype, reproducible

KIND = "diffusion"
GUIDANCE = 2.0  # of the samples that a record shows; those that are scored have none
SHOWN = {"image": 72, "video": 12}  # samples in a record
_QUICK = {"n": 72, "euler": 10, "steps": 150, "batch_size": 16, "width": 16}
JUDGED: dict[tuple[str, str], dict[str, int]] = {  # by kind and profile, see `Judge`
    ("image", "smoke"): _QUICK, ("video", "smoke"): _QUICK | {"n": 36},
    ("image", "gpu"): {"n": 2304}, ("video", "gpu"): {"n": 1152},
}  # fmt: skip
# Settings that options give.
GIVEN = {"seed": "use --seeds", "device": "use --device"}
GIVEN |= dict.fromkeys(("model.sparsity", "model.activation"), "use --arms")

Run = tuple[str, DiffusionConfig]


def main(argv: Sequence[str] | None = None) -> int:
    """Train and score the missing runs, a record each; returns the exit status."""
    args = _parser().parse_args(argv)
    refuse(changed := changes(args.set), GIVEN)
    check_minutes(args.minutes)
    kinds, seeds, arms = (dict.fromkeys(names) for names in (args.kind, args.seeds, args.arms or ARMS))
    runs = [
        (arm, config_of(kind, args.profile, arm, seed, device=args.device, **changed))
        for kind in kinds for seed in seeds for arm in arms
    ]  # fmt: skip
    store = RecordStore(root=args.out)
    if args.status:
        print(status(runs, store))
        return 0
    check_folder("--record" if args.record else "--out", store.recorded if args.record else store.root)
    todo = part(runs, args.part)
    if not args.fresh:
        todo = [(arm, config) for arm, config in todo if store.find(KIND, config) is None]
    return 1 if work(todo, store, args.profile, minutes=args.minutes, keep=args.record) else 0


def part(runs: list[Run], text: str) -> list[Run]:
    """Every n-th of the runs, from the i-th on, for a text "i/n". Raises ValueError for other texts."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise ValueError(f"--part is {text!r}; write i/n with i from 1 to n, like 2/8")
    return runs[int(i) - 1 :: int(n)]


def work(
    runs: list[Run], store: RecordStore, profile: str, *, minutes: float | None = None, keep: bool = False
) -> int:
    """Train, score and store the runs one after another; how many failed.

    Args:
        minutes: no run starts that would not end in these, if it takes as long as the longest one so far.
        keep: write to data/recorded, to be shipped with the project.
    """
    began, longest, failed = time.perf_counter(), 0.0, 0
    judges: dict[str, Judge] = {}
    for done, (arm, config) in enumerate(runs):
        start = time.perf_counter()
        if minutes is not None and start - began + longest > 60 * minutes:
            say(f"{len(runs) - done} runs do not fit into {minutes:g} minutes")
            break
        say(f"{config.kind} {arm} seed {config.seed}: {done + 1} of {len(runs)}")
        try:
            if config.kind not in judges:
                judges[config.kind] = _judge(config, profile)
            record = run(arm, config, judges[config.kind])
        except (RuntimeError, ValueError) as error:
            say(f"{config.kind} {arm} seed {config.seed} failed: {error}")
            failed += 1
            continue
        store.put(record, recorded=keep)
        print(line(record), flush=True)
        longest = max(longest, time.perf_counter() - start)
    return failed


def run(arm: str, config: DiffusionConfig, judge: Judge) -> Record:
    """Train and score one arm: its record."""
    start = time.perf_counter()
    model, results = train(config)
    results = {"arm": arm, **results, "real": judge.real, **samples(model, config, judge)}
    return make_record(KIND, config, results, seconds=time.perf_counter() - start, device=config.device)


def samples(model: DiT, config: DiffusionConfig, judge: Judge) -> dict[str, Any]:
    """The "score" of samples, and a few "samples" of `pack` with their "classes"."""
    device = next(model.parameters()).device
    half = pick_dtype(config.dtype, device) == torch.bfloat16
    shown = SHOWN[config.kind]
    y = torch.arange(max(config.batch_size, shown), device=device) * len(CLASSES) // min(shown, len(CLASSES))
    y %= len(CLASSES)
    with (
        torch.autocast(device.type, torch.bfloat16) if half else nullcontext(),
        reproducible(device),
        evaluating(model),
    ):
        score = judge.score(model, config.batch_size)
        pictures = sample(model, y, guidance=GUIDANCE, steps=judge.euler)[:shown]
    classes = [CLASSES[i] for i in y[:shown].tolist()]
    return {"score": score, "samples": {"guidance": GUIDANCE, "classes": classes, **pack(pictures)}}


def line(record: Record) -> str:
    """A record in a line: losses, scores, time."""
    r = record.results
    frames = record.config["model"]["frames"]
    score = f"samples {r['score']['accuracy']:.1%} right, Fréchet {r['score']['frechet']:.2f}"
    return (
        f"{'image' if frames == 1 else 'video'} {r['arm']:12} seed {record.seed}  "
        f"train {r['final_loss']:.4f}  held-out poses {r['valid']['poses']['loss']:.4f} "
        f"fonts {r['valid']['fonts']['loss']:.4f}  {score}  {r['step_ms']:.1f} ms a step, "
        f"{record.seconds:.0f} s"
    )


def status(runs: Sequence[Run], store: RecordStore) -> str:
    """A line a kind and arm: its seeds that are recorded, cached or missing."""
    states: dict[str, list[str]] = {}
    for arm, config in runs:
        found = store.find(KIND, config)
        states.setdefault(f"{config.kind} {arm}", []).append(
            f"seed {config.seed} {found[1] if found else 'missing'}"
        )
    return "\n".join(f"{name:20} {', '.join(parts)}" for name, parts in states.items())


def _judge(config: DiffusionConfig, profile: str) -> Judge:
    device = pick_device(config.device)
    judge = Judge(Glyphs(config.model.frames, config.model.size, device), **JUDGED[config.kind, profile])
    right = ", ".join(f"{share:.1%} of {split}" for split, share in judge.real["accuracy"].items())
    say(f"the classifier knows {right}; Fréchet distance of real to real {judge.real['frechet']:.3f}")
    return judge


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="replicate diffusion", description=main.__doc__)
    add = parser.add_argument
    kinds, profiles = (list(dict.fromkeys(names)) for names in zip(*PRESETS))
    add("--kind", nargs="+", choices=kinds, default=kinds, help="default: both")
    add("--profile", choices=profiles, default=profiles[0], help=f"scale (default: {profiles[0]})")
    add("--arms", nargs="+", metavar="NAME", help=f"default: {', '.join(ARMS)}")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    add("--minutes", type=float, help="start no run that would take longer")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    add("--part", default="1/1", metavar="I/N", help="every N-th run, from the I-th: processes side by side")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--record", action="store_true", help="keep the results in data/recorded")
    where.add_argument("--out", type=Path, metavar="DIR", help="keep the results here, not in runs/records")
    add("--fresh", action="store_true", help="train also what is stored")
    add("--status", action="store_true", help="list what is stored and what is missing")
    return parser
