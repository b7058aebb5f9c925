"""Exercises of chapter 08, weights and activations. Read this after you tried them."""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exercises import exercise
from exercises.compare import NotAnswered, Wrong, call, number, one_of
from replicate.sparsity import prune24, soft_threshold24
from replicate.study import plans, results, statistics

PAIRS = [0.31, 0.35, 0.27, 0.41], [0.22, 0.29, 0.20, 0.31]  # losses of an arm and of dense, by seed


@exercise("08.1")
def changed_gradient(answer: Any) -> str:
    """The gradient of an FFN that changes if product 5 reads W1 whole."""
    one_of(
        answer,
        ("dy2", "dw2", "dy1", "dx", "dw1"),
        "dx",
        {
            "dy2": "dy2 = dy3 W2^T is product 3. It reads W2.",
            "dw2": "dW2 = y2^T dy3 is product 4. It reads no weight.",
            "dy1": "dy1 is made of dy2 and y1, before product 5.",
            "dw1": "dW1 = x^T dy1 is product 6. It reads no weight, so this layer's W1 learns the same.",
        },
    )
    return "dx = dy1 W1^T is what the layers below get. So all their gradients change, one after the other."


@exercise("08.2")
def too_long(answer: Any) -> str:
    """Length of the dx that is sent down over that of the true one, for `w1` read whole."""
    x, w1, w2, upstream = _layer()
    sparse = soft_threshold24(w1, dim=0)
    for_dense = _input_gradient(x, w1, w2, upstream)
    dy1, true = _input_gradient(x, sparse, w2, upstream)
    sent = dy1 @ w1.T
    right = (sent.norm() / true.norm()).item()
    along_rows = soft_threshold24(w1, dim=1)
    dy1_rows, true_rows = _input_gradient(x, along_rows, w2, upstream)
    pruned = prune24(w1, dim=0)
    dy1_pruned, true_pruned = _input_gradient(x, pruned, w2, upstream)
    straight = upstream @ w2.T  # dy2 in place of dy1
    hints = [
        (
            (dy1_pruned @ w1.T).norm() / true_pruned.norm(),
            "You pruned hard. S24 is soft thresholding: `soft_threshold24(w1, dim=0)`.",
        ),
        (
            (straight @ w1.T).norm() / (straight @ sparse.T).norm(),
            "dy1 = dy2 * 2 relu(y1). The activation's derivative is missing.",
        ),
        (
            (sent - true).norm() / true.norm(),
            "That is the length of the difference. Asked are the lengths of the two.",
        ),
        (
            (sent.norm(dim=1) / true.norm(dim=1)).mean(),
            "Take one length of the whole dx, not a mean over tokens.",
        ),
        (sent.norm(), "Divide by the length of the true dx."),
        (1 / right, "It is the other way round: the one that is sent down over the true one."),
        (1, "Both gradients are the same. One of them is `dy1 @ w1.T`, with the whole weight."),
        (
            for_dense[1].norm() / true.norm(),
            "You took the gradient of the dense layer. Both have y1 = x S(W1).",
        ),
        (
            ((dy1_rows @ w1.T).norm() / true_rows.norm()).item(),
            "W1 is [D, F], and y1 = x W1 sums over D: use dim=0.",
        ),
        (right**2, "That is the ratio of the squared lengths."),
        ((for_dense[0] @ w1.T).norm() / (for_dense[0] @ sparse.T).norm(), "dy1 must come from y1 = x S(W1)."),
    ]
    number(call(answer, x, w1, w2, upstream), right, [(float(w), h) for w, h in hints], tolerance=1e-3)
    return (
        "The shrinking makes it so long. Hard pruning leaves the kept weights as they are, and stays nearer "
        "to one."
    )


