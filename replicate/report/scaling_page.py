"""What docs/scaling.md shows of the recorded benchmark of several GPUs: tables, and numbers in sentences."""

from collections.abc import Iterable
from functools import cache

import pandas as pd

from replicate import figures
from replicate.bench import scale, step
from replicate.report import step_table
from replicate.report.layer_tables import NAMES
from replicate.settings.presets import train_preset
from replicate.settings.text import from_dict
from replicate.study.records import CARD, Record, RecordStore
from replicate.training.flops import param_count
from replicate.training.memory import memory

ENGINES = {"one process": "–", "ddp": "DDP", "fsdp": "FSDP2"}
CUT = 6  # layers of the model that was timed with both numbers of micro-batches
FEW, MANY = 1, 4  # micro-batches a step
HOST = 8  # GPUs of one host, for which an estimate is made
LARGEST = 141e9  # bytes of an H200
Times = dict[tuple[int, str, str], float]


def recorded(layers: int | None = None, micro: int = FEW) -> Record:
    """The newest shipped record of `CARD` with these, by default of the whole 1B model, or ValueError."""
    layers = layers or train_preset("llama1b").model.n_layer
    found = [
        record for record in RecordStore().widest_last(scale.KIND, device=CARD)
        if (_layers(record), _micro(record)) == (layers, micro)
    ]  # fmt: skip
    if not found:
        raise ValueError(f"no {scale.KIND} of {layers} layers and {micro} micro-batches is shipped ({CARD})")
    return max(found, key=lambda record: record.date)


def all_recorded() -> list[Record]:
    """The records that the page shows: the cut model, one micro-batch and more, then the whole one."""
    return [recorded(CUT), recorded(CUT, MANY), recorded()]


def measured() -> pd.DataFrame:
    """One row a case: layers, micro-batches, GPUs, engine, formats, time, tokens/s over others', memory."""
    found = []
    for record in all_recorded():
        rows = pd.DataFrame(scale.rows(record))
        columns = {
            "layers": _layers(record), "micro-batches": _micro(record), "GPUs": rows["processes"],
            "engine": rows["engine"].map(ENGINES), "formats": rows["formats"].replace(NAMES),
            "ms": rows["ms"].map("{:.1f}".format),
            "tokens/s over one GPU's": rows["x one process"].map("{:.2f}".format),
            "tokens/s over dense's": rows["x dense"].map("{:.2f}".format),
            "peak GB of a GPU": rows["GB a process"].map("{:.1f}".format),
        }  # fmt: skip
        found.append(pd.DataFrame(columns))
    return pd.concat(found)


def added() -> pd.DataFrame:
    """One row an engine and formats: what a step of the cut model takes longer on several GPUs, in parts.

    `once` + m `each` ms with m micro-batches, solved from the two that were timed.
    """
    few, many = (_added(recorded(CUT, micro)) for micro in (FEW, MANY))
    rows = []
    for (count, engine, arm), ms in few.items():
        each = (many[count, engine, arm] - ms) / (MANY - FEW)
        row = {"engine": ENGINES[engine], "formats": NAMES[arm], f"ms, {FEW} micro-batch": ms}
        row |= {f"ms, {MANY} micro-batches": many[count, engine, arm]}
        rows.append(row | {"once a step, ms": ms - FEW * each, "each micro-batch, ms": each})
    return pd.DataFrame(rows)


