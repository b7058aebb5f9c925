"""reproduce.py and installation.py: every way it can go wrong, with fakes in place of pip and venv."""

import argparse
import ast
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

import installation
import reproduce
from installation import PipFailed, Stop

ROOT = Path(reproduce.__file__).parent


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout in a temporary folder; pip and venv are fakes that note their calls."""
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))
    fake = SimpleNamespace(root=tmp_path, venv=tmp_path / ".venv", pip=[], made=0, fail=[], works=False)

    def venv():
        fake.made += 1
        fake.works = True
        fake.venv.mkdir(exist_ok=True)
        (fake.venv / "pyvenv.cfg").touch()

    def prepare():
        if not fake.works:
            venv()

    def pip(extras):
        assert installation.read_stamp() == {}, "a stamp during the installation would outlive a crash"
        fake.pip.append(list(extras))
        if fake.fail:
            raise fake.fail.pop(0)

    def remove():
        fake.works = False

    monkeypatch.setattr(installation, "ROOT", tmp_path)
    monkeypatch.setattr(installation, "VENV", fake.venv)
    monkeypatch.setattr(installation, "has_packages", lambda extras: False)
    monkeypatch.setattr(installation, "starts", lambda python: fake.works)
    monkeypatch.setattr(installation, "prepare_venv", prepare)
    monkeypatch.setattr(installation, "remove_venv", remove)
    monkeypatch.setattr(installation, "pip_install", pip)
    return fake


def sentence(problem) -> str:
    text = str(problem.value if hasattr(problem, "value") else problem)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("version", "word"), [((3, 10, 4), "too old"), ((2, 7), "too old"), ((3, 14), "too new")]
)
def test_wrong_python_is_named_with_a_way_out(monkeypatch, version, word):
    monkeypatch.setattr(installation, "_runs", lambda name: name == "python3.12")
    with pytest.raises(Stop) as stop:
        installation.check_python((*version, "final"))
    text = sentence(stop)
    assert word in text and f"{version[0]}.{version[1]}" in text and "python3.12 reproduce.py" in text
    monkeypatch.setattr(installation, "_runs", lambda name: False)
    with pytest.raises(Stop, match=r"3\.11, 3\.12 or 3\.13"):
        installation.check_python(version)


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 9), (3, 13)])
def test_supported_pythons_pass(version):
    installation.check_python(version)


@pytest.mark.parametrize("name", ["reproduce.py", "installation.py"])
def test_old_pythons_can_read_the_files(name):
    """Else they would print a syntax error instead of the sentence."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 7))
    imported = {
        alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }
    assert imported <= sys.stdlib_module_names | {"installation"}


def test_installed_interpreter_is_used_as_it_is(checkout, monkeypatch):
    monkeypatch.setattr(installation, "has_packages", lambda extras: True)
    assert installation.ready(["notebooks"]) == Path(sys.executable)
    assert not checkout.pip and not checkout.made


def test_first_run_installs_and_the_second_does_not(checkout, capsys):
    python = installation.ready(["notebooks"])
    assert python.is_relative_to(checkout.venv)
    assert checkout.pip == [["notebooks"]] and checkout.made == 1
    assert "Installing" in capsys.readouterr().out
    installation.ready(["notebooks"])
    assert len(checkout.pip) == 1 and not capsys.readouterr().out


def test_test_extras_are_added_to_what_is_there(checkout):
    installation.ready(["notebooks"])
    installation.ready(["notebooks", "test"])
    installation.ready(["notebooks"])
    assert checkout.pip == [["notebooks"], ["notebooks", "test"]]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_install_again(checkout, name):
    installation.ready(["notebooks"])
    (checkout.root / name).write_text("# other\n", encoding="utf-8")
    installation.ready(["notebooks"])
    assert len(checkout.pip) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"inputs": 3}'])
def test_unreadable_stamp_counts_as_none(checkout, content):
    installation.ready(["notebooks"])
    (checkout.venv / installation.STAMP).write_text(content, encoding="utf-8")
    installation.ready(["notebooks"])
    assert len(checkout.pip) == 2


