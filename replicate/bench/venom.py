"""Times of the routed FFN of figure 4d and its products, beside cuBLAS and a compiled dense FFN (figure 7).

Both sides run in one process on the same random bf16 inputs and take turns, as CUDA graphs, so that no
launch gap is timed; every sparse result is checked against its reference before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch

from replicate.bench import timing
from replicate.bench.venom_cases import (
    CLUSTERS,
    PRODUCTS,
    GroupedMixture,
    RoutedFFN,
    check_step,
    dense_ffn,
    dense_products,
    gather_products,
    sparse_products,
)
from replicate.study import records

KIND = "bench-venom"
SHAPES = ((4096, 16384), (2048, 8192))  # d_model, d_ff of the 7B and the 1B model
TOP_KS = (4, 2, 1)  # of 16 clusters: 4 of M = 16, 32, 64 columns


def config(
    tokens: int = 16384,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    top_ks: Sequence[int] = TOP_KS,
    repeats: int = 15,
) -> dict[str, Any]:
    """What identifies a run of this benchmark; shapes are (d_model, d_ff)."""
    c = {"tokens": tokens, "shapes": [list(shape) for shape in shapes], "top_ks": list(top_ks)}
    return c | {"clusters": CLUSTERS, "dtype": "bfloat16", "seed": 0, "repeats": repeats}


def run(c: dict[str, Any]) -> records.Record:
    """Measure everything the configuration names. Raises ValueError without a GPU."""
    if not torch.cuda.is_available():
        raise ValueError("nothing to measure: these kernels are timed on an NVIDIA GPU")
    start, results = time.perf_counter(), []
    for d_model, d_ff in c["shapes"]:
        results.append(measure_shape(c, d_model, d_ff))
        timing.release()
    return records.make_record(KIND, c, {"shapes": results}, seconds=time.perf_counter() - start)


def measure_shape(c: dict[str, Any], d_model: int, d_ff: int) -> dict[str, Any]:
    """All times of one FFN shape, in milliseconds, by top-k ("dense" for the dense side)."""
    p, repeats = RoutedFFN(c["tokens"], d_model, d_ff, c["seed"]), c["repeats"]
    out: dict[str, Any] = {"d_model": d_model, "d_ff": d_ff}
    out["errors"] = {str(k): check_step(p, k) for k in c["top_ks"]}
    dense, peer = torch.compile(dense_ffn), GroupedMixture(p)
    steps: timing.Calls = {"dense": lambda: p.gradients(dense(*p.leaves))}
    steps |= {str(k): partial(p.sparse_step, k) for k in c["top_ks"]}
    out["peak_bytes"] = {name: timing.peak_bytes(step) for name, step in steps.items()}
    out["load"] = {str(k): p.lists(k).counts.tolist() for k in c["top_ks"]}
    steps |= {f"grouped {k}": partial(peer.step, k) for k in c["top_ks"]}
    graphs = timing.graphed_all(steps)
    out["ffn"] = _medians(timing.compare(graphs, "cuda", repeats))
    out["ffn_sustained"] = {name: timing.sustained_ms(graph) for name, graph in graphs.items()}
    out["ffn_eager"] = {name: timing.sustained_ms(step) for name, step in steps.items()}
    calls = {"dense": dense_products(p)}
    for k in c["top_ks"]:
        calls |= {str(k): sparse_products(p, k), f"grouped {k}": peer.products(k)}
    flat = {(who, name): fn for who, own in calls.items() for name, fn in own.items()}
    times = _medians(timing.compare_graphs(flat, repeats))
    out["products"] = {who: {name: times[who, name] for name in own} for who, own in calls.items()}
    out["gather"] = {
        str(v): _medians(timing.compare_graphs(gather_products(p, v), repeats)) for v in (64, 128)
    }
    return out


def _medians(found: dict[Any, timing.Spread]) -> dict[Any, float]:
    return {name: times["ms"] for name, times in found.items()}


def speedups(shape: dict[str, Any]) -> pd.DataFrame:
    """One row a top-k or peer: times as fast as dense, of the products together, each, and the FFN."""
    times = pd.DataFrame(shape["products"]).loc[list(PRODUCTS)]
    frame = pd.DataFrame({"products": times.sum(), **times.T})
    for name in ("ffn", "ffn_sustained", "ffn_eager"):
        frame[name] = pd.Series(shape[name])
    return (frame.loc["dense"] / frame).drop(index="dense")


def table(record: records.Record) -> str:
    """The ratios and the times as plain text."""
    c = record.config
    lines = [f"{c['tokens']} tokens, top-k of {c['clusters']} clusters, {c['dtype']}"]
    for s in record.results["shapes"]:
        tables = {
            "times as fast as dense": speedups(s),
            "ms of the FFN": pd.DataFrame(s["ffn"], ["ms"]),
            "peak GiB": pd.DataFrame(s["peak_bytes"], ["GiB"]) / 2**30,
            "ms of the products and passes": pd.DataFrame(s["products"]),
            "ms of products that gather rows, by V": pd.DataFrame(s["gather"]),
        }
        for name, frame in tables.items():
            text = frame.to_string(float_format="{:.3f}".format, na_rep="")
            lines.append(f"\nd_model {s['d_model']}, d_ff {s['d_ff']}: {name}\n{text}")
    return "\n".join(lines)
