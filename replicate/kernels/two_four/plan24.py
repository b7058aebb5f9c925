"""How a 2:4 product runs: every algorithm of cuSPARSELt timed and checked once per shape, or a dense product.

The library's default algorithm is seldom the fastest, so every shape is tuned once per device and version:
all algorithms run on random operands, each result is checked against a dense product, and the fastest right
one is kept in runs/matmul24/. Where none beats cuBLAS, the product is dense.

In version 0.8.0 some float16 algorithms execute an illegal instruction, which ends the process's use of the
GPU: float16 is limited to the first few, and the library's own search, which runs them all, is not called.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from replicate.kernels import backend as engines
from replicate.kernels.backend import HALF
from replicate.kernels.two_four.compressed24 import TILE, compress_by_library
from replicate.sparsity import mask24
from replicate.system import paths
from replicate.system.files import write_atomic
from replicate.system.graph_time import median_ms

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative Frobenius error of two rounded products
MOST_ALGORITHMS = 256  # the library refuses numbers past its last algorithm, the 8th to 27th in 0.8.0
SAFE_FLOAT16 = 9  # algorithms 0 to 8 ran on nine shapes
_known: dict[tuple[int, Shape], Plan] = {}  # by device and exact shape: a look-up costs a hash


@dataclass(frozen=True)
class Shape:
    """What a plan depends on: A [m, k] sparse, B [k, n], whether B is row-major and the result transposed."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    b_row_major: bool = True
    transpose: bool = False

    @property
    def algorithms(self) -> int:
        """How many algorithms may be tried; the library refuses those it does not have."""
        if self.dtype != torch.float16:
            return MOST_ALGORITHMS
        # torch's own 2:4 layers run the first one with a column-major B and a transposed result.
        return 1 if self.transpose and not self.b_row_major else SAFE_FLOAT16

    @property
    def key(self) -> str:
        """The name of the plan in the cache file."""
        order, result = "row" if self.b_row_major else "col", "t" if self.transpose else "n"
        return f"{self.m}x{self.n}x{self.k}-{str(self.dtype).removeprefix('torch.')}-{order}-{result}"

    def rounded(self) -> Shape:
        """m and n rounded up to four significant bits, so that a varying number of tokens is tuned rarely."""
        return dataclasses.replace(self, m=_four_bits(self.m, TILE), n=_four_bits(self.n, 8))


@dataclass(frozen=True)
class Plan:
    """The best algorithm of a shape, None if none was right, and the times in ms that decided."""

    algorithm: int | None
    ms: float = 0.0
    dense_ms: float = 0.0  # the same product by cuBLAS
    unpack_ms: float = 0.0  # traffic of making a compressed operand dense
    default_ms: float = 0.0  # the library's default algorithm
    tried: int = 0
    wrong: int = 0  # algorithms whose result was wrong

    def engine(self, unpacks: bool = False) -> str:
        """ "cusparselt" or "dense", which must unpack the operand first if `unpacks`."""
        dense_ms = self.dense_ms + (self.unpack_ms if unpacks else 0.0)
        return "cusparselt" if self.algorithm is not None and self.ms < dense_ms else "dense"


def pays(shape: Shape, device: torch.device) -> bool:
    """True if a product of this shape is faster on sparse tensor cores; ask before compressing an operand."""
    if engines.select(device) != "cusparselt" or shape.dtype not in HALF or shape.k % TILE:
        return False
    return plan_for(shape, device).engine() == "cusparselt"


def plan_for(shape: Shape, device: torch.device) -> Plan:
    """The plan of a shape: from memory, else from disk, else tuned now.

    Raises RuntimeError while a CUDA graph is captured and the shape is new: run the product once before.
    """
    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    known = _known.get((index, shape))
    if known is None:
        known = _known[index, shape] = _load_or_tune(shape.rounded(), torch.device("cuda", index))
    return known


def forget() -> None:
    """Drop the plans in memory, so that the next product reads them from disk again."""
    _known.clear()


