"""What README.md's sentences say is what the records say."""

import re

import pandas as pd

from replicate import paper
from replicate.paper.table import shipped_table
from replicate.report import chapter_values, pages, step_table, study_tables, width
from replicate.study import results
from replicate.system import paths

TEXT = pages.PAGES["readme"].path.read_text(encoding="utf-8")


def test_the_claim_table_has_every_claim():
    assert set(shipped_table().index) == set(paper.claims()), "figures/claims.csv is older than the registry"
    assert set(paper.data()["claims_in_readme"]) <= set(paper.claims())


def test_what_the_prose_says():
    table = pd.read_csv(paths.ROOT / "figures" / "12_loss_and_time.csv", index_col="training")
    line, stopped = table["the line"], table["above its own dense, stopped"]
    assert line["by activations, 8 of 32"] == "on it" and line["algorithms 1, 2, 4 of 16"] == "above"
    for interval in stopped[line == "below"]:  # a change of 1 % in a step's time moves it by as much
        high = float(re.search(r"to ≈(\S+),", interval)[1])
        assert high > -0.001, "nothing clearly beats stopping sooner"
    values = chapter_values.values()
    for model in step_table.MODELS:
        assert values[f"surely below planned {model}"] == "nothing", "nor being planned shorter"
    study = results.recorded_study("gpu")
    gap = results.differences(study, column="final_loss")
    assert gap["act24"].low < 0 < gap["act24"].high, "our runs cannot tell it from nothing"
    assert gap["w1, same"].high < paper_cost("w1") < gap["w1"].low, "it says neither"
    for router in ("venom16", "venom16, 32 clusters"):
        assert gap["active16x32"].high < gap[router].low, "choosing by activations costs less"
    assert gap["recipe"].high < gap["w1"].low, "less than the first weight alone"
    assert gap["recipe, 50% sparse first"].high < gap["recipe"].low, "many dense steps help"
    assert gap["recipe, 83% sparse first"].low > gap["recipe"].high, "few do not"
    named = [gap[arm] for arm in ("act24", "w1", "w1, same", "recipe, 50% sparse first", "venom16")]
    assert {stats.n for stats in (*named, gap["active16x32"])} == {3}, "the mean of three seeds"


def paper_cost(arm):
    """Table 3's loss of an arm above dense."""
    losses = {row["preset"]: row["loss"] for row in paper.rows(3)}
    return losses[arm] - losses["dense"]


def test_the_first_screen_is_short():
    """A screen of 900 pixels shows about 40 lines of 100 characters; the commands come on the second."""
    before = pages.BLOCK.sub(r"\4", TEXT[: TEXT.index("## Pick your path")])
    assert len(re.sub(r"\]\([^)]*\)", "]", before)) < 4600


def test_the_wider_layer_ends_below_dense_and_takes_longer():
    arm = "wide x4, 8 of 64 by activations"
    gap = results.contrast(study_tables.runs("gpu"), [arm], "final_loss")
    assert gap.n >= 3 and gap.high < 0 and min(width.times()[arm]) > 1


def test_no_loss_by_fp8_is_seen():
    """To within a hundredth of a nat, of both kinds."""
    runs = study_tables.runs("gpu")
    for column in (study_tables.HELD, study_tables.TRAIN):
        for arms in (["dense, FP8"], ["venom16, FP8", "venom16"]):
            gap = results.contrast(runs, arms, column)
            assert gap.n >= 3 and gap.low < 0.001 and gap.high < 0.01


def test_what_item_seven_says_of_larger_models():
    arm = ("experts x4, 8 of 64",)
    larger, trained, held = (
        study_tables.contrast(study_tables.runs(scale), arm, column)
        for scale, column in (
            ("gpu40m", study_tables.TRAIN), ("gpu100m", study_tables.TRAIN), ("gpu100m", study_tables.HELD),
        )
    )  # fmt: skip
    assert larger.n == trained.n == held.n == 3
    assert larger.high < 0 and trained.high < 0, "the mixture is"
    assert held.mean < 0 < held.high, "not even it"
    wide = study_tables.contrast(
        study_tables.runs("gpu40m"), ("wide x4, 8 of 64 by activations",), study_tables.TRAIN
    )
    assert wide.n == 3 and wide.low < 0 < wide.high, "only the mixture"
