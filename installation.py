"""The environment reproduce.py runs in: found ready, or made in .venv with pinned versions.

Standard library only, and readable by old Pythons, so that they can be told what is missing. A failure
a user can mend raises `Stop` with one sentence that says how.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
OLDEST, BEYOND = (3, 11), (3, 14)
STAMP = "replicate-install.json"
NEEDED_GB = 3.0  # the CPU build of torch and JupyterLab, unpacked, with pip's temporary files

NETWORK_SIGNS = (
    "NewConnectionError", "ConnectTimeoutError", "Max retries exceeded", "ReadTimeoutError", "ProxyError",
    "Temporary failure in name resolution", "Name or service not known", "getaddrinfo failed",
    "nodename nor servname", "Network is unreachable", "Connection refused", "Connection reset",
    "CERTIFICATE_VERIFY_FAILED", "Read timed out", "IncompleteRead", "ProtocolError",
)  # fmt: skip
DISK_SIGNS = ("No space left on device", "Errno 28", "Disk quota exceeded", "WinError 112")


class Stop(Exception):
    """Ends the program with one sentence for the user."""


class PipFailed(Stop):
    """pip failed for a reason that a new .venv may cure."""


def check_python(version):
    """Raise Stop unless this Python is one the package supports."""
    if OLDEST <= tuple(version[:2]) < BEYOND:
        return
    age = "too old" if tuple(version[:2]) < OLDEST else "too new"
    found = next((name for name in ("python3.13", "python3.12", "python3.11") if _runs(name)), None)
    advice = f"run `{found} reproduce.py`" if found else "install one of these and run reproduce.py with it"
    raise Stop(
        f"Python {version[0]}.{version[1]} is {age}: this package needs Python 3.11, 3.12 or 3.13; {advice}."
    )


def ready(extras):
    """Path of the Python to run with, its packages installed: this one if it has them all, else .venv's."""
    inside = Path(sys.prefix).resolve() == VENV.resolve()
    if not inside and has_packages(extras):
        return Path(sys.executable)
    state = read_stamp()
    done = state.get("inputs") == inputs_hash() and set(extras) <= set(state.get("extras", []))
    if done and starts(venv_python()):
        return venv_python()
    extras = sorted({*extras, *state.get("extras", [])})
    fresh = not VENV.exists()
    if fresh and shutil.disk_usage(str(ROOT)).free < NEEDED_GB * 1e9:
        raise Stop(disk_sentence())
    if not inside:
        prepare_venv()
    with stage("Installing packages into .venv (minutes the first time; log: runs/install.log)"):
        (VENV / STAMP).unlink(missing_ok=True)
        forget_half_installed()
        try:
            pip_install(extras)
        except PipFailed:
            if fresh or inside:
                raise
            remove_venv()
            prepare_venv()
            pip_install(extras)
        write_stamp(extras)
    return venv_python()


def has_packages(extras):
    """True if the running interpreter has this checkout installed with everything `extras` name."""
    from importlib import metadata
    from urllib.parse import urlparse
    from urllib.request import url2pathname

    # The checkout itself may hold build leftovers that look like an installation.
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    found = next(iter(metadata.distributions(name="replicate", path=elsewhere)), None)
    source = (found and found.read_text("direct_url.json")) or "{}"
    url = json.loads(source).get("url", "")
    if not url or Path(url2pathname(urlparse(url).path)).resolve() != ROOT:
        return False
    with contextlib.suppress(metadata.PackageNotFoundError):
        for name in required_names(extras):
            metadata.version(name)
        return True
    return False


def required_names(extras):
    """Names of the packages that pyproject.toml asks for on this system."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    here = [line for line in wanted if "'linux'" not in line or sys.platform.startswith("linux")]
    return [re.match(r"[A-Za-z0-9._-]+", line).group() for line in here]


def inputs_hash():
    """Hash of what decides the installation: both requirement files, this Python and this folder."""
    parts = [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")]
    parts += [f"{sys.version_info[0]}.{sys.version_info[1]}", str(ROOT)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_stamp():
    """What .venv was last completely installed with; empty if it was not."""
    try:
        state = json.loads((VENV / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_stamp(extras):
    """Record a complete installation, atomically."""
    partial = VENV / (STAMP + ".part")
    partial.write_text(json.dumps({"inputs": inputs_hash(), "extras": extras}), encoding="utf-8")
    partial.replace(VENV / STAMP)


def venv_python():
    """Path of .venv's interpreter on this system."""
    return VENV / "Scripts" / "python.exe" if os.name == "nt" else VENV / "bin" / "python"


