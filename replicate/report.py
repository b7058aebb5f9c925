"""The numbers of docs/replication.md: its tables and every figure in its sentences, from the records.

`python -m replicate.report` writes them between the page's markers. Losses come from data/recorded/, the
paper's from data/paper.json, verdicts and gradient sizes from figures/, where the claim table and notebook 08
keep them. An arm may have any number of seeds; with one it has no interval.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import pandas as pd

from replicate import (
    audit,
    figures,
    flops,
    kernel_tables,
    layer_tables,
    measure,
    paper,
    paths,
    plans,
    results,
    step_table,
)
from replicate.config import from_dict
from replicate.gpt import param_count
from replicate.records import Record, RecordStore, write_atomic
from replicate.schedule import sparse_steps

DOC = paths.ROOT / "docs" / "replication.md"
SCALES = ("laptop", "gpu")
SIZES = (*SCALES, "gpu40m")  # where only the recipe and what bears on it were trained
TRAIN, HELD = "final_loss", "valid_loss"
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
        *("table3-w1", "table3-w1-w1t", "table3-w2", "table3-w2-w2t", "table3-w1-w2", "table3-venom"),
        *("table3-act24", "table3-transpose", "table3-additive"),
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
WEIGHTS = {  # contrasts of training losses
    "W1's transpose": ("w1+w1t", "w1"),
    "W2's transpose": ("w2+w2t", "w2"),
    "both transposes": ("w1+w2+t", "w1+w2"),
    "what W1 and W2 add beyond their sum": ("w1+w2", "w1", "w2"),
    "the same with transposes": ("w1+w2+t", "w1+w1t", "w2+w2t"),
    "2:4 weights on top of Venom": ("recipe", "venom16"),
}
HALF = "recipe, 50% sparse first"
SWITCHES = (HALF, "recipe, folded, 50% sparse first", "active16x32, 50% sparse first")
ENDS = {  # contrasts of held-out losses, at the very end
    "half sparse, then dense, less dense": (HALF, "dense"),
    "sparse to the end, less half sparse, then dense": ("recipe", HALF),
    "dense first, less sparse first, half sparse": ("recipe, 50% dense-sparse", HALF),
    "interleaved, less sparse first, half sparse": ("recipe, 50% interleaved", HALF),
}


@lru_cache(maxsize=8)
def runs(scale: str) -> pd.DataFrame:
    """`results.frame` of every recorded run of the study at a scale, arms called as in the plan."""
    store, found, names = RecordStore(), [], []
    for name, configs in plans.everything(scale).items():
        for config in configs:
            run = store.find("train", config)
            if run and run[1] == "recorded":
                found.append(run)
                names.append(name)
    return results.frame(found).assign(arm=names)


@lru_cache(maxsize=1)
def verdicts() -> pd.DataFrame:
    """figures/claims.csv: the claim table as `claims --write` last wrote it, by claim id."""
    return pd.read_csv(
        paths.ROOT / "figures" / "claims.csv", index_col="id", dtype=str, keep_default_na=False
    )


def contrast(frame: pd.DataFrame, arms: tuple[str, ...], column: str) -> measure.Stats | None:
    """Statistics over seeds of the first arm less the others, within a seed, each above the dense model.

    A sum of several arms so has the dense model counted once. None if no seed has all of them.
    """
    values = frame.pivot(index="seed", columns="arm", values=column)
    if not {*arms, "dense"} <= set(values):
        return None
    above = values.sub(values["dense"], axis=0)
    each = (above[arms[0]] - above[list(arms[1:])].sum(axis=1, skipna=False)).dropna()
    return measure.summary(each.tolist()) if len(each) else None


def cells(stats: measure.Stats | None, name: str = "", digits: int = 4) -> dict[str, str]:
    """Mean, standard deviation and 95 % interval as cells of a table; one seed has the mean only."""
    keys = (name, f"sd {name}".strip(), f"95 % {name}".strip())
    if stats is None:
        return dict.fromkeys(keys, "")
    several = stats.n > 1
    spread = f"{stats.std:.{digits}f}" if several else ""
    interval = f"{stats.low:+.{digits}f} to {stats.high:+.{digits}f}" if several else ""
    return dict(zip(keys, (f"{stats.mean:+.{digits}f}", spread, interval), strict=True))


def sentence(stats: measure.Stats) -> str:
    """Mean, interval and seeds in words: "+0.210 nats (95 % interval +0.162 to +0.257, n = 2)"."""
    interval = f"95 % interval {stats.low:+.3f} to {stats.high:+.3f}, " if stats.n > 1 else ""
    return f"{stats.mean:+.3f} nats ({interval}n = {stats.n})"


def losses(scale: str, arms: tuple[str, ...]) -> pd.DataFrame:
    """One row a recorded arm: the paper's cost, n, training and held-out loss above the dense model."""
    costs = {row["preset"]: row["loss"] for row in paper.rows(3)}
    printed = {name: f"{loss - costs['dense']:+.3f}" for name, loss in costs.items() if name != "dense"}
    printed["w1+w2+t"] = printed["w1+w2"]
    rows = []
    for arm in arms:
        both = [contrast(runs(scale), (arm,), column) for column in (TRAIN, HELD)]
        if both[0] is not None:
            row = {"arm": arm, "paper": printed.get(arm, ""), "n": both[0].n}
            rows.append(row | cells(both[0], "training") | cells(both[1], "held-out"))
    return pd.DataFrame(rows)


