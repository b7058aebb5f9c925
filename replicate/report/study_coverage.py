"""What the study trained and what not, how and with what: settings, machines, hours and energy, texts.

All of it comes from records (data/recorded/) and from the study's plan; docs/replication.md shows it.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from replicate import figures
from replicate.report.study_tables import HELD, SIZES, TRAIN, TRAINED, every_run, runs
from replicate.settings.presets import PRESET_OF, train_preset
from replicate.settings.text import from_dict
from replicate.study import noise, plans
from replicate.study.records import Record, RecordStore
from replicate.training.flops import param_count

WATTS = {"NVIDIA H100 80GB HBM3": 700, "NVIDIA H200": 700}  # board power by the data sheets, SXM modules
NOT_RECORDED = "not recorded"
# Settings in which arms of the plan differ: in words, and how the value of Table 3's arms was chosen.
BEFOREHAND = "set before the first recorded run; the others are reported beside it"
TRIED = {
    "lr": ("learning rate", "set beforehand; kept since the dense model's training loss is lowest there"),
    "dense_warmup": ("dense warm-up, steps", BEFOREHAND),
    "corpus": ("text", "source code; other text is reported beside it"),
    "sparse_share": ("share of sparse steps", "that of Table 3; the others are Table 4's"),
    "order": ("order of sparse and dense steps", "the paper's"),
    "fold": ("weights folded at the switch", "the paper has no folding"),
    "model.activation": ("activation function", "the paper's"),
    "model.sparsity.backward": ("the backward pass reads", "none is chosen: both are judged"),
    "model.sparsity.weight_method": ("threshold of weights", "the paper's"),
    "model.sparsity.weight_scale": ("scale of thresholded weights", "the paper prints none"),
    "model.sparsity.selection": ("criterion for 2 of 4", "the paper's"),
    "model.sparsity.inner": ("2 of 4 inside clusters", "the paper's"),
    "model.sparsity.mask_reuse": ("mask reused in the backward pass", "the paper's"),
    "model.sparsity.wgrad": ("weight gradients beyond Venom's", "the paper's"),
    "model.sparsity.routing": ("who chooses the clusters", "the paper's: the router, token by token"),
    "model.sparsity.n_clusters": ("number of clusters", f"the paper does not say; {BEFOREHAND}"),
    "model.sparsity.metric": ("the router's metric", f"the paper names three; {BEFOREHAND}"),
    "model.sparsity.fp8": ("products in FP8", "none of the paper's is"),
    "model.sparsity.refresh_every": ("steps until new clusters", f"the paper does not say; {BEFOREHAND}"),
}
# In which they differ as well, because that is what the arm is.
FORMATS = ("w1", "w1_t", "w2", "w2_t", "activation", "top_k")
OF_ARMS = {*(f"model.sparsity.{name}" for name in FORMATS), "model.d_ff", "steps"}
# Settings of training that have one value in all arms of a scale.
FIXED = ("batch_size", "lr_warmup", "min_lr_share", "weight_decay", "beta1", "beta2", "clip", "interleave")


def tables() -> dict[str, str]:
    """Name -> Markdown of the tables of costs, settings and texts."""
    return {
        "costs": figures.markdown(costs()),
        "arms": figures.markdown(arms()),
        "tried": figures.markdown(tried()),
        "fixed": fixed(),
        "corpora": figures.markdown(corpora()),
    }


@cache
def values() -> dict[str, str]:
    """Name -> text of the numbers in sentences: hours and energy of the GPUs, and their board power."""
    hours, energy = _used(record for record, _ in _everything())
    power = " or ".join(f"{watts} W" for watts in sorted(set(WATTS.values())))
    return {"GPU hours": f"{hours:.1f}", "GPU energy": f"{energy:.1f} kWh", "board power": power}


def costs() -> pd.DataFrame:
    """Rows (what was computed, on which device): records, hours, and for a GPU its energy; then the total."""
    everything = pd.DataFrame(_everything(), columns=["record", "what"])
    everything["device"] = [record.device for record in everything["record"]]
    rows = []
    for (what, device), some in everything.groupby(["what", "device"], sort=False)["record"]:
        hours, energy = _used(some)
        time = sum(record.seconds for record in some) / 3600
        shown = {"hours": f"{time:.2f}", "kWh, at most": f"{energy:.2f}" if hours else ""}
        rows.append({"what": what, "device": device, "records": str(len(some))} | shown)
    hours, energy = _used(everything["record"])
    total = {"what": "total of the GPUs", "hours": f"{hours:.2f}", "kWh, at most": f"{energy:.2f}"}
    return pd.DataFrame([*rows, total]).fillna("")


def arms() -> pd.DataFrame:
    """Rows (arm): GPU minutes at each scale with the number of runs in brackets, and GPU hours and energy."""
    frame, table = pd.concat([every_run(scale).assign(scale=scale) for scale in TRAINED]), []
    for arm, part in frame.groupby("arm", sort=False):
        on_gpu, row = part[[record.device in WATTS for record in part["record"]]], {"arm": arm}
        for scale in TRAINED:
            some = on_gpu.loc[on_gpu["scale"] == scale, "record"]
            row[f"minutes, {scale}"] = f"{60 * _used(some)[0]:.1f} ({len(some)})" if len(some) else ""
        hours, energy = _used(on_gpu["record"])
        table.append(row | {"GPU hours": f"{hours:.3f}", "kWh, at most": f"{energy:.3f}"})
    return pd.DataFrame(table)


def _everything() -> Iterator[tuple[Record, str]]:
    """Every shipped record that took time, and what it is. A completion's time is within its run's."""
    for scale in TRAINED:
        for record in every_run(scale)["record"]:
            yield record, f"training, {scale}"
    store = RecordStore()
    for kind in sorted(path.name for path in store.recorded.iterdir()):
        what = "timings" if kind.startswith("bench-") else kind
        if kind not in ("train", "completion"):
            yield from ((record, what) for record, origin in store.all(kind) if origin == "recorded")


def _used(some: Iterable[Record]) -> tuple[float, float]:
    """(hours, kWh at board power) of records on GPUs; those of a CPU do not count.

    Raises ValueError for a GPU whose power WATTS does not say.
    """
    hours = energy = 0.0
    for record in some:
        if record.device.startswith("CPU"):
            continue
        if record.device not in WATTS:
            raise ValueError(f"device is {record.device!r}; add its board power to WATTS")
        hours += record.seconds / 3600
        energy += record.seconds / 3600 * WATTS[record.device] / 1000
    return hours, energy


def flat(config: Any) -> dict[str, Any]:
    """A configuration as dotted name -> value, with all its settings."""
    return pd.json_normalize(dataclasses.asdict(config)).to_dict("records")[0]


def planned(scale: str) -> dict[str, dict[str, Any]]:
    """Arm -> `flat` at a scale, of every arm of the plan."""
    return {arm: flat(configs[0]) for arm, configs in plans.everything(scale, (1,)).items()}


def tried() -> pd.DataFrame:
    """Rows (setting that was varied): values in the plan, that of Table 3's arms, runs with others, why."""
    plan, rows = {scale: planned(scale) for scale in SIZES}, []
    ran = {s: every_run(s)["record"].map(lambda r: flat(from_dict(r.config))) for s in SIZES}
    for name, (words, how) in TRIED.items():
        found = {values[name] for values in plan["gpu"].values()}
        row = {"setting": words, "tried, gpu scale": _listed(found)}
        row["used in Table 3"] = _listed({plan["gpu"][arm][name] for arm in plans.TABLE3})
        for s in SIZES:
            usual = {plan[s][arm][name] for arm in plans.TABLE3}
            row[f"other runs, {s}"] = str(sum(values[name] not in usual for values in ran[s]))
        rows.append(row | {"how it was chosen": how})
    return pd.DataFrame(rows)


