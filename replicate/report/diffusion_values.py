"""Sentences and a table of the chapter on pictures and clips, from whatever runs are recorded.

A difference is called only with SEEDS seeds or more; with fewer the sentence says how many there are.
"""

from __future__ import annotations

import math
from functools import cache

import pandas as pd

from replicate.report.diffusion_plots import LABELS, loss, losses, runs
from replicate.study.records import Record, RecordStore
from replicate.study.statistics import Stats, paired, summary, widened

KINDS = {"pictures": "image", "clips": "video"}
SEEDS = 3  # from which on a difference is called
OPEN = "open"
ALONE = {"block16": "active16", "tile24": "act24"}  # tokens choose together -> each one alone
Runs = dict[str, dict[int, Record]]


@cache
def values(store: RecordStore | None = None) -> dict[str, str]:
    """Name -> text of the chapter's numbers and sentences: "pictures, seeds", "clips, judge", ...

    Raises ValueError without dense runs of both kinds.
    """
    found = {}
    for what, kind in KINDS.items():
        by_arm = runs(kind, store)
        losses(by_arm)  # raises without dense
        parts = {"seeds": seeds(by_arm), "size": size(by_arm), "flow": flow(by_arm)}
        parts |= {"together": together(by_arm), "judge": judged(by_arm, what)}
        found |= {f"{what}, {name}": text for name, text in parts.items()}
    return found


def shares(store: RecordStore | None = None) -> dict[str, str]:
    """Name -> how much above dense's loss an arm's is: "clips, share venom16". Raises ValueError likewise."""
    found = {}
    for what, kind in KINDS.items():
        by_arm = runs(kind, store)
        arms = above(by_arm, "poses")
        found |= {f"{what}, share {arm}": f"{share(by_arm, arm).mean:.0%}" for arm in arms}
    return found


def seeds(by_arm: Runs) -> str:
    """How many arms, and seeds of each: "5 arms, one seed each"."""
    counts = sorted({len(by_seed) for by_seed in by_arm.values()})
    text = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    each = "one seed each" if counts == [1] else f"{text} seeds each"
    return f"{len(by_arm)} {'arm' if len(by_arm) == 1 else 'arms'}, {each}"


def size(by_arm: Runs) -> str:
    """Parameters and steps of the dense runs."""
    record = next(iter(by_arm["dense"].values()))
    return f"{record.results['parameters'] / 1e6:.0f} million parameters, {record.config['steps']:,} steps"


def flow(by_arm: Runs) -> str:
    """The dense model's loss beside that of the zero velocity."""
    ran = by_arm["dense"].values()
    ours = summary([loss(record, "poses") for record in ran]).mean
    zero = summary([record.results["zero_loss"] for record in ran]).mean
    return f"{ours:.3f}, where a velocity of zero has {zero:.2f}"


def above(by_arm: Runs, split: str) -> dict[str, Stats]:
    """Arm -> its held-out loss minus dense's, for arms that share a seed with dense; see `_floored`."""
    gaps = losses(by_arm)[f"{split} over dense"].drop("dense")
    return _floored({str(arm): gap for arm, gap in gaps.items() if isinstance(gap, Stats)})


def share(by_arm: Runs, arm: str) -> Stats:
    """`above` of an arm on new poses, over dense's mean loss."""
    gap, whole = above(by_arm, "poses")[arm], losses(by_arm).loc["dense", "poses"]
    return Stats(gap.mean / whole, gap.std / whole, gap.low / whole, gap.high / whole, gap.n)


def differences(by_arm: Runs) -> pd.DataFrame:
    """A row an arm: its held-out loss minus dense's on both splits, and the side of zero of its interval."""
    rows: dict[str, dict[str, str]] = {}
    for split, name in {"poses": "new poses", "fonts": "new fonts"}.items():
        gaps = above(by_arm, split)
        for arm, gap in gaps.items():
            side = _side(gap) if gap.n >= SEEDS else "too few seeds"
            row = rows.setdefault(arm, {"feed-forward layer": LABELS[arm]})
            row |= {f"{name}, minus dense": _digits(gap), f"{name}: side of dense": side}
    return pd.DataFrame(rows.values())


