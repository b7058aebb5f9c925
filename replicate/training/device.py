"""Where a run computes, in which precision, and how reproducibly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from replicate.system.tracing import constant


def pick_device(name: str) -> torch.device:
    """The device called `name`: "cpu", "cuda", "cuda:1", or "auto", the GPU if there is one.

    Raises ValueError if it is not here, or another kind of device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device is {name!r}, not usable here ({error}); choose 'auto' or 'cpu'") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}, on which nothing trains here; choose 'auto', 'cpu' or 'cuda'")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision called `name`; "auto" is bfloat16 (autocast) on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def pick_residual(name: str, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of `GPT.stream` for a setting of TrainConfig.residual: None for "float32", the weights' own.

    Raises ValueError for "bfloat16" in a run that does not compute in it.
    """
    if name != "bfloat16":
        return None
    if dtype != torch.bfloat16:
        computes = str(dtype).removeprefix("torch.")
        raise ValueError(f"residual is {name!r}, but the run computes in {computes}; set dtype='bfloat16'")
    return torch.bfloat16


@contextmanager
def reproducible(device: torch.device, strict: bool = False) -> Iterator[None]:
    """Run with deterministic kernels on a GPU, and give torch's random state and settings back after.

    cuDNN's attention adds up its gradient in no fixed order; with `strict` a slower kernel takes its place.
    """
    on_gpu = device.type == "cuda"
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        if on_gpu:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=not strict)
            warnings.filterwarnings("ignore", message="cuDNN Attention defaults to a non-deterministic")
            torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill


def autocast_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """The context that computes in a precision: bfloat16 autocast, or nothing for float32 and float64."""
    return torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()


def autocast_on(x: Tensor) -> bool:
    """True if autocast is on where x is."""
    return _has_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)


@constant
def _has_autocast(kind: str) -> bool:
    """False for devices such as meta."""
    return torch.amp.is_autocast_available(kind)
