import itertools
import os
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replicate.training import checkpoint

STATE = {"losses": [1.5, 0.1 + 0.2, float("nan")], "text": "é"}


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(3, 5, generator=generator),
        "half": torch.randn(4, generator=generator).bfloat16(),
        "flag": torch.tensor(True),
        "transposed": torch.randn(2, 3, generator=generator).T,
    }


@pytest.fixture
def folder(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, tensors(step), {**STATE, "n": step})
    return tmp_path


def test_a_checkpoint_comes_back_bit_for_bit(folder):
    step, loaded, state = checkpoint.latest(folder)
    assert step == state["n"] == 30
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors(30).items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert state["losses"][:2] == STATE["losses"][:2]
    assert state["losses"][2] != state["losses"][2]  # NaN


def test_only_the_two_newest_stay_and_nothing_else(folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        f"step-{step:08d}.{kind}" for step in (20, 30) for kind in ("json", "safetensors")
    ]


def test_a_checkpoint_stays_though_later_ones_are_damaged(folder):
    for step in (20, 30):
        (folder / f"step-{step:08d}.safetensors").write_bytes(b"")
    checkpoint.save(folder, 12, tensors(12), STATE)
    assert checkpoint.steps(folder) == [12]
    checkpoint.save(folder, 14, tensors(14), STATE)
    assert checkpoint.steps(folder) == [12, 14]
    assert checkpoint.latest(folder)[0] == 14


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "none") is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["json", "safetensors"]), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_any_flipped_bit_is_refused_by_name(folder, kind, where, bit):
    path = folder / f"step-00000030.{kind}"
    good = path.read_bytes()
    bad = bytearray(good)
    bad[int(where * len(bad))] ^= 1 << bit
    path.write_bytes(bad)
    try:
        with pytest.warns(UserWarning, match=f"refused.*step-00000030.{kind}"):
            step, loaded, _ = checkpoint.latest(folder)
        assert step == 20
        assert torch.equal(loaded["w"], tensors(20)["w"])
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("kind", ["json", "safetensors"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(folder, kind, share):
    path = folder / f"step-00000030.{kind}"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(checkpoint.CheckpointRefused, match=f"step-00000030.{kind}: truncated"):
        checkpoint.load(folder / "step-00000030.json")


def test_a_missing_tensor_file_and_another_format_are_refused(folder, monkeypatch):
    (folder / "step-00000020.safetensors").unlink()
    with pytest.raises(checkpoint.CheckpointRefused, match=r"step-00000020.safetensors: missing"):
        checkpoint.load(folder / "step-00000020.json")
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(checkpoint.CheckpointRefused, match="format 1, this version reads 2"):
        checkpoint.load(folder / "step-00000030.json")


def test_all_refused_means_none(folder):
    for path in folder.glob("*.json"):
        path.write_text("{}")
    with pytest.warns(UserWarning, match="refused") as caught:
        assert checkpoint.latest(folder) is None
    assert len(caught) == 2


def test_a_crash_while_writing_leaves_the_old_checkpoints(folder, monkeypatch):
    def crash(*args):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.Path, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(folder, 40, tensors(), STATE)
    assert checkpoint.latest(folder)[0] == 30
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("nth", range(12))
def test_a_process_that_dies_at_any_file_operation_leaves_whole_checkpoints(folder, monkeypatch, nth):
    class Died(BaseException):
        pass

    left = [nth]

    def dying(original):
        def operation(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:  # and everything after it: a dead process cleans nothing up
                raise Died
            return original(*args, **kwargs)

        return operation

    with monkeypatch.context() as patch:
        for name in ("open", "replace", "unlink"):
            patch.setattr(checkpoint.Path, name, dying(getattr(checkpoint.Path, name)))
        patch.setattr(os, "fsync", dying(os.fsync))
        try:
            checkpoint.save(folder, 40, tensors(40), {"n": 40})
        except Died:
            pass
        else:
            assert nth >= 10  # it ran to its end
    assert set(checkpoint.steps(folder)) >= {30}
    step, loaded, state = checkpoint.latest(folder)
    assert step == state["n"] == (40 if 40 in checkpoint.steps(folder) else 30)
    assert torch.equal(loaded["w"], tensors(step)["w"])
    checkpoint.save(folder, 50, tensors(50), {"n": 50})  # and the next writer is not in the way of it
    assert checkpoint.latest(folder)[0] == 50


def test_tensors_without_their_json_are_no_checkpoint(folder):
    (folder / "step-00000040.safetensors").write_bytes(b"half")
    assert checkpoint.latest(folder)[0] == 30


def test_leftovers_of_killed_writers_go_once_old(folder):
    old, young = folder / "a.1.part", folder / "b.2.part"
    old.touch()
    young.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    checkpoint.save(folder, 40, tensors(), STATE)
    assert not old.exists()
    assert young.exists()


def test_a_file_server_s_clock_decides_what_is_old(folder, monkeypatch):
    live = folder / "a.1.part"
    live.touch()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7200)  # here it is two hours later than there
    checkpoint.save(folder, 40, tensors(), STATE)
    assert live.exists()


def test_clear_removes_every_checkpoint(folder):
    (folder / "mine.txt").touch()
    checkpoint.clear(folder)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    checkpoint.clear(folder)
    checkpoint.clear(folder)
    assert not folder.exists()


def test_what_killed_writers_left_goes_with_the_run(folder):
    """Killed within a file: a young part. Killed between two files: tensors whose JSON never came."""
    (folder / ".1.0123456789abcdef.part").touch()
    (folder / "step-00000035.safetensors").write_bytes(b"whole, and of no use")
    (folder / "step-00000036.parts").mkdir()
    (folder / "step-00000036.parts" / "rank0").touch()
    checkpoint.save(folder, 40, tensors(), STATE)
    assert {path.name for path in folder.glob("step-*")} == {
        f"step-000000{step}.{kind}" for step in (30, 40) for kind in ("json", "safetensors")
    }
    (folder / "step-00000045.safetensors").touch()
    checkpoint.clear(folder)
    assert not folder.exists()


def test_pack_and_unpack_restore_model_and_optimiser():
    def build(seed):
        torch.manual_seed(seed)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    model, optimizer = build(0)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    other, fresh = build(1)
    checkpoint.unpack(checkpoint.pack(model, optimizer), other, fresh)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert torch.equal(value, fresh.state[b][name])


@pytest.mark.parametrize(("megabytes", "cost"), [(0.5, 0.01), (40, 0.5), (1000, 12), (1, 40)])
def test_saving_takes_a_fiftieth_of_a_run_s_time(monkeypatch, megabytes, cost):
    """Ten hours of steps of a second on a clock of its own; the guess from the size is far off at last."""
    now, saves = [0.0], []
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now[0])
    pace = checkpoint.Pace(int(1e6 * megabytes))
    for second in range(36000):
        now[0] += 1
        if pace.due():
            now[0] += cost
            pace.saved(cost)
            saves.append(second)
    assert checkpoint.FIRST - 1 <= saves[0] <= max(60, 60 * cost)
    assert len(saves) * cost <= 0.02 * 36000 + cost
    assert len(saves) * max(cost, 0.02 * checkpoint.FIRST) > 0.017 * 36000  # and no seldomer than need be
    assert min(b - a for a, b in itertools.pairwise(saves)) >= checkpoint.FIRST - 1