def fixed() -> str:
    """A line: the settings of training that were not searched, with their values by scale."""
    presets = [flat(train_preset(PRESET_OF[scale])) for scale in TRAINED]
    parts = []
    for name in FIXED:
        each = [f"{preset[name]:g}" for preset in presets]
        parts.append(f"`{name}` {each[0] if len(set(each)) == 1 else ' / '.join(each)}")
    return f"{', '.join(parts)} ({' / '.join(TRAINED)} where they differ)."


def _listed(values: set[Any]) -> str:
    if all(isinstance(value, bool) for value in values):
        return ", ".join("yes" if value else "no" for value in sorted(values, reverse=True))
    if all(isinstance(value, str) for value in values):
        return ", ".join(sorted(values)).replace("24", "2:4")
    return ", ".join(f"{value:.3g}" if value else "none" for value in sorted(values))


def corpora() -> pd.DataFrame:
    """A column a text of the training records: what they say of it, "not recorded" where they do not."""
    texts: dict[str, list[tuple[str, Record]]] = {}
    for scale in TRAINED:
        for record in every_run(scale)["record"]:
            texts.setdefault(record.corpus["sha256"], []).append((scale, record))
    columns = {}
    for sha256, found in texts.items():
        corpus, some = found[0][1].corpus, [record for _, record in found]
        columns[f"{corpus['corpus']}, {sha256[:8]}"] = {
            "read at scale": ", ".join(dict.fromkeys(scale for scale, _ in found)),
            "by": ", ".join(sorted({record.device for record in some})),
            "runs": str(len(some)),
            "Python": ", ".join(sorted({record.versions["python"] for record in some})),
            "bytes": f"{corpus['bytes']:,}",
            "tokens, training and held out": f"{corpus['train_tokens']:,} and {corpus['valid_tokens']:,}",
            "sha256 of the text": f"`{sha256}`",
            "sha256 of the vocabulary": f"`{corpus['vocab_sha256']}`",
            "files that could not be read": str(corpus["skipped_files"]),
            "files": str(corpus.get("files", NOT_RECORDED)),
            "packages, versions, licences": "; ".join(corpus.get("packages", [NOT_RECORDED])) or "none",
        }
    return pd.DataFrame(columns).rename_axis("").reset_index()


