"""Text from a model, token by token: what is kept of the text so far, and a step as one CUDA graph.

A further token costs one token's work, and at decoding that is the time it takes to read the weights. So the
FFN's weights are held meanwhile (`SparseFFN.hold`): kernels prepare them once, and a sparse layer then reads
what the token uses of them (`kernels.decode`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from replicate.settings.checks import at_least

if TYPE_CHECKING:
    from replicate.gpt import GPT


class KVCache:
    """Keys and values [B, K, S, H] that a layer's attention has computed for a text so far."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of the text so far."""
        return 0 if self.keys is None else self.keys.shape[2]

    def places(self, table: Tensor, n: int) -> Tensor:
        """Of a table with a row a place, the rows of the next n tokens; ValueError past its end."""
        end = self.length + n
        if end > len(table):
            raise ValueError(f"the text has {end} tokens; seq_len is {len(table)}")
        return table[self.length : end]

    def take(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add those of S further tokens.

        Returns:
            All so far, and the mask [S, all] of what each further token sees; None is the plain causal one.
        """
        before, n, mask = self.length, keys.shape[2], None
        if before:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
            mask = torch.ones(n, n + before, dtype=torch.bool, device=keys.device).tril(before)
        self.keys, self.values = keys, values
        return keys, values, mask


class StaticCache(KVCache):
    """A `KVCache` in buffers of a fixed size: one step is then the same work at every length of the text.

    Args:
        size: places of the buffers. at: [1] int64, the place of the next token after the first tokens; all
            layers share it, and `TokenStep` moves it on.
    """

    def __init__(self, size: int, at: Tensor) -> None:
        super().__init__()
        self.size, self.at = size, at

    def places(self, table: Tensor, n: int) -> Tensor:
        """As for any cache; after the first tokens, n = 1, wherever `at` is."""
        return super().places(table, n) if self.keys is None else table.index_select(0, self.at)

    def take(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As for any cache: the whole buffers, of which the mask [1, size] leaves out what is not written."""
        if self.keys is None:
            batch, heads, n, d_head = keys.shape
            self.keys, self.values = (keys.new_zeros(batch, heads, self.size, d_head) for _ in range(2))
            self.keys[:, :, :n], self.values[:, :, :n] = keys, values
            return keys, values, None
        self.keys.index_copy_(2, self.at, keys)
        self.values.index_copy_(2, self.at, values)
        return self.keys, self.values, (torch.arange(self.size, device=keys.device) <= self.at)[None]


class TokenStep:
    """`GPT.extend` of texts that grow token by token; on a GPU each step after two is the replay of a graph.

    The weights must stay as they are, held or not. A graph is of one model in one phase.

    Args:
        model: the model. size: tokens that a text may have, at most config.seq_len.
    """

    def __init__(self, model: GPT, size: int) -> None:
        self.model, self.size, self.length = model, size, 0
        device = model.embed.weight.device
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.caches = [StaticCache(size, self.at) for _ in model.blocks]
        self.token: Tensor | None = None
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, idx: Tensor) -> Tensor:
        """Logits [B, vocab_size] after the first tokens idx [B, S], or after one more, [B, 1].

        A replay writes them over the last one's. Raises ValueError for more tokens than there are places.
        """
        n, first = idx.shape[-1], self.length == 0
        if self.length + n > self.size or not (first or n == 1):
            room = f"there is room for {self.size}, after the first for one at a time"
            raise ValueError(f"{n} tokens after {self.length}: {room}")
        self.length += n
        if first:
            logits = self.model.extend(idx, self.caches)
            self.at.fill_(n)
            return logits
        if self.token is None:
            self.token = idx.clone()
            return self._on_another_stream()
        self.token.copy_(idx)
        if self.at.is_cuda and self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()
        self._step() if self.graph is None else self.graph.replay()
        return self.logits

    def _step(self) -> None:
        self.logits = self.model.extend(self.token, self.caches)
        self.at.add_(1)

    def _on_another_stream(self) -> Tensor:
        """The step before the one that is captured: kernels are compiled, weights prepared."""
        if not self.at.is_cuda:
            self._step()
            return self.logits
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        return self.logits


@contextmanager
def held(model: GPT) -> Iterator[None]:
    """Every FFN's weights held, see `SparseFFN.hold`; those that are held already stay so afterwards."""
    ours = [ffn for ffn in model.ffns() if not ffn.hold]
    for ffn in ours:
        ffn.hold = True
    try:
        yield
    finally:
        for ffn in ours:
            ffn.hold = False


@torch.no_grad()
def generate(
    model: GPT, idx: Tensor, n: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 1,
    graph: bool = False,
) -> Tensor:  # fmt: skip
    """What `GPT.generate` says."""
    for name, value, low in (("n", n, 0), ("temperature", temperature, 0), ("top_k", top_k, 1)):
        at_least(name, low if value is None else value, low)
    if idx.dim() != 2 or not idx.shape[1]:
        raise ValueError(f"idx has shape {tuple(idx.shape)}; give [B, S], S at least 1")
    for c in (ffn.config for ffn in model.ffns() if ffn.phase == "sparse" and not ffn.config.causal):
        how = f"routing {c.routing!r} and selection {c.selection!r}"
        raise ValueError(f"tokens choose together by {how}; for texts call set_phase('dense')")
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    limit = model.config.seq_len
    caches, unread = [KVCache() for _ in model.blocks], idx
    step = TokenStep(model, min(limit, idx.shape[-1] + n)) if graph else None
    with held(model):
        for _ in range(n):
            if idx.shape[-1] <= limit:
                logits = model.extend(unread, caches) if step is None else step(unread)
            else:
                logits = model(idx[:, -limit:])[0][:, -1]
            token = draw(logits.float().cpu(), temperature, top_k, generator)
            unread = token.to(idx.device)
            idx = torch.cat([idx, unread], dim=1)
    return idx


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Tokens [B, 1] from logits [B, vocab_size]; arguments as of `GPT.generate`."""
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
