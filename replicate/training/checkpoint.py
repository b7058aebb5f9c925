"""Checkpoints one can trust: written atomically, verified by checksum, never pickled.

A checkpoint of step n is two files: `step-n.safetensors` (tensors) and `step-n.json` (everything else,
with the SHA-256 of the tensor file and of itself). The JSON is renamed into place last, so that a run
killed at any moment leaves either a whole checkpoint or none. The two newest are kept: if the newest
was damaged later, its predecessor serves.

Of a model that is sharded over processes the tensors are a folder, `step-n.parts`, of which the JSON file has
the SHA-256 of each file, see `parts`. Any number of processes continues from either form.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from replicate.system.files import write_atomic
from replicate.training import parts
from replicate.training.parallel import ALONE, Alone
from replicate.training.sharded import as_sharded, is_sharded, owner, placed

FORMAT, FORMAT_PARTS = 1, 2
FIRST = 15.0  # seconds of training before the first checkpoint and at least between two
KEEP = 2  # checkpoints
AGE = 3600  # seconds, after which nobody writes to a part any more
SHARE = 0.02  # of the training time, which saving may take
BYTES_PER_S = 1e8  # that saving is taken to reach before it was timed
_NAME = re.compile(r"step-(\d+)\.(json|safetensors|parts)")


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


def save(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], group: Alone = ALONE
) -> Path:
    """Write the checkpoint of `step` and remove all but the KEEP newest up to it; the path of its JSON file.

    Later ones go too: a run that saves an earlier step could not use them, because they are damaged.

    Args:
        tensors: by name, no two sharing memory. state: JSON types (NaN and infinity included).
        group: all its processes call this, and the first one writes what is not sharded.
    """
    if not group.sharded:
        return group.of_first(lambda: _save_whole(folder, step, tensors, state))
    name = f"step-{step:08d}.parts"
    group.of_first(lambda: _remove(folder, step))
    files = parts.write_parts(folder / name, tensors, group)
    head = {"format": FORMAT_PARTS, "parts": name, "files": files, "shapes": parts.shapes(tensors)}
    return group.of_first(lambda: _finish(folder, step, head, state))


def _save_whole(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    name = f"step-{step:08d}.safetensors"
    blob = safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()})
    head = {"format": FORMAT, "tensors": name, "tensors_sha256": hashlib.sha256(blob).hexdigest()}
    write_atomic(folder / name, blob)
    return _finish(folder, step, head, state)


def _finish(folder: Path, step: int, head: dict[str, Any], state: dict[str, Any]) -> Path:
    """Write the JSON file, by which the checkpoint is one, and remove what it makes superfluous."""
    head |= {"step": step, "state": state}
    head["sha256"] = _digest(head)
    path = folder / f"step-{step:08d}.json"
    write_atomic(path, json.dumps(head).encode())
    _sweep(folder, now=path.stat().st_mtime)
    kept = [other for other in steps(folder) if other <= step][-KEEP:]
    for other in _steps(folder) - set(kept):
        _remove(folder, other)
    return path


def load(
    path: Path, group: Alone = ALONE, blank: Callable[[parts.Shapes], dict[str, Tensor]] = parts.empty
) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """Step, tensors and state of the checkpoint whose JSON file is `path`.

    Args:
        group: all its processes call this. blank: makes the tensors that a sharded checkpoint fills; by
            default, and from one file always, they are full and on the CPU.

    Raises:
        CheckpointRefused: naming the file, if a byte of it is missing or altered.
    """
    head, tensors = _agreed(group, lambda: _load_whole(path))
    if head["format"] == FORMAT:
        return head["step"], _spread(tensors, group), head["state"]
    folder = path.with_name(head["parts"])
    if wrong := parts.damaged(folder, head["files"], group):
        raise CheckpointRefused(wrong)
    tensors = blank(head["shapes"])
    parts.read_parts(folder, tensors, group)
    return head["step"], tensors, head["state"]


def _agreed(group: Alone, read: Callable[[], tuple[dict, dict]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `read` gives in the first process: the head to all, the tensors there. All raise its refusal."""
    tensors: dict[str, Tensor] = {}

    def first() -> tuple[dict[str, Any], str]:
        try:
            head, found = read()
        except CheckpointRefused as error:
            return {}, str(error)
        tensors.update(found)
        return head, ""

    head, wrong = group.of_first(first)
    if wrong:
        raise CheckpointRefused(wrong)
    return head, tensors


