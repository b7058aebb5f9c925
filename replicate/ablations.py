"""Variants for comparison, which the paper's method does not need: other ways to choose and to sum.

`SparsityConfig` names them: `selection`, `routing`, `mask_reuse` and `wgrad`. Plain functions; `ffn` calls
them where the configuration asks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from replicate.router import ordered_cluster_mask, top_clusters
from replicate.sparsity import check_float, check_groups, mask24, prune24, soft_threshold24, venom_mask

if TYPE_CHECKING:
    from replicate.config import SparsityConfig

SELECTIONS = ("magnitude", "soft", "learned", "static", "tile")  # the 2 of 4, see `select24`
WGRADS = ("dense", "24", "mvue", "tile")  # weight gradients, see `token_reduction`


def select24(y: Tensor, method: str = "magnitude", score: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The neuron-level 2:4 activation: keep two of every four adjacent neurons of each token.

    Args:
        y: activations [..., F], F a multiple of 4.
        method: "magnitude" keeps the two largest; "soft" also subtracts the second-smallest magnitude
            from them (section 2.2 on activations); "learned" ranks by |y_f| exp(score_f); "static"
            always keeps the first two of four, the control; "tile" also keeps two of every four adjacent
            tokens, see `transposable_mask`, so that tokens see each other: for pictures, not for texts.
        score: learned scores [F], for "learned" only.

    Returns:
        (values [..., F] in y's dtype, mask [..., F] bool).

    Raises:
        ValueError: unknown method, F no multiple of 4, or score missing or of the wrong shape.
    """
    if method == "magnitude":
        mask = mask24(y)
    elif method == "soft":
        return soft_threshold24(y), mask24(y)
    elif method == "learned":
        if score is None or score.shape != y.shape[-1:]:
            got = None if score is None else tuple(score.shape)
            raise ValueError(f"method 'learned' needs a score of shape ({y.shape[-1]},), got {got}")
        mask = mask24(y.abs().to(torch.promote_types(y.dtype, torch.float32)) * score.exp())
    elif method == "static":
        check_groups(y, -1)
        mask = (torch.arange(y.shape[-1], device=y.device) % 4 < 2).expand(y.shape)
    elif method == "tile":
        mask = transposable_mask(y)
    else:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(SELECTIONS)}")
    return torch.where(mask, y, torch.zeros_like(y)), mask


def block_votes(y2: Tensor, c: SparsityConfig) -> tuple[Tensor, Tensor]:
    """(values, mask) [T, F] of routing "oracle-block": V:N:M by a vote of v tokens, which is not causal."""
    mask = venom_mask(y2, c.v, c.m, n=2 if c.inner else 4)
    return torch.where(mask, y2, torch.zeros_like(y2)), mask


def own_gradient_mask(dy1: Tensor, c: SparsityConfig) -> Tensor:
    """dy1 [T, F] pruned by its own magnitudes, not by the forward mask: the mistake of mask_reuse=False."""
    if c.activation == "venom":
        dy1 = dy1 * ordered_cluster_mask(top_clusters(dy1, c.n_clusters, c.top_k), dy1.shape[1], c.n_clusters)
        if not c.inner:
            return dy1
    return prune24(dy1)


