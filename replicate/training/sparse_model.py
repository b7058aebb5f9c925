"""What the GPT and the diffusion transformer share: a model tells its FFNs what a run needs."""

from __future__ import annotations

from torch import nn

from replicate.ffn import SparseFFN
from replicate.training.layer_state import PHASES


class SparseModel(nn.Module):
    """A model of `blocks`, each with an `ffn`, that tells its sparse-capable ones what a run needs."""

    def ffns(self) -> list[SparseFFN]:
        """The sparse-capable FFN of every block; empty for baselines with another activation."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, SparseFFN)]

    def set_phase(self, phase: str) -> None:
        """Run every FFN in phase "dense" or "sparse". Raises ValueError for any other name."""
        if phase not in PHASES:
            raise ValueError(f"phase is {phase!r}; choose one of {', '.join(PHASES)}")
        for ffn in self.ffns():
            ffn.phase = phase

    def set_backend(self, backend: str | None) -> None:
        """Compute the sparse phase of every FFN by this backend; see `SparseFFN`."""
        for ffn in self.ffns():
            ffn.backend = backend

    def hold_weights(self, hold: bool) -> None:
        """Promise every FFN that its weights stay as they are until `hold` is False again."""
        for ffn in self.ffns():
            ffn.hold = hold
