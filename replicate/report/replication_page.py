"""What docs/replication.md shows: its tables and every figure in its sentences, from the records.

Losses come from data/recorded/, the paper's numbers from data/paper.json, verdicts and gradient sizes from
figures/, where the claim table and notebook 08 keep them.
"""

import itertools
from functools import cache, partial

import pandas as pd

from replicate import figures, paper
from replicate.bench import step
from replicate.paper import audit
from replicate.paper.table import shipped_table, spared, verdict_counts
from replicate.report import choice_plots, kernel_tables, layer_tables, step_table, study_coverage, width
from replicate.report import study_tables as study
from replicate.schedule import sparse_steps
from replicate.study import noise, plans
from replicate.study.records import RecordStore
from replicate.system import paths
from replicate.training import flops

MIXTURE = "experts x4, 8 of 64"  # whose 1B step takes about as long as dense
PAIRS = [name for arm in plans.TABLE3[1:] for name in (arm, f"{arm}, same")]
TABLE3 = tuple(name for name in PAIRS if name in plans.TABLE3 + plans.SAME)


def tables() -> dict[str, str]:
    """Name -> Markdown of every table of the page."""
    text, short = figures.markdown, partial(figures.markdown, digits=3)
    settings = pd.DataFrame(study_coverage.settings())
    out = {
        "scope": text(_scope()),
        "setting": text(settings.rename_axis("").reset_index()),
        "table3-verdicts": text(_verdicts(slice(3, 5))),
        "weights": text(study.contrasts(study.WEIGHTS, study.TRAIN)),
        "ends": text(study.contrasts(study.ENDS, study.HELD, study.SIZES)),
        "rates": text(study.rates()),
        "speed-verdicts": text(_verdicts(slice(5, 7))),
        "layer": short(layers()),
        "step": text(_steps()),
        "ways": text(_ways()),
        "agreement": short(layer_tables.agreement(kernel_tables.recorded(kernel_tables.BACKENDS))),
        "audit": text(_audit()),
        "mismatch": text(mismatch().reset_index()),
        "spike": short(spike().reset_index()),
        "sparse": text(study.recipe_sparse("laptop")),
        "sparse-gpu": text(study.recipe_sparse("gpu")),
        "switch": text(study.losses(study.runs("gpu"), study.SWITCHES).drop(columns="paper")),
        "active": short(_active()),
        "clock": short(clock()),
        "open": text(study.opened()),
        "prize": study.prize(),
        "missing": study_coverage.missing(),
        "sizes": text(study.sizes()),
        "largest": text(study.size_table()),
        "planned": text(study.losses(study.runs("gpu"), plans.PLANNED).drop(columns="paper")),
        "cards": short(layer_tables.cards()),
        "english": study.english(study.runs("gpu", english=True)),
        "trained on": "\n".join(study_coverage.cards(scale) for scale in study.TRAINED[1:]),
        "trained again": study_coverage.trained_again(),
    }
    for scale in study.SIZES[1:]:
        out[f"width-{scale}"] = text(width.table(width.trade(study.runs(scale)), width.times()))
    out |= {f"table3-{scale}": text(study.losses(study.runs(scale), TABLE3)) for scale in study.SCALES}
    out |= {f"mixes-{scale}": text(study.mixes(scale)) for scale in study.SIZES}
    return out | study_coverage.tables()


@cache
def values() -> dict[str, str]:
    """Name -> text of every single number that the page's sentences may use."""
    table = shipped_table()
    out = {"counts": verdict_counts(table), "spared": str(len(spared(table)))}
    out |= _paper_values() | study_coverage.values()
    out["overlap"] = f"{RecordStore().latest('overlap', corpus='stdlib', window=64).results['share']:.1%}"
    runs = study.runs("gpu")
    for arm in width.ON_ONE_CARD:
        out[f"{arm}, on one card"] = study.sentence(study.on_one_card("gpu40m", arm))
    traded = width.trade(runs)
    out["experts"] = width.peer(traded, runs, width.times())
    finer = [pair.mean for pair in width.finer(traded, runs).values()]
    out["finer, lower"] = f"{sum(mean < 0 for mean in finer)} of {len(finer)}"
    out["finer, by"] = f"{-max(finer):.3f} to {-min(finer):.3f} nats"
    for row in traded.itertuples():
        out[f"{row.arm}, multiplications"] = f"{row.FLOPs:.2f} times"
    for scale in study.SIZES:
        out |= {f"{scale} {name}": text for name, text in _study_values(scale).items()}
    largest = study.TRAINED[-1]
    few = study.runs(largest)
    alone = study.contrast(few.query("seed == 1"), (MIXTURE,), study.HELD)
    out[f"{largest} {MIXTURE}, first seed"] = study.sentence(alone)
    there = study_coverage.setting(largest) | _losses(few)
    out |= {f"{largest} {name}": text for name, text in there.items()}
    for model in step_table.MODELS:
        out |= {f"{model} {name}": text for name, text in _speed_values(model).items()}
        out |= {f"H100 {model} {name}": text for name, text in _layer_values(model, step_table.CARD).items()}
    out |= {f"dx {arm}": f"{length} times" for arm, length in mismatch()["dx sent down / true dx"].items()}
    wide = step_table.widths()
    for arm in step_table.AT_WIDTHS:
        out[f"pays {arm}"] = str(step_table.pays_from(wide, arm))
        out[f"pays launched {arm}"] = str(step_table.pays_from(wide, arm, "x launched"))
    return out


