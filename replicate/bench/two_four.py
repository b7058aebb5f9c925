"""Benchmark of the 2:4 kernels against copy bandwidth, torch's compressor and cuBLAS, in one run (figure 6).

Correctness comes first: no figure is printed before every kernel agreed with its reference on this device.
Times are medians of CUDA graph replays on random bfloat16 operands with a cold L2 cache, and candidates
take turns, so that ratios are within one run.
"""

import time
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from replicate.bench import timing
from replicate.kernels import backend as engines
from replicate.kernels.two_four import plan24
from replicate.kernels.two_four.compressed24 import Compressed24, compress_by_library, layout, unpack24
from replicate.kernels.two_four.matmul24 import matmul24
from replicate.kernels.two_four.relu2_prune24 import (
    relu2_prune24,
    relu2_prune24_backward,
    relu2_prune24_backward_reference,
    relu2_prune24_reference,
)
from replicate.kernels.two_four.soft_threshold_prune24 import (
    soft_threshold_prune24,
    soft_threshold_prune24_both,
    soft_threshold_prune24_reference,
)
from replicate.kernels.two_four.tile_prune24 import tile_prune24, tile_prune24_reference
from replicate.sparsity import prune24
from replicate.study import records
from replicate.system import provenance

KIND = "bench-kernels"
SHAPES = ((16384, 4096, 16384), (16384, 2048, 8192))  # tokens, d_model, d_ff: the 7B and 1B models
FIGURE6 = (4096, 16384, 4096)  # m, n, k
DTYPE = torch.bfloat16
SWEEP = ((1024, 16384, 1024), (2048, 16384, 2048), (4096, 4096, 4096), (8192, 16384, 8192))
Row = dict[str, Any]


def config(shapes: Sequence[Sequence[int]] = SHAPES, repeats: int = 20) -> Row:
    """What identifies a run. Raises ValueError for a shape (tokens, d_model, d_ff) not in multiples of 64."""
    for shape in shapes:
        if any(n % 64 for n in shape):
            given = ",".join(map(str, shape))
            raise ValueError(f"shape {given} is not in multiples of 64, like 16384,4096,16384")
    c = {"what": "2:4 kernels", "shapes": [list(shape) for shape in shapes], "dtype": str(DTYPE)}
    return c | {"seed": 0, "device": provenance.device_name(), "repeats": repeats}


def run(c: Row) -> records.Record:
    """Check, then measure, on this machine's GPU; "memory" and "products" of the results are rows.

    Raises ValueError without an NVIDIA GPU, Triton and cuSPARSELt, AssertionError for a wrong kernel.
    """
    if engines.select("cuda" if torch.cuda.is_available() else "cpu", "auto") != "cusparselt":
        raise ValueError(f"nothing to measure: {engines.report()}; kernels are measured on an NVIDIA GPU")
    torch.manual_seed(c["seed"])
    start = time.perf_counter()
    for tokens, d_model, d_ff in c["shapes"]:
        verify(min(tokens, 2048), d_model, d_ff)
    result: Row = {"layout": layout("cuda", DTYPE), "backend": engines.report()}
    result |= {"cusparselt": engines.cusparselt_version(), "memory": [], "products": []}
    for shape in c["shapes"]:
        result["memory"] += memory_rows(*shape, c["repeats"])
        result["products"] += ffn_rows(*shape, c["repeats"])
    result["products"] += [figure6_row(*shape, c["repeats"]) for shape in (FIGURE6, *SWEEP)]
    return records.make_record(KIND, c, result, seconds=time.perf_counter() - start)


def randn(rows: int, cols: int) -> Tensor:
    """A random [rows, cols] of DTYPE on the GPU."""
    return torch.randn(rows, cols, device="cuda", dtype=DTYPE)


