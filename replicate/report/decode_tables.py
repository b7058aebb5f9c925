"""What docs/kernels.md and README.md show of decoding: the recorded `bench generate`."""

from functools import cache

import pandas as pd

from replicate.bench import generate
from replicate.report.layer_tables import NAMES
from replicate.study.records import Record, RecordStore

MODELS = {"7B": "llama7b", "1B": "llama1b"}


def recorded(model: str) -> Record:
    """The latest shipped record of "7B" or "1B". ValueError if there is none."""
    return RecordStore().latest(generate.KIND, preset=MODELS[model])


@cache
def table(model: str) -> pd.DataFrame:
    """One row a sparsity and batch: how many times as fast as dense the FFN and the whole model are.

    "limit": what the bytes of weights allow. "weights used": share of the clusters that any token of the
    batch uses. "prompt": reading 2048 tokens of each text.
    """
    record = recorded(model)
    found = pd.DataFrame(generate.rows(record))
    found = found[found["arm"].isin(record.config["arms"])]
    columns = {
        "batch": "texts at a time",
        "used": "weights used",
        "x limit": "limit",
        "x": "FFN",
        "x step": "whole token",
        "x prefill FFN": "prompt, FFN",
        "x prefill": "prompt, whole",
    }
    shown = found[list(columns)].rename(columns=columns)
    shown["weights used"] = [f"{share:.0%}" for share in shown["weights used"]]
    for name in list(columns.values())[2:]:
        shown[name] = [f"{x:.2f}x" for x in shown[name]]
    shown.insert(0, "times as fast as dense", [NAMES[arm.removesuffix(", same")] for arm in found["arm"]])
    return shown.sort_values("texts at a time", kind="stable").reset_index(drop=True)


@cache
def values() -> dict[str, str]:
    """Name -> text: "decode 7B venom16 1", the FFN's gain by batch; "token 7B venom16 1", a whole token's."""
    out = {}
    for model in MODELS:
        for row in generate.rows(recorded(model)):
            name = f"{model} {row['arm']} {row['batch']}"
            out[f"decode {name}"] = f"{row['x']:.1f} times"
            if "x step" in row:
                out[f"token {name}"] = f"{row['x step']:.1f} times"
                out[f"used {name}"] = f"{row['used']:.0%}"
    return out
