"""The README's tables of verdicts and of speeds, written from the claim table and the records.

After `python -m replicate claims --write`, `python -m replicate.readme` puts them into README.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from replicate import claims, cli, figures, layer_tables, paper, paths, step_table, study
from replicate.files import write_atomic

MARKS = ("verdicts", "speed")
ON_PAPER = ("01", "02", "11")  # notebooks that judge formats, FLOPs and printed numbers without a run
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
    *("permuted-venom", "figure4d-same", "static-worse", "table3-w1", "table3-w1-same", "table3-w1-w2-whole"),
    *("table3-w1-w2-same", "table3-w1-w2", "table3-act24", "table3-venom", "table3-transpose"),
    *("table3-transpose-same", "table4-recovers", "table4-helps", "order"),
    *("figure6-speedup", "figure7-speedup", "table2-1b-speedup", "step-speedup", "headline"),
    "beyond-venom",
)


def block(table: pd.DataFrame) -> str:
    """Markdown of the verdict counts and of the claims in CLAIMS.

    Args:
        table: from `paper.claim_table`, or figures/claims.csv read with index "id" and no NaN.
    """
    columns = ["place", "claim", "paper", "ours", "verdict", "scale", "notebook"]
    shown = figures.markdown(table.loc[list(CLAIMS), columns])
    return f"{paper.verdict_counts(table)}. {kinds(table)}\n\n{shown}"


def kinds(table: pd.DataFrame) -> str:
    """What the counts are made of: arithmetic and formulas, or runs and timings. `table` as for `block`."""
    failed, held = (table[table["verdict"] == verdict] for verdict in (claims.FAILS, claims.HOLDS))
    sums = failed[failed["notebook"].isin(ON_PAPER)]
    large = int(held["scale"].isin(study.PRESET_OF.keys() - {"smoke"}).sum())
    places = ", ".join(sorted(set(sums["notebook"])))
    return (
        f"Of the {len(failed)} that do not hold, {len(sums)} are arithmetic or formulas (notebooks {places}) "
        f"and {len(failed) - len(sums)} measured; of the {len(held)} that hold, {large} "
        "rest on runs or timings at laptop scale or larger."
    )


def speed() -> str:
    """Markdown: times as fast as dense, of the FFN and of a whole training step, by format and model."""
    columns: dict[str, dict[str, float]] = {}
    for d_model, preset, name in ((2048, "llama1b", "1B"), (4096, "llama7b", "7B")):
        columns[f"FFN, {name} shape"] = layer_tables.over_dense(d_model, device=step_table.CARD)
        columns[f"whole step, {name}"] = step_table.speeds(preset)
    shown = pd.DataFrame(columns).reindex([arm for arm in layer_tables.NAMES if not arm.startswith("dense")])
    shown.index = [layer_tables.NAMES[arm] for arm in shown.index]
    cells = shown.map(lambda x: "" if pd.isna(x) else f"{x:.2f}x")
    return figures.markdown(cells.rename_axis("times as fast as dense").reset_index())


def update(table: pd.DataFrame, path: Path = paths.ROOT / "README.md") -> Path:
    """Put `block(table)` and `speed()` between the README's markers. Raises ValueError if one is missing."""
    text = path.read_text(encoding="utf-8")
    for name, content in zip(MARKS, (block(table), speed()), strict=True):
        start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"{path.name} needs the lines {start} and {end} once each")
        between = re.compile(f"{re.escape(start)}.*{re.escape(end)}", re.DOTALL)
        text = between.sub(lambda _: f"{start}\n{content.rstrip()}\n{end}", text)  # noqa: B023 - used at once
    write_atomic(path, text.encode())
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Write README.md's tables anew, from figures/claims.csv and data/recorded."""

    def anew() -> Path:
        table = paths.ROOT / "figures" / "claims.csv"
        return update(pd.read_csv(table, index_col="id", dtype=str, keep_default_na=False))

    return cli.rewrite("readme", main.__doc__, anew, argv)


if __name__ == "__main__":
    raise SystemExit(main())
