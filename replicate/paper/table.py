"""The claims of the paper and of ours beyond it, and the table that says of each whether it holds."""

import dataclasses
import html
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from replicate.paper import verdicts
from replicate.paper.printed import data, named
from replicate.paper.verdicts import FAILS, HOLDS, PROFILES, VERDICTS, Claim, Verdict, judge, text
from replicate.study import records
from replicate.system import paths
from replicate.system.files import write_atomic

NOT_RUN = "not run"
# Of a verdict, in a count
_SEVERAL = {HOLDS: "hold", verdicts.DIRECTION: "hold in direction", FAILS: "do not hold"}
# Where a judged number comes from. What this run trained is shown and never judged: a verdict that hangs on a
# seed or a processor is none.
SOURCES = {"recorded": "recorded", "arithmetic": "arithmetic", "here": "checked here"}
LONG = 8  # rows of a check cell's table that a reader takes in
SHIPPED = paths.ROOT / "figures" / "claims.csv"
COLOURS = dict(zip(VERDICTS, ("#1b7837", "#5a7d1b", "#8c510a", "#b2182b", "#6b6b6b"))) | {NOT_RUN: "#6b6b6b"}


class ClaimTable(pd.DataFrame):
    """A data frame that shows its cells in full and colours the verdict; rows may be folded, see `show`."""

    def __repr__(self) -> str:
        return self.to_string()

    def _repr_html_(self) -> str:
        shown = pd.DataFrame(self).reset_index().map(html.escape)
        colours = shown["verdict"].map(COLOURS)
        shown["verdict"] = '<b style="color:' + colours + '">' + shown["verdict"] + "</b>"
        folded = pd.Series(self.attrs.get("folded", [""] * len(shown)), dtype=str)
        rows = {"index": False, "escape": False, "justify": "left", "border": 0}
        table = shown[folded == ""].to_html(**rows)
        if len(rest := folded[folded != ""]):
            why = ", ".join(f"{n} {why}" for why, n in rest.value_counts().items())
            table += f"<details><summary>and {why}</summary>{shown.loc[rest.index].to_html(**rows)}</details>"
        return table.replace("<td>", '<td style="text-align: left">')


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
    n: int


@lru_cache(maxsize=1)
def claims() -> dict[str, Claim]:
    """Every claim by id, in the order of the claim table."""
    return {entry["id"]: Claim(**entry) for entry in data()["claims"]}


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
    """Judge a claim (see `judge`), keep the verdict as a record of kind "claim", return the row to show.

    Args:
        source: where the numbers come from: "recorded", "arithmetic", or "here" (no profile then) for what
            any run must find, a format or a gradient, never a loss.

    Raises ClaimBroken if we stand by the claim and the verdict contradicts it; ValueError for another source.
    """
    found = named(claims(), claim_id, "claim")
    if source not in SOURCES or (found.noisy and source != "recorded"):
        raise ValueError(
            f"claim {claim_id}: source is {source!r}; choose one of {', '.join(SOURCES)}, and recorded runs "
            "for a claim about training"
        )
    verdict = judge(found, ours, spread, n, profile)
    value, spread, n = verdicts.unpack(ours, spread, n)
    results = {"key": found.key, "ours": value, "spread": spread, "n": n, "source": source}
    results |= dataclasses.asdict(verdict)
    record = records.make_record("claim", {"claim": claim_id, "profile": profile}, results)
    (store or records.RecordStore()).put(record)
    return _stood_by(CheckRow(found, value, verdict, profile, source, n))


def judged(claim: Claim, ours: Any, *, profile: str, source: str) -> CheckRow:
    """The row of a claim that is none of the paper's, such as an aim of ours: nothing is stored.

    Raises ClaimBroken as `check` does.
    """
    return _stood_by(CheckRow(claim, ours, judge(claim, ours, profile=profile), profile, source, 1))


