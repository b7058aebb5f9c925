"""The peer of Venom's router: a mixture of experts with a learned router, on the same clusters of neurons.

    s = sigmoid(x R^T)      chosen = top-k of s + bias      g = k s / sum of s over the chosen, else 0
    y3 = sum over clusters c of g_c relu(x W1_c)^2 W2_c

Gates are trained through g. The load is evened without a loss (2408.15664): after each pass with gradients,
an expert's bias rises by RATE if it got fewer tokens than the mean, and falls if it got more. Here experts
are dense masks, which say what is right; on a GPU the kernels of Venom's blocks compute the chosen experts
alone, see `kernels.venom.gates`. `SparsityConfig` names it by routing "learned".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from replicate.router import ordered_cluster_mask

if TYPE_CHECKING:
    from replicate.ffn import SparseFFN

RATE = 1e-3  # of the bias a pass, the value of 2408.15664


class LearnedRouter(nn.Module):
    """Scores n experts for a token; `bias` [n] changes who is chosen, not by how much an expert counts."""

    def __init__(self, d_model: int, n_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.randn(n_experts, d_model) * d_model**-0.5)
        self.register_buffer("bias", torch.zeros(n_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] to (chosen experts [T, k], their gates [T, k] in float32, whose mean is 1)."""
        scores = (x.to(self.weight.dtype) @ self.weight.T).sigmoid()
        chosen = (scores + self.bias).detach().topk(self.top_k, dim=1).indices
        kept = scores.gather(1, chosen)
        return chosen, self.top_k * kept / kept.sum(1, keepdim=True)

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same for a pass of the layer, which evens out the load if it has gradients."""
        chosen, gates = self(x)
        if torch.is_grad_enabled():
            self.even_out(chosen)
        return chosen, gates

    @torch.no_grad()
    def even_out(self, chosen: Tensor) -> None:
        """Move the bias towards an even load, given the choices [T, k] of one pass."""
        ones = torch.ones_like(chosen, dtype=self.bias.dtype).flatten()
        counts = torch.zeros_like(self.bias).scatter_add_(0, chosen.flatten(), ones)
        self.bias += RATE * (counts.mean() - counts).sign()


def mixture(ffn: SparseFFN, x: Tensor) -> Tensor:
    """y3 [T, D] of `ffn`, whose experts are its clusters, on x [T, D]; evens out the load in training."""
    chosen, gates = ffn.experts.assign(x)
    n, d_ff = ffn.config.n_clusters, ffn.w1.shape[1]
    gates = gates.new_zeros(len(x), n).scatter(1, chosen, gates)
    y2 = (x @ ffn.w1.to(x.dtype)).relu().square()
    kept = y2 * gates.to(x.dtype).repeat_interleave(d_ff // n, 1)
    if ffn.collect:
        ffn.note(y2, y2 * ordered_cluster_mask(chosen, d_ff, n), chosen)
    return kept @ ffn.w2.to(x.dtype)
