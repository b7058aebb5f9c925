"""How a command line begins and ends: streams that take any text, and one line for what went wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

from replicate import paths

READER_GONE = 141  # what a shell shows for a program that a closed pipe ended: 128 + SIGPIPE


def ended(command: Callable[[], int]) -> int:
    """The exit status of `command`; what it raises for bad input, files and Ctrl-C becomes one line.

    What stdout's encoding cannot show is printed as "?". A stream that is closed takes text and drops it.
    """
    _open()
    try:
        status = command()
        sys.stdout.flush()  # here, where a failure can still be told
        return status
    except ValueError as error:
        say(str(error))
        return 2
    except OSError as error:
        if _reader_gone(error):
            return READER_GONE
        say(_sentence(error))
        return 1
    except KeyboardInterrupt as stop:
        say(f"interrupted{f'; {stop}' if stop.args else ''}")
        return 130
    finally:
        _close()


def say(text: str) -> None:
    """Print one line on stderr, if anyone can read it."""
    with contextlib.suppress(OSError):
        print(f"replicate: {text}", file=sys.stderr, flush=True)


def disk_full(error: OSError) -> bool:
    """True for a full disk and an exhausted quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or getattr(error, "winerror", None) == 112


def _sentence(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    text = f"{error.strerror}{where}" if error.strerror else str(error)
    parts = [f"the disk is full ({text}); free some space and run again" if disk_full(error) else text]
    parts += [paths.elsewhere(Path(os.fsdecode(error.filename)))] if where else []
    return "; ".join(filter(None, [*parts, *getattr(error, "__notes__", [])]))


def _reader_gone(error: OSError) -> bool:
    windows = os.name == "nt" and error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or windows


def _open() -> None:
    # In this order each takes the number of its closed one, so that no file opened later gets what is
    # printed by libraries.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - open to the end
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # stderr never refuses a character
    try:
        Path.home()
    except RuntimeError:  # neither HOME nor an entry for this user: Jupyter does not start without
        with contextlib.suppress(OSError):
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
