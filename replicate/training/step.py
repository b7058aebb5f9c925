"""One optimiser step: forward, backward, clipping inside AdamW, launched one by one or as one CUDA graph.

A step of a small model is some 400 kernels of a few microseconds, and Python launches them more slowly than
a GPU runs them. So a phase's first steps are launched as they come, then one is captured, and from then on
a replay is the step: the same kernels on the same memory. The learning rate, and whether a loss was not
finite, are tensors on the device. A new graph is captured when the phase, the clusters or the weights' memory
change.
"""

from __future__ import annotations

import gc
import hashlib
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from replicate.config import TrainConfig
from replicate.ffn import SparseFFN
from replicate.gpt import GPT
from replicate.kernels import backend as engines
from replicate.training import parallel
from replicate.training.sharded import as_sharded, settle, shard, whole, write

CLIP_EPS = 1e-6  # torch's: clip_grad_norm_ multiplies by min(1, clip / (norm + CLIP_EPS))
WARM = 2  # steps launched before one is captured: they compile, tune and allocate
Batch = tuple[Tensor, ...]  # what `forward` takes of a micro-batch: of a GPT inputs and targets [B, S]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only, not on norms and other vectors.

    On a GPU its rate is a tensor and its step can be captured in a CUDA graph. Of a sharded model it trains
    the `shard` of each parameter.
    """
    parameters = [shard(p) for p in model.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    on_gpu = parameters[0].is_cuda
    lr = torch.tensor(config.lr, device=parameters[0].device) if on_gpu else config.lr
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True, capturable=on_gpu)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def permute_moments(optimizer: torch.optim.Optimizer, ffn: SparseFFN, perm: Tensor) -> None:
    """Let `moments` follow the neurons of an FFN in the order [F] that `make_clusters` gave them."""
    for moment, axis in moments(optimizer, ffn):
        write(moment, whole(moment).index_select(axis, perm))


def moments(optimizer: torch.optim.Optimizer, ffn: SparseFFN) -> list[tuple[Tensor, int]]:
    """(tensor, axis of the neurons) of what an optimiser keeps of an FFN's weights in their own shapes.

    Raises ValueError for an optimiser without a weight of the FFN that is to be trained.
    """
    settle(ffn)
    found, held = [], {p for group in optimizer.param_groups for p in group["params"]}
    for name, axis in (("w1", 1), ("w2", 0), ("score", 0)):
        if (parameter := getattr(ffn, name)) is None:
            continue
        own = parameter if parameter in held else shard(parameter)
        if own not in held and parameter.requires_grad:
            raise ValueError(f"{type(optimizer).__name__} lacks {name} of this FFN; make it after swap_ffn")
        kept = [t for t in optimizer.state.get(own, {}).values() if getattr(t, "shape", None) == own.shape]
        found += [(as_sharded(t, parameter), axis) for t in kept]
    return found


def layer_tensors(ffns: Sequence[SparseFFN], optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """All that sorting neurons changes: weights, buffers and moments."""
    for ffn in ffns:
        yield from (*ffn.parameters(), *ffn.buffers())
        states = (optimizer.state.get(parameter, {}) for parameter in ffn.parameters())
        yield from (t for state in states for t in state.values() if t.dim())


def clipped_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], loss: Tensor, clip: float, bad: Tensor,
    total_norm: Callable[[list[Tensor]], Tensor] = nn.utils.get_total_norm,
) -> Tensor:  # fmt: skip
    """Clip the gradients and step; [2]: the loss, and the norm of the gradients before clipping.

    As `clip_grad_norm_` and `step`, but without a pass over the gradients that scales them: a fused step
    divides them by its `grad_scale`, a float32, as it reads them. float64 gradients are scaled before.
    Nothing waits for the device.

    Args:
        optimizer: a fused one; its step leaves weights and moments as they are where `bad` is 1.
        parameters: those that the norm is over; some may have no gradient.
        loss: a scalar. clip: the largest norm; 0 never clips.
        bad: a scalar beside the gradients; becomes 1 once the loss or the norm is not finite.
        total_norm: of the gradients, where this process may have a part of them.

    Raises ValueError for an optimiser that is not fused: it would not clip.
    """
    if not optimizer.defaults.get("fused"):
        raise ValueError(f"{type(optimizer).__name__} is not fused; take the one of make_optimizer")
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    result = torch.stack([loss, norm.to(loss.dtype)])
    bad.copy_(torch.maximum(bad, (~torch.isfinite(result)).any().float()))
    scale = None
    if clip and norm.dtype == torch.float64:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    elif clip:
        scale = ((norm + CLIP_EPS) / clip).clamp(min=1)
    optimizer.grad_scale, optimizer.found_inf = scale, bad
    try:
        optimizer.step()
    finally:
        optimizer.grad_scale = optimizer.found_inf = None
    return result


def draw_seed(seed: int, step: int, micro: int) -> int:
    """Seed of the random draws inside one micro-batch, so that resuming needs no generator state."""
    digest = hashlib.sha256(f"{seed} {step} {micro}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def why_not_captured(config: TrainConfig, device: torch.device) -> str:
    """What keeps steps from being captured, in a few words; empty if nothing does."""
    if device.type != "cuda":
        return f"there is no CUDA graph on {device.type}"
    if config.cuda_graph == "off":
        return "cuda_graph is 'off'"
    if config.model.sparsity.wgrad == "mvue":
        return "wgrad 'mvue' seeds its draws in every micro-batch"
    return ""


class OptimizerStep:
    """Calling it with a step's micro-batches takes one optimiser step.

    Args:
        model: a GPT or a DiT, on the device where the batches are.
        forward: computes its loss, a batch's tensors to (anything, loss); a GPT itself or a compiled form.
        optimizer: from `make_optimizer`.
        autocast: makes the context of the precision that the model runs in.
        group: the processes that take the step together, each on its rows of the batches.

    Raises ValueError with cuda_graph="on" where steps cannot be captured, saying why.
    """

    def __init__(
        self,
        model: GPT | Any,
        forward: Callable[..., tuple[Any, Tensor]],
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        group: parallel.Alone = parallel.ALONE,
    ) -> None:
        self.model, self.optimizer, self.group = model, optimizer, group
        self.forward = group.wrap(forward, model)
        self.config, self.autocast = config, autocast
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.not_captured = group.not_captured or why_not_captured(config, self.device)
        if config.cuda_graph == "on" and self.not_captured:
            raise ValueError(f"cuda_graph is 'on', but {self.not_captured}; choose cuda_graph='auto'")
        self.bad = torch.zeros((), device=self.device)  # 1 once a loss or a gradient is not finite
        self._state: Hashable = None  # what the graphs take for granted, see `_now`
        self._pool: Any = None  # the memory that they share
        self._stream: Any = None  # on which they were captured
        self._batches: list[Batch] = []  # what they read
        self._launched: dict[Hashable, int] = {}  # steps launched so far, by the FFNs' phases
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # and what each writes

    def __call__(self, batches: Sequence[Batch], lr: float, step: int = 0) -> Tensor:
        """Take one step, and return [2]: the mean loss of the micro-batches, the norm of their mean gradient.

        From the first loss or norm on that is not finite, the weights stay as they are.

        Args:
            batches: `grad_accum` micro-batches of equal shapes. lr: learning rate.
            step: its number, for random draws.
        """
        set_rate(self.optimizer, lr)
        if self.not_captured or self._needs_python():
            return self._launch(batches, step)
        now, phases = self._now(batches), tuple(ffn.phase for ffn in self.model.ffns())
        alternates = self.config.order == "interleaved"  # else a phase that has ended does not come back
        over = bool(self._graphs) and phases not in self._launched and not alternates
        if now != self._state or over:
            self.forget()
        launched = self._launched.get(phases, 0)
        if launched < WARM:
            result = self._launch(batches, step)
            self._launched[phases], self._state = launched + 1, self._now(batches)
            return result
        if phases not in self._graphs and not self._capture(phases, batches):
            return self._launch(batches, step)
        for ours, theirs in zip(self._batches, batches, strict=True):
            for mine, given in zip(ours, theirs, strict=True):
                mine.copy_(given)
        graph, result = self._graphs[phases]
        graph.replay()
        return result.clone()

    @property
    def captured(self) -> int:
        """How many graphs there are: none yet, one, or one a phase where the phases alternate."""
        return len(self._graphs)

    def forget(self) -> None:
        """Free the graphs and their memory; the next steps are launched, then captured anew."""
        self._state, self._pool, self._stream, self._batches = None, None, None, []
        self._launched.clear()
        self._graphs.clear()

    def not_finite(self, batches: Sequence[Batch], step: int = 0) -> list[str]:
        """Names of the parameters whose gradient of this step is not finite, computed kernel by kernel.

        After a step that was not finite the weights are still those that it read, so this finds its cause.
        """
        self.model.zero_grad(set_to_none=True)
        self._gradients(batches, step)
        named = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        return [name for name, gradient in named if not gradient.isfinite().all()]

    def _launch(self, batches: Sequence[Batch], step: int = 0) -> Tensor:
        """The step, kernel by kernel. Nothing in it waits for the device."""
        self.model.zero_grad(set_to_none=True)  # what an interrupted step has left
        loss = self.group.mean(self._gradients(batches, step))
        trained = parallel.gradients(self.parameters)
        result = clipped_step(self.optimizer, trained, loss, self.config.clip, self.bad, self.group.norm)
        for parameter in (*self.parameters, *trained):
            parameter.grad = None
        return result

    def _gradients(self, batches: Sequence[Batch], step: int) -> Tensor:
        """Accumulate the gradients of the micro-batches; their mean loss."""
        losses = []
        # What kernels prepare is as large as whole weights: kept of sharded ones, it would fill memory.
        self.model.hold_weights(len(batches) > 1 and not self.group.sharded)
        try:
            for micro, batch in enumerate(batches):
                if self.config.model.sparsity.wgrad == "mvue":
                    torch.manual_seed(draw_seed(self.config.seed, step, micro))
                with self.group.synchronised(self.forward, micro == len(batches) - 1):
                    with self.autocast():
                        loss = self.forward(*batch)[1]
                    (loss / len(batches)).backward()
                losses.append(loss.detach())
        finally:
            self.model.hold_weights(False)
        for ffn in self.model.ffns():
            if ffn.phase == "dense" and ffn.score is not None:
                ffn.score.grad = None  # zero in several processes, and none in one: see `with_score`
        return torch.stack(losses).mean()

    def _capture(self, phases: Hashable, batches: Sequence[Batch]) -> bool:
        """Make the graph of a step in these phases; False, with a warning, if that cannot be."""
        if not self._batches:
            self._batches = [tuple(part.clone() for part in batch) for batch in batches]
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        how = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        gc.collect()  # nothing that belongs to another graph may be freed while this one is captured
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, **how):
                result = self._launch(self._batches)
        except BaseException as error:
            torch.cuda.set_stream(before)
            _leave_capture(self.device)
            self.optimizer.zero_grad(set_to_none=True)
            self.forget()
            if self.config.cuda_graph == "on" or not isinstance(error, RuntimeError):
                raise
            self.not_captured = f"capture failed: {str(error).splitlines()[0]}"
            warnings.warn(f"steps are launched one by one; {self.not_captured}", stacklevel=3)
            return False
        self._graphs[phases] = graph, result
        return True

    def _needs_python(self) -> bool:
        """True while there are hooks, or draws to be seeded in every micro-batch: a replay runs no Python."""
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        hooked = any(getattr(module, kind) for module in self.model.modules() for kind in kinds)
        kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
        hooked = hooked or any(getattr(p, kind) for p in self.model.parameters() for kind in kinds)
        return hooked or any(ffn.config.wgrad == "mvue" for ffn in self.model.ffns())

    def _now(self, batches: Sequence[Batch]) -> Hashable:
        """What a captured step takes for granted: formats, settings, shapes, and where its memory lies."""
        formats = tuple(
            (ffn.config, engines.requested(ffn.backend), ffn.collect, ffn.clustered._version)
            for ffn in self.model.ffns()
        )
        forms = (self.model.stream, *(block.attn.kernel for block in self.model.blocks))
        groups = self.optimizer.param_groups
        settings = tuple(v for group in groups for k, v in group.items() if k not in ("params", "lr"))
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        rates = [group["lr"] for group in groups if isinstance(group["lr"], Tensor)]
        parameters = list(self.model.parameters())
        shapes = tuple((part.shape, part.dtype) for batch in batches for part in batch)
        places = tuple(t.data_ptr() for t in (*parameters, *self.model.buffers(), *moments, *rates))
        trained = tuple(p.requires_grad for p in parameters)
        return id(self.forward), formats, forms, settings, _switches(), shapes, trained, places


def _leave_capture(device: torch.device) -> None:
    """Capture nothing: after a capture that failed torch's generator still waits for the end of one."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with suppress(RuntimeError), torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
        pass


def _switches() -> tuple[bool, ...]:
    """torch's own settings that choose kernels."""
    cuda = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cuda.matmul.allow_tf32,
        cuda.flash_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
    )
