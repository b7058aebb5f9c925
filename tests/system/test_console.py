"""Streams as they come: in any encoding, closed, full or with nobody at the other end."""

import os
import shlex
import subprocess
import sys

import pytest

from replicate import __main__ as commands
from replicate.system import console, paths

posix = pytest.mark.skipif(os.name == "nt", reason="a POSIX shell and its devices")
COMMANDS = {"claims": "-m replicate claims --write", "list": "-m replicate notebooks list"}


def started(command, folder, shell="{}", pass_fds=(), **environment):
    """(exit status, stdout, stderr) of a Python command line, inside the shell line `shell`."""
    line = shell.format(f"{shlex.quote(sys.executable)} {command}")
    environment = {**os.environ, "REPLICATE_FIGURES": str(folder), **environment}
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=paths.ROOT,
        env=environment,
        capture_output=True,
        check=False,
        pass_fds=pass_fds,
    )
    return done.returncode, done.stdout, done.stderr.decode()


@posix
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "ascii"])
def test_what_an_encoding_cannot_show_is_replaced(tmp_path, command, encoding):
    status, out, err = started(command, tmp_path, PYTHONIOENCODING=encoding)
    assert (status, err) == (0, "") and len(out.decode(encoding).splitlines()) > 10
    assert "--write" not in command or (tmp_path / "claims.md").exists()


@posix
@pytest.mark.parametrize(
    ("command", "shell", "status"),
    [
        ("-m replicate notebooks list", "{} >&-", 0),
        ("-m replicate notebooks list", "{} <&- >&- 2>&-", 0),
        ("-m replicate claims --profile none", "{} 2>&-", 2),
        ("-m replicate claims --profile none", "{} 2>/dev/full", 2),
        ("-m replicate tokenizer train --vocab-size 20", "{} 2>&-", 2),
    ],
)
def test_streams_that_are_closed_change_no_exit_status_and_show_no_traceback(
    tmp_path, command, shell, status
):
    found, _, err = started(command, tmp_path, shell)
    assert found == status and err == ""
    assert "--write" not in command or (tmp_path / "claims.md").exists()


@posix
@pytest.mark.parametrize(
    ("command", "status"),
    [*((each, console.READER_GONE) for each in COMMANDS.values()), ("-m replicate --help", 0)],
)
def test_a_reader_that_is_gone_ends_the_command_quietly(tmp_path, command, status):
    reading, writing = os.pipe()
    os.close(reading)
    found, _, err = started(command, tmp_path, f"{{}} >&{writing}", pass_fds=[writing])
    os.close(writing)
    assert (found, err) == (status, "")
    assert "--write" not in command or (tmp_path / "claims.md").exists()


@posix
def test_a_full_disk_behind_stdout_is_told(tmp_path):
    status, _, err = started("-m replicate notebooks list", tmp_path, "{} > /dev/full")
    assert status == 1 and err.startswith("replicate: the disk is full (") and err.count("\n") == 1


def test_a_program_without_a_console_has_streams(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert commands.main(["notebooks", "list"]) == 0
    assert commands.main(["claims", "--profile", "none"]) == 2
    assert sys.stdout.write("漢") == 1


def test_a_file_that_cannot_be_written_names_what_moves_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("REPLICATE_FIGURES", str(tmp_path))

    def refuse():
        raise PermissionError(13, "Permission denied", str(tmp_path / "x.png"))

    assert console.ended(refuse) == 1
    assert capsys.readouterr().err == (
        f"replicate: Permission denied: {tmp_path / 'x.png'}; the variable REPLICATE_FIGURES can "
        "name another folder\n"
    )


def test_a_user_without_a_home_gets_one(monkeypatch, tmp_path):
    def unknown(uid=None):
        raise KeyError(uid)

    pwd = pytest.importorskip("pwd")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path))
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("HOME")
    assert console.ended(lambda: 0) == 0
    assert os.environ["HOME"] == str(tmp_path / "home") and (tmp_path / "home").is_dir()
