"""The command line: `python -m replicate train | bench | study | claims | notebooks | tokenizer`.

Bad input ends in one line that says what would work and exit status 2.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replicate import paths
from replicate.console import ended, say
from replicate.files import in_place, write_atomic

if TYPE_CHECKING:
    import pandas as pd

    from replicate.config import TrainConfig
    from replicate.train import Trainer


# Commands with a command line of their own.
HANDED_OVER = {
    ("study",): "replicate.campaign",
    ("tokenizer",): "replicate.tokenizer",
    ("bench", "backends"): "replicate.backend_bench",
    ("bench", "ffn"): "replicate.ffn_bench",
    ("bench", "kernels"): "replicate.kernels.bench",
    ("bench", "step"): "replicate.step_bench",
    ("bench", "venom"): "replicate.kernels.venom_bench",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (it failed), 2 (bad input), 130 (interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        for words, module in HANDED_OVER.items():
            if tuple(argv[: len(words)]) == words:
                return importlib.import_module(module).main(argv[len(words) :])
        args = _parser().parse_args(argv)
        return args.command(args)

    return ended(command)


def rewrite(module: str, description: str, update: Callable[[], Path], argv: Sequence[str] | None) -> int:
    """The command line `python -m replicate.<module>`: no options, `update()` writes a page and is named."""
    parser = argparse.ArgumentParser(prog=f"python -m replicate.{module}", description=description)
    parser.parse_args(argv)

    def command() -> int:
        try:
            print(update().name)
        except FileNotFoundError as error:
            raise ValueError(
                f"{error.filename} is missing; restore it, or write figures/ anew by "
                "`python -m replicate notebooks run`"
            ) from None
        return 0

    return ended(command)


def train(args: argparse.Namespace) -> int:
    """Train one model and print its losses."""
    import torch

    from replicate import locks, pool
    from replicate.train import NonFiniteLoss, Trainer

    config = _config(args)
    _check_outputs(args)
    ours = args.run_dir is None  # a folder that others know as well
    args.run_dir = args.run_dir or pool.run_dir(config, torch.get_num_threads())
    claim = [f"run-{args.run_dir.name}"]
    try:
        with locks.one_of(claim, lambda: ours, lambda: say(locks.WAITS)):
            trainer = Trainer(config, run_dir=args.run_dir, resume=not args.restart)
            _run(trainer, args)
    except NonFiniteLoss as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept_of(args)) from None
    result = trainer.result()
    valid = result["valid_loss"]
    text = (
        f"train loss {result['final_loss']:.4f} (last {min(config.final_window, config.steps)} steps), "
        f"validation {'not measured' if valid is None else f'{valid:.4f}'}, {result['tokens']:,} tokens, "
        f"{result['seconds']:.0f} s, {result['tokens_per_s']:,.0f} tokens/s"
    )
    try:
        _deliver(args, result, text)
    finally:
        if trainer.unsaved:
            say(f"the last checkpoint could not be written ({trainer.unsaved.strerror}); {_kept_of(args)}")
        else:
            print(f"the model is kept in {args.run_dir}; --restart trains it anew")
    return 1 if trainer.unsaved else 0


def bench(args: argparse.Namespace) -> int:
    """Measure the training loop against plain torch loops of the same shapes."""
    if args.what != "train":
        raise ValueError(
            f"put the name {args.what!r} directly after 'bench': python -m replicate bench {args.what}, "
            "then its own options"
        )
    from replicate.bench import train_bench

    config = _config(args)
    _check_outputs(args)
    result = train_bench(config, repeats=args.repeats, steps=args.turn)
    names = {"trainer": result["trainer_tokens_per_s"], **result["plain_tokens_per_s"]}
    speeds = [f"{name} {speed:,.0f} tokens/s" for name, speed in names.items()]
    text = (
        f"{'; '.join(speeds)}: ratio to the fastest plain loop {result['ratio']:.3f} "
        f"({result['low']:.3f} to {result['high']:.3f} over {result['repeats']} turns) on {result['device']}"
        f"{', a step one CUDA graph' if result['captured'] else ''}"
    )
    _deliver(args, result, text)
    return 0


def claims(args: argparse.Namespace) -> int:
    """Print the claim table, and write figures/claims.md and .csv if asked."""
    from replicate import paper

    table = paper.claim_table(args.profile)
    shown = table[table["verdict"] != paper.NOT_RUN] if args.judged else table
    written = [path.name for path in paper.write_claims(table)] if args.write else []
    print(paper.claims_markdown(shown) if args.markdown else claim_text(shown))
    if not args.markdown:
        print(f"\n{paper.verdict_counts(table)}")
    if written:
        print("written to figures:", *written)
    return 0


def notebooks(args: argparse.Namespace) -> int:
    """List, run or refresh the notebooks; a run ends with the claim table."""
    from replicate import notebooks as books
    from replicate import runner

    runner.check_profile(args.profile)
    if args.action == "list":
        for book in books.select(books.discover(), args.only):
            minutes = book.minutes(args.profile)
            print(book.title + ("" if minutes is None else f" ({minutes:g} min)"))
        return 0
    if args.action == "refresh":
        print("refreshed:", *books.refresh(args.only))
        return 0
    if args.profile != "smoke":
        from replicate.campaign import outlook

        print(outlook(args.profile, args.seed), flush=True)
    try:
        outcomes = runner.run(args.profile, args.seed, args.only, args.keep_going, fresh=args.fresh)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(again("--fresh" if args.fresh else "")) from None
    print()
    claims(argparse.Namespace(profile=None, judged=bool(args.only), markdown=False, write=True))
    failed = [outcome.name for outcome in outcomes if outcome.status == "failed"]
    if failed:
        print("failed:", *failed)
    return 1 if failed else 0


def claim_text(table: pd.DataFrame, width: int | None = None) -> str:
    """The claim table for a terminal of `width` columns, one claim a line."""
    width = max(80, width or shutil.get_terminal_size((120, 24)).columns)
    columns = {"verdict": 18, "place": 14, "paper": 14, "ours": 20}
    columns["claim"] = width - sum(columns.values()) - 2 * len(columns)
    order = ("place", "claim", "paper", "ours", "verdict")

    def line(row: Any) -> str:
        cells = (textwrap.shorten(str(row[name]), columns[name], placeholder="…") for name in order)
        return "  ".join(cell.ljust(columns[name]) for cell, name in zip(cells, order, strict=True)).rstrip()

    lines = [line({name: name for name in order}), "-" * width]
    lines += [line(row) for _, row in table.iterrows()]
    return "\n".join(lines)


def changes(pairs: Sequence[str]) -> dict[str, str]:
    """Field to text from `--set key=value` pairs. Raises ValueError for what is none."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair!r} is no key=value, like steps=50 or model.d_ff=512")
        found[key] = value
    return found


