"""docs/artifact.md and docs/questions.md: what a claim's row says is what its verdict rests on."""

import re
import shlex

import pytest

from replicate import paper
from replicate.bench import wide
from replicate.bench.command import BENCHMARKS
from replicate.bench.command import _parser as bench_parser
from replicate.diffusion.command import _parser as diffusion_parser
from replicate.paper.table import claims as all_claims
from replicate.paper.table import shipped_table
from replicate.paper.verdicts import DIRECTION, HOLDS, judge
from replicate.report import artifact_page as artifact
from replicate.report import notebooks, pages, step_table, study_tables
from replicate.study import plans, results
from replicate.study.command import _parser as study_parser

TABLE = artifact.claims().set_index("claim")
ACCURACY = {"table4-30k", "table4-40k", "table4-50k", "table4-60k", "table2-1b-accuracy"}
HELD_OUT = {"static-worse", "table4-recovers", "table4-helps", "order", "beyond-width", "beyond-experts"}
HELD_OUT |= {"quantisation-loss"}
NAMED = {*artifact.ARMS, *artifact.BENCHES, *artifact.WIDE, *artifact.DRAWN}
MEASURED = {name for name in NAMED if shipped_table().loc[name, "ours"] != "–"}
OTHER = {"relu2-init", "relu2-trained", "relu2-rises", "warmup-steps", "figure5"}  # no difference of two arms
# Names with digits in them, as in docs/replication.md; any other digit would be a number without a record.
NAMES = re.compile(
    r"\b2:4\b|\b4 of (?:16|32)\b|\b95 % interval|\b[17]B\b|\bH[12]00\b|\b[WLy][12]\b|\bdy1\b|\bP0\b"
    r"|\b(?:Table|figure|section|algorithm|chapter|notebook)s? \d+(?:\.\d+)?|\bTable 3's|arXiv \d{4}\.\d{5}"
)


def cell(name, column):
    return TABLE.loc[f"`{name}`", column]


def test_every_claim_has_a_row():
    assert [name.strip("`") for name in TABLE.index] == list(paper.claims())
    assert NAMED | set(artifact.SEEDS) <= set(paper.claims())


def test_a_claim_from_records_names_them_and_no_other_does():
    shipped = shipped_table()
    for name in paper.claims():
        from_records = shipped.loc[name, "source"] == "recorded" and shipped.loc[name, "ours"] != "–"
        assert from_records == (name in MEASURED), name
        if not from_records:
            assert cell(name, "machine") in ("", "any CPU")


@pytest.mark.parametrize("name", sorted(MEASURED & set(artifact.ARMS) - OTHER))
def test_the_runs_named_give_the_claims_number(name):
    """The difference between the arms, over the seeds, as the claim table has it."""
    row, seeds = shipped_table().loc[name], artifact.SEEDS.get(name, 3)
    frame = study_tables.every_run(row["scale"])
    frame = frame[frame["seed"] <= seeds]
    if name in ACCURACY:
        frame = study_tables.accuracies(frame)
    column = "accuracy" if name in ACCURACY else "valid_loss" if name in HELD_OUT else "final_loss"
    compared = artifact.ARMS[name]
    if len(compared) == 2:
        stats = results.differences(frame, compared[1], column, compared[:1])[compared[0]]
    else:
        stats = results.contrast(frame, compared, column)
    ours, half, n = re.match(r"([+-]?[\d.]+) ± ([\d.]+).* ?\((\d)\)", row["ours"]).groups()
    digits = len(half.partition(".")[2])
    mean = abs(stats.mean) if name.startswith("table3-additive") else stats.mean
    assert f"{mean:.{digits}f}" == f"{float(ours):.{digits}f}", row["ours"]
    wanted = len(artifact.arms(name)) * seeds
    assert f"{(stats.high - stats.low) / 2:.{digits}f}" == half
    assert len(artifact.records(name)) == wanted and stats.n == int(n) == seeds


@pytest.mark.parametrize("name", sorted(artifact.DRAWN))
def test_the_runs_on_pictures_and_clips_give_the_claims_number(name):
    found = {(r.results["arm"], r.seed): r.results["valid"]["poses"]["loss"] for r in artifact.records(name)}
    (_, arm), ours = artifact.DRAWN[name], shipped_table().loc[name, "ours"]
    assert len(found) == 6
    gaps = [found[arm, seed] - found["dense", seed] for seed in (1, 2, 3)]
    digits = len(re.match(r"[+-]?\d+\.(\d+)", ours)[1])
    dense = sum(found["dense", seed] for seed in (1, 2, 3)) / 3
    assert ours.startswith(f"{sum(gaps) / 3 / dense:.{digits}f} ±") and ours.endswith("(3)")


