"""`python -m replicate train`: one model, from a preset and changes to it, with its checkpoints."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from replicate.config import TrainConfig
from replicate.settings.presets import train_preset
from replicate.study import worker
from replicate.system import locks
from replicate.system.console import again, changes, check_file, check_folder, say, speaks
from replicate.system.files import write_atomic
from replicate.train import NonFiniteLoss, Trainer
from replicate.training import checkpoint, parallel


def main(argv: Sequence[str] | None = None) -> int:
    """Train one model and print its losses."""
    args = _parser().parse_args(argv)
    config = train_preset(args.preset, args.sparsity, **changes(args.set))
    if args.json:
        check_file("--json", args.json)
    if args.run_dir:
        check_folder("--run-dir", args.run_dir)
    group = parallel.start(config)
    try:
        return _train(args, config, group)
    finally:
        group.end()


def _train(args: argparse.Namespace, config: TrainConfig, group: parallel.Alone) -> int:
    """Train, and print in the first process."""
    ours = args.run_dir is None and group.main  # a folder that others know as well
    args.run_dir = args.run_dir or worker.run_dir(config, torch.get_num_threads())
    claim = [f"run-{args.run_dir.name}"]
    try:
        with locks.one_of(claim, lambda: ours, lambda: say(locks.WAITS)):
            group.any(False)  # the others wait until the first one has its claim
            trainer = Trainer(config, run_dir=args.run_dir, resume=not args.restart or parallel.restarted())
            try:
                trainer.run()
            except OSError as error:
                error.add_note(_kept_of(args))
                raise
    except NonFiniteLoss as error:
        if speaks():
            say(str(error))
        return 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept_of(args)) from None
    if not group.main:
        return 1 if trainer.unsaved else 0
    result = trainer.result()
    valid = result["valid_loss"]
    text = (
        f"train loss {result['final_loss']:.4f} (last {min(config.final_window, config.steps)} steps), "
        f"validation {'not measured' if valid is None else f'{valid:.4f}'}, {result['tokens']:,} tokens, "
        f"{result['seconds']:.0f} s, {result['tokens_per_s']:,.0f} tokens/s"
    )
    try:  # none of the three is lost if another cannot be done
        try:
            if args.json:
                write_atomic(args.json, f"{json.dumps(result, indent=1)}\n".encode())
        finally:
            print(text)
    finally:
        if trainer.unsaved:
            say(f"the last checkpoint could not be written ({trainer.unsaved.strerror}); {_kept_of(args)}")
        else:
            print(f"the model is kept in {args.run_dir}; --restart trains it anew")
    return 1 if trainer.unsaved else 0


def _kept_of(args: argparse.Namespace) -> str:
    """What an interrupted `train` leaves behind."""
    steps = checkpoint.steps(args.run_dir)
    if not steps:
        return "nothing was kept, no checkpoint was finished"
    return f"step {steps[-1]} is kept; {again('--restart' if args.restart else '')}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="replicate train", description=main.__doc__)
    parser.add_argument("--preset", default="smoke", help="training preset (default: smoke)")
    parser.add_argument("--sparsity", default="dense", help="sparsity preset (default: dense)")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole result here")
    parser.add_argument("--run-dir", type=Path, help="folder of checkpoints; default: one under runs/train")
    parser.add_argument("--restart", action="store_true", help="start over, do not continue")
    return parser
