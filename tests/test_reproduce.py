"""reproduce.py and installation.py, with fakes in place of pip and venv."""

import ast
import errno
import json
import os
import re
import shutil
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
    for name in [*installation.INPUTS, "requirements-more.txt"]:
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    fake = SimpleNamespace(root=tmp_path, venv=tmp_path / ".venv", pip=[], made=0, fails="")

    def call(command, cwd=None):
        if command[1:3] == ["-m", "venv"]:
            fake.made += 1
            python = fake.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
            python.parent.mkdir()
            python.touch()
            return int(fake.fails == "venv")
        stamp = installation.MORE_STAMP if "requirements-more.txt" in command else installation.STAMP
        stamp = fake.venv / stamp
        assert not stamp.exists() or not stamp.read_text(), "a stamp now would outlive a crash"
        if fake.fails == "interrupt":
            raise KeyboardInterrupt
        fake.pip.append(" ".join(command))
        return int(fake.fails == "pip")

    monkeypatch.setattr(installation, "ROOT", tmp_path)
    monkeypatch.setattr(installation, "VENV", fake.venv)
    monkeypatch.setattr(installation, "has_packages", lambda extras: False)
    monkeypatch.setattr(installation, "torch_index", lambda: ["--extra-index-url", "U"])
    monkeypatch.setattr(installation.subprocess, "call", call)
    return fake


@pytest.mark.parametrize("minor", range(9, 18))
def test_supported_pythons_are_those_of_pyproject(minor):
    supported = SpecifierSet(PROJECT["requires-python"]).contains(f"3.{minor}")
    assert supported == (11 <= minor <= 14)
    if supported:
        installation.check_python((3, minor, 0, "final", 0))
    else:
        with pytest.raises(Stop, match=rf"Python 3\.{minor} is not supported; .* 3\.11, .* 3\.14\.$"):
            installation.check_python((3, minor, 0, "final", 0))
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


def test_first_run_installs_by_hash_and_the_second_does_not(checkout, capsys):
    python = installation.ready(["notebooks"])
    assert python.is_relative_to(checkout.venv) and checkout.made == 1
    locked, rest = checkout.pip
    assert "--require-hashes --no-deps -r requirements.txt" in locked and "U" not in locked.split()
    assert "-c constraints.txt -e .[notebooks,test] --extra-index-url U" in rest
    assert "require-hashes" not in rest
    assert "Installing" in capsys.readouterr().out
    assert installation.ready(installation.EXTRAS) == python
    assert len(checkout.pip) == 2 and not capsys.readouterr().out


@pytest.mark.parametrize("name", [*installation.INPUTS, "stamp", "python"])
def test_what_is_changed_or_broken_is_made_anew(checkout, name):
    python = installation.ready(["notebooks"])
    (checkout.venv / "leftover").touch()
    if name == "python":
        python.unlink()
    else:
        path = checkout.venv / installation.STAMP if name == "stamp" else checkout.root / name
        path.write_text("# other\n", encoding="utf-8")
    installation.ready(["notebooks"])
    assert len(checkout.pip) == 4 and not (checkout.venv / "leftover").exists()


def test_more_packages_come_on_top_once(checkout, capsys):
    python = installation.ready_for_more()
    assert "--require-hashes --no-deps -r requirements-more.txt" in checkout.pip[-1]
    assert "Installing packages of course, site, hf, browser" in capsys.readouterr().out
    assert installation.ready_for_more() == installation.ready(["notebooks"]) == python
    assert len(checkout.pip) == 3
    (checkout.venv / installation.STAMP).write_text("older")
    installation.ready(["notebooks"])
    assert not (checkout.venv / installation.MORE_STAMP).exists(), "it went with the folder"
    checkout.fails = "pip"
    with pytest.raises(Stop):
        installation.ready_for_more()
    assert not (checkout.venv / installation.MORE_STAMP).exists()


def test_more_packages_are_never_put_into_a_users_environment(checkout, monkeypatch):
    monkeypatch.setattr(installation, "has_packages", lambda extras: "course" not in extras)
    with pytest.raises(Stop, match=r'pip install -e "\.\[notebooks,test,course,site,hf,browser\]"'):
        installation.ready_for_more()
    monkeypatch.setattr(installation, "has_packages", lambda extras: True)
    assert installation.ready_for_more() == Path(sys.executable)
    assert not checkout.pip


@pytest.mark.parametrize("fails", ["interrupt", "pip", "venv"])
def test_installation_that_ended_early_is_made_anew(checkout, fails):
    checkout.fails = fails
    with pytest.raises((KeyboardInterrupt, Stop)) as stop:
        installation.ready(["notebooks"])
    assert fails == "interrupt" or "above" in str(stop.value)
    (checkout.venv / "half").touch()
    checkout.fails, checkout.pip = "", []
    installation.ready(["notebooks"])
    assert checkout.made == 2 and not (checkout.venv / "half").exists()
    installation.ready(["notebooks"])
    assert len(checkout.pip) == 2