def how_it_ran(some: list[Record]) -> dict[str, str]:
    """Rows of the setting's table: how these runs were computed, and how many of them so."""
    asked = {"auto": "asked for", "on": "asked for", "off": "no"}
    kinds = [from_dict(record.config).model.sparsity for record in some]
    graphs = [asked.get(record.config.get("cuda_graph"), NOT_RECORDED) for record in some]
    graphs = [r.results.get("cuda_graph", known) for r, known in zip(some, graphs, strict=True)]
    return {
        "compiled": _counted(record.config["compile"] for record in some),
        "attention kernel": _counted(record.results.get("attention", NOT_RECORDED) for record in some),
        "steps as CUDA graphs": _counted(graphs),
        "engine of sparse steps": _counted(record.results.get("backend", NOT_RECORDED) for record in some),
        "backward pass reads (where it matters)": _counted(s.backward for s in kinds if s.reading_matters),
    }


def _counted(values: Iterable[Any]) -> str:
    """Each value with the number of runs that have it: "yes (150), not recorded (15)"."""
    words = {True: "yes", False: "no", None: "none"}
    counts = Counter(words.get(value, value) for value in values)
    return ", ".join(f"{value} ({n})" for value, n in counts.most_common())


def settings() -> dict[str, dict[str, str]]:
    """`setting` and `how_it_ran` of each of TRAINED and text, so of every record.

    "laptop, on a CPU" is what a CPU trained on its own version of the text.
    """
    out = {}
    for scale in TRAINED:
        frame = every_run(scale)
        text = frame["record"].map(lambda record: record.corpus["sha256"])
        for _, part in frame.groupby(text, sort=False):
            first = part["record"].iloc[0]
            other = "on a CPU" if first.device.startswith("CPU") else first.corpus["corpus"]
            found = setting(scale, part) | how_it_ran(part["record"].tolist())
            out[f"{scale}, {other}" if scale in out else scale] = found
    return out


