"""W1 and W2 as the six products read them: cast, pruned, or compressed.

Names are those of `SparsityConfig`: w1 and w2 are read in the forward pass, w2_t and w1_t in the backward
pass. Each form is a tensor under a key:

    ("cast", w)         the stored weight in the tokens' dtype
    ("packed", p)       S24 of the weight of product p, compressed along the axis that p sums over
    ("unpacked", p)     the same values, not compressed, where p's product runs dense
    ("dense", p)        the same values as a contiguous W1 [D, F] or W2 [F, D], for its weight's other product
    ("means", "")       ExpertMeans [n, D] of the router
    ("fp8", w)          the stored weight in FP8, as bytes, because PyTorch cannot compute with FP8;
                        ("turned", w) its transpose, ("scale", w) the scale of both
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from replicate import fp8
from replicate.kernels.execution import WEIGHTS, Execution
from replicate.kernels.two_four.compressed24 import Compressed24, new_buffer, unpack24
from replicate.kernels.two_four.matmul24 import matmul24
from replicate.kernels.two_four.soft_threshold_prune24 import soft_threshold_prune24
from replicate.kernels.venom.cast_means import cast_means, means_and_largest
from replicate.kernels.venom.common import FP8
from replicate.kernels.venom.quantise import quantise_rows, quantise_weight
from replicate.router import ordered_cluster_means

Key = tuple[str, str]
TOGETHER: tuple[Key, Key] = ("cast", "w1"), ("means", "")  # made from one read of W1
FORWARD, BACKWARD = ("w1", "w2"), ("w2_t", "w1_t")
IN_FP8 = ("fp8", "turned", "scale")  # made together


class Operands:
    """A layer's weights as its products read them, each form made when first asked for.

    Args:
        w1: [D, F]. w2: [F, D]. scale: [4], S-STE's beta of WEIGHTS, or None.
        dtype: of the tokens. how: the layer's execution. made: forms that are there already.
    """

    def __init__(
        self, w1: Tensor, w2: Tensor, scale: Tensor | None, dtype: torch.dtype, how: Execution,
        made: Iterable[tuple[Key, Tensor]] = (),
    ) -> None:  # fmt: skip
        self.weights, self.scale, self.dtype, self.how = {"w1": w1, "w2": w2}, scale, dtype, how
        self.made: dict[Key, Tensor] = dict(made)

    def forms(self, products: tuple[str, ...] = WEIGHTS) -> tuple[Key, ...]:
        """The forms that these products need, in a fixed order; not a weight that is in the dtype already."""
        there = tuple(name for name, w in self.weights.items() if w.dtype == self.dtype)
        return _forms(products, self.how, there)

    def kept(self) -> list[Key]:
        """The forms that the forward pass makes and the backward pass reads again."""
        again = self.forms(BACKWARD)
        return [key for key in self.forms(FORWARD) if key in again]

    def all(self, keys: Sequence[Key]) -> list[Tensor]:
        """These forms."""
        return [self._get(*key) for key in keys]

    def dense(self, name: str) -> Tensor:
        """W1 [D, F] or W2 [F, D], contiguous, as product `name` reads it as a dense operand."""
        source = self.how.config.source(name)
        return self._get("dense", source) if source else self._get("cast", name.removesuffix("_t"))

    def fp8(self, name: str) -> tuple[Tensor, Tensor]:
        """The weight of product `name` in FP8, contiguous along the axis that it sums over, and its scale."""
        weight = name.removesuffix("_t")
        values = self._get("fp8" if name.endswith("_t") else "turned", weight)
        return values.view(FP8), self._get("scale", weight)

    def means(self) -> Tensor:
        """ExpertMeans [n, D]."""
        return self._get("means", "")

    def times(self, y: Tensor, name: str) -> Tensor:
        """The product that reads weight `name`: y W1, y W2, dy3 W2^T or dy1 W1^T."""
        if self.how.config.fp8:
            (values, scale), (weight, of_weight) = quantise_rows(y), self.fp8(name)
            return fp8.multiply(values, scale[:, None], weight, of_weight, y.dtype)
        if not getattr(self.how.config, name):
            weight = self.dense(name)
            return y @ (weight.t() if name.endswith("_t") else weight)
        if name not in self.how.sparse:
            return y @ self._get("unpacked", name).t()
        return matmul24(self._compressed(name), y.t(), transpose=True, backend=self.how.backend)

    def empty(self, key: Key) -> Tensor:
        """A tensor of the shape of a form, for tracing."""
        kind, name = key
        w = self.weights[name.removesuffix("_t") or "w1"]
        if kind == "means":
            return w.new_empty((self.how.config.n_clusters, w.shape[0]), dtype=self.dtype)
        if kind in ("cast", "dense"):
            return torch.empty_like(w, dtype=self.dtype)
        if kind in IN_FP8:
            shape = {"fp8": w.shape, "turned": w.shape[::-1], "scale": ()}[kind]
            return w.new_empty(shape, dtype=torch.float32 if kind == "scale" else torch.uint8)
        rows, cols = self._compressed_shape(name)
        if kind == "packed":
            return new_buffer(True, rows, cols, w, self.dtype)
        return w.new_empty((rows, cols), dtype=self.dtype)

    def _get(self, kind: str, name: str) -> Tensor:
        if (kind, name) not in self.made:
            self._make(kind, name)
        return self.made[kind, name]

    def _make(self, kind: str, name: str) -> None:
        w, c = self.weights[name.removesuffix("_t") or "w1"], self.how.config
        if (kind, name) in TOGETHER and set(TOGETHER) <= set(self.forms()):
            both = cast_means(w.contiguous(), c.n_clusters, self.dtype)
            self.made |= dict(zip(TOGETHER, both, strict=True))
            return
        if c.fp8 and kind in (*IN_FP8, "means"):
            name, largest = name or "w1", None
            if name == "w1" and ("means", "") in self.forms():
                self.made["means", ""], largest = means_and_largest(w.contiguous(), c.n_clusters, self.dtype)
            values, turned, scale = quantise_weight(w.contiguous(), largest)
            made = values.view(torch.uint8), turned.view(torch.uint8), scale
            self.made |= {(form, name): part for form, part in zip(IN_FP8, made, strict=True)}
            return
        if kind == "cast":
            made = w.to(self.dtype)
        elif kind == "means":
            made = ordered_cluster_means(w, c.n_clusters).to(self.dtype).contiguous()
        elif kind == "packed":
            found = self._prune(w, name)
            made = found.buffer
            if found.dense is not None:
                self.made["unpacked", name] = found.dense
        else:
            made = unpack24(self._compressed(name), backend=self.how.backend)
            if kind == "dense" and not name.endswith("_t"):
                made = made.t().contiguous()
        self.made[kind, name] = made

    def _prune(self, w: Tensor, name: str) -> Compressed24:
        index = WEIGHTS.index(name)
        return soft_threshold_prune24(
            w,
            not name.endswith("_t"),
            scale=None if self.scale is None else self.scale[index],
            method=self.how.config.weight_method,
            dtype=self.dtype,
            backend=self.how.backend,
        )

    def _compressed(self, name: str) -> Compressed24:
        buffer = self._get("packed", name)
        return Compressed24(
            buffer, *self._compressed_shape(name), self.how.layout, self.made.get(("unpacked", name))
        )

    def _compressed_shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of the compressed matrix: W^T for w1 and w2, W for w2_t and w1_t."""
        rows, cols = self.weights[name.removesuffix("_t")].shape
        return (rows, cols) if name.endswith("_t") else (cols, rows)


@cache
def _forms(products: tuple[str, ...], how: Execution, there: tuple[str, ...]) -> tuple[Key, ...]:
    c, found = how.config, [key for name in products for key in _chain(name, how)]
    if "w1" in products and c.activation == "venom" and c.routing == "token":
        found.append(("means", ""))
    return tuple(dict.fromkeys(key for key in found if key not in [("cast", name) for name in there]))


def _chain(name: str, how: Execution) -> list[Key]:
    """The forms behind the weight that product `name` reads, each made from the one before."""
    source = how.config.source(name)
    if how.config.fp8:
        return [(form, name.removesuffix("_t")) for form in IN_FP8]
    if not source:
        return [("cast", name.removesuffix("_t"))]
    unpacked = name == source and name not in how.sparse
    chain: list[Key] = [("packed", source)]
    if unpacked or how.layout == "vendor":  # only the library reads the vendor's layout
        chain.append(("unpacked", source))
    return chain if name == source else [*chain, ("dense", source)]
