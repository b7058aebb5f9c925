"""How a 2:4 product runs: every algorithm of cuSPARSELt timed and checked once per shape, or a dense product.

The library's default algorithm is seldom the fastest and its search not always right, so every shape is
tuned once per device and version: all algorithms are timed on random operands, each result is checked
against a dense product, and the outcome is kept in runs/matmul24/. Where none beats cuBLAS, the plan is
dense.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from replicate import paths
from replicate.kernels import backend as engines
from replicate.kernels.backend import HALF
from replicate.kernels.compressed24 import compress_by_library, padded_rows
from replicate.sparsity import mask24

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative Frobenius error of two rounded products
MAX_ALGORITHMS = 128


@dataclass(frozen=True)
class Plan:
    """How a product of one shape runs on one device, with the times in ms that decided it."""

    engine: str  # "cusparselt" or "dense"
    algorithm: int = 0
    split_k: int = 1
    split_k_mode: int = -1
    ms: float = 0.0
    dense_ms: float = 0.0
    default_ms: float = 0.0  # the library's default algorithm
    tried: int = 0
    wrong: int = 0  # candidates whose result was wrong


def sparse_product(buffer: Tensor, dense: Tensor, transpose: bool, plan: Plan) -> Tensor:
    """One call of the library. Its stride rules are not checked there, hence `_fit` before."""
    return torch._cslt_sparse_mm(
        buffer,
        dense,
        transpose_result=transpose,
        alg_id=plan.algorithm,
        split_k=plan.split_k,
        split_k_mode=plan.split_k_mode,
    )


@dataclass(frozen=True)
class Shape:
    """What a plan depends on: A [m, k] sparse, B [k, n], whether B is row-major and the result transposed."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    b_row_major: bool
    transpose: bool

    @property
    def key(self) -> str:
        """The name of the plan in the cache file."""
        order = "row" if self.b_row_major else "col"
        result = "t" if self.transpose else "n"
        return f"{self.m}x{self.n}x{self.k}-{str(self.dtype).removeprefix('torch.')}-{order}-{result}"


def plan_for(shape: Shape, device: torch.device, *, unpacks: bool = False) -> Plan:
    """The plan of a shape: from memory, else from disk, else tuned now.

    Args:
        unpacks: a dense plan would have to unpack the operand first, so it must win by that much more.

    Raises RuntimeError while a CUDA graph is captured and the shape is new: run the product once before.
    """
    key = shape.key + ("-unpack" if unpacks else "")
    plans = _plans(_cache_file(device))
    if key not in plans:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"matmul24 of {key} is not tuned yet; run it once before capturing a CUDA graph"
            )
        with torch.cuda.device(device), torch.no_grad():
            plans[key] = tune(shape, device, unpacks=unpacks)
        _save(_cache_file(device), plans)
    return plans[key]


def pays(rows: int, n: int, cols: int, dtype: torch.dtype, device: torch.device, **layout: bool) -> bool:
    """True if the product of a compressed [rows, cols] with [cols, n] beats cuBLAS on this device.

    Ask before compressing. `layout` takes b_row_major (default True) and transpose (default False).
    """
    if engines.select(device) != "cusparselt" or dtype not in HALF or cols % 64:
        return False
    shape = Shape(
        padded_rows(rows),
        -(-n // 8) * 8,
        cols,
        dtype,
        layout.get("b_row_major", True),
        layout.get("transpose", False),
    )
    return plan_for(shape, torch.device(device)).engine == "cusparselt"


def tune(shape: Shape, device: torch.device, *, unpacks: bool = False, repeats: int = 5) -> Plan:
    """Time every algorithm of the library on random operands; the fastest one with a right result wins."""
    a, buffer, b = _operands(shape, device)
    expected = b.t() @ a.t() if shape.transpose else a @ b

    def dense() -> Tensor:
        return b.t() @ a.t() if shape.transpose else a @ b

    dense_ms = _median_ms(dense, 2 * repeats)
    if unpacks:
        dense_ms += _median_ms(lambda: a.clone(), repeats)  # the traffic of unpacking, or a little more
    timed: list[Plan] = []
    tried = wrong = 0
    for candidate in _candidates(buffer, b, shape.transpose):
        tried += 1
        error = _error(buffer, b, shape.transpose, candidate, expected)
        if error is None:
            continue
        if not error <= TOLERANCE[shape.dtype]:
            wrong += 1
            continue
        ms = _median_ms(lambda plan=candidate: sparse_product(buffer, b, shape.transpose, plan), repeats)
        timed.append(dataclasses.replace(candidate, ms=ms))
    default_ms = next((p.ms for p in timed if (p.algorithm, p.split_k) == (0, 1)), 0.0)
    best = Plan("dense", ms=dense_ms)
    for plan in sorted(timed, key=lambda p: p.ms)[:3]:
        ms = _median_ms(lambda plan=plan: sparse_product(buffer, b, shape.transpose, plan), 3 * repeats)
        if ms < best.ms:
            best = dataclasses.replace(plan, ms=ms)
    return dataclasses.replace(best, dense_ms=dense_ms, default_ms=default_ms, tried=tried, wrong=wrong)


def _operands(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random (A, its buffer, B); the library compresses A, so that tuning trusts no code of this package."""
    draw = torch.Generator(device).manual_seed(0)

    def randn(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=draw, device=device, dtype=shape.dtype)

    mask = mask24(randn(64, shape.k)).repeat(shape.m // 64, 1)
    a = randn(shape.m, shape.k).masked_fill_(~mask, 0)
    b = randn(shape.k, shape.n) if shape.b_row_major else randn(shape.n, shape.k).t()
    return a, compress_by_library(a), b


def _candidates(buffer: Tensor, b: Tensor, transpose: bool) -> Iterator[Plan]:
    """Every algorithm without split-k, and what the library's own search proposes."""
    found = torch._C._cusparselt.mm_search(buffer, b, None, None, None, transpose)
    algorithm, split_k, mode, count = (int(value) for value in found)
    for index in range(min(max(count, algorithm + 1), MAX_ALGORITHMS)):
        yield Plan("cusparselt", index)
    if split_k != 1:
        yield Plan("cusparselt", algorithm, split_k, mode)


def _error(buffer: Tensor, b: Tensor, transpose: bool, plan: Plan, expected: Tensor) -> float | None:
    """Relative error of one call whose memory held NaN before; None if the library refuses the plan."""
    poison = torch.full_like(expected, float("nan"))
    del poison  # the allocator hands this block to the result
    try:
        out = sparse_product(buffer, b, transpose, plan)
        return float(torch.linalg.vector_norm(out - expected, dtype=torch.float32)) / float(
            torch.linalg.vector_norm(expected, dtype=torch.float32)
        )
    except RuntimeError:
        return None


def _median_ms(fn: Callable[[], object], repeats: int) -> float:
    fn()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        fn()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def _cache_file(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device)
    tag = f"{name}|{torch.__version__}|{engines.cusparselt_version()}"
    short = "".join(c if c.isalnum() else "-" for c in name.lower())
    folder = paths.runs_dir() / "matmul24"
    return folder / f"{short}-{hashlib.sha256(tag.encode()).hexdigest()[:8]}.json"


@lru_cache
def _plans(path: Path) -> dict[str, Plan]:
    """Plans on disk; an unreadable file counts as none, since tuning replaces it."""
    try:
        return {key: Plan(**plan) for key, plan in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _save(path: Path, plans: dict[str, Plan]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    text = json.dumps({key: dataclasses.asdict(plan) for key, plan in sorted(plans.items())}, indent=1)
    partial.write_text(text + "\n")
    partial.replace(path)
