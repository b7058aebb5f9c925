"""The environment reproduce.py runs in: found ready, or made with pinned versions, checked by hash.

Standard library only, and readable by old Pythons, so that they can be told what is missing. A failure
a user can mend raises `Stop` with one sentence that says how.
"""

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("REPLICATE_VENV") or ROOT / ".venv").absolute()
PYTHONS = ((3, 11), (3, 12), (3, 13), (3, 14))
EXTRAS = ("notebooks", "test")
INPUTS = ("pyproject.toml", "requirements.txt", "constraints.txt")
STAMP = "replicate-install.json"  # in a VENV made here; holds inputs_hash() once it is complete
NEEDED_GB, CUDA_GB = 3.0, 9.0  # free disk: everything unpacked, with pip's temporary files
GPU_SIGNS = ("/dev/nvidia0", "/proc/driver/nvidia")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

NETWORK_SIGNS = (
    "NewConnectionError", "ConnectTimeoutError", "Max retries exceeded", "ReadTimeoutError", "ProxyError",
    "Temporary failure in name resolution", "Name or service not known", "getaddrinfo failed",
    "nodename nor servname", "Network is unreachable", "Connection refused", "Connection reset",
    "CERTIFICATE_VERIFY_FAILED", "Read timed out", "IncompleteRead", "ProtocolError",
)  # fmt: skip
DISK_SIGNS = ("No space left on device", "Errno 28", "Disk quota exceeded", "WinError 112")


class Stop(Exception):
    """Ends the program with one sentence for the user."""


def check_python(version):
    """Raise Stop unless this Python is one the package supports."""
    here = tuple(version[:2])
    if here in PYTHONS:
        return
    names = [f"{major}.{minor}" for major, minor in PYTHONS]
    found = next((f"python{name}" for name in reversed(names) if runs(f"python{name}")), None)
    advice = f"run `{found} reproduce.py`" if found else "install one of these and run reproduce.py with it"
    raise Stop(
        f"Python {here[0]}.{here[1]} is too {'old' if here < PYTHONS[0] else 'new'}: this package needs "
        f"Python {', '.join(names[:-1])} or {names[-1]}; {advice}."
    )


def ready(extras):
    """Path of the Python to run with: this one if it has the packages of `extras`, else VENV's, installed."""
    stamp = VENV / STAMP  # only in an environment made here
    if not (inside() and stamp.exists()) and has_packages(extras):
        return Path(sys.executable)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == inputs_hash() and starts(venv_python()):
        return venv_python()
    start = time.monotonic()
    index = torch_index()
    print(f"Installing packages into {VENV}; minutes the first time; log: {log_file()}", flush=True)
    if not inside():
        make_venv()
    pip_install(index)
    if stamp.exists():
        stamp.write_text(inputs_hash(), encoding="utf-8")
    print(f"Installed in {duration(time.monotonic() - start)}.", flush=True)
    return venv_python()


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
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


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
    except (OSError, http.client.HTTPException) as error:
        silent = f"PyTorch's index of CPU builds ({CPU_INDEX}) does not answer"
        if choice == "cpu":
            raise Stop(f"{silent}: run again later, or without REPLICATE_TORCH=cpu ({error}).") from None
        print(f"{silent}: taking torch as pip finds it, mostly with 2.5 GB for CUDA.", flush=True)
        return []
    return ["--extra-index-url", CPU_INDEX]


def inside():
    """True if the running interpreter is VENV's."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def venv_python():
    """Path of VENV's interpreter on this system."""
    if inside():
        return Path(sys.executable)
    return VENV / "Scripts" / "python.exe" if os.name == "nt" else VENV / "bin" / "python"


def runs(python, code=""):
    """True if the interpreter exists and runs the code (version managers leave names that do not start)."""
    with contextlib.suppress(OSError):
        return (
            subprocess.run([str(python), "-I", "-c", code], capture_output=True, check=False).returncode == 0
        )
    return False


def starts(python):
    """True if the interpreter runs, has pip, and is of the version running now."""
    version = tuple(sys.version_info[:2])
    return runs(python, f"import sys, pip; sys.exit(sys.version_info[:2] != {version})")


