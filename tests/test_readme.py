"""The README's verdicts are the claim table's, and its commands and links exist."""

import itertools
import re

import pandas as pd
import pytest

from replicate import paper, paths, plans, readme, results

TEXT = (paths.ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def table():
    return pd.read_csv(
        paths.ROOT / "figures" / "claims.csv", index_col="id", dtype=str, keep_default_na=False
    )


@pytest.mark.parametrize("name", readme.MARKS)
def test_generated_tables_are_those_of_the_records(table, name):
    block = TEXT.split(f"<!-- {name}: start -->")[1].split(f"<!-- {name}: end -->")[0]
    expected = readme.block(table) if name == "verdicts" else readme.speed()
    assert block.strip() == expected.strip(), "run python -m replicate.readme"
    assert set(table.index) == set(paper.claims()), "figures/claims.csv is older than the registry"


def test_what_the_prose_says(table):
    headline = table.loc["headline", "ours"].strip("≈")
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


def test_update_replaces_only_what_is_between_the_markers(tmp_path, table):
    page = tmp_path / "README.md"
    marks = [f"<!-- {name}: start -->\nold\n<!-- {name}: end -->\n" for name in readme.MARKS]
    page.write_text(f"before\n{marks[0]}between\n{marks[1]}after\n", encoding="utf-8")
    readme.update(table, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    assert "\nbetween\n" in text and "figure 4d, 4 of 16" in text
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="verdicts: start"):
        readme.update(table, page)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", TEXT)
    assert len(links) > 10
    assert not [link for link in links if not (paths.ROOT / link).exists()]


def test_arms_of_the_study_have_names_and_distinct_configurations():
    plan = plans.everything("smoke", (1, 2))
    configs = [config for arm in plan.values() for config in arm]
    assert len(set(configs)) == len(configs) == 2 * len(plan)
    assert plans.some(["recipe", "dense"], (1,), "smoke") == {k: plan[k][:1] for k in ("recipe", "dense")}
    with pytest.raises(ValueError, match="no arm 'nothing'"):
        plans.some(["nothing"], (1,), "smoke")
