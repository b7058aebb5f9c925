import subprocess
import sys
import threading

import pytest

from replicate.system import locks, paths

HOLD = """
import time
from replicate.system import locks
held = locks.take("x")
print(bool(held), flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))


def test_a_claim_is_held_by_one():
    first = locks.take("x")
    assert locks.take("x") is None
    assert locks.take("y")
    first.close()
    assert locks.take("x")


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_a_claim_ends_with_its_process(end):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, cwd=paths.ROOT
    ) as other:
        assert other.stdout.readline() == "True\n"
        assert locks.take("x") is None
        getattr(other, end)()
        other.wait()
    assert locks.take("x")


def test_one_of_several_is_held_and_given_back(monkeypatch):
    monkeypatch.setattr(locks, "PAUSE", 0.01)
    waited, wanted = [], [True]
    with locks.one_of(["a", "b"]), locks.one_of(["a", "b"]):
        assert locks.take("a") is locks.take("b") is None
        timer = threading.Timer(0.1, wanted.clear)
        timer.start()
        with locks.one_of(["a", "b"], wanted=lambda: bool(wanted), waits=lambda: waited.append(1)):
            assert waited == [1] and not wanted
    assert locks.take("a") and locks.take("b")


def test_where_there_are_no_locks_nobody_waits(monkeypatch):
    if locks.fcntl is None:
        pytest.skip("of POSIX")

    def no_locks(*_):
        raise OSError(next(iter(locks.UNSUPPORTED)), "no locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    assert locks.take("x") and locks.take("x")
