"""What the study has trained and what not: setting, machines, missing arms, runs trained twice."""

import numpy as np
import pandas as pd

from replicate import figures
from replicate.report import costs
from replicate.report.study_tables import HELD, SIZES, TRAIN, every_run, runs
from replicate.settings.text import from_dict
from replicate.study import noise, plans
from replicate.study.records import Record
from replicate.training.flops import param_count


def settings() -> dict[str, dict[str, str]]:
    """`setting` and `costs.how_it_ran` of each of SIZES and text, so of every record.

    "laptop, on a CPU" is what a CPU trained on its own version of the text.
    """
    out = {}
    for scale in SIZES:
        frame = every_run(scale)
        text = frame["record"].map(lambda record: record.corpus["sha256"])
        for _, part in frame.groupby(text, sort=False):
            first = part["record"].iloc[0]
            other = "on a CPU" if first.device.startswith("CPU") else first.corpus["corpus"]
            found = setting(scale, part) | costs.how_it_ran(part["record"].tolist())
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
        "held-out tokens, of these evaluated": f"{_millions(corpus['valid_tokens'])}, {evaluated}",
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
    for scale in SIZES:
        frame = every_run(scale)
        text = [record.corpus["sha256"] for record in frame["record"]]
        seeds = frame.groupby(["arm", text])["seed"].nunique().groupby("arm").max()
        plan = plans.AT_40M if scale == "gpu40m" else tuple(plans.everything(scale))
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
    """`noise.reruns` of all scales as a table: between cards, and on one; a sentence while there are none."""
    found = pd.concat([noise.reruns(scale).assign(scale=scale) for scale in SIZES])
    if not len(found):
        return "No run has been trained a second time yet, on either card."
    found["cards"] = np.where(found["first on"] == found["again on"], "the same", "another")
    parts = found.groupby(["scale", "arm", "cards"], sort=False)
    table = parts[["training", "held-out"]].agg(lambda apart: float(np.sqrt(np.mean(np.square(apart)))))
    table = table.map("{:.4f}".format).assign(n=parts.size()).reset_index()
    return figures.markdown(table)


def across_cards(scale: str) -> str:
    """How many runs ran on another kind of GPU than the dense run of their seed: "62 of 107"."""
    frame = runs(scale).assign(device=lambda runs: [record.device for record in runs["record"]])
    dense = frame.query("arm == 'dense'").set_index("seed")["device"]
    others = frame.query("arm != 'dense'")
    return f"{(others['device'] != others['seed'].map(dense)).sum()} of {len(others)}"


def _millions(number: float) -> str:
    return f"{number / 1e6:.1f}M"
