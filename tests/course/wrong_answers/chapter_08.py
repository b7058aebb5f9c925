"""Answers that students give in chapter 08, and the hint that each must get."""

import math

import numpy as np
import torch

from replicate.sparsity import prune24, soft_threshold24
from replicate.study import results, statistics

SPREAD = results.differences(results.recorded_study("gpu"), column="final_loss")["venom16"].std


def dx(x, w1, w2, upstream):
    return (2 * (x @ w1).relu() * (upstream @ w2.T)) @ w1.T


def ratio(x, w1, w2, upstream, dim=0, forward=None):
    """Sent over true; `forward` is the weight that dy1 comes from, by default S(W1)."""
    sparse = soft_threshold24(w1, dim=dim)
    dy1 = 2 * (x @ (sparse if forward is None else forward)).relu() * (upstream @ w2.T)
    return (dy1 @ w1.T).norm() / (dy1 @ sparse.T).norm()


def both_gradients(x, w1, w2, upstream, derivative=True):
    """The dx that is sent down and the true one."""
    sparse, dy1 = soft_threshold24(w1, dim=0), upstream @ w2.T
    if derivative:
        dy1 = dy1 * 2 * (x @ sparse).relu()
    return dy1 @ w1.T, dy1 @ sparse.T


def without_derivative(*given):
    sent, true = both_gradients(*given, derivative=False)
    return sent.norm() / true.norm()


def hard(x, w1, w2, upstream):
    """Pruned hard in place of S24."""
    sparse = prune24(w1, dim=0)
    dy1 = 2 * (x @ sparse).relu() * (upstream @ w2.T)
    return (dy1 @ w1.T).norm() / (dy1 @ sparse.T).norm()


def of_the_difference(*given):
    sent, true = both_gradients(*given)
    return (sent - true).norm() / true.norm()


def over_tokens(*given):
    sent, true = both_gradients(*given)
    return (sent.norm(dim=1) / true.norm(dim=1)).mean()


def of_the_dense_layer(x, w1, w2, upstream):
    return dx(x, w1, w2, upstream).norm() / dx(x, soft_threshold24(w1, dim=0), w2, upstream).norm()


def by_autograd(x, w1, w2, upstream):
    """The true one twice."""
    grads = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        ((leaf @ soft_threshold24(w1, dim=0)).relu().square() @ w2).backward(upstream)
        grads.append(leaf.grad)
    return torch.linalg.norm(grads[0]) / torch.linalg.norm(grads[1])


def ends(ours, base, t=None, ddof=1, root=True, spread=None):
    apart, n = np.subtract(ours, base), len(ours)
    t = statistics.t_quantile(n - 1) if t is None else t
    spread = apart.std(ddof=ddof) if spread is None else spread
    half = t * spread / (math.sqrt(n) if root else 1)
    return apart.mean() - half, apart.mean() + half


def unpaired(ours, base):
    return ends(ours, base, spread=math.sqrt(np.var(ours, ddof=1) + np.var(base, ddof=1)))


def mean_and_half(ours, base):
    low, high = ends(ours, base)
    return (low + high) / 2, (high - low) / 2


WRONG = [
    ("08.1", "dW1", "It reads no weight"),
    ("08.1", "dw2", "It reads no weight"),
    ("08.1", "dy1", "before product 5"),
    ("08.1", "all", "Answer with one of"),
    ("08.2", lambda *given: 1 / ratio(*given), "the other way round"),
    ("08.2", by_autograd, "Both gradients are the same"),
    ("08.2", of_the_dense_layer, "the gradient of the dense layer"),
    ("08.2", lambda *given: ratio(*given, dim=1), "use dim=0"),
    ("08.2", lambda x, w1, *rest: ratio(x, w1, *rest, forward=w1), "must come from y1 = x S(W1)"),
    ("08.2", hard, "You pruned hard"),
    ("08.2", without_derivative, "The activation's derivative is missing"),
    ("08.2", of_the_difference, "the length of the difference"),
    ("08.2", over_tokens, "not a mean over tokens"),
    ("08.2", lambda *given: both_gradients(*given)[0].norm(), "Divide by the length of the true dx"),
    ("08.3", lambda ours, base: ends(ours, base, t=statistics.t_quantile(4), ddof=0), "for both t and s"),
    ("08.3", lambda ours, base: ends(ours, base, t=1.96), "You took 1.96"),
    ("08.3", unpaired, "the spreads of the two arms"),
    ("08.3", lambda ours, base: ends(base, ours), "The sign is wrong"),
    ("08.3", lambda ours, base: ends(ours, base, ddof=0), "Divide by n - 1"),
    ("08.3", lambda ours, base: ends(ours, base, root=False), "the spread of one seed"),
    ("08.3", mean_and_half, "mean and half width"),
    ("08.3", lambda ours, base: np.subtract(ours, base).mean(), "Return two numbers"),
    ("08.4", math.ceil((1.96 * SPREAD / 0.005) ** 2), "You took 1.96"),
    ("08.4", math.ceil((statistics.t_quantile(2) * SPREAD / 0.005) ** 2), "t of three seeds"),
    ("08.4", 2, "2 leaves out t"),
]
