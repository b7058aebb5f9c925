"""Benchmark of a whole training step: tokens to new weights, dense and sparse arms in turn, in one process.

Embedding, attention, norms, FFN with routing and weight compression, head, loss, backward, clipping and
AdamW; bf16 with float32 weights, on random tokens; as one CUDA graph, as the trainer runs it, and launched
kernel by kernel. The baseline is the faster of two compiled dense models. A model that does not fit with its
optimiser is timed at several depths: time = a + b layers, by least squares.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from replicate.bench import ffn, timing
from replicate.bench.step_cases import DENSE, WHOLE, TrainingStep
from replicate.config import ATTENTION, RESIDUALS
from replicate.settings.checks import one_of
from replicate.settings.presets import SPARSITY_PRESETS, train_preset
from replicate.study import records
from replicate.training.attention import TORCH

KIND = "bench-step"
PRESETS = ("llama1b", "llama7b")
# 32 layers of the 7B shape need 100 GB for weights and optimiser alone.
DEPTHS = dict.fromkeys(("llama7b", "width2048", "width3072", "width4096"), (2, 4, 6))
PAPERS = ("venom16", "venom32", "venom64", "recipe", "recipe32", "recipe64", "act24")
ACTIVE = ("active16", "active16x32", "active64x32")  # clusters by a token's own activations
SPARSITIES = (*PAPERS, *ACTIVE, *ffn.FP8)
Row = dict[str, Any]


def config(
    preset: str,
    sparsity: Sequence[str] = SPARSITIES,
    layers: Sequence[int] | None = None,
    repeats: int = 7,
    whole: bool = True,
    attention: str = "auto",
    residual: str = "float32",
) -> Row:
    """What identifies a run; ValueError for something unknown, or depths that cannot be fitted.

    Args:
        preset: training preset. sparsity: presets to compare; dense is always there.
        layers: depths to time: the model's own, or three or more to fit. None: DEPTHS, or the model's own.
        repeats: timed steps of each arm. whole: also compile the dense model in one piece.
        attention: "flash", "cudnn", "torch" (its choice), or "auto": the fastest, for all arms.
        residual: dtype of the residual stream, for all arms: "float32" or "bfloat16".
    """
    model = train_preset(preset).model
    for name in sparsity:
        train_preset(preset, name)  # it is one, and fits
    layers = sorted(set(layers or DEPTHS.get(preset, (model.n_layer,))))
    if layers != [model.n_layer] and (len(layers) < 3 or layers[0] < 1):
        own = f"{model.n_layer}, the model's"
        raise ValueError(f"layers {layers}: give {own}, or three depths or more to fit")
    one_of("attention", attention, ATTENTION)
    one_of("residual", residual, RESIDUALS)
    sparse = [name for name in dict.fromkeys(sparsity) if name != DENSE]
    c = {"preset": preset, "n_layer": model.n_layer, "layers": layers, "sparsity": sparse, "whole": whole}
    c |= {"attention": attention, "dtype": "bfloat16", "seed": 0, "repeats": repeats}
    c |= {"residual": residual} if residual != RESIDUALS[0] else {}  # older records do not say so
    return c | {"step": "one CUDA graph"}


def run(c: Row, device: str = "cuda", compile: bool = True) -> records.Record:
    """Check every format on one FFN of the model's shape, then time the step at every depth.

    The record's results: "ffn", see `ffn.check`, which raises for wrong ones; "attention" (milliseconds of
    each kernel tried), "attention_used" (None is torch's choice); "depths", see `measure_depth`.
    """
    start, base = time.perf_counter(), train_preset(c["preset"])
    shape = (base.tokens_per_step // base.grad_accum, base.model.d_model, base.model.d_ff)
    results: Row = {"ffn": ffn.check(ffn.LayerCase(shape, c["seed"], device), c["sparsity"])}
    print(f"{c['preset']}: every sparse FFN agrees with the reference", flush=True)
    for depth in c["layers"]:
        timing.release()
        how = {"device": device, "compile": compile, "residual": c.get("residual", RESIDUALS[0])}
        case = TrainingStep(c["preset"], depth, seed=c["seed"], **how)
        if "attention" not in results:
            results |= case.take_attention(c["attention"])
        case.model.set_attention(results["attention_used"] or TORCH)
        results.setdefault("depths", {})[str(depth)] = measure_depth(c, case)
        print(f"{c['preset']}: {depth} layers timed, {time.perf_counter() - start:.0f} s", flush=True)
        del case
    timing.release()
    return records.make_record(KIND, c, results, seconds=time.perf_counter() - start)


def measure_depth(c: Row, case: TrainingStep) -> Row:
    """By arm: "ms" of the captured step and "launched" with spread, the last "loss", "load" of routed arms.

    On a GPU also "peak_bytes" and "busy_ms", the sum over a captured step's kernels; at the greatest depth
    the "components". Raises AssertionError for a loss that is not finite.
    """
    arms = [DENSE, *([WHOLE] if c["whole"] else []), *c["sparsity"]]
    steps: timing.Calls = {name: partial(case.step, name) for name in arms}
    out: Row = {"parameters": sum(p.numel() for p in case.parameters)}
    out["launched"] = timing.compare(steps, case.device, c["repeats"])
    last = {name: case.last_step(name) for name in arms}
    out["loss"] = {name: loss for name, (loss, _) in last.items()}
    out["peak_bytes"] = {name: peak for name, (_, peak) in last.items() if peak is not None}
    wrong = {name: loss for name, loss in out["loss"].items() if not math.isfinite(loss)}
    if wrong:
        raise AssertionError(f"losses are not finite: {wrong}")
    routed = [name for name in c["sparsity"] if SPARSITY_PRESETS[name].activation == "venom"]
    out["load"] = {name: case.load(name) for name in routed}
    on_gpu = case.device != "cpu"
    if on_gpu:
        steps = {name: timing.graphed(step, case.pool, warm=0) for name, step in steps.items()}
    out["ms"] = timing.compare(steps, case.device, c["repeats"])
    if on_gpu:
        out["busy_ms"] = {name: sum(timing.kernel_ms(graph).values()) for name, graph in steps.items()}
    steps.clear()
    timing.release()
    if case.config.model.n_layer == max(c["layers"]):
        out["components"] = case.components([DENSE, *c["sparsity"]], c["repeats"])
    return out


def fit(layers: Sequence[float], ms: Sequence[float]) -> tuple[float, float, float]:
    """Least squares of ms = a + b layers: (a, b, the largest deviation as a share of the time there)."""
    x, y = np.asarray(layers, dtype=float), np.asarray(ms, dtype=float)
    b, a = np.polyfit(x, y, 1)
    return float(a), float(b), float(np.abs((a + b * x - y) / y).max())


def step_times(record: records.Record, how: str = "ms") -> dict[str, Row]:
    """Milliseconds of a step of the whole model by arm: measured with spread, or composed from a fit.

    A composed one has "base_ms" and "layer_ms" (a and b) and "residual", see `fit`.

    Args:
        how: "ms" of the step as one CUDA graph, "launched" kernel by kernel.
    """
    layers, n_layer = record.config["layers"], record.config["n_layer"]
    measured = [record.results["depths"][str(depth)][how] for depth in layers]
    if layers == [n_layer]:
        return measured[0]
    found = {}
    for name in measured[0]:
        a, b, residual = fit(layers, [times[name]["ms"] for times in measured])
        found[name] = {"ms": a + b * n_layer, "base_ms": a, "layer_ms": b, "residual": residual}
    return found


def baseline(times: dict[str, Row]) -> str:
    """The faster dense arm."""
    return min((name for name in (DENSE, WHOLE) if name in times), key=lambda name: times[name]["ms"])


def rows(record: records.Record) -> list[Row]:
    """One row an arm: milliseconds and "x" over the baseline, both also as launched; peak GiB.

    At the greatest depth timed "over busy", the step's time over the sum of its kernels', and the peak.
    """
    times, launched = step_times(record), step_times(record, "launched")
    base, base_launched = (found[baseline(found)]["ms"] for found in (times, launched))
    deepest = record.results["depths"][str(max(record.config["layers"]))]
    table = []
    for name, row in times.items():
        ms = launched[name]["ms"]
        found = {"arm": name, **row, "x": base / row["ms"], "launched": ms, "x launched": base_launched / ms}
        if name in deepest["peak_bytes"]:
            found["peak GiB"] = deepest["peak_bytes"][name] / 2**30
            found["over busy"] = deepest["ms"][name]["ms"] / deepest["busy_ms"][name]
        table.append(found)
    return table


def table(record: records.Record) -> str:
    """The step of every arm and its parts, as plain text; notebook 10 has what they mean for whole runs."""
    c, r = record.config, record.results
    train = train_preset(c["preset"])
    whole = c["layers"] == [c["n_layer"]]
    depths = ", ".join(map(str, c["layers"]))
    how = "all of them timed" if whole else f"COMPOSED from {depths}: ms = base + layers; peak at the deepest"
    deepest = r["depths"][str(max(c["layers"]))]
    parts = pd.DataFrame(deepest["components"]["ffn"]).T.rename(index="ffn, {}".format)
    others = {name: times for name, times in deepest["components"].items() if name != "ffn"}
    parts = pd.concat([pd.DataFrame(others).T, parts])
    loads = pd.Series(deepest["load"], dtype=object).explode().astype(float)
    lines = [
        f"{c['preset']}: a training step of {train.batch_size} x {train.model.seq_len} tokens, bf16, "
        f"{'residual stream in bf16, ' if 'residual' in c else ''}{c['n_layer']} layers, {how}",
        pd.DataFrame(rows(record)).set_index("arm").to_string(float_format="{:.3f}".format, na_rep=""),
        f"parts of a step of {max(c['layers'])} layers, one FFN and attention of them, each timed alone",
        parts.to_string(float_format="{:.3f}".format),
        f"busiest cluster over the mean: at most {loads.max():.2f}" if len(loads) else "no cluster is routed",
        f"attention: {r['attention_used'] or 'as torch chooses'}; ms: {r['attention']}",
    ]
    return "\n".join(lines)
