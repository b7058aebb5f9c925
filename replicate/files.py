"""Files that are written in one step: readers and crashes see the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from replicate import paths

# Of the place, not of the content: no space, no permission, a read-only file system.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
TRIES = 5  # of a rename that Windows refuses, while another process has the file open


def write_atomic(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step, on the disk when this returns.

    A link stays one, its target is replaced. What is `in_place` is written to, as any program would.
    Raises OSError if it cannot be written, naming the file, and the variable that moves it elsewhere.
    """
    if in_place(path):
        printed = _printed(path)
        with open(path if printed is None else os.dup(printed), "wb") as file:  # noqa: PTH123 - of a handle
            file.write(content)
        return
    with _part_of(path, theirs_will_do=False) as file:
        file.write(content)


def in_place(path: Path) -> bool:
    """True for what must not be replaced by a file: a device, a pipe, or where this process prints to."""
    return path.exists() and (not path.is_file() or _printed(path) is not None)


def _printed(path: Path) -> int | None:
    """1 or 2 if `path` is the file, pipe or terminal behind this process's stdout or stderr."""
    for handle, stream in ((1, sys.stdout), (2, sys.stderr)):
        with contextlib.suppress(OSError):
            if stream is not None and os.path.samestat(path.stat(), os.fstat(handle)):
                stream.flush()  # what was printed before stays before
                return handle
    return None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` in one step when the block ends without an error.

    For content that is the same whoever writes it: where Windows refuses to replace a file that another
    process has made and opened meanwhile, that one stands. Raises OSError as `write_atomic` does.
    """
    with _part_of(path, theirs_will_do=True) as file:
        yield file


@contextlib.contextmanager
def _part_of(path: Path, theirs_will_do: bool) -> Iterator[BinaryIO]:
    path = path.resolve()  # a link to a file stays a link
    # Without the file's name, which may be as long as a name can be.
    part = path.with_name(f".{os.getpid()}.{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename(part, path, theirs_will_do)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        parts = [f"{path} cannot be written ({error.strerror})", paths.elsewhere(path)]
        raise OSError(error.errno, "; ".join(filter(None, parts))) from error
    finally:
        with contextlib.suppress(OSError):  # it was never made, or its folder was not
            part.unlink()
    if os.name == "posix":
        _sync_folder(path.parent)


def _rename(part: Path, path: Path, theirs_will_do: bool) -> None:
    for left in reversed(range(TRIES)):
        try:
            part.replace(path)
            return
        except PermissionError:
            if left == 0 and not (theirs_will_do and path.exists()):
                raise
            time.sleep(0.05)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, on file systems that can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
