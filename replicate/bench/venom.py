"""Times of the routed FFN of figure 4d and its products, beside cuBLAS and a compiled dense FFN (figure 7).

Both sides run in one process on the same random bf16 inputs and take turns, as CUDA graphs, so that no
launch gap is timed; every sparse result is checked against its reference before anything is timed. The peer
is a mixture of experts on torch's grouped products.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from replicate.bench import timing
from replicate.bench.timing import Calls, relative_error
from replicate.kernels.venom.down import down_parts, gather_sum
from replicate.kernels.venom.ffn import venom_ffn, venom_ffn_reference
from replicate.kernels.venom.gather import venom_gather_matmul, venom_gather_matmul_reference
from replicate.kernels.venom.route_topk import route_topk, route_topk_reference
from replicate.kernels.venom.token_lists import BlockLists, token_lists
from replicate.kernels.venom.up import venom_up, venom_up_backward
from replicate.kernels.venom.wgrad import venom_wgrad
from replicate.study import records

KIND = "bench-venom"
SHAPES = ((4096, 16384), (2048, 8192))  # d_model, d_ff of the 7B and the 1B model
TOP_KS = (4, 2, 1)  # of 16 clusters: 4 of M = 16, 32, 64 columns
CLUSTERS = 16
TOLERANCE = 2e-2  # relative error of bf16 results against float32 references
PRODUCTS = (
    "1 y1 = x W1",
    "2 y3 = y2 W2",
    "3 dy2 = dy3 W2^T",
    "4 dW2 = y2^T dy3",
    "5 dx = dy1 W1^T",
    "6 dW1 = x^T dy1",
)


def config(
    tokens: int = 16384,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    top_ks: Sequence[int] = TOP_KS,
    repeats: int = 15,
) -> dict[str, Any]:
    """What identifies a run of this benchmark; shapes are (d_model, d_ff)."""
    c = {"tokens": tokens, "shapes": [list(shape) for shape in shapes], "top_ks": list(top_ks)}
    return c | {"clusters": CLUSTERS, "dtype": "bfloat16", "seed": 0, "repeats": repeats}


def run(c: dict[str, Any]) -> records.Record:
    """Measure everything the configuration names. Raises ValueError without a GPU."""
    if not torch.cuda.is_available():
        raise ValueError("nothing to measure: these kernels are timed on an NVIDIA GPU")
    start, results = time.perf_counter(), []
    for d_model, d_ff in c["shapes"]:
        results.append(measure_shape(c, d_model, d_ff))
        timing.release()
    return records.make_record(KIND, c, {"shapes": results}, seconds=time.perf_counter() - start)


def measure_shape(c: dict[str, Any], d_model: int, d_ff: int) -> dict[str, Any]:
    """All times of one FFN shape, in milliseconds, by top-k ("dense" for the dense side)."""
    p, repeats = RoutedFFN(c["tokens"], d_model, d_ff, c["seed"]), c["repeats"]
    out: dict[str, Any] = {"d_model": d_model, "d_ff": d_ff}
    out["errors"] = {str(k): check_step(p, k) for k in c["top_ks"]}
    dense, peer = torch.compile(dense_ffn), GroupedMixture(p)
    steps: Calls = {"dense": lambda: p.gradients(dense(*p.leaves))}
    steps |= {str(k): partial(p.sparse_step, k) for k in c["top_ks"]}
    out["peak_bytes"] = {name: timing.peak_bytes(step) for name, step in steps.items()}
    out["load"] = {str(k): p.lists(k).counts.tolist() for k in c["top_ks"]}
    steps |= {f"grouped {k}": partial(peer.step, k) for k in c["top_ks"]}
    graphs = timing.graphed_all(steps)
    out["ffn"] = _medians(timing.compare(graphs, "cuda", repeats))
    out["ffn_sustained"] = {name: timing.sustained_ms(graph) for name, graph in graphs.items()}
    out["ffn_eager"] = {name: timing.sustained_ms(step) for name, step in steps.items()}
    x, w1, w2 = (leaf.detach() for leaf in p.leaves)
    calls = {"dense": _six(torch.matmul, x, w1, w2, p.dy3)}
    for k in c["top_ks"]:
        calls |= {str(k): sparse_products(p, k), f"grouped {k}": peer.products(k)}
    flat = {(who, name): fn for who, own in calls.items() for name, fn in own.items()}
    times = _medians(timing.compare_graphs(flat, repeats))
    out["products"] = {who: {name: times[who, name] for name in own} for who, own in calls.items()}
    gather = {str(v): timing.compare_graphs(gather_products(p, v), repeats) for v in (64, 128)}
    return out | {"gather": {v: _medians(found) for v, found in gather.items()}}


class RoutedFFN:
    """Random bf16 inputs of one FFN: unit-variance x, weights that keep it, an output gradient."""

    def __init__(self, tokens: int, d_model: int, d_ff: int, seed: int) -> None:
        g = torch.Generator("cuda").manual_seed(seed)

        def rand(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=g, device="cuda") * scale).bfloat16().requires_grad_()

        self.x, self.dy3 = rand(tokens, d_model), rand(tokens, d_model).detach()
        self.w1, self.w2 = rand(d_model, d_ff, scale=d_model**-0.5), rand(d_ff, d_model, scale=d_ff**-0.5)
        self.leaves = (self.x, self.w1, self.w2)

    def means(self) -> Tensor:
        """ExpertMeans [n, D] of the present weights."""
        d_model, d_ff = self.w1.shape
        return self.w1.detach().view(d_model, CLUSTERS, d_ff // CLUSTERS).mean(2).T.contiguous()

    def lists(self, top_k: int) -> BlockLists:
        """Means, routing and permutation."""
        return token_lists(route_topk(self.x.detach(), self.means(), top_k), CLUSTERS)

    def gradients(self, y3: Tensor) -> tuple[Tensor, ...]:
        """y3 and the gradients of x, W1, W2."""
        return y3, *torch.autograd.grad(y3, self.leaves, self.dy3)

    def sparse_step(self, top_k: int) -> tuple[Tensor, ...]:
        """Forward and backward of figure 4d, with cluster means, routing and permutation."""
        clusters = route_topk(self.x.detach(), self.means(), top_k)
        return self.gradients(venom_ffn(*self.leaves, clusters, CLUSTERS))


def dense_ffn(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The dense squared-ReLU FFN, to be compiled."""
    return torch.relu(x @ w1).square() @ w2