def _floored(gaps: dict[str, Stats]) -> dict[str, Stats]:
    """Comparisons of one family, none with an interval narrower than their common spread makes it."""
    several = [gap.std**2 for gap in gaps.values() if gap.n > 1]
    floor = math.sqrt(sum(several) / len(several)) if several else 0.0
    return {name: widened(gap, floor) for name, gap in gaps.items()}


def together(by_arm: Runs) -> str:
    """Loss of arms whose tokens choose together minus that of the same format where each chooses alone.

    On new poses; and which of these differences are surely on one side of zero.
    """
    gaps: dict[str, Stats] = {}
    for arm, alone in ALONE.items():
        ours, theirs = by_arm.get(arm, {}), by_arm.get(alone, {})
        if shared := sorted(ours.keys() & theirs.keys()):
            found = paired(*([loss(side[seed], "poses") for seed in shared] for side in (ours, theirs)))
            gaps[f"*{LABELS[arm]}* minus *{LABELS[alone]}*"] = found
    if not gaps:
        return "No arm whose tokens choose together shares a seed with its like yet."
    gaps = _floored(gaps)
    listed = "; ".join(f"{name} {_digits(gap)}" for name, gap in gaps.items())
    if min(gap.n for gap in gaps.values()) < SEEDS:
        return f"{listed}. With fewer than {SEEDS} seeds no difference is called."
    sides = {name: _side(gap) for name, gap in gaps.items()}
    if set(sides.values()) == {OPEN}:
        return f"{listed}. All these intervals contain zero."
    return f"{listed}. {'; '.join(f'{name}: {side}' for name, side in sides.items())}."


def judged(by_arm: Runs, what: str) -> str:
    """What the judge makes of samples and of real pictures, or clips."""
    table = scores(by_arm)
    *arms, real = table["read as asked"].dropna()
    return (
        f"the judge reads {real:.1%} of real held-out {what} as what they are, "
        f"and {min(arms):.1%} to {max(arms):.1%} of the samples, by arm."
    )


def scores(by_arm: Runs) -> pd.DataFrame:
    """A row an arm and one of real pictures: seeds, share that the judge reads as asked, Fréchet distance."""
    table = losses(by_arm)
    apart = table["accuracy over dense"].drop("dense")
    gaps = _floored({arm: gap for arm, gap in apart.items() if isinstance(gap, Stats)})
    ran = [record.results["real"] for by_seed in by_arm.values() for record in by_seed.values()]
    rows = [
        {
            "layer": LABELS[arm],
            "seeds": str(row["seeds"]),
            "read as asked": row["accuracy"],
            "minus dense, percentage points": _points(gaps[arm]) if arm in gaps else "",
            "Fréchet distance": row["frechet"],
        }
        for arm, row in table.iterrows()
    ]
    real = {
        "layer": "real, held out",
        "seeds": "",
        "minus dense, percentage points": "",
        "read as asked": summary([r["accuracy"]["poses"] for r in ran]).mean,
        "Fréchet distance": summary([r["frechet"] for r in ran]).mean,
    }
    return pd.DataFrame([*rows, real])


def _side(gap: Stats) -> str:
    """Where the whole interval lies, "above" or "below" zero; OPEN if zero is in it."""
    return "above" if gap.low > 0 else "below" if gap.high < 0 else OPEN


def _digits(gap: Stats) -> str:
    """Like `study_tables.brief`, with a digit more, since these losses are smaller."""
    half = f" ± {gap.half:.4f}" if gap.n > 1 else ""
    return f"{gap.mean:+.4f}{half} ({gap.n})"


def _points(gap: Stats) -> str:
    return f"{100 * gap.mean:+.1f}" + (f" ± {100 * gap.half:.1f}" if gap.n > 1 else "")
