"""The sparse FFN of a few tokens, forward only: what a step of text generation costs is the weights it reads.

    routing "token", "static"    scores; y2 in the chosen clusters; y3 from them       k/n of both weights
    routing "activation"         y2 in full, which says the clusters; y3 from them     W1, and k/n of W2
    activation "dense", "24"     y2 and y3 in full                                     both weights

for one token; T tokens read the clusters that any of them uses, at most min(T k, n). A weight that is 2:4 in
the product it is read for is read compressed, at 9/16 of its bytes, if the groups of four lie along a row of
its form; else (in float32, or W1 pruned along F for product 5 alone) its values are read as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from replicate.kernels.backend import HALF
from replicate.kernels.decode.down import decode_down
from replicate.kernels.decode.route import Choice, decode_scores
from replicate.kernels.decode.rows import Rows, compress_rows
from replicate.kernels.decode.up import MOST_TOKENS, decode_up
from replicate.router import scores

if TYPE_CHECKING:
    from replicate.ffn import SparseFFN


class Decoder(NamedTuple):
    """A layer's weights in the form that decoding reads, made once for many tokens.

    up: W1^T [F, D] by neuron. down: W2 [F, D] by neuron, or W2^T [D, F] by output if `by_output`.
    means: ExpertMeans [n, D] of routing "token". fixed: scores [1, n] of routing "static", 1 where chosen.
    """

    up: Rows
    down: Rows
    by_output: bool
    means: Tensor | None
    fixed: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of both weights."""
        return self.up.nbytes + self.down.nbytes


def why_not(ffn: SparseFFN, x: Tensor) -> str:
    """What keeps decoding's kernels from this layer on x [T, D], in a few words; empty if nothing does."""
    c, (d_model, d_ff) = ffn.config, ffn.w1.shape
    if ffn.collect:
        return "statistics read all of y2"
    if not 1 <= len(x) <= MOST_TOKENS:
        return f"{len(x)} tokens are not 1 to {MOST_TOKENS}"
    if x.dtype not in (*HALF, torch.float32):
        return f"no kernel computes in {x.dtype}"
    if c.fp8:
        return "decoding reads weights in x's dtype, not in FP8"
    if c.activation != "dense" and c.selection != "magnitude":
        return f"selection {c.selection!r} has no kernel"
    if c.routing == "learned":
        return "routing 'learned' weighs clusters by gates, which decoding does not"
    if c.activation == "venom" and c.routing not in ("token", "activation", "static"):
        return f"routing {c.routing!r} has no kernel"
    if d_model % 16 or d_ff % 16:
        return f"rows of d_model {d_model} and d_ff {d_ff} are no multiples of 16"
    return ""


@torch.no_grad()
def prepare(ffn: SparseFFN, dtype: torch.dtype) -> Decoder:
    """The layer's weights in `dtype` as decoding reads them; W2 shares memory with the layer's if it can.

    They do not follow the layer's weights: `SparseFFN.hold` says how long they are good for.
    """
    c, w1, w2 = ffn.config, ffn.sparse_weight("w1", dtype), ffn.sparse_weight("w2", dtype)
    by_output = c.source("w2") == "w2"  # groups of four along F
    up, down = w1.T.contiguous(), (w2.T if by_output else w2).contiguous()
    routed, fixed = c.activation == "venom", None
    means = ffn.cluster_means().to(dtype).contiguous() if routed and c.routing == "token" else None
    if routed and c.routing == "static":
        fixed = torch.zeros(1, c.n_clusters, device=w1.device).index_fill_(1, ffn.fixed_clusters(), 1.0)
    pack = compress_rows if dtype in HALF else Rows
    return Decoder(
        pack(up) if c.source("w1") == "w1" else Rows(up),
        pack(down) if c.source("w2") else Rows(down),
        by_output, means, fixed,
    )  # fmt: skip


def decode_ffn(ffn: SparseFFN, x: Tensor, weights: Decoder) -> Tensor:
    """y3 [T, D] of the sparse phase on x [T, D], as `SparseFFN.reference` within rounding, without gradients.

    Args:
        ffn: for its formats. weights: from `prepare`, in x's dtype.

    Raises:
        ValueError: `why_not` has a reason.
    """
    if reason := why_not(ffn, x):
        raise ValueError(f"no decoding: {reason}; use SparseFFN.reference")
    c, choice, x = ffn.config, None, x.contiguous()
    if weights.means is not None and c.metric == "dot":
        choice = Choice(decode_scores(x, weights.means), c.top_k)
    elif weights.means is not None:
        choice = Choice(scores(x, weights.means, c.metric), c.top_k)
    elif weights.fixed is not None:
        choice = Choice(weights.fixed.expand(len(x), -1), c.top_k)
    y2 = decode_up(x, weights.up, choice)
    if weights.by_output:
        return decode_up(y2, weights.down, relu2=False)
    if c.activation == "venom" and c.routing == "activation":
        energy = y2.unflatten(1, (c.n_clusters, -1)).sum(2, dtype=torch.float32)
        choice = Choice(energy, c.top_k)
    inner = c.activation == "24" or (c.activation == "venom" and c.inner)
    return decode_down(y2, weights.down, choice, inner=inner)