@exercise("08.3")
def interval_of_pairs(answer: Any) -> str:
    """The two ends of the 95 % t interval of the mean of ours - base."""
    ours, base = (np.array(values) for values in PAIRS)
    low, high = _two_numbers(call(answer, list(ours), list(base)))
    apart, n = ours - base, len(ours)
    t, mean = statistics.t_quantile(n - 1), (ours - base).mean()
    both = math.sqrt(ours.var(ddof=1) + base.var(ddof=1))
    halves = [
        (
            1.96 * apart.std(ddof=1) / math.sqrt(n),
            "You took 1.96. With few seeds it is t, for n - 1: 3.18 for four.",
        ),
        (statistics.t_quantile(n) * apart.std(ddof=1) / math.sqrt(n), "You took t for n. It is for n - 1."),
        (t * apart.std() / math.sqrt(n), "You divided by n in the variance. Divide by n - 1 (ddof=1)."),
        (
            t * apart.std(ddof=1),
            "That is the spread of one seed. The mean's is smaller by the square root of n.",
        ),
        (apart.std(ddof=1) / math.sqrt(n), "That is one standard error to either side. Multiply by t."),
        (t * both / math.sqrt(n), "You took the spreads of the two arms. Take that of the differences."),
        (t * apart.std(ddof=1) / n, "Divide by the square root of n, not by n."),
    ]
    middle, half, right = (low + high) / 2, (high - low) / 2, t * apart.std(ddof=1) / math.sqrt(n)
    if math.isclose(middle, -mean, rel_tol=1e-3):
        raise Wrong("The sign is wrong: a cost is ours - base.")
    if math.isclose(middle, right, rel_tol=1e-3) or math.isclose(low, mean, rel_tol=1e-3):
        raise Wrong("You return mean and half width. Return the two ends, mean - half and mean + half.")
    if low > high:
        raise Wrong("The low end comes first.")
    if not math.isclose(middle, mean, rel_tol=1e-3):
        raise Wrong(f"Its middle is {middle:.4f}. It should be the mean of ours - base.")
    for wrong, hint in halves:
        if math.isclose(half, wrong, rel_tol=1e-3):
            raise Wrong(hint)
    if not math.isclose(half, right, rel_tol=1e-3):
        raise Wrong(
            f"The middle is right, but the interval reaches {half:.4f} to either side. It should reach "
            "t s / sqrt(n), with n - 1 for both t and s."
        )
    return "The pairs share their batches, so the noise that they share cancels."


@exercise("08.4")
def seeds_needed(answer: Any) -> str:
    """Seeds for Venom's cost to +-0.005 nats at gpu scale, by the recorded spread of the pairs."""
    spread, alone, aim = *_spreads(), 0.005
    least = _seeds(spread, aim)
    number(
        answer,
        least,
        hints=[
            (
                math.ceil((1.96 * spread / aim) ** 2),
                "You took 1.96. With so few seeds t is larger: t for n - 1.",
            ),
            (
                _ceil_with(statistics.t_quantile(2), spread, aim),
                "You kept t of three seeds. It falls as n grows.",
            ),
            (_seeds(alone, aim), "That is without pairing: you took the arms' own spreads."),
            (
                math.ceil(spread / aim),
                "2 leaves out t. Find the least n with t s / sqrt(n) <= 0.005, t for n - 1.",
            ),
            (_seeds(spread, aim / 2), "You took 0.005 for the whole width. It is to either side."),
            (_seeds(spread, 2 * aim), "The half width is t s / sqrt(n), not half of that."),
            (least - 1, "Just too few."),
        ],
        tolerance=1e-6,
    )
    return f"Without pairing it would take about {_seeds(alone, aim)}."


def _layer() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [32, 16], W1 [16, 64], W2 [64, 16] and the gradient of y3 [32, 16], in double precision."""
    draw = np.random.default_rng(8)
    shapes = (32, 16), (16, 64), (64, 16), (32, 16)
    x, w1, w2, upstream = (torch.from_numpy(draw.standard_normal(shape)) for shape in shapes)
    return x, w1, w2, upstream


def _input_gradient(x: Tensor, w1: Tensor, w2: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """dy1 [T, F] and dx [T, D] of y3 = relu(x W1)^2 W2."""
    dy1 = (upstream @ w2.T) * 2 * torch.relu(x @ w1)
    return dy1, dy1 @ w1.T


def _two_numbers(given: Any) -> tuple[float, float]:
    if isinstance(given, (int, float)) or not hasattr(given, "__len__") or len(given) != 2:
        raise Wrong("Return two numbers: `return low, high`.")
    if any(part is None or part is ... for part in given):
        raise NotAnswered
    low, high = float(given[0]), float(given[1])
    return low, high


@cache
def _spreads() -> tuple[float, float]:
    """Standard deviation over seeds of Venom - dense at gpu scale: of the pairs, and as if independent."""

    def plan(scale: str) -> Any:
        return plans.some(["dense", "venom16"], (1, 2, 3), scale)

    runs = results.all_larger("laptop", plan, min_seeds=3)["gpu"]
    loss = runs.pivot(index="seed", columns="arm", values="final_loss")
    pairs = results.differences(runs, column="final_loss")["venom16"].std
    return pairs, float(np.sqrt(loss.var(ddof=1).sum()))


def _seeds(spread: float, aim: float) -> int:
    """The least n with t s / sqrt(n) <= aim."""
    return next(n for n in range(2, 10**6) if statistics.t_quantile(n - 1) * spread / math.sqrt(n) <= aim)


def _ceil_with(t: float, spread: float, aim: float) -> int:
    return math.ceil((t * spread / aim) ** 2)
