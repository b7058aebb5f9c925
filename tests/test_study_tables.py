"""The study's tables from given runs: any number of seeds, paired, each arm above the dense model."""

import math

import pandas as pd
import pytest

from replicate import plans, records, step_table, study_tables


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
    assert two.n == 2 and two.mean == 0.5 and study_tables.cells(two)["95 %"].startswith("-2.6")
    three = study_tables.contrast(runs, ("w1+w2",), "valid_loss")
    assert three.n == 3 and math.isclose(three.mean, 3.5 / 3)
    beyond = study_tables.contrast(runs, ("w1+w2", "w1", "w2"), "valid_loss")  # only seed 1 has all
    assert beyond.n == 1 and beyond.mean == 1.0 - 0.5 - 0.25
    assert study_tables.contrast(runs, ("recipe",), "valid_loss") is None
    assert set(study_tables.cells(None).values()) == {""}


def test_an_answer_to_every_open_question_has_its_row():
    table = study_tables.opened()
    arms = [arm for _, _, several in plans.OPEN for arm in several]
    assert table["arm"].tolist() == arms and len(set(arms)) == len(arms)
    assert set(arms) | {base for _, base, _ in plans.OPEN} <= set(plans.everything("gpu", (1,)))
    for scale in study_tables.SCALES:
        there = table[f"n, {scale}"] != ""
        assert (there == (table[scale] != "not run")).all() and there.any()


def test_showing_makes_no_results():
    assert {"report", "study_tables"} <= records.SHOWING


@pytest.mark.parametrize("scale", ["gpu", "gpu40m"])
def test_the_time_to_a_loss_is_steps_times_a_step(scale):
    target, card, table = study_tables.time_to_loss(scale, ("dense", "act24", "recipe"))
    assert card == step_table.CARD
    ends = study_tables.runs(scale).query("arm == 'recipe'")["valid_loss"]
    assert ends.max() <= target < ends.max() + 0.001
    table = table.set_index("arm")
    dense, recipe = table.loc["dense"], table.loc["recipe"]
    assert dense["seconds"] == pytest.approx(dense["steps"] * dense["ms a step"] / 1000)
    warm = plans.everything(scale)["recipe"][0].dense_warmup
    steps = warm * dense["ms a step"] + (recipe["steps"] - warm) * recipe["ms a step"]
    assert recipe["seconds"] == pytest.approx(steps / 1000)
    assert recipe["from"] <= recipe["seconds"] <= recipe["to"] and dense["to the loss"] == 1


def test_an_arm_that_never_gets_there_or_ends_dense_has_no_time():
    with pytest.raises(ValueError, match=r"'venom64' never comes down to 1.665 nats; leave"):
        study_tables.time_to_loss("gpu", ("dense", "venom64"))
    runs = study_tables.runs("gpu")
    half = runs.assign(arm=runs["arm"].replace({"recipe": "-", study_tables.HALF: "recipe"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_tables, "runs", lambda scale: half)
        with pytest.raises(ValueError, match="'recipe' has dense steps after its warm-up; leave it out"):
            study_tables.time_to_loss("gpu", ("dense", "recipe"))


def test_the_drift_is_that_of_runs_until_they_part():
    """Runs of one seed share a beginning; their last shared steps are compared, not what comes after."""
    frame = study_tables.runs("gpu")
    pair = frame[frame["arm"].isin(["recipe", "recipe, 50% sparse first"]) & (frame["seed"] == 1)]
    a, b = (record.results["steps"]["loss"] for record in pair["record"])
    own = abs(sum(a[1500:1600]) - sum(b[1500:1600])) / 100  # 200 dense steps, then half of 2800
    rms, largest = study_tables.drift("gpu")
    assert 0 < rms < largest and largest >= own


def test_pairs_across_cards_are_counted():
    found = study_tables.across_cards("gpu40m").split(" of ")
    devices = {record.device for record in study_tables.runs("gpu40m")["record"]}
    assert int(found[1]) == (study_tables.runs("gpu40m")["arm"] != "dense").sum()
    assert (found[0] == "0") == (len(devices) == 1)
