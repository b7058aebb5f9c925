"""What a generated token costs: by formula, and counted while a small model reads its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from replicate.config import ModelConfig
from replicate.ffn import SparseFFN, relu2
from replicate.gpt import GPT
from replicate.report.kernel_plots import PEAK_DENSE
from replicate.sparsity import prune24
from replicate.training.flops import param_count

BYTES = 2  # of a number in bf16


class Cost(NamedTuple):
    """FLOPs of a forward pass, and bytes of the weights that it reads."""

    flops: float
    bytes: float

    def microseconds(self, bandwidth: float) -> tuple[float, float]:
        """Least times of the bytes, at `bandwidth` bytes a second, and of the FLOPs, at the GPU's peak."""
        return 1e6 * self.bytes / bandwidth, 1e-6 * self.flops / PEAK_DENSE


def ffn_cost(d_model: int, d_ff: int, tokens: int) -> Cost:
    """Of one dense FFN on some tokens at once: 4 T D F FLOPs, and W1 and W2 once, however many tokens."""
    return Cost(4.0 * tokens * d_model * d_ff, 2.0 * BYTES * d_model * d_ff)


def kv_bytes(model: ModelConfig, tokens: int) -> int:
    """Bytes of the KV cache of a text: a key and a value for each token, layer and head for keys, in bf16."""
    d_head = model.d_model // model.n_head
    return BYTES * 2 * tokens * model.n_layer * model.kv_heads * d_head


def weight_bytes(model: ModelConfig) -> int:
    """Bytes of the weights that a generated token reads in a dense model: all, but of the token table a row.

    The vocabulary head is read whole: the token table itself, if the two are tied.
    """
    return BYTES * (param_count(model)["non_embedding"] + model.vocab_size * model.d_model)


def share_touched(k: int, n_clusters: int, texts: int) -> float:
    """Expected share of the clusters that some text uses, if each takes k at random: 1 - (1 - k/n)^B.

    Raises ValueError unless 1 <= k <= n_clusters.
    """
    if not 1 <= k <= n_clusters:
        raise ValueError(f"k is {k}; choose 1 to the number of clusters, {n_clusters}")
    return 1 - (1 - k / n_clusters) ** texts


class Read(NamedTuple):
    """A call of one FFN: its tokens, the bytes of weights that it read, and those of both weights."""

    tokens: int
    bytes: int
    whole: int


@contextmanager
def reading_chosen(model: GPT) -> Iterator[list[Read]]:
    """While open, every FFN multiplies by the weights of its tokens' clusters alone; yields a list of calls.

    Raises ValueError for formats other than clusters chosen by a router, with whole weights.
    """
    for ffn in model.ffns():
        c = ffn.config
        if c.activation != "venom" or c.routing != "token" or c.source("w1") or c.source("w2"):
            raise ValueError("reading_chosen needs clusters by a router and whole weights, as in 'venom16'")
    calls: list[Read] = []
    try:
        for ffn in model.ffns():
            ffn.forward = partial(_read, ffn, calls)
        yield calls
    finally:
        for ffn in model.ffns():
            vars(ffn).pop("forward", None)


def _read(ffn: SparseFFN, calls: list[Read], x: Tensor) -> Tensor:
    """y3 like x [B, S, D], cluster by cluster; a cluster that no token uses is not touched."""
    tokens, n = x.reshape(-1, x.shape[-1]), ffn.config.n_clusters
    chosen = ffn.clusters(tokens)
    w1, w2 = ffn.w1.unflatten(1, (n, -1)), ffn.w2.unflatten(0, (n, -1))  # [D, n, F/n], [n, F/n, D]
    y3, read = torch.zeros_like(tokens), 0
    for cluster in chosen.unique().tolist():
        rows = (chosen == cluster).any(1)
        up, down = w1[:, cluster], w2[cluster]
        y2 = relu2(tokens[rows] @ up)
        y3[rows] += (prune24(y2) if ffn.config.inner else y2) @ down
        read += BYTES * (up.numel() + down.numel())
    calls.append(Read(len(tokens), read, BYTES * (ffn.w1.numel() + ffn.w2.numel())))
    return y3.view_as(x)