def starts(python):
    """True if the interpreter runs, has pip, and is of the version running now."""
    code = f"import sys, pip; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
    with contextlib.suppress(OSError):
        return subprocess.run([str(python), "-c", code], capture_output=True, check=False).returncode == 0
    return False


def prepare_venv():
    """Leave a working .venv: the one there, or a new one in place of a broken one."""
    if starts(venv_python()):
        return
    if VENV.exists():
        if not (VENV / "pyvenv.cfg").exists() and any(VENV.iterdir()):
            raise Stop(f"{VENV} is in the way and is no virtual environment: rename it and run again.")
        print("The .venv there is broken or of another Python: making it anew.", flush=True)
        remove_venv()
    command = [sys.executable, "-m", "venv", str(VENV)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode == 0 and starts(venv_python()):
        return
    text = made.stdout + made.stderr
    if any(sign in text for sign in DISK_SIGNS):
        raise Stop(disk_sentence())
    if "ensurepip" in text:
        raise Stop(
            "This Python cannot make virtual environments because ensurepip is missing: install it "
            "(Debian and Ubuntu: `sudo apt install python3-venv`) and run again."
        )
    last = text.strip().splitlines()[-1] if text.strip() else "the new interpreter does not start"
    raise Stop(f"The virtual environment {VENV} could not be made: {last}")


def remove_venv():
    """Delete .venv, broken or of another Python."""
    try:
        shutil.rmtree(str(VENV))
    except OSError as error:
        raise Stop(f"{VENV} is broken and in use ({error.strerror}): delete it and run again.") from None


def forget_half_installed():
    """Make pip install again what an interruption left unfinished: pip writes RECORD last."""
    for info in VENV.glob("**/site-packages/*.dist-info"):
        if not (info / "RECORD").exists():
            shutil.rmtree(str(info), ignore_errors=True)


def pip_install(extras):
    """Install the checkout with its extras into .venv. Raises Stop or PipFailed."""
    log = runs_folder() / "install.log"
    command = [str(venv_python()), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "off", "-c", "constraints.txt", "-e", f".[{','.join(extras)}]"]
    with log.open("ab") as sink:
        start = sink.tell()
        code = subprocess.call(command, cwd=str(ROOT), stdout=sink, stderr=subprocess.STDOUT)
    if code == 0:
        return
    with log.open("rb") as source:
        source.seek(start)
        raise explain(source.read().decode("utf-8", "replace"), log)


def explain(text, log):
    """The exception for a failed pip, from what it printed."""
    if any(sign in text for sign in DISK_SIGNS):
        return Stop(disk_sentence())
    if any(sign in text for sign in NETWORK_SIGNS):
        return Stop(
            "No network: pip could not reach its package index; connect, or set a proxy or mirror as pip "
            f"expects, and run again (details: {log})."
        )
    if re.search(r"No matching distribution found for torch\b", text):
        return Stop(
            "There is no build of torch for this machine: it needs 64-bit Linux, Windows or a Mac with "
            f"Apple silicon (details: {log})."
        )
    errors = [line.strip() for line in text.splitlines() if line.startswith("ERROR")]
    return PipFailed(f"pip failed: {errors[-1] if errors else 'it gave no reason'} (details: {log})")


def disk_sentence():
    """The sentence for a full disk."""
    free = shutil.disk_usage(str(ROOT)).free / 1e9
    return (
        f"The disk is full: installing needs about {NEEDED_GB:.0f} GB, {free:.1f} GB are free at {ROOT}; "
        "free some space and run again, what is done is kept."
    )


def runs_folder():
    """Folder of logs and caches, as replicate.paths has it."""
    folder = Path(os.environ.get("REPLICATE_RUNS") or ROOT / "runs")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def stage(title):
    """Print one line: the stage's title, then how long it took."""
    start = time.monotonic()
    print(f"{title} ... ", end="", flush=True)
    try:
        yield
    except BaseException:
        print(f"stopped after {duration(time.monotonic() - start)}", flush=True)
        raise
    print(duration(time.monotonic() - start), flush=True)


def duration(seconds):
    """Seconds as a person says them: 4 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _runs(command):
    """True if `command` is a Python that starts (version managers leave names that do not)."""
    path = shutil.which(command)
    with contextlib.suppress(OSError):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return bool(path) and subprocess.call([path, "-c", ""], **quiet) == 0
    return False
