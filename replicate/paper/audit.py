"""What does not add up in the paper: each item recomputed from the paper's own numbers.

Every figure below comes from `data/paper.json` and the formulas of `training.flops`; a finding carries the
claim it tests, what the paper prints, what follows, and the arithmetic as text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from replicate import paper
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.sparsity import prune24, sparsity
from replicate.training import flops

BENCHMARKS = ("ArcE", "ArcC", "PIQA", "OBQA", "HSwag", "WinoG")
MODELS = ("1B", "7B", "70B", "405B")


@dataclass(frozen=True)
class Finding:
    """One number recomputed: the item it belongs to (1 to 7, 0 for extras), its claim and arithmetic."""

    item: int
    claim: str
    printed: Any
    follows: float
    arithmetic: str


def findings() -> list[Finding]:
    """Every recomputed number, in the order of the items; `paper.check(f.claim, f.follows)` judges one."""
    parts = (_average, _run_7b, _step_1b, _flop_share, _underived, _ratios, _missing_row)
    return [finding for part in parts for finding in part()]


def mean_accuracy(row: dict[str, Any]) -> float:
    """Mean of a row's six benchmark scores."""
    return sum(row[name] for name in BENCHMARKS) / len(BENCHMARKS)


def standard_errors(score_a: float, score_b: float, items: int) -> float:
    """(a - b) / sqrt((a (1 - a) + b (1 - b)) / items): a difference of two accuracies in standard errors.

    The two models are taken as independent; that they answer the same items makes the true error smaller.
    """
    if items < 1 or not (0 < score_a < 1 and 0 < score_b < 1):
        raise ValueError(
            f"scores {score_a}, {score_b} over {items} items; need scores between 0 and 1, items >= 1"
        )
    variance = (score_a * (1 - score_a) + score_b * (1 - score_b)) / items
    return (score_a - score_b) / math.sqrt(variance)


def accuracy_moves() -> list[dict[str, Any]]:
    """Table 2's sparse minus dense score for each model and benchmark, with its size in standard errors."""
    scores = {row["model"]: row for row in paper.rows(2)}
    rows = []
    for size in ("1B", "7B"):
        for name in BENCHMARKS:
            sparse, dense = scores[f"{size} sparse"][name], scores[f"{size} dense"][name]
            items = paper.data()["test_items"][name]
            row = {"model": size, "benchmark": name, "items": items, "move": sparse - dense}
            rows.append(row | {"standard errors": standard_errors(sparse, dense, items)})
    return rows


def matching_rows(preset: str = "recipe") -> list[str]:
    """The rows of Table 3 whose six products have the same formats as the preset's."""

    def formats(name: str) -> list[tuple[str, str]]:
        return [(operand, kind) for _, operand, kind in SPARSITY_PRESETS[name].products()]

    return [row["sparse"] for row in paper.rows(3) if formats(row["preset"]) == formats(preset)]


def table3_costs() -> dict[str, float]:
    """Table 3's losses above the dense one, by row."""
    losses = {row["sparse"]: row["loss"] for row in paper.rows(3)}
    return {name: loss - losses["dense"] for name, loss in losses.items()}


def _average() -> Iterator[Finding]:
    row = paper.rows(4)[-1]
    mean = mean_accuracy(row)
    terms = " + ".join(f"{row[name]:.3f}" for name in BENCHMARKS)
    yield Finding(1, "audit-1", row["avg"], mean, f"({terms}) / 6 = {mean:.3f}")


def _run_7b() -> Iterator[Finding]:
    sparse, dense = paper.number("mix_7b")
    share, step = sparse / (sparse + dense), paper.number("step_speedup_text")
    printed = paper.rows(2)[3]["speedup"]
    run, limit = flops.run_speedup(share, step), flops.run_speedup(share, math.inf)
    text = f"p = {sparse} / {sparse + dense} = {share:.3f}; "
    yield Finding(2, "audit-2", printed, run, f"{text}1 / (1 - p + p / {step}) = {run:.3f}")
    yield Finding(2, "audit-2-limit", printed, limit, f"{text}1 / (1 - p) = {limit:.3f}")


