"""`SparseFFN`'s products by kernels: the numbers of `ffn.SparseFFN.reference`, within rounding, at speed.

    activation "venom", weights dense     figure 4d: all six products in the selected blocks (`VenomFFN`)
    activation "venom", W1 or W2^T 2:4    algorithms 1 and 2: 2:4 products 1, 3, Venom products 2, 4, 5, 6
    routing "activation"                  y1 in full, which says what the selected blocks of the others are
    activation "24"                       squared ReLU, pruning and compression in one pass; products 2, 5 2:4
    activation "dense", weights 2:4       2:4 products with the compressed weights

Weights are compressed, and cast, once per pass, or once per optimiser step if `SparseFFN.hold` says when they
stay as they are. A 2:4 product that cuSPARSELt does not make faster runs dense on the same values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from replicate.ablations import token_order
from replicate.kernels import backend as engines
from replicate.kernels.backend import HALF
from replicate.kernels.two_four import plan24
from replicate.kernels.two_four.compressed24 import TILE, Compressed24, padded_rows, unpack24
from replicate.kernels.two_four.matmul24 import matmul24
from replicate.kernels.two_four.relu2_prune24 import relu2_prune24, relu2_prune24_backward
from replicate.kernels.two_four.soft_threshold_prune24 import soft_threshold_prune24
from replicate.kernels.two_four.tile_prune24 import tile_prune24
from replicate.kernels.venom.down import venom_down
from replicate.kernels.venom.ffn import VenomFFN, block_rows
from replicate.kernels.venom.route_active import route_active
from replicate.kernels.venom.route_topk import route_topk
from replicate.kernels.venom.select import venom_select
from replicate.kernels.venom.token_lists import BlockLists, token_lists
from replicate.kernels.venom.up import venom_up_backward
from replicate.kernels.venom.wgrad import venom_wgrad
from replicate.router import route

if TYPE_CHECKING:
    from replicate.ffn import SparseFFN


def why_not(ffn: SparseFFN, x: Tensor) -> str:
    """What keeps the kernels from computing this layer on x [T, D], in a few words; empty if nothing does."""
    c, (d_model, d_ff) = ffn.config, ffn.w1.shape
    if ffn.collect:
        return "statistics read all of y2"
    if len(x) == 0:
        return "there are no tokens"
    if c.activation != "dense" and c.selection != "magnitude":
        return f"selection {c.selection!r} has no kernel"
    if c.activation == "venom" and c.routing not in ("token", "activation", "static"):
        return f"routing {c.routing!r} has no kernel"
    if not c.mask_reuse:
        return "mask_reuse=False has no kernel"
    if c.wgrad != "dense" and (c.wgrad != "tile" or c.activation != "24"):
        return f"wgrad {c.wgrad!r} has no kernel with activation {c.activation!r}"
    if c.wgrad == "tile" and len(x) % TILE:
        return f"{len(x)} tokens are no multiple of {TILE}"
    pairs = c.activation == "24" or any(getattr(c, name) for name in ("w1", "w2", "w2_t", "w1_t"))
    if pairs and x.dtype not in HALF:
        return f"2:4 needs float16 or bfloat16, not {x.dtype}"
    if x.dtype not in (*HALF, torch.float32):
        return f"no kernel computes in {x.dtype}"
    if pairs and (d_model % TILE or d_ff % TILE):
        return f"2:4 compression needs d_model and d_ff in multiples of {TILE}, not {d_model} and {d_ff}"
    if c.activation == "venom" and (d_model % 8 or d_ff % (8 * c.n_clusters)):
        return f"clusters of {d_ff / c.n_clusters:g} neurons and d_model {d_model} are no multiples of 8"
    return ""


def choose(ffn: SparseFFN, x: Tensor) -> str:
    """The engine for this layer on x [T, D]: "reference", "triton" or "cusparselt".

    Raises ValueError if `ffn.backend` or REPLICATE_BACKEND names an engine that the device lacks, or kernels
    that do not exist for this configuration.
    """
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
    """One line: which engine computes the sparse phase of this layer on x [T, D], and why."""
    engine = choose(ffn, x)
    if engine == "reference":
        return f"reference ({why_not(ffn, x) or engines.report(x.device)})"
    kinds = dict.fromkeys(kind for _, _, kind in ffn.config.products() if kind != "dense")
    by = {"2:4": engine, "venom": "triton", "sampled": "triton"}
    return ", ".join(f"{kind} by {by[kind]}" for kind in kinds)


def sparse_phase(ffn: SparseFFN, x: Tensor) -> Tensor:
    """y3 [T, D] of the configured sparse FFN, differentiable in x [T, D], W1 and W2."""
    if choose(ffn, x) == "reference":
        return ffn.reference(x)
    operands = _operands(ffn, x.dtype)
    c, x = ffn.config, x.contiguous()
    if c.activation != "venom":
        return _TwoFourFFN.apply(x, ffn.w1, ffn.w2, operands)
    if c.routing == "activation":
        return _RoutedFFN.apply(x, ffn.w1, ffn.w2, None, operands)
    clusters = _clusters(x, ffn, operands)
    if c.w1 or c.w2_t:
        return _RoutedFFN.apply(x, ffn.w1, ffn.w2, clusters, operands)
    weights, block = (operands.dense("w1"), operands.dense("w2")), block_rows(clusters.numel(), c.n_clusters)
    return VenomFFN.apply(x, ffn.w1, ffn.w2, weights, clusters, c.n_clusters, c.inner, block)


class Operands:
    """A layer's weights as its products read them, each made when first asked for.

    Names are those of `SparsityConfig`: w1 and w2 in the forward pass, w2_t and w1_t in the backward pass.
    """

    def __init__(self, ffn: SparseFFN, dtype: torch.dtype, key: tuple) -> None:
        self.ffn, self.config, self.dtype, self.backend = ffn, ffn.config, dtype, ffn.backend
        self.engine = engines.select(ffn.w1.device, ffn.backend, dtype)
        self.key = key
        self._made: dict[str, Tensor | Compressed24] = {}

    def dense(self, name: str) -> Tensor:
        """W1 [D, F] or W2 [F, D] in the layer's dtype, as product `name` reads it as a dense operand."""
        weight, source = name.removesuffix("_t"), self.config.source(name)
        key = f"dense {source or weight} {'pruned' if source else ''}"
        if key not in self._made:
            if source:  # the values that the weight's other product reads, compressed
                pruned = unpack24(self._compressed(source), backend=self.backend)
                self._made[key] = pruned if source.endswith("_t") else pruned.t().contiguous()
            else:
                self._made[key] = getattr(self.ffn, weight).detach().to(self.dtype)
        return self._made[key]

    def means(self) -> Tensor:
        """ExpertMeans [n, D] in the layer's dtype."""
        if "means" not in self._made:
            self._made["means"] = self.ffn.cluster_means().to(self.dtype).contiguous()
        return self._made["means"]

    def times(self, y: Tensor, name: str) -> Tensor:
        """The product that reads weight `name`: y W1, y W2, dy3 W2^T or dy1 W1^T."""
        if not getattr(self.config, name):
            weight = self.dense(name)
            return y @ (weight.t() if name.endswith("_t") else weight)
        sparse = self._compressed(name)
        shape = plan24.Shape(len(sparse.buffer), len(y) + -len(y) % 8, sparse.cols, y.dtype, False, True)
        if sparse.dense is None and not self.pays(shape):
            sparse = self._made[name] = sparse.with_dense(unpack24(sparse, backend=self.backend))
        return matmul24(sparse, y.t(), transpose=True, backend=self.backend)

    def _compressed(self, name: str) -> Compressed24:
        """The transposed weight, 2:4 along the axis its product sums over."""
        if name not in self._made:
            c, ffn = self.config, self.ffn
            index = ("w1", "w2", "w2_t", "w1_t").index(name)
            self._made[name] = soft_threshold_prune24(
                getattr(ffn, name.removesuffix("_t")).detach(),
                not name.endswith("_t"),
                scale=ffn.beta(index) if c.weight_scale else None,
                method=c.weight_method,
                dtype=self.dtype,
                backend=self.backend,
            )
        return self._made[name]

    def pays(self, shape: plan24.Shape) -> bool:
        """True if a 2:4 product of this shape is to run on sparse tensor cores."""
        if self.engine != "cusparselt" or shape.n == 0:
            return False
        return engines.requested(self.backend) == "cusparselt" or plan24.pays(shape, self.ffn.w1.device)


