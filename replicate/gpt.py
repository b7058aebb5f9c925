"""A minimal Llama-3-like GPT: RMSNorm, rotary embeddings, causal attention and the FFN under study.

    h = x + Attention(RMSNorm(x)),  x' = h + FFN(RMSNorm(h)),  logits = RMSNorm(x_L) E^T

Read it from `GPT.forward` downwards. Everything but the FFN stays dense, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replicate.config import ACTIVATIONS, ModelConfig
from replicate.ffn import INIT_STD, SparseFFN, new_weight, relu2
from replicate.generate import KVCache, generate
from replicate.training.attention import TORCH, attention_by
from replicate.training.device import autocast_on
from replicate.training.sparse_model import SparseModel


class GPT(SparseModel):
    """Decoder-only language model of `config`'s shape, with random initial weights.

    The weights come from torch's global generator: seed it for reproducible models. The matrices that
    write into the residual stream start smaller by sqrt(2 n_layer), so that its variance does not grow
    with depth.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.stream: torch.dtype | None = None  # of the residual stream under autocast, see `residual`
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, eps=1e-5)
        self.head = None if config.tie_embeddings else _linear(config.d_model, config.vocab_size)
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        _make_tables(self)
        self.register_load_state_dict_post_hook(_make_tables_off_meta)
        nn.init.normal_(self.embed.weight, std=INIT_STD)
        with torch.no_grad():
            for block in self.blocks:
                block.attn.proj.weight.mul_((2 * config.n_layer) ** -0.5)
                block.ffn.w2.mul_((2 * config.n_layer) ** -0.5)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of the next token at every place and, with targets, the mean cross-entropy in nats.

        Args:
            idx: token ids [B, S], S at most config.seq_len.
            targets: token ids [B, S], or None. Of an empty batch the mean loss is NaN.

        Returns:
            logits [B, S, vocab_size], loss (a scalar, or None without targets).

        Raises:
            ValueError: if the sequence is longer than the model's.
        """
        if idx.shape[-1] > self.config.seq_len:
            raise ValueError(f"the sequence has {idx.shape[-1]} tokens; seq_len is {self.config.seq_len}")
        x = self.residual(idx)
        cos, sin = self.cos[: idx.shape[-1]], self.sin[: idx.shape[-1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self._logits(x)
        if targets is None:
            return logits, None
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits, F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten())

    def extend(self, idx: Tensor, caches: list[KVCache]) -> Tensor:
        """Logits [B, vocab_size] after further tokens idx [B, S] of a text whose keys and values are kept.

        Args:
            caches: one a layer, empty for the beginning of a text; they take up the new tokens.

        Raises ValueError if the text so grows beyond config.seq_len.
        """
        x, n = self.residual(idx), idx.shape[-1]
        cos, sin = caches[0].places(self.cos, n), caches[0].places(self.sin, n)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cos, sin, cache)
        return self._logits(x[:, -1])

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embed.weight if self.head is None else self.head.weight)

    def residual(self, idx: Tensor) -> Tensor:
        """What the residual stream starts with: the embedding [B, S, D] of idx [B, S].

        Every layer adds to it in its dtype, the weights'; under autocast that is `self.stream`, if it is set.
        """
        x = self.embed(idx)
        return x.to(self.stream) if self.stream is not None and autocast_on(x) else x

    def _apply(self, fn: Callable, recurse: bool = True) -> GPT:
        """As of any module; what may have been emptied and is in no checkpoint is computed again."""
        super()._apply(fn, recurse)
        _make_tables(self)
        return self

    def set_attention(self, kernel: str) -> None:
        """Compute attention in every layer by this kernel; see `attention.attention_by`."""
        for block in self.blocks:
            block.attn.kernel = kernel

    def generate(
        self, idx: Tensor, n: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 1,
        graph: bool = False,
    ) -> Tensor:  # fmt: skip
        """Continue `idx` by `n` tokens drawn from the model, the same ones for the same seed.

        Keys and values of earlier tokens are kept, so a further token costs one token's work, until the text
        is longer than seq_len: then all of the window moves, and is read again. Weights are held meanwhile.

        Args:
            idx: token ids [B, S], S at least 1. Only the last seq_len tokens are read.
            n: number of tokens to add.
            temperature: 0 takes the likeliest token; above 1 flattens the distribution.
            top_k: draw from the k likeliest tokens only; None draws from all.
            seed: of the draws.
            graph: on a GPU a token's step is one CUDA graph, with keys and values in buffers of a fixed size.

        Returns:
            ids [B, S + n].

        Raises:
            ValueError: n or temperature is negative, top_k below 1, idx without a token or no [B, S]; tokens
                choose together in the sparse phase (see `SparsityConfig.causal`).
        """
        return generate(self, idx, n, temperature, top_k, seed, graph)


class RMSNorm(nn.RMSNorm):
    """Normalises x [..., D] in the precision of its weight; the result has x's shape and dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """torch does so too where the dtypes differ, but warns that it is slow."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Block(nn.Module):
    """One layer: attention, then the FFN, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, eps=1e-5)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, eps=1e-5)
        if config.activation == "relu2":
            self.ffn = SparseFFN(config.d_model, config.d_ff, config.sparsity)
        else:
            self.ffn = DenseFFN(config.d_model, config.d_ff, config.activation)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """x [B, S, D] to the same shape."""
        x = x + self.attn(self.attn_norm(x), cos, sin, cache)
        return x + self.ffn(self.ffn_norm(x))


class DenseFFN(nn.Module):
    """Dense baselines: squared ReLU or GELU with two matrices, SwiGLU with three.

    relu2 and gelu: y = act(x W1) W2. swiglu: y = (silu(x W1) * (x W3)) W2, which has 1.5 times the
    parameters at equal d_ff. Weights are [d_model, d_ff] and [d_ff, d_model], as in the paper.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "relu2") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.w1 = new_weight(d_model, d_ff)
        self.w2 = new_weight(d_ff, d_model)
        self.w3 = new_weight(d_model, d_ff) if activation == "swiglu" else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model]."""
        y1 = x @ self.w1
        if self.w3 is not None:
            return (F.silu(y1) * (x @ self.w3)) @ self.w2
        return (relu2(y1) if self.activation == "relu2" else F.gelu(y1)) @ self.w2


class Attention(nn.Module):
    """Causal self-attention with rotary positions; `n_kv_head` < `n_head` shares keys and values."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.kv_heads
        self.d_head = config.d_model // config.n_head
        self.kernel = TORCH  # see `attention.attention_by`
        self.qkv = _linear(config.d_model, (self.n_head + 2 * self.n_kv_head) * self.d_head)
        self.proj = _linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """x [B, S, D] to the same shape; place t reads places 0 to t, and those before in the cache."""
        batch, seq, d_model = x.shape
        n_heads = self.n_head + 2 * self.n_kv_head
        heads = self.qkv(x).view(batch, seq, n_heads, self.d_head).transpose(1, 2)  # [B, N + 2K, S, H]
        qk, v = heads.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=1)
        q, k = rotate(qk, cos, sin).to(v.dtype).split([self.n_head, self.n_kv_head], dim=1)
        grouped, mask = self.n_kv_head != self.n_head, None
        if cache is not None:
            k, v, mask = cache.take(k, v)
        with attention_by(self.kernel if cache is None else TORCH):
            how = {"is_causal": mask is None, "attn_mask": mask, "enable_gqa": grouped}
            y = F.scaled_dot_product_attention(q, k, v, **how)
        return self.proj(y.transpose(1, 2).reshape(batch, seq, d_model))


