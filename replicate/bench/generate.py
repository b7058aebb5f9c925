"""Benchmark of inference: text token by token, sparse against dense, all in one process.

A step of generation reads weights, so times stand beside bytes: of the weights that a step must read, over
the bandwidth of a copy in the same run. The FFN alone is timed over several layers with weights of their own,
so that nothing waits in a cache; its dense peer is the fastest of several. A whole step is one CUDA graph,
with keys and values of the prompt in fixed buffers; a deep model is the line through two depths. Prefill
reads the prompt, by the kernels of training. Weights are random and in bf16. Nothing is timed before every
arm's FFN agreed with the reference on the inputs that are timed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from replicate.bench import timing
from replicate.bench.generate_cases import (
    AGAIN,
    ARMS,
    DENSE,
    PEERS,
    Layers,
    Model,
    bytes_read,
    check,
    used_share,
)
from replicate.settings.presets import train_preset
from replicate.study import records

KIND = "bench-generate"
PRESETS = ("llama1b", "llama7b")
BATCHES, PROMPT = (1, 8, 64), 2048
DEPTHS = {"llama1b": (2, 6), "llama7b": (1, 3)}
COPIED = 2**30  # bytes that are read, and written, to measure the bandwidth
AIMS = (("venom16", "decode", 3.0), ("venom16", "prefill", 2.5))  # times as fast as dense, at batch 1
GONE = 1.05  # a gain of less than this is none
Row = dict[str, Any]


def config(
    preset: str,
    arms: Sequence[str] = tuple(ARMS),
    batches: Sequence[int] = BATCHES,
    layers: Sequence[int] | None = None,
    prompt: int = PROMPT,
    repeats: int = 9,
) -> Row:
    """What identifies a run; ValueError for something unknown or impossible.

    Args:
        preset: training preset, for its model's shape. arms: of ARMS; dense is always there.
        batches: texts at a time, at most 64. layers: two depths to time; None: DEPTHS, or 1 and 2.
        prompt: tokens of each text before the first step. repeats: timed calls of each candidate.
    """
    model = train_preset(preset).model
    for name in arms:
        if name not in ARMS:
            raise ValueError(f"no arm {name!r}; choose from {', '.join(ARMS)}")
        ARMS[name].check_shape(model.d_model, model.d_ff)
    if not batches or not all(1 <= batch <= 64 for batch in batches):
        raise ValueError(f"batches {list(batches)}: choose 1 to 64 texts")
    layers = sorted(set(layers or DEPTHS.get(preset, (1, 2))))
    if len(layers) != 2 or layers[0] < 1:
        raise ValueError(f"layers {layers}: give two depths, for the line through them")
    return {
        "preset": preset, "n_layer": model.n_layer, "layers": layers, "arms": list(dict.fromkeys(arms)),
        "batches": sorted(set(batches)), "prompt": prompt, "dtype": "bfloat16", "seed": 0, "repeats": repeats,
    }  # fmt: skip


@torch.no_grad()
def run(c: Row, device: str = "cuda", compile: bool = True) -> records.Record:
    """The record's results: "bandwidth" in bytes a second, "ffn" by batch, "models" by depth and batch.

    See `ffn_times` and `Model.measure`.
    """
    start, shape, dtype = time.perf_counter(), train_preset(c["preset"]).model, getattr(torch, c["dtype"])

    def say(what: str) -> None:
        print(f"{c['preset']}: {what}, {time.perf_counter() - start:.0f} s", flush=True)

    results: Row = {"bandwidth": bandwidth(device, c["repeats"])}
    layers = Layers(shape.d_model, shape.d_ff, dtype, c["seed"], device)
    results["ffn"] = ffn_times(c, layers, compile)
    del layers
    timing.release()
    say("FFN timed")
    results["models"] = {}
    for depth in c["layers"]:
        model = Model(shape, depth, c["prompt"] + c["repeats"] + 16, dtype, device)
        found = results["models"][str(depth)] = {str(batch): {} for batch in c["batches"]}
        for batch in c["batches"]:
            draw = torch.Generator().manual_seed(c["seed"])
            ids = torch.randint(shape.vocab_size, (batch, c["prompt"]), generator=draw).to(device)
            for name in (DENSE, *c["arms"], AGAIN):
                model.use(name)
                found[str(batch)][name] = model.measure(ids, c["repeats"])
                timing.release()
        del model
        timing.release()
        say(f"{depth} layers timed")
    return records.make_record(KIND, c, results, seconds=time.perf_counter() - start, device=device)


def bandwidth(device: str, repeats: int) -> float:
    """Bytes a second of a large copy, read and written."""
    one = torch.empty(COPIED if device != "cpu" else 2**24, dtype=torch.uint8, device=device)
    two = torch.empty_like(one)
    ms = timing.compare({"copy": partial(two.copy_, one)}, device, repeats)["copy"]["ms"]
    return 2 * one.nbytes / (ms * 1e-3)


def ffn_times(c: Row, layers: Layers, compile: bool = True) -> Row:
    """By batch "decode" and "prefill": ms of one FFN with spread by arm and dense peer.

    Also by arm "checked", see `check`, of both, and "used", the share of clusters that a step's tokens use.
    Decoding is timed over all layers in turn, prefill, which computes more than it reads, on one.
    """
    found: Row = {str(batch): {"checked": {}, "used": {}} for batch in c["batches"]}
    inputs = {batch: layers.inputs(batch) for batch in c["batches"]}
    texts = {batch: layers.inputs(batch * c["prompt"]) for batch in c["batches"]}
    arms = {name: layers.sparse(name) for name in c["arms"]}
    for batch, x in inputs.items():
        for name, ffns in arms.items():
            found[str(batch)]["checked"][name] = check(name, ffns[0], x)
            found[str(batch)]["checked"][f"{name}, prefill"] = check(
                name, ffns[0], texts[batch][: c["prompt"]]
            )
            found[str(batch)]["used"][name] = used_share(ffns, x)
            timing.release()
    for what, xs, count in (("decode", inputs, None), ("prefill", texts, 1)):
        few = what == "decode"
        peers = {name: layers.dense(name, count) for name in layers.peers(few, compile)}
        for batch, x in xs.items():
            calls = {name: partial(_one_by_one, each[:count], x) for name, each in (peers | arms).items()}
            if layers.device == "cpu":
                times = timing.compare(calls, "cpu", c["repeats"])
            else:
                times = timing.compare_graphs(calls, c["repeats"] if few else min(5, c["repeats"]))
            each = len(layers.weights) if few else 1
            found[str(batch)][what] = {
                name: {key: ms / each for key, ms in spread.items()} for name, spread in times.items()
            }
            timing.release()
        del peers
    return found


def _one_by_one(layers: Sequence[Any], x: Tensor) -> None:
    """Each layer on the same tokens, none after another's output: its weights are what is to be read."""
    for layer in layers:
        layer(x)