def test_the_mixtures_time_is_the_worst_of_its_timings():
    name, arm = "beyond-experts-time", artifact.WIDE["beyond-experts-time"]
    rows = [row for r in artifact.records(name) for row in wide.rows(r) if row["arm"] == arm]
    worst = max(max(row["x time, 1"], row["x time, 8"]) for row in rows)
    assert len(rows) > 1 and shipped_table().loc[name, "ours"] == f"{worst:.3g}x"


def test_minutes_and_machines_are_those_of_the_records():
    for name in MEASURED:
        found = artifact.records(name)
        assert float(cell(name, "minutes")) == pytest.approx(sum(r.seconds for r in found) / 60, abs=0.06)
        assert set(cell(name, "machine").split(", ")) == {r.device for r in found}
    for name in ("formula-1b", "audit-3", "figure3"):
        book = next(b for b in notebooks.discover() if b.number == paper.claims()[name].notebook)
        assert float(cell(name, "minutes")) == book.minutes("smoke")


def test_every_command_is_one_that_the_package_takes():
    numbers = {book.number for book in notebooks.discover()}
    for name, text in TABLE["command"].items():
        commands = re.findall(r"`(.+?)`", text)
        assert commands or text.startswith("none: "), name
        for command in commands:
            python, _, package, what, *rest = shlex.split(command)
            assert (python, package) == ("python", "replicate")
            if what == "study":
                args = study_parser().parse_args(rest)
                runs = plans.queue(args.profile, args.seeds, args.arms)
                assert args.fresh and args.record and len(runs) == len(args.arms) * len(args.seeds)
            elif what == "diffusion":
                args = diffusion_parser().parse_args(rest)
                kind, arm = artifact.DRAWN[name.strip("`")]
                assert args.fresh and args.record
                assert (args.kind, args.arms) == ([kind], ["dense", arm])
            elif what == "bench":
                args = vars(bench_parser().parse_args(rest))
                assert args["what"] in BENCHMARKS
            else:
                assert (what, rest[:2]) == ("notebooks", ["run", "--only"]) and rest[2] in numbers


@pytest.mark.parametrize("name", [n for n, c in all_claims().items() if c.rule not in ("true", "effect")])
def test_the_tolerance_shown_is_that_of_the_verdict(name):
    """At the number shown a claim holds, a little beyond it does not."""
    claim = paper.claims()[name]
    shown = re.findall(r"[+-]?\d[\d.e-]*", artifact.holds_if(claim).replace("whole interval", ""))
    numbers = [float(number) for number in shown]
    small = 1e-3 * max(claim.tolerance, 1e-6)

    def verdict(ours):
        spread, n = (1e-12, 3) if claim.noisy else (None, 1)
        return judge(claim, ours, spread, n, "paper").text

    if claim.rule == "equals":
        middle, width = numbers[0], numbers[1] if claim.tolerance else 0.0
        assert verdict(middle + width - small * bool(width)) == HOLDS
        assert verdict(middle + width + small) != HOLDS != verdict(middle - width - small)
    else:
        sign = 1 if claim.rule == "at least" else -1
        assert verdict(numbers[0] + sign * small) == HOLDS != verdict(numbers[0] - sign * small)


def test_an_effect_holds_at_half_to_twice_the_papers():
    claim = paper.claims()["step-speedup"]
    assert artifact.holds_if(claim).startswith("0.5 to 2 times the effect of 2.2x")
    gain = claim.paper - 1
    assert judge(claim, 1 + 0.51 * gain, profile="paper").text == HOLDS
    assert judge(claim, 1 + 0.49 * gain, profile="paper").text == DIRECTION


def prose(name):
    text = pages.PAGES[name].path.read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|`[^`\n]*`", "", pages.BLOCK.sub("", text), flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", text)


@pytest.mark.parametrize("name", ["artifact", "questions"])
def test_no_number_is_typed(name):
    assert not re.findall(r".{0,40}\d.{0,20}", NAMES.sub("", prose(name)))


def test_a_question_to_the_authors_is_short_and_has_evidence():
    text = pages.PAGES["questions"].path.read_text(encoding="utf-8")
    questions = [part.partition("\n")[2] for part in text.split("\n## ")[1:]]
    assert len(questions) == 3
    for question in questions:
        shown = re.sub(r"\]\([^)]*\)", "]", re.sub(r"<!--.*?-->", "", question))
        assert len(shown.split()) <= 120 and shown.count("?") >= 2
        assert len(re.findall(r"<!-- value: ", question)) >= 3 and "](replication.md#" in question


def test_what_the_prose_says_of_runs_and_cards():
    later = study_tables.runs("gpu")
    seconds = {True: [], False: []}
    for record in later["record"]:
        seconds["cuda_graph" in record.config].append(record.seconds)
    old, new = (sorted(seconds[k])[len(seconds[k]) // 2] for k in (False, True))
    assert 2 <= old / new <= 4, "between a half and a quarter of the time"
    assert artifact.values()["card, layers"] != step_table.CARD, "the page names two cards"
