"""What a claim of the paper is, and how it is judged: five verdicts, always computed.

The claims themselves are data (`data/paper.json`, read by `replicate.paper.table`).
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from replicate.study import statistics

VERDICTS = ("holds", "holds in direction", "another size", "does not hold", "not testable here")
HOLDS, DIRECTION, SIZE, FAILS, UNTESTABLE = VERDICTS
SPARES = "refutes nothing"  # of a scale below the one from which a claim can fail
PROFILES = ("smoke", "laptop", "gpu", "gpu40m", "gpu100m", "paper")  # scales of a measurement, ascending
RULES = ("true", "equals", "at least", "at most", "effect")
# Our effect over the paper's, both measured from `null`, so of a speed 1.4x the .4: within the first pair an
# effect holds in size, outside of the second one it is another size, between them it holds in direction.
SAME_SIZE, OTHER_SIZE = (0.5, 2.0), (0.1, 10.0)


@dataclass(frozen=True)
class Claim:
    """One checkable statement of the paper. The fields are those of `data/paper.json`.

    rule: how `ours` is compared with `paper` (a number, [low, high], or None for "in this direction"):
        "true"      ours is True
        "equals"    within the tolerance
        "at least", "at most"    on this side of the number, give or take the tolerance; with `null`, an
                    effect that is there but smaller holds in direction
        "effect"    on the paper's side of `null`, with a size by SAME_SIZE and OTHER_SIZE; no tolerance
    noisy: needs repeated runs; without an interval nothing follows.
    stand_by: a check raises when the verdict contradicts `expected`.
    holds_from, fails_from: the smallest scale whose numbers may say "holds" and "does not hold".
    """

    id: str
    place: str
    statement: str
    paper: Any
    unit: str
    rule: str
    tolerance: float
    how: str
    notebook: str
    stand_by: bool
    null: float | None = None
    sign: int | None = None
    noisy: bool = False
    expected: str = HOLDS
    holds_from: str = "smoke"
    fails_from: str = "smoke"
    needs: str = ""

    def __post_init__(self) -> None:
        known = {"rule": RULES, "holds_from": PROFILES, "fails_from": PROFILES, "expected": (HOLDS, FAILS)}
        for name, choices in known.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"claim {self.id}: {name} is {value!r}; choose one of {', '.join(choices)}")
        if self.rule == "effect" and (self.null is None or (self.paper is None and self.sign is None)):
            raise ValueError(f"claim {self.id}: an effect needs null, and a paper's number or a sign")
        if self.rule == "effect" and self.tolerance:
            raise ValueError(f"claim {self.id}: tolerance is {self.tolerance}; an effect has none, set 0")
        if self.rule != "effect" and self.paper is None:
            raise ValueError(f"claim {self.id}: rule {self.rule!r} needs the paper's number")

    @property
    def key(self) -> str:
        """Fingerprint of what is claimed and how it is judged; a changed claim voids older verdicts."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Verdict:
    """One of the five verdicts, the reason in a sentence, and the interval it rests on (or None)."""

    text: str
    why: str
    low: float | None = None
    high: float | None = None


