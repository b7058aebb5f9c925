"""What docs/scaling.md shows of the recorded benchmarks of two GPUs: tables, and numbers in sentences."""

from collections.abc import Iterable
from functools import cache

import pandas as pd

from replicate import figures
from replicate.bench import scale, step
from replicate.config import ModelConfig, TrainConfig
from replicate.report import step_table
from replicate.report.layer_tables import NAMES
from replicate.settings.presets import train_preset
from replicate.settings.text import from_dict
from replicate.study.records import CARD, Record, RecordStore
from replicate.training.flops import param_count
from replicate.training.memory import memory

ENGINES = {"one process": "–", "ddp": "DDP", "fsdp": "FSDP2"}
PRESET, GPUS = "llama1b", 2
CUT = 6  # layers of the model that was timed with both numbers of micro-batches
FEW, MANY = 1, 4  # micro-batches a step
HOST = 8  # GPUs of one host, for which an estimate is made
LARGEST = 141e9  # bytes of an H200
Times = dict[tuple[str, str], float]  # by engine and formats


def recorded(layers: int | None = None, micro: int = FEW, store: RecordStore | None = None) -> Record:
    """The newest shipped record of `CARD` with these, by default of the whole 1B model, or ValueError."""
    whole = train_preset(PRESET)
    asked = layers or whole.model.n_layer, micro, whole.batch_size
    cases = {"sparsity": list(scale.SPARSITY), "engines": list(scale.ENGINES), "processes": GPUS}
    found = (store or RecordStore()).widest_last(scale.KIND, device=CARD, preset=PRESET, **cases)
    fits = [r for r in found if (_layers(r), _micro(r), _train(r).batch_size) == asked]
    if not fits:
        raise ValueError(
            f"no {scale.KIND} of {PRESET} with {asked[0]} layers, {micro} micro-batches and {GPUS} GPUs is "
            f"shipped ({CARD})"
        )
    return max(fits, key=lambda record: record.date)


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
    return pd.concat(found, ignore_index=True)


def added() -> pd.DataFrame:
    """One row an engine and formats: what a step of the cut model takes longer on two GPUs, in parts.

    `once` + m `each` ms with m micro-batches, solved from the two that were timed.
    """
    few, many = (_added(recorded(CUT, micro)) for micro in (FEW, MANY))
    rows = []
    for (engine, arm), ms in few.items():
        each = (many[engine, arm] - ms) / (MANY - FEW)
        row = {"engine": ENGINES[engine], "formats": NAMES[arm], f"ms, {FEW} micro-batch": ms}
        row |= {f"ms, {MANY} micro-batches": many[engine, arm]}
        rows.append(row | {"once a step, ms": ms - FEW * each, "each micro-batch, ms": each})
    return pd.DataFrame(rows)


def fixed() -> Times:
    """The ms of what a step takes longer on two GPUs that no layer adds: a line through two depths, at 0."""
    less, more = _added(recorded(CUT)), _added(recorded())
    depth = _layers(recorded())
    return {case: ms - CUT * (more[case] - ms) / (depth - CUT) for case, ms in less.items()}


def expected() -> pd.DataFrame:
    """One row a model and engine that fits: an estimate of a step on HOST GPUs.

    It is one GPU's step, of 7B as chapter 10 composes it, and what the whole 1B model's took longer on two
    GPUs than on one, mean of formats, which all send the same bytes. That grows with the parameters and with
    (N - 1) / N, the share that one of N GPUs sends. Memory is the formula's, by as much less as was measured.
    """
    record, rows = recorded(), []
    timed, more = _train(record), _added(record)
    cases = {(row["engine"], row["formats"]): row for row in scale.rows(record)}
    for model, (preset, _) in step_table.MODELS.items():
        config = train_preset(preset).model
        alone = {arm: cases["one process", arm]["ms"] for arm in scale.SPARSITY}
        times = alone if preset == PRESET else _on_one_gpu(preset)
        grown = param_count(config)["total"] / param_count(timed.model)["total"]
        sent = (HOST - 1) / HOST / ((GPUS - 1) / GPUS)
        for engine in scale.ENGINES:
            measured = cases[engine, scale.SPARSITY[0]]["GB a process"]
            size = _formula(timed, HOST, engine, config) * measured / _formula(timed, GPUS, engine)
            if size * 1e9 > LARGEST:
                continue
            on = grown * sent * sum(more[engine, arm] for arm in scale.SPARSITY) / len(scale.SPARSITY)
            row = {"model": model, "engine": ENGINES[engine], "GPUs": HOST}
            row |= {f"{NAMES[arm]}, ms": f"{times[arm]:.0f} + {on:.0f}" for arm in scale.SPARSITY}
            row["dense, peak GB of a GPU"] = f"{size:.0f}"
            dense, sparse = (times[arm] for arm in scale.SPARSITY)
            row["times as fast as dense, one GPU"] = f"{dense / sparse:.2f}"
            rows.append(row | {f"on {HOST}": f"{(dense + on) / (sparse + on):.2f}"})
    return pd.DataFrame(rows)