def contrasts(
    named: Mapping[str, tuple[str, ...]], column: str, scales: tuple[str, ...] = SCALES
) -> pd.DataFrame:
    """One row a contrast: mean, interval and n at each scale, empty where it was not run."""
    rows = []
    for label, arms in named.items():
        row = {"effect": label, "arms": " − ".join(arms)}
        for scale in scales:
            stats = contrast(runs(scale), arms, column)
            shown = cells(stats, scale)
            row |= {scale: shown[scale] or "not run", f"95 %, {scale}": shown[f"95 % {scale}"]}
            row[f"n, {scale}"] = str(stats.n) if stats else ""
        rows.append(row)
    return pd.DataFrame(rows)


def setting(scale: str) -> dict[str, str]:
    """What was trained at a scale: model, text, recipe, machine, as the records say."""
    frame = runs(scale)
    some: list[Record] = frame["record"].tolist()
    c, corpus = from_dict(some[0].config), some[0].corpus
    size, tokens = param_count(c.model), c.steps * c.tokens_per_step
    return {
        "parameters without embedding": _millions(size["non_embedding"]),
        "layers, d_model, d_ff, heads": ", ".join(
            str(n) for n in (c.model.n_layer, c.model.d_model, c.model.d_ff, c.model.n_head)
        ),
        "sequence, vocabulary": f"{c.model.seq_len}, {c.model.vocab_size}",
        "steps, of these dense warm-up": f"{c.steps}, {c.dense_warmup}",
        "tokens a step": f"{c.tokens_per_step}",
        "training tokens": _millions(tokens),
        "tokens a parameter": f"{tokens / size['non_embedding']:.1f}",
        "passes over the text": f"{tokens / corpus['train_tokens']:.2f}",
        "AdamW: rate, betas, decay": f"{c.lr:g}, {c.beta1:g} and {c.beta2:g}, {c.weight_decay:g}",
        "learning rate": f"{c.lr_warmup} steps up, cosine to {c.min_lr_share:g} of it",
        "text": f"{corpus['corpus']}, {corpus['bytes'] / 1e6:.0f} MB",
        "held-out tokens": _millions(corpus["valid_tokens"]),
        "dense, training / held-out": " / ".join(
            f"{frame.loc[frame['arm'] == 'dense', column].mean():.3f} nats" for column in (TRAIN, HELD)
        ),
        "runs recorded": str(len(frame)),
        "device, torch": ", ".join(sorted({f"{r.device}, {r.versions['torch']}" for r in some})),
        "commits": ", ".join(sorted({r.commit[:7] for r in some})),
        "hours of all runs, some side by side": f"{sum(r.seconds for r in some) / 3600:.2f}",
    }


def mixes(scale: str) -> pd.DataFrame:
    """Table 4 at a scale: sparse steps, losses above dense, accuracy where it was recorded."""
    frame = runs(scale)
    known = _accuracies(frame)
    rows = []
    for arm in ("recipe", *plans.MIXES):
        config = plans.everything(scale, (1,))[arm][0]
        row = {"arm": arm, "sparse steps": f"{sparse_steps(config)} of {config.steps}"}
        both = [contrast(frame, (arm,), column) for column in (TRAIN, HELD)]
        row["n"] = str(both[0].n) if both[0] else "not run"
        row |= cells(both[0], "training") | cells(both[1], "held-out")
        gained = contrast(known, (arm,), "accuracy") if len(known) else None
        row |= {"accuracy": cells(gained, "accuracy")["accuracy"]}
        row["95 % accuracy"] = cells(gained, "accuracy")["95 % accuracy"]
        rows.append(row)
    table = pd.DataFrame(rows)
    return table if len(known) else table.drop(columns=["accuracy", "95 % accuracy"])


