"""The study's tables from given runs: any number of seeds, paired, each arm above the dense model."""

import math
from dataclasses import replace

import pandas as pd
import pytest

from replicate import study
from replicate.report import study_tables
from replicate.study import plans, records, results, statistics


def frame(**arms):
    """Runs of arms with given losses, by seed from 1."""
    rows = [
        {"arm": arm.replace("_", "+"), "seed": seed, "valid_loss": loss}
        for arm, losses in arms.items()
        for seed, loss in enumerate(losses, 1)
    ]
    return pd.DataFrame(rows)


def test_arms_of_one_to_three_seeds():
    runs = frame(dense=[1.0, 2.0, 4.0], w1=[1.5], w2=[1.25, 2.75], w1_w2=[2.0, 3.0, 5.5])
    one = study_tables.contrast(runs, ("w1",), "valid_loss")
    assert study_tables.cells(one, "x") == {"x": "+0.5000", "sd x": "", "95 % x": ""}
    assert study_tables.sentence(one) == "+0.500 nats (n = 1)"
    two = study_tables.contrast(runs, ("w2",), "valid_loss")
    assert two.n == 2 and two.mean == 0.5 and study_tables.cells(two, "x")["95 % x"].startswith("-2.6")
    three = study_tables.contrast(runs, ("w1+w2",), "valid_loss")
    assert three.n == 3 and math.isclose(three.mean, 3.5 / 3)
    beyond = study_tables.contrast(runs, ("w1+w2", "w1", "w2"), "valid_loss")  # only seed 1 has all
    assert beyond.n == 1 and beyond.mean == 1.0 - 0.5 - 0.25
    assert study_tables.contrast(runs, ("recipe",), "valid_loss") is None
    assert set(study_tables.cells(None, "x").values()) == {""}


def test_fp8_is_judged_by_what_it_costs_beyond_the_sum(monkeypatch):
    arms = {"dense": [1.0, 2.0, 4.0], "dense, FP8": [1.1, 2.1, 4.1], "venom16": [1.5, 2.5, 4.5]}
    arms["venom16, FP8"] = [1.61, 2.62, 4.63]
    for there, expected in ((arms, 0.02), (dict(list(arms.items())[:-1]), None)):
        monkeypatch.setattr(study_tables, "runs", lambda scale, there=there: frame(**there))
        found = study_tables.fp8_beyond_sum("gpu")
        assert found is None if expected is None else found.mean == pytest.approx(expected)


def test_an_answer_to_every_open_question_has_its_row():
    table = study_tables.opened()
    arms = [arm for _, _, several in plans.OPEN for arm in several]
    assert table["arm"].tolist() == arms and len(set(arms)) == len(arms)
    assert set(arms) | {base for _, base, _ in plans.OPEN} <= set(plans.everything("gpu", (1,)))
    for scale in study_tables.SCALES:
        there = table[f"n, {scale}"] != ""
        assert (there == (table[scale] != "not run")).all() and there.any()


def test_surely_is_said_by_holm_over_a_scale_s_rows():
    table, answers = study_tables.opened(), study_tables.open_questions()
    for scale in study_tables.SCALES:
        family = {i: found[scale] for i, (*_, found) in enumerate(answers) if scale in found}
        sure = statistics.holm({i: statistics.p_value(s) for i, s in family.items() if s.n > 2})
        assert set(table.index[table[f"surely, {scale}"] != ""]) == sure
        assert 0 < len(sure) < sum(s.n > 2 and s.low * s.high > 0 for s in family.values()), "it corrects"
        for i in sure:
            assert table.loc[i, f"surely, {scale}"] == ("more" if family[i].mean > 0 else "less")


def test_a_row_says_if_it_rests_on_a_cpu_s_text():
    table = study_tables.opened().set_index("arm")
    assert table.loc["venom16, l2", "n, laptop"].endswith("3, CPU")
    assert table.loc["w1, same", "n, laptop"] == "3"
    arms = study_tables.recipe_sparse("laptop").set_index("arm")["trained on"]
    assert arms["venom16"] == "a GPU" and arms["venom16, 64 clusters"].startswith("a CPU")
    assert "trained on" not in study_tables.recipe_sparse("gpu")


def test_arms_of_the_study_have_names_and_distinct_configurations():
    plan = plans.everything("smoke", (1, 2))
    configs = [config for arm in plan.values() for config in arm]
    assert len(set(configs)) == len(configs) == 2 * len(plan)
    assert plans.some(["recipe", "dense"], (1,), "smoke") == {k: plan[k][:1] for k in ("recipe", "dense")}
    with pytest.raises(ValueError, match="no arm 'nothing'"):
        plans.some(["nothing"], (1,), "smoke")


def test_arms_on_english_stand_above_the_dense_model_that_read_it():
    frame = results.recorded_study("gpu", english=True)
    assert set(frame["arm"]) == set(plans.IN_ENGLISH) and not frame["arm"].str.contains("English").any()
    assert len({record.corpus["sha256"] for record in frame["record"]}) == 1
    assert not results.recorded_study("gpu")["arm"].str.contains("English").any()
    loss = frame.pivot(index="seed", columns="arm", values="final_loss")
    gap = (loss["venom16"] - loss["dense"]).mean()
    row = next(line for line in study_tables.english(frame).splitlines() if line.startswith("| venom16"))
    assert f"{gap:.3f}" in row
    above = {arm: study_tables.contrast(frame, (arm,), study_tables.HELD) for arm in plans.IN_ENGLISH[1:]}
    order = ["act24", "active16, 64 clusters", "venom16", "recipe, same", "recipe"]
    assert sorted(above, key=lambda arm: above[arm].mean) == order, "what docs/replication.md says"
    assert above["act24"].low < 0 < above["act24"].high and above["venom16"].low > 0
    train = {arm: study_tables.contrast(frame, (arm,), study_tables.TRAIN).mean for arm in above}
    assert all(train[arm] > above[arm].mean for arm in order[1:])


def test_dense_again_counts_only_where_the_arm_ran_on_that_card(monkeypatch):
    def run(arm, seed, loss, device, kind="train"):
        (config,) = study.arms("gpu40m", [arm], [seed])
        made = records.make_record(kind, config, {"final_loss": loss, "valid_loss": loss})
        return replace(made, device=device)

    first = [("recipe", run("recipe", seed, 1.5 + seed, f"card {seed}")) for seed in (1, 2, 3)]
    again = tuple(("dense", run("dense", s, 1.0 + 1.1 * s, "card 1", "rerun-1")) for s in (1, 2))
    named = [("recipe", (record, "recorded")) for _, record in first]
    made = results.frame([found for _, found in named], [name for name, _ in named])
    monkeypatch.setattr(study_tables, "runs", lambda scale: made)
    monkeypatch.setattr(study_tables.noise, "recorded", lambda scale, kind="train": again)
    found = study_tables.on_one_card("gpu40m", "recipe")
    assert (found.n, found.mean) == (1, pytest.approx(0.4)), "seed 2 ran on another card, 3 has no dense"
    assert study_tables.on_one_card("gpu40m", "w1") is None


def test_arms_by_size_are_those_of_the_report():
    found = study_tables.by_size()
    assert list(found) == list(plans.AT_100M[1:])
    for arm, each in found.items():
        for scale, stats in each.items():
            runs = study_tables.runs(scale).set_index(["arm", "seed"])["valid_loss"]
            assert stats.mean == pytest.approx((runs[arm] - runs["dense"]).mean())
    assert study_tables.size_table().set_index("arm").loc["recipe", "gpu"].endswith("(3)")