def _step_1b() -> Iterator[Finding]:
    r, v = flops.formula_share(paper.model("1B")), paper.number("venom_speedup_table2")
    sparse, dense = paper.number("mix_1b")
    step = flops.step_speedup(r, v)
    run = flops.run_speedup(sparse / (sparse + dense), step)
    text = f"r = {r:.2f}, v = {v}: s = 6 / (2 / 1.5 + 4 / {v}) = {flops.ffn_speedup(v):.3f}; step {step:.3f}"
    yield Finding(3, "audit-3", paper.rows(2)[1]["speedup"], run, f"{text}; run {run:.3f}")
    yield Finding(3, "audit-3-text", paper.number("step_speedup_text"), step, text)


def _flop_share() -> Iterator[Finding]:
    for size, name in (("1B", "audit-4"), ("7B", "audit-4-7b")):
        counts = flops.counts(paper.model(size))
        chain = " → ".join(f"{label}: {share:.3f}" for label, share in counts.items())
        yield Finding(4, name, flops.formula_share(paper.model(size)), list(counts.values())[-1], chain)
    r, v = flops.honest_share(paper.model("1B")), paper.number("venom_speedup_text")
    step = flops.step_speedup(r, v)
    text = f"r = {r:.3f}, v = {v}: step {step:.3f}"
    yield Finding(4, "audit-4-step", paper.number("step_speedup_text"), step, text)


def _underived() -> Iterator[Finding]:
    step = paper.number("step_speedup_text")
    sparse, dense = paper.number("mix_1b")
    run = flops.run_speedup(sparse / (sparse + dense), step)
    needed = flops.share_needed(paper.number("headline")[1], step)
    text = (
        f"half of the steps at {step}x: {run:.3f}x; 1.7x would need {100 * needed:.1f} % of the steps sparse"
    )
    yield Finding(5, "audit-5", paper.number("headline")[1], run, text)
    r = flops.formula_share(paper.model("405B"))
    all24 = flops.step_speedup(r, 1.0, n24=6, n_venom=0)
    text = f"405B: r = {r:.3f}; 1 / (1 - r + r / 1.5) = {all24:.3f}"
    yield Finding(5, "audit-5-24", paper.number("speedup_24_405b"), all24, text)
    shares = {size: flops.formula_share(paper.model(size)) for size in MODELS}
    largest = max(shares, key=shares.__getitem__)
    speeds = (paper.number("venom_speedup_largest"), math.inf)
    names = ("audit-5-26", "audit-5-42")
    for name, printed, v in zip(names, paper.number("speedups_underived"), speeds, strict=True):
        best = flops.step_speedup(shares[largest], v)
        text = f"largest share, {largest}: r = {shares[largest]:.3f}; with v = {v}: {best:.3f}x"
        yield Finding(5, name, printed, best, text)


def _ratios() -> Iterator[Finding]:
    sparse, dense = paper.number("mix_7b")
    ratio = dense / sparse
    yield Finding(6, "audit-6", paper.number("mix_7b_called"), ratio, f"{dense} / {sparse} = {ratio:.1f}")
    zeros = 100 * sparsity(prune24(torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) + 1))
    text = f"2 of every 4 kept: {zeros:.0f} %"
    yield Finding(6, "audit-6-80", paper.number("act24_sparsity_text"), zeros, text)
    noisy = [move for move in accuracy_moves() if move["benchmark"] in ("OBQA", "WinoG")]
    text = "; ".join(
        f"{m['model']} {m['benchmark']} {m['move']:+.3f}, {m['items']} items: {m['standard errors']:+.2f}"
        for m in noisy
    )
    largest = max(abs(move["standard errors"]) for move in noisy)
    yield Finding(6, "audit-6-noise", 2, largest, text)


def _missing_row() -> Iterator[Finding]:
    found = matching_rows()
    text = f"rows with the recipe's six products: {', '.join(found) or 'none'}"
    yield Finding(7, "audit-7", 1, len(found), text)
    costs = table3_costs()
    both = costs["W1"] + costs["W2"]
    text = f"{costs['W1']:.3f} + {costs['W2']:.3f} = {both:.3f} against {costs['W1, W2']:.3f}"
    yield Finding(0, "table3-printed-sum", costs["W1, W2"], both, text)
