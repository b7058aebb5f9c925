"""What surrounds a training loop: device, precision, reproducibility, optimiser, failures, interrupts."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from replicate.config import TrainConfig
from replicate.settings.text import config_hash, to_dict
from replicate.system import paths
from replicate.system.files import write_atomic

STATS_TOKENS = 4096


class NonFiniteLoss(RuntimeError):
    """The loss or a gradient became NaN or infinite. `report` holds step, phase and layer statistics."""

    def __init__(self, report: dict[str, Any], path: Path):
        super().__init__(
            f"loss {report['loss']}, gradient norm {report['grad_norm']} at step {report['step']} "
            f"({report['phase']} phase, lr {report['lr']:.3g}); layer statistics: {path}. "
            "A lower lr, a longer lr_warmup or dense_warmup, or clip > 0 usually helps"
        )
        self.report, self.path = report, path


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


def stats_rows(config: TrainConfig) -> int:
    """Sequences of a batch that a statistic reads, whole blocks of V rows where these are routed.

    At most half of them and about STATS_TOKENS tokens: statistics are to cost next to nothing.
    """
    seq_len, sparsity = config.model.seq_len, config.model.sparsity
    unit = sparsity.v if sparsity.routing == "oracle-block" else 1
    for rows in range(max(1, min(STATS_TOKENS // seq_len, config.batch_size // 2)), config.batch_size):
        if rows * seq_len % unit == 0:
            return rows
    return config.batch_size


def stopped_at(report: dict[str, Any], config: TrainConfig, folder: Path | None) -> NonFiniteLoss:
    """Save the report of a run that diverged (into `folder`, else runs/nonfinite); the error to raise."""
    folder = folder or paths.runs_dir() / "nonfinite"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"nonfinite-{config_hash(config)}-step-{report['step']}.json"
    content = _finite_or_text(report | {"config": to_dict(config)})
    write_atomic(path, json.dumps(content, indent=1).encode())
    return NonFiniteLoss(report, path)


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


@contextmanager
def interrupts_between_steps(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Make Ctrl-C wait: what is inside asks the function given whether it came, and ends in good order.

    KeyboardInterrupt is raised after that, and at once if Ctrl-C comes twice. Nothing changes where `wanted`
    is False, outside the main thread, and where somebody else handles Ctrl-C.
    """
    came = False

    def note(*_: Any) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    ours = wanted and threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def quiet_interrupts() -> None:
    """Make an interrupted cell say in one line how to go on; does nothing outside IPython."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        shell.set_custom_exc((KeyboardInterrupt,), _interrupted)


def _interrupted(*_: Any, **__: Any) -> list[str]:
    print("Interrupted. Run the cell again: it continues where it stopped.")
    return []


def _finite_or_text(value: Any) -> Any:
    """JSON has no NaN or infinity: such numbers become text."""
    if isinstance(value, dict):
        return {name: _finite_or_text(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite_or_text(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