def check_step(p: RoutedFFN, top_k: int) -> dict[str, float]:
    """Relative errors of routing, y3, dx, dW1, dW2 on the first 2048 tokens; raises if one is too large."""
    x, dy3 = p.x.detach()[:2048].requires_grad_(), p.dy3[:2048]
    means = p.means()
    clusters = route_topk(x.detach(), means, top_k)
    y3 = venom_ffn(x, p.w1, p.w2, clusters, CLUSTERS)
    ours = (y3, *torch.autograd.grad(y3, (x, p.w1, p.w2), dy3))
    wide = [t.detach().float().requires_grad_() for t in (x, p.w1, p.w2)]
    y3 = venom_ffn_reference(*wide, clusters, CLUSTERS)
    reference = (y3, *torch.autograd.grad(y3, wide, dy3.float()))
    errors = {n: relative_error(a, b) for n, a, b in zip(("y3", "dx", "dW1", "dW2"), ours, reference)}
    scores = x.detach().float() @ means.float().T
    best = scores.gather(1, route_topk_reference(x.detach(), means, top_k).long())
    errors["router"] = relative_error(scores.gather(1, clusters.long()), best)
    bad = {name: e for name, e in errors.items() if not e <= TOLERANCE}
    if bad:
        raise AssertionError(f"top-{top_k} of {CLUSTERS} differs from its reference: {bad}")
    return errors


def _six(matmul: Callable[..., Tensor], x: Tensor, w1: Tensor, w2: Tensor, dy3: Tensor) -> Calls:
    """PRODUCTS as calls of `matmul`; y = x W1 stands in for y2 and dy1, which have its shape."""
    y = matmul(x, w1)
    operands = ((x, w1), (y, w2), (dy3, w2.mT), (y.mT, dy3), (y, w1.mT), (x.mT, y))
    return {name: partial(matmul, *pair) for name, pair in zip(PRODUCTS, operands, strict=True)}


def sparse_products(p: RoutedFFN, top_k: int) -> Calls:
    """The six in selected blocks, activation and mask included, and the passes around them."""
    x, w1, w2, dy3 = p.x.detach(), p.w1.detach(), p.w2.detach(), p.dy3
    means, lists = p.means(), p.lists(top_k)
    clusters = route_topk(x, means, top_k)
    y2 = venom_up(x, w1, lists)
    dy1 = venom_up_backward(dy3, w2, y2, lists)
    parts = down_parts(y2, w2, lists)
    calls = (
        lambda: venom_up(x, w1, lists),
        lambda: down_parts(y2, w2, lists),
        lambda: venom_up_backward(dy3, w2, y2, lists),
        lambda: venom_wgrad(dy3, y2, lists, transposed=True),
        lambda: down_parts(dy1, w1, lists, transposed=True),
        lambda: venom_wgrad(x, dy1, lists),
    )
    return dict(zip(PRODUCTS, calls)) | {
        "expert means": p.means,
        "route": lambda: route_topk(x, means, top_k),
        "token lists": lambda: token_lists(clusters, CLUSTERS),
        "sum of k parts": lambda: gather_sum(parts, lists.inverse),
    }


