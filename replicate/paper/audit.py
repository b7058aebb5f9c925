"""What does not add up in the paper: each item recomputed from the paper's own numbers.

Every figure comes from `data/paper.json` and the formulas of `training.flops`.
"""

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
    """One number recomputed: item (1 to 7, 0 for extras), claim, what is printed, what follows and how."""

    item: int
    claim: str
    printed: Any
    follows: float
    arithmetic: str


def findings() -> list[Finding]:
    """Every recomputed number, in the order of the items; `paper.check(f.claim, f.follows)` judges one."""
    return [*_speeds(), *_shares(), *_words()]


def mean_accuracy(row: dict[str, Any]) -> float:
    """Mean of a row's six benchmark scores."""
    return sum(row[name] for name in BENCHMARKS) / len(BENCHMARKS)


def standard_errors(score_a: float, score_b: float, items: int) -> float:
    """(a - b) / sqrt((a (1 - a) + b (1 - b)) / items): a difference of two accuracies in standard errors.

    The two models are taken as independent; that they answer the same items makes the true error smaller.
    """
    if items < 1 or not (0 < score_a < 1 and 0 < score_b < 1):
        given = f"scores {score_a}, {score_b} over {items} items"
        raise ValueError(f"{given}; need scores between 0 and 1, items >= 1")
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


def _mix(name: str) -> tuple[int, int, float]:
    """Sparse and dense steps of a run, and the share of the sparse ones."""
    sparse, dense = paper.number(name)
    return sparse, dense, sparse / (sparse + dense)


def _speeds() -> Iterator[Finding]:
    """Items 1 to 3: an average, and the speed-ups of both runs."""
    row = paper.rows(4)[-1]
    mean = mean_accuracy(row)
    terms = " + ".join(f"{row[name]:.3f}" for name in BENCHMARKS)
    yield Finding(1, "audit-1", row["avg"], mean, f"({terms}) / 6 = {mean:.3f}")
    said = paper.number("step_speedup_text")
    (_, run_1b, _, run_7b) = (row["speedup"] for row in paper.rows(2))
    sparse, dense, share = _mix("mix_7b")
    run, limit = flops.run_speedup(share, said), flops.run_speedup(share, math.inf)
    text = f"p = {sparse} / {sparse + dense} = {share:.3f}; "
    yield Finding(2, "audit-2", run_7b, run, f"{text}1 / (1 - p + p / {said}) = {run:.3f}")
    yield Finding(2, "audit-2-limit", run_7b, limit, f"{text}1 / (1 - p) = {limit:.3f}")
    r, v = flops.formula_share(paper.model("1B")), paper.number("venom_speedup_table2")
    step = flops.step_speedup(r, v)
    run = flops.run_speedup(_mix("mix_1b")[2], step)
    text = f"r = {r:.2f}, v = {v}: s = 6 / (2 / 1.5 + 4 / {v}) = {flops.ffn_speedup(v):.3f}; step {step:.3f}"
    yield Finding(3, "audit-3", run_1b, run, f"{text}; run {run:.3f}")
    yield Finding(3, "audit-3-text", said, step, text)


def _shares() -> Iterator[Finding]:
    """Items 4 and 5: the FFN's share of the FLOPs, and speed-ups that no share gives."""
    for size, name in (("1B", "audit-4"), ("7B", "audit-4-7b")):
        counts = flops.counts(paper.model(size))
        chain = " → ".join(f"{label}: {share:.3f}" for label, share in counts.items())
        yield Finding(4, name, flops.formula_share(paper.model(size)), list(counts.values())[-1], chain)
    r, v = flops.honest_share(paper.model("1B")), paper.number("venom_speedup_text")
    said, step = paper.number("step_speedup_text"), flops.step_speedup(r, v)
    yield Finding(4, "audit-4-step", said, step, f"r = {r:.3f}, v = {v}: step {step:.3f}")
    run, most = flops.run_speedup(_mix("mix_1b")[2], said), paper.number("headline")[1]
    needed = 100 * flops.share_needed(most, said)
    text = f"half of the steps at {said}x: {run:.3f}x; 1.7x would need {needed:.1f} % of the steps sparse"
    yield Finding(5, "audit-5", most, run, text)
    shares = {size: flops.formula_share(paper.model(size)) for size in MODELS}
    r = shares["405B"]
    all24 = flops.step_speedup(r, 1.0, n24=6, n_venom=0)
    text = f"405B: r = {r:.3f}; 1 / (1 - r + r / 1.5) = {all24:.3f}"
    yield Finding(5, "audit-5-24", paper.number("speedup_24_405b"), all24, text)
    largest = max(shares, key=shares.__getitem__)
    speeds = {"audit-5-26": paper.number("venom_speedup_largest"), "audit-5-42": math.inf}
    for (name, v), printed in zip(speeds.items(), paper.number("speedups_underived"), strict=True):
        best = flops.step_speedup(shares[largest], v)
        text = f"largest share, {largest}: r = {shares[largest]:.3f}; with v = {v}: {best:.3f}x"
        yield Finding(5, name, printed, best, text)


def _words() -> Iterator[Finding]:
    """Items 6 and 7, and Table 3's sum: what the text calls its numbers, and a row that is missing."""
    sparse, dense, _ = _mix("mix_7b")
    text = f"{dense} / {sparse} = {dense / sparse:.1f}"
    yield Finding(6, "audit-6", paper.number("mix_7b_called"), dense / sparse, text)
    zeros = 100 * sparsity(prune24(torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) + 1))
    text = f"2 of every 4 kept: {zeros:.0f} %"
    yield Finding(6, "audit-6-80", paper.number("act24_sparsity_text"), zeros, text)
    noisy = [move for move in accuracy_moves() if move["benchmark"] in ("OBQA", "WinoG")]
    text = "; ".join(
        f"{m['model']} {m['benchmark']} {m['move']:+.3f}, {m['items']} items: {m['standard errors']:+.2f}"
        for m in noisy
    )
    yield Finding(6, "audit-6-noise", 2, max(abs(move["standard errors"]) for move in noisy), text)
    found, costs = matching_rows(), table3_costs()
    text = f"rows with the recipe's six products: {', '.join(found) or 'none'}"
    yield Finding(7, "audit-7", 1, len(found), text)
    both = costs["W1"] + costs["W2"]
    text = f"{costs['W1']:.3f} + {costs['W2']:.3f} = {both:.3f} against {costs['W1, W2']:.3f}"
    yield Finding(0, "table3-printed-sum", costs["W1, W2"], both, text)