def _sizes() -> pd.DataFrame:
    """Training loss above dense, one column a scale, of the arms recorded at the largest of SIZES."""
    rows = []
    for arm in plans.AT_40M[1:]:
        stats = {scale: contrast(runs(scale), (arm,), TRAIN) for scale in SIZES}
        if stats[SIZES[-1]]:
            row = {"arm": arm}
            for scale, one in stats.items():
                shown = cells(one, scale)
                row |= {scale: shown[scale] or "not run", f"95 %, {scale}": shown[f"95 % {scale}"]}
            rows.append(row)
    return pd.DataFrame(rows)


def rates() -> pd.DataFrame:
    """Arms at half, once and twice the learning rate: above dense at its own rate, and dense above itself."""
    rows = []
    for scale in SCALES:
        for suffix in (", lr x 0.5", "", ", lr x 2"):
            base = f"dense{suffix}"
            row = {"scale": scale, "rate": suffix.removeprefix(", lr ") or "x 1"}
            for arm in plans.RATES:
                pair = (f"{arm}{suffix}", base) if arm != "dense" else (base, "dense")
                stats = contrast(runs(scale), pair, TRAIN) if pair[0] != pair[1] else None
                half = f" ± {(stats.high - stats.low) / 2:.3f}" if stats and stats.n > 1 else ""
                row[arm] = f"{stats.mean:+.3f}{half}, n = {stats.n}" if stats else ""
            rows.append(row)
    return pd.DataFrame(rows).rename(columns={"dense": "dense, above dense x 1"})


def recipe_sparse(scale: str) -> pd.DataFrame:
    """Arms at least as sparse as Venom at 4 of 16 with 2 of 4 inside, in every step after the usual warm-up.

    Same learning rate, so that the dense model above which they lie is the tuned one; lowest loss first.
    """
    plan = plans.everything(scale, (1,))
    dense = plan["dense"][0]
    chosen = []
    for name in dict.fromkeys(runs(scale)["arm"]):
        c, s = plan[name][0], plan[name][0].model.sparsity
        whole = c.sparse_share == 1 and c.lr == dense.lr and c.dense_warmup == dense.dense_warmup
        if whole and s.activation == "venom" and s.inner and 4 * s.top_k <= s.n_clusters:
            chosen.append(name)
    table = losses(scale, tuple(chosen)).drop(columns="paper")
    order = table["training"].astype(float).sort_values().index
    return table.loc[order].reset_index(drop=True)


def prize() -> str:
    """A line a scale: is there an arm of `recipe_sparse` that surely costs less than the paper's Venom?"""
    costs = audit.table3_costs()
    limit = costs[next(row["sparse"] for row in paper.rows(3) if row["preset"] == "venom16")]
    lines = []
    for scale in SIZES:
        table = recipe_sparse(scale)
        stats = {a: [contrast(runs(scale), (a,), k) for k in (TRAIN, HELD)] for a in table["arm"]}
        sure = [a for a, both in stats.items() if all(s.n > 1 and s.high < limit for s in both)]
        best = table["arm"].iloc[0]
        lines.append(
            f"- {scale}: {', '.join(f'`{a}`' for a in sure) or 'none found'}, of {len(table)} arms, whose "
            f"intervals in training and held out lie below {limit:+.3f} nats. The lowest mean is that of "
            f"`{best}`: {sentence(stats[best][0])} in training, {sentence(stats[best][1])} held out."
        )
    return "\n".join(lines)