def _losses(frame: pd.DataFrame) -> dict[str, str]:
    """Loss above dense of every arm of a scale's runs, by "ARM, training" and "ARM, held-out"."""
    columns = {"training": study.TRAIN, "held-out": study.HELD}
    return {
        f"{arm}, {word}": study.sentence(study.contrast(frame, (arm,), column))
        for arm, (word, column) in itertools.product(frame["arm"].unique(), columns.items())
    }


def _study_values(scale: str) -> dict[str, str]:
    """Losses of the study at a scale, what was trained there, and how much alike its runs are."""
    frame = study.runs(scale)
    out = study_coverage.setting(scale) | _losses(frame)
    for label, arms in study.WEIGHTS.items():
        out[label] = study.sentence(study.contrast(frame, arms, study.TRAIN))
    for _, arm, _, found in study.open_questions():
        out[f"open {arm}"] = study.sentence(found.get(scale))
    half = plans.everything(scale, (1,))[study.HALF][0]
    out["dense end"] = str(half.steps - half.dense_warmup - sparse_steps(half))
    for label, (arms, column) in study.TOLD.items():
        out[label] = study.sentence(study.contrast(frame, arms, column))
    for name, estimate in (("pooled", noise.pooled), ("apart", noise.apart)):
        out[name] = f"{estimate(scale, study.TRAIN):.3f} nats"
    out["act24, at most"] = f"{study.contrast(frame, ('act24',), study.TRAIN).high:.3f} nats"
    if scale != "laptop":  # on its GPUs equal runs end equal
        out["drift"], out["drift, largest"] = (f"{x:.3f} nats" for x in noise.drift(scale))
        out["across cards"] = study_coverage.across_cards(scale)
        right = study.accuracies(frame).query("arm == 'dense'")["accuracy"]
        out["dense right"] = f"{right.mean():.0%}"
        for arm, found in frame.groupby("arm")["record"]:
            norms = [record.results["stats"][-1]["grad_norm"] for record in found]
            out[f"norm {arm}"] = f"{sum(norms) / len(norms):.3g}"
    return out


def _paper_values() -> dict[str, str]:
    out = {name: f"{cost:+.3f} nats" for name, cost in audit.table3_costs().items()}
    costs = study.paper_costs()
    out["transpose"] = f"{costs['w1+w1t'] - costs['w1']:+.3f} nats"
    out["headline"] = "{} to {}x".format(*paper.number("headline"))
    out["step"] = f"{paper.number('step_speedup_text')}x"
    out["layer"] = f"{flops.ffn_speedup(paper.number('venom_speedup_table2')):.2f}x"
    out["dense steps"] = f"{paper.number('mix_1b')[1]:,}"
    return {f"paper {name}": text for name, text in out.items()}


def _speed_values(model: str) -> dict[str, str]:
    """Times as fast as dense of the products, the layer, the step and the runs of one of the two models."""
    preset, d_model = step_table.MODELS[model]
    record = step_table.recorded(preset)
    products = kernel_tables.venom_formats(kernel_tables.recorded(kernel_tables.VENOM), d_model)
    out = {f"products {form}": f"{x:.2f}x" for form, x in products.set_index("format")["clusters"].items()}
    out |= _layer_values(model) | {f"step {a}": f"{x:.2f}x" for a, x in step_table.speeds(preset).items()}
    for row in step_table.runs(record):
        for mix in step_table.mixes():
            out[f"run {row['arm']}, {row['way']}, {mix}"] = f"{row[mix]:.2f}x"
    share = step_table.shares({model: record}).loc[model, "time, measured"]
    return out | {"share": f"{share:.0%}", "ceiling": f"{1 / (1 - share):.2f}x"}


