"""The numbers of docs/replication.md: its tables and every figure in its sentences, from the records.

`python -m replicate.report` writes them between the page's markers. Losses come from data/recorded/, the
paper's from data/paper.json, verdicts and gradient sizes from figures/, where the claim table and notebook 08
keep them. An arm may have any number of seeds; with one it has no interval.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import pandas as pd

from replicate import (
    audit,
    cli,
    figures,
    flops,
    kernel_tables,
    layer_tables,
    paper,
    paths,
    plans,
    step_table,
)
from replicate.files import write_atomic
from replicate.records import Record
from replicate.schedule import sparse_steps
from replicate.study_tables import (
    ENDS,
    HALF,
    HELD,
    SCALES,
    SIZES,
    SWITCHES,
    TRAIN,
    WEIGHTS,
    across_cards,
    contrast,
    contrasts,
    drift,
    losses,
    missing,
    mixes,
    open_questions,
    opened,
    prize,
    rates,
    recipe_sparse,
    runs,
    sentence,
    setting,
    sizes,
)

TABLE3 = tuple(
    name for arm in plans.TABLE3[1:] for name in (arm, f"{arm}, same") if name in plans.TABLE3 + plans.SAME
)
DOC = paths.ROOT / "docs" / "replication.md"
GROUPS: dict[str, tuple[str, ...]] = {
    "The formats do what is said": (
        *("table5-16", "table5-32", "table5-64", "figure3", "venom-text-formula", "soft-continuous"),
        "hard-jumps",
    ),
    "Squared ReLU becomes sparse; a dense warm-up is needed": (
        *("relu2-init", "relu2-trained", "relu2-rises", "dy1-zeros", "warmup-steps", "warmup-helps"),
    ),
    "Every product gets one sparse operand; routing makes activations Venom": (
        *("figure2-products", "every-product", "dy1-mask", "mask-reuse", "mask-reuse-venom"),
        *("static-worse", "permuted-venom", "figure4d-same"),
    ),
    "What each sparse product costs (Table 3)": (
        *("table3-w1", "table3-w1-same", "table3-w1-w1t", "table3-w2", "table3-w2-same", "table3-w2-w2t"),
        *("table3-w1-w2-whole", "table3-w1-w2-same", "table3-w1-w2", "table3-venom", "table3-act24"),
        *("table3-transpose", "table3-transpose-same", "table3-transpose-w2", "table3-transpose-w2-same"),
        *("table3-additive-whole", "table3-additive-same", "table3-additive"),
    ),
    "Sparse first, dense last recovers the dense model (Tables 2 and 4, figure 5)": (
        *("table4-30k", "table4-40k", "table4-50k", "table4-60k", "table4-recovers", "table4-helps"),
        *("order", "figure5", "table2-1b-loss", "table2-1b-accuracy", "table2-7b-loss"),
        *("table2-7b-accuracy", "table2-1b-dense", "table2-7b-dense"),
    ),
    "Products are faster (figures 6 and 7)": (
        *("figure6-speedup", "figure6-conversion", "figure7-speedup", "venom-beats-24"),
    ),
    "Training is faster (abstract, section 3.2, Table 2)": (
        *("table2-1b-speedup", "table2-7b-speedup", "step-speedup", "time-is-flops", "headline"),
    ),
    "The FFN dominates the FLOPs (figure 1)": (
        *("abstract-ffn-half", "figure1-grows", "figure1-largest", "formula-1b", "formula-7b"),
    ),
    "The printed numbers follow from each other": (
        *("audit-1", "audit-2", "audit-2-limit", "audit-3", "audit-3-text", "audit-4", "audit-4-7b"),
        *("audit-4-step", "audit-5", "audit-5-24", "audit-5-26", "audit-5-42", "audit-6", "audit-6-80"),
        *("audit-6-noise", "audit-7", "table3-printed-sum"),
    ),
    "It works elsewhere too": ("ampere", "quantisation", "moe"),
    "Beyond the paper": ("beyond-venom",),
}


@lru_cache(maxsize=1)
def verdicts() -> pd.DataFrame:
    """figures/claims.csv: the claim table as `claims --write` last wrote it, by claim id."""
    return pd.read_csv(
        paths.ROOT / "figures" / "claims.csv", index_col="id", dtype=str, keep_default_na=False
    )


def tables() -> dict[str, str]:
    """Name -> Markdown of every table of the page."""
    found = verdicts()
    scope = [
        {"claims": title, "ids": ", ".join(f"`{i}`" for i in ids), "verdicts": _counts(found.loc[list(ids)])}
        for title, ids in GROUPS.items()
    ]
    printed = ["place", "claim", "paper", "ours", "verdict", "because"]
    study_ids = [i for title in list(GROUPS)[3:5] for i in GROUPS[title]]
    speed_ids = [i for title in list(GROUPS)[5:7] for i in GROUPS[title]]
    settings = pd.DataFrame({scale: setting(scale) for scale in SIZES}).rename_axis("").reset_index()
    out = {
        "scope": figures.markdown(pd.DataFrame(scope)),
        "setting": figures.markdown(settings),
        "table3-verdicts": figures.markdown(found.loc[study_ids, printed]),
        "weights": figures.markdown(contrasts(WEIGHTS, TRAIN)),
        "ends": figures.markdown(contrasts(ENDS, HELD, SIZES)),
        "rates": figures.markdown(rates()),
        "speed-verdicts": figures.markdown(found.loc[speed_ids, printed]),
        "layer": figures.markdown(_layers(), digits=3),
        "step": figures.markdown(_steps(), digits=4),
        "ways": figures.markdown(_ways(), digits=4),
        "agreement": figures.markdown(
            layer_tables.agreement(kernel_tables.recorded(kernel_tables.BACKENDS)), digits=3
        ),
        "audit": figures.markdown(_audit()),
        "mismatch": figures.markdown(_mismatch().reset_index()),
        "spike": figures.markdown(_spike().reset_index(), digits=3),
        "sparse": figures.markdown(recipe_sparse("laptop")),
        "sparse-gpu": figures.markdown(recipe_sparse("gpu")),
        "switch": figures.markdown(losses("gpu", SWITCHES).drop(columns="paper")),
        "active": figures.markdown(_active(), digits=3),
        "clock": figures.markdown(_clock(), digits=3),
        "open": figures.markdown(opened()),
        "prize": prize(),
        "missing": missing(),
    }
    for scale in SCALES:
        out[f"table3-{scale}"] = figures.markdown(losses(scale, TABLE3))
    for scale in SIZES:
        out[f"mixes-{scale}"] = figures.markdown(mixes(scale))
    out["sizes"] = figures.markdown(sizes())
    out["planned"] = figures.markdown(losses("gpu", tuple(plans.PLANNED)).drop(columns="paper"))
    out["cards"] = figures.markdown(layer_tables.cards(), digits=3)
    return out


def values() -> dict[str, str]:
    """Name -> text of every single number that the page's sentences may use."""
    out = {"counts": paper.verdict_counts(verdicts())}
    for scale in SIZES:
        frame = runs(scale)
        out |= {f"{scale} {name}": text for name, text in setting(scale).items()}
        for arm in dict.fromkeys(frame["arm"]):
            for word, column in (("training", TRAIN), ("held-out", HELD)):
                stats = contrast(frame, (arm,), column)
                out[f"{scale} {arm}, {word}"] = sentence(stats) if stats else ""
                out[f"{scale} {arm}, {word}, short"] = f"{stats.mean:+.3f} nats" if stats else ""
        for named, column in (
            (WEIGHTS, TRAIN),
            (ENDS, HELD),
        ):
            for label, arms in named.items():
                if stats := contrast(frame, arms, column):
                    out[f"{scale} {label}"] = sentence(stats)
        half = plans.everything(scale, (1,))[HALF][0]
        out[f"{scale} dense end"] = str(half.steps - half.dense_warmup - sparse_steps(half))
    for _, arm, _, found in open_questions():
        out |= {f"{scale} open {arm}": sentence(stats) for scale, stats in found.items()}
    for name, cost in audit.table3_costs().items():
        out[f"paper {name}"] = f"{cost:+.3f} nats"
    by_row = {row["preset"]: row["loss"] for row in paper.rows(3)}
    out["paper transpose"] = f"{by_row['w1+w1t'] - by_row['w1']:+.3f} nats"
    out["paper headline"] = "{} to {}x".format(*paper.number("headline"))
    out["paper step"] = f"{paper.number('step_speedup_text')}x"
    out["paper layer"] = f"{flops.ffn_speedup(paper.number('venom_speedup_table2')):.2f}x"
    out["paper dense steps"] = f"{paper.number('mix_1b')[1]:,}"
    for scale in SCALES[1:]:
        out[f"{scale} drift"], out[f"{scale} drift, largest"] = (f"{x:.3f} nats" for x in drift(scale))
        out[f"{scale} across cards"] = across_cards(scale)
    ends = runs("gpu").groupby("arm")["record"]
    for arm, found in ends:
        norms = [record.results["stats"][-1]["grad_norm"] for record in found]
        out[f"gpu norm {arm}"] = f"{sum(norms) / len(norms):.3g}"
    for arm, row in _mismatch().iterrows():
        out[f"dx {arm}"] = f"{row['dx sent down / true dx']} times"
    wide = pd.DataFrame(step_table.widths())
    for arm in step_table.AT_WIDTHS:
        out[f"pays {arm}"] = str(step_table.pays_from(wide, arm))
        out[f"pays launched {arm}"] = str(step_table.pays_from(wide, arm, "x launched"))
    for d_model, preset, model in ((2048, "llama1b", "1B"), (4096, "llama7b", "7B")):
        record = _step_record(preset)
        out |= {f"{model} step {arm}": f"{x:.2f}x" for arm, x in step_table.speeds(preset).items()}
        products = kernel_tables.venom_formats(kernel_tables.recorded(kernel_tables.VENOM), d_model)
        for form, x in zip(products["format"], products["clusters"], strict=True):
            out[f"{model} products {form}"] = f"{x:.2f}x"
        out |= {f"{model} layer {arm}": f"{x:.2f}x" for arm, x in layer_tables.over_dense(d_model).items()}
        beside = layer_tables.over_dense(d_model, device=step_table.CARD)  # the step's GPU
        out |= {f"H100 {model} layer {arm}": f"{x:.2f}x" for arm, x in beside.items()}
        memory = layer_tables.over_dense(d_model, "memory", step_table.CARD)
        out |= {f"H100 {model} memory {arm}": f"{share:.2f}" for arm, share in memory.items()}
        for row in step_table.runs(record):
            for mix in step_table.mixes():
                out[f"{model} run {row['arm']}, {row['way']}, {mix}"] = f"{row[mix]:.2f}x"
        dense = next(row for row in step_table.parts(record) if row["arm"] == "dense")
        share = dense["ffn"] / dense["step"]
        out |= {f"{model} share": f"{share:.0%}", f"{model} ceiling": f"{1 / (1 - share):.2f}x"}
    return out