def rope_tables(
    d_head: int, seq_len: int, theta: float, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [seq_len, d_head / 2] of the angles t theta^(-2 i / d_head) (rotary embeddings)."""
    places = {"dtype": torch.float32, "device": device}
    frequency = theta ** (-torch.arange(0, d_head, 2, **places) / d_head)
    angle = torch.outer(torch.arange(seq_len, **places), frequency)
    return angle.cos(), angle.sin()


def _make_tables(model: GPT) -> None:
    """Give a model the rotary tables of its shape, where its embeddings are and in their dtype."""
    c, weight = model.config, model.embed.weight
    where = "meta" if weight.is_meta else "cpu"  # the same bits on every device
    tables = rope_tables(c.d_model // c.n_head, c.seq_len, c.rope_theta, where)
    model.cos, model.sin = (table.to(weight.device, weight.dtype) for table in tables)


def _make_tables_off_meta(model: GPT, _: object) -> None:
    """`load_state_dict(assign=True)` takes the weights alone off the meta device."""
    if model.cos.is_meta:
        _make_tables(model)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pair (x_i, x_(i + H/2)) of each head by its place's angle. x [..., S, H]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _linear(d_in: int, d_out: int) -> nn.Linear:
    layer = nn.Linear(d_in, d_out, bias=False)
    nn.init.normal_(layer.weight, std=INIT_STD)
    return layer
