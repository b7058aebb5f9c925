"""Token lists of the clusters, in blocks: from each token's clusters to the rows of the products.

Algorithm 3, step 3, for top-k routing without a host synchronisation. Cluster e owns a run of rows that
starts at a multiple of `block`; row r stands for token `tokens[r]`, in token order, and the run's last
block is filled up with -1:

    rows of cluster e    starts[e] <= r < starts[e] + counts[e]
    inverse[t, j]       the row of token t's j-th choice, so tokens[inverse[t, j]] == t

Sizes depend on T, k and the number of clusters alone, never on the routing, so a CUDA graph can replay it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from replicate.kernels.backend import check, on_its_device, tl, triton
from replicate.kernels.venom.common import cuda_or_interpreted

CHUNK = 256  # choices counted by one program
SCAN = 1024  # chunks summed at a time


class BlockLists(NamedTuple):
    """Rows of the compact activations; R = `max_rows` is an upper bound, rows past the last block are unused.

    tokens: [R] int32 token of a row, -1 in the padding at the end of a cluster's run.
    starts: [n] int32 first row of each cluster, a multiple of the block.
    counts: [n] int32 tokens of each cluster.
    block_cluster: [R / block] int32 cluster of each block, -1 where unused.
    n_blocks: [1] int32 blocks in use; they are the first ones.
    inverse: [T, k] int32 row of each token's j-th choice.
    """

    tokens: Tensor
    starts: Tensor
    counts: Tensor
    block_cluster: Tensor
    n_blocks: Tensor
    inverse: Tensor

    @property
    def block(self) -> int:
        """Rows of a block."""
        return self.tokens.numel() // max(1, self.block_cluster.numel())

    def runs(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Each cluster, its rows and their tokens, for references."""
        for e, (start, count) in enumerate(zip(self.starts.tolist(), self.counts.tolist(), strict=True)):
            rows = slice(start, start + count)
            yield e, rows, self.tokens[rows].long()


def block_rows(n_choices: int, n_clusters: int) -> int:
    """Rows of a block: 128, or fewer where the clusters' lists are shorter than that."""
    mean = n_choices // n_clusters
    return 128 if mean >= 128 else 64 if mean >= 64 else 32 if mean >= 32 else 16


def max_rows(n_choices: int, n_clusters: int, block: int) -> int:
    """Upper bound of the rows `n_choices` = T k choices can fill: every cluster may waste block - 1."""
    return (n_choices + min(n_clusters, n_choices) * (block - 1)) // block * block