def fill(text: str) -> str:
    """`text` with every table and value between its markers.

    Raises ValueError for a table that is unknown, missing or there twice, an unknown or empty value, or a
    marker without its end.
    """
    blocks, single = tables(), values()
    marked = re.findall(r"<!-- table: ([\w-]+) -->", text)
    if sorted(marked) != sorted(blocks):
        raise ValueError(f"the page marks {sorted(marked)}; there are {sorted(blocks)}")
    asked = re.findall(r"<!-- value: (.+?) -->", text)
    if unknown := [name for name in asked if not single.get(name)]:
        raise ValueError(f"no value {unknown[0]!r}")
    if text.count("<!-- end -->") != len(marked) + len(asked):
        raise ValueError("every marker needs one <!-- end -->")

    def put(pattern: str, content: Callable[[str], str], old: str) -> str:
        between = re.compile(rf"(<!-- {pattern} -->).*?(<!-- end -->)", re.DOTALL)
        return between.sub(lambda m: m[1] + content(m[2]) + m[3], old)

    text = put(r"table: ([\w-]+)", lambda name: f"\n\n{blocks[name].rstrip()}\n\n", text)
    return put(r"value: (.+?)", single.__getitem__, text)


def update(path: Path = DOC) -> Path:
    """Write the page's tables and values anew; raises as `fill` does."""
    write_atomic(path, fill(path.read_text(encoding="utf-8")).encode())
    return path


