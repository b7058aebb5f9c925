"""reproduce.py and installation.py: every way it can go wrong, with fakes in place of pip and venv."""

import argparse
import ast
import errno
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import installation
import reproduce
from installation import Stop

ROOT = Path(reproduce.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = PROJECT["optional-dependencies"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout in a temporary folder; pip and venv are fakes that note their calls."""
    for name in installation.INPUTS:
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))
    fake = SimpleNamespace(
        root=tmp_path, venv=tmp_path / ".venv", pip=0, made=0, fail=[], works=False, says=""
    )

    def venv(command, **kwargs):
        assert command[1:3] == ["-m", "venv"]
        fake.made += 1
        fake.works = not fake.says
        return subprocess.CompletedProcess(command, 1 if fake.says else 0, "", fake.says)

    def pip(index):
        assert (fake.venv / installation.STAMP).read_text() == "", "a stamp now would outlive a crash"
        fake.pip += 1
        if fake.fail:
            raise fake.fail.pop(0)

    monkeypatch.setattr(installation, "ROOT", tmp_path)
    monkeypatch.setattr(installation, "VENV", fake.venv)
    monkeypatch.setattr(installation, "has_packages", lambda extras: False)
    monkeypatch.setattr(installation, "starts", lambda python: fake.works)
    monkeypatch.setattr(installation, "torch_index", list)
    monkeypatch.setattr(installation, "pip_install", pip)
    monkeypatch.setattr(installation.subprocess, "run", venv)
    return fake


def sentence(problem) -> str:
    text = str(problem.value if hasattr(problem, "value") else problem)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("version", "word"), [((3, 10, 4), "too old"), ((2, 7), "too old"), ((3, 15), "too new")]
)
def test_wrong_python_is_named_with_a_way_out(monkeypatch, version, word):
    monkeypatch.setattr(installation, "runs", lambda name: name == "python3.12")
    with pytest.raises(Stop) as stop:
        installation.check_python((*version, "final"))
    text = sentence(stop)
    assert word in text and f"{version[0]}.{version[1]}" in text and "python3.12 reproduce.py" in text
    monkeypatch.setattr(installation, "runs", lambda name: False)
    with pytest.raises(Stop, match=r"3\.11, 3\.12, 3\.13 or 3\.14"):
        installation.check_python(version)


@pytest.mark.parametrize("minor", range(9, 18))
def test_supported_pythons_are_those_of_pyproject(monkeypatch, minor):
    monkeypatch.setattr(installation, "runs", lambda name: False)
    supported = SpecifierSet(PROJECT["requires-python"]).contains(f"3.{minor}")
    assert supported == (11 <= minor <= 14)
    try:
        installation.check_python((3, minor, 0))
    except Stop:
        assert not supported
    else:
        assert supported
    conda = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert f"python {PROJECT['requires-python']}" in conda
    assert "Python 3.11 to 3.14" in (ROOT / "README.md").read_text(encoding="utf-8")


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
    assert checkout.pip == 1 and checkout.made == 1
    assert "Installing" in capsys.readouterr().out
    assert installation.ready(installation.EXTRAS) == python
    assert checkout.pip == 1 and not capsys.readouterr().out


@pytest.mark.parametrize("name", installation.INPUTS)
def test_changed_requirements_install_again(checkout, name):
    installation.ready(["notebooks"])
    (checkout.venv / "leftover").touch()
    (checkout.root / name).write_text("# other\n", encoding="utf-8")
    installation.ready(["notebooks"])
    assert checkout.pip == 2 and not (checkout.venv / "leftover").exists()


@pytest.mark.parametrize("content", ["", '{"inputs": 3}'])
def test_unreadable_stamp_counts_as_none(checkout, content):
    installation.ready(["notebooks"])
    (checkout.venv / installation.STAMP).write_text(content, encoding="utf-8")
    installation.ready(["notebooks"])
    assert checkout.pip == 2


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), Stop("pip failed")])
def test_interrupted_installation_is_made_anew(checkout, problem):
    checkout.fail = [problem]
    with pytest.raises(type(problem)):
        installation.ready(["notebooks"])
    (checkout.venv / "half").touch()
    installation.ready(["notebooks"])
    assert checkout.made == 2 and not (checkout.venv / "half").exists()
    installation.ready(["notebooks"])
    assert checkout.pip == 2


def test_broken_venv_is_replaced(checkout):
    installation.ready(["notebooks"])
    checkout.works = False
    installation.ready(["notebooks"])
    assert checkout.made == 2 and checkout.works


def test_active_environment_of_the_user_gets_the_packages_and_stays_the_users(checkout, monkeypatch):
    """REPLICATE_VENV may name an active conda environment: no stamp, so it is never deleted later."""
    checkout.venv.mkdir()
    called = []
    monkeypatch.setattr(installation, "inside", lambda: True)
    monkeypatch.setattr(installation, "pip_install", called.append)
    assert installation.ready(["notebooks"]) == Path(sys.executable)
    assert called == [[]] and not checkout.made and not list(checkout.venv.iterdir())


def test_full_disk_is_seen_before_installing(checkout, monkeypatch):
    monkeypatch.setattr(installation.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e8))
    with pytest.raises(Stop) as stop:
        installation.ready(["notebooks"])
    assert "disk is full" in sentence(stop) and "0.5 GB" in sentence(stop)
    assert not checkout.made and not checkout.pip


def test_foreign_folder_is_left_alone(checkout):
    checkout.venv.mkdir()
    (checkout.venv / "thesis.txt").touch()
    with pytest.raises(Stop, match="in the way"):
        installation.ready(["notebooks"])
    assert (checkout.venv / "thesis.txt").exists() and not checkout.pip


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("Error: Command '... -m ensurepip --upgrade' returned non-zero exit status 1.", "python3-venv"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("first\nsomething else", "something else"),
        (" ", "does not start"),
    ],
)
def test_venv_that_cannot_be_made_is_explained_and_made_later(checkout, says, expected):
    checkout.says = says
    with pytest.raises(Stop) as stop:
        installation.ready(["notebooks"])
    assert expected in sentence(stop)
    checkout.says = ""
    assert installation.ready(["notebooks"]).is_relative_to(checkout.venv)


def test_venv_in_use_is_explained(checkout, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Access is denied", path)

    installation.ready(["notebooks"])
    checkout.works = False
    monkeypatch.setattr(installation.shutil, "rmtree", refuse)
    with pytest.raises(Stop, match="in use"):
        installation.ready(["notebooks"])


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
    assert expected in sentence(installation.explain(PIP_SAYS[expected], tmp_path / "install.log"))


def test_pip_checks_hashes_then_adds_torch_and_leaves_a_log(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path))
    seen = []

    def fake(command, cwd, stdout, stderr):
        seen.append(" ".join(command))
        stdout.write(b"Collecting\nERROR: Max retries exceeded\n")
        stdout.flush()
        return len(seen) // 3  # the third call fails

    monkeypatch.setattr(installation.subprocess, "call", fake)
    installation.pip_install(["--extra-index-url", "U"])
    assert "--require-hashes --no-deps -r requirements.txt" in seen[0] and "U" not in seen[0]
    assert "-c constraints.txt -e .[notebooks,test] --extra-index-url U" in seen[1]
    assert "require-hashes" not in seen[1]
    with pytest.raises(Stop, match="No network"):
        installation.pip_install([])
    assert len(seen) == 3 and (tmp_path / "install.log").read_text().count("Collecting") == 3


CPU = ["--extra-index-url", installation.CPU_INDEX]


@pytest.mark.parametrize(
    ("choice", "platform", "gpu", "answers", "expected"),
    [
        ("", "linux", False, True, CPU),
        ("auto", "linux", False, False, "does not answer"),
        ("auto", "linux", True, True, []),
        ("auto", "darwin", False, True, []),
        ("cpu", "linux", True, True, CPU),
        ("cpu", "linux", True, False, Stop),
        ("cpu", "win32", False, True, []),
        ("cuda", "linux", False, True, []),
        ("tpu", "linux", False, True, Stop),
    ],
)
def test_torch_comes_for_the_cpu_where_there_is_no_gpu(
    tmp_path, monkeypatch, capsys, choice, platform, gpu, answers, expected
):
    def ask(url, timeout):
        if not answers:
            raise OSError("Name or service not known")
        return open(os.devnull)  # noqa: PTH123

    monkeypatch.setenv("REPLICATE_TORCH", choice)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(installation, "GPU_SIGNS", [str(tmp_path)] if gpu else [])
    monkeypatch.setattr(installation.shutil, "which", lambda name: None)
    monkeypatch.setattr(installation.urllib.request, "urlopen", ask)
    if expected is Stop:
        with pytest.raises(Stop, match="REPLICATE_TORCH"):
            installation.torch_index()
    elif isinstance(expected, str):
        assert installation.torch_index() == []
        out = capsys.readouterr().out
        assert expected in out and out.count("\n") == 1
    else:
        assert installation.torch_index() == expected
        assert not capsys.readouterr().out


def test_starts_asks_the_interpreter(tmp_path):
    assert installation.starts(sys.executable)
    assert not installation.starts(tmp_path / "python")
    assert installation.runs(sys.executable) and not installation.runs("python-that-is-not-there")


def test_has_packages_wants_this_checkout_and_every_package(tmp_path, monkeypatch):
    def require(*lines):
        (tmp_path / "pyproject.toml").write_text(f"[project]\ndependencies = {list(lines)}\n")

    info = tmp_path / "lib" / "replicate-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: replicate\nVersion: 0.1.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(info.parent), *sys.path])
    monkeypatch.setattr(installation, "ROOT", tmp_path)
    require("replicate>=0.1", "no-such-package; sys_platform == 'linux'")
    monkeypatch.setattr(sys, "platform", "win32")
    assert not installation.has_packages([])  # from an index, not from here
    (info / "direct_url.json").write_text(json.dumps({"url": info.as_uri()}))
    assert not installation.has_packages([])  # another checkout
    (info / "direct_url.json").write_text(json.dumps({"url": tmp_path.as_uri(), "dir_info": {}}))
    assert installation.has_packages([])
    monkeypatch.setattr(sys, "platform", "linux")
    assert not installation.has_packages([])


def test_pins_cover_every_requirement_and_have_hashes():
    """All but torch's builds: see constraints.txt."""
    locked = (ROOT / "requirements.txt").read_text(encoding="utf-8").replace("\\\n", "")
    free = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    versions = {}
    for line in (locked + free).splitlines():
        if line and not line.startswith("#"):
            text, *hashes = line.split("--hash=")
            pin = Requirement(text)
            (specifier,) = pin.specifier
            assert specifier.operator == "==" and pin.url is None and pin.name not in versions, pin
            assert not pin.name.startswith(("nvidia-", "cuda-")), f"{pin.name}: add to no-emit-package"
            assert bool(hashes) == (pin.name not in ("torch", "triton")), pin
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", text.strip()) for text in hashes), pin
            versions[pin.name] = specifier.version
    for line in PROJECT["dependencies"] + OPTIONAL["notebooks"] + OPTIONAL["test"] + ["setuptools>=77"]:
        wanted = Requirement(line)
        assert versions[wanted.name] in wanted.specifier, f"{wanted} is pinned to {versions[wanted.name]}"


WITHOUT_IMPORT = {
    "tabulate": ("replicate/figures.py", ".to_markdown("),  # pandas imports it
    "jupyterlab": ("README.md", "jupyter lab"),
    "ipykernel": ("notebooks/00_start_here.ipynb", "(ipykernel)"),
    "pytest-timeout": ("pyproject.toml", "\ntimeout = "),
    "pytest-xdist": ("reproduce.py", '"-n"'),
    "ruff": ("reproduce.py", '"ruff"'),
}


def test_every_dependency_is_used():
    text = [path.read_text(encoding="utf-8") for path in ROOT.glob("replicate/**/*.py")]
    text += [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py")]
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", "\n".join(text), re.MULTILINE))
    for line in PROJECT["dependencies"] + sum(OPTIONAL.values(), []):  # noqa: RUF017
        name = Requirement(line).name
        file, sign = WITHOUT_IMPORT.get(name, (None, None))
        used = (
            name.replace("-", "_") in imported if file is None else sign in (ROOT / file).read_text("utf-8")
        )
        assert used, f"nothing imports or runs {name}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "125 min 00 s")],
)
def test_duration(seconds, text):
    assert installation.duration(seconds) == text


# reproduce.py


@pytest.mark.parametrize(
    "arguments",
    [["--only", "03"], ["--seed", "1"], ["--profile", "smoke"], ["--fresh"], ["--keep-going"], ["--list"]],
)
@pytest.mark.parametrize("command", ["test", "install"])
def test_only_a_run_takes_its_options(capsys, command, arguments):
    with pytest.raises(SystemExit) as stop:
        reproduce.parse([command, *arguments])
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


def test_install_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(installation, "ready", lambda extras: Path("python") / "-".join(extras))
    monkeypatch.setattr(reproduce, "call", lambda command: pytest.fail("ran"))
    assert reproduce.main(["install"]) == 0
    assert str(Path("python") / "notebooks-test") in capsys.readouterr().out


def test_read_only_checkout_is_told_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(installation, "ready", lambda extras: pytest.fail("installed"))
    monkeypatch.setattr(installation.os, "access", lambda path, mode: False)
    monkeypatch.setenv("REPLICATE_FIGURES", str(tmp_path / "drawn"))
    assert reproduce.main([]) == 1
    err = capsys.readouterr().err
    assert "drawn cannot be written" in err and "REPLICATE_VENV" in err and err.count("\n") == 1


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
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            1,
            "/x cannot be written: set other folders",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/x"),
            1,
            "REPLICATE_VENV, REPLICATE_RUNS and REPLICATE_F",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), 1, "No such file"),
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
        command="run", profile="smoke", only=None, seed=1, keep_going=False, fresh=False, list=False,
        everywhere=False,
    )  # fmt: skip


@pytest.mark.parametrize(("spent", "left_out"), [(0, 0), (50 * 60, 2)])
def test_everywhere_adds_a_processor_and_a_seed_while_there_is_time(monkeypatch, capsys, spent, left_out):
    seen = []
    monkeypatch.setattr(reproduce.installation, "ready", lambda extras: "python")
    monkeypatch.setattr(reproduce, "call", lambda command: seen.append(command[-1]) or 0)
    begun = reproduce.time.monotonic() - spent
    assert reproduce.run_tests([], True, begun) == 0
    assert len(seen) == 6 - left_out and capsys.readouterr().out.count("left out, 50 min") == left_out
    assert {"--processor=plain", "--notebook-seed=drawn"} <= set(seen) or left_out
    with pytest.raises(SystemExit):
        reproduce.parse(["--everywhere"])


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
