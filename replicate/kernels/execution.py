"""How the kernels execute a sparse FFN: all about a call that is no tensor, as one string.

An operator of PyTorch takes tensors and constants. A layer's formats, the engine, the compressed layout and
which 2:4 products run on sparse tensor cores are settled before the call and travel as text, so that the
shapes of all an operator returns follow from its arguments, as tracing and CUDA graphs need.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from replicate.config import SparsityConfig
from replicate.kernels import backend as engines
from replicate.kernels.two_four import plan24
from replicate.kernels.two_four.compressed24 import layout, padded_rows
from replicate.system.tracing import constant

WEIGHTS = ("w1", "w2", "w2_t", "w1_t")  # operands of products 1, 2, 3 and 5


@dataclass(frozen=True)
class Execution:
    """One way to compute a layer.

    Attributes:
        formats: the layer's `SparsityConfig`, as `LayerState.formats` spells it.
        backend: the engine asked for, see `backend.requested`.
        layout: of compressed operands, see `compressed24.layout`.
        sparse: operands whose product runs on sparse tensor cores: of WEIGHTS, and "y2" and "dy1".
        block: rows of a block of Venom's lists; 0 chooses.
    """

    formats: str
    backend: str = "auto"
    layout: str = "sm90"
    sparse: tuple[str, ...] = ()
    block: int = 0

    @property
    def text(self) -> str:
        """What operators take."""
        return " ".join([self.backend, self.layout, ",".join(self.sparse), str(self.block), self.formats])

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> Execution:
        """The execution whose `text` this is."""
        backend, kind, sparse, block, formats = text.split(" ", 4)
        return Execution(formats, backend, kind, tuple(filter(None, sparse.split(","))), int(block))

    @property
    def config(self) -> SparsityConfig:
        """The layer's formats."""
        return _config(self.formats)

    @property
    def keeps_dense(self) -> bool:
        """True if y2 is also kept uncompressed: its product runs dense, or only the library reads it."""
        return self.layout == "vendor" or "y2" not in self.sparse


@cache
def _config(formats: str) -> SparsityConfig:
    return SparsityConfig(**json.loads(formats))


def compressed(config: SparsityConfig) -> list[str]:
    """The operands that are compressed in this configuration: of WEIGHTS, and "y2" and "dy1"."""
    return [name for name in WEIGHTS if getattr(config, name)] + ["y2", "dy1"] * (config.activation == "24")


@constant
def execution(
    formats: str, backend: str, device: torch.device, dtype: torch.dtype, n_tokens: int, d_model: int,
    d_ff: int,
) -> str:  # fmt: skip
    """The text of the `Execution` of a layer [D, F] of `formats` on `n_tokens` tokens.

    A 2:4 product runs on sparse tensor cores where these are faster (`plan24`, which tunes a new shape), or
    where `backend` is "cusparselt"; else dense on the same values.

    Args:
        backend: from `backend.requested`. dtype: of the tokens. n_tokens: read only if the engine is
            "cusparselt" and something is compressed.
    """
    c, on = _config(formats), engines.select(device, backend, dtype) == "cusparselt"
    used = compressed(c)
    if not used:
        return Execution(formats, backend).text
    shapes = dict(_shapes(dtype, n_tokens, d_model, d_ff))
    sparse = [n for n in used if on and (backend == "cusparselt" or plan24.pays(shapes[n], device))]
    return Execution(formats, backend, layout(device, dtype), tuple(sparse)).text


def _shapes(dtype: torch.dtype, n_tokens: int, d_model: int, d_ff: int) -> Iterator[tuple[str, plan24.Shape]]:
    """Each operand that can be compressed, and the shape of its product."""
    for name, rows, summed in (("w1", d_ff, d_model), ("w2", d_model, d_ff)):
        columns = n_tokens + -n_tokens % 8
        yield name, plan24.Shape(rows, columns, summed, dtype, False, True)
        yield f"{'w2' if name == 'w1' else 'w1'}_t", plan24.Shape(rows, columns, summed, dtype, False, True)
    for name, row_major in (("y2", True), ("dy1", False)):
        yield name, plan24.Shape(padded_rows(n_tokens), d_model + -d_model % 8, d_ff, dtype, row_major)
