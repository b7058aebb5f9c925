"""Several processes that train one model: started by torchrun, one a GPU, or on a CPU.

    torchrun --nproc-per-node 8 -m replicate train --preset llama1b --set parallel=fsdp

The configuration's batch is that of all processes together; each takes its rows of every micro-batch. Under
"ddp" each holds the whole model and gradients are averaged (DistributedDataParallel); under "fsdp" each holds
a part of every weight, gradient and moment, gathered layer by layer (`fully_shard`, called FSDP2). A `Group`
answers what differs; `ALONE` is one process, in which nothing does.
"""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from replicate.config import TrainConfig
from replicate.training.alone import ALONE, Alone, stored
from replicate.training.sharded import hand_over, shard

LONG = datetime.timedelta(days=7)  # that processes wait for the first one, which waits for a claim
STALE = (
    "--max-restarts keeps the addresses of processes that failed, and those it starts again call them; "
    "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment"
)
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets them


class Group(Alone):
    """The processes of torch's default process group: gloo, and on GPUs nccl for what lies there.

    Args:
        engine: "ddp" or "fsdp".
    """

    def __init__(self, engine: str, owned: bool = False) -> None:
        import torch.distributed as dist

        self.dist, self.engine, self.owned = dist, engine, owned
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.local = int(os.environ.get("LOCAL_RANK", self.rank))
        self.host = dist.new_group(backend="gloo", timeout=LONG)  # for what processes tell each other

    def device(self, name: str) -> str:
        """cuda:LOCAL_RANK, or "cpu". Raises ValueError for one GPU by number."""
        if name.startswith("cuda:"):
            raise ValueError(
                f"device is {name!r} in {self.world} processes; choose 'auto': each takes its own GPU"
            )
        if name == "cpu" or not torch.cuda.is_available():
            return "cpu" if name == "auto" else name
        if self.local >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"process {self.local} here has no GPU, there are {count}; set --nproc-per-node {count}"
            )
        torch.cuda.set_device(self.local)
        return f"cuda:{self.local}"

    def check(self, config: TrainConfig) -> None:
        """Raise ValueError if rows cannot be shared out, or would not be computed as in one process."""
        batch, world, s = config.batch_size, self.world, config.model.sparsity
        if batch % world:
            near = max(1, round(batch / world)) * world
            raise ValueError(
                f"batch_size is {batch}, the rows of a micro-batch of all {world} processes together, and no "
                f"multiple of {world}; set batch_size={near}, or start as many processes as divide {batch}"
            )
        if s.wgrad != "dense":
            raise ValueError(
                f"wgrad {s.wgrad!r} picks among the tokens of a whole micro-batch, which {world} processes "
                "share; set wgrad='dense' or train in one process"
            )
        if s.routing == "learned":
            raise ValueError(
                "routing 'learned' evens out the load of one process's tokens; train it in one process, or "
                "set routing='token'"
            )
        tokens = batch // world * config.model.seq_len
        if s.activation == "venom" and s.routing == "oracle-block" and tokens % s.v:
            raise ValueError(f"v is {s.v}; blocks of v rows must divide the {tokens} tokens of one process")

    def place(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Each layer is sharded as it comes to the device, so that the whole model need not fit there."""
        if not self.sharded:
            super().place(model, device, dtype)
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.world,))
        model.to(stored(dtype))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def wrap(self, forward: Callable, model: nn.Module) -> Callable:
        """Under "ddp" a DistributedDataParallel; a sharded model's own hooks do it under "fsdp"."""
        if self.sharded:
            return _Sharded(forward, model)
        from torch.nn.parallel import DistributedDataParallel

        # Parameters that no loss reads have gradients of zero, see `ablations.with_score`.
        with warnings.catch_warnings():  # torch 2.13 has a new name for it, torch 2.11 has not
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")
            return DistributedDataParallel(
                _Loss(forward, model), broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def synchronised(self, forward: Callable, last: bool) -> AbstractContextManager:
        """DDP's `no_sync`, FSDP's `set_requires_gradient_sync`."""
        if self.sharded:
            forward.model.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else forward.no_sync()

    def mean(self, value: Tensor) -> Tensor:
        """By the group of the tensor's device."""
        value = value.clone()
        self.dist.all_reduce(value)
        return value / self.world

    def total(self, values: Sequence[float]) -> list[float]:
        """On the host."""
        return self._reduced(values, self.dist.ReduceOp.SUM)

    def most(self, values: Sequence[float]) -> list[float]:
        """On the host."""
        return self._reduced(values, self.dist.ReduceOp.MAX)

    def norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Of shards the root of the sum of squares; under "ddp" every process has the whole gradient."""
        norm = super().norm(gradients)
        if not self.sharded:
            return norm
        square = norm.square()
        self.dist.all_reduce(square)
        return square.sqrt()

    def any(self, flag: bool) -> bool:
        """On the host, which so waits for the other hosts, and no GPU."""
        return self.most([flag])[0] > 0

    def same(self, tensors: Iterable[Tensor], host: bool = False) -> None:
        """Broadcast one by one, by the group of their device."""
        for tensor in tensors:
            self.dist.broadcast(tensor.detach(), 0, group=self.host if host else None)

    def of_first(self, work: Callable[[], Any]) -> Any:
        """As the base class says; the result travels pickled, among these processes."""
        found = [_tried(work) if self.main else None]
        self.dist.broadcast_object_list(found, 0, group=self.host, device=torch.device("cpu"))
        return _result(found[0])

    def first_one(self, work: Callable[[], Any]) -> Any:
        """As the base class says; what it returns need not be sent."""
        own = _tried(work) if self.main else None
        self.of_first(lambda: _result(own) and None)
        return _result(own) if self.main else work()

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """As the base class says."""
        found: list[Any] = [None] * self.world
        self.dist.all_gather_object(found, _tried(work), group=self.host)
        return [_result(one) for one in found]

    def end(self) -> None:
        """Leave the process group, if `start` has made it."""
        if self.owned and self.dist.is_initialized():
            self.dist.destroy_process_group()

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        tensor = torch.tensor([float(value) for value in values], dtype=torch.float64)
        self.dist.all_reduce(tensor, how, group=self.host)
        return tensor.tolist()


class _Loss(nn.Module):
    """A forward function as the module that DistributedDataParallel wants."""

    def __init__(self, compute: Callable, model: nn.Module) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        return None, self.compute(idx, targets)[1]


class _Sharded:
    """A forward function of a sharded model, and that model."""

    def __init__(self, compute: Callable, model: nn.Module) -> None:
        self.compute, self.model = compute, model

    def __call__(self, idx: Tensor, targets: Tensor) -> tuple[Any, Tensor]:
        return self.compute(idx, targets)


def start(config: TrainConfig) -> Alone:
    """This process's group: ALONE, or all that torchrun started, which meet here.

    A process group that exists already is taken as it is. `TrainConfig.parallel` counts among several only.
    Raises ValueError as `Group.check` does, and where a restart would call processes that failed.
    """
    import torch.distributed as dist

    if not dist.is_available():
        return ALONE
    owned = not dist.is_initialized()
    if owned:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not all(name in os.environ for name in VARIABLES):
            return ALONE
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and _restarts("MAX_RESTARTS") > 0:
            raise ValueError(STALE)
        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    if dist.get_world_size() == 1:
        return ALONE
    group = Group("ddp" if config.parallel == "auto" else config.parallel, owned)
    try:
        group.check(config)
    except ValueError:
        group.end()
        raise
    return group


def restarted() -> bool:
    """True if torchrun has started these processes once more, after one of them failed."""
    return _restarts("RESTART_COUNT") > 0


def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that an optimiser trains, see `shard`, each with its gradient."""
    hand_over(parameters)
    return [shard(parameter) for parameter in parameters]


def _restarts(name: str) -> int:
    return int(os.environ.get(f"TORCHELASTIC_{name}", "0"))


def _tried(work: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "done", work()
    except OSError as error:
        return "failed", (error.errno, error.strerror or str(error), error.filename)
    except ValueError as error:
        return "refused", str(error)


def _result(found: tuple[str, Any]) -> Any:
    what, value = found
    if what == "refused":
        raise ValueError(value)
    if what == "failed":
        raise OSError(*value) if value[0] is not None else OSError(value[1])
    return value
