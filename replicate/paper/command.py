"""`python -m replicate claims`: the claim table in a terminal, and its files in figures/."""

import argparse
import shutil
import textwrap
from collections.abc import Iterable, Sequence

import pandas as pd

from replicate.paper.table import NOT_RUN, claim_table, claims_markdown, verdict_counts, write_claims


def main(argv: Sequence[str] | None = None) -> int:
    """Print the claim table, and write figures/claims.md and .csv if asked."""
    parser = argparse.ArgumentParser(prog="replicate claims", description=main.__doc__)
    parser.add_argument("--profile", help="only verdicts from this scale")
    parser.add_argument("--judged", action="store_true", help="leave out claims that were not run")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--write", action="store_true", help="write figures/claims.md and claims.csv")
    args = parser.parse_args(argv)
    show(claim_table(args.profile), judged=args.judged, markdown=args.markdown, write=args.write)
    return 0


def show(table: pd.DataFrame, *, judged: bool = False, markdown: bool = False, write: bool = False) -> None:
    """Print the claims, if asked only those that were judged, and `write` the whole table to figures/."""
    shown = table[table["verdict"] != NOT_RUN] if judged else table
    written = [path.name for path in write_claims(table)] if write else []
    print(claims_markdown(shown) if markdown else claim_text(shown))
    if not markdown:
        print(f"\n{verdict_counts(table)}")
    if written:
        print("written to figures:", *written)


def claim_text(table: pd.DataFrame, width: int | None = None) -> str:
    """The claim table for a terminal of `width` columns, one claim a line."""
    width = max(80, width or shutil.get_terminal_size((120, 24)).columns)
    columns = {"place": 14, "claim": 0, "paper": 14, "ours": 20, "verdict": 18}
    columns["claim"] = width - sum(columns.values()) - 2 * (len(columns) - 1)

    def line(row: Iterable[str]) -> str:
        cells = (textwrap.shorten(x, n, placeholder="…").ljust(n) for x, n in zip(row, columns.values()))
        return "  ".join(cells).rstrip()

    rows = table[list(columns)].astype(str).values
    return "\n".join([line(columns), "-" * width, *map(line, rows)])
