"""Dense feed-forward networks: the baselines, and what the sparse one shares with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replicate.config import ACTIVATIONS

INIT_STD = 0.02


def relu2(y1: Tensor) -> Tensor:
    """Squared ReLU, y2 = relu(y1)^2 (equation 2)."""
    return F.relu(y1).square()


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


def new_weight(rows: int, cols: int) -> nn.Parameter:
    """[rows, cols] drawn from torch's global generator."""
    return nn.Parameter(torch.randn(rows, cols) * INIT_STD)
