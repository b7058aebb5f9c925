"""The step benchmark's record as tables: widths, parts of a step, and speed-ups of runs.

A run's speed-up is given three ways: by the paper's arithmetic, by the same arithmetic with two FFN matrices,
causal attention and the vocabulary head counted, and from the measured step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from replicate import paper
from replicate.bench.step import KIND, PAPERS, baseline, rows, step_times
from replicate.bench.step_cases import DENSE
from replicate.report import kernel_tables, layer_tables
from replicate.report.layer_tables import NAMES
from replicate.settings.presets import SPARSITY_PRESETS, WIDTHS, train_preset
from replicate.study.records import Record, RecordStore
from replicate.training import flops
from replicate.training.flops import param_count

CARD = "NVIDIA H100 80GB HBM3"  # whose steps the tables show
AT_WIDTHS = ("venom16", "recipe", "active16x32")  # timed at every width, 4 of 16 each
WAYS = ("paper", "corrected", "measured")
MODELS = {"1B": ("llama1b", 2048), "7B": ("llama7b", 4096)}  # name -> preset of its step, d_model
Row = dict[str, Any]


def recorded(preset: str, timed: Sequence[str] = PAPERS) -> Record:
    """The latest shipped record of a preset's step on `CARD` that has timed these arms, or ValueError.

    Not of a residual stream in bfloat16, which is a setting of its own.
    """
    return RecordStore().latest(KIND, timed=timed, device=CARD, preset=preset, residual=None)


def fp8_record() -> Record:
    """The newest record of the 1B step that timed `layer_tables.FP8` together, on the card of the layers."""
    found = {"device": layer_tables.CARD, "preset": MODELS["1B"][0], "residual": None}
    return RecordStore().latest(KIND, timed=layer_tables.FP8, **found)


def fp8_values() -> dict[str, str]:
    """Name -> a 1B step, times as fast as dense in bf16, by `fp8_record`; "step FP8 gains" over itself."""
    x = {row["arm"]: row["x"] for row in rows(fp8_record())}
    dense, in_bf16, in_fp8 = (x[arm] for arm in layer_tables.FP8)
    found = {"dense": dense, "venom16": in_bf16, "venom16, fp8": in_fp8, "gains": in_fp8 / in_bf16}
    return {f"step FP8 {name}": f"{times:.2f}" for name, times in found.items()}


def widths() -> pd.DataFrame:
    """One row a width of `presets.WIDTHS` and arm: parameters and the columns of `bench.step.rows`."""
    table: list[Row] = []
    for d_model, record in zip(WIDTHS, width_records(), strict=True):
        total = param_count(train_preset(record.config["preset"]).model)["total"]
        table += [{"d_model": d_model, "parameters": total, **row} for row in rows(record)]
    return pd.DataFrame(table)


def width_records() -> list[Record]:
    """The record of every width, or ValueError."""
    return [recorded(f"width{d_model}", AT_WIDTHS) for d_model in WIDTHS]


def width_table(found: pd.DataFrame) -> pd.DataFrame:
    """`widths`, one row a width: parameters, ms of the dense step, how many times as fast an arm's is."""
    of = {arm: part.set_index("d_model") for arm, part in found.groupby("arm")}
    dense = of[DENSE]
    columns = {"parameters": dense["parameters"].map(size), "dense, ms": dense["ms"].map("{:.1f}".format)}
    for arm in AT_WIDTHS:
        columns[NAMES[arm]] = of[arm]["x"].map("{:.2f}".format)
        columns[f"{NAMES[arm]}, launched"] = of[arm]["x launched"].map("{:.2f}".format)
    return pd.DataFrame(columns).reset_index()


def size(parameters: float) -> str:
    """A number of parameters in two digits: 9.1M, 1.1B."""
    number, unit = (parameters / 1e9, "B") if parameters >= 1e9 else (parameters / 1e6, "M")
    return f"{number:.{int(number < 10)}f}{unit}"


def pays_from(found: pd.DataFrame, arm: str, column: str = "x") -> int | None:
    """The least d_model of `widths` from which on an arm's step is over 2 % faster than dense, if any."""
    part = found[found["arm"] == arm].sort_values("d_model", ascending=False)
    faster = part["d_model"][(part[column] > 1.02).cummin()]
    return int(faster.min()) if len(faster) else None


def speeds(preset: str) -> dict[str, float]:
    """Arm -> a step's times as fast as dense, by the preset's records on `CARD`, each over its own dense."""
    found = RecordStore().widest_last(KIND, device=CARD, preset=preset, residual=None)
    return {row["arm"]: row["x"] for record in found for row in rows(record)}


def speed_ranges(preset: str) -> dict[str, tuple[float, float]]:
    """Arm -> least and greatest times as fast as dense that the timings of `speeds` allow.

    Over all records of the step, each with its own spread: from the fast dense steps (10th percentile) over
    the arm's slow ones (90th) to the reverse; of a composed step, as far off the line as its depths are.
    """
    out: dict[str, tuple[float, float]] = {}
    for record in RecordStore().widest_last(KIND, device=CARD, preset=preset, residual=None):
        times = step_times(record)
        fast, slow = _extremes(times[baseline(times)])
        for arm, row in times.items():
            low, high = _extremes(row)
            known = out.get(arm, (fast / high, slow / low))
            out[arm] = min(known[0], fast / high), max(known[1], slow / low)
    return out


def _extremes(row: Row) -> tuple[float, float]:
    off = row["ms"] * row.get("residual", 0)
    return row.get("ms_p10", row["ms"] - off), row.get("ms_p90", row["ms"] + off)


