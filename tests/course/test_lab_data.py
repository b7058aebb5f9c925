"""The labs' data files are what their script cuts out of the records."""

import importlib.util

import pytest

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