def tables() -> dict[str, str]:
    """Name -> Markdown of the page's tables."""
    parts = added()
    for column in parts.columns[2:]:
        parts[column] = parts[column].map("{:.0f}".format)
    found = {"measured": measured(), "added": parts, "expected": expected()}
    return {name: figures.markdown(table) for name, table in found.items()}


@cache
def values() -> dict[str, str]:
    """Name -> text: "scale", the whole model's tokens/s over one GPU's, "scale, cut x 4 ddp"; and others."""
    record, cut, many = recorded(), recorded(CUT), recorded(CUT, MANY)
    train, less, more = _train(record), _added(cut), _added(record)
    whole, part = (param_count(_train(r).model)["total"] for r in (record, cut))
    line, (dense, _) = fixed(), scale.SPARSITY
    gains = {row["engine"]: row["x dense"] for row in scale.rows(record) if row["formats"] != dense}
    found = {f"over dense {engine}": f"{gain:.2f}" for engine, gain in gains.items()}
    for engine in scale.ENGINES:
        times = (row["x one process"] for row in _on_two(many) if row["engine"] == engine)
        found[f"scale, cut x {MANY} {engine}"] = _range(times)
    scatter = [case["ms_p90"] - case["ms_p10"] for r in (cut, many) for case in r.results["cases"]]
    return found | {
        "over dense": _range(gains[engine] for engine in scale.ENGINES),
        "scale": _range(row["x one process"] for row in _on_two(record)),
        "scale, cut": _range(row["x one process"] for row in _on_two(cut)),
        "scatter": _range(scatter, 0),
        "vocabulary, cut": f"{train.model.vocab_size * train.model.d_model / part:.0%}",
        "vocabulary": f"{train.model.vocab_size * train.model.d_model / whole:.0%}",
        "parameters grow": f"{whole / part:.1f}",
        "added grows": _range((more[case] / less[case] for case in more), 1),
        "fixed": _range(line.values(), 0),
        "fixed, of the cut": _range((100 * line[case] / less[case] for case in line), 0),
        "fixed, of the whole": _range((100 * line[case] / more[case] for case in line), 0),
        "formula": f"{_formula(train, GPUS, 'ddp'):.0f}",
        "peak": f"{next(row['GB a process'] for row in _on_two(record) if row['engine'] == 'ddp'):.0f}",
        "scale, GPUs": str(GPUS),
        "scale, layers": str(_layers(record)),
        "layers, cut": str(CUT),
        "scale, tokens a GPU": f"{train.batch_size * train.model.seq_len:,}",
    }


def _train(record: Record) -> TrainConfig:
    return from_dict(record.config["train"])


def _layers(record: Record) -> int:
    return record.config["train"]["model"]["n_layer"]


def _micro(record: Record) -> int:
    return record.config["train"]["grad_accum"]


def _on_two(record: Record) -> list[scale.Row]:
    return [row for row in scale.rows(record) if row["processes"] > 1]


def _added(record: Record) -> Times:
    """By engine and formats: the ms that a step takes longer than one process's."""
    rows = scale.rows(record)
    alone = {row["formats"]: row["ms"] for row in rows if row["processes"] == 1}
    return {(row["engine"], row["formats"]): row["ms"] - alone[row["formats"]] for row in _on_two(record)}


def _on_one_gpu(preset: str) -> dict[str, float]:
    return {row["arm"]: row["ms"] for row in step.rows(step_table.recorded(preset))}


def _formula(train: TrainConfig, processes: int, engine: str, model: ModelConfig | None = None) -> float:
    """GB of a GPU by `memory`, of a model's step with `train`'s micro-batch."""
    return memory(model or train.model, train.batch_size, processes, engine)["total"] / 1e9


def _range(numbers: Iterable[float], digits: int = 2) -> str:
    numbers = list(numbers)
    low, high = (f"{end(numbers):.{digits}f}" for end in (min, max))
    return low if low == high else f"{low} to {high}"
