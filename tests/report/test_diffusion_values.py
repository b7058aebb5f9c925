"""What the chapter on pictures and clips says of the runs that are recorded, whichever they are."""

import re

import pytest
from report.test_diffusion_plots import OFFSET, record

from replicate.report import chapter_values, diffusion_plots, diffusion_values, notebooks
from replicate.study.records import RecordStore

PAIR = "*2:4 tiles of tokens and neurons* minus *2:4 activations*"


def stored(folder, runs):
    """A store with the runs (kind, arm, seed)."""
    store = RecordStore(folder / "cached", folder / "recorded")
    for kind, arm, seed in runs:
        store.put(record(kind, arm, seed), recorded=True)
    return store


def of_seeds(kind, arms, seeds):
    return [(kind, arm, seed) for arm in arms for seed in seeds]


def test_what_the_chapter_says_of_venom_on_pictures():
    by_arm = diffusion_plots.runs("image")
    for split in ("poses", "fonts"):
        found, whole = (
            diffusion_values.above(by_arm, split),
            diffusion_values.losses(by_arm).loc["dense", split],
        )
        for arm in ("venom16", "active16", "block16"):
            gap = found[arm]
            assert gap.n == 3 and 0.0295 < gap.mean / whole < 0.05, "three to five per cent"
            assert 0.02 < gap.half / whole < 0.03, "give or take two and a half"


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_no_difference_is_called_from_one_or_two_seeds(tmp_path, seeds):
    store = stored(tmp_path, of_seeds("image", ("dense", "act24", "tile24"), seeds))
    by_arm = diffusion_plots.runs("image", store)
    table = diffusion_values.differences(by_arm)
    for name in ("new poses", "new fonts"):
        assert (table[f"{name}: side of dense"] == "too few seeds").all()
        assert table[f"{name}, minus dense"].iloc[0].startswith(f"{OFFSET['act24']:+.4f}")
    said = diffusion_values.together(by_arm)
    assert f"({len(seeds)})" in said and said.endswith("With fewer than 3 seeds no difference is called.")
    with pytest.raises(ValueError, match="record arm 'dense'"):
        diffusion_values.values(store)  # no clips


def test_three_seeds_call_a_difference_by_its_interval(tmp_path):
    """The made-up differences are the same for every seed, so that their intervals are points."""
    runs = of_seeds("image", ("dense", "venom16"), (1, 2, 3)) + of_seeds("image", ("gelu",), (2,))
    by_arm = diffusion_plots.runs("image", stored(tmp_path, runs))
    table = diffusion_values.differences(by_arm).set_index("feed-forward layer")
    told = table["new poses: side of dense"]
    assert dict(told) == {"dense, GELU": "too few seeds", "Venom by the router": "above"}
    assert table["new poses, minus dense"]["Venom by the router"] == "+0.0300 ± 0.0000 (3)"


def test_arms_that_happen_to_agree_are_not_told_by_it(tmp_path):
    """One arm's seeds agree to a hair, another's do not: the first one's interval is widened."""
    by_arm = diffusion_plots.runs(
        "image", stored(tmp_path, of_seeds("image", ("dense", "act24", "venom16"), (1, 2, 3)))
    )
    base = [by_arm["dense"][seed].results["valid"]["poses"]["loss"] for seed in (1, 2, 3)]
    for arm, gaps in {"act24": (0.010, 0.011, 0.012), "venom16": (-0.1, 0.0, 0.1)}.items():
        for seed, gap in enumerate(gaps, 1):
            by_arm[arm][seed].results["valid"]["poses"]["loss"] = base[seed - 1] + gap
    found = diffusion_values.above(by_arm, "poses")
    assert found["act24"].mean == pytest.approx(0.011) and found["act24"].low < 0 < found["act24"].std < 0.002
    share = diffusion_values.share(by_arm, "act24")
    assert share.mean == pytest.approx(0.011 / (sum(base) / 3)) and share.low < 0