def judge(
    claim: Claim, ours: Any, spread: float | None = None, n: int = 1, profile: str = "smoke"
) -> Verdict:
    """The verdict on a claim, given our number.

    With a spread the comparison is between intervals, ours +- t(n - 1) spread / sqrt(n) at 95 %: a claim
    holds or fails only if the whole interval says so; an effect is of another size by the middle alone.
    Numbers from a smaller scale than the claim asks for can at most hold in direction, or refute nothing.

    Args:
        ours: number, bool (rule "true"), `statistics.Stats`, or None if it was not measured.
        spread: sample standard deviation over n runs.
        profile: scale at which the numbers were got: of a recorded GPU study "gpu", on any machine.

    Raises ValueError for an unknown profile, a number that is not finite, or a spread without n >= 2.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile is {profile!r}; choose one of {', '.join(PROFILES)}")
    ours, spread, n = unpack(ours, spread, n)
    if ours is None:
        return Verdict(UNTESTABLE, f"needs {claim.needs}" if claim.needs else "not measured here")
    if claim.rule == "true":
        if not isinstance(ours, bool):
            raise ValueError(f"claim {claim.id} is true or false, not {ours!r}")
        found = Verdict(HOLDS, "our check says yes") if ours else Verdict(FAILS, "our check says no")
        return _at_scale(claim, found, profile)
    low, high = _interval(claim, ours, spread, n)
    if claim.noisy and spread is None:
        return Verdict(UNTESTABLE, "one run has no interval; repeat it with other seeds")
    compare = {"equals": _equals, "effect": _effect}.get(claim.rule, _bound)
    verdict, why = compare(claim, low, high)
    return _at_scale(claim, Verdict(verdict, why, low, high), profile)


def _equals(claim: Claim, low: float, high: float) -> tuple[str, str]:
    least, most = claim.paper - claim.tolerance, claim.paper + claim.tolerance
    if least - _slack(least) <= low and high <= most + _slack(most):
        return HOLDS, f"ours is within {text(claim.tolerance)} of the paper's"
    if low > most or high < least:
        return FAILS, f"ours is off by {max(claim.paper - high, low - claim.paper):.2g}"
    return UNTESTABLE, "too noisy: our interval reaches beyond the tolerance"


def _bound(claim: Claim, low: float, high: float) -> tuple[str, str]:
    """At least or at most; the second is the first with every sign turned."""
    limit = claim.paper - claim.tolerance * (1 if claim.rule == "at least" else -1)
    bound, null = limit, claim.null
    if claim.rule == "at most":
        low, high, bound, null = -high, -low, -bound, None if null is None else -null
    if low >= bound - _slack(bound):
        return HOLDS, f"ours is {claim.rule} {text(limit)}"
    if null is not None and low > null:
        times = ((low + high) / 2 - null) / (bound - null)
        close = high >= bound or times >= OTHER_SIZE[0]
        why = f"{times:.2g} times the least effect that the paper says"
        why += "; our interval includes the paper's" if high >= bound else ""
        return DIRECTION if close else SIZE, why
    if high < (bound if null is None else null) + _slack(bound):
        return FAILS, f"ours is off by {bound - high:.2g}"
    return UNTESTABLE, "too noisy: our interval reaches across the limit"


def _effect(claim: Claim, low: float, high: float) -> tuple[str, str]:
    least, most = claim.paper if isinstance(claim.paper, list) else (claim.paper, claim.paper)
    sign = claim.sign or (1 if (least + most) / 2 > claim.null else -1)
    if low == high == claim.null:
        return FAILS, "no effect at all"
    if low <= claim.null <= high:
        return UNTESTABLE, f"too noisy at this scale: our interval includes {text(claim.null)}"
    if (low - claim.null) * sign < 0:
        return FAILS, "the opposite of the paper's direction"
    if least is None:
        return HOLDS, "the same direction as the paper's"
    ours = sorted(abs(end - claim.null) for end in (low, high))
    theirs = sorted(abs(end - claim.null) for end in (least, most))
    near, far = SAME_SIZE[0] * theirs[0] - _slack(most), SAME_SIZE[1] * theirs[1] + _slack(most)
    whole = near <= ours[0] and ours[1] <= far
    middle = sum(ours) / 2
    paper, end = (theirs[0], "lower") if middle < theirs[0] else (theirs[1], "upper")
    times = middle / paper
    why = f"{times:.2g} times the paper's effect" + (f", {end} end" if least != most else "")
    if theirs[0] <= middle <= theirs[1] and least != most:
        times, why = 1.0, "within the paper's range"
    if low != high:
        why += f" ({ours[0] / paper:.2g} to {ours[1] / paper:.2g})"
    if whole:
        return HOLDS, why
    return (DIRECTION if OTHER_SIZE[0] <= times <= OTHER_SIZE[1] else SIZE), why


def _at_scale(claim: Claim, verdict: Verdict, profile: str) -> Verdict:
    """Take back what numbers from this scale cannot say."""
    rank = PROFILES.index(profile)
    if verdict.text == HOLDS and rank < PROFILES.index(claim.holds_from):
        why = f"{verdict.why}, at {profile} scale; to say more needs {claim.needs or claim.holds_from}"
        return dataclasses.replace(verdict, text=DIRECTION, why=why)
    if verdict.text == FAILS and rank < PROFILES.index(claim.fails_from):
        why = f"{verdict.why}, but {profile} scale {SPARES}; needs {claim.needs or claim.fails_from}"
        return dataclasses.replace(verdict, text=UNTESTABLE, why=why)
    return verdict


def unpack(ours: Any, spread: float | None, n: int) -> tuple[Any, float | None, int]:
    """(ours, spread, n) in plain numbers; `ours` may be a `statistics.Stats`: its interval counts."""
    if isinstance(ours, statistics.Stats):
        return ours.mean, ours.spread if ours.n > 1 else None, ours.n
    if hasattr(ours, "item"):
        ours = ours.item()
    return ours, spread, n


def _interval(claim: Claim, ours: float, spread: float | None, n: int) -> tuple[float, float]:
    if isinstance(ours, bool) or not math.isfinite(ours):
        raise ValueError(f"claim {claim.id}: ours is {ours!r}; give a finite number")
    if spread is None:
        return float(ours), float(ours)
    if not (math.isfinite(spread) and spread >= 0 and n >= 2):
        raise ValueError(f"claim {claim.id}: spread {spread} over n = {n} runs; a spread needs n >= 2")
    half = statistics.t_quantile(n - 1) * spread / math.sqrt(n)
    return float(ours - half), float(ours + half)


def text(value: float, signed: bool = False) -> str:
    """A number as the tables show it: five significant digits, a sign if wanted."""
    return f"{value:+.5g}" if signed and value else f"{value:.5g}"


def _slack(value: float) -> float:
    """Rounding allowed at a limit: decimal numbers are not exact in binary."""
    return 1e-12 * max(1.0, abs(value))