def _spread(tensors: dict[str, Tensor], group: Alone) -> dict[str, Tensor]:
    """The first process's tensors, in every process."""
    if group.world > 1:
        found = group.of_first(lambda: parts.shapes(tensors))
        tensors = tensors or parts.empty(found)
        group.same([tensors[name] for name in found], host=True)
    return tensors


def _load_whole(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The head of a checkpoint, verified, and its tensors if they are in one file."""
    try:
        head = json.loads(path.read_bytes())
        intact = head.pop("sha256") == _digest(head)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointRefused(f"{path}: truncated or unreadable ({error})") from error
    if not intact:
        raise CheckpointRefused(f"{path}: altered, its SHA-256 does not match")
    if head["format"] == FORMAT_PARTS:
        return head, {}
    if head["format"] != FORMAT:
        known = f"{FORMAT} and {FORMAT_PARTS}"
        raise CheckpointRefused(f"{path}: format {head['format']}, this version reads {known}")
    tensors = path.with_name(head["tensors"])
    try:
        blob = tensors.read_bytes()
    except OSError as error:
        raise CheckpointRefused(f"{tensors}: missing or unreadable ({error})") from error
    if hashlib.sha256(blob).hexdigest() != head["tensors_sha256"]:
        raise CheckpointRefused(f"{tensors}: truncated or altered, its SHA-256 does not match {path.name}")
    return head, safetensors.torch.load(blob)


def latest(
    folder: Path, group: Alone = ALONE, blank: Callable[[parts.Shapes], dict[str, Tensor]] = parts.empty
) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest intact checkpoint in `folder`, or None. Warns with the name of every one refused.

    Arguments as of `load`.
    """
    for step in reversed(group.of_first(lambda: steps(folder))):
        try:
            return load(folder / f"step-{step:08d}.json", group, blank)
        except CheckpointRefused as error:
            if group.main:
                warnings.warn(f"checkpoint refused: {error}; trying the one before", stacklevel=2)
    return None


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, oldest first, intact or not."""
    return sorted(_steps(folder, "json"))


def _steps(folder: Path, kind: str = "") -> set[int]:
    """Steps of which `folder` holds the file of this kind, or any: a killed writer's tensors have no JSON."""
    names = (_NAME.fullmatch(p.name) for p in folder.iterdir()) if folder.is_dir() else ()
    return {int(match[1]) for match in names if match and kind in ("", match[2])}


def clear(folder: Path) -> None:
    """Remove every checkpoint in `folder`, and the folder itself if nothing else is in it.

    What killed writers left goes too, however young: whoever clears a folder is its only writer.
    """
    for step in _steps(folder):
        _remove(folder, step)
    _sweep(folder, now=math.inf)
    with contextlib.suppress(OSError):
        folder.rmdir()


def pack(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Model and optimiser state as named tensors, DTensors of a sharded model; `unpack` puts them back."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    trained = _trained(optimizer)
    for index, state in optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            tensors[f"optimizer.{index}.{name}"] = as_sharded(tensor, trained[index])
    return tensors


def blank(found: parts.Shapes, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors to fill for `unpack`, on the CPU; of a sharded model this process's parts."""
    like = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    trained, tensors = _trained(optimizer), {}
    for name, spec in found.items():
        kind, index, *_ = name.split(".")
        target = trained[int(index)] if kind == "optimizer" else like.get(name)
        if target is not None and is_sharded(target) and spec[1]:
            tensors[name] = torch.empty_like(target, dtype=getattr(torch, spec[0]))
        else:
            tensors |= parts.empty({name: spec})
    return tensors


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters in the optimiser's order."""
    return [owner(part) for group in optimizer.param_groups for part in group["params"]]


def unpack(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what `pack` made into a model and an optimiser of the same shapes."""
    model_state, like, trained = {}, model.state_dict(), _trained(optimizer)
    optimizer_state = optimizer.state_dict()
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        if kind == "model":
            model_state[name] = placed(tensor, like[name]) if name in like else tensor
        else:
            index, name = name.split(".", 1)
            part = placed(tensor, trained[int(index)])
            part = part.to_local() if is_sharded(part) else part
            optimizer_state["state"].setdefault(int(index), {})[name] = part
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
    shutil.rmtree(folder / f"step-{step:08d}.parts", ignore_errors=True)


def _digest(head: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
