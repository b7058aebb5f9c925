import pytest

from replicate.config import SparsityConfig
from replicate.paper import audit
from replicate.paper.printed import rows
from replicate.paper.table import check, claims
from replicate.paper.verdicts import FAILS, HOLDS
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.study import records

FINDINGS = {finding.claim: finding for finding in audit.findings()}


@pytest.mark.parametrize(
    ("claim", "follows", "digits"),
    [
        ("audit-1", 0.508, 3),
        ("audit-2", 1.13, 2),
        ("audit-2-limit", 1.263, 3),
        ("audit-3", 1.352, 3),
        ("audit-3-text", 2.087, 3),
        ("audit-4", 0.42, 2),
        ("audit-4-7b", 0.53, 2),
        ("audit-4-step", 1.41, 2),
        ("audit-6", 3.8, 1),
        ("audit-6-80", 50, 0),
        ("audit-7", 0, 0),
    ],
)
def test_each_item_comes_out_as_recomputed_by_hand(claim, follows, digits):
    assert round(FINDINGS[claim].follows, digits) == follows


def test_all_seven_items_are_there_and_every_claim_of_notebook_11_is_judged(tmp_path):
    store = records.RecordStore(root=tmp_path, recorded=tmp_path / "none")
    assert {finding.item for finding in FINDINGS.values()} == set(range(8))
    assert set(FINDINGS) == {claim.id for claim in claims().values() if claim.notebook == "11"}
    for finding in FINDINGS.values():
        row = check(finding.claim, finding.follows, profile="paper", source="arithmetic", store=store)
        assert row.verdict.text == (HOLDS if finding.claim == "audit-3" else FAILS)
        assert finding.arithmetic
        assert finding.printed == pytest.approx(claims()[finding.claim].paper)


def test_the_other_averages_of_tables_2_and_4_are_right():
    wrong = [row for row in rows(2) + rows(4) if abs(audit.mean_accuracy(row) - row["avg"]) > 0.0005 + 1e-9]
    assert wrong == [rows(4)[-1]]


def test_standard_errors_by_hand():
    # .5 against .6 over 100: 0.1 / sqrt((.25 + .24) / 100) = 0.1 / 0.07
    assert audit.standard_errors(0.6, 0.5, 100) == pytest.approx(0.1 / 0.07)
    assert audit.standard_errors(0.5, 0.6, 100) == pytest.approx(-0.1 / 0.07)
    for bad in ((0.0, 0.5, 10), (0.5, 0.5, 0)):
        with pytest.raises(ValueError, match="items"):
            audit.standard_errors(*bad)


def test_a_row_that_measured_the_recipe_would_be_found(monkeypatch):
    assert audit.matching_rows() == []
    assert audit.matching_rows("venom16") == ["Venom"]
    monkeypatch.setitem(SPARSITY_PRESETS, "venom16", SparsityConfig(w1=True, w2_t=True, activation="venom"))
    assert audit.matching_rows() == ["Venom"]


def test_no_move_on_a_benchmark_reaches_two_standard_errors():
    moves = audit.accuracy_moves()
    assert len(moves) == 12
    assert max(abs(move["standard errors"]) for move in moves) < 2
