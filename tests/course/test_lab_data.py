"""The labs' data files are what their script cuts out of the records."""

import importlib.util
import json
import math

import numpy as np
import pandas as pd
import pytest

from replicate.study import statistics
from replicate.system.paths import ROOT

SCRIPT = ROOT / "course" / "make_lab_data.py"


@pytest.fixture(scope="module")
def made():
    spec = importlib.util.spec_from_file_location("make_lab_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.files()


def test_the_files_hold_what_the_script_makes(made):
    assert {path: path.read_text("utf-8") for path in made} == made


def test_no_data_file_is_without_its_script(made):
    there = {path for ending in ("csv", "json") for path in (ROOT / "course" / "source").rglob(f"*.{ending}")}
    assert there == set(made)


def test_the_scatter_that_lab_5_names_is_that_of_its_data():
    losses = pd.read_csv(ROOT / "course" / "source" / "L5" / "losses.csv")
    by_seed = losses.pivot(index="seed", columns="arm", values="loss")
    scatter = by_seed.drop(columns="dense").sub(by_seed["dense"], axis=0).var(ddof=1).mean() ** 0.5
    text = (ROOT / "course" / "source" / "L5" / "L5_evidence.ipynb").read_text("utf-8")
    assert f"pooled scatter of about {scatter:.4f}." in text and f"draw_power(power, {scatter:.4f})" in text


def test_what_three_and_six_seeds_see_is_what_lab_5_says():
    """By the lab's own solutions of tasks 5 and 6, and the scatter of its data."""
    text = (ROOT / "course" / "source" / "L5" / "L5_evidence.ipynb").read_text("utf-8")
    sources = {cell["id"]: "".join(cell["source"]) for cell in json.loads(text)["cells"]}
    lab = {"np": np, "math": math, "T95": {df: statistics.t_quantile(df) for df in range(1, 10)}}
    for task in ("power", "visible_difference"):
        exec(sources[task], lab)
    three, six = (lab["visible_difference"](lab["power"], 0.0033, n) for n in (3, 6))
    assert f"Three seeds see about {three:.3f} nats, six about {six:.3f}." in text
