"""The claims of the paper and of ours beyond it, and the table that says of each whether it holds.

Check cells, the claim table and the README's table all come from here.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from replicate.paper.printed import data, named
from replicate.paper.verdicts import (
    DIRECTION,
    FAILS,
    HOLDS,
    PROFILES,
    SAME_SIZE,
    SIZE,
    UNTESTABLE,
    VERDICTS,
    Claim,
    Verdict,
    judge,
    text,
    unpack,
)
from replicate.study import records
from replicate.system import paths
from replicate.system.files import write_atomic

NOT_RUN = "not run"
# Where a judged number comes from. What this run trained is shown and never judged: a verdict that hangs on a
# seed or a processor is none.
SOURCES = {"recorded": "recorded", "arithmetic": "arithmetic", "here": "checked here"}
SHIPPED = paths.ROOT / "figures" / "claims.csv"
COLOURS = {HOLDS: "#1b7837", DIRECTION: "#5a7d1b", SIZE: "#8c510a", FAILS: "#b2182b"}
COLOURS |= dict.fromkeys((UNTESTABLE, NOT_RUN), "#6b6b6b")


class ClaimTable(pd.DataFrame):
    """A data frame that shows its cells in full and colours the verdict."""

    def __repr__(self) -> str:
        return self.to_string()

    def _repr_html_(self) -> str:
        shown = pd.DataFrame(self).reset_index().map(html.escape)
        colours = shown["verdict"].map(COLOURS)
        shown["verdict"] = '<b style="color:' + colours + '">' + shown["verdict"] + "</b>"
        return shown.to_html(index=False, escape=False, justify="left", border=0)


class ClaimBroken(AssertionError):
    """A claim we stand by came out otherwise."""


@dataclass(frozen=True)
class CheckRow:
    """A claim with what we found: one row of a check cell."""

    claim: Claim
    ours: Any
    verdict: Verdict
    profile: str
    source: str


@lru_cache(maxsize=1)
def claims() -> dict[str, Claim]:
    """Every claim by id, in the order of the claim table."""
    return {entry["id"]: Claim(**entry) for entry in data()["claims"]}


def claim(claim_id: str) -> Claim:
    """The claim of this id. Raises ValueError naming near matches."""
    return named(claims(), claim_id, "claim")


def check(
    claim_id: str,
    ours: Any = None,
    *,
    spread: float | None = None,
    n: int = 1,
    profile: str = "smoke",
    source: str,
    store: records.RecordStore | None = None,
) -> CheckRow:
    """Judge a claim, keep the verdict as a record of kind "claim", and return the row to show.

    Args:
        ours, spread, n: as for `judge`.
        profile: scale at which the numbers were got: a recorded GPU study is "gpu" on any machine.
        source: where they come from: "recorded", "arithmetic", or "here" (no profile then) for what any run
            must find, a format or a gradient, never a loss.

    Raises ClaimBroken if we stand by the claim and the verdict contradicts it; ValueError for another source.
    """
    found = claim(claim_id)
    if source not in SOURCES or (found.noisy and source != "recorded"):
        raise ValueError(
            f"claim {claim_id}: source is {source!r}; choose one of {', '.join(SOURCES)}, and recorded runs "
            "for a claim about training"
        )
    verdict = judge(found, ours, spread, n, profile)
    value, spread, n = unpack(ours, spread, n)
    results = {"key": found.key, "ours": value, "spread": spread, "n": n, "source": source}
    results |= dataclasses.asdict(verdict)
    record = records.make_record("claim", {"claim": claim_id, "profile": profile}, results)
    (store or records.RecordStore()).put(record)
    against = (FAILS,) if found.expected == HOLDS else (HOLDS, DIRECTION, SIZE)
    if found.stand_by and verdict.text in against:
        raise ClaimBroken(
            f"{claim_id} ({found.place}): {found.statement}. Verdict: {verdict.text}, {verdict.why}"
        )
    return CheckRow(found, value, verdict, profile, source)


def show(check_rows: Iterable[CheckRow]) -> pd.DataFrame:
    """The check cell's table: paper | ours | tolerance | verdict, one claim a row."""
    rows = [
        {
            "claim": row.claim.statement,
            "paper": paper_text(row.claim),
            "ours": ours_text(row.claim, row.ours, row.verdict, row.source),
            "tolerance": tolerance_text(row.claim),
            "verdict": row.verdict.text,
            "because": row.verdict.why,
            "numbers": f"recorded, {row.profile} scale" if row.source == "recorded" else SOURCES[row.source],
        }
        for row in check_rows
    ]
    return ClaimTable(pd.DataFrame(rows).set_index("claim"))


def claim_table(
    profile: str | None = None, store: records.RecordStore | None = None, shipped: Path | None = SHIPPED
) -> pd.DataFrame:
    """Every claim with its verdict: the latest found here, else the shipped one, else "not run".

    Args:
        profile: only verdicts on numbers of this scale; None takes the largest scale there is, then
            the latest.
        shipped: the claim table of the project, figures/claims.csv; None leaves it out.
    """
    if profile is not None and profile not in PROFILES:
        raise ValueError(f"profile is {profile!r}; choose one of {', '.join(PROFILES)}")
    best: dict[str, records.Record] = {}
    for record, _ in (store or records.RecordStore()).all("claim"):
        name = record.config["claim"]
        known = claims().get(name)
        if known is None or record.results["key"] != known.key or record.results["source"] not in SOURCES:
            continue
        if profile in (None, record.config["profile"]) and (
            name not in best or _weight(record) >= _weight(best[name])
        ):
            best[name] = record
    stored = shipped_table(shipped).to_dict("index") if shipped and shipped.exists() else {}
    rows = []
    for found in claims().values():
        old = stored.get(found.id)
        usable = old and old["key"] == found.key and profile in (None, old["scale"])
        usable = usable and found.id not in best
        rows.append({"id": found.id, **old} if usable else _row(found, best.get(found.id)))
    return ClaimTable(pd.DataFrame(rows).set_index("id"))