def test_active_environment_of_the_user_gets_the_packages_and_stays_the_users(checkout, monkeypatch):
    """REPLICATE_VENV may name an active conda environment: no stamp, so it is never deleted later."""
    checkout.venv.mkdir()
    called = []
    monkeypatch.setattr(sys, "prefix", str(checkout.venv))
    monkeypatch.setattr(installation, "pip_install", lambda python, steps: called.append(python))
    assert installation.ready(["notebooks"]) == Path(sys.executable)
    assert called == [Path(sys.executable)] and not checkout.made and not list(checkout.venv.iterdir())


def test_foreign_folder_is_left_alone(checkout):
    checkout.venv.mkdir()
    (checkout.venv / "thesis.txt").touch()
    with pytest.raises(Stop, match="in the way"):
        installation.ready(["notebooks"])
    assert (checkout.venv / "thesis.txt").exists() and not checkout.pip


def test_an_environment_of_another_checkout_is_left_alone(checkout, tmp_path_factory, monkeypatch):
    shared, other = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("other")
    checkout.venv = shared / "venv"
    monkeypatch.setattr(installation, "VENV", checkout.venv)
    python = installation.ready(["notebooks"])
    assert installation.ready(["notebooks"]) == python and len(checkout.pip) == 2
    for name in installation.INPUTS:
        (other / name).write_text((checkout.root / name).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(installation, "ROOT", other)
    with pytest.raises(Stop, match=f"belongs to the checkout {re.escape(str(checkout.root))}"):
        installation.ready(["notebooks"])
    assert len(checkout.pip) == 2 and python.exists()
    shutil.rmtree(checkout.root)
    installation.ready(["notebooks"])
    assert len(checkout.pip) == 4, "the other checkout is gone"


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


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-more.txt"])
def test_pins_cover_every_requirement_and_have_hashes(file):
    """All but torch's builds: see constraints.txt."""
    locked = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", "")
    free = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    versions = {}
    for line in (locked + free).splitlines():
        if line and not line.startswith("#"):
            text, *hashes = line.split("--hash=")
            pin = Requirement(text)
            (specifier,) = pin.specifier
            assert specifier.operator == "==" and pin.url is None, pin
            assert not pin.name.startswith(("nvidia-", "cuda-")), f"{pin.name}: add to no-emit-package"
            assert bool(hashes) == (pin.name not in ("torch", "triton")), pin
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", text.strip()) for text in hashes), pin
            pinned = versions.setdefault(pin.name, {})
            assert str(pin.marker) not in pinned, pin  # one version for each kind of machine
            pinned[str(pin.marker)] = specifier.version
    extras = installation.EXTRAS + (installation.MORE if "more" in file else ())
    for line in PROJECT["dependencies"] + [x for name in extras for x in OPTIONAL[name]] + ["setuptools>=77"]:
        wanted = Requirement(line)
        pinned = versions[wanted.name].values()
        assert all(version in wanted.specifier for version in pinned), f"{wanted} is pinned to {pinned}"


WITHOUT_IMPORT = {
    "tabulate": ("replicate/figures.py", ".to_markdown("),  # pandas imports it
    "jupyterlab": ("README.md", "jupyter lab"),
    "ipykernel": ("notebooks/00_start_here.ipynb", "(ipykernel)"),
    "accelerate": ("tests/hf/test_models.py", "transformers.Trainer("),  # which imports it
    "nbgrader": ("course/README.md", "nbgrader autograde"),
    "sphinx": ("site/build.py", '"sphinx"'),
    "myst-nb": ("site/conf.py", '"myst_nb"'),
    "sphinx-exercise": ("site/conf.py", '"sphinx_exercise"'),
    "sphinx-book-theme": ("site/conf.py", '"sphinx_book_theme"'),
    "sphinxcontrib-bibtex": ("site/conf.py", '"sphinxcontrib.bibtex"'),
    "playwright": ("tests/browsers.py", '"playwright.sync_api"'),
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


# reproduce.py


@pytest.fixture
def calls(monkeypatch):
    """The commands that would run; all succeed but ruff's."""
    calls = []
    monkeypatch.setattr(reproduce, "ready", lambda extras: Path("python"))
    monkeypatch.setattr(reproduce, "ready_for_more", lambda: Path("python+"))
    monkeypatch.setattr(reproduce, "call", lambda command: calls.append(command) or int("ruff" in command))
    return calls


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "-m replicate notebooks run"),
        ("run --only 3 08_b", "-m replicate notebooks run --only 3 08_b"),
        ("--profile laptop --seed 7", "-m replicate notebooks run --profile laptop --seed 7"),
        ("--list", "-m replicate notebooks list"),
        ("test -k mask24", "-m pytest -k mask24"),
        ("test tests/browser -x", "+ -m pytest tests/browser -x"),
        ("site --out folder", "+ site/build.py --out folder"),
    ],
)
def test_arguments_go_to_the_runner_or_to_pytest(calls, arguments, expected):
    """With the environment that has more packages (python+) where labs, site or browser are meant."""
    assert reproduce.main(arguments.split()) == 0
    assert " ".join(calls[0]) == f"python{'' if expected[0] == '+' else ' '}{expected}" and len(calls) == 1


