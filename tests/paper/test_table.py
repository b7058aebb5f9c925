import json
from dataclasses import replace

import pytest

from replicate.paper import printed
from replicate.paper import table as claims
from replicate.paper.verdicts import DIRECTION, FAILS, HOLDS, UNTESTABLE, VERDICTS, judge
from replicate.settings.presets import MODEL_PRESETS, SPARSITY_PRESETS
from replicate.study import records
from replicate.system import paths


@pytest.fixture
def store(tmp_path):
    return records.RecordStore(root=tmp_path / "runs", recorded=tmp_path / "recorded")


def test_tables_have_the_papers_rows():
    assert [len(printed.rows(n)) for n in (1, 2, 3, 4, 5)] == [2, 4, 8, 5, 3]
    assert printed.rows(2)[1]["speedup"] == 1.352
    assert printed.rows(4)[-1]["avg"] == 0.467
    with pytest.raises(ValueError, match="no table 6"):
        printed.rows(6)


def test_shapes_agree_with_the_presets():
    for name, preset in (("1B", "llama1b"), ("7B", "llama7b")):
        ours, theirs = printed.model(name), MODEL_PRESETS[preset]
        for field in ("n_layer", "d_model", "d_ff", "n_head", "seq_len", "vocab_size"):
            assert getattr(ours, field) == getattr(theirs, field)
    assert {row["preset"] for row in printed.rows(3)} <= set(SPARSITY_PRESETS)


def test_unknown_names_are_refused_with_near_ones():
    with pytest.raises(ValueError, match="table5-16"):
        claims.check("table5-15", source="here")
    with pytest.raises(ValueError, match="unknown number"):
        printed.number("speed")
    with pytest.raises(ValueError, match="405B"):
        printed.model("400B")


def test_the_costs_in_table_3_are_those_of_its_losses():
    losses = {row["sparse"]: row["loss"] for row in printed.rows(3)}
    for claim_id, row in (
        ("table3-w1", "W1"),
        ("table3-w1-w1t", "W1 + W1^T"),
        ("table3-w2", "W2"),
        ("table3-w2-w2t", "W2 + W2^T"),
        ("table3-w1-w2", "W1, W2"),
        ("table3-venom", "Venom"),
    ):
        assert claims.claims()[claim_id].paper == pytest.approx(losses[row] - losses["dense"])


def test_claims_are_well_formed():
    for claim in claims.claims().values():
        assert claim.place, claim.id
        assert claim.how, claim.id
        assert claim.statement.strip() == claim.statement
        assert not claim.statement.endswith(".")
        assert claim.notebook == "" or claim.notebook in {f"{i:02d}" for i in range(15)}
        assert not (claim.holds_from != "smoke" or claim.fails_from != "smoke") or claim.needs, claim.id
        assert not claim.noisy or claim.unit in ("nats", "accuracy", "share"), claim.id
        assert claims.paper_text(claim)


def test_check_keeps_the_verdict_and_the_table_shows_it(store):
    row = claims.check("table5-16", 87.5, source="here", store=store)
    assert row.verdict.text == HOLDS
    table = claims.claim_table(store=store, shipped=None)
    assert list(table.index) == list(claims.claims())
    assert table.loc["table5-16", "verdict"] == HOLDS
    assert table.loc["table5-16", "ours"] == "87.5 %"
    assert table.loc["table5-32", "verdict"] == claims.NOT_RUN
    assert table.loc["moe", "verdict"] == UNTESTABLE
    stored, _ = store.find("claim", {"claim": "table5-16", "profile": "smoke"})
    assert stored.results["source"] == "here"


def test_a_broken_claim_is_kept_and_raises(store):
    with pytest.raises(claims.ClaimBroken, match="table5-16"):
        claims.check("table5-16", 75.0, source="here", store=store)
    assert claims.claim_table(store=store, shipped=None).loc["table5-16", "verdict"] == FAILS


def test_a_finding_that_no_longer_stands_raises(store):
    row = claims.check("audit-1", 0.508, profile="paper", source="arithmetic", store=store)
    assert row.verdict.text == FAILS
    with pytest.raises(claims.ClaimBroken, match="audit-1"):
        claims.check("audit-1", 0.467, profile="paper", source="arithmetic", store=store)


def test_digits_follow_what_a_number_rests_on():
    def shown(claim, ours, source):
        verdict = judge(claims.claims()[claim], ours)
        return claims.ours_text(claims.claims()[claim], ours, verdict, source, 1)

    assert shown("audit-4", 0.42448, "arithmetic") == "0.4245"
    assert shown("audit-4", 0.42448, "recorded") == "0.424"
    assert shown("table5-64", 96.875, "here") == "96.875 %"


