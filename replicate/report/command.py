"""`python -m replicate notebooks`: list, run or refresh the notebooks."""

import argparse
from collections.abc import Sequence

from replicate import paper
from replicate.paper.command import show
from replicate.report import notebooks, runner
from replicate.study.command import outlook
from replicate.system import paths
from replicate.system.console import again


def main(argv: Sequence[str] | None = None) -> int:
    """List, run or refresh the notebooks; a run ends with the claim table."""
    parser = argparse.ArgumentParser(prog="replicate notebooks", description=main.__doc__)
    parser.add_argument("action", choices=["run", "list", "refresh"])
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="NN")
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="run also what is done already")
    args = parser.parse_args(argv)
    runner.check_profile(args.profile)
    if args.action == "list":
        for book in notebooks.select(notebooks.discover(), args.only):
            minutes = book.minutes(args.profile)
            print(book.title + ("" if minutes is None else f" ({minutes:g} min)"))
        return 0
    if args.action == "refresh":
        folders = (paths.NOTEBOOKS, paths.NOTEBOOKS / "solutions")
        print("refreshed:", *(name for folder in folders for name in notebooks.refresh(args.only, folder)))
        return 0
    if args.profile != "smoke":
        print(outlook(args.profile, args.seed), flush=True)
    try:
        outcomes = runner.run(args.profile, args.seed, args.only, args.keep_going, fresh=args.fresh)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(again("--fresh" if args.fresh else "")) from None
    print()
    show(paper.claim_table(), judged=bool(args.only), write=True)
    failed = [outcome.name for outcome in outcomes if outcome.status == "failed"]
    if failed:
        print("failed:", *failed)
    return 1 if failed else 0
