"""From the records of a study to its tables: one row a run, paired differences between arms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from replicate import measure, study
from replicate.config import TrainConfig, config_hash, from_dict
from replicate.records import Record, RecordStore

Run = tuple[Record, str]


def frame(runs: Iterable[Run]) -> pd.DataFrame:
    """One row a run: arm, seed, losses in nats, natural and kept sparsity of the last statistics, origin.

    `arm` is the name without the seed, as progress lines show it; `record` is the record itself.
    """
    rows = []
    for record, origin in runs:
        config = from_dict(record.config)
        last = (record.results.get("stats") or [{}])[-1]
        rows.append(
            {
                "arm": study.describe(config).rsplit(" seed ", 1)[0],
                "seed": config.seed,
                "share": config.sparse_share,
                "order": config.order,
                "final_loss": record.results["final_loss"],
                "valid_loss": record.results["valid_loss"],
                "y2_sparsity": _mean(last.get("y2_sparsity")),
                "kept_sparsity": _mean(last.get("kept_sparsity")),
                "origin": origin,
                "record": record,
            }
        )
    return pd.DataFrame(rows)


def differences(
    runs: pd.DataFrame, base: str = "dense", column: str = "valid_loss", arms: Sequence[str] | None = None
) -> dict[str, measure.Stats]:
    """arm -> statistics over seeds of (arm - base), paired by seed, for each arm (or `arms`) but the base.

    Args:
        runs: from `frame`. base: the arm to subtract. column: what to compare.

    Raises:
        ValueError: an arm is missing, or has other seeds than the base.
    """
    values = {name: part.set_index("seed")[column] for name, part in runs.groupby("arm", sort=False)}
    out = {}
    for name in arms or [n for n in values if n != base]:
        if name not in values or base not in values:
            raise ValueError(f"no runs of {name!r} or of {base!r}; there are {', '.join(values)}")
        if set(values[name].index) != set(values[base].index):
            raise ValueError(
                f"{name} has seeds {sorted(values[name].index)}, {base} {sorted(values[base].index)}"
            )
        seeds = sorted(values[name].index)
        out[name] = measure.paired(values[name].loc[seeds].tolist(), values[base].loc[seeds].tolist())
    return out


def recorded(configs: Iterable[TrainConfig], store: RecordStore | None = None) -> list[Run]:
    """Those of `configs` that data/recorded or this computer's cache holds; trains nothing.

    For showing a larger study, measured on a GPU, beside what a notebook has just run.
    """
    store = store or RecordStore()
    unique = {config_hash(config): config for config in configs}
    return [found for config in unique.values() if (found := store.find("train", config))]


def origins(runs: pd.DataFrame) -> str:
    """One line that says where the runs come from: "12 fresh", "9 recorded on NVIDIA H200, 3 cached"."""
    parts = []
    for origin, part in runs.groupby("origin"):
        devices = sorted({record.device for record in part["record"]})
        parts.append(f"{len(part)} {origin}" + (f" on {', '.join(devices)}" if origin == "recorded" else ""))
    return ", ".join(parts) or "none"


def series(record: Record, key: str) -> list[tuple[int, float]]:
    """(step, mean over layers) of a statistic, such as "y2_sparsity", over a run."""
    return [(row["step"], _mean(row[key])) for row in record.results["stats"] if row.get(key) is not None]


def _mean(values: Any) -> float | None:
    """Mean of a list, or of a dictionary's values; None for nothing."""
    if values is None or values == [] or values == {}:
        return None
    flat = list(values.values()) if isinstance(values, dict) else values
    return sum(flat) / len(flat) if isinstance(flat, list) else float(flat)