def test_a_claim_we_do_not_stand_by_may_fail(store):
    row = claims.check("table3-w1", -0.05, spread=0.001, n=3, profile="gpu", source="recorded", store=store)
    assert row.verdict.text == FAILS


def test_the_largest_scale_wins_then_the_latest(store):
    for profile, ours in (("gpu", 0.03), ("smoke", -0.9), ("laptop", 0.2)):
        claims.check("table3-w1", ours, spread=0.001, n=3, profile=profile, source="recorded", store=store)
    assert claims.claim_table(store=store, shipped=None).loc["table3-w1", ["scale", "verdict"]].tolist() == [
        "gpu",
        HOLDS,
    ]
    at_smoke = claims.claim_table("smoke", store, None).loc["table3-w1"]
    assert (at_smoke["scale"], at_smoke["verdict"]) == ("smoke", UNTESTABLE)
    assert claims.claim_table("laptop", store, None).loc["table3-w1", "verdict"] == DIRECTION
    assert claims.claim_table("laptop", store, None).loc["order", "verdict"] == claims.NOT_RUN
    with pytest.raises(ValueError, match="profile is 'desk'"):
        claims.claim_table("desk", store)


def test_a_verdict_on_a_claim_worded_otherwise_since_is_void(store, monkeypatch):
    claims.check("table5-16", 87.5, source="here", store=store)
    changed = {entry["id"]: entry for entry in json.loads(json.dumps(printed.data()["claims"]))}
    changed["table5-16"]["tolerance"] = 1.0
    monkeypatch.setattr(claims, "data", lambda: {"claims": list(changed.values())})
    claims.claims.cache_clear()
    assert claims.claim_table(store=store, shipped=None).loc["table5-16", "verdict"] == claims.NOT_RUN
    monkeypatch.undo()
    claims.claims.cache_clear()


def test_show_has_the_four_columns_in_full(store):
    recorded = {"source": "recorded", "store": store}
    rows = [
        claims.check("figure6-speedup", 1.48, spread=0.01, n=5, profile="gpu", **recorded),
        claims.check("table3-printed-sum", 0.053, profile="paper", source="arithmetic", store=store),
        claims.check("figure3", True, source="here", store=store),
        claims.check("moe", source="here", store=store),
    ]
    frame = claims.show(rows)
    assert {"paper", "ours", "tolerance", "verdict"} <= set(frame.columns)
    assert frame["verdict"].tolist() == [HOLDS, FAILS, HOLDS, UNTESTABLE]
    assert frame["paper"].tolist()[:3] == ["1.5x", "0.086 nats", "yes"]
    assert frame["ours"].tolist() == ["1.480 ± 0.012x (5)", "0.053 nats", "yes", "–"]
    assert frame["numbers"].tolist()[:3] == ["recorded, gpu scale", "arithmetic", "checked here"]
    page = frame._repr_html_()
    assert "..." not in repr(frame)
    assert all(row.claim.statement in repr(frame) for row in rows)
    assert claims.COLOURS[FAILS] in page
    assert "<b" in page


def test_a_long_table_folds_what_decides_nothing_and_smaller_scales(store):
    recorded = {"n": 5, "source": "recorded", "store": store}
    large = claims.check("figure6-speedup", 1.48, spread=0.01, profile="gpu", **recorded)
    small = claims.check("figure6-speedup", 1.44, spread=0.01, profile="laptop", **recorded)
    open_ = claims.check("moe", source="here", store=store)
    frame = claims.show([small, large, open_] + [large] * (claims.LONG - 2))
    shown, folded = frame._repr_html_().split("<details>")
    assert shown.count("1.480 ±") == claims.LONG - 1 and "1.440 ±" not in shown
    assert "1.440 ±" in folded and open_.claim.statement in folded and "1.480 ±" not in folded
    assert "1 of smaller scales" in folded and f"1 {UNTESTABLE}" in folded and len(frame) == claims.LONG + 1
    assert "<details>" not in claims.show([small, large, open_])._repr_html_(), "short tables stay whole"