def empty_lists(clusters: Tensor, n_clusters: int, block: int) -> BlockLists:
    """Uninitialised lists of clusters [T, k]."""
    rows = max_rows(clusters.numel(), n_clusters, block)
    shapes = (rows,), (n_clusters,), (n_clusters,), (rows // block,), (1,), clusters.shape
    return BlockLists(*(clusters.new_empty(shape, dtype=torch.int32) for shape in shapes))


def token_lists_reference(clusters: Tensor, n_clusters: int, block: int = 128) -> BlockLists:
    """The same in torch, cluster by cluster; unused rows are -1."""
    lists, row = BlockLists(*(part.fill_(-1) for part in empty_lists(clusters, n_clusters, block))), 0
    for e in range(n_clusters):
        choices = (clusters.flatten() == e).nonzero()[:, 0]
        end = row + len(choices)
        lists.starts[e], lists.counts[e] = row, len(choices)
        lists.tokens[row:end] = choices // clusters.shape[1]
        lists.inverse.view(-1)[choices] = torch.arange(row, end, dtype=torch.int32)
        row, first = -(-end // block) * block, row
        lists.block_cluster[first // block : row // block] = e
    lists.n_blocks[0] = row // block
    return lists


@triton.jit
def _load_clusters(clusters, i, n_choices, n_clusters):
    """Cluster ids of choices i as int32, -1 for none: past the end, or an id that names no cluster."""
    cluster = tl.load(clusters + i, mask=i < n_choices, other=-1)
    return tl.where((cluster >= 0) & (cluster < n_clusters), cluster, -1).to(tl.int32)


@on_its_device
@triton.jit
def _count_kernel(clusters, counts, n_choices, n_clusters, CHUNK: tl.constexpr, CLUSTERS: tl.constexpr):
    """counts[chunk, e] = number of choices of cluster e among the chunk's."""
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    cluster = _load_clusters(clusters, i, n_choices, n_clusters)
    e = tl.arange(0, CLUSTERS)
    hit = (cluster[:, None] == e[None, :]).to(tl.int32)
    tl.store(counts + tl.program_id(0) * CLUSTERS + e, tl.sum(hit, axis=0))


@on_its_device
@triton.jit
def _scan_kernel(chunk_counts, counts, n_chunks, CLUSTERS: tl.constexpr, STEP: tl.constexpr):
    """Of one cluster: chunk_counts become the sums over earlier chunks, counts is the sum over all."""
    e = tl.program_id(0)
    before = 0
    for c0 in range(0, n_chunks, STEP):
        c = c0 + tl.arange(0, STEP)
        own = tl.load(chunk_counts + c * CLUSTERS + e, mask=c < n_chunks, other=0)
        tl.store(chunk_counts + c * CLUSTERS + e, before + tl.cumsum(own, axis=0) - own, mask=c < n_chunks)
        before += tl.sum(own, axis=0)
    tl.store(counts + e, before)


@on_its_device
@triton.jit
def _place_kernel(
    clusters, chunk_counts, tokens, starts, counts, block_cluster, n_blocks, inverse,
    n_choices, top_k, n_clusters, max_blocks,
    CHUNK: tl.constexpr, CLUSTERS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stable counting sort: row = start of the cluster + its choices in earlier chunks + rank in this one."""
    chunk = tl.program_id(0)
    e = tl.arange(0, CLUSTERS)
    before = tl.load(chunk_counts + chunk * CLUSTERS + e)
    total = tl.load(counts + e, mask=e < n_clusters, other=0)
    padded = tl.cdiv(total, BLOCK) * BLOCK
    end = tl.cumsum(padded, axis=0)
    start = end - padded

    i = chunk * CHUNK + tl.arange(0, CHUNK)
    cluster = _load_clusters(clusters, i, n_choices, n_clusters)
    hit = (cluster[:, None] == e[None, :]).to(tl.int32)
    rank = tl.cumsum(hit, axis=0) - 1
    row = tl.sum(hit * ((start + before)[None, :] + rank), axis=1)
    valid = cluster >= 0
    tl.store(tokens + row, i // top_k, mask=valid)
    tl.store(inverse + i, tl.where(valid, row, -1), mask=i < n_choices)

    b = chunk * BLOCKS + tl.arange(0, BLOCKS)
    owner = tl.sum((b[:, None] * BLOCK >= end[None, :]).to(tl.int32), axis=1)
    tl.store(block_cluster + b, tl.where(owner < n_clusters, owner, -1), mask=b < max_blocks)
    if chunk == 0:
        tl.store(starts + e, start, mask=e < n_clusters)
        pad = (start + total)[:, None] + tl.arange(0, BLOCK)[None, :]
        tl.store(tokens + pad, tl.full((CLUSTERS, BLOCK), -1, tl.int32), mask=pad < end[:, None])
        tl.store(n_blocks, tl.sum(padded, axis=0) // BLOCK)


def token_lists(clusters: Tensor, n_clusters: int, block: int = 128) -> BlockLists:
    """Per-cluster token lists padded to blocks, their offsets and the inverse, on the tokens' device.

    Args:
        clusters: [T, k] int32 or int64, the k distinct clusters of each token. Ids outside 0 to
            n_clusters - 1 belong to no list; their `inverse` is -1.
        n_clusters: number of clusters; some may get no token.
        block: rows of a block, a power of two of at least 16.

    Returns:
        BlockLists with R = max_rows(T k, n_clusters, block).

    Raises:
        ValueError: clusters is no integer [T, k], or block is no power of two.
    """
    check(
        clusters.dim() == 2 and clusters.dtype in (torch.int32, torch.int64) and clusters.shape[1] >= 1,
        f"clusters must be [T, k] int32 or int64 with k >= 1, got {clusters.dtype} {tuple(clusters.shape)}",
    )
    check(block >= 16 and block & (block - 1) == 0, f"block is {block}; choose 16, 32, 64 or 128")
    check(n_clusters >= 1, f"n_clusters is {n_clusters}; choose 1 or more")
    cuda_or_interpreted(clusters)
    clusters = clusters.contiguous()
    n_choices, lists = clusters.numel(), empty_lists(clusters, n_clusters, block)
    if n_choices == 0:
        for part in lists:
            part.zero_()
        return lists
    n_chunks, n_pow2 = triton.cdiv(n_choices, CHUNK), max(2, triton.next_power_of_2(n_clusters))
    chunk_counts, blocks = lists.counts.new_empty(n_chunks, n_pow2), len(lists.block_cluster)
    _count_kernel[(n_chunks,)](clusters, chunk_counts, n_choices, n_clusters, CHUNK=CHUNK, CLUSTERS=n_pow2)
    _scan_kernel[(n_clusters,)](chunk_counts, lists.counts, n_chunks, CLUSTERS=n_pow2, STEP=SCAN)
    _place_kernel[(n_chunks,)](
        clusters, chunk_counts, lists.tokens, lists.starts, lists.counts, lists.block_cluster, lists.n_blocks,
        lists.inverse, n_choices, clusters.shape[1], n_clusters, blocks, CHUNK=CHUNK, CLUSTERS=n_pow2,
        BLOCKS=triton.next_power_of_2(triton.cdiv(blocks, n_chunks)), BLOCK=block, num_warps=8,
    )  # fmt: skip
    return lists
