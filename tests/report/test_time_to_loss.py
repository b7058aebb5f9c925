"""The time to a loss is steps times the milliseconds of a step; stopping early costs loss."""

import numpy as np
import pandas as pd
import pytest

from replicate.report import step_table, study_tables, time_to_loss
from replicate.study import plans, records, statistics


@pytest.mark.parametrize("scale", ["gpu", "gpu40m"])
def test_the_time_to_a_loss_is_steps_times_a_step(scale):
    target, card, table = time_to_loss.table(scale, ("dense", "act24", "recipe"))
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
        time_to_loss.table("gpu", ("dense", "venom64"))
    runs = study_tables.runs("gpu")
    half = runs.assign(arm=runs["arm"].replace({"recipe": "-", study_tables.HALF: "recipe"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_tables, "runs", lambda scale: half)
        with pytest.raises(ValueError, match="'recipe' has dense steps after its warm-up; leave it out"):
            time_to_loss.table("gpu", ("dense", "recipe"))


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


def runs(*curves, arm="dense"):
    made = [records.Record("train", {}, str(i), results={"valid_losses": c}) for i, c in enumerate(curves)]
    return pd.DataFrame({"arm": arm, "seed": range(len(made)), "record": made})


def test_stopping_early_is_faster_and_costs_loss():
    first, second = [[0, 9.0], [50, 3.0], [100, 2.0]], [[0, 9.0], [50, 3.4], [100, 2.2]]
    speeds, lost = time_to_loss.stopped_early(runs(first, second))
    assert speeds.tolist() == [1, 2] and lost.tolist() == pytest.approx([0, 1.1])


@pytest.mark.parametrize("curves", [(), ([[10, 2.0]], [[20, 2.0]])])
def test_runs_that_cannot_be_averaged_are_refused(curves):
    with pytest.raises(ValueError, match=f"^{len(curves)} runs of 'dense'"):
        time_to_loss.stopped_early(runs(*curves))


def test_table_2_has_our_runs_and_the_papers():
    table = time_to_loss.table2(step_table.models()).set_index(["model", "training"])
    ours = table.loc["ours, 10.6M (gpu)"]
    gap = study_tables.contrast(study_tables.runs("gpu"), (study_tables.HALF,), study_tables.TRAIN)
    assert ours.loc[study_tables.HALF, "above dense"] == study_tables.brief(gap)
    assert table.loc[("the paper's, 1B", "sparse"), "above dense"] == "-0.003"
    assert set(table.loc["ours, 0.8M (laptop)", "accuracy"]) == {"not recorded"}
    assert set(time_to_loss.half_sparse("laptop")) == {"loss"}
    assert set(time_to_loss.half_sparse("gpu")) == {"loss", "accuracy"}


def test_below_the_line_is_better_than_stopping():
    near, far = (statistics.summary([x, x + 0.01, x + 0.02]) for x in (0.08, 0.01))
    found = {"on": (1.5, near, "venom16"), "sure": (1.5, far, "venom32")}
    early = (np.array([1, 2]), np.array([0, 0.2]))
    assert time_to_loss.below(found, early) == ["on", "sure"]
    assert time_to_loss.below(found, early, sure=True) == ["sure"]
    one = {"one seed": (1.5, statistics.summary([0.0]), "venom16")}
    assert time_to_loss.below(one, early) == ["one seed"] and not time_to_loss.below(one, early, sure=True)


def test_points_stand_at_the_speed_of_their_mix():
    records = step_table.models()
    points = time_to_loss.points(records)
    step = step_table.sparse_speeds(records)["1B"]["recipe"]
    assert points["1B"]["50 % sparse"][0] == pytest.approx(1 / (0.5 + 0.5 / step))
    assert points["1B"]["algorithms 1, 2"][0] == pytest.approx(step)
    early = time_to_loss.stopped_early(study_tables.runs("gpu"))
    table = time_to_loss.loss_and_time(points, early)
    assert table["training"].tolist() == list(time_to_loss.SHORT.values())
    clock = time_to_loss.clocks()
    assert len(clock) == sum(map(len, time_to_loss.RACED.values())) and set(clock["model"]) == {
        "10.6M",
        "39.3M",
    }
