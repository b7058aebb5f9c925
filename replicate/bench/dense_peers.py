"""The dense squared-ReLU layer by hand: the baseline of `bench ffn` where it is faster than torch.compile's.

    y1 = x W1          y2 = relu(y1)^2           y3 = y2 W2
    dy2 = dy3 W2^T     dy1 = 2 dy2 relu(y1)      dx = dy1 W1^T     dW1 = x^T dy1     dW2 = y2^T dy3

Of the [T, F] matrices the backward pass reads y2 alone, as relu(y1) = sqrt(y2). One pass over memory turns y1
into y2, another dy2 into dy1, each in its own memory, and cuBLAS makes the products. As in the dense phase of
`SparseFFN`, float32 weights are cast to x's dtype once a step; their gradients are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from replicate.kernels import backend as engines
from replicate.kernels.backend import check, on_its_device, tl, triton
from replicate.kernels.two_four.wgrad24 import product_into

BLOCK, WARPS = 2048, 4  # elements and warps of a program


def relu2_reference(y1: Tensor) -> Tensor:
    """y2 = relu(y1)^2, computed in float32, in y1's dtype."""
    return F.relu(y1).float().square().to(y1.dtype)


def relu2_backward_reference(dy2: Tensor, y2: Tensor) -> Tensor:
    """dy1 = 2 dy2 sqrt(y2), computed in float32, in dy2's dtype."""
    return (2 * dy2.float() * y2.float().sqrt()).to(dy2.dtype)


@on_its_device
@triton.jit
def _relu2_kernel(y, size, BLOCK: tl.constexpr):
    """y1 becomes y2."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(y + at, mask=at < size, other=0.0).to(tl.float32)
    value = tl.where(value < 0, 0.0, value)  # NaN stays
    tl.store(y + at, (value * value).to(y.dtype.element_ty), mask=at < size)


@on_its_device
@triton.jit
def _relu2_backward_kernel(dy, y2, size, BLOCK: tl.constexpr):
    """dy2 becomes dy1."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(dy + at, mask=at < size, other=0.0).to(tl.float32)
    root = tl.sqrt(tl.load(y2 + at, mask=at < size, other=0.0).to(tl.float32))
    tl.store(dy + at, (2 * value * root).to(dy.dtype.element_ty), mask=at < size)


def relu2_(y1: Tensor, *, backend: str | None = None) -> Tensor:
    """y2 in the memory of y1, which must be contiguous (ValueError if not)."""
    check(y1.is_contiguous(), f"y1 is overwritten, so it must be contiguous; strides {y1.stride()}")
    if engines.select(y1.device, backend, y1.dtype) == "reference":
        return y1.copy_(relu2_reference(y1))
    if y1.numel():
        _relu2_kernel[_grid(y1)](y1, y1.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return y1


def relu2_backward_(dy2: Tensor, y2: Tensor, *, backend: str | None = None) -> Tensor:
    """dy1 in the memory of dy2. Raises ValueError unless both are contiguous and of one shape and dtype."""
    same = dy2.shape == y2.shape and dy2.dtype == y2.dtype
    check(same, f"dy2 is {dy2.dtype} {tuple(dy2.shape)}, y2 is {y2.dtype} {tuple(y2.shape)}")
    check(dy2.is_contiguous() and y2.is_contiguous(), "dy2 and y2 must be contiguous")
    if engines.select(dy2.device, backend, dy2.dtype) == "reference":
        return dy2.copy_(relu2_backward_reference(dy2, y2))
    if dy2.numel():
        _relu2_backward_kernel[_grid(dy2)](dy2, y2, dy2.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return dy2


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), BLOCK),)


class _DenseByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, w2: Tensor, backend: str | None) -> Tensor:
        ctx.backend, ctx.dtypes = backend, (w1.dtype, w2.dtype)
        w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
        y2 = relu2_(x @ w1, backend=backend)
        ctx.save_for_backward(x)
        ctx.kept = w1, w2, y2  # autograd would hold what it saved to the end of the backward pass
        return y2 @ w2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy3: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (w1, w2, y2), ctx.kept = ctx.saved_tensors, ctx.kept, None
        (d_model, d_ff), dy3 = w1.shape, dy3.to(x.dtype).contiguous()
        dy2 = dy3 @ w2.t()
        del w2
        dw2 = product_into(x.new_empty(d_ff, d_model, dtype=ctx.dtypes[1]), y2.t(), dy3)
        dy1 = relu2_backward_(dy2, y2, backend=ctx.backend)
        del dy2, y2
        dx = dy1 @ w1.t()
        del w1
        dw1 = product_into(x.new_empty(d_model, d_ff, dtype=ctx.dtypes[0]), x.t(), dy1)
        return dx, dw1, dw2, None


def dense_by_hand(x: Tensor, w1: Tensor, w2: Tensor, *, backend: str | None = None) -> Tensor:
    """y3 [T, D] of the dense layer, in x's dtype, differentiable once in x, W1 and W2.

    Args:
        x: [T, D]. w1: [D, F]. w2: [F, D]; both in x's dtype or float32, which their gradients have too.
        backend: of the passes between products; see `replicate.kernels.backend`.

    Raises ValueError if shapes or dtypes do not fit.
    """
    shapes = tuple(map(tuple, (x.shape, w1.shape, w2.shape)))
    fits = x.dim() == w1.dim() == 2 and x.shape[1] == w1.shape[0] and w2.shape == w1.shape[::-1]
    check(fits, "x, W1 and W2 have shapes {}, {} and {}; they must be [T, D], [D, F], [F, D]".format(*shapes))
    known = {w1.dtype, w2.dtype} <= {x.dtype, torch.float32}
    check(known, f"weights are {w1.dtype} and {w2.dtype}; choose x's {x.dtype} or float32")
    return _DenseByHand.apply(x, w1, w2, backend)