def arithmetic(preset: str, sparsity: str) -> dict[str, float]:
    """A step's speed-up by the formula of section 3.2: the "paper" way, and "corrected" (see the module).

    Venom products count as v = 8 times as fast, as in Table 2, 2:4 products as 1.5 times.
    """
    model, v = train_preset(preset).model, paper.number("venom_speedup_table2")
    n24, n_venom = flops.sparse_counts(SPARSITY_PRESETS[sparsity])
    shares = (flops.formula_share(model), flops.honest_share(model))
    return dict(zip(WAYS, (flops.step_speedup(r, v, n24=n24, n_venom=n_venom) for r in shares)))


def mixes() -> dict[str, float]:
    """Share of sparse steps of every mix in Table 4, and of the 7B run of Table 2."""
    total = sum(paper.number("mix_1b"))
    counts = [row["sparse_steps"] for row in paper.rows(4) if row["sparse_steps"]]
    found = {f"{n // 1000}k of {total // 1000}k": n / total for n in counts}
    sparse, dense = paper.number("mix_7b")
    return found | {f"{sparse // 1000}k of {(sparse + dense) // 1000}k": sparse / (sparse + dense)}


def table4_mixes() -> list[str]:
    """Those of `mixes` that Table 4 has, the least sparse first."""
    total = sum(paper.number("mix_1b")) // 1000
    return [mix for mix in mixes() if mix.endswith(f" of {total}k")]


def runs(record: Record) -> list[Row]:
    """One row a sparse arm and way: the step's speed-up and, for each of `mixes`, the run's."""
    measured, table = {row["arm"]: row["x"] for row in rows(record)}, []
    for name in record.config["sparsity"]:
        steps = arithmetic(record.config["preset"], name) | {"measured": measured[name]}
        for way, step in steps.items():
            run = {mix: flops.run_speedup(share, step) for mix, share in mixes().items()}
            table.append({"arm": name, "way": way, "step": step, **run})
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


def models() -> dict[str, Record]:
    """Name of a model, 1B and 7B, -> the record of its step."""
    return {label: recorded(preset) for label, (preset, _) in MODELS.items()}


def sparse_speeds(records: Mapping[str, Record]) -> dict[str, dict[str, float]]:
    """Model -> sparse arm -> a step's times as fast as dense, arms in the record's order."""
    out = {}
    for label, record in records.items():
        x = {row["arm"]: row["x"] for row in rows(record)}
        out[label] = {arm: x[arm] for arm in record.config["sparsity"]}
    return out


def layer_speeds(records: Mapping[str, Record]) -> dict[str, dict[str, float]]:
    """Model -> sparse arm -> the FFN layer's times as fast as dense, on `CARD`."""
    found = kernel_tables.recorded(kernel_tables.LAYER, device=CARD)
    by_arm = {m: layer_tables.layer(found, MODELS[m][1]).set_index("arm")["x"] for m in records}
    return {label: speeds.to_dict() for label, speeds in by_arm.items()}


def steps(records: Mapping[str, Record]) -> pd.DataFrame:
    """One row a model and format: milliseconds of a step, how well they are known, speed, memory."""
    table = []
    for label, record in records.items():
        found = {row["arm"]: row for row in rows(record)}
        for arm in (DENSE, "dense, in one piece", *record.config["sparsity"]):
            row = found[arm]
            how = f"p10 {row['ms_p10']:.1f}, p90 {row['ms_p90']:.1f}" if "ms_p10" in row else ""
            if "residual" in row:
                how = f"{row['base_ms']:.1f} + {row['layer_ms']:.2f} a layer, within {row['residual']:.1%}"
            entry = {"model": label, "format": NAMES.get(arm, arm), "ms a step": row["ms"], "how": how}
            entry |= {"times as fast": row["x"], "peak GiB": row["peak GiB"], "launched": row["x launched"]}
            table.append(entry)
    return pd.DataFrame(table)


def shares(records: Mapping[str, Record]) -> pd.DataFrame:
    """One row a model: the FFN's share of the FLOPs by two counts and of the time, and attention's."""
    table = {}
    for label, record in records.items():
        row, model = next(row for row in parts(record) if row["arm"] == DENSE), paper.model(label)
        table[label] = {
            "FLOPs, the paper's formula": flops.formula_share(model),
            "FLOPs, complete count": flops.honest_share(model),
            "time, measured": row["ffn"] / row["step"],
            "time of attention": row["attention"] / row["step"],
        }
    return pd.DataFrame(table).T.rename_axis("model")


def law(records: Mapping[str, Record]) -> pd.DataFrame:
    """One row a format: at each model the layer's speed, the step's by Amdahl's law, and the measured one."""
    speed, layer, share = sparse_speeds(records), layer_speeds(records), shares(records)["time, measured"]
    names = next(iter(speed.values()))
    table: dict[str, list[Any]] = {"format": [NAMES[arm] for arm in names]}
    for label in records:
        table[f"{label}: layer"] = [layer[label][arm] for arm in names]
        by_law = [flops.run_speedup(share[label], layer[label][arm]) for arm in names]
        table |= {f"{label}: step by the law": by_law}
        table[f"{label}: step measured"] = [speed[label][arm] for arm in names]
    return pd.DataFrame(table)


def three_ways(records: Mapping[str, Record]) -> pd.DataFrame:
    """`runs` of every model, formats by name."""
    found = [{"model": label, **row} for label, record in records.items() for row in runs(record)]
    return pd.DataFrame(found).replace({"arm": NAMES}).rename(columns={"arm": "format"})
