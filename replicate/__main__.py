"""`python -m replicate <command>`, also installed as `replicate`.

Bad input ends in one line that says what would work and exit status 2.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from replicate.system.console import ended

COMMANDS = {  # name -> (module with its `main`, what it does)
    "train": ("replicate.study.train_command", "Train one model."),
    "study": ("replicate.study.command", "Train the study's arms in portions: run, status."),
    "diffusion": ("replicate.diffusion.command", "Train the arms on pictures or clips of glyphs."),
    "bench": ("replicate.bench.command", "Measure kernels, layers and steps, or show what was measured."),
    "claims": ("replicate.paper.command", "Print the claim table."),
    "notebooks": ("replicate.report.command", "List, run or refresh the notebooks."),
    "pages": ("replicate.report.pages", "Write the tables of README.md and docs/ anew."),
    "overlap": ("replicate.study.overlap_command", "Measure how much held-out text was trained on."),
    "tokenizer": ("replicate.text.tokenizer", "Learn the vocabulary's ranks again."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (it failed), 2 (bad input), 130 (interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="replicate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, does) in COMMANDS.items():
        commands.add_parser(name, help=does, add_help=False)

    def command() -> int:
        name = parser.parse_args(argv[:1]).command
        return importlib.import_module(COMMANDS[name][0]).main(argv[1:])

    return ended(command)


if __name__ == "__main__":
    sys.exit(main())
