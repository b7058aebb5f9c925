"""A GPT's training loss in compiled pieces that no change of phase, configuration or model breaks.

A layer is a piece, its sparse FFN one operator in it. What an FFN adds to the residual stream is handed to
the next piece, whose norm so reads the sum as it is made. The head and the loss are another piece: 4096
logits a token are then never stored in float32. Models of equal shape share the pieces of a process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replicate.gpt import GPT, Block
from replicate.training.device import autocast_on
from replicate.training.sharded import is_sharded

BACKEND = "inductor"
RECOMPILE_LIMIT = 256  # one piece serves shapes, formats, phases, and steps with and without gradients


def compiled_loss(model: GPT) -> Callable[[Tensor, Tensor], tuple[None, Tensor]]:
    """`model`'s forward pass, compiled: (idx, targets [B, S]) to (None, mean cross-entropy in nats).

    The logits are not given out, so that they need not be kept. Hooks on the model's parts are not called,
    but for those by which a sharded model, see `parallel`, gathers each layer's weights around its piece.
    """
    layer, loss = (compiled_piece(piece, BACKEND) for piece in (_layer, head_loss))
    sharded = is_sharded(model.embed.weight)
    if sharded:
        layer = _gathered(model.blocks, layer)

    def forward(idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        for ffn in model.ffns():
            ffn.phase  # noqa: B018  compiled code does not look for a phase written from outside
        x = model.residual(idx)
        y = _nothing(x)
        cos, sin = model.cos[: idx.shape[-1]], model.sin[: idx.shape[-1]]
        for block in model.blocks:
            x, y = layer(block, x, y, cos, sin)
        weight = model.embed.weight if model.head is None else model.head.weight
        return None, loss(model.norm, weight, x, y, targets)

    return _gathered([model], lambda _, *batch: forward(*batch), model) if sharded else forward


def _gathered(modules: Iterable[nn.Module], piece: Callable, *first: nn.Module) -> Callable:
    """`piece`(module, ...) as a forward method of sharded modules; the `first` argument may be settled."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    for module in modules:
        module.compiled = functools.partial(piece, module)
        register_fsdp_forward_method(module, "compiled")
    return functools.partial(lambda module, *args: module.compiled(*args), *first)


def _nothing(x: Tensor) -> Tensor:
    """Zeros that are to compiled code what a layer before the first one would have added to x."""
    dtype = torch.get_autocast_dtype(x.device.type) if autocast_on(x) else x.dtype
    return torch.zeros_like(x, dtype=dtype, requires_grad=torch.is_grad_enabled())


def _layer(block: Block, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A layer on the residual stream x + y, y being what the layer before adds: the same of this layer."""
    x = x + y
    x = x + block.attn(block.attn_norm(x), cos, sin)
    return x, block.ffn(block.ffn_norm(x))


def head_loss(norm: nn.Module, weight: Tensor, x: Tensor, y: Tensor, targets: Tensor) -> Tensor:
    """Final norm, vocabulary head and mean cross-entropy of x + y [B, S, D]."""
    logits = F.linear(norm(x + y), weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten())


def allow_recompiling() -> None:
    """Let code be compiled up to RECOMPILE_LIMIT times; beyond torch's own limit, 8, it runs uncompiled."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)


@functools.cache
def compiled_piece(piece: Callable, backend: str) -> Callable:
    """`piece` compiled for fixed shapes, once a process."""
    allow_recompiling()
    return torch.compile(piece, backend=backend, dynamic=False)