def test_interrupted_installation_is_finished(checkout):
    checkout.fail = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        installation.ready(["notebooks"])
    assert not (checkout.venv / installation.STAMP).exists()
    site = checkout.venv / "lib" / "python3.11" / "site-packages"
    whole, half = site / "whole-1.dist-info", site / "half-1.dist-info"
    for folder in (whole, half):
        folder.mkdir(parents=True)
        (folder / "METADATA").touch()
    (whole / "RECORD").touch()
    installation.ready(["notebooks"])
    assert whole.exists() and not half.exists()
    assert installation.read_stamp()["extras"] == ["notebooks"]


def test_damaged_venv_is_rebuilt_once(checkout):
    installation.ready(["notebooks"])
    (checkout.venv / installation.STAMP).unlink()
    checkout.fail = [PipFailed("no RECORD file.")]
    installation.ready(["notebooks"])
    assert checkout.made == 2 and len(checkout.pip) == 3
    (checkout.venv / installation.STAMP).unlink()
    checkout.fail = [PipFailed("one."), PipFailed("two.")]
    with pytest.raises(Stop, match="two"):
        installation.ready(["notebooks"])


def test_full_disk_is_seen_before_installing(checkout, monkeypatch):
    monkeypatch.setattr(installation.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e8))
    with pytest.raises(Stop) as stop:
        installation.ready(["notebooks"])
    assert "disk is full" in sentence(stop) and "0.5 GB" in sentence(stop)
    assert not checkout.made


PIP_SAYS = {
    "No network": "WARNING: Retrying after connection broken by 'NewConnectionError(...)'\n"
    "ERROR: Could not find a version that satisfies the requirement setuptools>=77 (from versions: none)",
    "disk is full": "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
    "no build of torch": "ERROR: No matching distribution found for torch==2.13.0",
    "Cannot uninstall x": "ERROR: Cannot uninstall x 1.0, no RECORD file was found",
    "gave no reason": "Traceback",
}


@pytest.mark.parametrize("expected", PIP_SAYS)
def test_pips_failures_become_one_sentence(tmp_path, expected):
    problem = installation.explain(PIP_SAYS[expected], tmp_path / "install.log")
    assert expected in sentence(problem)
    assert isinstance(problem, PipFailed) == (expected in ("Cannot uninstall x", "gave no reason"))


def test_pip_runs_with_constraints_and_leaves_a_log(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path))
    seen = []

    def fake(command, cwd, stdout, stderr):
        seen.append(command)
        stdout.write(b"Collecting\nERROR: Max retries exceeded\n")
        return len(seen) - 1  # succeeds, then fails

    monkeypatch.setattr(installation.subprocess, "call", fake)
    installation.pip_install(["notebooks", "test"])
    assert seen[0][-4:] == ["-c", "constraints.txt", "-e", ".[notebooks,test]"]
    with pytest.raises(Stop, match="No network"):
        installation.pip_install(["notebooks"])
    assert (tmp_path / "install.log").read_text().count("Collecting") == 2