def _load_or_tune(shape: Shape, device: torch.device) -> Plan:
    file = _cache_file(device)
    plan = _read(file).get(shape.key)
    if plan is None:
        with torch.cuda.device(device), torch.no_grad():
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"{shape.key} is not tuned; run it once before capturing a CUDA graph")
            plan = tune(shape, device)
        _save(file, {**_read(file), shape.key: plan})  # read again: others may have written meanwhile
    return plan


def sparse_product(buffer: Tensor, dense: Tensor, transpose: bool, algorithm: int) -> Tensor:
    """One call of the library, which checks no strides: B is contiguous or the transpose of such a matrix."""
    return torch._cslt_sparse_mm(buffer, dense, transpose_result=transpose, alg_id=algorithm)


def tune(shape: Shape, device: torch.device, *, repeats: int = 5) -> Plan:
    """Run every algorithm on random operands; the fastest one with a right result wins."""
    a, buffer, b = _operands(shape, device)

    def dense() -> Tensor:
        return b.t() @ a.t() if shape.transpose else a @ b

    def sparse_ms(algorithm: int, repeats: int) -> float:
        return median_ms(lambda: sparse_product(buffer, b, shape.transpose, algorithm), repeats)

    expected = dense()
    times: dict[int, float] = {}
    tried = wrong = 0
    for algorithm in range(shape.algorithms):
        error = _error(buffer, b, shape.transpose, algorithm, expected)
        if error is None:
            break
        tried += 1
        if error <= TOLERANCE[shape.dtype]:
            times[algorithm] = sparse_ms(algorithm, repeats)
        else:
            wrong += 1
    fastest = sorted(times, key=times.__getitem__)[:3]
    finalists = {algorithm: sparse_ms(algorithm, 3 * repeats) for algorithm in fastest}
    best = min(finalists, key=finalists.__getitem__, default=None)
    return Plan(
        best,
        ms=finalists.get(best, 0.0),
        dense_ms=median_ms(dense, 3 * repeats),
        unpack_ms=median_ms(a.clone, repeats),
        default_ms=times.get(0, 0.0),
        tried=tried,
        wrong=wrong,
    )


def _operands(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random (A, its buffer, B); the library compresses A, so that tuning trusts no code of this package."""
    draw = torch.Generator(device).manual_seed(0)

    def randn(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=draw, device=device, dtype=shape.dtype)

    mask = mask24(randn(TILE, shape.k)).repeat(shape.m // TILE, 1)
    a = randn(shape.m, shape.k).masked_fill_(~mask, 0)
    b = randn(shape.k, shape.n) if shape.b_row_major else randn(shape.n, shape.k).t()
    return a, compress_by_library(a), b


def _error(buffer: Tensor, b: Tensor, transpose: bool, algorithm: int, expected: Tensor) -> float | None:
    """Relative error of one call whose memory held NaN before; None if the library has no such algorithm."""
    poison = torch.full_like(expected, float("nan"))
    del poison  # the allocator hands this block to the result
    try:
        out = sparse_product(buffer, b, transpose, algorithm)
    except RuntimeError:
        return None
    norm = torch.linalg.vector_norm
    return float(norm(out - expected, dtype=torch.float32) / norm(expected, dtype=torch.float32))


def _four_bits(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit` and of an eighth of the power of two below it."""
    step = max(unit, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def _cache_file(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device)
    tag = f"{name}|{torch.__version__}|{engines.cusparselt_version()}"
    short = "".join(c if c.isalnum() else "-" for c in name.lower())
    folder = paths.runs_dir() / "matmul24"
    return folder / f"{short}-{hashlib.sha256(tag.encode()).hexdigest()[:8]}.json"


def _read(path: Path) -> dict[str, Plan]:
    """Plans on disk; an unreadable file counts as none, since tuning replaces it."""
    try:
        return {key: Plan(**plan) for key, plan in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _save(path: Path, plans: dict[str, Plan]) -> None:
    text = json.dumps({key: dataclasses.asdict(plan) for key, plan in sorted(plans.items())}, indent=1)
    write_atomic(path, (text + "\n").encode())
