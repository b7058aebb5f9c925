"""Writing in one step: all or nothing, on the disk before the rename, patient with Windows."""

import errno
import os
from pathlib import Path

import pytest

from replicate import checkpoint, files, records
from replicate.kernels import plan24


@pytest.fixture
def refused(monkeypatch):
    """Makes the next renames fail as Windows does while another process has the file open."""
    left, rename = [0], Path.replace

    def replace(self, target):
        if left[0]:
            left[0] -= 1
            raise PermissionError(errno.EACCES, "Access is denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    return left


WRITERS = {
    "write_atomic": lambda folder: files.write_atomic(folder / "file", b"new"),
    "checkpoint": lambda folder: checkpoint.save(folder, 1, {}, {}),
    "plan": lambda folder: plan24._save(folder / "plans.json", {}),
    "record": lambda folder: records.RecordStore(folder).put(records.make_record("stat", {"a": 1}, {})),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_writer_waits_for_windows_and_syncs_before_it_renames(tmp_path, refused, monkeypatch, write):
    events = []
    fsync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (rename(a, b), events.append("rename"))[0])
    refused[0] = files.TRIES - 1
    write(tmp_path)
    assert events[:2] == ["sync", "rename"]
    assert not list(tmp_path.rglob(".*"))
    refused[0] = files.TRIES
    with pytest.raises(PermissionError):
        write(tmp_path)
    assert not list(tmp_path.rglob(".*"))


def test_another_process_s_file_stands_where_the_content_is_the_same(tmp_path, refused):
    file = tmp_path / "file"
    refused[0] = files.TRIES
    with pytest.raises(PermissionError), files.replacing(file) as out:
        out.write(b"ours")
    file.write_bytes(b"theirs")
    refused[0] = files.TRIES
    with files.replacing(file) as out:
        out.write(b"ours")
    assert file.read_bytes() == b"theirs" and [f.name for f in tmp_path.iterdir()] == ["file"]


def test_replacing_is_all_or_nothing(tmp_path):
    file = tmp_path / "deep" / "file"
    with files.replacing(file) as out:
        out.write(b"old")
    with pytest.raises(KeyError), files.replacing(file) as out:
        out.write(b"new")
        raise KeyError
    with pytest.raises(OSError, match=r"no space left to write .*REPLICATE_RUNS"), files.replacing(file):
        raise OSError(errno.ENOSPC, "full")
    assert file.read_bytes() == b"old" and [f.name for f in file.parent.iterdir()] == ["file"]