def missing() -> str:
    """Lines a scale: arms of the study that have fewer than three seeds, and those not run at all."""
    lines = []
    for scale in SIZES:
        have: dict[str, set[int]] = {}
        frame = runs(scale)
        for arm, seed in frame[["arm", "seed"]].itertuples(index=False) if len(frame) else ():
            have.setdefault(arm, set()).add(seed)
        plan = plans.AT_40M if scale == "gpu40m" else tuple(plans.everything(scale))
        some = [f"`{arm}` ({len(have[arm])})" for arm in plan if 0 < len(have.get(arm, ())) < 3]
        none = [f"`{arm}`" for arm in plan if not have.get(arm)]
        if some:
            lines.append(f"- {scale}, fewer than three seeds (how many there are): {', '.join(some)}")
        if none:
            lines.append(f"- {scale}, not run: {', '.join(none)}")
    return "\n".join(lines) or "- nothing"


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
    sparse = recipe_sparse("laptop")
    shown = {*plans.TABLE3, *plans.MIXES, *sparse["arm"]}
    others = [n for n in dict.fromkeys(runs("laptop")["arm"]) if n not in shown and " lr x " not in n]
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
        "sparse": figures.markdown(sparse),
        "sparse-gpu": figures.markdown(recipe_sparse("gpu")),
        "switch": figures.markdown(losses("gpu", SWITCHES).drop(columns="paper")),
        "active": figures.markdown(_active(), digits=3),
        "clock": figures.markdown(_clock(), digits=3),
        "variants": figures.markdown(losses("laptop", tuple(others)).drop(columns="paper")),
        "prize": prize(),
        "missing": missing(),
    }
    for scale in SCALES:
        out[f"table3-{scale}"] = figures.markdown(losses(scale, plans.TABLE3[1:]))
    for scale in SIZES:
        out[f"mixes-{scale}"] = figures.markdown(mixes(scale))
    out["sizes"] = figures.markdown(_sizes())
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
        for named, column in ((WEIGHTS, TRAIN), (ENDS, HELD)):
            for label, arms in named.items():
                if stats := contrast(frame, arms, column):
                    out[f"{scale} {label}"] = sentence(stats)
        half = plans.everything(scale, (1,))[HALF][0]
        out[f"{scale} dense end"] = str(half.steps - half.dense_warmup - sparse_steps(half))
    for name, cost in audit.table3_costs().items():
        out[f"paper {name}"] = f"{cost:+.3f} nats"
    by_row = {row["preset"]: row["loss"] for row in paper.rows(3)}
    out["paper transpose"] = f"{by_row['w1+w1t'] - by_row['w1']:+.3f} nats"
    out["paper headline"] = "{} to {}x".format(*paper.number("headline"))
    out["paper step"] = f"{paper.number('step_speedup_text')}x"
    out["paper layer"] = f"{flops.ffn_speedup(paper.number('venom_speedup_table2')):.2f}x"
    out["paper dense steps"] = f"{paper.number('mix_1b')[1]:,}"
    for arm, row in _mismatch().iterrows():
        out[f"dx {arm}"] = f"{row['dx sent down / true dx']} times"
    for d_model, preset, model in ((2048, "llama1b", "1B"), (4096, "llama7b", "7B")):
        record = _step_record(preset)
        out |= {f"{model} step {arm}": f"{x:.2f}x" for arm, x in step_table.speeds(preset).items()}
        products = kernel_tables.venom_formats(kernel_tables.recorded(kernel_tables.VENOM), d_model)
        for form, x in zip(products["format"], products["clusters"], strict=True):
            out[f"{model} products {form}"] = f"{x:.2f}x"
        out |= {f"{model} layer {arm}": f"{x:.2f}x" for arm, x in layer_tables.over_dense(d_model).items()}
        memory = layer_tables.over_dense(d_model, "memory")
        out |= {f"{model} memory {arm}": f"{share:.2f}" for arm, share in memory.items()}
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


def _millions(number: float) -> str:
    return f"{number / 1e6:.1f}M"


def _accuracies(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs whose score on the held-out completion task was recorded, with the column `accuracy`."""
    asked = [record for record, origin in RecordStore().all("completion") if origin == "recorded"]
    scores = {record.config["train"]: record.results["accuracy"] for record in asked}
    accuracy = [scores.get(record.config_hash) for record in frame["record"]]
    return frame.assign(accuracy=accuracy).dropna(subset="accuracy")


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
            row = {"ms": row["ms"], "p10 to p90": spread, "off the line by": fit, "x": row["x"]} | {
                "peak GiB": row.get("peak GiB")
            }
            rows.append({"model": model, "format": name} | row)
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
    layers = {d: layer_tables.over_dense(d) for d in (2048, 4096)}
    memory = {d: layer_tables.over_dense(d, "memory") for d in (2048, 4096)}
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
    """Notebook 08's gradient sizes, by arm; "≈": rounded, they may differ elsewhere in the last digit."""
    return pd.read_csv(paths.ROOT / "figures" / "08_gradient_mismatch.csv", index_col="arm", dtype=str)


if __name__ == "__main__":
    print(update().relative_to(paths.ROOT))
