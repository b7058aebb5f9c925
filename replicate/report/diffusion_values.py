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
ALONE = {"block16": "active16", "tile24": "act24"}  # tokens choose together -> each one alone
RUN = "python -m replicate diffusion --kind {} --profile gpu --record"
Runs = dict[str, dict[int, Record]]


@cache
def values(store: RecordStore | None = None) -> dict[str, str]:
    """Name -> text of the chapter's numbers and sentences: "pictures, seeds", "clips, judge", ..."""
    found = {}
    for what, kind in KINDS.items():
        by_arm = runs(kind, store)
        if "dense" in by_arm:
            parts = {"seeds": seeds(by_arm), "flow": flow(by_arm), "together": together(by_arm)}
            parts["judge"] = judged(by_arm, what)
        else:
            missing = f"No dense run on {what} is recorded yet: `{RUN.format(kind)}`."
            parts = dict.fromkeys(("seeds", "flow", "together", "judge"), missing)
        found |= {f"{what}, {name}": text for name, text in parts.items()}
    return found


def shares(store: RecordStore | None = None) -> dict[str, str]:
    """Name -> how much above dense's loss an arm's is: "clips, share venom16"; none without dense."""
    found = {}
    for what, kind in KINDS.items():
        by_arm = runs(kind, store)
        arms = above(by_arm, "poses") if "dense" in by_arm else ()
        found |= {f"{what}, share {arm}": f"{share(by_arm, arm).mean:.0%}" for arm in arms}
    return found


def seeds(by_arm: Runs) -> str:
    """How many arms, and seeds of each: "5 arms, one seed each"."""
    counts = sorted({len(by_seed) for by_seed in by_arm.values()})
    text = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    each = "one seed each" if counts == [1] else f"{text} seeds each"
    return f"{len(by_arm)} {'arm' if len(by_arm) == 1 else 'arms'}, {each}"


def dense(by_arm: Runs) -> str:
    """The dense model's held-out loss, mean of its seeds."""
    return f"{summary([loss(record, 'poses') for record in by_arm['dense'].values()]).mean:.3f}"


def flow(by_arm: Runs) -> str:
    """The dense model's loss beside that of the zero velocity."""
    ran = [record.results for record in by_arm["dense"].values()]
    zero = summary([r["zero_loss"] for r in ran]).mean
    return f"{dense(by_arm)}, where a velocity of zero has {zero:.2f}"


def above(by_arm: Runs, split: str) -> dict[str, Stats]:
    """Arm -> its held-out loss minus dense's, for arms that share a seed with dense; see `_floored`."""
    gaps = losses(by_arm)[f"{split} over dense"].drop("dense")
    return _floored({str(arm): gap for arm, gap in gaps.items() if isinstance(gap, Stats)})


def share(by_arm: Runs, arm: str, split: str = "poses") -> Stats:
    """`above` of an arm, over dense's mean loss."""
    gap, whole = above(by_arm, split)[arm], losses(by_arm).loc["dense", split]
    return Stats(gap.mean / whole, gap.std / whole, gap.low / whole, gap.high / whole, gap.n)


def differences(by_arm: Runs) -> pd.DataFrame:
    """A row an arm: its held-out loss minus dense's on both splits, and the side of zero of its interval."""
    rows: dict[str, dict[str, str]] = {}
    for split, name in {"poses": "new poses", "fonts": "new fonts"}.items():
        gaps = above(by_arm, split)
        for arm, gap in gaps.items():
            told = _side(gap) if gap.n >= SEEDS else "too few seeds"
            row = rows.setdefault(arm, {"feed-forward layer": LABELS[arm]})
            row |= {f"{name}, minus dense": _digits(gap), f"{name}: told from dense?": told}
    return pd.DataFrame(rows.values())


def _floored(gaps: dict[str, Stats]) -> dict[str, Stats]:
    """Comparisons of one family, none with an interval narrower than their common spread makes it."""
    several = [gap.std**2 for gap in gaps.values() if gap.n > 1]
    floor = math.sqrt(sum(several) / len(several)) if several else 0.0
    return {name: widened(gap, floor) for name, gap in gaps.items()}


def together(by_arm: Runs, split: str = "poses") -> str:
    """Loss of arms whose tokens choose together minus that of the same format where each chooses alone."""
    gaps: dict[str, Stats] = {}
    for arm, alone in ALONE.items():
        ours, theirs = by_arm.get(arm, {}), by_arm.get(alone, {})
        if shared := sorted(ours.keys() & theirs.keys()):
            found = paired(*([loss(side[seed], split) for seed in shared] for side in (ours, theirs)))
            gaps[f"*{LABELS[arm]}* minus *{LABELS[alone]}*"] = found
    if not gaps:
        return "No arm whose tokens choose together shares a seed with its like yet."
    return _called(_floored(gaps), "zero")


def _called(gaps: dict[str, Stats], base: str) -> str:
    """Each difference by its name, and which of them are surely on one side of `base`."""
    listed = "; ".join(f"{name} {_digits(gap)}" for name, gap in gaps.items())
    enough = {arm: gap for arm, gap in gaps.items() if gap.n >= SEEDS}
    called = {
        f"above {base}": [arm for arm, gap in enough.items() if _side(gap) == "above"],
        f"below {base}": [arm for arm, gap in enough.items() if _side(gap) == "below"],
        f"not told from {base}": [arm for arm, gap in enough.items() if _side(gap) == "no"],
        f"fewer than {SEEDS} seeds, so no difference is called": [arm for arm in gaps if arm not in enough],
    }
    if not enough:
        most = max(gap.n for gap in gaps.values())
        return f"{listed}. At most {most} {_seed(most)} an arm: no difference is called."
    if len(called[f"not told from {base}"]) == len(gaps) > 1:
        return f"{listed}. None of these is told from {base}."
    parts = [f"{what}: {', '.join(arms)}" for what, arms in called.items() if arms]
    said = "; ".join(parts)
    return f"{listed}. {said[0].upper()}{said[1:]}."


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
            "pictures": LABELS[arm],
            "seeds": str(row["seeds"]),
            "read as asked": row["accuracy"],
            "minus dense, points": _points(gaps[arm]) if arm in gaps else "",
            "Fréchet distance": row["frechet"],
        }
        for arm, row in table.iterrows()
    ]
    real = {
        "pictures": "real, held out",
        "seeds": "",
        "minus dense, points": "",
        "read as asked": summary([r["accuracy"]["poses"] for r in ran]).mean,
        "Fréchet distance": summary([r["frechet"] for r in ran]).mean,
    }
    return pd.DataFrame([*rows, real])


def _side(gap: Stats) -> str:
    """Where the whole interval lies: "above" or "below" zero, or "no"."""
    return "above" if gap.low > 0 else "below" if gap.high < 0 else "no"


def _digits(gap: Stats) -> str:
    """Like `study_tables.brief`, with a digit more, since these losses are smaller."""
    half = f" ± {gap.half:.4f}" if gap.n > 1 else ""
    return f"{gap.mean:+.4f}{half} ({gap.n})"


def _points(gap: Stats) -> str:
    return f"{100 * gap.mean:+.1f}" + (f" ± {100 * gap.half:.1f}" if gap.n > 1 else "")


def _seed(count: int) -> str:
    return "seed" if count == 1 else "seeds"
