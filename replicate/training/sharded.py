"""Parameters of which each process holds a part (DTensor, as `fully_shard` leaves them), made whole and back.

The method looks at whole weights: four in a group, the neurons of a cluster, a scale over a matrix. So what
it reads of a module outside a forward pass goes through `whole`, and what it writes through `write`. Both
take plain tensors too. On sharded ones they communicate: every process calls them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(t: Any) -> bool:
    """True for a DTensor, of which this process may hold a part only."""
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """The full tensor, detached if it had to be gathered."""
    return t.detach().full_tensor() if is_sharded(t) else t


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor `value`, equal in all processes, into `target`, or the part of it that is here."""
    if is_sharded(target):
        target, value = target.detach().to_local(), placed(value, target).to_local()
    target.copy_(value)


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A full tensor, equal in all processes, sharded as the DTensor `like`; as it is if that is none."""
    if not is_sharded(like) or is_sharded(value) or value.dim() == 0:
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    value = value.detach().to(like.device).contiguous()
    full = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return full.redistribute(placements=like.placements)


def agreed(value: Tensor, like: Tensor) -> Tensor:
    """`value` as the first of the processes that share the parameter `like` has it; as it is if none do."""
    if is_sharded(like):
        for dim in range(like.device_mesh.ndim):
            group = like.device_mesh.get_group(dim)
            value = value.contiguous()
            torch.distributed.broadcast(value, torch.distributed.get_global_rank(group, 0), group=group)
    return value


def settle(module: nn.Module) -> None:
    """Let FSDP put a module's shards back in place, where a forward pass has left its parameters gathered.

    What is written to a gathered copy is lost.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for owner in list(_module_state_mapping):
        if isinstance(owner, FSDPModule) and any(inner is module for inner in owner.modules()):
            owner.reshard()


def shard(parameter: Tensor) -> Tensor:
    """What this process trains of a parameter: itself, or of a DTensor its part, always the same tensor."""
    if not is_sharded(parameter):
        return parameter
    local = parameter.detach().to_local()
    kept = getattr(parameter, "_trained", None)
    if kept is None or kept.data_ptr() != local.data_ptr() or kept.shape != local.shape:
        kept = parameter._trained = local.requires_grad_(parameter.requires_grad)
        kept._owner = weakref.ref(parameter)
    return kept


def owner(trained: Tensor) -> Tensor:
    """The parameter whose `shard` this is."""
    found = getattr(trained, "_owner", None)
    return trained if found is None else found()


def hand_over(parameters: Sequence[Tensor]) -> None:
    """Give each `shard` its part of the gradient, which leaves the DTensor."""
    for parameter in parameters:
        if is_sharded(parameter) and parameter.grad is not None:
            shard(parameter).grad, parameter.grad = parameter.grad.to_local(), None


def as_sharded(part: Tensor, parameter: Tensor) -> Tensor:
    """A moment or another tensor of a parameter's `shard`, as a DTensor of all processes."""
    if not is_sharded(parameter) or part.dim() == 0 or is_sharded(part):
        return part
    from torch.distributed.tensor import DTensor

    where = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, *where, run_check=False, shape=parameter.shape, stride=parameter.stride())
