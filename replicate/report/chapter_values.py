"""What the notebooks' text shows between markers: numbers from the records, and links to other chapters."""

from __future__ import annotations

import re

from replicate import paper, study
from replicate.config import TrainConfig
from replicate.report import kernel_values, notebooks, replication_page, run_values, study_tables
from replicate.training.flops import param_count

_LOSS = re.compile(r"(held-out|training) (laptop|gpu|gpu40m): (.+?)(?: - (.+))?")
_ZEROS = re.compile(r"zeros (laptop|gpu|gpu40m)")
_BEFORE = re.compile(r"2503\.16672: (.+?)(?: - (.+))?")
_COLUMN = {"held-out": study_tables.HELD, "training": study_tables.TRAIN}


def value(book: notebooks.Notebook, name: str) -> str:
    """The text that stands for a name in a notebook, "" for an unknown one.

    "links": to other chapters. "held-out gpu: A - B": the loss of arm A above B (A alone: above dense),
    mean ± half of the 95 % interval (number of seeds); likewise "training laptop: A".
    "2503.16672: A - B": that paper's loss of A minus that of B. "tokens, gpu over laptop" (or "parameters"):
    how many times as many. "zeros gpu": natural sparsity of dense training, mean over layers and seeds.
    Other names are those of `run_values`, `kernel_values` and `replication_page`.
    """
    if name == "links":
        return _links(book)
    if found := _LOSS.fullmatch(name):
        kind, scale, *arms = found.groups()
        pair = tuple(arm for arm in arms if arm not in (None, "dense"))
        return study_tables.brief(study_tables.contrast(study_tables.runs(scale), pair, _COLUMN[kind]))
    if found := _ZEROS.fullmatch(name):
        dense = study_tables.runs(found[1]).query("arm == 'dense'")
        return f"{100 * dense['y2_sparsity'].mean():.1f} %"
    if found := _BEFORE.fullmatch(name):
        losses = paper.data()["neighbours"]["2503.16672"]
        return f"{losses[found[1]] - (losses[found[2]] if found[2] else 0):.3f}"
    if name in ("parameters, gpu over laptop", "tokens, gpu over laptop"):
        gpu, laptop = (study.arms(scale, ["dense"])[0] for scale in ("gpu", "laptop"))
        if name.startswith("tokens"):
            return f"{gpu.steps * gpu.tokens_per_step / laptop.steps / laptop.tokens_per_step:.0f}"
        return f"{_weights(gpu) / _weights(laptop):.0f}"
    return run_values.value(name) or kernel_values.value(name) or replication_page.value(name)


def _weights(config: TrainConfig) -> int:
    return param_count(config.model)["non_embedding"]


def _links(book: notebooks.Notebook) -> str:
    books = notebooks.discover()
    place = [other.name for other in books].index(book.name)
    near = {"← {}": books[place - 1 : place], "{} →": books[place + 1 : place + 2]}
    links = [f"[{look.format(b.title)}]({b.path.name})" for look, some in near.items() for b in some]
    return " | ".join(
        [*links, "[all chapters](../README.md#the-notebooks)", "[glossary](../docs/glossary.md)"]
    )
