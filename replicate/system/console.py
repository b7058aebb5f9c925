"""What the commands share: streams that take any text, one line for what went wrong, checks of options."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from replicate.system import paths

PAUSE = 2.0  # seconds
READER_GONE = 141  # what a shell shows for a program that a closed pipe ended: 128 + SIGPIPE


def ended(command: Callable[[], int]) -> int:
    """The exit status of `command`; what it raises for bad input, files and Ctrl-C becomes one line.

    What stdout's encoding cannot show is printed as "?". A stream that is closed takes text and drops it.
    """
    try:
        _open()
        status = command()
        sys.stdout.flush()  # here, where a failure can still be told
        return status
    except ValueError as error:
        if speaks():
            say(str(error))
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL):
            return READER_GONE
        say(_sentence(error))
        return 1
    except KeyboardInterrupt as stop:
        if speaks():
            say(f"interrupted{f'; {stop}' if stop.args else ''}")
        return 130
    finally:
        _close()


def speaks() -> bool:
    """True in one of the processes that torchrun has started, for all, which end with the same words.

    The others wait a moment: torchrun ends all once one has ended.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0":
        return True
    time.sleep(PAUSE)
    return False


def say(text: str) -> None:
    """Print one line on stderr, if anyone can read it."""
    with contextlib.suppress(OSError):
        print(f"replicate: {text}", file=sys.stderr, flush=True)


def changes(pairs: Sequence[str]) -> dict[str, str]:
    """Field to text from `--set key=value` pairs. Raises ValueError for what is none."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair!r} is no key=value, like steps=50 or model.d_ff=512")
        found[key] = value
    return found


def check_minutes(minutes: float | None) -> None:
    """Raise ValueError for a time limit that is none."""
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes is {minutes:g}; choose a positive number, or leave it out for no limit")


def check_folder(option: str, folder: Path) -> None:
    """Make `folder` if it is missing. Raises ValueError, with the option, if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        hint = "; ".join(filter(None, ["choose another folder", paths.elsewhere(folder)]))
        why = error.strerror or error
        raise ValueError(f"{option} {folder} cannot be written to ({why}); {hint}") from None


def check_file(option: str, path: Path) -> None:
    """Raise ValueError, naming the option, if no file can be written at `path`."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission")
        if path.is_file() or not path.exists():  # else a device or a pipe
            with tempfile.TemporaryFile(dir=path.resolve().parent):
                pass
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"{option} {path} cannot be written ({why}); choose another file") from None


def again(without: str = "") -> str:
    """How to go on after an interruption; `without` is the option that would start over, if it was given."""
    return f"run the same command again{f' without {without}' if without else ''} to go on"


def _sentence(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    text = f"{error.strerror}{where}" if error.strerror else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or getattr(error, "winerror", None) == 112:
        text = f"the disk is full ({text}); free some space and run again"
    hint = paths.elsewhere(Path(os.fsdecode(error.filename))) if where else ""
    return "; ".join(filter(None, [text, hint, *getattr(error, "__notes__", [])]))


def _open() -> None:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed before Python began
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - to the end
            os.set_inheritable(stream.fileno(), True)  # Jupyter's kernels do not start without
            setattr(sys, name, stream)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # stderr never refuses a character
    try:
        Path.home()
    except RuntimeError:  # neither HOME nor an entry for this user: Jupyter does not start without
        home = paths.runs_dir() / "home"
        home.mkdir(exist_ok=True)
        os.environ["HOME"] = str(home)


def _close() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would flush again at its end, and fail with a traceback
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
