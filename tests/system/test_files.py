"""Writing in one step: all or nothing, on the disk before the rename, patient with Windows."""

import errno
import os
from pathlib import Path

import pytest

from replicate.kernels.two_four import plan24
from replicate.study import records
from replicate.system import files, paths
from replicate.training import checkpoint


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


def test_replacing_is_all_or_nothing(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "file"
    with files.replacing(file) as out:
        out.write(b"old")
    with pytest.raises(KeyError), files.replacing(file) as out:
        out.write(b"new")
        raise KeyError
    for code, variable in ((errno.ENOSPC, "REPLICATE_RUNS"), (errno.EROFS, "REPLICATE_FIGURES")):
        monkeypatch.setenv(variable, str(tmp_path))
        with (
            pytest.raises(
                OSError, match=rf"file cannot be written \(full\); the variable {variable} can name"
            ),
            files.replacing(file),
        ):
            raise OSError(code, "full")
        monkeypatch.setenv(variable, str(tmp_path / "other"))
    with pytest.raises(OSError, match=r"file cannot be written \(full\)$"), files.replacing(file):
        raise OSError(errno.EACCES, "full")
    assert file.read_bytes() == b"old" and [f.name for f in file.parent.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="no such devices there, and links need a privilege")
def test_links_stay_links_and_devices_stay_devices(tmp_path):
    file, link = tmp_path / "folder" / "file", tmp_path / "link"
    link.symlink_to(file)
    for content in (b"new", b"newer"):  # the target is made, then replaced
        files.write_atomic(link, content)
        assert link.is_symlink() and file.read_bytes() == content
    with files.replacing(link) as out:
        out.write(b"newest")
    assert link.is_symlink() and file.read_bytes() == b"newest"
    assert [f.name for f in file.parent.iterdir()] == ["file"] and len(list(tmp_path.iterdir())) == 2
    null = tmp_path / "null"
    null.symlink_to(os.devnull)
    files.write_atomic(null, b"new")
    assert null.is_symlink() and Path(os.devnull).is_char_device()


def test_a_name_as_long_as_names_can_be_is_written(tmp_path):
    file = tmp_path / ("漢" * 80 + ".json")
    files.write_atomic(file, b"new")
    assert [f.name for f in tmp_path.iterdir()] == [file.name] and file.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("variable", "where"), [("REPLICATE_RUNS", paths.runs_dir), ("REPLICATE_FIGURES", paths.figures_dir)]
)
def test_a_folder_that_cannot_be_made_names_its_variable(tmp_path, monkeypatch, variable, where):
    def refuse(self, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setenv(variable, str(tmp_path / "none"))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=rf"none cannot be made \(Read-only .*variable {variable} can name"):
        where()
    with pytest.raises(OSError, match=rf"x cannot be written \(Read-only .*variable {variable} can name"):
        files.write_atomic(tmp_path / "none" / "deep" / "x", b"")
