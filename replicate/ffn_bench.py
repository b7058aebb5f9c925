"""Benchmark of one FFN layer, forward and backward, sparse against dense, all in one process.

A step is a training step's, in bf16 with float32 weights: outputs, gradients of x, W1 and W2, routing and
permutation, and once a step the weights cast or compressed. The dense side is the same layer in its dense
phase, compiled by torch.compile, and eager (cuBLAS and torch's element-wise kernels). Correctness comes
first: no figure is printed before every sparse layer agreed with the reference on the inputs that are timed.
`python -m replicate bench ffn` keeps the record `bench-ffn`; without a GPU it shows the recorded one.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from replicate import records
from replicate.ffn_cases import DENSE, Problem, engines, load, verify
from replicate.kernels import timing
from replicate.presets import SPARSITY_PRESETS

KIND = "bench-ffn"
SHAPES = ((16384, 4096, 16384), (16384, 2048, 8192))  # tokens, d_model, d_ff: the 7B and the 1B model
PAPERS = (
    *("venom16", "venom32", "venom64", "recipe", "recipe32", "recipe64"),
    *("act24", "act24+tile", "all24"),
)
ACTIVE = ("active16", "active64", "active16x32", "active64x32")  # clusters by a token's own activations
SPARSITIES = (*PAPERS, *ACTIVE)
EAGER = "dense, eager"
PROFILED = ("recipe", "act24")
# Stages of a step and the kernels that belong to them, first match first; what matches none is element-wise.
STAGES = {
    "weight refresh": r"soft_threshold_prune24",
    "routing and lists": r"route_topk|_energy_kernel|_top_k_kernel|_(count|scan|place)_kernel|gather_sum",
    "Venom products": r"venom_(up|down|wgrad|gather)",
    "2:4 products": r"[a-z_]sparse|sptensor|spmma|cslt|Sparse(Gemm|Mma)",
    "dense products": r"gemm|nvjet|cutlass|cublas|aten::(add|b)?mm$",
    "element-wise": r"",
}
SECONDS = 0.2  # of back-to-back steps, twice an arm
Row = dict[str, Any]


def config(
    shapes: Sequence[Sequence[int]] = SHAPES,
    sparsity: Sequence[str] = SPARSITIES,
    *,
    repeats: int = 15,
    seed: int = 0,
) -> Row:
    """What identifies a run: shapes (tokens, d_model, d_ff), sparsity presets, repeats and seed.

    Raises ValueError for an unknown or dense preset, a shape that a preset cannot carry, or no repeats.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; choose 1 or more")
    for name in sparsity:
        if name not in SPARSITY_PRESETS or not SPARSITY_PRESETS[name].any:
            known = ", ".join(known for known, c in SPARSITY_PRESETS.items() if c.any)
            raise ValueError(f"sparsity {name!r} is none of the sparse presets {known}")
    for shape in shapes:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape {tuple(shape)} is not tokens, d_model, d_ff, like 16384,4096,16384")
        for name in sparsity:
            SPARSITY_PRESETS[name].check_shape(*shape[1:])
    shapes = [list(shape) for shape in shapes]
    return {
        "shapes": shapes,
        "sparsity": list(sparsity),
        "dtype": "bfloat16",
        "seed": seed,
        "repeats": repeats,
    }


def run(c: Row, device: str = "cuda") -> records.Record:
    """Check all shapes, then measure them, then profile them.

    On a CPU nothing is compiled, and there are no graphs and no peak memory.

    Returns:
        a record whose results are {"shapes": [see `check_shape`, `measure_shape` and `profile_shape`]}.

    Raises:
        AssertionError: a sparse result is wrong.
        ValueError: on a GPU, a preset that has no kernels.
    """
    start, results = time.perf_counter(), []
    for stage in (check_shape, measure_shape, profile_shape):
        for i, shape in enumerate(c["shapes"]):
            part = stage(c, Problem(shape, c["seed"], device))
            if stage is check_shape:
                results.append({"shape": shape})
            results[i] |= part
            if device != "cpu":
                torch.cuda.empty_cache()
    return records.make_record(KIND, c, {"shapes": results}, seconds=time.perf_counter() - start)


def check_shape(c: Row, p: Problem) -> Row:
    """ "engines" and "errors" by preset."""
    return {"engines": engines(p, c["sparsity"]), "errors": verify(p, c["sparsity"])}


def measure_shape(c: Row, p: Problem) -> Row:
    """By arm: milliseconds ("graph", "launches", "sustained"), "peak_bytes", and "load" of routed ones."""
    layers = {name: p.layer(name) for name in (DENSE, *c["sparsity"])}
    forwards: dict[str, Callable] = {**layers, EAGER: layers[DENSE]}
    gpu = p.device != "cpu"
    if gpu:
        forwards[DENSE] = torch.compile(layers[DENSE], dynamic=False)
    calls = {name: partial(p.step, forward) for name, forward in forwards.items()}
    out: Row = {"load": {n: load(p, ffn) for n, ffn in layers.items() if ffn.config.activation == "venom"}}
    if gpu:
        # The layer's cast or compressed weights count too.
        forget = {n: partial(setattr, layers.get(n, layers[DENSE]), "operands", None) for n in calls}
        out["peak_bytes"] = {n: timing.peak_bytes(call, forget[n]) for n, call in calls.items()}
    out["launches"] = timing.spreads(calls, p.device, c["repeats"])
    if gpu:
        graphs = {name: timing.graphed(call) for name, call in calls.items()}
        out["graph"] = timing.spreads(graphs, p.device, c["repeats"])
        out["sustained"] = {name: timing.sustained_ms(graph, SECONDS) for name, graph in graphs.items()}
    return out


