"""The time to a loss is steps times the milliseconds of a step; stopping early costs loss."""

import pandas as pd
import pytest

from replicate.report import step_table, study_coverage, study_tables, time_to_loss
from replicate.study import noise, plans, records


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
    rms, largest = noise.drift("gpu")
    assert 0 < rms < largest and largest >= own


def test_pairs_across_cards_are_counted():
    found = study_coverage.across_cards("gpu40m").split(" of ")
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


def test_an_arm_lies_on_the_line_where_timing_or_seeds_cannot_tell():
    """The line rises by a nat from the whole dense run to one twice as fast."""
    steps = [[0, 9.0], [50, 3.0], [100, 2.0]]

    def frame(above):
        parts = []
        for seed, x in enumerate(above, 1):
            parts += [runs(steps).assign(seed=seed, valid_loss=2.0)]
            parts += [runs(steps, arm="w1").assign(seed=seed, valid_loss=2.0 + x)]
        return (
            pd.concat(parts, ignore_index=True)
            .drop(columns="record")
            .join(pd.concat(parts, ignore_index=True)["record"])
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_to_loss.results, "with_floor", lambda found, *_: found)
        clear = frame([0.20, 0.21, 0.19])  # the line is at +0.5 where the run is 1.5 times as fast
        s, side = time_to_loss.side(clear, "w1", 1.5, (1.45, 1.55))
        assert side == "below" and s.mean == pytest.approx(-0.3)
        assert time_to_loss.side(clear, "w1", 1.5, (1.15, 1.55))[1] == "on it within timing error"
        assert time_to_loss.side(clear, "w1", 1.1, (1.09, 1.11))[1] == "above"
        assert time_to_loss.side(frame([0.2, 0.9, 0.4]), "w1", 1.5, (1.0, 2.0))[1] == "on it"


def test_the_floor_counts_on_the_line_too():
    frame = study_tables.runs("gpu")
    s = time_to_loss.above_stopped(frame, "active16x32", 1.17)
    assert s.spread >= noise.pooled("gpu", "valid_loss") * (1 - 1e-9) and s.n == 3
    _, line = time_to_loss.side(frame, "act24", 1.03, (1.02, 1.04))
    assert line == "on it", "2:4 activations: seeds cannot tell"
