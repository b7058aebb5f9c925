"""What the notebooks' text shows between markers: losses from the records, and links to other chapters."""

from __future__ import annotations

import re

from replicate.report import notebooks, replication_page, study_tables

_LOSS = re.compile(r"(held-out|training) (laptop|gpu|gpu40m): (.+?)(?: - (.+))?")
_ZEROS = re.compile(r"zeros (laptop|gpu|gpu40m)")
_COLUMN = {"held-out": study_tables.HELD, "training": study_tables.TRAIN}


def value(book: notebooks.Notebook, name: str) -> str:
    """The text that stands for a name in a notebook, "" for an unknown one.

    "links": to other chapters. "held-out gpu: A - B": the loss of arm A above B (A alone: above dense),
    mean ± half of the 95 % interval (number of seeds); likewise "training laptop: A".
    "zeros gpu": natural sparsity at the end of dense training, mean over layers and seeds.
    Other names are those of `replication_page.values`.
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
    return replication_page.value(name)


def _links(book: notebooks.Notebook) -> str:
    books = notebooks.discover()
    place = [other.name for other in books].index(book.name)
    near = {"← {}": books[place - 1 : place], "{} →": books[place + 1 : place + 2]}
    links = [f"[{look.format(b.title)}]({b.path.name})" for look, some in near.items() for b in some]
    return " | ".join(
        [*links, "[all chapters](../README.md#the-notebooks)", "[glossary](../docs/glossary.md)"]
    )