def fastest(times: dict[str, timing.Spread]) -> float:
    """Milliseconds of the fastest dense peer."""
    return min(spread["ms"] for name, spread in times.items() if name in PEERS)


def composed(record: records.Record, batch: int, arm: str, what: str) -> float:
    """Of the whole model, by the line through two depths: ms of "step" or "prefill", or "weight_bytes"."""
    low, high = record.config["layers"]
    a, b = (_number(record.results["models"][str(depth)][str(batch)][arm][what]) for depth in (low, high))
    return a + (b - a) / (high - low) * (record.config["n_layer"] - low)


def _number(value: Row | float) -> float:
    return value["ms"] if isinstance(value, dict) else float(value)


def rows(record: records.Record) -> list[Row]:
    """One row a batch and arm: times of the FFN and the whole model, each with "x", times as fast as dense.

    "x limit" is the dense layer's bytes over the arm's, "of limit" its bytes over its time, as a share of the
    bandwidth of a copy. The dense FFN is the fastest peer, the whole dense model the mean of two.
    """
    c, shape, table = record.config, train_preset(record.config["preset"]).model, []
    size = (shape.d_model, shape.d_ff)
    for batch in c["batches"]:
        ffn = record.results["ffn"][str(batch)]
        base = {what: fastest(ffn[what]) for what in ("decode", "prefill")}
        for what in ("step", "prefill"):
            base[f"model {what}"] = sum(composed(record, batch, name, what) for name in (DENSE, AGAIN)) / 2
        peers = [name for name in ffn["decode"] if name in PEERS]
        for arm in (*peers, *c["arms"]):
            row = {"batch": batch, "arm": arm, "FFN us": 1e3 * ffn["decode"][arm]["ms"]}
            row["x"] = base["decode"] / ffn["decode"][arm]["ms"]
            used = ffn["used"].get(arm, 1.0)
            moved = bytes_read(ARMS.get(arm), *size, used)
            row |= {"x limit": bytes_read(None, *size, 1.0) / moved, "used": used, "MB": moved / 1e6}
            row["of limit"] = moved / (ffn["decode"][arm]["ms"] * 1e-3) / record.results["bandwidth"]
            if arm in ffn["prefill"]:
                row["prefill FFN ms"] = ffn["prefill"][arm]["ms"]
                row["x prefill FFN"] = base["prefill"] / ffn["prefill"][arm]["ms"]
            if arm in (DENSE, *c["arms"]):
                row |= _of_model(record, batch, arm, base)
            table.append(row)
    return table


