"""Where the FLOPs of a training step go, and the speed-ups that follow from that alone.

Everything here is arithmetic on shapes, after section 3.2 of the paper; nothing is measured.
"""

from __future__ import annotations

import math
from typing import Any

from replicate.config import ModelConfig, SparsityConfig

LABELS = {
    "ffn": "feed-forward network",
    "projections": "attention: projections",
    "scores": "attention: T² part",
    "head": "vocabulary head",
}
PASSES = 3  # forward, gradient of the input, gradient of the weight: each the same products
TWO_FOUR = 1.5  # the paper's speed-up of a 2:4 product


def flops_per_token(
    model: ModelConfig,
    *,
    ffn_matrices: int | None = None,
    attention: str = "causal",
    head: bool = True,
) -> dict[str, float]:
    """FLOPs of one training token (forward and backward), by component.

    With c = 6 (multiply and add, three passes), T tokens a sequence, N query and K key heads of H:

        ffn = c L m D F      projections = c L 2 D (N + K) H
        scores = c L T D (causal) or c L 2 T D (full)      head = c D vocab

    Args:
        model: the shapes; `model.seq_len` is T.
        ffn_matrices: m; None takes 2, or 3 for SwiGLU. The paper counts 3.
        attention: "causal", "full" or "none" (no T^2 part). head: counted. The paper's formula has neither.

    Raises ValueError for an unknown `attention` or fewer than one matrix.
    """
    causal = {"none": 0.0, "causal": 1.0, "full": 2.0}
    if attention not in causal:
        raise ValueError(f"attention is {attention!r}; choose one of {', '.join(causal)}")
    m = (3 if model.activation == "swiglu" else 2) if ffn_matrices is None else ffn_matrices
    if m < 1:
        raise ValueError(f"ffn_matrices is {m}; squared ReLU has 2, SwiGLU 3")
    d, head_dim = model.d_model, model.d_model // model.n_head
    c = 2 * PASSES
    return {
        "ffn": float(c * model.n_layer * m * d * model.d_ff),
        "projections": float(c * model.n_layer * 2 * d * (model.n_head + model.kv_heads) * head_dim),
        "scores": c * model.n_layer * causal[attention] * model.seq_len * d,
        "head": float(c * d * model.vocab_size if head else 0),
    }


