"""Checkpoints one can trust: written atomically, verified by checksum, never pickled.

A checkpoint of step n is two files: `step-n.safetensors` (tensors) and `step-n.json` (everything else,
with the SHA-256 of the tensor file and of itself). The JSON is renamed into place last, so that a run
killed at any moment leaves either a whole checkpoint or none. The two newest are kept: if the newest
was damaged later, its predecessor serves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from replicate.system.files import write_atomic

FORMAT = 1
FIRST = 15.0  # seconds of training before the first checkpoint and at least between two
KEEP = 2  # checkpoints
AGE = 3600  # seconds, after which nobody writes to a part any more
SHARE = 0.02  # of the training time, which saving may take
BYTES_PER_S = 1e8  # that saving is taken to reach before it was timed
_NAME = re.compile(r"step-(\d+)\.json")


class CheckpointRefused(ValueError):
    """A checkpoint that is truncated, altered or incomplete. The message names the file."""


class Pace:
    """When a run saves next, so that saving takes at most SHARE of its time."""

    def __init__(self, size: int) -> None:
        """`size`: bytes of a checkpoint, from which the first one's cost is guessed."""
        self.saved(size / BYTES_PER_S)

    def saved(self, seconds: float) -> None:
        """Saving has just taken so long."""
        self._next = time.perf_counter() + max(FIRST, seconds / SHARE)

    def due(self) -> bool:
        """True once it is time to save."""
        return time.perf_counter() >= self._next


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` and remove all but the KEEP newest up to it; the path of its JSON file.

    Later ones go too: a run that saves an earlier step could not use them, because they are damaged.

    Args:
        tensors: by name, no two sharing memory. state: JSON types (NaN and infinity included).
    """
    stem = f"step-{step:08d}"
    blob = safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()})
    head = {"format": FORMAT, "step": step, "tensors": f"{stem}.safetensors"}
    head |= {"tensors_sha256": hashlib.sha256(blob).hexdigest(), "state": state}
    head["sha256"] = _digest(head)
    write_atomic(folder / f"{stem}.safetensors", blob)
    path = folder / f"{stem}.json"
    write_atomic(path, json.dumps(head).encode())
    _sweep(folder, now=path.stat().st_mtime)
    found = steps(folder)
    kept = [other for other in found if other <= step][-KEEP:]
    for other in set(found) - set(kept):
        _remove(folder, other)
    return path


def load(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """Step, tensors (on the CPU) and state of the checkpoint whose JSON file is `path`.

    Raises:
        CheckpointRefused: naming the file, if a byte of either file is missing or altered.
    """
    try:
        head = json.loads(path.read_bytes())
        intact = head.pop("sha256") == _digest(head)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointRefused(f"{path}: truncated or unreadable ({error})") from error
    if not intact:
        raise CheckpointRefused(f"{path}: altered, its SHA-256 does not match")
    if head["format"] != FORMAT:
        raise CheckpointRefused(f"{path}: format {head['format']}, this version reads {FORMAT}")
    tensors = path.with_name(head["tensors"])
    try:
        blob = tensors.read_bytes()
    except OSError as error:
        raise CheckpointRefused(f"{tensors}: missing or unreadable ({error})") from error
    if hashlib.sha256(blob).hexdigest() != head["tensors_sha256"]:
        raise CheckpointRefused(f"{tensors}: truncated or altered, its SHA-256 does not match {path.name}")
    return head["step"], safetensors.torch.load(blob), head["state"]


def latest(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest intact checkpoint in `folder`, or None. Warns with the name of every one refused."""
    for step in reversed(steps(folder)):
        try:
            return load(folder / f"step-{step:08d}.json")
        except CheckpointRefused as error:
            warnings.warn(f"checkpoint refused: {error}; trying the one before", stacklevel=2)
    return None


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, oldest first, intact or not."""
    names = (_NAME.fullmatch(p.name) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in names if match)


def clear(folder: Path) -> None:
    """Remove every checkpoint in `folder`, and the folder itself if nothing else is in it."""
    for step in steps(folder):
        _remove(folder, step)
    with contextlib.suppress(OSError):
        folder.rmdir()


def pack(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Model and optimiser state as named tensors; `unpack` puts them back."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    return tensors


def unpack(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what `pack` made into a model and an optimiser of the same shapes."""
    model_state: dict[str, Tensor] = {}
    optimizer_state = optimizer.state_dict()
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        if kind == "model":
            model_state[name] = tensor
        else:
            index, name = name.split(".", 1)
            optimizer_state["state"].setdefault(int(index), {})[name] = tensor
    model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)


def check_same_run(state: dict[str, Any], ours: dict[str, str], folder: Path) -> None:
    """Compare a checkpoint's identity with this run's.

    Raises ValueError if it is of another configuration or corpus; warns if device, torch or code differ.
    """
    for name, value in ours.items():
        if state.get(name) == value:
            continue
        if name in ("config_hash", "corpus_sha256"):
            raise ValueError(
                f"{folder} holds a run with another {name} ({state.get(name)}, not {value}); "
                "choose another run_dir, or resume=False to overwrite it"
            )
        warnings.warn(
            f"resuming a run made with {name} {state.get(name)}, now {value}: losses may differ", stacklevel=4
        )


def _sweep(folder: Path, now: float) -> None:
    """Remove what killed writers left; young parts may belong to one still writing.

    `now` is the time a file just written there bears: a file server's clock may differ from ours.
    """
    for part in folder.glob("*.part"):
        with contextlib.suppress(OSError):
            if now - part.stat().st_mtime > AGE:
                part.unlink()


def _remove(folder: Path, step: int) -> None:
    for suffix in (".json", ".safetensors"):  # the JSON first: without it the checkpoint is gone
        (folder / f"step-{step:08d}{suffix}").unlink(missing_ok=True)


def _digest(head: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