def setting(scale: str, frame: pd.DataFrame | None = None) -> dict[str, str]:
    """What was trained at a scale, or of it in `frame`: model, text, recipe, machine, as the records say."""
    frame = runs(scale) if frame is None else frame
    some: list[Record] = frame["record"].tolist()
    c, corpus = from_dict(some[0].config), some[0].corpus
    m, size, tokens = c.model, param_count(c.model), c.steps * c.tokens_per_step
    evaluated = f"{c.eval_batches * c.batch_size * m.seq_len / 1e6:.2f}M"
    dense = frame.loc[frame["arm"] == frame["arm"].iloc[0], [TRAIN, HELD]].mean()  # the first arm
    return {
        "parameters without embedding": _millions(size["non_embedding"]),
        "layers, d_model, d_ff, heads": f"{m.n_layer}, {m.d_model}, {m.d_ff}, {m.n_head}",
        "sequence, vocabulary": f"{m.seq_len}, {m.vocab_size}",
        "steps, of these dense warm-up": f"{c.steps}, {c.dense_warmup}",
        "tokens a step": f"{c.tokens_per_step}",
        "training tokens": _millions(tokens),
        "tokens a parameter": f"{tokens / size['non_embedding']:.1f}",
        "passes over the text": f"{tokens / corpus['train_tokens']:.2f}",
        "AdamW: rate, betas, decay": f"{c.lr:g}, {c.beta1:g} and {c.beta2:g}, {c.weight_decay:g}",
        "learning rate": f"{c.lr_warmup} steps up, cosine to {c.min_lr_share:g} of it",
        "text, its checksum": f"{corpus['corpus']}, {corpus['bytes'] / 1e6:.1f} MB, {corpus['sha256'][:8]}",
        "held-out tokens; evaluated, at random places": f"{_millions(corpus['valid_tokens'])}; {evaluated}",
        "dense, training / held-out": " / ".join(map("{:.3f} nats".format, dense)),
        "runs recorded": str(len(frame)),
        "device, torch, Python": "; ".join(
            sorted({", ".join([r.device, *(r.versions[name] for name in ("torch", "python"))]) for r in some})
        ),
        "commits": ", ".join(sorted({r.commit[:7] for r in some})),
        "hours of all runs, some side by side": f"{sum(r.seconds for r in some) / 3600:.2f}",
    }


def missing() -> str:
    """Lines a scale: arms of the study that have fewer than three seeds of one text, and those not run."""
    lines = []
    for scale in TRAINED:
        frame = every_run(scale)
        text = [record.corpus["sha256"] for record in frame["record"]]
        seeds = frame.groupby(["arm", text])["seed"].nunique().groupby("arm").max()
        plan = plans.PARTLY.get(scale) or tuple(plans.everything(scale))
        some = [f"`{arm}` ({seeds[arm]})" for arm in plan if seeds.get(arm, 3) < 3]
        none = [f"`{arm}`" for arm in plan if arm not in seeds]
        for what, arms in {"fewer than three seeds (how many there are)": some, "not run": none}.items():
            lines += [f"- {scale}, {what}: {', '.join(arms)}"] if arms else []
    return "\n".join(lines) or "- nothing"


def cards(scale: str) -> str:
    """Lines: which arms of a scale ran on which card, and of those with runs on several the seeds on each."""
    frame = runs(scale)
    frame = frame.assign(card=[r.device.removeprefix("NVIDIA ").split()[0] for r in frame["record"]])
    groups: dict[str, list[str]] = {}
    for arm, part in frame.groupby("arm", sort=False):
        of = {card: sorted(some["seed"]) for card, some in part.groupby("card")}
        if len(of) == 1:
            groups.setdefault(next(iter(of)), []).append(f"`{arm}`")
        else:
            seeds = "; ".join(f"{card}: {', '.join(map(str, some))}" for card, some in of.items())
            groups.setdefault("several cards (seeds on each)", []).append(f"`{arm}` ({seeds})")
    return "\n".join(f"- {scale}, {card}: {', '.join(arms)}" for card, arms in sorted(groups.items()))


def trained_again() -> str:
    """`noise.reruns` of all scales as a table: between cards, and on one; a sentence while there are none.

    The root mean square of what lies between the two, and the mean of the second minus the first.
    """
    found = pd.concat([noise.reruns(scale).assign(scale=scale) for scale in TRAINED])
    if not len(found):
        return "No run has been trained a second time yet, on either card."
    found["cards"] = np.where(found["first on"] == found["again on"], "the same", "another")
    parts = found.groupby(["scale", "arm", "cards"], sort=False)
    table = pd.DataFrame({"n": parts.size()})
    for loss in noise.LOSSES.values():
        table[loss] = parts[loss].agg(noise.root_mean_square).map("{:.4f}".format)
        table[f"{loss}, mean"] = parts[loss].mean().map("{:+.4f}".format)
    return figures.markdown(table.reset_index())


def across_cards(scale: str) -> str:
    """How many runs ran on another kind of GPU than the dense run of their seed: "62 of 107"."""
    frame = runs(scale).assign(device=lambda runs: [record.device for record in runs["record"]])
    dense = frame.query("arm == 'dense'").set_index("seed")["device"]
    others = frame.query("arm != 'dense'")
    return f"{(others['device'] != others['seed'].map(dense)).sum()} of {len(others)}"


def _millions(number: float) -> str:
    return f"{number / 1e6:.1f}M"