def verify(tokens: int, d_model: int, d_ff: int) -> None:
    """Raise AssertionError unless every kernel agrees with its reference on random operands of this shape."""
    y1, dy2 = randn(tokens, d_ff), randn(tokens, d_ff)
    expected, mask = relu2_prune24_reference(y1)
    y2 = relu2_prune24(y1, dense=True)
    _assert_equal("relu2_prune24", unpack24(y2.with_dense(None)), expected)
    _assert_equal("relu2_prune24, dense", y2.dense, expected)
    dy1 = relu2_prune24_backward(dy2, y2, form="both")
    _assert_equal("relu2_prune24_backward, two forms", unpack24(dy1.with_dense(None)), dy1.dense)
    _assert_close("relu2_prune24_backward", dy1.dense, relu2_prune24_backward_reference(dy2, expected, mask))
    del expected, mask, dy1
    for x in (y2.dense, dy2):
        dense, _ = tile_prune24_reference(x)
        both = tile_prune24(x)
        _assert_equal("tile_prune24", unpack24(both[0]), dense)
        for alone in (both[1], tile_prune24(x, along_columns=False)[1]):
            _assert_equal("tile_prune24, transposed", unpack24(alone), dense.t())
    del dense, both, alone
    for w in (randn(d_model, d_ff), randn(d_model, d_ff).float()):
        for compressed, dim in zip(soft_threshold_prune24_both(w, dtype=DTYPE), (1, 0)):
            dense, _ = soft_threshold_prune24_reference(w, dim, dtype=DTYPE)
            expected = dense if dim else dense.t()
            _assert_equal(f"soft_threshold_prune24, dim {dim}", unpack24(compressed), expected)
    x, w1, w2 = randn(tokens, d_model), randn(d_model, d_ff), randn(d_ff, d_model)
    s1 = soft_threshold_prune24(w1, True)
    for backend in ("auto", "cusparselt"):
        y1 = matmul24(s1, x.t(), transpose=True, backend=backend)
        _assert_close("matmul24, transposed", y1, x @ unpack24(s1).t())
        _assert_close("matmul24", matmul24(y2, w2, backend=backend), y2.dense @ w2)


def memory_rows(tokens: int, d_model: int, d_ff: int, repeats: int) -> list[Row]:
    """Times of the passes over memory, with their bytes and their share of the copy bandwidth."""
    y1, dy2 = randn(tokens, d_ff), randn(tokens, d_ff)
    y2 = relu2_prune24(y1, dense=True)
    w, wide = randn(d_model, d_ff), randn(d_model, d_ff).float()
    full, part = y1.nbytes, y2.buffer.nbytes
    w_part = w.nbytes * 9 // 16
    target = torch.empty_like(y1)
    functions = {  # bytes, call
        "copy": (2 * full, lambda: target.copy_(y1)),
        "copy by a kernel": (2 * full, lambda: torch.neg(y1, out=target)),
        "relu2_prune24": (full + part, lambda: relu2_prune24(y1)),
        "relu2_prune24, dense too": (2 * full + part, lambda: relu2_prune24(y1, dense=True)),
        "backward": (full + 2 * part, lambda: relu2_prune24_backward(dy2, y2)),
        "backward, dense": (2 * full + part, lambda: relu2_prune24_backward(dy2, y2, form="dense")),
        "backward, both": (2 * full + 2 * part, lambda: relu2_prune24_backward(dy2, y2, form="both")),
        "tile prune, both": (full + 2 * part, lambda: tile_prune24(y2.dense)),
        "tile prune, x^T": (full + part, lambda: tile_prune24(y2.dense, along_columns=False)),
        "unpack24": (full + part, lambda: unpack24(y2.with_dense(None))),
        "torch: compress y2": (full + part, lambda: compress_by_library(y2.dense)),
        "torch: relu2 eager": (2 * full, lambda: torch.relu(y1).square_()),
        "soft W": (w.nbytes + w_part, lambda: soft_threshold_prune24(w)),
        "soft W^T": (w.nbytes + w_part, lambda: soft_threshold_prune24(w, True)),
        "soft W, W^T": (w.nbytes + 2 * w_part, lambda: soft_threshold_prune24_both(w)),
        "soft W, W^T from float32": (wide.nbytes + 2 * w_part, lambda: soft_threshold_prune24_both(wide)),
    }
    timings = timing.compare_graphs({name: fn for name, (_, fn) in functions.items()}, repeats)
    copy_rate = 2 * full / min(timings["copy"]["ms"], timings["copy by a kernel"]["ms"])
    rows = []
    for name, (size, _) in functions.items():
        rate = size / timings[name]["ms"]
        shape = (d_model, d_ff) if name.startswith("soft") else (tokens, d_ff)
        rows.append(
            {"name": name, "rows": shape[0], "cols": shape[1], **timings[name], "bytes": size}
            | {"tb_per_s": rate / 1e9, "share_of_copy": rate / copy_rate}
        )
    return rows