def _layer_values(model: str, device: str = layer_tables.CARD) -> dict[str, str]:
    d_model = step_table.MODELS[model][1]
    out = {f"layer {arm}": f"{x:.2f}x" for arm, x in layer_tables.over_dense(d_model, device=device).items()}
    memory = layer_tables.over_dense(d_model, "memory", device)
    return out | {f"memory {arm}": f"{share:.2f}" for arm, share in memory.items()}


def _scope() -> pd.DataFrame:
    rows = [
        (title, ", ".join(f"`{i}`" for i in ids), verdict_counts(shipped_table().loc[ids]).split(": ", 1)[1])
        for title, ids in paper.data()["claim_groups"].items()
    ]
    return pd.DataFrame(rows, columns=["claims", "ids", "verdicts"])


def _verdicts(groups: slice) -> pd.DataFrame:
    """The claim table's rows of some of the groups of claims."""
    ids = [i for group in list(paper.data()["claim_groups"].values())[groups] for i in group]
    return shipped_table().loc[ids, ["place", "claim", "paper", "ours", "verdict", "because"]]


def layers() -> pd.DataFrame:
    """The layer of both models: milliseconds, times as fast as dense three ways, memory over dense."""
    record, parts = kernel_tables.recorded(kernel_tables.LAYER), []
    for model, (_, d_model) in step_table.MODELS.items():
        frame = layer_tables.layer(record, d_model).set_index("layer")
        parts.append(frame[["ms", "x", "sustained", "launches", "memory"]].add_suffix(f", {model}"))
    return pd.concat(parts, axis=1).reset_index()


def _steps() -> pd.DataFrame:
    rows = []
    for (preset, _), model in zip(step_table.MODELS.values(), ("1B", "7B, composed"), strict=True):
        for row in step.rows(step_table.recorded(preset)):
            spread = f"{row['ms_p10']:.0f} to {row['ms_p90']:.0f}" if "ms_p10" in row else ""
            fit = f"{row['residual']:.1%}" if "residual" in row else ""
            name = layer_tables.NAMES.get(row["arm"], row["arm"])
            shown = {"ms": row["ms"], "p10 to p90": spread, "off the line by": fit, "x": row["x"]}
            shown |= {"x, launched": row["x launched"], "peak GiB": row.get("peak GiB")}
            rows.append({"model": model, "format": name} | shown)
    return pd.DataFrame(rows)


def _ways() -> pd.DataFrame:
    found = {m: step_table.runs(step_table.recorded(preset)) for m, (preset, _) in step_table.MODELS.items()}
    frame = pd.DataFrame({"model": model, **row} for model, rows in found.items() for row in rows)
    frame = frame[frame["arm"].isin(["recipe", "venom16", "venom64"])].replace({"arm": layer_tables.NAMES})
    return frame.rename(columns={"arm": "format", "way": "by"})


def _active() -> pd.DataFrame:
    """Formats whose clusters are chosen by activations: layer, step and memory over dense."""
    found = choice_plots.speeds().drop(columns="by the formula")
    return found[found["format"].str.startswith("by activations")]


def _audit() -> pd.DataFrame:
    found = {f.claim: f.arithmetic for f in audit.findings()}
    frame = shipped_table().loc[list(found), ["place", "claim", "paper", "ours", "verdict"]]
    frame = frame.rename(columns={"paper": "printed", "ours": "follows"}).assign(arithmetic=found)
    return frame.rename(index="`{}`".format).rename_axis("id").reset_index()


def clock() -> pd.DataFrame:
    """Notebook 10's times of the small model to a held-out loss."""
    return pd.read_csv(paths.ROOT / "figures" / "10_time_to_loss.csv").round({"steps": 0})


def mismatch() -> pd.DataFrame:
    """Notebook 08's gradient sizes, by arm; "≈": rounded."""
    return pd.read_csv(paths.ROOT / "figures" / "08_gradient_mismatch.csv", index_col="arm", dtype=str)


def spike() -> pd.DataFrame:
    """Notebook 08's losses around the switch to sparse steps, by arm."""
    return pd.read_csv(paths.ROOT / "figures" / "08_spike.csv", index_col="arm")
