"""Tables and ratios from the recorded timings of kernels, for notebooks 06 and 07 and for docs/kernels.md."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from replicate.bench.ffn import PAPERS
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.study.records import CARD, Record, RecordStore
from replicate.training import flops

KERNELS, VENOM, LAYER, BACKENDS = "bench-kernels", "bench-venom", "bench-ffn", "bench-backends"
MODELS = {4096: "7B (4096, 16384)", 2048: "1B (2048, 8192)"}  # d_model -> name of the FFN shape
FORMATS = {"4": "4 of 16", "2": "4 of 32", "1": "4 of 64"}  # clusters kept of 16 -> columns kept of M
FIGURE7 = 7.0  # times as fast: the middle of the paper's 6 to 8
PARTS_TWICE = "sum of k parts"  # runs once forward and once backward


def recorded(kind: str, timed: Sequence[str] | None = None, device: str = CARD) -> Record:
    """The latest shipped record of a kind on a GPU that has timed these sparsity presets.

    By default the layer's must have every format of the paper. ValueError if there is none.
    """
    needed = timed or (PAPERS if kind == LAYER else ())
    return RecordStore().latest(kind, timed=needed, device=device)


def digits3(x: float) -> str:
    """A number with three digits, zeros at its end too: "0.500", "6.30", "18.0"."""
    return f"{x:#.3g}".rstrip(".")


def memory(record: Record) -> pd.DataFrame:
    """Passes over memory: ms, TB/s and the share of the copy bandwidth, one row a pass and shape."""
    frame = pd.DataFrame(record.results["memory"])
    frame["matrix"] = frame["rows"].astype(str) + " x " + frame["cols"].astype(str)
    names = {"name": "pass", "matrix": "matrix", "ms": "ms", "tb_per_s": "TB/s", "share_of_copy": "of copy"}
    return frame[list(names)].rename(columns=names)


def pass_ms(record: Record, name: str) -> float:
    """Milliseconds of one pass at the 7B shape."""
    return next(r["ms"] for r in record.results["memory"] if (r["name"], r["cols"]) == (name, 16384))


def bandwidth(record: Record) -> float:
    """TB/s of a copy by a kernel, the roof of what only moves memory."""
    return next(r["tb_per_s"] for r in record.results["memory"] if r["name"] == "copy by a kernel")


def products(record: Record) -> pd.DataFrame:
    """The 2:4 products: milliseconds of both engines and of the conversion, and the speed-ups."""
    frame = pd.DataFrame(record.results["products"])
    frame["with eager conversion"] = frame["dense_ms"] / (frame["sparse_ms"] + frame["eager_ms"])
    frame["default algorithm"] = frame["dense_ms"] / frame["default_ms"]
    return frame


def ffn_products(record: Record, d_model: int) -> pd.DataFrame:
    """The FFN's 2:4 products of one model shape, those in which d_model is an axis besides d_ff."""
    frame = products(record)
    own = frame[["m", "n", "k"]].eq(d_model).any(axis=1)
    return frame[own & ~frame["name"].isin(["figure 6", "sweep"])]


def sweep(record: Record) -> pd.DataFrame:
    """Figure 6's product and the other shapes of the sweep, smallest first."""
    frame = products(record).query("name in ['figure 6', 'sweep']").eval("work = 2.0 * m * n * k")
    return frame.sort_values("work", ignore_index=True)


def figure6(record: Record) -> pd.Series:
    """The row of figure 6's product."""
    return products(record).query("name == 'figure 6'").iloc[0]


def amortised(row: pd.Series, convert: str, times: Any) -> Any:
    """Speed-up over dense if one conversion (of "convert_ms" or "eager_ms") serves `times` products."""
    return times * row["dense_ms"] / (times * row["sparse_ms"] + row[convert])


def columns_to_repay(row: pd.Series, convert: str) -> float:
    """Columns n (tokens) after which the faster product has paid for one conversion.

    A product's time is taken to be proportional to n; the conversion of the [m, k] operand does not
    depend on n:  n = convert / ((dense - sparse) / n_measured).
    """
    return row[convert] / ((row["dense_ms"] - row["sparse_ms"]) / row["n"])


def work(m: int, n: int, k: int, *, sparse: bool = False) -> tuple[float, float]:
    """FLOPs of the product [m, k] x [k, n], and bytes that must move if each number has two.

    `sparse`: the first operand is compressed in 2:4. The FLOPs are still those of the dense product.
    """
    return 2.0 * m * n * k, 2.0 * (m * k * (9 / 16 if sparse else 1) + k * n + m * n)


def intensities(record: Record) -> list[dict[str, Any]]:
    """Points of a roofline: name, kind, x in FLOPs a byte of necessary traffic, y in TFLOP/s reached.

    A 2:4 product is counted with the FLOPs of the dense one it stands for, so that heights compare.
    """
    points = []
    for r in record.results["products"]:
        for kind, engine in (("dense", "dense"), ("2:4", "sparse")):
            flops, moved = work(r["m"], r["n"], r["k"], sparse=kind == "2:4")
            points.append({"kind": kind, "x": flops / moved, "y": r[f"{engine}_tflops"], "name": r["name"]})
    for r in record.results["memory"]:
        flops = 4 * r["rows"] * r["cols"]  # of an element roughly; twice as many show no difference
        others = {"copy": "torch", "copy by a kernel": "torch", "torch: relu2 eager": "torch"}
        kind = {**others, "torch: compress y2": "compressor"}.get(r["name"], "pass")
        points.append({"kind": kind, "x": flops / r["bytes"], "y": flops / r["ms"] / 1e9, "name": r["name"]})
    return points