def with_score(y3: Tensor, score: Tensor) -> Tensor:
    """y3, bit for bit, with a gradient of zero to the scores where processes train together.

    The dense phase does not read them, and DistributedDataParallel waits for every gradient. Elsewhere they
    have none, by which an optimiser leaves them, and the steps it counts for them, alone.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return y3 - score[:0].sum().to(y3.dtype) if together else y3


def score_gradient(y2: Tensor, mask: Tensor, dy2: Tensor, score: Tensor) -> Tensor:
    """Straight-through gradient [F] of the learned scores.

    The hard 2-of-4 mask is treated as 2 p, p_i = c_i / sum_j c_j over the group, c = y2 exp(score): the
    inclusion probability of drawing two in proportion to the criterion. dL/dmask is dy2 y2. Where a
    group's mask is all False, its cluster was not chosen, and no score could change that.
    """
    wide, groups = torch.promote_types(y2.dtype, torch.float32), (-1, 4)
    offered = mask.unflatten(-1, groups).any(-1, keepdim=True)
    criterion = (y2.to(wide) * score.exp()).unflatten(-1, groups) * offered
    p = criterion / criterion.sum(-1, keepdim=True).clamp_min(torch.finfo(wide).tiny)
    dmask = (dy2.to(wide) * y2.to(wide)).unflatten(-1, groups)
    return (2 * p * (dmask - (p * dmask).sum(-1, keepdim=True))).flatten(-2).sum(0).to(score.dtype)


def token_reduction(kept: Tensor, c: SparsityConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The product sparse^T dense over tokens, [T, F], [T, D] -> [F, D], for both weight gradients.

    With wgrad "24" or "mvue" the sparse operand is 2:4 along tokens (2503.16672): tokens are shuffled
    by one fixed permutation, since neighbours in a text resemble each other, and the features with the
    most non-zeros stay dense. With "tile" no feature does, and tiles of 4 tokens x 4 features are pruned to
    two a row and two a column (2404.01847), which one pass over dy1 can do as it is compressed for product 5.
    Tokens past the last whole group of four stay dense.
    """
    tokens, d_ff = kept.shape
    whole = tokens - tokens % 4
    order = torch.arange(whole, device=kept.device)
    if c.wgrad_permute:
        order, _ = token_order(whole, kept.device)
    busiest = (kept != 0).sum(0).argsort(descending=True, stable=True)[: round(c.wgrad_dense_share * d_ff)]
    stays_dense = torch.zeros(d_ff, dtype=torch.bool, device=kept.device)
    stays_dense.index_fill_(0, busiest, True)

    def prune(head: Tensor) -> Tensor:
        if c.wgrad == "tile":
            return torch.where(transposable_mask(head), head, torch.zeros_like(head))
        return torch.where(stays_dense, head, mvue24(head, 0) if c.wgrad == "mvue" else prune24(head, 0))

    def reduce(sparse: Tensor, dense: Tensor) -> Tensor:
        head = prune(sparse[order])
        return head.T @ dense[order] + sparse[whole:].T @ dense[whole:]

    return reduce


