"""What the text of notebooks 09 and 10 shows between markers, beside losses: switches, speeds, shares."""

from __future__ import annotations

from functools import cache

from replicate import paper
from replicate.report import mix_tables, replication_page
from replicate.report import study_tables as tables
from replicate.study import completion


@cache
def values() -> dict[str, str]:
    """Name -> text of every number, from the records that the notebooks' figures show."""
    return _switches() | _mixes() | _accuracy()


def value(name: str) -> str:
    """The text of one of `values`, "" for an unknown name."""
    return values().get(name, "")


def _switches() -> dict[str, str]:
    """The jumps where the recipe is switched on and off, in nats, and the steps until the first is over."""
    out, runs = {}, mix_tables.recorded()
    for arm, row in replication_page.spike().iterrows():
        out |= {f"spike {arm}, {when}": f"{row[when]:.2f}" for when in ("before", "highest")}
        out[f"spike {arm}, back"] = f"{row['steps until back']:.0f}"
    for scale, part in runs.items():
        for name in mix_tables.FIRST:
            arm = "recipe" + mix_tables.MIXES[name]
            if arm in set(part["arm"]):
                start, gap = mix_tables.switch_off(scale, part, arm)
                here = f"off {scale} {name}"
                out |= {f"{here}, before": f"{gap[start - 20 : start].mean():.2f}"}
                out |= {f"{here}, {k}": f"{gap[start + k]:.2f}" for k in (0, 25)}
                out[f"dense end {scale} {name}"] = f"{len(gap) - start:,}"
    return out


def _mixes() -> dict[str, str]:
    """What the dense end wins back, the second reading in a sentence, the average that Table 4 prints."""
    out = {"second reading": second_reading()}
    for scale, runs in mix_tables.recorded().items():
        half, whole = (mix_tables.above(runs, arm) for arm in (tables.HALF, "recipe"))
        out[f"won back {scale}"] = f"{100 * (1 - half.mean / whole.mean):.0f} %"
    for name, found in mix_tables.speeds().items():
        out |= {f"a run by {name}, {arm}": f"{x:.2f}" for arm, x in found.items()}
    out["Table 4, last average"] = f"{paper.rows(4)[-1]['avg']:.3f}"
    return out | {"Table 4, last recomputed": f"{mix_tables.averages()['recipe']:.3f}"}


def second_reading() -> str:
    """What the dense end does if the backward pass reads what the forward pass read, as far as it ran."""
    arms = ("recipe, same, 50% sparse first", "recipe, same")
    ran, sure = [], []
    for scale, runs in mix_tables.recorded().items():
        half, whole = (mix_tables.above(runs, arm) for arm in arms)
        if half and whole:
            ran.append(f"{tables.brief(half)} at scale `{scale}`, {tables.brief(whole)} if sparse to the end")
            sure.append(half.low > 0)
    if not ran:
        return "No mix of this kind is recorded yet, only runs that are sparse to the end (below)."
    listed = f"With half of the steps sparse it ends above dense by {'; by '.join(ran)}. "
    if all(sure):
        return listed + "So under this reading, too, a dense end of this length stays above dense."
    if not any(sure):
        return listed + "The intervals include zero: this cannot be told from dense."
    return listed + "Some of these intervals include zero, so it depends on the scale."


def _accuracy() -> dict[str, str]:
    """Questions asked of a model, and the largest standard error of such a score."""
    count = completion.QUESTIONS["gpu"]["n"]
    items = paper.data()["test_items"].values()
    out = {"questions": f"{count:,}", "standard error": f"{0.5 / count**0.5:.3f}"}
    return out | {"test items": f"{min(items):,} to {max(items):,}"}
