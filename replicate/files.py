"""Files that are written in one step: readers and crashes see the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TRIES = 5  # of a rename that Windows refuses, while another process has the file open


def write_atomic(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step, on the disk when this returns.

    Raises OSError if it cannot be written; a full disk is named.
    """
    with _part_of(path, theirs_will_do=False) as file:
        file.write(content)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename(part, path, theirs_will_do)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            f"no space left to write {path}; free some, or let REPLICATE_RUNS name a larger disk",
        ) from error
    finally:
        part.unlink(missing_ok=True)
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
