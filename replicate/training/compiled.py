"""A GPT's training loss in compiled pieces that no change of phase, configuration or model breaks.

While a layer is dense it is one compiled piece. While it is sparse, its FFN runs as it is (masks or kernels
in plain calls) and the rest of the layer is the piece. The head and the loss are another: 4096 logits a
token are then never stored in float32. Models of equal shape share the pieces of a process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replicate.ffn import SparseFFN, autocast_on
from replicate.gpt import GPT, Block

BACKEND = "inductor"
RECOMPILE_LIMIT = 64  # one piece serves shapes, activations, and steps with and without gradients


def compiled_loss(model: GPT) -> Callable[[Tensor, Tensor], tuple[None, Tensor]]:
    """`model`'s forward pass, compiled: (idx, targets [B, S]) to (None, mean cross-entropy in nats).

    The logits are not given out, so that they need not be kept. Hooks on the model's parts are not called.
    """
    layer, attend, loss = (_compiled(piece, BACKEND) for piece in (_layer, _attend, head_loss))

    def forward(idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        x = model.residual(idx)
        cos, sin = model.cos[: idx.shape[-1]], model.sin[: idx.shape[-1]]
        for block in model.blocks:
            if isinstance(block.ffn, SparseFFN) and block.ffn.phase == "sparse" and block.ffn.config.any:
                x, normed = attend(block, x, cos, sin)
                x = x + block.ffn(normed)
            else:
                x = layer(block, x, cos, sin)
        weight = model.embed.weight if model.head is None else model.head.weight
        return None, loss(model.norm, weight, x, targets)

    return forward


def _layer(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return block(x, cos, sin)


def _attend(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(x after attention, what the FFN reads), the latter in the dtype that the FFN casts it to."""
    x = x + block.attn(block.attn_norm(x), cos, sin)
    normed = block.ffn_norm(x)
    if autocast_on(x):
        normed = normed.to(torch.get_autocast_dtype(x.device.type))
    return x, normed


def head_loss(norm: nn.Module, weight: Tensor, x: Tensor, targets: Tensor) -> Tensor:
    """Final norm, vocabulary head and mean cross-entropy of x [B, S, D]."""
    logits = F.linear(norm(x), weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten())


@functools.cache
def _compiled(piece: Callable, backend: str) -> Callable:
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(piece, backend=backend, dynamic=False)