def prose(text: str) -> str:
    """The page without what is generated, without code and without the targets of links."""
    text = re.sub(r"<!-- (?:table|value): .+? -->.*?<!-- end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", text)


def _counts(table: pd.DataFrame) -> str:
    return paper.verdict_counts(table).split(": ", 1)[1]


def _step_record(preset: str) -> Record:
    return step_table.recorded(preset)


def _layers() -> pd.DataFrame:
    record = kernel_tables.recorded(kernel_tables.LAYER)
    parts = []
    for d_model, model in ((2048, "1B"), (4096, "7B")):
        frame = layer_tables.layer(record, d_model).set_index("layer")
        shown = frame[["ms", "x", "sustained", "launches", "memory"]]
        parts.append(shown.rename(columns=lambda column, model=model: f"{column}, {model}"))
    return pd.concat(parts, axis=1).reset_index()


def _steps() -> pd.DataFrame:
    rows = []
    for preset, model in (("llama1b", "1B"), ("llama7b", "7B, composed")):
        for row in step_table.rows(_step_record(preset)):
            spread = f"{row['ms_p10']:.0f} to {row['ms_p90']:.0f}" if "ms_p10" in row else ""
            fit = f"{row['residual']:.1%}" if "residual" in row else ""
            name = layer_tables.NAMES.get(row["arm"], row["arm"])
            shown = {"ms": row["ms"], "p10 to p90": spread, "off the line by": fit, "x": row["x"]}
            shown |= {"x, launched": row["x launched"], "peak GiB": row.get("peak GiB")}
            rows.append({"model": model, "format": name} | shown)
    return pd.DataFrame(rows)