def fake_venv(monkeypatch, tmp_path, returncode=0, stderr=""):
    """`python -m venv` that makes a folder with a program in it, or fails with `stderr`."""
    monkeypatch.setattr(installation, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(installation, "starts", lambda python: python.exists())

    def run(command, **kwargs):
        assert command[1:3] == ["-m", "venv"]
        if returncode == 0:
            python = installation.venv_python()
            python.parent.mkdir(parents=True)
            python.touch()
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(installation.subprocess, "run", run)


def test_broken_venv_is_replaced(tmp_path, monkeypatch, capsys):
    fake_venv(monkeypatch, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "pyvenv.cfg").touch()
    (tmp_path / ".venv" / "leftover").touch()
    installation.prepare_venv()
    assert installation.venv_python().exists() and not (tmp_path / ".venv" / "leftover").exists()
    assert "anew" in capsys.readouterr().out


def test_foreign_folder_is_left_alone(tmp_path, monkeypatch):
    fake_venv(monkeypatch, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "thesis.txt").touch()
    with pytest.raises(Stop, match="no virtual environment"):
        installation.prepare_venv()
    assert (tmp_path / ".venv" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("Error: Command '... -m ensurepip --upgrade' returned non-zero exit status 1.", "python3-venv"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("first\nsomething else", "something else"),
        ("", "does not start"),
    ],
)
def test_venv_that_cannot_be_made_is_explained(tmp_path, monkeypatch, stderr, expected):
    fake_venv(monkeypatch, tmp_path, 1, stderr)
    with pytest.raises(Stop) as stop:
        installation.prepare_venv()
    assert expected in sentence(stop)


def test_venv_in_use_is_explained(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Access is denied", path)

    monkeypatch.setattr(installation.shutil, "rmtree", refuse)
    with pytest.raises(Stop, match="in use"):
        installation.remove_venv()


def test_starts_asks_the_interpreter(tmp_path):
    assert installation.starts(sys.executable)
    assert not installation.starts(tmp_path / "python")
    assert installation._runs(sys.executable) and not installation._runs("python-that-is-not-there")


def test_has_packages_wants_this_checkout_and_every_package(tmp_path, monkeypatch):
    info = tmp_path / "replicate-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: replicate\nVersion: 0.1.0\n")
    monkeypatch.setattr(sys, "path", [str(ROOT), str(tmp_path), *sys.path])
    monkeypatch.setattr(installation, "required_names", lambda extras: ["replicate"])
    assert not installation.has_packages([])  # from an index, not from here
    (info / "direct_url.json").write_text(json.dumps({"url": tmp_path.as_uri()}))
    assert not installation.has_packages([])  # another checkout
    (info / "direct_url.json").write_text(json.dumps({"url": ROOT.as_uri(), "dir_info": {"editable": True}}))
    assert installation.has_packages([])
    monkeypatch.setattr(installation, "required_names", lambda extras: ["replicate", "no-such-package"])
    assert not installation.has_packages([])


def test_required_names_follow_the_system(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert {"torch", "papermill", "nbval", "triton"} <= set(
        installation.required_names(["notebooks", "test"])
    )
    monkeypatch.setattr(sys, "platform", "win32")
    assert "triton" not in installation.required_names(["test"])


def test_constraints_pin_every_requirement():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and pin.url is None, pin
        versions[pin.name] = specifier.version
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for line in project["dependencies"] + extras["notebooks"] + extras["test"]:
        wanted = Requirement(line)
        assert versions[wanted.name] in wanted.specifier, f"{wanted} is pinned to {versions[wanted.name]}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds, text):
    assert installation.duration(seconds) == text


def test_stage_prints_one_line(capsys):
    with installation.stage("Doing"):
        pass
    assert re.fullmatch(r"Doing \.\.\. 0 s\n", capsys.readouterr().out)
    with pytest.raises(Stop), installation.stage("Doing"):
        raise Stop("why")
    assert "stopped" in capsys.readouterr().out


# reproduce.py


@pytest.mark.parametrize(
    "arguments",
    [["--only", "03"], ["--seed", "1"], ["--profile", "smoke"], ["--fresh"], ["--keep-going"], ["--list"]],
)
def test_tests_take_no_options_of_a_run(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        reproduce.parse(["test", *arguments])
    assert stop.value.code == 2
    assert f"{arguments[0]} belongs to run; test takes pytest's options" in capsys.readouterr().err
    assert reproduce.parse(["test", "-x", "tests"])[1] == ["-x", "tests"]


def test_run_hands_every_option_to_the_runner(monkeypatch):
    calls = []
    monkeypatch.setattr(installation, "ready", lambda extras: calls.append(extras) or Path("python"))
    monkeypatch.setattr(reproduce, "call", lambda command: calls.append(command) or 0)
    monkeypatch.setattr(reproduce, "notebooks", lambda: [("03", "03_a", "A"), ("08", "08_b", "B")])
    arguments = ["--profile", "laptop", "--only", "3", "08_b", "--seed", "7", "--keep-going", "--fresh"]
    assert reproduce.main(arguments) == 0
    assert calls[0] == ["notebooks"]
    assert calls[1][1:5] == ["-m", "replicate", "notebooks", "run"]
    assert calls[1][5:] == [
        "--profile", "laptop", "--seed", "7", "--only", "3", "08_b", "--keep-going", "--fresh",
    ]  # fmt: skip


def test_tests_run_to_the_end_with_notebooks_last(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(installation, "ready", lambda extras: Path("python"))
    monkeypatch.setattr(
        reproduce, "call", lambda command: calls.append(command) or (1 if "check" in command else 0)
    )
    assert reproduce.main(["test"]) == 1
    assert len(calls) == 4 and calls[-1][-1] == "tests/test_notebooks.py"
    assert "--ignore=tests/test_notebooks.py" in calls[-2]
    out = capsys.readouterr().out
    assert "FAILED: Lint" in out and "== Unit tests: passed" in out


def test_tests_pass_arguments_to_pytest(monkeypatch):
    calls = []
    monkeypatch.setattr(installation, "ready", lambda extras: Path("python"))
    monkeypatch.setattr(reproduce, "call", lambda command: calls.append(command) or 5)
    assert reproduce.main(["test", "-k", "mask24"]) == 5
    assert calls == [["python", "-m", "pytest", "-k", "mask24"]]


@pytest.mark.parametrize(
    ("problem", "status", "expected"),
    [
        (Stop("One clear sentence."), 1, "One clear sentence."),
        (KeyboardInterrupt(), 130, "run the same command again"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "/x"),
    ],
)
def test_every_end_is_one_line(monkeypatch, capsys, problem, status, expected):
    def fail(options):
        raise problem

    monkeypatch.setattr(reproduce, "run_notebooks", fail)
    assert reproduce.main([]) == status
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1


def test_unknown_notebook_stops_before_installing(monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "notebooks", lambda: [("03", "03_a", "A")])
    monkeypatch.setattr(installation, "ready", lambda extras: pytest.fail("installed"))
    assert reproduce.main(["--only", "99"]) == 1
    assert "'99'" in capsys.readouterr().err


def test_list_reads_titles(tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    cells = [
        {"cell_type": "code", "source": "# no title"},
        {"cell_type": "markdown", "source": ["# 02 The ", "FFN\n"]},
    ]
    (tmp_path / "notebooks" / "02_flops.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    assert reproduce.main(["--list"]) == 0
    assert capsys.readouterr().out == "02 The FFN\n"


@pytest.mark.parametrize("arguments", [["--profile", "huge"], ["--sed", "3"], ["paint"]])
def test_bad_arguments_exit_2(arguments):
    with pytest.raises(SystemExit) as stop:
        reproduce.parse(arguments)
    assert stop.value.code == 2


def test_defaults():
    options, rest = reproduce.parse([])
    assert rest == []
    assert options == argparse.Namespace(
        command="run", profile="smoke", only=None, seed=1, keep_going=False, fresh=False, list=False
    )


def test_call_gives_the_exit_status(monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    check = (
        "import os, sys; sys.exit(3 if os.environ['PYTHONUTF8'] == '1' and os.getcwd() == sys.argv[1] else 4)"
    )
    assert reproduce.call([sys.executable, "-c", check, os.path.realpath(tmp_path)]) == 3


def test_call_lets_the_child_end_before_an_interrupt_goes_on(monkeypatch):
    killed = []

    class Child:
        def __init__(self, command, **kwargs):
            self.waits = 0

        def wait(self, timeout=None):
            self.waits += 1
            if self.waits == 1:
                raise KeyboardInterrupt
            return 0

        def kill(self):
            killed.append(self.waits)

    monkeypatch.setattr(reproduce.subprocess, "Popen", Child)
    with pytest.raises(KeyboardInterrupt):
        reproduce.call(["x"])
    assert killed == [2]
