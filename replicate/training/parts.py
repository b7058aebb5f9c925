"""Tensors of which each process holds a part, in files: `torch.distributed.checkpoint`, as safetensors.

Every process writes what it holds into one folder, which all of them see, and reads what it needs from it:
the number of processes may differ. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from replicate.training import parallel

Shapes = dict[str, tuple[str, list[int]]]  # dtype and shape by name
CHUNK = 1 << 24  # bytes hashed at a time


def write_parts(folder: Path, tensors: dict[str, Tensor], group: parallel.Alone) -> dict[str, str]:
    """Write what all processes hold of `tensors` into a new folder: SHA-256 by name of file.

    All raise OSError if one cannot write.
    """
    import torch.distributed.checkpoint as dcp

    group.of_first(lambda: _fresh(folder))
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    group.together(lambda: _as_os_error(dcp.save, tensors, storage_writer=writer, process_group=group.host))
    names = group.of_first(lambda: sorted(path.name for path in folder.iterdir()))
    mine = names[group.rank :: group.world]
    return {k: v for found in group.together(lambda: _digests(folder, mine, True)) for k, v in found.items()}


def read_parts(folder: Path, targets: dict[str, Tensor], group: parallel.Alone) -> None:
    """Fill `targets`, full tensors or DTensors, from a folder that `write_parts` has made."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    how = {"process_group": group.host} if group.world > 1 else {"no_dist": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(targets, storage_reader=reader, **how)


def damaged(folder: Path, files: dict[str, str], group: parallel.Alone) -> str:
    """What is wrong with the files, by their SHA-256, of which each process checks some; "" if nothing."""
    mine = sorted(files)[group.rank :: group.world]
    return next(filter(None, group.together(lambda: _difference(folder, mine, files))), "")


def shapes(tensors: dict[str, Tensor]) -> Shapes:
    """Dtype and shape of each tensor, in JSON types."""
    return {k: (str(t.dtype).removeprefix("torch."), list(t.shape)) for k, t in tensors.items()}


def empty(found: Shapes) -> dict[str, Tensor]:
    """Full tensors of these shapes, on the CPU, to be filled."""
    return {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in found.items()}


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _as_os_error(save, *args, **options) -> None:
    """Call `save`, whose own exception holds those of all processes."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        save(*args, **options)
    except CheckpointException as error:
        inner = next((e for e, _ in error.failures.values() if isinstance(e, OSError)), None)
        raise inner or OSError(str(error)) from error


def _difference(folder: Path, names: Iterable[str], files: dict[str, str]) -> str:
    for name in names:
        try:
            if _digests(folder, [name])[name] != files[name]:
                return f"{folder / name}: truncated or altered, its SHA-256 does not match"
        except OSError as error:
            return f"{folder / name}: missing or unreadable ({error})"
    return ""


def _digests(folder: Path, names: Iterable[str], sync: bool = False) -> dict[str, str]:
    """SHA-256 of each file, which is on the disk then, with `sync`."""
    found = {}
    for name in names:
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
            if sync:
                with contextlib.suppress(OSError):  # Windows wants a file open for writing
                    os.fsync(file.fileno())
        found[name] = digest.hexdigest()
    return found