def _ways() -> pd.DataFrame:
    rows = []
    for preset, model in (("llama1b", "1B"), ("llama7b", "7B")):
        for row in step_table.runs(_step_record(preset)):
            if row["arm"] in ("recipe", "venom16", "venom64"):
                rows.append({"model": model, **row, "arm": layer_tables.NAMES[row["arm"]]})
    return pd.DataFrame(rows).rename(columns={"arm": "format", "way": "by"})


def _active() -> pd.DataFrame:
    """Formats whose clusters are chosen by activations: layer, step and memory over dense."""
    card = step_table.CARD
    layers = {d: layer_tables.over_dense(d, device=card) for d in (2048, 4096)}
    memory = {d: layer_tables.over_dense(d, "memory", card) for d in (2048, 4096)}
    steps = step_table.speeds("llama1b")
    rows = []
    for arm in (name for name in layer_tables.NAMES if name.startswith("active")):
        row = {
            "format": layer_tables.NAMES[arm],
            "layer, 1B": layers[2048][arm],
            "layer, 7B": layers[4096][arm],
        }
        row |= {"step, 1B": steps.get(arm), "memory, 1B": memory[2048][arm], "memory, 7B": memory[4096][arm]}
        rows.append(row)
    return pd.DataFrame(rows)


def _clock() -> pd.DataFrame:
    """Notebook 10's times of the small model to a held-out loss."""
    return pd.read_csv(paths.ROOT / "figures" / "10_time_to_loss.csv").round({"steps": 0})


def _audit() -> pd.DataFrame:
    found = verdicts()
    rows = []
    for f in audit.findings():
        own = found.loc[f.claim]
        row = {"id": f"`{f.claim}`", "place": own["place"], "claim": own["claim"], "printed": own["paper"]}
        rows.append(row | {"follows": own["ours"], "verdict": own["verdict"], "arithmetic": f.arithmetic})
    return pd.DataFrame(rows)


def _mismatch() -> pd.DataFrame:
    """Notebook 08's gradient sizes, by arm; "≈": rounded."""
    return pd.read_csv(paths.ROOT / "figures" / "08_gradient_mismatch.csv", index_col="arm", dtype=str)


def _spike() -> pd.DataFrame:
    """Notebook 08's losses around the switch to sparse steps, by arm."""
    return pd.read_csv(paths.ROOT / "figures" / "08_spike.csv", index_col="arm")


def main(argv: Sequence[str] | None = None) -> int:
    """Write docs/replication.md's tables and numbers anew, from data/ and figures/."""
    return cli.rewrite("report", main.__doc__, update, argv)


if __name__ == "__main__":
    raise SystemExit(main())
