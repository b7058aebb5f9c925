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

from replicate.system import paths

# Of the place, not of the content: no space, no permission, a read-only file system.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
TRIES = 5  # of a rename that Windows refuses, while another process has the file open


def write_atomic(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step, on the disk when this returns; into a device or pipe as it is.

    Raises OSError if it cannot be written, naming the file, and the variable that moves it elsewhere.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends without an error; raises as `write_atomic`."""
    path = path.resolve()  # a link to a file stays a link
    # Without the file's name, which may be as long as a name can be.
    part = path.with_name(f".{os.getpid()}.{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename(part, path)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        parts = [f"{path} cannot be written ({error.strerror})", paths.elsewhere(path)]
        raise OSError(error.errno, "; ".join(filter(None, parts))) from error
    finally:
        with contextlib.suppress(OSError):  # it was never made, or its folder was not
            part.unlink()


def _rename(part: Path, path: Path) -> None:
    """Replace `path` by `part`, a rename that survives a power cut where the file system can."""
    for left in reversed(range(TRIES)):
        try:
            part.replace(path)
            break
        except PermissionError:
            if not left:
                raise
            time.sleep(0.05)
    if os.name == "posix":
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
