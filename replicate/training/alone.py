"""What differs between one process and several that train a model together, as one process answers it.

The trainer asks these questions everywhere; `parallel.Group` has the answers of several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from replicate.config import TrainConfig


class Alone:
    """One process."""

    rank, world, engine = 0, 1, ""

    def __str__(self) -> str:
        return f"{self.world} processes, {self.engine}" if self.engine else ""

    @property
    def main(self) -> bool:
        """True in the process that prints, writes records and takes locks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """True if parameters are DTensors."""
        return self.engine == "fsdp"

    @property
    def not_captured(self) -> str:
        """What keeps steps from being captured as CUDA graphs; empty if nothing does."""
        return f"{self.world} processes exchange gradients in a step" if self.world > 1 else ""

    def device(self, name: str) -> str:
        """The device that a setting of TrainConfig.device means here."""
        return name

    def check(self, config: TrainConfig) -> None:
        """Raise ValueError for what these processes cannot train as one process would."""

    def place(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Put a model on the device, for computing in `dtype`, sharded if that is the engine."""
        model.to(device, stored(dtype))

    def wrap(self, forward: Callable, model: nn.Module) -> Callable:
        """`forward`, (idx, targets) to (anything, loss), whose backward pass also averages gradients."""
        return forward

    def synchronised(self, forward: Callable, last: bool) -> AbstractContextManager:
        """Around the passes of a micro-batch: only those of the `last` one communicate gradients."""
        return nullcontext()

    def rows(self, n: int) -> slice:
        """Which of n rows are this process's."""
        return slice(self.rank * n // self.world, (self.rank + 1) * n // self.world)

    def share(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """This process's rows of a batch."""
        return tuple(part[self.rows(len(part))] for part in batch)

    def record(self) -> dict[str, Any]:
        """What a record says of several processes; of one, nothing."""
        return {"parallel": {"processes": self.world, "engine": self.engine}} if self.world > 1 else {}

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes; nothing waits for a GPU."""
        return value

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over processes."""
        return list(values)

    def most(self, values: Sequence[float]) -> list[float]:
        """The maxima over processes."""
        return list(values)

    def norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """The norm of the whole gradient, of which these tensors are this process's part."""
        return nn.utils.get_total_norm(list(gradients))

    def any(self, flag: bool) -> bool:
        """True if `flag` is in one process."""
        return flag

    def same(self, tensors: Iterable[Tensor], host: bool = False) -> None:
        """Make plain tensors those of the first process; `host`: they are on the CPU."""

    def of_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns in the first process, where alone it is called.

        All raise the OSError or ValueError that it raises.
        """
        return work()

    def first_one(self, work: Callable[[], Any]) -> Any:
        """What `work` returns in each process; the first one calls it before the others, as `of_first`."""
        return work()

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` returns in each process; all raise OSError if one does."""
        return [work()]

    def end(self) -> None:
        """Leave the group."""


ALONE = Alone()


def stored(dtype: torch.dtype) -> torch.dtype:
    """What weights are in, for computing in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