def _stood_by(row: CheckRow) -> CheckRow:
    found, verdict = row.claim, row.verdict
    against = (FAILS,) if found.expected == HOLDS else VERDICTS[:3]
    if found.stand_by and verdict.text in against:
        said = f"{found.id} ({found.place}): {found.statement}".lstrip()
        raise ClaimBroken(f"{said}. Verdict: {verdict.text}, {verdict.why}")
    return row


def show(check_rows: Iterable[CheckRow], against: str = "paper") -> pd.DataFrame:
    """The check cell's table: paper | ours | tolerance | verdict, one claim a row.

    Of more than `LONG` rows a notebook folds those that decide nothing and those of a claim that is judged
    at a larger scale too. `against`: the first column's name, if it is not the paper; then without a reason.
    """
    found = list(check_rows)
    rows = [
        _cells(row.claim, row.ours, row.verdict, row.source, row.n)
        | {"numbers": f"recorded, {row.profile} scale" if row.source == "recorded" else SOURCES[row.source]}
        for row in found
    ]
    shown = pd.DataFrame(rows).rename(columns={"paper": against}).set_index("claim")
    table = ClaimTable(shown if against == "paper" else shown.drop(columns="because"))
    if len(found) > LONG:
        scale = pd.Series([PROFILES.index(row.profile) for row in found])
        largest = scale.groupby([row.claim.id + row.claim.statement for row in found]).transform("max")
        why = shown["verdict"].where(shown["verdict"] == verdicts.UNTESTABLE, "")
        table.attrs["folded"] = why.mask((scale < largest).to_numpy(), "of smaller scales").tolist()
    return table


def claim_table(
    profile: str | None = None, store: records.RecordStore | None = None, shipped: Path | None = SHIPPED
) -> pd.DataFrame:
    """Every claim with its verdict: the latest found here, else the shipped one, else "not run".

    Args:
        profile: only verdicts on numbers of this scale; None takes the largest there is, then the latest.
        shipped: the project's claim table, figures/claims.csv; None leaves it out.
    """
    if profile is not None and profile not in PROFILES:
        raise ValueError(f"profile is {profile!r}; choose one of {', '.join(PROFILES)}")
    usable = [
        record
        for record, _ in (store or records.RecordStore()).all("claim")
        if (known := claims().get(record.config["claim"])) and record.results["key"] == known.key
        if record.results["source"] in SOURCES and profile in (None, record.config["profile"])
    ]
    by_weight = sorted(usable, key=lambda r: (PROFILES.index(r.config["profile"]), r.date))
    best = {record.config["claim"]: record for record in by_weight}
    stored = _read(shipped).to_dict("index") if shipped and shipped.exists() else {}
    rows = []
    for name, found in claims().items():
        old = stored.get(name)
        if name not in best and old and old["key"] == found.key and profile in (None, old["scale"]):
            rows.append({"id": name, **old})
        else:
            rows.append(_row(found, best.get(name)))
    return ClaimTable(pd.DataFrame(rows).set_index("id"))


def shipped_table(path: Path = SHIPPED) -> pd.DataFrame:
    """The project's claim table, by claim id, as `write_claims` left it.

    Raises FileNotFoundError, or ValueError if a claim of data/paper.json is not in it.
    """
    table = _read(path)
    if missing := [name for name in claims() if name not in table.index]:
        books = " ".join(sorted({claims()[name].notebook for name in missing}))
        raise ValueError(
            f"{path.name} lacks {', '.join(missing)}; run `python -m replicate notebooks run --only {books}` "
            "and `python -m replicate claims --write`"
        )
    return table


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, index_col="id", dtype=str, keep_default_na=False)


def verdict_counts(table: pd.DataFrame) -> str:
    """One line: how many claims got which verdict, and how many are not the paper's."""
    counts = table["verdict"].value_counts()
    parts = [f"{counts[name]} {_SEVERAL.get(name, name)}" for name in (*VERDICTS, NOT_RUN) if name in counts]
    own = (table["place"] == "Beyond the paper").sum()
    of_ours = f", {own} of them our own" if 0 < own < len(table) else ""
    return f"{len(table)} claims{of_ours}: {', '.join(parts)}"