def test_an_interval_across_zero_calls_nothing(tmp_path):
    arms = ("dense", "act24", "tile24")
    by_arm = diffusion_plots.runs("image", stored(tmp_path, of_seeds("image", arms, (1, 2, 3))))

    def told():
        return diffusion_values.differences(by_arm)["new poses: side of dense"].iloc[0]

    for seed, loss in {1: 0.1, 2: 0.3, 3: 0.2}.items():
        by_arm["act24"][seed].results["valid"]["poses"]["loss"] = loss
    assert told() == "open"
    assert diffusion_values.together(by_arm).endswith("All these intervals contain zero.")
    for run in by_arm["act24"].values():
        run.results["valid"]["poses"]["loss"] = 0.1
    assert told() == "below" and diffusion_values.together(by_arm).endswith(PAIR + ": above.")
    for run in by_arm["act24"].values():
        run.results["valid"]["poses"]["loss"] = 0.9
    assert diffusion_values.together(by_arm).endswith(PAIR + ": below.")


def test_arms_and_seeds_are_counted(tmp_path):
    runs = of_seeds("image", diffusion_plots.LABELS, (1, 2, 3)) + of_seeds("image", ("dense",), (4,))
    clips = of_seeds("video", ("dense", "block16"), (1, 2))
    many = diffusion_values.values(stored(tmp_path / "many", runs + clips))
    assert many["pictures, seeds"] == "8 arms, 3 to 4 seeds each"
    assert many["clips, seeds"] == "2 arms, 2 seeds each" and "clips as what" in many["clips, judge"]
    assert many["clips, flow"] == "0.202, where a velocity of zero has 1.90"
    assert many["clips, size"] == "22 million parameters, 5,000 steps"
    lone = diffusion_plots.runs("image", stored(tmp_path / "lone", of_seeds("image", ("dense",), (1,))))
    assert diffusion_values.seeds(lone) == "1 arm, one seed each"
    assert "shares a seed with its like" in diffusion_values.together(lone)


def test_together_is_compared_with_each_alone(tmp_path):
    arms = ("dense", "active16", "block16", "act24", "tile24")
    store = stored(tmp_path, of_seeds("image", arms, (1, 2, 3)))
    said = diffusion_values.together(diffusion_plots.runs("image", store))
    apart = OFFSET["block16"] - OFFSET["active16"]
    assert f"*Venom by votes of 64 tokens* minus *Venom by activations* {apart:+.4f} ± 0.0000 (3)" in said


def test_the_readme_shows_shares_of_dense():
    for what, kind in {"pictures": "image", "clips": "video"}.items():
        by_arm = diffusion_plots.runs(kind)
        losses = {
            a: [r.results["valid"]["poses"]["loss"] for r in runs.values()] for a, runs in by_arm.items()
        }
        times = sum(losses["venom16"]) / sum(losses["dense"])
        assert diffusion_values.shares()[f"{what}, share venom16"] == f"{times - 1:.0%}"


def test_scores_are_means_of_seeds_and_end_with_real_pictures(tmp_path):
    store = stored(tmp_path, of_seeds("image", ("dense", "act24"), (1, 2)))
    table = diffusion_values.scores(diffusion_plots.runs("image", store)).set_index("layer")
    assert list(table.index) == ["dense, squared ReLU", "2:4 activations", "real, held out"]
    assert table["Fréchet distance"].tolist() == [3.5, 3.5, pytest.approx(1.25)]
    assert table["read as asked"].tolist() == [0.9, 0.9, 0.99]
    said = diffusion_values.judged(diffusion_plots.runs("image", store), "pictures")
    assert "99.0% of real" in said and "90.0% to 90.0%" in said


def test_the_chapter_shows_them():
    (book,) = notebooks.select(notebooks.discover(), ["14"])
    shown = diffusion_values.values()
    text = "".join(notebooks.source(cell) for cell in book.content["cells"])
    assert set(re.findall(r"<!-- value: ((?:pictures|clips).*?) -->", text)) == set(shown)
    for name, words in shown.items():
        assert chapter_values.value(book, name) == words
    for what, kind in {"pictures": "image", "clips": "video"}.items():
        dense = diffusion_plots.runs(kind)["dense"].values()
        loss = sum(r.results["valid"]["poses"]["loss"] for r in dense) / len(dense)
        assert shown[f"{what}, flow"].startswith(f"{loss:.3f}, where")