def shipped_table(path: Path = SHIPPED) -> pd.DataFrame:
    """The project's claim table, by claim id, as `write_claims` left it. Raises FileNotFoundError."""
    return pd.read_csv(path, index_col="id", dtype=str, keep_default_na=False)


def verdict_counts(table: pd.DataFrame) -> str:
    """One line: how many claims got which verdict."""
    counts = table["verdict"].value_counts()
    parts = [f"{counts[name]} {name}" for name in (*VERDICTS, NOT_RUN) if name in counts]
    return f"{len(table)} claims: {', '.join(parts)}"


def claims_markdown(table: pd.DataFrame | None = None) -> str:
    """The claim table in Markdown."""
    table = claim_table() if table is None else table
    columns = ["place", "claim", "paper", "ours", "verdict", "because", "scale", "notebook"]
    lines = [verdict_counts(table), "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for _, row in table.iterrows():
        lines.append("| " + " | ".join(str(row[name]).replace("|", "\\|") for name in columns) + " |")
    return "\n".join(lines) + "\n"


def write_claims(table: pd.DataFrame | None = None) -> list[Path]:
    """Write figures/claims.md and figures/claims.csv; returns their paths."""
    table = claim_table() if table is None else table
    folder = paths.figures_dir()
    written = [folder / "claims.md", folder / "claims.csv"]
    write_atomic(written[0], claims_markdown(table).encode())
    write_atomic(written[1], table.to_csv(lineterminator="\n").encode())
    return written


def paper_text(claim: Claim) -> str:
    """The paper's side of a claim in a table: "1.5x", "at most 0 nats", "yes"."""
    if claim.rule == "true":
        return "yes"
    if claim.paper is None:
        return _with_unit(f"{'above' if claim.sign > 0 else 'below'} {text(claim.null)}", claim.unit)
    if isinstance(claim.paper, list):
        return _with_unit(" to ".join(text(value) for value in claim.paper), claim.unit)
    prefix = f"{claim.rule} " if claim.rule in ("at least", "at most") else ""
    signed = claim.rule == "effect" and claim.null == 0
    return _with_unit(prefix + text(claim.paper, signed), claim.unit)


def tolerance_text(claim: Claim) -> str:
    """How far off ours may be for the claim to hold: "0.01", "0.5 to 2 times", or nothing."""
    if claim.rule == "effect" and claim.paper is not None:
        return " to ".join(map(text, SAME_SIZE)) + " times"
    return text(claim.tolerance) if claim.tolerance else ""


def ours_text(claim: Claim, ours: Any, verdict: Verdict, source: str) -> str:
    """Our side: the number, with half the interval's width where there is one.

    As in `figures.about`, "≈" marks what may differ on another machine: all but arithmetic and exact counts.
    """
    if ours is None:
        return "–"
    if isinstance(ours, bool):
        return "yes" if ours else "no"
    if source != "recorded" and claim.rule == "at most" and not claim.paper and ours <= claim.tolerance:
        return _with_unit(f"below {text(claim.tolerance)}", claim.unit)  # rounding: its digits say nothing
    exact = source == "arithmetic" or (claim.rule == "equals" and claim.tolerance < 1e-6)
    signed = claim.rule == "effect" and claim.null == 0
    number = text(ours, signed) if exact else "≈" + text(float(f"{ours:.3g}"), signed)
    half = (verdict.high - verdict.low) / 2 if verdict.high is not None else 0
    return _with_unit(number + (f" ± {half:.2g}" if half else ""), claim.unit)


def _row(claim: Claim, record: records.Record | None) -> dict[str, str]:
    stored = record.results if record else {}
    if record:
        # judged anew: what was stored may be older than the rules
        verdict = judge(claim, stored["ours"], stored["spread"], stored["n"], record.config["profile"])
    elif claim.notebook:
        verdict = Verdict(NOT_RUN, f"run notebook {claim.notebook}")
    else:
        verdict = judge(claim, None)
    return {
        "id": claim.id,
        "place": claim.place,
        "claim": claim.statement,
        "paper": paper_text(claim),
        "ours": ours_text(claim, stored.get("ours"), verdict, stored.get("source", "")),
        "tolerance": tolerance_text(claim),
        "verdict": verdict.text,
        "because": verdict.why,
        "scale": record.config["profile"] if record else "",
        "source": stored.get("source", ""),
        "notebook": claim.notebook,
        "key": claim.key,
    }


def _weight(record: records.Record) -> tuple[int, str]:
    return PROFILES.index(record.config["profile"]), record.date


def _with_unit(number: str, unit: str) -> str:
    return number + {"x": "x", "%": " %", "share": "", "accuracy": "", "": ""}.get(unit, f" {unit}")
