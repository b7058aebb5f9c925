"""What docs/scaling.md shows of the recorded benchmark of several GPUs: tables, and numbers in sentences."""

from functools import cache

import pandas as pd

from replicate import figures
from replicate.bench import scale, step
from replicate.report import step_table
from replicate.report.layer_tables import NAMES
from replicate.settings.presets import train_preset
from replicate.study.records import CARD, Record, RecordStore
from replicate.training.flops import param_count

ENGINES = {"one process": "–", "ddp": "DDP", "fsdp": "FSDP2"}
SENT = {
    "ddp": 8,
    "fsdp": 12,
}  # bytes a parameter that a GPU sends in a step of one micro-batch, of N - 1 in N
# GPUs -> GB/s that one of them sends, by their makers: NVLink of an H100; 400 Gbit/s each between hosts
LINKS = {8: 450, 64: 50}


def recorded() -> Record:
    """The newest shipped record of `CARD`, or ValueError."""
    return RecordStore().latest(scale.KIND, device=CARD)


def measured() -> pd.DataFrame:
    """One row a case: GPUs, engine, formats, ms of a step, tokens/s over one GPU's and dense's, memory."""
    rows = pd.DataFrame(scale.rows(recorded()))
    return pd.DataFrame(
        {
            "GPUs": rows["processes"],
            "engine": rows["engine"].map(ENGINES),
            "layers": rows["formats"].replace(NAMES),
            "ms": rows["ms"].map("{:.1f}".format),
            "tokens/s over one GPU's": rows["x one process"].map("{:.2f}".format),
            "tokens/s over dense's": rows["x dense"].map("{:.2f}".format),
            "peak GB of a GPU": rows["GB a process"].map("{:.1f}".format),
        }
    )


def expected() -> pd.DataFrame:
    """One row a model, engine and number of GPUs: ms that weights and gradients travel, and bounds of a step.

    The lower bound hides all of what travels behind one GPU's measured step, the upper one nothing.
    """
    rows = []
    for model, (preset, _) in step_table.MODELS.items():
        parameters = param_count(train_preset(preset).model)["total"]
        times = {row["arm"]: row["ms"] for row in step.rows(step_table.recorded(preset))}
        for engine, sent in SENT.items():
            for count, speed in LINKS.items():
                travels = 1e3 * sent * parameters * (count - 1) / count / (1e9 * speed)
                row = {"model": model, "engine": ENGINES[engine], "GPUs": count}
                row["travels, ms"] = f"{travels:.0f}"
                for arm in scale.SPARSITY:
                    ms = times[arm]
                    row[f"step, {NAMES[arm]}, ms"] = f"{max(ms, travels):.0f} to {ms + travels:.0f}"
                rows.append(row)
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
    times = [row["x one process"] for row in rows]
    train = record.config["train"]
    return found | {
        "scale": f"{min(times):.2f} to {max(times):.2f}",
        "GPUs": str(rows[0]["processes"]),
        "layers": str(train["model"]["n_layer"]),
        "tokens a GPU": f"{train['batch_size'] * train['model']['seq_len']:,}",
        "record": f"data/recorded/{record.kind}/{record.config_hash}.json",
    }