def shape_of(record: Record, d_model: int) -> dict[str, Any]:
    """The results of one FFN shape of a Venom record."""
    return next(s for s in record.results["shapes"] if s["d_model"] == d_model)


def largest_error(record: Record) -> float:
    """Largest relative error of the routed FFN's results and gradients, against a float32 reference."""
    return max(e for s in record.results["shapes"] for by_k in s["errors"].values() for e in by_k.values())


def venom_products(record: Record, d_model: int) -> pd.DataFrame:
    """Speed-up of each of the six products over cuBLAS, one column a format; last row all six together."""
    times = pd.DataFrame(shape_of(record, d_model)["products"])[["dense", *FORMATS]].dropna()
    times.loc["all six"] = times.sum()
    frame = pd.DataFrame({form: times["dense"] / times[k] for k, form in FORMATS.items()})
    frame.insert(0, "dense ms", times["dense"])
    return frame.rename_axis("product").reset_index()


def venom_formats(record: Record, d_model: int) -> pd.DataFrame:
    """One row a format: speed-ups over dense of products, gather products and FFN; peers; memory."""
    s = shape_of(record, d_model)
    dense, rows = s["products"]["dense"], []
    for k, form in FORMATS.items():
        own, peer = s["products"][k], s["products"][f"grouped {k}"]
        rows.append(
            {
                "format": form,
                "clusters": sum(dense.values()) / sum(own[n] for n in dense),
                "clusters, y3": dense["2 y3 = y2 W2"] / own["2 y3 = y2 W2"],
                "clusters, y3 summed": dense["2 y3 = y2 W2"] / (own["2 y3 = y2 W2"] + own[PARTS_TWICE]),
                **{f"gather, V = {v}": t["dense"] / t[form] for v, t in s["gather"].items()},
                "grouped products": sum(dense.values()) / sum(peer.values()),
                "FFN": s["ffn"]["dense"] / s["ffn"][k],
                "FFN, back to back": s["ffn_sustained"]["dense"] / s["ffn_sustained"][k],
                "FFN, no graph": s["ffn_eager"]["dense"] / s["ffn_eager"][k],
                "grouped FFN": s["ffn"]["dense"] / s["ffn"][f"grouped {k}"],
                "FFN over grouped": s["ffn"][f"grouped {k}"] / s["ffn"][k],
                "peak GiB": s["peak_bytes"][k] / 2**30,
                "of dense": s["peak_bytes"][k] / s["peak_bytes"]["dense"],
            }
        )
    return pd.DataFrame(rows)


def stages(record: Record, d_model: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by stage: dense and each format -> stage -> ms, each stage timed alone."""
    found = {}
    for key, name in {"dense": "dense", **FORMATS}.items():
        t = shape_of(record, d_model)["products"][key]
        found[name] = {
            "products 1, 2 (forward)": t["1 y1 = x W1"] + t["2 y3 = y2 W2"],
            "products 3, 5 (activation gradients)": t["3 dy2 = dy3 W2^T"] + t["5 dx = dy1 W1^T"],
            "products 4, 6 (weight gradients)": t["4 dW2 = y2^T dy3"] + t["6 dW1 = x^T dy1"],
            "sum of each token's k parts": 2 * t.get(PARTS_TWICE, 0.0),
            "routing (means, scores, top-k)": t.get("expert means", 0.0) + t.get("route", 0.0),
            "permutation (token lists)": t.get("token lists", 0.0),
        }
    return found


def overhead_share(record: Record, d_model: int) -> dict[str, float]:
    """Share of the stages' sum that is not a product, by format."""
    return {
        name: 1 - sum(ms for stage, ms in parts.items() if stage.startswith("products")) / sum(parts.values())
        for name, parts in stages(record, d_model).items()
        if name != "dense"
    }


def venom_over_24(kernels: Record, venom: Record, d_model: int, form: str) -> pd.DataFrame:
    """Products 1, 2, 3, 5: ms at 2:4 and in Venom, their ratio, and the ratio of their speed-ups.

    The two records are two runs on one kind of device. The ratio of times compares the runs directly;
    the ratio of speed-ups divides each by the dense product of its own run.
    """
    key = next(k for k, name in FORMATS.items() if name == form)
    times = shape_of(venom, d_model)["products"]
    names = {
        "y1 = x S(W1)": "1 y1 = x W1",
        "y3 = y2 W2": "2 y3 = y2 W2",
        "dy2 = dy3 S(W2^T)": "3 dy2 = dy3 W2^T",
        "dx = dy1 W1^T": "5 dx = dy1 W1^T",
    }
    own = ffn_products(kernels, d_model).set_index("name").loc[list(names)]
    dense, ours = ([times[k][name] for name in names.values()] for k in ("dense", key))
    frame = pd.DataFrame({"product": names.values(), "2:4 ms": own["sparse_ms"].tolist(), f"{form} ms": ours})
    frame["2:4 time / Venom time"] = frame["2:4 ms"] / ours
    frame["Venom gain / 2:4 gain"] = np.array(dense) / ours / own["speedup"].tolist()
    return frame


def arithmetic(arm: str) -> float:
    """How fast section 3.2's formula makes a sparsity preset's FFN, 2:4 at 1.5 and Venom at `FIGURE7`."""
    n24, n_venom = flops.sparse_counts(SPARSITY_PRESETS[arm])
    return flops.ffn_speedup(FIGURE7, n24=n24, n_venom=n_venom)