def make_venv():
    """Make VENV anew: one that misses something may be broken in any way. What others made is left alone."""
    if VENV.exists() and any(VENV.iterdir()):
        if not (VENV / STAMP).exists():
            raise Stop(f"{VENV} is in the way: activate it to use it, or rename or delete it, and run again.")
        try:
            shutil.rmtree(str(VENV))
        except OSError as error:
            raise Stop(f"{VENV} is in use ({error.strerror}): delete it and run again.") from None
    VENV.mkdir(parents=True, exist_ok=True)
    (VENV / STAMP).touch()
    if shutil.disk_usage(str(VENV)).free < NEEDED_GB * 1e9:
        raise Stop(disk_sentence())
    command = [sys.executable, "-m", "venv", str(VENV)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode == 0 and starts(venv_python()):
        return
    text = (made.stdout + made.stderr).strip()
    if any(sign in text for sign in DISK_SIGNS):
        raise Stop(disk_sentence())
    if "ensurepip" in text:
        raise Stop(
            "This Python cannot make virtual environments because ensurepip is missing: install it "
            "(Debian and Ubuntu: `sudo apt install python3-venv`) and run again."
        )
    last = text.splitlines()[-1] if text else "the new interpreter does not start"
    raise Stop(f"The virtual environment {VENV} could not be made: {last}")


def pip_install(index):
    """Install the locked packages by hash, then torch with pip's options `index`, and the checkout."""
    pip = [str(venv_python()), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    pip += ["--progress-bar", "off"]
    locked = ["--require-hashes", "--no-deps", "-r", "requirements.txt"]
    rest = ["--no-build-isolation", "-c", "constraints.txt", "-e", f".[{','.join(EXTRAS)}]", *index]
    log = log_file()
    with log.open("ab") as sink:
        start = sink.tell()
        for step in (locked, rest):
            if subprocess.call(pip + step, cwd=str(ROOT), stdout=sink, stderr=subprocess.STDOUT):
                raise Stop(explain(log.read_bytes()[start:].decode("utf-8", "replace"), log))


def explain(text, log):
    """The sentence for a failed pip, from what it printed."""
    if any(sign in text for sign in DISK_SIGNS):
        return disk_sentence()
    errors = [line.strip() for line in text.splitlines() if line.startswith("ERROR")]
    problem = f"pip failed: {errors[-1] if errors else 'it gave no reason'}"
    if any(sign in text for sign in NETWORK_SIGNS):
        problem = (
            "No network: pip could not reach its package index; connect, or set a proxy or mirror as pip "
        )
        problem += "expects, and run again"
    elif re.search(r"No matching distribution found for torch\b", text):
        problem = "There is no build of torch for this machine: it needs 64-bit Linux, Windows or a Mac with "
        problem += "Apple silicon and macOS 14"
    return f"{problem} (details: {log})."


def disk_sentence():
    """The sentence for a full disk."""
    where = VENV if VENV.exists() else ROOT
    return (
        f"The disk is full: installing needs about {NEEDED_GB:.0f} GB, torch for CUDA {CUDA_GB:.0f}; "
        f"{shutil.disk_usage(str(where)).free / 1e9:.1f} GB are free at {where}; free some space and run "
        "again."
    )


def explain_os(error):
    """The sentence for a disk that is full or cannot be written; else the error's own."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)) or getattr(error, "winerror", 0) == 112:
        return disk_sentence()
    if error.filename and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"{error.filename} cannot be written: set other folders as REPLICATE_VENV, REPLICATE_RUNS and "
            "REPLICATE_FIGURES (in place of .venv, runs and figures) and run again."
        )
    return str(error)


def log_file():
    """Path of pip's log."""
    return folder("REPLICATE_RUNS", "runs") / "install.log"


def folder(variable, name):
    """The folder that replicate.paths writes to, made if missing; OSError if it cannot be written."""
    path = Path(os.environ.get(variable) or ROOT / name)
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(str(path), os.W_OK):
        raise PermissionError(errno.EACCES, "cannot be written", str(path))
    return path


def duration(seconds):
    """Seconds as a person says them: 4 s, 3 min 20 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
