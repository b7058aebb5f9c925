"""Benchmark of a whole training step: tokens to new weights, dense and sparse arms in turn, in one process.

Embedding, attention, norms, FFN with routing and weight compression, head, loss, backward, clipping and
AdamW; bf16 with float32 weights, on random tokens; as one CUDA graph, as the trainer runs it, and launched
kernel by kernel. The baseline is the faster of two compiled dense models. A model that does not fit with its
optimiser is timed at several depths: time = a + b layers, by least squares.
`python -m replicate bench step` keeps the record `bench-step`; without a GPU it shows the recorded ones.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from replicate import ffn_cases, records, step_cases, step_table
from replicate.ffn_bench import shown
from replicate.kernels import timing
from replicate.presets import SPARSITY_PRESETS, train_preset
from replicate.step_cases import DENSE, WHOLE, TrainingStep
from replicate.step_table import ACTIVE, KIND, PAPERS

PRESETS = ("llama1b", "llama7b")
# 32 layers of the 7B shape need 100 GB for weights and optimiser alone.
DEPTHS = dict.fromkeys(("llama7b", "width2048", "width3072", "width4096"), (2, 4, 6))
SPARSITIES = (*PAPERS, *ACTIVE)
REPEATS = 7
Row = dict[str, Any]


def config(
    preset: str,
    sparsity: Sequence[str] = SPARSITIES,
    layers: Sequence[int] | None = None,
    *,
    repeats: int = REPEATS,
    whole: bool = True,
    attention: str = "auto",
    seed: int = 0,
) -> Row:
    """What identifies a run.

    Args:
        preset: training preset. sparsity: presets to compare; dense is always there.
        layers: depths to time: the model's own, or three or more to fit. None: DEPTHS, or the model's own.
        repeats: timed steps of each arm. whole: also compile the dense model in one piece.
        attention: "flash", "cudnn", "torch" (its choice), or "auto": the fastest, for all arms.

    Raises:
        ValueError: something unknown, or depths that neither are the model's nor can be fitted.
    """
    model = train_preset(preset).model
    for name in sparsity:
        if name not in SPARSITY_PRESETS:
            raise ValueError(f"unknown sparsity preset {name!r}; known: {', '.join(SPARSITY_PRESETS)}")
        SPARSITY_PRESETS[name].check_shape(model.d_model, model.d_ff)
    layers = sorted(set(layers or DEPTHS.get(preset, (model.n_layer,))))
    if layers != [model.n_layer] and (len(layers) < 3 or layers[0] < 1):
        raise ValueError(
            f"layers {layers}: give {model.n_layer}, the model's, or three depths or more to fit"
        )
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; choose 1 or more")
    kernels = ("auto", "torch", *step_cases.ATTENTION)
    if attention not in kernels:
        raise ValueError(f"attention is {attention!r}; choose one of {', '.join(kernels)}")
    sparse = [name for name in dict.fromkeys(sparsity) if name != DENSE]
    c = {"preset": preset, "n_layer": model.n_layer, "layers": layers, "sparsity": sparse, "whole": whole}
    c |= {"attention": attention, "dtype": "bfloat16", "seed": seed, "repeats": repeats}
    return c | {"step": "one CUDA graph"}


def run(c: Row, device: str = "cuda", compile: bool = True) -> records.Record:
    """Check every format on one FFN of the model's shape, then time the step at every depth.

    Returns:
        a record whose results are "ffn" (see `ffn_cases`), "attention" and "depths", see `measure_depth`.

    Raises:
        AssertionError: a sparse FFN is wrong, or a loss is not finite.
        ValueError: on a GPU, a preset that has no kernels.
    """
    start, base = time.perf_counter(), train_preset(c["preset"])
    shape = (base.tokens_per_step // base.grad_accum, base.model.d_model, base.model.d_ff)
    p, results = ffn_cases.Problem(shape, c["seed"], device), {}
    results["ffn"] = {
        "engines": ffn_cases.engines(p, c["sparsity"]),
        "errors": ffn_cases.verify(p, c["sparsity"]),
    }
    say(start, f"{c['preset']}: every sparse FFN agrees with the reference")
    del p
    for depth in c["layers"]:
        _release(device)
        case = TrainingStep(c["preset"], depth, seed=c["seed"], device=device, compile=compile)
        if "attention" not in results:
            results |= _attention(c, case)
            say(start, f"attention, ms: {results['attention']}; all arms use {results['attention_used']}")
        with step_cases.attention_by(results["attention_used"]):
            part = measure_depth(c, case, start)
        results.setdefault("depths", {})[str(depth)] = part
        del case
    _release(device)
    return records.make_record(KIND, c, results, seconds=time.perf_counter() - start)


def measure_depth(c: Row, case: TrainingStep, start: float) -> Row:
    """By arm: "ms" of the captured step and "launched" with spread, the last "loss", "load" of routed arms.

    On a GPU also "peak_bytes" and "busy_ms", the sum over a captured step's kernels; at the greatest depth
    the "components". Raises AssertionError for a loss that is not finite.
    """
    depth = case.config.model.n_layer
    arms = [DENSE, *([WHOLE] if c["whole"] else []), *c["sparsity"]]
    for name in arms:
        case.step(name)
        say(start, f"{c['preset']}, {depth} layers, {name}: ready")
    out: Row = {"parameters": sum(p.numel() for p in case.parameters)}
    out["launched"] = timing.spreads({n: partial(case.step, n) for n in arms}, case.device, c["repeats"], 0)
    say(start, f"{c['preset']}, {depth} layers: timed as launched")
    last = {name: case.last_step(name) for name in arms}
    out["loss"] = {name: loss for name, (loss, _) in last.items()}
    out["peak_bytes"] = {name: peak for name, (_, peak) in last.items() if peak is not None}
    wrong = {name: loss for name, loss in out["loss"].items() if not math.isfinite(loss)}
    if wrong:
        raise AssertionError(f"losses are not finite: {wrong}")
    routed = [name for name in c["sparsity"] if SPARSITY_PRESETS[name].activation == "venom"]
    out["load"] = {name: case.load(name) for name in routed}
    graphs = {name: case.captured(name) for name in arms}
    out["ms"] = timing.spreads(graphs, case.device, c["repeats"])
    if case.device != "cpu":
        out["busy_ms"] = {name: sum(timing.kernel_ms(graph).values()) for name, graph in graphs.items()}
    graphs.clear()
    _release(case.device)
    say(start, f"{c['preset']}, {depth} layers: timed as graphs")
    if depth == max(c["layers"]):
        out["components"] = case.components([DENSE, *c["sparsity"]], c["repeats"])
        say(start, f"{c['preset']}, {depth} layers: components timed")
    return out


def say(start: float, text: str) -> None:
    """A line of progress with the seconds since `start`."""
    print(f"{time.perf_counter() - start:6.1f} s  {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and record on a GPU; elsewhere show what was recorded."""
    parser = argparse.ArgumentParser(prog="replicate bench step", description=main.__doc__)
    parser.add_argument("--preset", nargs="+", default=PRESETS, metavar="NAME")
    parser.add_argument("--sparsity", nargs="+", default=SPARSITIES, metavar="NAME")
    parser.add_argument("--layers", nargs="+", type=int, help="the model's depth, or three or more to fit")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--attention", default="auto", help="flash, cudnn, torch; auto is the fastest")
    parser.add_argument("--no-whole", action="store_true", help="compile the dense model only by layer")
    parser.add_argument("--out", type=Path, help="folder of the records (default: data/recorded)")
    args = parser.parse_args(argv)
    how = {"repeats": args.repeats, "whole": not args.no_whole, "attention": args.attention}
    configs = [config(preset, args.sparsity, args.layers, **how) for preset in args.preset]
    store = records.RecordStore(recorded=args.out) if args.out else records.RecordStore()
    if not torch.cuda.is_available():
        print(shown(store, KIND, step_table.table))
        return 0
    for c in configs:
        record = run(c)
        path = store.put(record, recorded=True)
        print(f"{step_table.table(record)}\nrecord: {path}\n", flush=True)
    return 0


def _attention(c: Row, case: TrainingStep) -> Row:
    """ "attention", milliseconds of each kernel tried, and "attention_used" (None is torch's choice)."""
    times = case.attention_ms() if c["attention"] == "auto" and case.device != "cpu" else {}
    used = min(times, key=times.__getitem__, default=None)
    return {
        "attention": times,
        "attention_used": used if c["attention"] in ("auto", "torch") else c["attention"],
    }


def _release(device: str) -> None:
    """Give the memory of the last model back."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    from replicate.console import ended

    raise SystemExit(ended(main))