class _Rows(torch.autograd.Function):
    """x [T, D] to rows in cluster order, or `back`: the sum of each token's rows.

    Each way is the other's gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, tokens: Tensor, inverse: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(tokens, inverse)
        ctx.back = back
        return gather_sum(x, inverse) if back else _take(x, tokens)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        tokens, inverse = ctx.saved_tensors
        dx = _take(grad, tokens) if ctx.back else gather_sum(grad.contiguous(), inverse)
        return dx, None, None, None


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    return x.index_select(0, tokens.clamp(min=0)).masked_fill_((tokens < 0)[:, None], 0)


class GroupedMixture:
    """The peer: a mixture of experts of equal FLOPs on torch's grouped products (CUTLASS), without 2 of 4.

    Same routing, lists and sum; weights [n, D, W] and [n, W, D]; token rows copied into cluster order.
    """

    def __init__(self, p: RoutedFFN) -> None:
        d_model, d_ff = p.w1.shape
        width = d_ff // CLUSTERS
        w1 = p.w1.detach().view(d_model, CLUSTERS, width).permute(1, 0, 2).contiguous()
        self.p, self.w1 = p, w1.requires_grad_()
        self.w2 = p.w2.detach().view(CLUSTERS, width, d_model).requires_grad_()
        self.activation = torch.compile(lambda y1: torch.relu(y1).square())

    def rows_of(self, lists: BlockLists) -> tuple[Tensor, Tensor]:
        """Tokens by row, -1 in padding and unused rows, and the end of each cluster's rows."""
        row = torch.arange(len(lists.tokens), device="cuda")
        tokens = torch.where(row < lists.n_blocks * lists.block, lists.tokens, -1)
        blocks = (lists.counts + lists.block - 1) // lists.block
        return tokens, (lists.starts + blocks * lists.block).int()

    def step(self, top_k: int) -> tuple[Tensor, ...]:
        """Forward and backward with cluster means, routing and permutation."""
        p, lists = self.p, self.p.lists(top_k)
        tokens, ends = self.rows_of(lists)
        rows = _Rows.apply(p.x, tokens, lists.inverse, False)
        y2 = self.activation(torch._grouped_mm(rows, self.w1, offs=ends))
        y3 = _Rows.apply(torch._grouped_mm(y2, self.w2, offs=ends), tokens, lists.inverse, True)
        return y3, *torch.autograd.grad(y3, (p.x, self.w1, self.w2), p.dy3)

    def products(self, top_k: int) -> Calls:
        """The six grouped products alone, rows already in cluster order."""
        p, lists = self.p, self.p.lists(top_k)
        tokens, ends = self.rows_of(lists)
        x, dy3 = _take(p.x.detach(), tokens), _take(p.dy3, tokens)
        return _six(partial(torch._grouped_mm, offs=ends), x, self.w1.detach(), self.w2.detach(), dy3)


def gather_products(p: RoutedFFN, v: int) -> Calls:
    """V:N:M products that fetch single rows of W2, by M, checked; and cuBLAS's with all of them."""
    tokens, d_ff = len(p.x), len(p.w2)
    w2 = p.w2.detach()
    g = torch.Generator("cuda").manual_seed(1)
    y = torch.randn(tokens, d_ff, generator=g, device="cuda").bfloat16()
    calls: Calls = {"dense": lambda: y @ w2}
    for m in (16, 32, 64):
        order = torch.rand(-(-tokens // v), d_ff // m, m, generator=g, device="cuda").argsort(2)[..., :4]
        first = torch.arange(0, d_ff, m, device="cuda")[:, None]
        columns = (order.sort(2).values + first).flatten(1).int()
        values = y[:, : 4 * d_ff // m].contiguous()
        ours = venom_gather_matmul(values[: 8 * v], columns[:8], w2, v)
        reference = venom_gather_matmul_reference(values[: 8 * v].float(), columns[:8], w2.float(), v)
        if not relative_error(ours, reference) <= TOLERANCE:
            raise AssertionError(f"the gather product with V = {v}, M = {m} differs from its reference")
        calls[f"4 of {m}"] = lambda a=values, c=columns: venom_gather_matmul(a, c, w2, v)
    return calls


def _medians(found: dict[Any, timing.Spread]) -> dict[Any, float]:
    return {name: times["ms"] for name, times in found.items()}


def speedups(shape: dict[str, Any]) -> pd.DataFrame:
    """One row a top-k or peer: times as fast as dense, of the products together, each, and the FFN."""
    times = pd.DataFrame(shape["products"]).loc[list(PRODUCTS)]
    frame = pd.DataFrame({"products": times.sum(), **times.T})
    for name in ("ffn", "ffn_sustained", "ffn_eager"):
        frame[name] = pd.Series(shape[name])
    return (frame.loc["dense"] / frame).drop(index="dense")


def table(record: records.Record) -> str:
    """The ratios and the times as plain text."""
    c = record.config
    lines = [f"{c['tokens']} tokens, top-k of {c['clusters']} clusters, {c['dtype']}"]
    for s in record.results["shapes"]:
        tables = {
            "times as fast as dense": speedups(s),
            "ms of the FFN": pd.DataFrame(s["ffn"], ["ms"]),
            "peak GiB": pd.DataFrame(s["peak_bytes"], ["GiB"]) / 2**30,
            "ms of the products and passes": pd.DataFrame(s["products"]),
            "ms of products that gather rows, by V": pd.DataFrame(s["gather"]),
        }
        for name, frame in tables.items():
            text = frame.to_string(float_format="{:.3f}".format, na_rep="")
            lines.append(f"\nd_model {s['d_model']}, d_ff {s['d_ff']}: {name}\n{text}")
    return "\n".join(lines)
