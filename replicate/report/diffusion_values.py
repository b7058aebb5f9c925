"""Sentences and a table of the chapter on pictures and clips, from whatever runs are recorded.

A difference is called only with SEEDS seeds or more; with fewer the sentence says how many there are.
"""

from __future__ import annotations

from functools import cache

import pandas as pd

from replicate.report.diffusion_plots import LABELS, loss, losses, runs
from replicate.study.records import Record, RecordStore
from replicate.study.statistics import Stats, paired, summary

SEEDS = 3  # from which on a difference is called
ALONE = {"block16": "active16", "tile24": "act24"}  # tokens choose together -> each one alone
RUN = "python -m replicate diffusion --kind {} --profile gpu --record"
Runs = dict[str, dict[int, Record]]


@cache
def values(store: RecordStore | None = None) -> dict[str, str]:
    """Name -> text of the chapter's numbers and sentences: "pictures, losses", "clips", ..."""
    pictures, clips = (runs(kind, store) for kind in ("image", "video"))
    if "dense" not in pictures:
        missing = f"No dense run on pictures is recorded yet: `{RUN.format('image')}`."
        names = ("seeds", "flow", "losses", "fonts", "together", "judge")
        found = {f"pictures, {name}": missing for name in names}
    else:
        found = {
            "pictures, seeds": seeds(pictures),
            "pictures, flow": flow(pictures),
            "pictures, losses": compared(pictures, "poses"),
            "pictures, fonts": compared(pictures, "fonts"),
            "pictures, together": together(pictures),
            "pictures, judge": judged(pictures),
        }
    if "dense" in clips:
        found["clips"] = (
            f"of clips there are {seeds(clips)}. {compared(clips, 'poses')} Of them {judged(clips)}"
        )
    else:
        found["clips"] = f"no clips are compared with dense yet. The command is `{RUN.format('video')}`."
    return found


def short() -> dict[str, str]:
    """Name -> number: "pictures, dense", its held-out loss; "pictures, act24", that arm's above it."""
    pictures = runs("image")
    found = {f"pictures, {arm}": _digits(gap) for arm, gap in above(pictures, "poses").items()}
    return found | {"pictures, dense": dense(pictures)}


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


def compared(by_arm: Runs, split: str) -> str:
    """Each arm's held-out loss minus dense, and which of these differences may be called one."""
    gaps = {f"*{LABELS[arm]}*": gap for arm, gap in above(by_arm, split).items()}
    return _called(gaps, "dense") if gaps else "No other arm shares a seed with a dense run yet."


def above(by_arm: Runs, split: str) -> dict[str, Stats]:
    """Arm -> its held-out loss minus dense's, for arms that share a seed with dense."""
    gaps = losses(by_arm)[f"{split} over dense"].drop("dense")
    return {str(arm): gap for arm, gap in gaps.items() if isinstance(gap, Stats)}


def together(by_arm: Runs, split: str = "poses") -> str:
    """Loss of arms whose tokens choose together minus that of the same format where each chooses alone."""
    gaps: dict[str, Stats] = {}
    for arm, alone in ALONE.items():
        ours, theirs = by_arm.get(arm, {}), by_arm.get(alone, {})
        if shared := sorted(ours.keys() & theirs.keys()):
            found = paired(*([loss(runs[seed], split) for seed in shared] for runs in (ours, theirs)))
            gaps[f"*{LABELS[arm]}* minus *{LABELS[alone]}*"] = found
    return _called(gaps, "zero") if gaps else "No arm whose tokens choose together is recorded yet."


def _called(gaps: dict[str, Stats], base: str) -> str:
    """Each difference by its name, and which of them are surely on one side of `base`."""
    listed = "; ".join(f"{name} {_digits(gap)}" for name, gap in gaps.items())
    enough = {arm: gap for arm, gap in gaps.items() if gap.n >= SEEDS}
    called = {
        f"surely above {base}": [arm for arm, gap in enough.items() if gap.low > 0],
        f"surely below {base}": [arm for arm, gap in enough.items() if gap.high < 0],
        f"not told from {base}": [arm for arm, gap in enough.items() if gap.low <= 0 <= gap.high],
        f"fewer than {SEEDS} seeds, so no difference is called": [arm for arm in gaps if arm not in enough],
    }
    if not enough:
        most = max(gap.n for gap in gaps.values())
        return f"{listed}. At most {most} {_seed(most)} an arm: no difference is called."
    parts = [f"{what}: {', '.join(arms)}" for what, arms in called.items() if arms]
    said = "; ".join(parts)
    return f"{listed}. {said[0].upper()}{said[1:]}."


def judged(by_arm: Runs) -> str:
    """What the judge makes of samples and of real pictures."""
    table = scores(by_arm)
    *arms, real = table["read as asked"].dropna()
    return (
        f"the judge reads {real:.1%} of real held-out pictures as what they are, "
        f"and {min(arms):.1%} to {max(arms):.1%} of the samples, by arm."
    )


def scores(by_arm: Runs) -> pd.DataFrame:
    """A row an arm and one of real pictures: seeds, share that the judge reads as asked, Fréchet distance."""
    table = losses(by_arm)
    ran = [record.results["real"] for by_seed in by_arm.values() for record in by_seed.values()]
    rows = [
        {
            "pictures": LABELS[arm],
            "seeds": str(row["seeds"]),
            "read as asked": row["accuracy"],
            "Fréchet distance": row["frechet"],
        }
        for arm, row in table.iterrows()
    ]
    real = {
        "pictures": "real, held out",
        "seeds": "",
        "read as asked": summary([r["accuracy"]["poses"] for r in ran]).mean,
        "Fréchet distance": summary([r["frechet"] for r in ran]).mean,
    }
    return pd.DataFrame([*rows, real])


def _digits(gap: Stats) -> str:
    """Like `study_tables.brief`, with a digit more, since these losses are smaller."""
    half = f" ± {gap.half:.4f}" if gap.n > 1 else ""
    return f"{gap.mean:+.4f}{half} ({gap.n})"


def _seed(count: int) -> str:
    return "seed" if count == 1 else "seeds"
