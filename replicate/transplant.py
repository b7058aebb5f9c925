"""Run a trained GPT with other FFN formats, without further training: what a format costs by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from replicate.config import SparsityConfig
from replicate.gpt import GPT


@torch.no_grad()
def with_sparsity(model: GPT, sparsity: SparsityConfig, sample: Tensor, seed: int = 1) -> GPT:
    """A copy of `model`, in the sparse phase of `sparsity`; the original is left as it is.

    Args:
        model: a trained squared-ReLU GPT.
        sparsity: the formats of the copy.
        sample: token ids [B, S]; each FFN's inputs on it choose the experts of routing "static".
        seed: of the clustering.

    Raises:
        ValueError: the formats do not fit the model's shape.
    """
    copy = GPT(replace(model.config, sparsity=sparsity)).to(model.embed.weight.device)
    own = dict(model.named_parameters())
    for name, parameter in copy.named_parameters():
        if name in own:  # learned scores have no counterpart and stay at zero
            parameter.copy_(own[name])
    if sparsity.activation == "venom":
        with ffn_inputs(copy) as inputs:
            copy(sample)
        for ffn, x in zip(copy.ffns(), inputs, strict=True):
            ffn.make_clusters(seed, x)
    copy.set_phase("sparse")
    return copy.eval()


@contextmanager
def ffn_inputs(model: GPT) -> Iterator[list[Tensor]]:
    """A list that forward passes inside the block fill with each FFN's input [B, S, D], by layer."""
    inputs: list[Tensor] = []
    handles = [
        ffn.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach())) for ffn in model.ffns()
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
