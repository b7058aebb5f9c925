"""Answers that students give in chapter 07, and the hint that each must get."""

import torch

from replicate.report import kernel_tables

RECORD = kernel_tables.recorded(kernel_tables.VENOM)
LOADS = kernel_tables.shape_of(RECORD, 4096)["load"]["1"]
ROWS = sum(-(-tokens // 128) * 128 for tokens in LOADS)
STAGES = kernel_tables.stages(RECORD, 4096)
DENSE = sum(STAGES["dense"].values())
REST = sum(ms for name, ms in STAGES["4 of 64"].items() if not name.startswith("products"))


def lists(clusters, n):
    return [(clusters == c).any(1).nonzero()[:, 0] for c in range(n)]


def blocks(x, w1, w2, clusters, n, act=lambda y: y.relu().square(), add=True):
    y3, width = torch.zeros_like(x), w1.shape[1] // n
    for c, tokens in enumerate(lists(clusters, n)):
        part = act(x[tokens] @ w1[:, c * width : (c + 1) * width]) @ w2[c * width : (c + 1) * width]
        y3[tokens] = y3[tokens] + part if add else part
    return y3


def narrow(x, w1, w2, clusters, n):
    """Each cluster's slice ends one neuron early."""
    width = w1.shape[1] // n
    kept = torch.arange(w1.shape[1]) % width < width - 1
    return blocks(x, w1 * kept, w2, clusters, n)


def strided(x, w1, w2, clusters, n):
    y3 = torch.zeros_like(x)
    for c, tokens in enumerate(lists(clusters, n)):
        y3[tokens] += (x[tokens] @ w1[:, c::n]).relu().square() @ w2[c::n]
    return y3


def masked(x, w1, w2, clusters, n):
    """Right, but it multiplies everything."""
    chosen = torch.zeros(len(x), n).scatter(1, clusters, 1.0).repeat_interleave(w1.shape[1] // n, 1)
    return ((x @ w1).relu().square() * chosen) @ w2


WRONG = [
    (
        "07.1",
        lambda clusters, n: [(clusters.flatten() == c).nonzero()[:, 0] for c in range(n)],
        "Divide by k = 2",
    ),
    ("07.1", lambda clusters, n: [(clusters[:, 0] == c).nonzero()[:, 0] for c in range(n)], "All k choices"),
    ("07.1", lambda clusters, n: lists(clusters, n)[:1] + lists(clusters, n)[2:], "has an empty list"),
    ("07.1", lambda clusters, n: [part.flip(0) for part in lists(clusters, n)], "not in ascending order"),
    (
        "07.1",
        lambda clusters, n: lists(clusters, int(clusters.max()) + 1),
        "4 lists for 5 clusters. Count to",
    ),
    ("07.1", lambda clusters, n: [part.squeeze() for part in lists(clusters, n)], "needs a list of length 1"),
    ("07.1", lambda clusters, n: list(clusters), "a list for each token"),
    ("07.1", lambda clusters, n: clusters, "Return a Python list"),
    ("07.2", lambda x, w1, w2, clusters, n: (x @ w1).relu().square() @ w2, "the dense layer"),
    ("07.2", lambda *given: blocks(*given, add=False), "overwrites an earlier one"),
    ("07.2", lambda *given: blocks(*given, act=torch.relu), "The square is missing"),
    ("07.2", lambda *given: blocks(*given, act=torch.square), "The relu is missing"),
    ("07.2", narrow, "A slice stops before its end"),
    ("07.2", strided, "stand side by side"),
    ("07.2", lambda x, w1, w2, clusters, n: blocks(x, w1, w2, clusters[:, :1], n), "first cluster"),
    ("07.2", lambda *given: blocks(*given) / 2, "You averaged"),
    ("07.2", masked, "FLOPs where"),
    ("07.3", ROWS / sum(LOADS) - 1, "divided by the tokens"),
    ("07.3", ROWS - sum(LOADS), "What share of all rows"),
    ("07.3", sum(LOADS) / ROWS, "with a token"),
    ("07.3", 0, "rows of its own"),
    ("07.4", 16, "the products alone"),
    ("07.4", DENSE / sum(STAGES["4 of 64"].values()), "what was measured"),
    ("07.4", DENSE / REST, "take no time"),
    ("07.4", (DENSE + REST) / (DENSE / 16 + REST), "has no routing"),
    ("07.4", sum(STAGES["4 of 64"].values()) / (DENSE / 16 + REST), "not as the measured 4 of 64"),
    ("07.4", (DENSE / 16 + REST) / DENSE, "Other way round"),
    ("07.4", DENSE / 16 + REST, "Those are milliseconds"),
    ("07.5", lambda v, kept, d: kept * d / (kept + d), "gathered rows of W2, [K, D], are read as well"),
    ("07.5", lambda v, kept, d: v, "W2's rows alone"),
    ("07.5", lambda v, kept, d: v * kept * d / (v * kept + kept * d), "[V, D] is written"),
    ("07.5", lambda v, kept, d: 2 * v * kept * d / (v * kept + kept * d + v * d), "two bytes"),
    ("07.5", lambda v, kept, d: v * kept * d / (v * kept + v * kept * d + v * d), "once for a block"),
]
