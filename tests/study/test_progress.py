"""What a study says while it trains, in a log file and in a terminal."""

import io
from dataclasses import replace

import pytest

from replicate.settings.presets import train_preset
from replicate.study.progress import StudyProgress

RUN = train_preset("smoke")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that have passed, for tqdm and the study."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def shown(monkeypatch, every=0.0, live=False):
    """A StudyProgress of four equal runs, two at a time, and the stream it writes to."""
    stream = io.StringIO()
    stream.isatty = lambda: live
    monkeypatch.setattr("sys.stderr", stream)
    configs = {str(seed): replace(RUN, seed=seed) for seed in (1, 2, 3, 4)}
    study = StudyProgress(True, "08", configs, {key: f"arm {key}, seed 1" for key in configs}, 2, 100.0)
    study.bar.mininterval = every
    return study, stream


def left(study):
    """The seconds left that are shown."""
    bar = study.bar.format_dict
    return (bar["total"] - bar["n"]) * bar["elapsed"] / (bar["n"] - bar["initial"])


def test_the_time_left_follows_from_the_work_done_here(clock, monkeypatch):
    study, _ = shown(monkeypatch)
    clock[0] = 10.0
    study.watch({"1": (0.0, 0.5), "2": (0.5, 0.75)})  # three quarters of a run in 10 s
    assert left(study) == pytest.approx(2.75 / 0.75 * 10)
    clock[0] = 20.0
    study.finished("1", "loss 1", 0.0)
    study.finished("2", "loss 1", 0.5)
    study.finished("3", "another process has trained it")
    study.watch({"4": (0.0, 0.5)})
    assert left(study) == pytest.approx(0.5 / 2 * 20)


def test_a_log_file_has_whole_lines_from_the_start(clock, monkeypatch):
    study, stream = shown(monkeypatch)
    clock[0] = 10.0
    study.watch({"1": (0.0, 0.25)})
    study.finished("1", "loss 1.5", 0.0)
    study.wait(["2"])
    study.wait(["2"])
    study.bar.close()
    assert "\r" not in stream.getvalue()
    assert stream.getvalue().splitlines() == [
        "08 4 runs to train, 2 at a time, about 01:40",
        "08 0 of 4 done; arm 1, seed 1 25%, 02:30 left",
        "08 1/4 arm 1, seed 1: loss 1.5, 00:10",
        "08 waits for another process, which trains arm 2, seed 1",
    ]


def test_a_log_file_has_lines_only_now_and_then(clock, monkeypatch):
    study, stream = shown(monkeypatch, every=60)
    for clock[0] in (0.5, 30.0, 59.0):
        study.watch({"1": (0.0, 0.25)})
    assert stream.getvalue().count("\n") == 1
    clock[0] = 61.0
    study.watch({"1": (0.0, 0.5)})
    assert stream.getvalue().count("\n") == 2


def test_a_terminal_renews_one_line(clock, monkeypatch):
    study, stream = shown(monkeypatch, live=True)
    for clock[0], share in ((1.0, 0.25), (2.0, 0.5)):
        study.watch({"1": (0.0, share)})
    study.finished("1", "loss 1.5", 0.0)
    study.bar.close()
    assert "arm 1, seed 1 50%" in stream.getvalue() and stream.getvalue().count("\n") == 2
