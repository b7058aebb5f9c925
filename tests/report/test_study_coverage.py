"""What the report says was trained, and was not, follows from the records."""

import re

import pandas as pd
import pytest

from replicate import study
from replicate.report import study_coverage, study_tables
from replicate.study import noise, plans, records
from replicate.system import paths


def test_the_setting_covers_every_record():
    found = study_coverage.settings()
    count = sum(int(one["runs recorded"]) for one in found.values())
    assert count == len(list((paths.RECORDED / "train").iterdir()))
    texts = {name: one["text, its checksum"] for name, one in found.items()}
    assert texts["laptop"] != texts["laptop, on a CPU"] and texts["gpu"] == texts["gpu40m"]
    assert found["laptop, on a CPU"]["device, torch, Python"].startswith("CPU")
    assert "CPU" not in "".join(found[scale]["device, torch, Python"] for scale in study_tables.TRAINED)


def test_evaluated_tokens_are_fewer_than_those_held_out_but_in_short_texts():
    for scale, one in study_coverage.settings().items():
        name = "held-out tokens; evaluated, at random places"
        held, evaluated = map(float, re.findall(r"([\d.]+)M", one[name]))
        assert evaluated > 0 and (evaluated < held) == ("english" not in scale)


@pytest.mark.parametrize("scale", study_tables.TRAINED)
def test_what_is_missing_is_what_no_record_has(scale):
    store = records.RecordStore()
    plan = plans.everything(scale, plans.EVERY_SEED)
    names = plans.PARTLY.get(scale) or tuple(plan)
    there = {arm: sum(store.find("train", c) is not None for c in plan[arm]) for arm in names}
    said = [line for line in study_coverage.missing().splitlines() if line.startswith(f"- {scale}, ")]
    of = {line.split(": ")[0].split(", ")[1].split(" (")[0]: line for line in said}
    assert set(re.findall("`(.+?)`", of.get("not run", ""))) == {arm for arm, n in there.items() if n == 0}
    few = set(re.findall("`(.+?)`", of.get("fewer than three seeds", "")))
    assert few == {arm for arm, n in there.items() if 0 < n < 3}


def test_seeds_of_two_texts_do_not_make_three(monkeypatch):
    def run(seed, text):
        return {"arm": "w1", "seed": seed, "record": records.Record("train", {}, "", corpus={"sha256": text})}

    runs = pd.DataFrame([run(1, "a"), run(11, "b"), run(12, "b")])
    monkeypatch.setattr(study_coverage, "every_run", lambda scale: runs)
    assert "laptop, fewer than three seeds (how many there are): `w1` (2)" in study_coverage.missing()


def test_every_arm_has_its_card():
    lines = study_coverage.cards("gpu")
    runs = study_tables.runs("gpu")
    assert sorted(re.findall("`(.+?)`", lines)) == sorted(runs["arm"].unique())
    mixed = next(line for line in lines.splitlines() if "several cards" in line)
    devices = {record.device for record in runs.loc[runs["arm"] == "venom32", "record"]}
    assert ("`venom32` (" in mixed) == (len(devices) > 1)
    (dense,) = {record.device for record in runs.loc[runs["arm"] == "dense", "record"]}
    assert "`dense`" in next(
        line for line in lines.splitlines() if line.startswith(f"- gpu, {dense.split()[1]}:")
    )


def test_runs_trained_again_fill_their_table(monkeypatch):
    monkeypatch.setattr(noise, "reruns", lambda scale: pd.DataFrame())
    assert study_coverage.trained_again().startswith("No run has been trained a second time")
    card, other = "NVIDIA H100", "NVIDIA H200"
    row = {"arm": "dense", "seed": 1, "first on": card, "again on": other, "training": 0.003, "held-out": 0.0}
    two = [row, row | {"seed": 2, "training": -0.004}, row | {"again on": card, "training": 0.001}]
    monkeypatch.setattr(noise, "reruns", lambda scale: pd.DataFrame(two if scale == "gpu" else []))
    lines = study_coverage.trained_again().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    again = ["0.0035", "-0.0005", "0.0000", "+0.0000"]  # sqrt((.003² + .004²) / 2)
    assert ["gpu", "dense", "another", "2", *again] in cells and len(cells) == 2
    assert ["gpu", "dense", "the same", "1", "0.0010", "+0.0010", "0.0000", "+0.0000"] in cells


def test_a_recorded_rerun_would_be_found():
    """Its kind is a folder name that a store takes, and its configuration that of the first run."""
    (config,) = study.arms("gpu", ["dense"], [1])
    again = records.make_record("rerun-1", config, {})
    assert again.config_hash == records.make_record("train", config, {}).config_hash