def profile_shape(c: Row, p: Problem) -> Row:
    """Milliseconds of every kernel: "kernels" of a step, "unchanged" of one that keeps its cast weights."""
    sparse = [name for name in PROFILED if name in c["sparsity"]]
    layers = {name: p.layer(name) for name in (DENSE, *sparse)}
    forwards: dict[str, Callable] = {**layers, EAGER: layers[DENSE]}
    if p.device != "cpu":
        forwards[DENSE] = torch.compile(layers[DENSE], dynamic=False)
    measured = partial(timing.kernel_ms, device=p.device)
    return {
        "kernels": {name: measured(partial(p.step, forward)) for name, forward in forwards.items()},
        "unchanged": {name: measured(partial(p.gradients, layers[name])) for name in sparse},
    }


def stages(shape: Row, name: str) -> dict[str, float]:
    """Milliseconds of each stage of a profiled arm's step, from the times of its kernels.

    Kernels are sorted by name. The element-wise kernels that only a step with changed weights runs (casts,
    expert means) count as "weight refresh"; a dense step casts its weights among its element-wise kernels.
    """
    unchanged = shape["unchanged"].get(name)
    found = dict.fromkeys(STAGES, 0.0)
    for kernel, ms in shape["kernels"][name].items():
        stage = next(stage for stage, pattern in STAGES.items() if re.search(pattern, kernel))
        if unchanged is not None and stage == "element-wise":
            excess = max(0.0, ms - unchanged.get(kernel, 0.0))
            found["weight refresh"] += excess
            ms -= excess
        found[stage] += ms
    return found


def rows(record: records.Record) -> list[Row]:
    """One row a shape and arm: milliseconds with spread, times as fast as dense, memory, largest error."""
    table = []
    for s in record.results["shapes"]:
        times, launches = s.get("graph", s["launches"]), s["launches"]
        for name, ms in times.items():
            row = {"shape": tuple(s["shape"]), "arm": name, **ms, "x": times[DENSE]["ms"] / ms["ms"]}
            row["x launches"] = launches[DENSE]["ms"] / launches[name]["ms"]
            row["x eager"] = times[EAGER]["ms"] / ms["ms"]
            if "sustained" in s:
                row["x sustained"] = s["sustained"][DENSE] / s["sustained"][name]
                row["peak GiB"] = s["peak_bytes"][name] / 2**30
                row["of dense"] = s["peak_bytes"][name] / s["peak_bytes"][DENSE]
            if name in s["errors"]:
                row["error"] = max(s["errors"][name]["error"].values())
            table.append(row)
    return table


def table(record: records.Record) -> str:
    """Times, speed-ups, memory and stages as plain text."""
    names = ("x", "x sustained", "x launches", "x eager", "peak GiB", "of dense", "error")
    lines = [
        f"{record.device}, torch {record.versions.get('torch')}, {record.date}, commit {record.commit}",
        "One FFN, forward and backward, bf16. x: times as fast as the compiled dense FFN, CUDA graphs, cold "
        "cache; sustained: back to back; launches: no graphs; x eager: over the dense FFN not compiled.",
    ]
    for s in record.results["shapes"]:
        lines += ["", "tokens {}, d_model {}, d_ff {}".format(*s["shape"])]
        lines.append(f"{'':14}{'ms':>9}{'p10-p90':>15}" + "".join(f"{name:>13}" for name in names))
        for row in (row for row in rows(record) if row["shape"] == tuple(s["shape"])):
            spread = f"{row['ms_p10']:.2f}-{row['ms_p90']:.2f}"
            shown = (f"{row[n]:13.3g}" if n in row else " " * 13 for n in names)
            lines.append(f"{row['arm']:14}{row['ms']:9.3f}{spread:>15}{''.join(shown)}".rstrip())
        for name in s["kernels"]:
            parts = ", ".join(f"{stage} {ms:.2f}" for stage, ms in stages(s, name).items() if ms)
            lines.append(f"{name}, ms by kernel: {parts}")
        if s["load"]:
            lines.append(f"busiest cluster over the mean: at most {max(s['load'].values()):.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and record on a GPU; elsewhere show what was recorded."""
    parser = argparse.ArgumentParser(prog="replicate bench ffn", description=main.__doc__)
    parser.add_argument("--shapes", nargs="+", metavar="T,D,F", help="tokens, d_model, d_ff (7B and 1B)")
    parser.add_argument("--sparsity", nargs="+", default=SPARSITIES, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder of the record (default: data/recorded)")
    args = parser.parse_args(argv)
    shapes = [_shape(text) for text in args.shapes or ()] or SHAPES
    c = config(shapes, args.sparsity, repeats=args.repeats)
    store = records.RecordStore(recorded=args.out) if args.out else records.RecordStore()
    if not torch.cuda.is_available():
        print(shown(store, KIND, table))
        return 0
    record = run(c)
    path = store.put(record, recorded=True)
    print(f"{table(record)}\nrecord: {path}")
    return 0


def shown(store: records.RecordStore, kind: str, table: Callable[[records.Record], str]) -> str:
    """Every record of a kind as text, for machines without a GPU."""
    found = store.all(kind)
    head = f"no GPU here: showing {len(found)} recorded" if found else "no GPU here and nothing recorded"
    return "\n\n".join([head, *(table(record) for record, _ in found)])


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError:
        raise ValueError(f"shape {text!r} is not tokens,d_model,d_ff, like 16384,4096,16384") from None


if __name__ == "__main__":
    from replicate.console import ended

    raise SystemExit(ended(main))
