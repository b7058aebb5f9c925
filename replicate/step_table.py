"""The step benchmark's record as numbers and text: whole models, parts of a step, and speed-ups of runs.

A run's speed-up is given three ways: by the paper's arithmetic, by the same arithmetic with two FFN matrices,
causal attention and the vocabulary head counted, and from the measured step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from replicate import flops, paper
from replicate.gpt import param_count
from replicate.layer_tables import NAMES
from replicate.presets import SPARSITY_PRESETS, WIDTHS, train_preset
from replicate.records import Record, RecordStore
from replicate.step_cases import DENSE, WHOLE

KIND = "bench-step"
CARD = "NVIDIA H100 80GB HBM3"  # whose steps the tables show
PAPERS = ("venom16", "venom32", "venom64", "recipe", "recipe32", "recipe64", "act24")
ACTIVE = ("active16", "active16x32", "active64x32")  # clusters by a token's own activations
AT_WIDTHS = ("venom16", "recipe", "active16x32")  # timed at every width, 4 of 16 each
WAYS = ("paper", "corrected", "measured")
PARTS = ("attention", "ffn", "head and loss", "optimiser", "rest")
Row = dict[str, Any]


def recorded(preset: str, timed: Sequence[str] = PAPERS) -> Record:
    """The latest shipped record of a preset's step on `CARD` that has timed these arms.

    Raises ValueError if there is none.
    """
    return RecordStore().latest(KIND, timed=timed, device=CARD, preset=preset)


def fit(layers: Sequence[float], ms: Sequence[float]) -> tuple[float, float, float]:
    """Least squares of ms = a + b layers: (a, b, the largest deviation as a share of the time there).

    Raises ValueError for fewer than three depths, or depths that are all alike.
    """
    if len(layers) != len(ms) or len(layers) < 3 or len(set(layers)) < 2:
        raise ValueError(f"{len(set(layers))} depths, {len(ms)} times: a line needs three, not all alike")
    x, y = np.asarray(layers, dtype=float), np.asarray(ms, dtype=float)
    b, a = np.polyfit(x, y, 1)
    return float(a), float(b), float(np.abs((a + b * x - y) / y).max())


def step_times(record: Record, how: str = "ms") -> dict[str, Row]:
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


def rows(record: Record) -> list[Row]:
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


def widths() -> list[Row]:
    """One row a width of `presets.WIDTHS` and arm: parameters and the columns of `rows`."""
    table = []
    for d_model, record in zip(WIDTHS, width_records(), strict=True):
        total = param_count(train_preset(record.config["preset"]).model)["total"]
        table += [{"d_model": d_model, "parameters": total, **row} for row in rows(record)]
    return table


def width_records() -> list[Record]:
    """The record of every width; ValueError if one is missing."""
    return [recorded(f"width{d_model}", AT_WIDTHS) for d_model in WIDTHS]


def width_table(found: pd.DataFrame, arms: Sequence[str] = AT_WIDTHS) -> pd.DataFrame:
    """One row a width: parameters, ms of the dense step, and how many times as fast each arm's is, both ways.

    Args:
        found: rows of `widths`.
    """
    of = {arm: part.set_index("d_model") for arm, part in found.groupby("arm")}
    dense = of[DENSE]
    columns = {"parameters": dense["parameters"].map(size), "dense, ms": dense["ms"].map("{:.1f}".format)}
    for arm in arms:
        columns[NAMES[arm]] = of[arm]["x"].map("{:.2f}".format)
        columns[f"{NAMES[arm]}, launched"] = of[arm]["x launched"].map("{:.2f}".format)
    return pd.DataFrame(columns).reset_index()


def size(parameters: float) -> str:
    """A number of parameters in two digits: 9.1M, 1.1B."""
    unit, name = (1e9, "B") if parameters >= 1e9 else (1e6, "M")
    number = parameters / unit
    return f"{number:.1f}{name}" if number < 10 else f"{number:.0f}{name}"


def pays_from(found: pd.DataFrame, arm: str, column: str = "x") -> int | None:
    """The least d_model from which on an arm's step is over 2 % faster than dense; None if there is none.

    Args:
        found: rows of `widths`. column: "x", or "x launched".
    """
    part = found[found["arm"] == arm].sort_values("d_model", ascending=False)
    faster = part["d_model"][(part[column] > 1.02).cummin()]
    return int(faster.min()) if len(faster) else None


def speeds(preset: str) -> dict[str, float]:
    """Arm -> a step's times as fast as dense, by the preset's records on `CARD`, each over its own dense."""
    found = RecordStore().widest_last(KIND, device=CARD, preset=preset)
    return {row["arm"]: row["x"] for record in found for row in rows(record)}


def arithmetic(preset: str, sparsity: str) -> dict[str, float]:
    """A step's speed-up by the formula of section 3.2: the "paper" way, and "corrected" (see the module).

    Venom products count as v = 8 times as fast, as in Table 2, 2:4 products as 1.5 times.
    """
    model, c = train_preset(preset).model, SPARSITY_PRESETS[sparsity]
    n24, n_venom = flops.fastest_counts(c)
    shares = (flops.formula_share(model), flops.honest_share(model))
    v = paper.number("venom_speedup_table2")
    steps = [flops.step_speedup(r, v, n24=n24, n_venom=n_venom) for r in shares]
    return dict(zip(WAYS, steps))


def mixes() -> dict[str, float]:
    """Share of sparse steps of every mix in Table 4, and of the 7B run of Table 2."""
    total = sum(paper.number("mix_1b"))
    counts = [row["sparse_steps"] for row in paper.rows(4) if row["sparse_steps"]]
    found = {f"{n // 1000}k of {total // 1000}k": n / total for n in counts}
    sparse, dense = paper.number("mix_7b")
    return found | {f"{sparse // 1000}k of {(sparse + dense) // 1000}k": sparse / (sparse + dense)}


def runs(record: Record) -> list[Row]:
    """One row a sparse arm and way: the step's speed-up and, for each of `mixes`, the run's."""
    measured = {row["arm"]: row["x"] for row in rows(record)}
    table = []
    for name in record.config["sparsity"]:
        steps = arithmetic(record.config["preset"], name) | {"measured": measured[name]}
        for way in WAYS:
            run = {mix: flops.run_speedup(share, steps[way]) for mix, share in mixes().items()}
            table.append({"arm": name, "way": way, "step": steps[way], **run})
    return table


def parts(record: Record) -> list[Row]:
    """One row an arm: milliseconds of the parts of a whole model's step; "rest" is what they leave of it.

    Each part was timed alone at the greatest depth. Layers count n_layer times, the optimiser by the number
    of parameters.
    """
    c, times = record.config, step_times(record)
    deepest = record.results["depths"][str(max(c["layers"]))]
    found, n = deepest["components"], c["n_layer"]
    grown = param_count(train_preset(c["preset"]).model)["total"] / deepest["parameters"]
    table = []
    for name, ffn in found["ffn"].items():
        row = {"attention": n * found["attention"]["ms"], "ffn": n * ffn["ms"]}
        row["head and loss"] = found["head and loss"]["ms"]
        row["optimiser"] = grown * found["optimiser"]["ms"]
        step = times[baseline(times) if name == DENSE else name]["ms"]
        table.append({"arm": name, **row, "rest": step - sum(row.values()), "step": step})
    return table


def table(record: Record) -> str:
    """All of it as plain text."""
    r = record.results
    lines = [f"{record.device}, torch {record.versions.get('torch')}, {record.date}, commit {record.commit}"]
    heads = "".join(f"{name:>10}" for name in ("ms", "x", "launched", "x", "over busy", "peak GiB"))
    lines += [_heading(record), f"{'':22}{heads}  spread"]
    for row in rows(record):
        if "residual" in row:
            note = (
                f"{row['base_ms']:.1f} + {row['layer_ms']:.2f} a layer, off by {row['residual']:.1%} at most"
            )
        else:
            note = f"p10 {row['ms_p10']:.1f}, p90 {row['ms_p90']:.1f}"
        numbers = [row["ms"], row["x"], row["launched"], row["x launched"]]
        numbers += [row["over busy"], row["peak GiB"]] if "peak GiB" in row else []
        cells = "".join(f"{x:10.{3 if x < 10 else 1}f}" for x in numbers)
        lines.append(f"{row['arm']:22}{cells:60}  {note}")
    lines += ["", "parts, each timed alone, ms", f"{'':22}" + "".join(f"{name:>15}" for name in PARTS)]
    for row in parts(record):
        lines.append(f"{row['arm']:22}" + "".join(f"{row[name]:15.1f}" for name in PARTS))
    names = ("step", *mixes())
    lines += ["", "speed-up of a step, and of a run with sparse steps first"]
    lines.append(f"{'':22}{'':12}" + "".join(f"{name:>13}" for name in names))
    for row in runs(record):
        lines.append(f"{row['arm']:22}{row['way']:12}" + "".join(f"{row[name]:13.3f}" for name in names))
    loads = [load for depth in r["depths"].values() for found in depth["load"].values() for load in found]
    if loads:
        lines.append(
            f"busiest cluster over the mean: {np.median(loads):.2f} in the median, {max(loads):.2f} at most"
        )
    return "\n".join(
        lines + [f"attention: {r['attention_used'] or 'as torch chooses'} {_times(r['attention'])}"]
    )


def _heading(record: Record) -> str:
    c = record.config
    train = train_preset(c["preset"])
    text = f"{c['preset']}: a training step of {train.batch_size} x {train.model.seq_len} tokens, bf16, "
    if c["layers"] == [c["n_layer"]]:
        return text + f"all {c['n_layer']} layers"
    depths = ", ".join(map(str, c["layers"]))
    return (
        text
        + f"{c['n_layer']} layers COMPOSED from {depths}: time = a + b layers; peak memory at the deepest"
    )


def _times(found: dict[str, float]) -> str:
    return "(" + ", ".join(f"{name} {ms:.2f} ms" for name, ms in found.items()) + ")" if found else ""
