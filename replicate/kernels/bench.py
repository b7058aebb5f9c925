"""Benchmark of the 2:4 kernels against copy bandwidth, torch's compressor and cuBLAS, in one run (figure 6).

Correctness comes first: no figure is printed before every kernel agreed with its reference on this device.
Times are medians of CUDA graph replays on random bfloat16 operands with a cold L2 cache, and candidates
take turns, so that ratios are within one run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replicate import measure, records
from replicate.kernels import backend as engines
from replicate.kernels import plan24
from replicate.kernels.compressed24 import Compressed24, compress_by_library, layout, unpack24
from replicate.kernels.matmul24 import matmul24
from replicate.kernels.relu2_prune24 import relu2_prune24, relu2_prune24_reference
from replicate.kernels.relu2_prune24_backward import (
    relu2_prune24_backward,
    relu2_prune24_backward_reference,
)
from replicate.kernels.soft_threshold_prune24 import (
    soft_threshold_prune24,
    soft_threshold_prune24_both,
    soft_threshold_prune24_reference,
)
from replicate.kernels.tile_prune24 import tile_prune24, tile_prune24_reference
from replicate.kernels.timing import DTYPE, graph_spreads, randn
from replicate.kernels.tune_tiles import tune_tiles
from replicate.sparsity import prune24

KIND = "bench-kernels"
SHAPES = ((16384, 4096, 16384), (16384, 2048, 8192))  # tokens, d_model, d_ff: the 7B and 1B models
FIGURE6 = (4096, 16384, 4096)  # m, n, k
SWEEP = ((1024, 16384, 1024), (2048, 16384, 2048), (4096, 4096, 4096), (8192, 16384, 8192))
Row = dict[str, Any]


def run(shapes: Sequence[tuple[int, int, int]] = SHAPES, *, repeats: int = 20, seed: int = 0) -> Row:
    """Check, then measure, on this machine's GPU.

    Args:
        shapes: (tokens, d_model, d_ff), each a multiple of 64.
        repeats: timed replays of each candidate.
        seed: of the operands.

    Returns:
        {"layout", "backend", "memory": rows, "products": rows}, of JSON types.

    Raises:
        ValueError: there is no NVIDIA GPU with Triton and cuSPARSELt.
        AssertionError: a kernel disagrees with its reference.
    """
    if engines.select("cuda" if torch.cuda.is_available() else "cpu", "auto") != "cusparselt":
        raise ValueError(f"nothing to measure: {engines.report()}; kernels are measured on an NVIDIA GPU")
    torch.manual_seed(seed)
    for tokens, d_model, d_ff in shapes:
        verify(min(tokens, 2048), d_model, d_ff)
    result: Row = {"layout": layout("cuda", DTYPE), "backend": engines.report()}
    result |= {"cusparselt": engines.cusparselt_version(), "memory": [], "products": []}
    for shape in shapes:
        result["memory"] += memory_rows(*shape, repeats)
        result["products"] += ffn_rows(*shape, repeats)
    result["products"] += [figure6_row(*shape, repeats) for shape in (FIGURE6, *SWEEP)]
    return result


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
            _assert_equal(
                f"soft_threshold_prune24, dim {dim}", unpack24(compressed), dense if dim else dense.t()
            )
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
    w, master = randn(d_model, d_ff), randn(d_model, d_ff).float()
    full, part = y1.nbytes, y2.buffer.nbytes
    w_part = w.nbytes * 9 // 16
    target = torch.empty_like(y1)
    functions: dict[str, tuple[int, Callable[[], object]]] = {
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
        "soft W, W^T from float32": (
            master.nbytes + 2 * w_part,
            lambda: soft_threshold_prune24_both(master),
        ),
    }
    timings = graph_spreads({name: fn for name, (_, fn) in functions.items()}, repeats)
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
    s1, s2 = soft_threshold_prune24(w1, True), soft_threshold_prune24(w2)
    _, y2_t = tile_prune24(y2.dense, along_columns=False)
    products = {
        "y1 = x S(W1)": (s1, x.t(), True, lambda: x @ w1, lambda: soft_threshold_prune24(w1, True)),
        "y3 = y2 W2": (y2, w2, False, lambda: y1 @ w2, lambda: relu2_prune24(y1)),
        "dy2 = dy3 S(W2^T)": (s2, x.t(), True, lambda: x @ w2.t(), lambda: soft_threshold_prune24(w2)),
        "dx = dy1 W1^T": (y2, w1.t(), False, lambda: y1 @ w1.t(), lambda: relu2_prune24_backward(y1, y2)),
        "dW2 = y2^T dy3": (
            y2_t,
            x,
            False,
            lambda: y1.t() @ x,
            lambda: tile_prune24(y2.dense, along_columns=False),
        ),
    }
    return [
        _product_row(name, sparse, right, transpose, dense, fused, None, repeats)
        for name, (sparse, right, transpose, dense, fused) in products.items()
    ]


def figure6_row(m: int, n: int, k: int, repeats: int) -> Row:
    """A 2:4 [m, k] times a dense [k, n], and its conversion: fused, and by torch in eager mode."""
    a, b = randn(m, k), randn(k, n)
    sparse = soft_threshold_prune24(a, method="hard")
    return _product_row(
        "figure 6" if (m, n, k) == FIGURE6 else "sweep",
        sparse,
        b,
        False,
        lambda: a @ b,
        lambda: soft_threshold_prune24(a, method="hard"),
        lambda: compress_by_library(prune24(a)),
        repeats,
    )


def _product_row(
    name: str,
    sparse: Compressed24,
    right: Tensor,
    transpose: bool,
    dense: Callable[[], object],
    fused: Callable[[], object],
    eager: Callable[[], object] | None,
    repeats: int,
) -> Row:
    shape = plan24.Shape(
        len(sparse.buffer), right.shape[1], sparse.cols, DTYPE, right.is_contiguous(), transpose
    )
    plan = plan24.plan_for(shape, right.device)
    functions = {
        "dense": dense,
        "sparse": lambda: matmul24(sparse.with_dense(None), right, transpose=transpose, backend="cusparselt"),
        "convert": fused,
    }
    timings = graph_spreads(functions | ({"eager": eager} if eager else {}), repeats)
    ms = {key: timing["ms"] for key, timing in timings.items()}
    flops = 2 * sparse.rows * right.shape[1] * sparse.cols
    row = {"name": name, "m": sparse.rows, "n": right.shape[1], "k": sparse.cols, "transpose": transpose}
    row |= {f"{key}_ms": value for key, value in ms.items()} | {"default_ms": plan.default_ms}
    row |= {"dense_tflops": flops / ms["dense"] / 1e9, "sparse_tflops": flops / ms["sparse"] / 1e9}
    row |= {
        "speedup": ms["dense"] / ms["sparse"],
        "speedup_with_conversion": ms["dense"] / (ms["sparse"] + ms["convert"]),
    }
    return row | {"algorithm": plan.algorithm, "tried": plan.tried, "wrong": plan.wrong}


def table(result: Row) -> str:
    """The rows as text: passes over memory, then products."""
    lines = [f"{'pass over memory':28}{'shape':>16}{'ms':>9}{'TB/s':>7}{'of copy':>9}"]
    for r in result["memory"]:
        shape = f"{r['rows']} x {r['cols']}"
        lines.append(f"{r['name']:28}{shape:>16}{r['ms']:9.4f}{r['tb_per_s']:7.2f}{r['share_of_copy']:9.1%}")
    lines.append(f"{'product':20}{'m, n, k':>22}{'cuBLAS':>9}{'2:4':>9}{'convert':>9}{'x':>7}{'x with':>8}")
    for r in result["products"]:
        shape = f"{r['m']}, {r['n']}, {r['k']}"
        lines.append(
            f"{r['name']:20}{shape:>22}{r['dense_ms']:9.4f}{r['sparse_ms']:9.4f}{r['convert_ms']:9.4f}"
            f"{r['speedup']:7.2f}{r['speedup_with_conversion']:8.2f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and record on a GPU; elsewhere show what was recorded."""
    parser = argparse.ArgumentParser(prog="replicate bench kernels", description=main.__doc__)
    parser.add_argument(
        "--shapes", nargs="+", metavar="T,D,F", help="tokens, d_model, d_ff (default: 7B and 1B)"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--tune", action="store_true", help="time tiles and warps of the element-wise kernels"
    )
    parser.add_argument("--out", type=Path, help="folder for the record (default: runs/records)")
    args = parser.parse_args(argv)
    shapes = [_shape(text) for text in args.shapes or ()] or SHAPES
    store = records.RecordStore(root=args.out)
    if not torch.cuda.is_available():
        found = store.all(KIND)
        print(f"{engines.report()}: showing {len(found)} recorded results")
        for record, origin in found:
            print(f"\n{record.device}, {record.date}, commit {record.commit} ({origin})")
            print(table(record.results))
        return 0
    start = time.perf_counter()
    if args.tune:
        print("\n".join(f"{row['ms']:9.4f} {row['name']}" for row in tune_tiles(repeats=args.repeats)))
    result = run(shapes, repeats=args.repeats)
    config = {"what": "2:4 kernels", "shapes": [list(s) for s in shapes], "dtype": str(DTYPE), "seed": 0}
    config |= {"device": measure.device_name(), "repeats": args.repeats}
    record = records.make_record(KIND, config, result, seconds=time.perf_counter() - start)
    print(table(result), f"\nrecord: {store.put(record)}")
    return 0


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(n) if n.strip().isdecimal() else 0 for n in text.split(","))
    if len(shape) != 3 or not all(n and n % 64 == 0 for n in shape):
        raise ValueError(
            f"shape {text!r} is not tokens,d_model,d_ff in multiples of 64, like 16384,4096,16384"
        )
    return shape


def _assert_equal(name: str, ours: Tensor, reference: Tensor) -> None:
    differing = (ours != reference).sum().item()
    assert differing == 0, f"{name}: {differing} of {ours.numel()} elements differ from the reference"


def _assert_close(name: str, ours: Tensor, reference: Tensor) -> None:
    norm = torch.linalg.vector_norm
    error = (norm(ours.float() - reference.float()) / norm(reference.float())).item()
    assert error <= plan24.TOLERANCE[DTYPE], f"{name}: relative error {error:.2e}"


if __name__ == "__main__":
    from replicate.console import ended

    raise SystemExit(ended(main))
