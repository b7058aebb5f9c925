"""Products with one 2:4 operand on sparse tensor cores, through cuSPARSELt, or dense where that is faster.

    matmul24(A, B) = A B,  matmul24(A, B, transpose=True) = (A B)^T = B^T A^T

A [R, K] is a Compressed24, 2:4 along K; B is [K, N]. A sparse *right* operand is a transposed product:
y1 = x S24(W1) is matmul24(S24(W1)^T, x.t(), transpose=True), with no copy of x or of the result. Which
algorithm runs is `plan24`'s choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate.kernels import backend as engines
from replicate.kernels.backend import check
from replicate.kernels.two_four.compressed24 import Compressed24, unpack24
from replicate.kernels.two_four.plan24 import Shape, plan_for, sparse_product


def matmul24_reference(
    sparse: Compressed24, dense: Tensor, transpose: bool = False, *, backend: str | None = "reference"
) -> Tensor:
    """A B [R, N], or its transpose [N, R], by a dense product of the operand, which `backend` unpacks."""
    a = unpack24(sparse, backend=backend)
    return dense.t() @ a.t() if transpose else a @ dense


def matmul24(
    sparse: Compressed24, dense: Tensor, *, transpose: bool = False, backend: str | None = None
) -> Tensor:
    """A B with A 2:4, or (A B)^T.

    Args:
        sparse: A [R, K].
        dense: B [K, N] of A's dtype; contiguous or the transpose of a contiguous matrix (else it is copied).
        transpose: return the contiguous transpose [N, R].
        backend: "auto" takes the faster of cuSPARSELt and cuBLAS, "cusparselt" always the former, "triton"
            and "reference" a dense product; see `replicate.kernels.backend`.

    Returns:
        [R, N] or [N, R], accumulated in float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check(dense.dim() == 2, f"the dense operand must be a matrix, got shape {tuple(dense.shape)}")
    rows, cols = sparse.shape
    check(dense.shape[0] == cols, f"A is {rows} x {cols}, B is {tuple(dense.shape)}: inner sizes differ")
    check(dense.dtype == sparse.buffer.dtype, f"A is {sparse.buffer.dtype}, B is {dense.dtype}; cast one")
    check(dense.device == sparse.buffer.device, f"A is on {sparse.buffer.device}, B on {dense.device}")
    engine = engines.select(dense.device, backend)
    if engine != "cusparselt" or dense.shape[1] == 0:
        return matmul24_reference(sparse, dense, transpose, backend=backend)
    forced = engines.requested(backend) == "cusparselt"
    return _matmul24_op(sparse.buffer, sparse.dense, dense, rows, cols, transpose, sparse.layout, forced)


@torch.library.custom_op("replicate::matmul24", mutates_args=())
def _matmul24_op(
    buffer: Tensor, full: Tensor | None, dense: Tensor, rows: int, cols: int, transpose: bool, layout: str,
    forced: bool,
) -> Tensor:  # fmt: skip
    operand, columns = _fit(dense)
    shape = Shape(len(buffer), operand.shape[1], cols, dense.dtype, operand.is_contiguous(), transpose)
    plan = plan_for(shape, dense.device)
    if not forced and plan.engine(unpacks=full is None) == "dense":
        sparse = Compressed24(buffer, rows, cols, layout, full)
        return matmul24_reference(sparse, dense, transpose, backend=None)
    if plan.algorithm is None:
        raise RuntimeError(f"no algorithm of cuSPARSELt is right for {shape.key}; use backend='auto'")
    out = sparse_product(buffer, operand, transpose, plan.algorithm)
    out = out[:columns, :rows] if transpose else out[:rows, :columns]
    return out.contiguous()


@_matmul24_op.register_fake
def _(buffer, full, dense, rows, cols, transpose, layout, forced):
    shape = (dense.shape[1], rows) if transpose else (rows, dense.shape[1])
    return dense.new_empty(shape)


def _fit(dense: Tensor) -> tuple[Tensor, int]:
    """B in a form the library reads, with columns padded to a multiple of 8, and the columns B has."""
    columns, pad = dense.shape[1], -dense.shape[1] % 8
    turned = dense.t().is_contiguous() and not dense.is_contiguous()
    out = dense.t() if turned else dense.contiguous()
    if pad:
        out = torch.nn.functional.pad(out, (0, 0, 0, pad) if turned else (0, pad))
    if out.data_ptr() % 16:
        out = out.clone()
    return out.t() if turned else out, columns
