"""Held-out windows that stand in the training text."""

import numpy as np
import pytest

from replicate import __main__ as commands
from replicate.study.records import RecordStore
from replicate.text import overlap


def slowly(train, valid, window):
    known = {tuple(train[i : i + window]) for i in range(len(train) - window + 1)}
    there = [tuple(valid[i : i + window]) in known for i in range(len(valid) - window + 1)]
    return sum(there) / len(there)


def test_by_hand():
    train, valid = np.array([1, 2, 3, 4, 5]), np.array([9, 2, 3, 4, 9, 3])
    assert overlap.overlap(train, valid, 3) == 1 / 4
    assert overlap.overlap(train, valid, 1) == 4 / 6
    assert overlap.overlap(train, valid, 6) == 0, "longer than the training text"


@pytest.mark.parametrize("window", [1, 2, 5])
def test_as_by_comparing_every_window(monkeypatch, window):
    monkeypatch.setattr(overlap, "CHUNK", 7)  # windows lie across the chunks' borders
    rng = np.random.default_rng(window)
    for n in (20, 21, 48):
        train, valid = rng.integers(0, 3, n).astype(np.uint16), rng.integers(0, 3, 40).astype(np.uint16)
        assert overlap.overlap(train, valid, window) == slowly(train, valid, window)


def test_order_and_zeros_matter():
    assert overlap.overlap(np.array([1, 2, 0]), np.array([2, 1]), 2) == 0
    assert overlap.overlap(np.array([0, 1]), np.array([0, 0]), 2) == 0


@pytest.mark.parametrize("window", [0, 6])
def test_no_window_is_refused(window):
    with pytest.raises(ValueError, match=f"window is {window} tokens of 5; choose 1 to 5"):
        overlap.overlap(np.arange(9), np.arange(5), window)


def test_the_command_keeps_what_it_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))
    text = tmp_path / "text.txt"
    lines = [
        f"only line {i} has this: {i * 7919 % 1000}.\n" + "every line ends like this.\n" * 4
        for i in range(400)
    ]
    text.write_text("".join(lines))
    assert commands.main(["overlap", "--corpus", f"file:{text}", "--window", "16"]) == 0
    said = capsys.readouterr().out
    (kept,) = (record for record, origin in RecordStore().all("overlap") if origin == "cached")
    assert 0.3 < kept.results["share"] < 1 and kept.config["window"] == 16
    assert said.startswith(
        f"{kept.results['share']:.1%} of the held-out windows of 16 tokens stand in the training"
    )
    assert kept.corpus["corpus"] == "file:text.txt"