@cache  # kept: a CUDA graph reads the tensor at its address
def token_order(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The fixed permutation [n] by which weight gradients group tokens, and its inverse."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order.to(device), order.argsort().to(device)


def mvue24(x: Tensor, dim: int = -1, generator: torch.Generator | None = None) -> Tensor:
    """Minimum-variance unbiased 2:4 estimate of x (2203.10991): E[mvue24(x)] = x.

    Of each four, two are drawn without replacement with inclusion probability p_i = min(1, c |x_i|),
    sum p_i = 2, and divided by p_i. Systematic sampling meets these probabilities exactly: element i is
    drawn when its interval of the running sum of p covers u or u + 1, u uniform.

    Args:
        x: floating-point tensor; `dim` a multiple of 4.
        generator: source of the draws; None uses torch's default one.

    Raises:
        ValueError: x is not floating point, or `dim` is no multiple of 4.
    """
    check_float(x)
    check_groups(x, dim)
    groups = x.movedim(dim, -1).unflatten(-1, (-1, 4)).to(torch.promote_types(x.dtype, torch.float32))
    tiny = torch.finfo(groups.dtype).tiny
    mag = groups.abs().clamp_max(torch.finfo(groups.dtype).max / 8)  # sums stay finite
    is_top = torch.arange(4, device=x.device) == mag.argmax(-1, keepdim=True)
    top = mag.amax(-1, keepdim=True)
    rest = mag.masked_fill(is_top, 0).sum(-1, keepdim=True)
    capped = torch.where(is_top, torch.ones_like(mag), mag / rest.clamp_min(tiny))
    p = torch.where(top >= rest, capped, 2 * mag / (top + rest).clamp_min(tiny))
    u = torch.rand(top.shape, generator=generator, device=x.device, dtype=p.dtype)
    high = p.cumsum(-1)
    low = torch.cat([torch.zeros_like(u), high[..., :-1]], -1)
    # Two points in disjoint intervals draw two at most, however the sums of p are rounded.
    drawn = ((low <= u) & (u < high)) | ((low <= u + 1) & (u + 1 < high))
    kept = torch.where(drawn & (mag > 0), groups / p.clamp_min(tiny), torch.zeros_like(groups))
    kept = torch.where(groups.isnan(), groups, kept)
    return kept.flatten(-2).movedim(-1, dim).to(x.dtype)


@cache
def transposable_patterns() -> Tensor:
    """The 90 patterns [90, 4, 4] of 0 and 1 with two in each row and column, in the order of ties.

    First rows 0 and 1 keep the same two columns; then they share one column i, and rows 2 and 3 one column j;
    then they share none.
    """
    pairs = list(itertools.combinations(range(4), 2))
    rest = {pair: tuple(sorted(set(range(4)) - set(pair))) for pair in pairs}
    found = [(pair, pair, rest[pair], rest[pair]) for pair in pairs]
    for i, j in itertools.permutations(range(4), 2):
        k, l = rest[min(i, j), max(i, j)]
        top, bottom = ([(s, k), (s, l)] for s in (i, j))
        found += [(*a, *b) for a in (top, top[::-1]) for b in (bottom, bottom[::-1])]
    none_shared = [(0, 2), (0, 3), (1, 2), (1, 3), (0, 1), (2, 3)]
    found += [(a, rest[a], b, rest[b]) for a in none_shared for b in none_shared]
    patterns = torch.zeros(len(found), 4, 4, device="cpu")
    for pattern, rows in zip(patterns, found, strict=True):
        for r, columns in enumerate(rows):
            pattern[r, list(columns)] = 1
    return patterns


@cache  # kept: a CUDA graph reads the tensor at its address
def _patterns_on(device: torch.device) -> Tensor:
    """[90, 16] on a device, in float64: sums of eight magnitudes are then exact."""
    return transposable_patterns().to(device, torch.float64).flatten(1)


def transposable_mask(w: Tensor) -> Tensor:
    """Mask that is 2:4 along both axes: in each 4 x 4 tile the best of the 90 patterns (2404.01847).

    "Best" keeps the largest summed magnitude; of equal sums the first of `transposable_patterns` wins.
    NaN, infinity and the largest numbers count alike, as more than the rest.

    Args:
        w: [R, C], both multiples of 4.

    Returns:
        Boolean [R, C] with two True in each group of four of every row and every column.

    Raises:
        ValueError: w is not floating point, or does not tile by 4 x 4.
    """
    check_tiles(w)
    rows, cols = w.shape
    tiles = w.detach().abs().reshape(rows // 4, 4, cols // 4, 4).movedim(2, 1).flatten(2)
    most = torch.finfo(torch.promote_types(w.dtype, torch.float32)).max / 8
    patterns = _patterns_on(w.device)
    best = (tiles.double().nan_to_num(nan=most).clamp_max(most) @ patterns.T).argmax(-1)
    return patterns[best].bool().unflatten(-1, (4, 4)).movedim(1, 2).reshape(rows, cols)


def check_tiles(w: Tensor) -> None:
    """Raise ValueError unless w is a floating-point matrix of whole 4 x 4 tiles."""
    check_float(w)
    if w.dim() != 2 or w.shape[0] % 4 or w.shape[1] % 4:
        fix = tuple(-(-size // 4) * 4 for size in w.shape)
        what = f"pad it to {fix}" if w.dim() == 2 else "use a matrix"
        raise ValueError(f"shape {tuple(w.shape)} does not tile by 4 x 4; {what}")
