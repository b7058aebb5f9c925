"""Gradients that have no gradient: a straight-through backward pass is no function to differentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def once(gradients: Callable[..., tuple[Any, ...]], *args: Any) -> tuple[Any, ...]:
    """gradients(*args), whose own backward pass raises NotImplementedError; torch.func may call it.

    `torch.autograd.function.once_differentiable` would let torch.func differentiate twice, and return zeros.
    """
    return _Once.apply(gradients, *args) if torch.is_grad_enabled() else gradients(*args)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(gradients, *args):
        return gradients(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("a sparse FFN has no second derivative: its gradients are straight-through")
