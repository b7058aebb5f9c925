"""Which engine runs an operation: plain torch, Triton, or cuSPARSELt; by device, argument and environment.

`reference` is plain torch and defines what is right. `triton` adds the fused kernels (NVIDIA, compute
capability 8.0 and up; elsewhere only interpreted, for tests). `cusparselt` adds 2:4 products on sparse tensor
cores. `auto` takes the most capable one the device has, and lets each 2:4 product fall back to a dense one
where that is faster; naming `cusparselt` turns that fall-back off. REPLICATE_BACKEND replaces `auto`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from replicate.config import BACKENDS
from replicate.system.tracing import constant

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:  # macOS, Windows: modules with kernels still import, and run their references

    class triton:
        """Stand-in that lets modules with kernels import."""

        jit = staticmethod(lambda fn: fn)

    class tl:
        """Stand-in for annotations."""

        constexpr = staticmethod(lambda value: value)

    HAVE_TRITON = False

HALF = (torch.float16, torch.bfloat16)


class on_its_device:
    """A Triton kernel that is launched where its first operand is; Triton itself takes the current device."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.fn = getattr(kernel, "fn", kernel)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        """What launches the kernel; the first argument is a tensor or a tensor's descriptor."""

        def launch(first: Any, *args: Any, **options: Any) -> Any:
            device = getattr(first, "base", first).device
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                return self.kernel[grid](first, *args, **options)
            with torch.cuda.device(device):
                return self.kernel[grid](first, *args, **options)

        return launch


def check(ok: bool, message: str) -> None:
    """Raise ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


def interpreted() -> bool:
    """True if Triton kernels run in its interpreter, on a CPU."""
    return HAVE_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


INTERPRETED = tl.constexpr(interpreted())  # for kernels


@constant
def requested(backend: str | None = None) -> str:
    """The backend asked for; ValueError if unknown.

    The argument, unless it is None or "auto"; else REPLICATE_BACKEND; else "auto".
    """
    named = None if backend == "auto" else backend
    name = named or os.environ.get("REPLICATE_BACKEND") or "auto"
    source = "backend" if named else "REPLICATE_BACKEND"
    check(name in BACKENDS, f"{source} is {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


@constant
def select(device: torch.device | str, backend: str | None = None, dtype: torch.dtype | None = None) -> str:
    """The engine for tensors on `device`: "reference", "triton" or "cusparselt".

    Args:
        device: where the operands are.
        backend: overrides REPLICATE_BACKEND; None or "auto" does not, and chooses by capability without it.
        dtype: of the operands, if there is one: the interpreter cannot compute in bfloat16.

    Raises:
        ValueError: an unknown name, or an engine this device does not have.
    """
    name, (best, why_not_more) = requested(backend), _best(str(device))
    if name == "auto":
        # Interpreted kernels are for tests that name them: they are far slower than plain torch.
        return "reference" if torch.device(device).type == "cpu" else best
    rank = ("reference", "triton", "cusparselt").index
    check(
        rank(name) <= rank(best),
        f"backend {name!r} cannot run on {device} ({why_not_more}); use 'auto' or {best!r}",
    )
    check(
        not (interpreted() and name != "reference" and dtype == torch.bfloat16),
        "interpreted Triton rounds bfloat16 wrongly; use float16, or backend='reference'",
    )
    return name


def report(device: torch.device | str | None = None) -> str:
    """One line: the device, the engine selected for it, and why; ValueError for a GPU that is not here."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    here = device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()
    check(here, f"device is {str(device)!r}, and there are {torch.cuda.device_count()} GPUs; choose 'cpu'")
    asked = requested()
    why = "by capability" if asked == "auto" else f"REPLICATE_BACKEND={asked}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    _, missing = _best(str(device))
    return f"backend {select(device)} on {name} ({why}{'; ' + missing if missing else ''})"


def cusparselt_version() -> int | None:
    """cuSPARSELt's version as one integer (800 is 0.8.0), or None where torch was built without it."""
    if not torch.backends.cusparselt.is_available():
        return None
    return torch.backends.cusparselt.version()


@lru_cache
def _best(device: str) -> tuple[str, str]:
    """The most capable engine a device has, and what keeps it from "cusparselt", if anything does."""
    kind = torch.device(device).type
    if kind != "cuda":
        return "triton" if kind == "cpu" and interpreted() else "reference", "no CUDA device"
    if not HAVE_TRITON:
        return "reference", "Triton is not installed"
    nvidia = torch.cuda.is_available() and not torch.version.hip
    if not nvidia or torch.cuda.get_device_capability(device) < (8, 0):
        return "reference", "kernels need an NVIDIA GPU of compute capability 8.0 or higher"
    if not torch.backends.cusparselt.is_available():
        return "triton", "torch was built without cuSPARSELt"
    return "cusparselt", ""
