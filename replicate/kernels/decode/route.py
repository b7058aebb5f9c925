"""Which clusters the few tokens of a decoding step use: scores once, the choice in whoever reads it.

    scores[t, e] = x[t] . means[e]                                   algorithm 3, step 2
    token t uses e if fewer than k clusters come before e:
        those of a larger score, and those of an equal one and a lower id

A rank needs no sort and no list of tokens, and n scores are a few bytes: every program of the products ranks
them itself, which spares a launch. Programs work on slots. With few choices, T k <= n, slot t k + j is token
t's j-th best cluster, and the first token that uses a cluster does it for all; otherwise a slot is a cluster,
used or not. So a cluster's weights are read once whatever T is, and no size depends on the routing, as CUDA
graphs need.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from replicate.kernels.backend import check, on_its_device, tl, triton
from replicate.kernels.venom.common import check_operands

CLUSTERS, COLUMNS = 4, 1024  # clusters of a program that scores several tokens, columns it reads at a time
WHOLE = 8192  # columns that a program reads at once for a single token: it waits for memory once


class Choice(NamedTuple):
    """Each token's scores [T, n] in float32, rows at any stride, and how many clusters it uses."""

    scores: Tensor
    top_k: int

    @property
    def by_choice(self) -> bool:
        """True if a slot is a token's choice, False if it is a cluster."""
        return self.scores.shape[0] * self.top_k <= self.scores.shape[1]

    @property
    def slots(self) -> int:
        """Clusters that T tokens use at most."""
        return min(self.scores.shape[0] * self.top_k, self.scores.shape[1])


def chosen_reference(choice: Choice) -> Tensor:
    """[T, n] bool in torch: the clusters that each token uses. NaN counts as infinite."""
    scores = choice.scores.masked_fill(choice.scores.isnan(), float("inf"))
    order = scores.argsort(dim=1, descending=True, stable=True)[:, : choice.top_k]
    return torch.zeros_like(choice.scores, dtype=torch.bool).scatter(1, order, True)


@triton.jit
def _score(scores, at, mask):
    score = tl.load(scores + at, mask=mask, other=float("-inf"))
    return tl.where(score != score, float("inf"), score)


@triton.jit
def slot_of(
    scores, slot, token, n_tokens, n_clusters, stride,
    TOP_K: tl.constexpr, CLUSTERS: tl.constexpr, BY_CHOICE: tl.constexpr,
):  # fmt: skip
    """The cluster of a slot, and which of `token` [TOKENS] it is for: of none in a slot without work.

    TOP_K = 0: there are no clusters, all neurons are slot 0's.
    """
    if TOP_K == 0:
        cluster = 0
        use = token < n_tokens
    else:
        e = tl.arange(0, CLUSTERS)
        cluster = slot
        if BY_CHOICE:
            own = slot // TOP_K * stride
            mine = _score(scores, own + e, e < n_clusters)[:, None]
            other = _score(scores, own + e, e < n_clusters)[None, :]
            lower = (e[None, :] < e[:, None]) & (e < n_clusters)[None, :]
            rank = tl.sum(((other > mine) | ((other == mine) & lower)).to(tl.int32), axis=1)
            here = (rank == slot % TOP_K) & (e < n_clusters)
            cluster = tl.sum(tl.where(here, e, 0), axis=0)
            use = token < n_tokens
    if TOP_K > 0 and token.shape[0] > 1:  # a single token uses each of its choices
        row = token * stride
        known = (token < n_tokens)[:, None] & (e < n_clusters)[None, :]
        all_scores = _score(scores, row[:, None] + e[None, :], known)
        mine = _score(scores, row + cluster, token < n_tokens)[:, None]
        before = (all_scores > mine) | ((all_scores == mine) & (e < cluster)[None, :])
        use = (tl.sum((before & known).to(tl.int32), axis=1) < TOP_K) & (token < n_tokens)
        if BY_CHOICE:
            first = tl.min(tl.where(use, token, 1 << 30), axis=0)
            use = use & (first == slot // TOP_K)
    return cluster, use


@on_its_device
@triton.jit
def _decode_scores_kernel(
    x, means, scores, n_cols, n_clusters, CLUSTERS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Scores of one token with CLUSTERS clusters."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * CLUSTERS + tl.arange(0, CLUSTERS)
    acc = tl.zeros((CLUSTERS, COLUMNS), dtype=tl.float32)
    for c0 in range(0, n_cols, COLUMNS):
        c = c0 + tl.arange(0, COLUMNS)
        mask = (e < n_clusters)[:, None] & (c < n_cols)[None, :]
        mean = tl.load(means + e[:, None] * n_cols + c[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += mean * tl.load(x + token * n_cols + c, mask=c < n_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(scores + token * n_clusters + e, tl.sum(acc, axis=1), mask=e < n_clusters)


def decode_scores(x: Tensor, means: Tensor) -> Tensor:
    """Scores [T, n] in float32 of tokens x [T, D] with ExpertMeans [n, D], as `router.scores` by "dot".

    Raises ValueError if shapes or dtypes do not fit.
    """
    check_operands(x=x, means=means)
    check(x.shape[1] == means.shape[1], f"x {tuple(x.shape)}, means {tuple(means.shape)}: d_model differs")
    scores = torch.empty(len(x), len(means), dtype=torch.float32, device=x.device)
    each, columns = (1, WHOLE) if len(x) == 1 else (CLUSTERS, COLUMNS)
    columns = min(columns, triton.next_power_of_2(x.shape[1]))
    _decode_scores_kernel[(len(x), triton.cdiv(len(means), each))](
        x, means, scores, x.shape[1], len(means), CLUSTERS=each, COLUMNS=columns, num_warps=4
    )
    return scores
