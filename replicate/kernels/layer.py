"""`SparseFFN`'s products by kernels: the numbers of `ffn.SparseFFN.reference`, within rounding, at speed.

    activation "venom", weights dense     figure 4d: all six products in the selected blocks
    activation "venom", W1 or W2^T 2:4    algorithms 1 and 2: 2:4 products 1, 3, Venom products 2, 4, 5, 6
    routing "activation"                  y1 in full, which says what the selected blocks of the others are
    routing "learned"                     the same blocks, chosen and weighed by the gates of `experts`
    activation "24"                       squared ReLU, pruning and compression in one pass; products 2, 5 2:4
    activation "24", selection "tile"     the same by tiles of 4 tokens x 4 neurons; products 4, 6 run dense
    activation "dense", weights 2:4       2:4 products with the compressed weights
    activation "venom", fp8               figure 4d with operands of products 1, 2, 3, 5 in FP8

Weights are compressed, and cast, once per pass, or once per optimiser step if `SparseFFN.hold` says when they
stay as they are. A 2:4 product that cuSPARSELt does not make faster runs dense on the same values. While the
weights are held, a few tokens without gradients go another way, by `decode.ffn`: the next token of a text.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from replicate import fp8
from replicate.kernels import backend as engines
from replicate.kernels import operators
from replicate.kernels.backend import HALF
from replicate.kernels.decode import ffn as decode
from replicate.kernels.execution import compressed, execution
from replicate.kernels.two_four.compressed24 import TILE

if TYPE_CHECKING:
    from replicate.ffn import SparseFFN


def why_not(ffn: SparseFFN, x: Tensor) -> str:
    """What keeps the kernels from computing this layer on x [T, D], in a few words; empty if nothing does."""
    c, (d_model, d_ff) = ffn.config, ffn.w1.shape
    if ffn.collect:
        return "statistics read all of y2"
    if len(x) == 0:
        return "there are no tokens"
    if c.activation != "dense" and c.selection not in ("magnitude", "tile"):
        return f"selection {c.selection!r} has no kernel"
    if c.activation == "venom" and c.routing not in ("token", "activation", "static", "learned"):
        return f"routing {c.routing!r} has no kernel"
    if c.fp8 and (reason := fp8.too_old(x.device)):
        return reason
    if not c.mask_reuse:
        return "mask_reuse=False has no kernel"
    if c.wgrad != "dense" and (c.wgrad != "tile" or c.activation != "24"):
        return f"wgrad {c.wgrad!r} has no kernel with activation {c.activation!r}"
    if "tile" in (c.wgrad, c.selection) and len(x) % TILE:
        return f"{len(x)} tokens are no multiple of {TILE}"
    pairs = compressed(c)
    if pairs and x.dtype not in HALF:
        return f"2:4 needs float16 or bfloat16, not {x.dtype}"
    if x.dtype not in (*HALF, torch.float32):
        return f"no kernel computes in {x.dtype}"
    if pairs and (d_model % TILE or d_ff % TILE):
        return f"2:4 compression needs d_model and d_ff in multiples of {TILE}, not {d_model} and {d_ff}"
    unit = 32 if c.fp8 else 8
    if c.activation == "venom" and (d_model % unit or d_ff % (unit * c.n_clusters)):
        return f"clusters of {d_ff / c.n_clusters:g} neurons and d_model {d_model} are no multiples of {unit}"
    return ""


def decodes(ffn: SparseFFN, x: Tensor) -> bool:
    """True if x [T, D] are few tokens of an inference: no gradients, weights held, kernels for the device.

    Not if the engine is "cusparselt" by name, nor in compiled code.
    """
    if not ffn.hold or torch.is_grad_enabled() or torch.compiler.is_compiling() or decode.why_not(ffn, x):
        return False
    named = engines.requested(ffn.backend)
    return named != "cusparselt" and engines.select(x.device, ffn.backend, x.dtype) != "reference"


def choose(ffn: SparseFFN, x: Tensor) -> str:
    """The engine for this layer on x [T, D]: "reference", "triton", "cusparselt", or "decode", see `decodes`.

    Raises ValueError if `ffn.backend` or REPLICATE_BACKEND names an engine that the device lacks, or kernels
    that do not exist for this configuration.
    """
    if decodes(ffn, x):
        return "decode"
    engine = engines.select(x.device, ffn.backend, x.dtype)
    if engine == "reference" or len(x) == 0:
        return "reference"
    reason = why_not(ffn, x)
    if not reason:
        return engine
    named = engines.requested(ffn.backend)
    if named != "auto" and not ffn.collect:
        raise ValueError(f"backend {named!r} cannot run this layer: {reason}; use 'auto' or 'reference'")
    return "reference"


def describe(ffn: SparseFFN, x: Tensor) -> str:
    """One line: which engine computes the sparse phase of this layer on x [T, D], and why.

    A layer that is dense in both phases, but in FP8, is never computed by these kernels, see `fp8.why_not`.
    """
    if ffn.config.fp8 and not ffn.config.any:
        reason = fp8.why_not(x.device, x.dtype, *ffn.w1.shape)
        return f"reference ({reason})" if reason else "dense in FP8 by torch._scaled_mm"
    engine = choose(ffn, x)
    if engine == "reference":
        return f"reference ({why_not(ffn, x) or engines.report(x.device)})"
    if engine == "decode":
        return f"decoding of {len(x)} tokens by triton, weights by rows"
    kinds = dict.fromkeys(kind for _, _, kind in ffn.config.products() if kind != "dense")
    by = {"2:4": engine, "venom": "triton", "sampled": "triton"}
    return ", ".join(f"{kind} by {by[kind]}" for kind in kinds) + ", in FP8" * ffn.config.fp8


def sparse_phase(ffn: SparseFFN, x: Tensor) -> Tensor:
    """y3 [T, D] of the configured sparse FFN, differentiable in x [T, D] and the layer's weights."""
    engine = choose(ffn, x)
    if engine == "reference":
        return ffn.by_reference(x)
    if engine == "decode":
        return decode.decode_ffn(ffn, x, _decoder(ffn, x.dtype))
    c, (d_model, d_ff) = ffn.config, ffn.w1.shape
    # Sparse tensor cores are planned by shape: compiled code is then for this number of tokens alone.
    n_tokens = operator.index(len(x)) if engine == "cusparselt" and compressed(c) else 0
    asked = engines.requested(ffn.backend)
    how = execution(ffn.formats, asked, x.device, x.dtype, n_tokens, d_model, d_ff)
    scale = ffn.scale / ffn.scaled if c.weight_scale else None
    clusters, gates = None, None
    if c.activation == "venom" and c.routing == "static":
        clusters = ffn.fixed_clusters()
    elif ffn.experts is not None:
        clusters, gates = ffn.experts.assign(x)
        gates = gates.float()
    held = _held(ffn, scale, x.dtype, how)
    return operators.sparse_ffn(x.contiguous(), ffn.w1, ffn.w2, scale, clusters, gates, held, how)


def _held(ffn: SparseFFN, scale: Tensor | None, dtype: torch.dtype, how: str) -> list[Tensor]:
    """The weights' forms if `ffn.hold` promises that the weights stay; none, and every pass makes its own.

    A version counter would not do: fused optimisers change weights without counting.
    """
    if not ffn.hold:
        return []
    key = (how, dtype, () if torch.compiler.is_compiling() else _where(ffn))
    if ffn.operands is None or ffn.operands[0] != key:
        ffn.operands = key, operators.operands(ffn.w1, ffn.w2, scale, dtype, how)
    return ffn.operands[1]


def _decoder(ffn: SparseFFN, dtype: torch.dtype) -> decode.Decoder:
    """The weights as decoding reads them, kept until `ffn.hold` is set again."""
    key = (ffn.formats, dtype, _where(ffn))
    if ffn.decoder is None or ffn.decoder[0] != key:
        ffn.decoder = key, decode.prepare(ffn, dtype)
    return ffn.decoder[1]


def _where(ffn: SparseFFN) -> tuple[int, int]:
    return ffn.w1.data_ptr(), ffn.w2.data_ptr()