def test_options_of_the_docstring_are_those_of_the_runner(capsys):
    from replicate import __main__ as commands

    with pytest.raises(SystemExit):
        commands.main(["notebooks", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"reproduce\.py (--[a-z-]+)", reproduce.__doc__)) - {"--list"} <= known


def test_tests_run_to_the_end_with_notebooks_last(calls, capsys):
    assert reproduce.main(["test"]) == 1
    assert len(calls) == 4 and calls[-1][-1] == "tests/test_notebooks.py"
    left = {f"--ignore={place}" for place in ("tests/test_notebooks.py", *reproduce.MORE_TESTS)}
    assert left <= set(calls[-2])
    assert "FAILED: Lint, Format." in capsys.readouterr().out


@pytest.mark.parametrize(("allowed", "left_out"), [(1000, 0), (-1, 2)])
def test_everywhere_adds_a_processor_and_a_seed_while_there_is_time(
    monkeypatch, calls, capsys, allowed, left_out
):
    monkeypatch.setattr(reproduce, "LONG_ENOUGH", allowed)
    reproduce.main(["test", "--everywhere"])
    assert len(calls) == 7 - left_out and capsys.readouterr().out.count("left out") == left_out
    assert {"--processor=plain", "--notebook-seed=drawn"} <= {call[-1] for call in calls} or left_out


def test_install_and_help_run_nothing(calls, capsys):
    assert reproduce.main(["install"]) == reproduce.main(["test", "--help"]) == 0
    assert not calls and capsys.readouterr().out == f"Ready: python\n{reproduce.__doc__}\n"


@pytest.mark.parametrize(
    ("problem", "status", "expected"),
    [
        (Stop("One clear sentence."), 1, "One clear sentence."),
        (KeyboardInterrupt(), 130, "run the same command again"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 1, "Read-only file system: '/x'"),
    ],
)
def test_every_end_is_one_line(monkeypatch, capsys, problem, status, expected):
    def fail(extras):
        raise problem

    monkeypatch.setattr(reproduce, "ready", fail)
    assert reproduce.main([]) == status
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1


def test_call_gives_the_exit_status(monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    check = (
        "import os, sys; sys.exit(3 if os.environ['PYTHONUTF8'] == '1' and os.getcwd() == sys.argv[1] else 4)"
    )
    assert reproduce.call([sys.executable, "-c", check, os.path.realpath(tmp_path)]) == 3


@pytest.mark.parametrize(("own", "given"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep_unless_it_is_chosen_otherwise(monkeypatch, own, given):
    """On two cores of which another process used one, chapter 03 took ten minutes instead of one."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    check = f"import os, sys; sys.exit(os.environ.get('OMP_WAIT_POLICY') != '{given}')"
    assert reproduce.call([sys.executable, "-c", check]) == 0
    ask = "from replicate.report import notebooks; print(notebooks.KERNEL_ENV['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == given


@pytest.mark.parametrize(("own", "given"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_in_kernels_that_are_started_by_hand_too(checkout, monkeypatch, own, given):
    """A kernel runs the file before a notebook can import torch, which reads the variable once."""
    installation.ready(["notebooks"])
    monkeypatch.undo()
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    ask = """import os, sys
import IPython.core.application as application
assert application.ENV_CONFIG_DIRS == [os.path.join(sys.prefix, "etc", "ipython")]
application.ENV_CONFIG_DIRS[:] = [sys.argv[1]]
from ipykernel.kernelapp import IPKernelApp
kernel = IPKernelApp()
kernel.init_config_files()
kernel.load_config_file()
print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)"""
    folder = (checkout.venv / installation.KERNELS).parent
    done = subprocess.run([sys.executable, "-c", ask, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{given} False"


def test_call_lets_the_child_end_before_an_interrupt_goes_on(monkeypatch):
    ends = iter([KeyboardInterrupt, 0])

    def wait():
        if (end := next(ends)) is KeyboardInterrupt:
            raise end
        return end

    monkeypatch.setattr(reproduce.subprocess, "Popen", lambda *_, **__: SimpleNamespace(wait=wait))
    with pytest.raises(KeyboardInterrupt):
        reproduce.call(["x"])
    assert not list(ends)