def _of_model(record: records.Record, batch: int, arm: str, base: Row) -> Row:
    deepest = record.results["models"][str(max(record.config["layers"]))][str(batch)][arm]
    row: Row = {}
    for what in ("step", "prefill"):
        ms = composed(record, batch, arm, what)
        row |= {f"{what} ms": ms, f"x {what}": base[f"model {what}"] / ms}
        if (peak := deepest.get(f"{what}_peak_bytes")) is not None:
            row[f"{what} peak GiB"] = peak / 2**30
    return row | {"weights GiB": composed(record, batch, arm, "weight_bytes") / 2**30}


def aims(record: records.Record) -> list[str]:
    """A line for each of AIMS, and the batch at which an arm's FFN gains nothing any more at decoding."""
    found, lines = pd.DataFrame(rows(record)).set_index(["batch", "arm"]), []
    for arm, what, aim in AIMS:
        if arm in record.config["arms"] and 1 in record.config["batches"]:
            x = found.loc[(1, arm), {"decode": "x", "prefill": "x prefill FFN"}[what]]
            verdict = "reached" if x >= aim else "not reached"
            lines.append(f"{arm}, {what} FFN at batch 1: {x:.2f} x dense, aim {aim}: {verdict}")
    for arm in record.config["arms"]:
        gone = [batch for batch in record.config["batches"] if found.loc[(batch, arm), "x"] < GONE]
        when = f"gone at batch {gone[0]}" if gone else f"still there at batch {record.config['batches'][-1]}"
        lines.append(f"{arm}: the gain of its FFN at decoding is {when}")
    return lines


def table(record: records.Record) -> str:
    """Every batch's times, ratios over dense, bytes and memory as plain text, then the aims."""
    c, frame, speed = record.config, pd.DataFrame(rows(record)), record.results["bandwidth"] / 1e12
    lines = [
        f"{c['preset']}: weights in {c['dtype']}, prompt {c['prompt']}, copy {speed:.2f} TB/s; "
        f"model of {c['n_layer']} layers COMPOSED from {c['layers']}, peaks at the deeper"
    ]
    for batch in c["batches"]:
        own = frame[frame["batch"] == batch].drop(columns="batch").set_index("arm").dropna(axis=1, how="all")
        lines += [f"batch {batch}", own.to_string(float_format="{:.4g}".format, na_rep="")]
    return "\n".join([*lines, *aims(record)])
