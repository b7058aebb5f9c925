"""What docs/kernels.md, README.md and notebook 13 show of decoding: the recorded `bench generate`."""

from functools import cache
from typing import Any

import pandas as pd

from replicate.bench import generate
from replicate.paper.table import CheckRow, judged
from replicate.paper.verdicts import Claim
from replicate.report import decoding
from replicate.report.kernel_plots import PEAK_DENSE
from replicate.report.layer_tables import NAMES
from replicate.settings.presets import train_preset
from replicate.study.records import Record, RecordStore

MODELS = {"7B": "llama7b", "1B": "llama1b"}
FEW = 8  # texts at a time, of which hardly a cluster is left out
WHOLE, PACKED = "venom16", "recipe, same"  # 4 of 16 by the router, with whole weights and with 2:4 ones
NEAR = 0.03  # the share of touched clusters may be this far from its expectation


def recorded(model: str) -> Record:
    """The latest shipped record of "7B" or "1B". ValueError if there is none."""
    return RecordStore().latest(generate.KIND, preset=MODELS[model])


@cache
def table(model: str) -> pd.DataFrame:
    """One row a sparsity and batch: how many times as fast as dense the FFN and the whole model are.

    "limit": what the bytes of weights allow. "clusters used": share of the clusters that any token of the
    batch uses. "prompt": reading 2048 tokens of each text.
    """
    record = recorded(model)
    found = pd.DataFrame(generate.rows(record))
    found = found[found["arm"].isin(record.config["arms"])]
    columns = {
        "batch": "texts at a time",
        "used": "clusters used",
        "x limit": "limit",
        "x": "FFN",
        "x step": "whole token",
        "x prefill FFN": "prompt, FFN",
        "x prefill": "prompt, whole",
    }
    shown = found[list(columns)].rename(columns=columns)
    shown["clusters used"] = [f"{share:.0%}" for share in shown["clusters used"]]
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


@cache
def chapter_values() -> dict[str, str]:
    """Name -> text of the numbers of notebook 13 that `values` does not have, mostly with "7B" or "1B"."""
    out = {}
    for model, preset in MODELS.items():
        record, shape, at = recorded(model), train_preset(preset).model, numbers(model)
        prompt, bandwidth = record.config["prompt"], record.results["bandwidth"]
        cost = decoding.ffn_cost(shape.d_model, shape.d_ff, 1)
        out[f"decoding on {model}"] = record.device
        out[f"copy {model}"] = f"{bandwidth / 1e12:.2f} TB/s"
        out[f"ridge {model}"] = f"{1e12 * PEAK_DENSE / bandwidth:.0f}"
        out[f"dense token {model}"] = f"{1e3 * generate.fastest(record.results['ffn']['1']['decode']):.0f} µs"
        out[f"least token {model}"] = f"{cost.microseconds(bandwidth)[0]:.0f} µs"
        out[f"KV text {model}"] = f"{decoding.kv_bytes(shape, prompt) / 2**30:.2f} GiB"
        ffns = cost.bytes * shape.n_layer
        out[f"FFN share {model}"] = f"{100 * ffns / decoding.weight_bytes(shape):.0f} %"
        dense, gain = at.loc[(1, generate.DENSE)], at.loc[(1, WHOLE), "x"]
        fastest = generate.fastest(record.results["ffn"]["1"]["decode"])
        part = (
            shape.n_layer * fastest / (dense["x step"] * dense["step ms"])
        )  # of the mean of two dense steps
        out[f"FFN time {model}"] = f"{100 * part:.0f} %"
        out[f"Amdahl {model}"] = f"{1 / (1 - part + part / gain):.2f}"
        for (batch, arm), row in at.iterrows():
            name = f"{model} {arm} {batch}"
            out[f"of bandwidth {name}"] = f"{100 * row['of limit']:.0f} %"
            out[f"touched {name}"] = f"{100 * row['used']:.0f} %"
            out[f"times {name}"] = f"{row['x']:.2f}"
            if arm in (generate.DENSE, *record.config["arms"]):
                out[f"step times {name}"] = f"{row['x step']:.2f}"
                out[f"FFN of prompt {name}"] = f"{row['x prefill FFN']:.2f}"
                out[f"prompt {name}"] = f"{row['x prefill']:.2f}"
                out[f"weights {model} {arm}"] = f"{row['weights GiB']:.1f} GiB"
        packed = at.loc[(1, PACKED), "FFN us"] / at.loc[(1, WHOLE), "FFN us"]
        out[f"2:4 over whole {model}"] = f"{packed:.2f}"
    config = generate.ARMS[WHOLE]
    share = decoding.share_touched(config.top_k, config.n_clusters, FEW)
    return out | {"expected touched": f"{100 * share:.0f} %"}


