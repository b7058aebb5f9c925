"""V:N:M with any columns: compression, and its product as a gather of single weight rows (section 2.3).

A block of V rows x M columns keeps 4 columns, the same for its V rows, and N of those 4 in each row. For the
block of rows b, the 4 K / M kept columns of all its column blocks in order are J_b; then

    values[r, i]  = y[r, J_b(r)[i]]          zero where the inner N of 4 drops it
    out[r]        = sum_i values[r, i] w[J_b(r)[i]] = y[r] w

Clusters of contiguous neurons (`venom_up`, `venom_down`) are the case in which J_b is a few runs, whose
rows can be fetched as tiles. Here each row of w is fetched by its index, which costs a third of the speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate.kernels.backend import check, on_its_device, tl, triton
from replicate.kernels.venom.common import check_operands, descriptor, fit_tile


def venom_compress(y: Tensor, v: int, m: int, n: int = 2) -> tuple[Tensor, Tensor]:
    """The V:N:M part of y by magnitude, in plain torch.

    Columns are chosen by magnitude summed over a block's rows, then n of 4 in each row, with ties to the
    lower index. The last block of rows may be shorter than v.

    Args:
        y: [T, F], F a multiple of m. v: rows of a block. m: columns of a block, at least 4. n: 1 to 4.

    Returns:
        values [T, 4 F / m] in y's dtype and columns [ceil(T / v), 4 F / m] int32, ascending.

    Raises:
        ValueError: v, m, n or the shape do not fit.
    """
    whole = y.dim() == 2 and m >= 4 and y.shape[1] % m == 0
    check(whole, f"y {tuple(y.shape)} has no whole blocks of m = {m} columns")
    check(v >= 1 and 1 <= n <= 4, f"v is {v}, n is {n}; choose v >= 1 and n from 1 to 4")
    n_tokens, d_ff = y.shape
    blocks = -(-n_tokens // v)
    padded = torch.nn.functional.pad(y, (0, 0, 0, blocks * v - n_tokens))
    weight = padded.abs().float().view(blocks, v, d_ff // m, m).sum(1)
    four = weight.argsort(dim=-1, descending=True, stable=True)[..., :4].sort(-1).values
    columns = (four + torch.arange(0, d_ff, m, device=y.device)[:, None]).flatten(1)
    values = padded.gather(1, columns.repeat_interleave(v, 0))[:n_tokens]
    groups = values.unflatten(1, (-1, 4))
    drop = groups.abs().argsort(dim=-1, descending=True, stable=True)[..., n:]
    return groups.scatter(-1, drop, 0.0).flatten(1), columns.int()


def venom_decompress(values: Tensor, columns: Tensor, v: int, d_ff: int) -> Tensor:
    """The matrix [T, d_ff] with the values at their columns and zero elsewhere.

    Args:
        values: [T, K] and columns: [ceil(T / v), K], from `venom_compress`. v: rows of a block.
    """
    index = columns.long().repeat_interleave(v, 0)[: len(values)]
    return values.new_zeros(len(values), d_ff).scatter(1, index, values)


def venom_gather_matmul_reference(values: Tensor, columns: Tensor, w: Tensor, v: int) -> Tensor:
    """[T, D] in torch."""
    return venom_decompress(values, columns, v, len(w)) @ w


@on_its_device
@triton.jit
def _venom_gather_kernel(
    values, columns, w, out, d_model, n_kept,
    V: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of V rows by N columns."""
    n_cols = tl.cdiv(d_model, N)
    block = tl.program_id(0) // n_cols
    col = (tl.program_id(0) % n_cols) * N
    cols = col + tl.arange(0, N)
    k = tl.arange(0, K)
    own = columns + block.to(tl.int64) * n_kept
    acc = tl.zeros((V, N), dtype=tl.float32)
    tl.assume(n_kept > 0)  # or ptxas waits for each tensor-core instruction before the next
    # A column index is loaded one step before the row it points to, or the pipeline stalls on it.
    index = tl.load(own + k, mask=k < n_kept, other=0)
    for k0 in range(0, n_kept, K):
        after = k0 + K + k
        next_index = tl.load(own + after, mask=after < n_kept, other=0)
        rows = w + index.to(tl.int64)[:, None] * d_model + cols[None, :]
        if EVEN:
            b = tl.load(rows)
        else:  # values past the last column are zero, and so must be what they multiply
            b = tl.load(rows, mask=(k0 + k < n_kept)[:, None] & (cols < d_model)[None, :], other=0.0)
        acc = tl.dot(values.load([block * V, k0]), b, acc, input_precision=PRECISION)
        index = next_index
    out.store([block * V, col], acc.to(out.dtype))


def venom_gather_matmul(values: Tensor, columns: Tensor, w: Tensor, v: int) -> Tensor:
    """Product of a V:N:M matrix with a dense one.

    Args:
        values: [T, K] and columns: [ceil(T / v), K] int32, from `venom_compress`; every column in 0 to F - 1.
        w: [F, D]. v: 16, 32, 64 or 128.

    Returns:
        [T, D] in w's dtype.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    check_operands(values=values, w=w)
    check(v in (16, 32, 64, 128), f"v is {v}; the kernel has blocks of 16, 32, 64 or 128 rows")
    (n_tokens, n_kept), d_model = values.shape, w.shape[1]
    want = (triton.cdiv(n_tokens, v), n_kept)
    right = columns.shape == want and columns.dtype == torch.int32
    check(right, f"columns must be {want} int32, got {tuple(columns.shape)} {columns.dtype}")
    out = w.new_empty(n_tokens, d_model)
    if out.numel() == 0:
        return out
    tile = fit_tile(w, d_model, n_kept)
    _venom_gather_kernel[(want[0] * triton.cdiv(d_model, tile.n),)](
        descriptor(values, v, tile.k), columns.contiguous(), w, descriptor(out, v, tile.n), d_model, n_kept,
        V=v, EVEN=n_kept % tile.k == 0 and d_model % tile.n == 0, **tile.options(w),
    )  # fmt: skip
    return out