def expected() -> pd.DataFrame:
    """One row a model and engine that fits: an estimate of a step on HOST GPUs.

    It is one GPU's step, of 7B as chapter 10 composes it, and what the whole 1B model's took longer on N
    GPUs than on one; that grows with the parameters and with (N - 1) / N, the share that a GPU sends.
    """
    record, rows = recorded(), []
    count, more = record.config["processes"], _added(record)
    timed = param_count(from_dict(record.config["train"]).model)["total"]
    alone = {row["formats"]: row["ms"] for row in scale.rows(record) if row["processes"] == 1}
    for model, (preset, _) in step_table.MODELS.items():
        config = train_preset(preset).model
        times = alone if record.config["preset"] == preset else _on_one_gpu(preset)
        grown = param_count(config)["total"] / timed * ((HOST - 1) / HOST) / ((count - 1) / count)
        for engine in record.config["engines"]:
            if memory(config, 1, HOST, engine)["total"] > LARGEST:
                continue
            on = {arm: grown * more[count, engine, arm] for arm in scale.SPARSITY}
            dense, sparse = (times[arm] + on[arm] for arm in scale.SPARSITY)
            row = {"model": model, "engine": ENGINES[engine], "GPUs": HOST}
            row |= {f"{NAMES[a]}, ms": f"{times[a]:.0f} + {on[a]:.0f}" for a in scale.SPARSITY}
            row["times as fast as dense, one GPU"] = f"{times['dense'] / times['recipe']:.2f}"
            rows.append(row | {f"on {HOST}": f"{dense / sparse:.2f}"})
    return pd.DataFrame(rows)


def tables() -> dict[str, str]:
    """Name -> Markdown of the page's tables."""
    found = {"measured": measured(), "added": _shown(added()), "expected": expected()}
    return {name: figures.markdown(table) for name, table in found.items()}


@cache
def values() -> dict[str, str]:
    """Name -> text: "scale" of the whole model and "scale 6 x 4", tokens/s over one GPU's; and others."""
    found = {}
    for record in all_recorded():
        name = "scale" if record == recorded() else f"scale {_layers(record)} x {_micro(record)}"
        rows = [row for row in scale.rows(record) if row["processes"] > 1]
        found[name] = _range(row["x one process"] for row in rows)
        for engine in record.config["engines"]:
            of_engine = (row["x one process"] for row in rows if row["engine"] == engine)
            found[f"{name} {engine}"] = _range(of_engine)
    record = recorded()
    sparse = [row for row in scale.rows(record) if row["formats"] != record.config["sparsity"][0]]
    found |= {f"over dense {row['engine']}": f"{row['x dense']:.2f}" for row in sparse}
    found["over dense"] = _range(row["x dense"] for row in sparse if row["processes"] > 1)
    train, cut = (from_dict(r.config["train"]) for r in (record, recorded(CUT)))
    whole, part = (param_count(c.model)["total"] for c in (train, cut))
    more, less = _added(record), _added(recorded(CUT))
    (graph,) = (row for row in step.rows(step_table.recorded("llama1b")) if row["arm"] == "recipe")
    return found | {
        "launching": f"{graph['launched'] / graph['ms'] - 1:.0%}",
        "vocabulary, cut": f"{cut.model.vocab_size * cut.model.d_model / part:.0%}",
        "vocabulary": f"{train.model.vocab_size * train.model.d_model / whole:.0%}",
        "parameters grow": f"{whole / part:.1f}",
        "added grows": _range((more[case] / less[case] for case in more), 1),
        "scale, GPUs": str(record.config["processes"]),
        "scale, layers": str(_layers(record)),
        "scale, cut": str(CUT),
        "scale, tokens a GPU": f"{train.batch_size * train.model.seq_len:,}",
    }


def _layers(record: Record) -> int:
    return record.config["train"]["model"]["n_layer"]


def _micro(record: Record) -> int:
    return record.config["train"]["grad_accum"]


def _on_one_gpu(preset: str) -> dict[str, float]:
    return {row["arm"]: row["ms"] for row in step.rows(step_table.recorded(preset))}


def _added(record: Record) -> Times:
    """By processes, engine and formats: the ms that a step takes longer than one process's."""
    ms = {(row["processes"], row["engine"], row["formats"]): row["ms"] for row in scale.rows(record)}
    return {case: t - ms[1, "one process", case[2]] for case, t in ms.items() if case[0] > 1}


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    return table.apply(lambda column: column.map("{:.1f}".format) if column.dtype.kind == "f" else column)


def _range(numbers: Iterable[float], digits: int = 2) -> str:
    low, high = (f"{f(numbers):.{digits}f}" for numbers in [list(numbers)] for f in (min, max))
    return low if low == high else f"{low} to {high}"