@cache
def numbers(model: str) -> pd.DataFrame:
    """`generate.rows` of the record of "7B" or "1B", by batch and arm."""
    return pd.DataFrame(generate.rows(recorded(model))).set_index(["batch", "arm"])


def memory() -> pd.DataFrame:
    """GiB of whole models in bf16, by the line through two depths: weights held, and peaks of a token's step.

    The KV cache has its own row: it is part of every peak, for the 2048 tokens of each text's prompt.
    """
    rows: list[dict[str, Any]] = []
    for model, preset in MODELS.items():
        record, shape = recorded(model), train_preset(preset).model
        batches, prompt = record.config["batches"], record.config["prompt"]
        for arm in (generate.DENSE, *record.config["arms"]):
            name = "dense" if arm == generate.DENSE else NAMES[arm.removesuffix(", same")]
            row = {"model": model, "GiB": name, "weights": numbers(model).loc[(1, arm), "weights GiB"]}
            peaks = {b: generate.composed(record, b, arm, "step_peak_bytes") / 2**30 for b in batches}
            rows.append(row | {f"peak, {b} {_texts(b)}": peak for b, peak in peaks.items()})
        cache_of = {b: b * decoding.kv_bytes(shape, prompt) / 2**30 for b in batches}
        row = {"model": model, "GiB": "KV cache alone"}
        rows.append(row | {f"peak, {b} {_texts(b)}": size for b, size in cache_of.items()})
    return pd.DataFrame(rows)


def _texts(batch: int) -> str:
    return "text" if batch == 1 else "texts"


def checks(same_tokens: bool, share_read: float) -> list[CheckRow]:
    """Notebook 13's check: what ran there, then the record against formula and aims, by model.

    Args:
        same_tokens: decoding gave the tokens of the full forward pass. share_read: of an FFN's bytes.

    Raises ClaimBroken if one that we stand by breaks; a missed aim is told, and breaks nothing.
    """
    config = generate.ARMS[WHOLE]
    live = [
        _row("Reading only the chosen clusters gives the tokens of the full pass", same_tokens, True, "true"),
        _row("Share of an FFN's bytes that one token reads", share_read, config.top_k / config.n_clusters),
    ]
    return live + [row for rows in zip(*map(_of_record, MODELS), strict=True) for row in rows]


def _of_record(model: str) -> list[CheckRow]:
    at, config, recorded = numbers(model), generate.ARMS[WHOLE], {"source": "recorded", "profile": "gpu"}
    few, times = at.loc[(FEW, WHOLE)], {"unit": "x", "rule": "at least"} | recorded
    packed = at.loc[(1, WHOLE), "FFN us"] / at.loc[(1, PACKED), "FFN us"]
    share, gone = (
        decoding.share_touched(config.top_k, config.n_clusters, FEW),
        f"{FEW} texts, the gain of the FFN is gone",
    )
    rows = [
        _row(
            f"{FEW} texts, share of clusters touched, {model}", few["used"], share, tolerance=NEAR, **recorded
        )
    ]
    for arm, what, aim in generate.AIMS:
        column = {"decode": "x", "prefill": "x prefill FFN"}[what]
        name = {"decode": "one token", "prefill": "one prompt"}[what]
        rows.append(
            _row(f"Aim: FFN of {name}, {model}", at.loc[(1, arm), column], aim, stand_by=False, **times)
        )
    rows.append(_row(f"{gone}, {model}", few["x"], generate.GONE, **times | {"rule": "at most"}))
    compressed = f"2:4 weights make the FFN of one token faster than whole ones, {model}"
    return [*rows, _row(compressed, packed, generate.GONE, stand_by=False, **times)]


def _row(
    statement: str,
    ours: Any,
    least: Any,
    rule: str = "equals",
    source: str = "here",
    profile: str = "smoke",
    **how: Any,
) -> CheckRow:
    """One line of the check: `ours` beside the formula or the aim, by a rule of `Claim`."""
    fixed = {"id": "", "place": "chapter 13", "unit": "", "tolerance": 0.0, "how": "", "notebook": "13"}
    claim = Claim(statement=statement, paper=least, rule=rule, **{**fixed, "stand_by": True, **how})
    return judged(claim, ours, profile=profile, source=source)