def _operands(ffn: SparseFFN, dtype: torch.dtype) -> Operands:
    """The layer's operands: made anew by every pass, unless `ffn.hold` promises that the weights stay.

    A version counter would not do: fused optimisers change weights without counting.
    """
    key = (ffn.config, engines.requested(ffn.backend), dtype, ffn.w1.data_ptr(), ffn.w2.data_ptr())
    if not ffn.hold:
        return Operands(ffn, dtype, key)
    if ffn.operands is None or ffn.operands.key != key:
        ffn.operands = Operands(ffn, dtype, key)
    return ffn.operands


def _clusters(x: Tensor, ffn: SparseFFN, operands: Operands) -> Tensor:
    """[T, k] the clusters of each token."""
    c = ffn.config
    if c.routing == "static":
        return ffn.fixed_clusters().expand(len(x), -1).contiguous()
    if c.metric == "dot":
        return route_topk(x.detach(), operands.means(), c.top_k)
    return route(x.detach(), operands.means(), c.top_k, metric=c.metric)


class _TwoFourFFN(torch.autograd.Function):
    """2:4 weights with dense activations, or 2:4 activations: products 2 and 5 then read y2 and dy1."""

    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, w2: Tensor, operands: Operands) -> Tensor:
        c, ctx.operands, ctx.order = operands.config, operands, None
        if c.wgrad == "tile" and c.wgrad_permute:
            # The whole layer runs in the order weight gradients need: a row does not depend on its place.
            ctx.order = token_order(len(x), x.device)
            x = x[ctx.order[0]]
        y1 = operands.times(x, "w1")
        if c.activation == "dense":
            relu_y1 = y1.relu_()
            ctx.save_for_backward(x, w1, w2, relu_y1)
            return operands.times(relu_y1.square(), "w2")
        w2_dense = operands.dense("w2")
        y2 = relu2_prune24(y1, dense=not _pays(len(x), w2_dense, operands), backend=operands.backend)
        del y1
        ctx.save_for_backward(x, w1, w2, y2.buffer, y2.dense)
        ctx.y2 = y2.rows, y2.cols, y2.layout
        y3 = matmul24(y2, w2_dense, backend=operands.backend)
        return y3 if ctx.order is None else y3[ctx.order[1]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy3: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, *saved = ctx.saved_tensors
        operands, dy3 = ctx.operands, dy3.to(x.dtype).contiguous()
        dy3 = dy3 if ctx.order is None else dy3[ctx.order[0]]
        if operands.config.activation == "dense":
            (relu_y1,) = saved
            dw2 = (relu_y1.square().t() @ dy3).to(w2.dtype)
            dy1 = operands.times(dy3, "w2_t").mul_(relu_y1).mul_(2)
            dx, dw1 = operands.times(dy1, "w1_t"), x.t() @ dy1
        else:
            # Of y2, dy2 and dy1 no two are there in full at a time: that is what the peak consists of.
            y2 = Compressed24(saved[0], *ctx.y2, saved[1])
            w1_t = operands.dense("w1_t").t()
            dy1, dx = _gradient_times(operands.times(dy3, "w2_t"), y2, w1_t, operands)
            dw1 = _reduce_tokens(dy1, x, operands, transpose=True)
            del dy1
            dw1 = dw1.to(w1.dtype)
            dw2 = _reduce_tokens(unpack24(y2, backend=operands.backend), dy3, operands)
        dx = dx if ctx.order is None else dx[ctx.order[1]]
        return dx, dw1.to(w1.dtype), dw2.to(w2.dtype), None


def _gradient_times(dy2: Tensor, y2: Compressed24, w1_t: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
    """dy1 [T, F], in dy2's memory, and dx = dy1 W1^T."""
    pays, backend = _pays(len(dy2), w1_t, operands), operands.backend
    form = "both" if pays else "dense"
    dy1 = relu2_prune24_backward(dy2, y2, form=form, overwrite=True, backend=backend)
    return (dy1.dense, matmul24(dy1, w1_t, backend=backend)) if pays else (dy1, dy1 @ w1_t)


def _pays(tokens: int, w: Tensor, operands: Operands) -> bool:
    """True if the product of a 2:4 activation [tokens, F] with w [F, D] is to run on sparse tensor cores."""
    columns = w.shape[1] + -w.shape[1] % 8
    return operands.pays(plan24.Shape(padded_rows(tokens), columns, len(w), w.dtype, w.is_contiguous()))


def _reduce_tokens(sparse: Tensor, dense: Tensor, operands: Operands, transpose: bool = False) -> Tensor:
    """sparse^T dense [F, D] over tokens, or its transpose: 2:4 along tokens if so configured."""
    if operands.config.wgrad == "dense":
        return dense.t() @ sparse if transpose else sparse.t() @ dense
    backend = operands.backend
    _, turned = tile_prune24(sparse, along_columns=False, backend=backend)
    return matmul24(turned, dense, transpose=transpose, backend=backend)


class _RoutedFFN(torch.autograd.Function):
    """Algorithms 1 and 2: y1 in full, and dy2 if from a 2:4 weight; the other products in Venom's blocks.

    Without `clusters`, those of a token are the clusters in which y1 makes it fire most.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, w1: Tensor, w2: Tensor, clusters: Tensor | None, operands: Operands
    ) -> Tensor:
        c = operands.config
        y1 = operands.times(x, "w1")
        if clusters is None:
            clusters = route_active(y1, c.n_clusters, c.top_k)
        lists = token_lists(clusters, c.n_clusters, block_rows(clusters.numel(), c.n_clusters))
        y2 = venom_select(y1, lists, inner=c.inner)
        del y1
        ctx.save_for_backward(x, w1, w2, y2, *lists)
        ctx.operands = operands
        return venom_down(y2, operands.dense("w2"), lists)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy3: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, y2, *lists = ctx.saved_tensors
        operands, lists = ctx.operands, BlockLists(*lists)
        dy3 = dy3.to(x.dtype).contiguous()
        if operands.config.w2_t:
            dy1 = venom_select(operands.times(dy3, "w2_t"), lists, y2)
        else:  # the forward's mask says which blocks of dy2 are needed
            dy1 = venom_up_backward(dy3, operands.dense("w2_t"), y2, lists)
        dx = venom_down(dy1, operands.dense("w1_t"), lists, transposed=True)  # needs most memory: comes first
        dw1 = venom_wgrad(x, dy1, lists, dtype=w1.dtype)
        return dx, dw1, venom_wgrad(dy3, y2, lists, transposed=True, dtype=w2.dtype), None, None