def test_an_aim_of_ours_is_judged_and_shown_but_not_stored(store, monkeypatch):
    monkeypatch.setattr(claims.records, "RecordStore", lambda: store)
    fixed = {"id": "", "place": "chapter 13", "unit": "x", "tolerance": 0.0, "how": "", "notebook": "13"}
    aim = claims.Claim(statement="an aim", paper=3.0, rule="at least", stand_by=False, **fixed)
    row = claims.judged(aim, 2.2, profile="gpu", source="recorded")
    assert row.verdict.text == FAILS and not list(store.all("claim"))
    frame = claims.show([row], against="aim")
    assert list(frame.columns) == ["aim", "ours", "tolerance", "verdict", "numbers"]
    assert frame.loc["an aim", "aim"] == "at least 3x" and claims.COLOURS[FAILS] in frame._repr_html_()
    with pytest.raises(claims.ClaimBroken, match="chapter 13"):
        claims.judged(replace(aim, stand_by=True), 2.2, profile="gpu", source="recorded")


def test_what_this_run_trained_is_not_judged(store):
    for claim, source in (("table5-16", "fresh"), ("table3-w1", "here"), ("order", "cached")):
        with pytest.raises(ValueError, match=f"{claim}: source is '{source}'.*recorded runs"):
            claims.check(claim, 0.1, source=source, store=store)
    assert not store.all("claim")


def test_a_rounding_error_is_shown_by_its_limit(store):
    pages = [
        repr(claims.show([claims.check("figure4d-same", error, source="here", store=store)]))
        for error in (3.01e-07, 1.94e-07)
    ]
    assert pages[0] == pages[1] and "below 1e-05" in pages[0]
    with pytest.raises(claims.ClaimBroken):
        claims.check("figure4d-same", 2e-5, source="here", store=store)


def test_what_was_not_run_here_has_the_shipped_verdict(store, tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICATE_FIGURES", str(tmp_path))
    claims.check("table3-w1", 0.03, spread=0.001, n=3, profile="gpu", source="recorded", store=store)
    shipped = claims.write_claims(claims.claim_table(store=store, shipped=None))[1]
    nothing = type(store)(root=tmp_path / "none", recorded=tmp_path / "none")
    assert claims.claim_table(store=nothing, shipped=shipped).loc["table3-w1", "verdict"] == HOLDS
    assert claims.claim_table("laptop", nothing, shipped).loc["table3-w1", "verdict"] == claims.NOT_RUN
    claims.check("table3-w1", 0.2, spread=0.001, n=3, profile="gpu", source="recorded", store=store)
    assert claims.claim_table(store=store, shipped=shipped).loc["table3-w1", "verdict"] == DIRECTION
    reworded = shipped.read_text(encoding="utf-8").replace(claims.claims()["table3-w1"].key, "0" * 16)
    shipped.write_text(reworded, encoding="utf-8")
    assert claims.claim_table(store=nothing, shipped=shipped).loc["table3-w1", "verdict"] == claims.NOT_RUN


def test_the_claim_files_are_written_and_say_the_counts(store, monkeypatch, tmp_path):
    monkeypatch.setenv("REPLICATE_FIGURES", str(tmp_path / "figures"))
    claims.check("table5-64", 96.875, source="here", store=store)
    table = claims.claim_table(store=store, shipped=None)
    written = claims.write_claims(table)
    markdown = written[0].read_text(encoding="utf-8")
    assert markdown.startswith(f"{len(claims.claims())} claims, 10 of them our own: 1 hold")
    assert markdown.count("\n") == len(claims.claims()) + 4
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "table5-64" in written[1].read_text(encoding="utf-8")
    assert paths.figures_dir() == written[0].parent
    assert all(name in (*VERDICTS, claims.NOT_RUN) for name in table["verdict"])


def test_a_table_without_a_new_claim_says_how_to_get_it(store, tmp_path):
    lines = claims.SHIPPED.read_text().splitlines(keepends=True)
    path = tmp_path / "claims.csv"
    path.write_text("".join(line for line in lines if not line.startswith("beyond-clips-24,")))
    with pytest.raises(
        ValueError, match=r"lacks beyond-clips-24; run .*notebooks run --only 14.*claims --write"
    ):
        claims.shipped_table(path)
    assert claims.claim_table(store=store, shipped=path).loc["beyond-clips-24", "verdict"] == claims.NOT_RUN


def test_claims_that_only_a_rule_spares_are_counted():
    shipped = claims.shipped_table()
    spared = claims.spared(shipped)
    assert (
        {"table4-recovers", "figure5"} <= set(spared) < set(shipped.index[shipped["verdict"] == VERDICTS[-1]])
    )
    assert "table2-7b-loss" not in spared, "nothing was measured"
