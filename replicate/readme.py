"""The README's table of verdicts, written from the claim table and never by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from replicate import figures, paper, paths
from replicate.records import write_atomic

START, END = "<!-- verdicts: start -->", "<!-- verdicts: end -->"
CLAIMS = (
    *("figure1-grows", "formula-1b", "audit-4", "audit-2", "audit-3", "audit-5"),
    *(
        "table5-16",
        "soft-continuous",
        "hard-jumps",
        "relu2-init",
        "relu2-rises",
        "every-product",
        "mask-reuse",
    ),
    *("permuted-venom", "figure4d-same", "static-worse", "table3-w1", "table3-w1-w2", "table3-act24"),
    *("table3-venom", "table4-recovers", "order", "figure6-speedup", "figure7-speedup", "headline"),
)


def block(table: pd.DataFrame) -> str:
    """Markdown of the verdict counts and of the claims in CLAIMS.

    Args:
        table: from `paper.claim_table`, or figures/claims.csv read with index "id" and no NaN.
    """
    columns = ["place", "claim", "paper", "ours", "verdict", "scale", "notebook"]
    shown = figures.markdown(table.loc[list(CLAIMS), columns])
    return f"{paper.verdict_counts(table)}\n\n{shown}"


def update(table: pd.DataFrame, path: Path = paths.ROOT / "README.md") -> Path:
    """Put `block(table)` between the README's two markers. Raises ValueError if a marker is missing."""
    text = path.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{path.name} needs the lines {START} and {END} once each")
    between = re.compile(f"{re.escape(START)}.*{re.escape(END)}", re.DOTALL)
    new = between.sub(lambda _: f"{START}\n{block(table)}{END}", text)
    write_atomic(path, new.encode())
    return path
