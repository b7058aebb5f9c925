"""The environment reproduce.py runs in: found ready, or made with pinned versions, checked by hash.

Standard library only, and readable by old Pythons, so that they can be told what is missing.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("REPLICATE_VENV") or ROOT / ".venv").absolute()
PYTHONS = ((3, 11), (3, 12), (3, 13), (3, 14))
EXTRAS = ("notebooks", "test")
MORE = ("course", "site", "hf", "browser")  # what only teaching, publishing and some tests need
INPUTS = ("pyproject.toml", "requirements.txt", "constraints.txt")
STAMP = "replicate-install.json"  # in a VENV made here; holds inputs_hash() and ROOT once it is complete
MORE_STAMP = "replicate-more.json"  # in the same VENV; holds the hash of requirements-more.txt
GPU_SIGNS = ("/dev/nvidia0", "/proc/driver/nvidia")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
KERNELS = "etc/ipython/ipython_kernel_config.py"  # in a VENV made here: what each Jupyter kernel runs first
KERNELS_SAY = """# Threads that wait sleep, also where JupyterLab is started by hand: `call` of reproduce.py.
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
"""


class Stop(Exception):
    """Ends the program with one sentence for the user."""


def check_python(version):
    """Raise Stop unless this Python is one the package supports."""
    if tuple(version[:2]) not in PYTHONS:
        here, *names = ["{}.{}".format(*each) for each in (version, *PYTHONS)]
        raise Stop(f"Python {here} is not supported; run reproduce.py with one of {', '.join(names)}.")


def ready(extras):
    """Path of the Python to run with: this one if it has the packages of `extras`, else VENV's, installed."""
    stamp = VENV / STAMP
    inside = Path(sys.prefix).resolve() == VENV.resolve()
    if not (inside and stamp.exists()) and has_packages(extras):
        return Path(sys.executable)
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    made = stamp.read_text(encoding="utf-8").splitlines() if stamp.exists() else []
    if made[:1] == [inputs_hash()] and python.exists():
        return python
    if made[1:] and Path(made[1]) != ROOT and Path(made[1]).exists() and ROOT not in VENV.parents:
        raise Stop(f"{VENV} belongs to the checkout {made[1]}; let REPLICATE_VENV name a folder of its own.")
    index = torch_index()
    print(f"Installing packages into {VENV}; this takes minutes the first time.", flush=True)
    if inside:
        python = Path(sys.executable)
    else:
        make_venv()
    pip_install(python, base_steps(index))
    if stamp.exists():
        stamp.write_text(f"{inputs_hash()}\n{ROOT}\n", encoding="utf-8")
    return python


def ready_for_more():
    """Path of the Python to run with, which has the packages of MORE too: our VENV gets them by hash."""
    python = ready(EXTRAS)
    if not python.is_relative_to(VENV) or not (VENV / STAMP).exists():
        if not has_packages(EXTRAS + MORE):
            extras = ",".join(EXTRAS + MORE)
            raise Stop(f'This environment lacks packages; install them by: pip install -e ".[{extras}]"')
        return python
    stamp, wanted = VENV / MORE_STAMP, hash_of((ROOT / "requirements-more.txt").read_text(encoding="utf-8"))
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"Installing packages of {', '.join(MORE)} into {VENV}.", flush=True)
        pip_install(python, [["--require-hashes", "--no-deps", "-r", "requirements-more.txt"]])
        stamp.write_text(wanted, encoding="utf-8")
    return python


def has_packages(extras):
    """True if the running interpreter has this checkout installed with everything `extras` name."""
    import tomllib
    from importlib import metadata

    sources = [dist.read_text("direct_url.json") for dist in metadata.distributions(name="replicate")]
    paths = [urllib.parse.urlparse(json.loads(source)["url"]).path for source in sources if source]
    if ROOT not in [Path(urllib.request.url2pathname(path)).resolve() for path in paths]:
        return False
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [x for name in extras for x in project["optional-dependencies"][name]]
    with contextlib.suppress(metadata.PackageNotFoundError):
        for line in wanted:
            if "'linux'" not in line or sys.platform.startswith("linux"):
                metadata.version(re.match(r"[A-Za-z0-9._-]+", line).group())
        return True
    return False


def inputs_hash():
    """Hash of what decides the installation: the requirement files, this Python and this folder."""
    parts = [(ROOT / name).read_text(encoding="utf-8") for name in INPUTS]
    parts += [f"{sys.version_info[0]}.{sys.version_info[1]}", str(ROOT)]
    return hash_of("\0".join(parts))


def hash_of(text):
    """SHA-256 of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def torch_index():
    """pip's options for torch: on Linux without an NVIDIA GPU PyTorch's index of CPU builds, if it answers.

    pip's own index has the build for CUDA there. REPLICATE_TORCH overrides: cpu insists, cuda leaves pip be.
    """
    choice = os.environ.get("REPLICATE_TORCH") or "auto"
    if choice not in ("auto", "cpu", "cuda"):
        raise Stop(f"REPLICATE_TORCH is {choice!r}; auto, cpu and cuda are known.")
    gpu = shutil.which("nvidia-smi") or any(Path(sign).exists() for sign in GPU_SIGNS)
    if not sys.platform.startswith("linux") or choice == "cuda" or (choice == "auto" and gpu):
        return []
    try:
        urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=5).close()
    except OSError as error:
        silent = f"PyTorch's index of CPU builds ({CPU_INDEX}) does not answer ({error})"
        if choice == "cpu":
            raise Stop(f"{silent}: run again later, or without REPLICATE_TORCH=cpu.") from None
        print(f"{silent}: taking torch as pip finds it, mostly with 2.5 GB for CUDA.", flush=True)
        return []
    return ["--extra-index-url", CPU_INDEX]


def make_venv():
    """Make VENV anew: one that misses something may be broken in any way. What others made is left alone."""
    if VENV.exists() and any(VENV.iterdir()):
        if not (VENV / STAMP).exists():
            raise Stop(f"{VENV} is in the way: activate it to use it, or rename or delete it, and run again.")
        shutil.rmtree(str(VENV))
    VENV.mkdir(parents=True, exist_ok=True)
    (VENV / STAMP).touch()
    if subprocess.call([sys.executable, "-m", "venv", str(VENV)]):
        raise Stop(f"The virtual environment {VENV} could not be made; the reason stands above.")
    (VENV / KERNELS).parent.mkdir(parents=True)
    (VENV / KERNELS).write_text(KERNELS_SAY, encoding="utf-8")


def base_steps(index):
    """Options of pip, call by call: locked packages by hash, then torch with `index`, and the checkout."""
    locked = ["--require-hashes", "--no-deps", "-r", "requirements.txt"]
    rest = ["--no-build-isolation", "-c", "constraints.txt", "-e", f".[{','.join(EXTRAS)}]", *index]
    return [locked, rest]


def pip_install(python, steps):
    """Call pip once for each step, with its options."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    for step in steps:
        if subprocess.call(pip + step, cwd=str(ROOT)):
            needs = "a network, proxy or mirror and about 3 GB of free disk, 9 GB with torch for CUDA"
            raise Stop(f"pip could not install the packages, for the reason above; it needs {needs}.")
