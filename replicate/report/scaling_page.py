"""What docs/scaling.md shows of the recorded benchmark of several GPUs: tables, and numbers in sentences."""

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
HOST = 8  # GPUs of one host, for which an estimate is made
LARGEST = 141e9  # bytes of an H200


def recorded() -> Record:
    """The newest shipped record of `CARD`, or ValueError."""
    return RecordStore().latest(scale.KIND, device=CARD)


def measured() -> pd.DataFrame:
    """One row a case: GPUs, engine, formats, ms of a step, tokens/s over one GPU's and dense's, memory."""
    rows = pd.DataFrame(scale.rows(recorded()))
    return pd.DataFrame(
        {
            "scale, GPUs": rows["processes"],
            "engine": rows["engine"].map(ENGINES),
            "scale, layers": rows["formats"].replace(NAMES),
            "ms": rows["ms"].map("{:.1f}".format),
            "tokens/s over one GPU's": rows["x one process"].map("{:.2f}".format),
            "tokens/s over dense's": rows["x dense"].map("{:.2f}".format),
            "peak GB of a GPU": rows["GB a process"].map("{:.1f}".format),
        }
    )


def expected() -> pd.DataFrame:
    """One row a model and engine that fits: an estimate of a step on HOST GPUs.

    It is one GPU's step, and what the record's took longer on N GPUs than on one; that grows with the
    parameters and with (N - 1) / N, the share of them that a GPU sends.
    """
    record, rows = recorded(), []
    ms = {(row["processes"], row["engine"], row["formats"]): row["ms"] for row in scale.rows(record)}
    count = record.config["processes"]
    cut = param_count(from_dict(record.config["train"]).model)["total"]
    for model, (preset, _) in step_table.MODELS.items():
        config = train_preset(preset).model
        times = {row["arm"]: row["ms"] for row in step.rows(step_table.recorded(preset))}
        grown = param_count(config)["total"] / cut * ((HOST - 1) / HOST) / ((count - 1) / count)
        for engine in record.config["engines"]:
            if memory(config, 1, HOST, engine)["total"] > LARGEST:
                continue
            on = {a: grown * (ms[count, engine, a] - ms[1, "one process", a]) for a in scale.SPARSITY}
            dense, sparse = (times[a] + on[a] for a in scale.SPARSITY)
            row = {"model": model, "engine": ENGINES[engine], "GPUs": HOST}
            row |= {f"{NAMES[a]}, ms": f"{times[a]:.0f} + {on[a]:.0f}" for a in scale.SPARSITY}
            row["times as fast as dense, one GPU"] = f"{times['dense'] / times['recipe']:.2f}"
            rows.append(row | {f"on {HOST}": f"{dense / sparse:.2f}"})
    return pd.DataFrame(rows)


def tables() -> dict[str, str]:
    """Name -> Markdown of the page's tables."""
    return {"measured": figures.markdown(measured()), "expected": figures.markdown(expected())}


@cache
def values() -> dict[str, str]:
    """Name -> text: "scale ddp recipe", tokens/s over one GPU's; "over dense ddp", the recipe's; others."""
    record = recorded()
    rows = [row for row in scale.rows(record) if row["processes"] > 1]
    found = {f"scale {row['engine']} {row['formats']}": f"{row['x one process']:.2f}" for row in rows}
    sparse = [row for row in scale.rows(record) if row["formats"] != record.config["sparsity"][0]]
    found |= {f"over dense {row['engine']}": f"{row['x dense']:.2f}" for row in sparse}
    times, gains = [row["x one process"] for row in rows], [row["x dense"] for row in sparse if row in rows]
    train = record.config["train"]
    model = from_dict(train).model
    (alone,) = (row for row in step.rows(step_table.recorded("llama1b")) if row["arm"] == "recipe")
    return found | {
        "launching": f"{alone['launched'] / alone['ms'] - 1:.0%}",
        "vocabulary": f"{model.vocab_size * model.d_model / param_count(model)['total']:.0%}",
        "scale": f"{min(times):.2f} to {max(times):.2f}",
        "over dense": f"{min(gains):.2f} to {max(gains):.2f}",
        "scale, GPUs": str(rows[0]["processes"]),
        "scale, layers": str(train["model"]["n_layer"]),
        "scale, tokens a GPU": f"{train['batch_size'] * train['model']['seq_len']:,}",
        "scale, record": f"data/recorded/{record.kind}/{record.config_hash}.json",
    }