def spared(table: pd.DataFrame) -> list[str]:
    """Claims of which our whole interval says no, at a scale whose numbers may refute nothing of the kind."""
    untestable = table[table["verdict"] == verdicts.UNTESTABLE]
    return untestable.index[untestable["because"].str.contains(verdicts.SPARES, regex=False)].tolist()


def claims_markdown(table: pd.DataFrame) -> str:
    """The claim table in Markdown."""
    columns = ["place", "claim", "paper", "ours", "verdict", "because", "scale", "notebook"]
    lines = [verdict_counts(table), "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in table[columns].astype(str).values:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def write_claims(table: pd.DataFrame) -> list[Path]:
    """Write figures/claims.md and figures/claims.csv; returns their paths."""
    texts = {"claims.md": claims_markdown(table), "claims.csv": table.to_csv(lineterminator="\n")}
    for name, content in texts.items():
        write_atomic(paths.figures_dir() / name, content.encode())
    return [paths.figures_dir() / name for name in texts]


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


def ours_text(claim: Claim, ours: Any, verdict: Verdict, source: str, n: int) -> str:
    """Our side: "0.210 ± 0.015 nats (3)", with half of the interval and the number of runs if there are some.

    As in `figures.about`, "≈" marks what may differ on another machine: what was measured here.
    """
    if ours is None:
        return "–"
    if isinstance(ours, bool):
        return "yes" if ours else "no"
    if source != "recorded" and claim.rule == "at most" and not claim.paper and ours <= claim.tolerance:
        return _with_unit(f"below {text(claim.tolerance)}", claim.unit)  # rounding: its digits say nothing
    signed = claim.rule == "effect" and claim.null == 0
    half = (verdict.high - verdict.low) / 2 if verdict.high is not None else 0
    if half:
        digits = max(0, 1 - math.floor(math.log10(half)))  # two of the half-width
        number = f"{ours:{'+' if signed else ''}.{digits}f} ± {half:.{digits}f}"
        return f"{_with_unit(number, claim.unit)} ({n})"
    exact = claim.rule == "equals" and claim.tolerance < 1e-6
    digits = 5 if exact else 4 if source == "arithmetic" else 3
    about = "≈" if source == "here" and not exact else ""
    return about + _with_unit(text(float(f"{ours:.{digits}g}"), signed), claim.unit)


def _row(claim: Claim, record: records.Record | None) -> dict[str, str]:
    stored = record.results if record else {}
    if record:
        # judged anew: what was stored may be older than the rules
        verdict = judge(claim, stored["ours"], stored["spread"], stored["n"], record.config["profile"])
    elif claim.notebook:
        verdict = Verdict(NOT_RUN, f"run notebook {claim.notebook}")
    else:
        verdict = judge(claim, None)
    source = stored.get("source", "")
    cells = _cells(claim, stored.get("ours"), verdict, source, stored.get("n", 1))
    row = {"id": claim.id, "place": claim.place} | cells
    row |= {"scale": record.config["profile"] if record else "", "source": source}
    return row | {"notebook": claim.notebook, "key": claim.key}


def _cells(claim: Claim, ours: Any, verdict: Verdict, source: str, n: int) -> dict[str, str]:
    """What a check cell and the claim table both show. tolerance: how far off ours may be to hold."""
    tolerance = text(claim.tolerance) if claim.tolerance else ""
    if claim.rule == "effect" and claim.paper is not None:
        tolerance = " to ".join(map(text, verdicts.SAME_SIZE)) + " times"
    shown = {"claim": claim.statement, "paper": paper_text(claim)}
    shown |= {"ours": ours_text(claim, ours, verdict, source, n), "tolerance": tolerance}
    return shown | {"verdict": verdict.text, "because": verdict.why}


def _with_unit(number: str, unit: str) -> str:
    return number + {"x": "x", "%": " %", "share": "", "accuracy": "", "": ""}.get(unit, f" {unit}")
