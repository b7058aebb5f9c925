"""What README.md's sentences say is what the records say."""

import itertools

import pandas as pd

from replicate import paper
from replicate.paper.table import shipped_table
from replicate.report import pages
from replicate.study import results
from replicate.system import paths

TEXT = pages.PAGES["readme"].path.read_text(encoding="utf-8")


def test_the_claim_table_has_every_claim():
    assert set(shipped_table().index) == set(paper.claims()), "figures/claims.csv is older than the registry"
    assert set(paper.data()["claims_in_readme"]) <= set(paper.claims())


def test_what_the_prose_says():
    headline = shipped_table().loc["headline", "ours"].strip("≈")
    assert f"{headline} for the abstract's 1.4 to 1.7x counts" in TEXT
    line = pd.read_csv(paths.ROOT / "figures" / "12_loss_and_time.csv", index_col="training")["the line"]
    assert line["by activations"] == "on it" and line["algorithms 1, 2"] == "above"
    assert "dense runs that simply stop sooner" in TEXT and "10.6 million parameters" in TEXT
    fine, router, recipe = ("active16x32", "venom16, 32 clusters", "recipe")
    gaps = {s: results.differences(results.recorded_study(s), column="final_loss") for s in ("gpu", "gpu40m")}
    for gap, arm in itertools.product(gaps.values(), ("w1", "w2", "w1+w2")):
        assert gap[arm].mean > 8 * gap[f"{arm}, same"].mean, "a factor of eight and more"
    assert all(gap["recipe"].mean > 1.2 * gap["recipe, same"].mean for gap in gaps.values()), (
        "a fifth or more"
    )
    assert 0.5 < gaps["gpu"][fine].mean / gaps["gpu"][router].mean < 0.6, "about half"
    assert [round(5 * gap[fine].mean / gap[recipe].mean, 1) for gap in gaps.values()] == [1.2, 1.8]