def check_folder(option: str, folder: Path) -> None:
    """Make `folder` if it is missing. Raises ValueError, with the option, if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        hint = "; ".join(filter(None, ["choose another folder", paths.elsewhere(folder)]))
        raise ValueError(
            f"{option} {folder} cannot be written to ({error.strerror or error}); {hint}"
        ) from None


def check_file(option: str, path: Path) -> None:
    """Raise ValueError, naming the option, if no file can be written at `path`."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if in_place(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, "no permission")
            return
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"{option} {path} cannot be written ({why}); choose another file") from None


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse places that cannot be written before the work, not after it."""
    if args.json:
        check_file("--json", args.json)
    if getattr(args, "run_dir", None):
        check_folder("--run-dir", args.run_dir)


def again(without: str = "") -> str:
    """How to go on after an interruption; `without` is the option that would start over, if it was given."""
    return f"run the same command again{f' without {without}' if without else ''} to go on"


def _kept_of(args: argparse.Namespace) -> str:
    """What an interrupted `train` leaves behind."""
    from replicate import checkpoint

    steps = checkpoint.steps(args.run_dir)
    if not steps:
        return "nothing was kept, no checkpoint was finished"
    return f"step {steps[-1]} is kept; {again('--restart' if args.restart else '')}"


def _config(args: argparse.Namespace) -> TrainConfig:
    """The preset with the sparsity and the `--set key=value` changes."""
    from replicate.presets import train_preset

    return train_preset(args.preset, args.sparsity, **changes(args.set))


def _run(trainer: Trainer, args: argparse.Namespace) -> None:
    """Train to the end; a file that stops it says what is kept."""
    try:
        trainer.run()
    except OSError as error:
        error.add_note(_kept_of(args))
        raise


def _deliver(args: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    """Write the result, if asked, and print `text`: neither is lost if the other cannot be done."""
    try:
        if args.json:
            write_atomic(args.json, f"{json.dumps(result, indent=1)}\n".encode())
    finally:
        print(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="replicate", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(command: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        made.set_defaults(command=command)
        return made

    for command in (train, bench):
        one = add(command)
        if command is bench:
            what = ["train", *(words[1] for words in HANDED_OVER if words[0] == "bench")]
            one.add_argument(
                "what", choices=what, help="put it first; all but train have options of their own"
            )
            one.add_argument("--repeats", type=int, default=9, help="turns of each loop")
            one.add_argument("--turn", type=int, default=20, help="steps in a turn")
        one.add_argument("--preset", default="smoke", help="training preset (default: smoke)")
        one.add_argument("--sparsity", default="dense", help="sparsity preset (default: dense)")
        one.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
        one.add_argument("--json", type=Path, metavar="FILE", help="write the whole result here")
        if command is train:
            one.add_argument(
                "--run-dir", type=Path, help="folder of checkpoints; default: one under runs/train"
            )
            one.add_argument("--restart", action="store_true", help="start over, do not continue")
    commands.add_parser("study", help="Train the study's arms in portions: run, status, probe.")
    table = add(claims)
    table.add_argument("--profile", help="only verdicts from this scale")
    table.add_argument("--judged", action="store_true", help="leave out claims that were not run")
    table.add_argument("--markdown", action="store_true")
    table.add_argument("--write", action="store_true", help="write figures/claims.md and claims.csv")
    books = add(notebooks)
    books.add_argument("action", choices=["run", "list", "refresh"])
    books.add_argument("--profile", default="smoke")
    books.add_argument("--seed", type=int, default=1)
    books.add_argument("--only", nargs="+", metavar="NN")
    books.add_argument("--keep-going", action="store_true")
    books.add_argument("--fresh", action="store_true", help="run also what is done already")
    commands.add_parser("tokenizer", help="Learn the vocabulary's ranks again.")
    return parser
