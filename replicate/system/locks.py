"""Claims that processes of this computer respect: who holds one works, others wait.

A claim is a lock of the operating system on a file under runs/claims. It ends with the process that holds
it, however that ends; the file stays, and says nothing. On file systems without locks nobody waits.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from replicate.system import paths

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
WAITS = "waits for another process, which trains the same"
PAUSE = 0.5  # seconds between two tries


def take(name: str) -> IO | None:
    """The claim called `name`, held until it is closed, or None if somebody has it."""
    folder = paths.runs_dir() / "claims"
    folder.mkdir(exist_ok=True)
    file = (folder / f"{name}.lock").open("ab")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            file.close()
            return None
    return file


@contextmanager
def one_of(
    names: Sequence[str],
    wanted: Callable[[], bool] = lambda: True,
    waits: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Hold one of these claims inside the block, once one is free; none if it is `wanted` no longer.

    `waits` is called if none is free at first.
    """
    held, first = None, True
    while wanted() and not (held := next(filter(None, map(take, names)), None)):
        if first:
            waits()
        first = False
        time.sleep(PAUSE)
    try:
        yield
    finally:
        if held:
            held.close()
