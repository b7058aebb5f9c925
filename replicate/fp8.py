"""FP8 beside the method: products 1, 2, 3 and 5 read both operands rounded to 8 bits, 3 of them mantissa.

    s = max |t| / 448, one a row of x, y2, dy3 and dy1 (of Venom's y2 and dy1 one a token and cluster), one a
    matrix of W1 and W2
    t8 = E4M3(t / s)        a b = (a8 b8) s_a s_b, summed and scaled in float32

448 is the largest number of E4M3 (2209.05433). Gradients pass the rounding straight through, and weight
gradients (products 4 and 6) read what was not rounded. `SparsityConfig.fp8` asks for it: `ffn` then computes
its dense phase by `dense_ffn`, and the sparse one with operands that are `rounded`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from replicate.config import BACKENDS
from replicate.settings.checks import one_of
from replicate.system.once import once
from replicate.system.tracing import constant

FORMAT = torch.float8_e4m3fn
LARGEST = 448.0
UNIT = 16  # FP8 tensor cores read matrices in multiples of it


def quantise(t: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    """t [R, C] in E4M3, [R, C], and the float32 scale it was divided by: [R, 1] if by rows, else [1, 1].

    Zeros have scale 1; so has a row, or matrix, below 5e-36, whose scale would be no normal number: it is
    rounded to zero. A NaN or an infinity makes its row, or matrix, NaN when scaled back.
    """
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    scale = scale_of(wide.abs().amax(-1 if rows else (0, 1), keepdim=True))
    return (wide / scale).to(FORMAT), scale


def scale_of(largest: Tensor) -> Tensor:
    """The float32 scale for numbers of at most these magnitudes, see `quantise`."""
    scale = largest.float() / LARGEST
    return scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 1)


def rounded(t: Tensor, rows: bool) -> Tensor:
    """t [R, C] as a product in FP8 reads it, in t's dtype: the values of `quantise` times their scales."""
    values, scale = quantise(t, rows)
    return (values.to(torch.promote_types(t.dtype, torch.float32)) * scale).to(t.dtype)


def product(a: Tensor, w: Tensor, *, groups: int = 1, on_cores: bool = False) -> Tensor:
    """a [T, K] times a weight w [K, N], both rounded, in a's dtype.

    Args:
        groups: parts of a row of a, each of which has a scale of its own; on tensor cores 1.
        on_cores: multiply on FP8 tensor cores, see `why_not`; else `rounded` operands in a's dtype.
    """
    if not on_cores:
        parts = rounded(a.reshape(len(a) * groups, a.shape[1] // groups), rows=True)
        return parts.view(a.shape) @ rounded(w, rows=False).to(a.dtype)
    (a, of_rows), (w, of_matrix) = quantise(a, rows=True), quantise(w, rows=False)
    return multiply(a, of_rows, w.t().contiguous(), of_matrix, torch.bfloat16)


def multiply(a: Tensor, of_rows: Tensor, w: Tensor, of_matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """a [T, K] w^T [T, N] of operands in FP8, both contiguous along the sum, as tensor cores read them.

    Args:
        of_rows: [T, 1], the scales of a. w: [N, K]. of_matrix: its one scale.
        dtype: of the result; bfloat16 by those cores, any other without them.
    """
    of_columns = of_matrix.expand(1, len(w)).contiguous()
    if dtype == torch.bfloat16:
        return torch._scaled_mm(a, w.t(), of_rows, of_columns, out_dtype=dtype, use_fast_accum=True)
    return (a.float() @ w.float().t() * of_rows * of_columns).to(dtype)


@constant
def why_not(device: torch.device, dtype: torch.dtype, d_model: int, d_ff: int) -> str:
    """What keeps FP8 tensor cores from the dense layer [D, F], in a few words; empty if nothing does."""
    if reason := too_old(device):
        return reason
    if device.type != "cuda":
        return f"{device.type} has no FP8 tensor cores"
    if dtype != torch.bfloat16:
        return f"products in FP8 come out in bfloat16, not {dtype}"
    if d_model % UNIT or d_ff % UNIT:
        return f"d_model {d_model} and d_ff {d_ff} are no multiples of {UNIT}"
    return ""


@constant
def too_old(device: torch.device) -> str:
    """Why this GPU has no FP8 tensor cores; empty if it has, and elsewhere."""
    if device.type != "cuda":
        return ""
    if torch.version.hip:
        return "FP8 is that of NVIDIA's GPUs"
    found = torch.cuda.get_device_capability(device)
    return "" if found >= (8, 9) else "FP8 needs compute capability 8.9, not {}.{}".format(*found)


def dense_ffn(x: Tensor, w1: Tensor, w2: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """y3 [..., D] of the dense layer in FP8, and y2 [..., F], which has no gradient; both in x's dtype.

    Differentiable once in x, W1 and W2. Of activations the backward pass keeps x and relu(y1).

    Args:
        x: [..., D]. w1: [D, F]. w2: [F, D]; their gradients have the weights' dtype.
        backend: "reference" multiplies `rounded` operands, by which FP8 tensor cores are checked; else these
            where there are any. None and "auto" leave it to REPLICATE_BACKEND.
    """
    asked = backend if backend not in (None, "auto") else os.environ.get("REPLICATE_BACKEND")
    one_of("backend" if asked == backend else "REPLICATE_BACKEND", asked or "auto", BACKENDS)
    on_cores = asked != "reference" and not why_not(x.device, x.dtype, *w1.shape)
    y3, _, y2 = _DenseProducts.apply(x.reshape(-1, x.shape[-1]), w1, w2, on_cores)
    return y3.view(x.shape), y2.view(*x.shape[:-1], y2.shape[-1])


class _DenseProducts(torch.autograd.Function):
    """The six products of the dense layer, four of them in FP8."""

    @staticmethod
    def forward(x: Tensor, w1: Tensor, w2: Tensor, on_cores: bool) -> tuple[Tensor, Tensor, Tensor]:
        relu_y1 = F.relu(product(x, w1, on_cores=on_cores))  # product 1
        y2 = relu_y1.square()
        return product(y2, w2, on_cores=on_cores), relu_y1, y2  # product 2

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, w1, w2, ctx.on_cores = inputs
        _, relu_y1, y2 = output
        ctx.mark_non_differentiable(relu_y1, y2)
        ctx.save_for_backward(x, relu_y1, w1, w2)

    @staticmethod
    def backward(ctx, dy3: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return *once(_dense_gradients, dy3, *ctx.saved_tensors, ctx.on_cores), None


def _dense_gradients(
    dy3: Tensor, x: Tensor, relu_y1: Tensor, w1: Tensor, w2: Tensor, on_cores: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dW1, dW2."""
    dy3 = dy3.to(x.dtype)
    dy1 = 2 * product(dy3, w2.T, on_cores=on_cores) * relu_y1  # product 3
    dw2 = relu_y1.square().T @ dy3  # product 4
    dx = product(dy1, w1.T, on_cores=on_cores)  # product 5
    dw1 = x.T @ dy1  # product 6
    return dx, dw1.to(w1.dtype), dw2.to(w2.dtype)
