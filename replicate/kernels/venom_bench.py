"""Timings of the routed FFN of figure 4d and its products, beside cuBLAS and a compiled dense FFN (figure 7).

Both sides run in one process on the same random bf16 inputs and take turns, as CUDA graphs, so that no
launch gap is timed; every sparse result is checked against its reference before anything is timed.
`python -m replicate.kernels.venom_bench` measures, prints a table and keeps the record `bench-venom`;
without a GPU it shows the recorded one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from replicate import records
from replicate.kernels.timing import graphed, medians, peak_bytes, sustained_ms
from replicate.kernels.venom_cases import (
    CLUSTERS,
    PRODUCTS,
    GroupedMixture,
    Problem,
    check_step,
    dense_ffn,
    dense_products,
    gather_products,
    sparse_products,
)

KIND = "bench-venom"
SHAPES = ((4096, 16384), (2048, 8192))  # d_model, d_ff of the 7B and the 1B model
TOP_KS = (4, 2, 1)  # of 16 clusters: 4 of M = 16, 32, 64 columns


def config(
    tokens: int = 16384,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    top_ks: Sequence[int] = TOP_KS,
    seed: int = 0,
    repeats: int = 15,
) -> dict[str, Any]:
    """What identifies a run of this benchmark."""
    return {
        "tokens": tokens,
        "shapes": [list(shape) for shape in shapes],
        "top_ks": list(top_ks),
        "clusters": CLUSTERS,
        "dtype": "bfloat16",
        "seed": seed,
        "repeats": repeats,
    }


def measure_shape(c: dict[str, Any], d_model: int, d_ff: int) -> dict[str, Any]:
    """All timings of one FFN shape, in milliseconds, by top-k ("dense" for the dense side)."""
    p, repeats = Problem(c["tokens"], d_model, d_ff, c["seed"]), c["repeats"]
    out: dict[str, Any] = {"d_model": d_model, "d_ff": d_ff}
    out["errors"] = {str(k): check_step(p, k) for k in c["top_ks"]}
    dense = torch.compile(dense_ffn)
    peer = GroupedMixture(p) if hasattr(torch, "_grouped_mm") else None
    steps: dict[Any, Callable[[], Any]] = {"dense": lambda: p.gradients(dense(*p.leaves))}
    steps |= {str(k): lambda k=k: p.sparse_step(k) for k in c["top_ks"]}
    peers = {f"grouped {k}": lambda k=k: peer.step(k) for k in c["top_ks"] if peer}
    out["peak_bytes"] = {name: peak_bytes(step) for name, step in steps.items()}
    out["load"] = {str(k): p.lists(k).counts.tolist() for k in c["top_ks"]}
    out["ffn"] = medians(steps | peers, repeats)
    out["ffn_sustained"] = {n: sustained_ms(graphed(step)) for n, step in (steps | peers).items()}
    out["ffn_eager"] = {n: sustained_ms(step) for n, step in (steps | peers).items()}
    calls = {("dense", n): fn for n, fn in dense_products(p).items()}
    for k in c["top_ks"]:
        calls |= {(str(k), n): fn for n, fn in sparse_products(p, k).items()}
        calls |= {(f"grouped {k}", n): fn for n, fn in (peer.products(k) if peer else {}).items()}
    times = medians(calls, repeats)
    out["products"] = {who: {n: t for (w, n), t in times.items() if w == who} for who, _ in times}
    out["gather"] = {str(v): medians(gather_products(p, v), repeats) for v in (64, 128)}
    return out


def run(c: dict[str, Any]) -> records.Record:
    """Measure everything the configuration names. Raises RuntimeError without a GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU here; `--show` prints what was measured on one")
    start = time.perf_counter()
    results = []
    for d_model, d_ff in c["shapes"]:
        results.append(measure_shape(c, d_model, d_ff))
        torch.cuda.empty_cache()
    return records.make_record(KIND, c, {"shapes": results}, seconds=time.perf_counter() - start)


def rows(record: records.Record) -> list[dict[str, Any]]:
    """One row a shape and top-k: ratios against dense (above 1 is faster), milliseconds and GiB."""
    table = []
    for s in record.results["shapes"]:
        total = sum(s["products"]["dense"][n] for n in PRODUCTS)
        for k in map(str, record.config["top_ks"]):
            own = s["products"][k]
            row = {
                "d_model": s["d_model"],
                "d_ff": s["d_ff"],
                "format": f"4 of {4 * record.config['clusters'] // int(k)}",
                "products": total / sum(own[n] for n in PRODUCTS),
                "each": {n: s["products"]["dense"][n] / own[n] for n in PRODUCTS},
                "ffn_ms": s["ffn"][k],
                "peak_gib": s["peak_bytes"][k] / 2**30,
                "dense_gib": s["peak_bytes"]["dense"] / 2**30,
            }
            for name in ("ffn", "ffn_sustained", "ffn_eager"):
                row[name] = s[name]["dense"] / s[name][k]
                if f"grouped {k}" in s[name]:
                    row[f"grouped_{name}"] = s[name]["dense"] / s[name][f"grouped {k}"]
            if f"grouped {k}" in s["products"]:
                row["grouped_products"] = total / sum(s["products"][f"grouped {k}"].values())
            table.append(row)
    return table


def table(record: records.Record) -> str:
    """The ratios and the times as plain text."""
    c, lines = record.config, [f"{record.device}, torch {record.versions.get('torch')}, {record.date}"]
    lines.append(f"T = {c['tokens']}, {c['clusters']} clusters, {c['dtype']}; ratios over dense")
    for r in rows(record):
        each = " ".join(f"{n[0]}: {ratio:.2f}" for n, ratio in r["each"].items())
        peer = " ".join(f"{r.get('grouped_' + n, float('nan')):.2f}x" for n in ("products", "ffn"))
        lines.append(
            f"D {r['d_model']} F {r['d_ff']} {r['format']}: products {r['products']:.2f}x ({each}), FFN "
            f"{r['ffn']:.2f}x ({r['ffn_ms']:.2f} ms), sustained {r['ffn_sustained']:.2f}x, without graphs "
            f"{r['ffn_eager']:.2f}x; grouped mixture {peer}; "
            f"peak {r['peak_gib']:.2f} of {r['dense_gib']:.2f} GiB"
        )
    for s in record.results["shapes"]:
        for name, times in s["products"].items():
            shown = ", ".join(f"{n} {t:.3f}" for n, t in times.items())
            lines.append(f"  D {s['d_model']} {name}: {shown} ms")
        lines.append(
            f"  D {s['d_model']} FFN: " + ", ".join(f"{n} {t:.2f}" for n, t in s["ffn"].items()) + " ms"
        )
        for v, times in s["gather"].items():
            shown = ", ".join(f"{n} {times['dense'] / t:.2f}x" for n, t in times.items() if n != "dense")
            lines.append(f"  D {s['d_model']} rows gathered, V {v}: {shown}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure and record, or show the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="folder of the record (default: data/recorded)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--show", action="store_true", help="print the recorded table")
    args = parser.parse_args(argv)
    store = records.RecordStore(recorded=args.out) if args.out else records.RecordStore()
    if args.show or not torch.cuda.is_available():
        found = store.all(KIND)
        print(table(found[0][0]) if found else "no GPU here and nothing recorded")
        return 0
    record = run(config(repeats=args.repeats))
    path = store.put(record, recorded=True)
    print(table(record))
    print(path)
    return 0


if __name__ == "__main__":
    from replicate.console import ended

    raise SystemExit(ended(main))