def param_count(config: ModelConfig) -> dict[str, int]:
    """Number of parameters, by formula: nothing is allocated.

    Per layer 2 D (N + K) H for attention (N heads and K key-value heads of width H, as in section 3.2),
    2 D F for the FFN (3 D F for SwiGLU, F more for learned scores, n D for a learned router) and 2 D for the
    norms.

    Returns:
        total; embedding (the token table, twice if the head is not tied); non_embedding.
    """
    d = config.d_model
    attention = 2 * d * (config.n_head + config.kv_heads) * (d // config.n_head)
    ffn = (3 if config.activation == "swiglu" else 2) * d * config.d_ff
    s = config.sparsity
    learned = config.n_layer * config.d_ff if s.activation != "dense" and s.selection == "learned" else 0
    learned += config.n_layer * s.n_clusters * d if s.routing == "learned" else 0
    non_embedding = config.n_layer * (attention + ffn + 2 * d) + d + learned
    embedding = config.vocab_size * d * (1 if config.tie_embeddings else 2)
    return {"total": embedding + non_embedding, "embedding": embedding, "non_embedding": non_embedding}


def shares(model: ModelConfig, **counted: Any) -> dict[str, float]:
    """Each component's share of a step's FLOPs; arguments as in `flops_per_token`. They sum to 1."""
    flops = flops_per_token(model, **counted)
    total = sum(flops.values())
    return {name: value / total for name, value in flops.items()}


def formula_share(model: ModelConfig) -> float:
    """Section 3.2's r = 3 D F / (3 D F + 2 D (N + K) H): three matrices, no T^2 part, no head."""
    return shares(model, ffn_matrices=3, attention="none", head=False)["ffn"]


def honest_share(model: ModelConfig) -> float:
    """The FFN's share with its own number of matrices, causal attention and the vocabulary head."""
    return shares(model)["ffn"]


def counts(model: ModelConfig) -> dict[str, float]:
    """The FFN's share under four ways of counting, from the paper's to the complete one."""
    m = 3 if model.activation == "swiglu" else 2
    return {
        "the paper's formula": formula_share(model),
        f"{m} FFN matrices": shares(model, ffn_matrices=m, attention="none", head=False)["ffn"],
        "+ causal attention": shares(model, ffn_matrices=m, head=False)["ffn"],
        "+ vocabulary head": honest_share(model),
    }


def product_counts(sparsity: SparsityConfig) -> dict[str, int]:
    """How many of a recipe's six products are "2:4", "venom", "sampled" and "dense"."""
    formats = [kind for _, _, kind in sparsity.products()]
    return {kind: formats.count(kind) for kind in ("2:4", "venom", "sampled", "dense")}


def sparse_counts(sparsity: SparsityConfig) -> tuple[int, int]:
    """(2:4, Venom) products among a recipe's six; those that compute selected blocks alone are Venom's."""
    counts = product_counts(sparsity)
    return counts["2:4"], counts["venom"] + counts["sampled"]


def ffn_speedup(v: float, two4: float = TWO_FOUR, *, n24: int = 2, n_venom: int = 4) -> float:
    """Section 3.2's s = 6 / (n24 / two4 + n_venom / v + the rest): the FFN's six products together.

    Args:
        v, two4: speed-ups of a Venom and of a 2:4 product over the dense one; infinity gives the limit.
        n24, n_venom: products of either kind; the defaults are algorithms 1 and 2.

    Raises ValueError for a speed-up that is not positive or more than six products.
    """
    if not v > 0 or not two4 > 0:
        raise ValueError(f"v is {v}, two4 is {two4}; a speed-up is positive (1 means as fast as dense)")
    if n24 < 0 or n_venom < 0 or n24 + n_venom > 6:
        raise ValueError(f"{n24} 2:4 and {n_venom} Venom products; the FFN has six in all")
    time = n24 / two4 + n_venom / v + (6 - n24 - n_venom)
    return 6 / time if time else math.inf


def step_speedup(r: float, v: float, two4: float = TWO_FOUR, *, n24: int = 2, n_venom: int = 4) -> float:
    """A sparse step's speed-up 1 / (1 - r + r / s) if time is shared as FLOPs are; s from `ffn_speedup`.

    Raises ValueError for r outside [0, 1].
    """
    left = 1 - _share("r", r) + r / ffn_speedup(v, two4, n24=n24, n_venom=n_venom)
    return 1 / left if left else math.inf


def run_speedup(share: float, step: float) -> float:
    """A run's speed-up 1 / (1 - p + p / step) with a share p of its steps sparse.

    Raises ValueError for a share outside [0, 1] or a step speed-up that is not positive.
    """
    if not step > 0:
        raise ValueError(f"step is {step}; a speed-up is positive")
    left = 1 - _share("share", share) + share / step
    return 1 / left if left else math.inf


def step_needed(run: float, share: float) -> float | None:
    """The step speed-up with which a run with this share of sparse steps is `run` times as fast.

    None if no speed-up is enough: even free sparse steps give only 1 / (1 - share). Raises ValueError as
    `run_speedup` does.
    """
    if not run > 0:
        raise ValueError(f"run is {run}; a speed-up is positive")
    left = 1 / run - (1 - _share("share", share))
    return share / left if left > 0 else None


def share_needed(run: float, step: float) -> float | None:
    """The share of sparse steps with which a run is `run` times as fast; None if all of them do not do."""
    if not run >= 1 or not step > 1:
        raise ValueError(f"run is {run}, step is {step}; need run >= 1 and step > 1")
    share = (1 - 1 / run) / (1 - 1 / step)
    return share if share <= 1 else None


def venom_needed(step: float, r: float) -> float | None:
    """The Venom speed-up v with which a step is `step` times as fast; None if none is, or r is 0.

    Two products stay 2:4, so the FFN gains at most 3 TWO_FOUR, and r bounds the rest.
    """
    if not step >= 1:
        raise ValueError(f"step is {step}; need 1 or more")
    if not _share("r", r):
        return None
    ffn_time = 1 - (1 - 1 / step) / r  # of the dense FFN's
    left = 6 * ffn_time - 2 / TWO_FOUR
    return 4 / left if left > 1e-12 else None


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; a share lies between 0 and 1")
    return value
