"""Which of torch's attention kernels a run uses: the fastest fused one, timed once for each shape.

On a GPU torch takes a kernel by itself, by an order that depends on its version; cuDNN's can be 1.3 times as
fast as FlashAttention-2. Here forward and backward pass of each are timed on the shape that is trained, and
the choice is kept in runs/attention/, so that the next run of that shape takes the same kernel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from replicate.config import ModelConfig, TrainConfig
from replicate.system import paths
from replicate.system.files import write_atomic
from replicate.system.graph_time import median_ms
from replicate.training.device import reproducible
from replicate.training.parallel import Alone

TORCH = "torch"  # leaves the choice to torch
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
_OTHERS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# A kernel, and what computes where it cannot: in another dtype than that of training, on another length.
ORDERS = {
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *_OTHERS],
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *_OTHERS],
}
Timer = Callable[[Callable[[], object]], float]  # from a call to its milliseconds
_known: dict[tuple[str, str], str] = {}  # by cache file and shape


@dataclass(frozen=True)
class Shape:
    """What the fastest kernel depends on, beside the device and torch's version."""

    batch: int
    seq: int
    n_head: int
    n_kv_head: int
    d_head: int
    dtype: torch.dtype
    deterministic: bool = False  # a setting of torch's, under which cuDNN's kernel is refused

    @classmethod
    def of(cls, model: ModelConfig, batch: int, dtype: torch.dtype, deterministic: bool = False) -> Shape:
        """The shape of a micro-batch of `batch` sequences."""
        heads = (model.n_head, model.kv_heads, model.d_model // model.n_head)
        return cls(batch, model.seq_len, *heads, dtype, deterministic)

    @property
    def key(self) -> str:
        """The shape's name in the cache file."""
        sizes = "x".join(map(str, dataclasses.astuple(self)[:5]))
        strict = "-deterministic" if self.deterministic else ""
        return f"{sizes}-{str(self.dtype).removeprefix('torch.')}{strict}"


def attention_by(name: str) -> AbstractContextManager:
    """Attention by the kernel called `name`, by another where that one cannot; TORCH leaves the choice."""
    if name == TORCH:
        return nullcontext()
    return sdpa_kernel(ORDERS[name], set_priority=True)


def agreed(config: TrainConfig, dtype: torch.dtype, device: torch.device, group: Alone) -> str:
    """`pick` for a process's rows of a run, by the first process of its group."""
    rows = config.batch_size // group.world
    shape = Shape.of(config.model, rows, dtype, config.deterministic)
    return group.of_first(lambda: pick(config.attention, shape, device))


def pick(asked: str, shape: Shape, device: torch.device, timer: Timer = median_ms) -> str:
    """The kernel for a setting of TrainConfig.attention: "flash", "cudnn" or TORCH.

    "auto" is the fastest on a GPU, TORCH where neither works and on a CPU.

    Args:
        timer: stands in for `median_ms`.

    Raises ValueError for a kernel that is asked for and cannot compute this shape here.
    """
    if asked == TORCH or (asked == "auto" and device.type != "cuda"):
        return TORCH
    if device.type != "cuda":
        raise ValueError(f"attention is {asked!r}, a kernel of GPUs, on {device.type}; choose 'auto'")
    settle(device)
    if asked == "auto":
        return remembered(shape, device, _cache_file(device), timer)
    try:
        with reproducible(device, shape.deterministic), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _call(shape, device, KERNELS[asked])()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"attention is {asked!r}, which cannot compute {shape.key} here ({reason}); choose 'auto'"
        ) from None
    return asked


def remembered(shape: Shape, device: torch.device, file: Path, timer: Timer) -> str:
    """The fastest kernel: from memory, else from `file`, else timed now and written there."""
    place = str(file), shape.key
    if place not in _known:
        stored = _read(file)
        if shape.key not in stored:
            with reproducible(device, shape.deterministic):
                times = times_ms(shape, device, timer, KERNELS)
            used = min(times, key=times.__getitem__, default=TORCH)
            stored = {shape.key: {"used": used, "ms": times}} | _read(file)  # who was first decides
            write_atomic(file, (json.dumps(stored, indent=1, sort_keys=True) + "\n").encode())
        _known[place] = stored[shape.key]["used"]
    return _known[place]


def times_ms(
    shape: Shape, device: torch.device, timer: Timer = median_ms, kernels: Mapping[str, SDPBackend] = KERNELS
) -> dict[str, float]:
    """Milliseconds of forward and backward pass of one layer's attention, by each kernel that works.

    The products of q, k and v alone, without the layer's weights.
    """
    found, here = {}, torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with here, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says of each kernel why it cannot
        for name, kernel in kernels.items():
            try:
                found[name] = timer(_call(shape, device, kernel))
            except torch.OutOfMemoryError:  # says nothing of the kernel
                raise
            except RuntimeError:  # not in this build, not on this chip, or not for this shape
                continue
    return found


def _call(shape: Shape, device: torch.device, kernel: SDPBackend) -> Callable[[], tuple[Tensor, ...]]:
    """Gradients of causal attention by one kernel and no other, on random q, k, v laid out as the model's."""
    heads, turned = shape.n_head + 2 * shape.n_kv_head, [shape.n_head, shape.n_kv_head]
    draw = torch.Generator(device).manual_seed(0)
    how = {"generator": draw, "device": device, "dtype": shape.dtype}
    qkv = torch.randn(shape.batch, shape.seq, heads, shape.d_head, **how).transpose(1, 2)
    qk, v = qkv.split([sum(turned), shape.n_kv_head], dim=1)
    q, k = qk.contiguous().split(turned, dim=1)  # what rotation writes anew
    inputs = tuple(t.detach().requires_grad_() for t in (q, k, v))
    dy = torch.randn(shape.batch, shape.seq, shape.n_head, shape.d_head, **how).transpose(1, 2)
    grouped = shape.n_kv_head != shape.n_head

    def call() -> tuple[Tensor, ...]:
        with sdpa_kernel(kernel):
            y = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=grouped)
        return torch.autograd.grad(y, inputs, dy)

    return call


def settle(device: torch.device) -> None:
    """Have torch set its own order of kernels, which it does in a first call, over any that was asked for."""
    if device.type != "cuda":
        return
    q = torch.zeros(1, 1, 16, 16, device=device, dtype=torch.bfloat16)
    F.scaled_dot_product_attention(q, q, q)


def _cache_file(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device)
    tag = f"{name}|{torch.__version__}|{torch.backends.cudnn.version()}"
    short = "".join(c if c.isalnum() else "-" for c in name.lower())
    return paths.runs_dir() / "attention" / f"{short}-{hashlib.sha256(tag.encode()).hexdigest()[:8]}.json"


def _read(file: Path) -> dict[str, dict]:
    """Choices on disk that can be followed; others count as none, and are timed anew."""
    try:
        found = json.loads(file.read_text())
        return {key: row for key, row in found.items() if row["used"] in (TORCH, *KERNELS)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