def ffn_rows(tokens: int, d_model: int, d_ff: int, repeats: int) -> list[Row]:
    """The FFN's products 1, 2, 3, 5 and 4 with a 2:4 operand, each against cuBLAS in the same orientation.

    Product 4, dW2 = y2^T dy3, is summed over tokens: its y2 is pruned again, by tiles, to be 2:4 along them.
    """
    x, w1, w2 = randn(tokens, d_model), randn(d_model, d_ff), randn(d_ff, d_model)
    y1 = randn(tokens, d_ff)
    y2 = relu2_prune24(y1, dense=True)
    converted = {
        "S(W1)": lambda: soft_threshold_prune24(w1, True),
        "S(W2^T)": lambda: soft_threshold_prune24(w2),
        "y2": lambda: relu2_prune24(y1),
        "dy1": lambda: relu2_prune24_backward(y1, y2),
        "y2^T": lambda: tile_prune24(y2.dense, along_columns=False),
    }
    s1, s2, y2_t = converted["S(W1)"](), converted["S(W2^T)"](), converted["y2^T"]()[1]
    products = {  # the sparse operand, the other, is the result transposed, by cuBLAS, what is converted
        "y1 = x S(W1)": (s1, x.t(), True, lambda: x @ w1, "S(W1)"),
        "y3 = y2 W2": (y2, w2, False, lambda: y1 @ w2, "y2"),
        "dy2 = dy3 S(W2^T)": (s2, x.t(), True, lambda: x @ w2.t(), "S(W2^T)"),
        "dx = dy1 W1^T": (y2, w1.t(), False, lambda: y1 @ w1.t(), "dy1"),
        "dW2 = y2^T dy3": (y2_t, x, False, lambda: y1.t() @ x, "y2^T"),
    }
    return [
        product_row(name, *operands, {"dense": dense, "convert": converted[operand]}, repeats)
        for name, (*operands, dense, operand) in products.items()
    ]


def figure6_row(m: int, n: int, k: int, repeats: int) -> Row:
    """A 2:4 [m, k] times a dense [k, n], and its conversion: fused, and by torch in eager mode."""
    a, b = randn(m, k), randn(k, n)
    others = {
        "dense": lambda: a @ b,
        "convert": lambda: soft_threshold_prune24(a, method="hard"),
        "eager": lambda: compress_by_library(prune24(a)),
    }
    name = "figure 6" if (m, n, k) == FIGURE6 else "sweep"
    return product_row(name, others["convert"](), b, False, others, repeats)


def product_row(
    name: str, sparse: Compressed24, right: Tensor, transpose: bool, others: timing.Calls, repeats: int
) -> Row:
    """A 2:4 product against `others`: the "dense" one, "convert" and maybe "eager" of its operand."""
    n = right.shape[1]
    shape = plan24.Shape(len(sparse.buffer), n, sparse.cols, DTYPE, right.is_contiguous(), transpose)
    plan = plan24.plan_for(shape, right.device)
    bare = sparse.with_dense(None)
    calls = {"sparse": lambda: matmul24(bare, right, transpose=transpose, backend="cusparselt"), **others}
    ms = {key: times["ms"] for key, times in timing.compare_graphs(calls, repeats).items()}
    flops = 2 * sparse.rows * n * sparse.cols
    row = {"name": name, "m": sparse.rows, "n": n, "k": sparse.cols, "transpose": transpose}
    row |= {f"{key}_ms": value for key, value in ms.items()} | {"default_ms": plan.default_ms}
    row |= {f"{key}_tflops": flops / ms[key] / 1e9 for key in ("dense", "sparse")}
    row["speedup"] = ms["dense"] / ms["sparse"]
    row["speedup_with_conversion"] = ms["dense"] / (ms["sparse"] + ms["convert"])
    return row | {"algorithm": plan.algorithm, "tried": plan.tried, "wrong": plan.wrong}


def table(record: records.Record) -> str:
    """The rows as text: passes over memory, then products."""
    passes, products = (pd.DataFrame(record.results[part]) for part in ("memory", "products"))
    measured = ("dense_ms", "sparse_ms", "convert_ms", "speedup", "speedup_with_conversion")
    shown = (
        passes[["name", "rows", "cols", "ms", "tb_per_s", "share_of_copy"]],
        products[["name", "m", "n", "k", *measured]],
    )
    return "\n\n".join(frame.to_string(index=False, float_format="{:.4f}".format) for frame in shown)


def _assert_equal(name: str, ours: Tensor, reference: Tensor) -> None:
    differing = (ours != reference).sum().item()
    assert differing == 0, f"{name}: {differing} of {ours.numel()} elements differ from the reference"


def _assert_close(name: str, ours: Tensor, reference: Tensor) -> None:
    error = timing.relative_error(ours, reference)
    assert error <= plan24.TOLERANCE[DTYPE], f"{name}: relative error {error:.2e}"
