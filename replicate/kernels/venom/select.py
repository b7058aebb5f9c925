"""Compact activations from full ones: the step between the 2:4 and the Venom products of algorithms 1 and 2.

There products 1 and 3 give all of y1 and dy2 [T, F]; the rows r of cluster e, token t(r), take their part:

    forward     y2[r]  = S(relu(y1[t(r), C_e])^2)          "MoEToVenom" and equation 2
    backward    dy1[r] = 2 dy2[t(r), C_e] sqrt(y2[r])      equation 6 under the forward's mask

S and the compact layout are those of `venom_up`; padding rows are zero.
"""

from __future__ import annotations

from torch import Tensor

from replicate.kernels.backend import on_its_device, tl, triton
from replicate.kernels.venom.common import check_operands, check_shape, cluster_width, relu2
from replicate.kernels.venom.token_lists import BlockLists
from replicate.sparsity import prune24


def venom_select_reference(
    full: Tensor, lists: BlockLists, y2: Tensor | None = None, inner: bool = True
) -> Tensor:
    """[R, W] in torch: y2 from y1 with 2 of 4 if `inner`, or dy1 from dy2 and y2; other rows are zero."""
    n = len(lists.starts)
    out = full.new_zeros(len(lists.tokens) if y2 is None else len(y2), full.shape[1] // n)
    for e, rows, tokens in lists.runs():
        part = full[tokens].chunk(n, 1)[e]
        out[rows] = part.relu().square() if y2 is None else 2 * part * y2[rows].sqrt()
    return prune24(out) if inner and y2 is None else out


@on_its_device
@triton.jit
def _venom_select_kernel(
    full, y2, out, tokens, block_cluster, d_ff, width,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, BACKWARD: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a block by N neurons."""
    cluster = tl.load(block_cluster + tl.program_id(0) * ROWS // BLOCK)
    if cluster < 0:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * N + tl.arange(0, N)
    token = tl.load(tokens + row).to(tl.int64)
    mask = (token >= 0)[:, None] & (col < width)[None, :]
    value = tl.load(full + token[:, None] * d_ff + (cluster * width + col)[None, :], mask=mask, other=0.0)
    value = value.to(tl.float32)
    own = row.to(tl.int64)[:, None] * width + col[None, :]
    inside = (col < width)[None, :]
    if BACKWARD:
        value = 2 * value * tl.sqrt(tl.load(y2 + own, mask=inside, other=0.0).to(tl.float32))
    else:
        value = relu2(value, INNER)
    tl.store(out + own, value.to(out.dtype.element_ty), mask=inside)


def venom_select(full: Tensor, lists: BlockLists, y2: Tensor | None = None, *, inner: bool = True) -> Tensor:
    """Compact y2 from y1, or, given y2, compact dy1 from dy2.

    Args:
        full: [T, F], y1 or dy2. lists: from `token_lists`. y2: [R, F / n] of the forward pass.
        inner: keep 2 of each 4 adjacent neurons (forward; the backward inherits it).

    Returns:
        [R, F / n] in full's dtype; rows past the last used block are not written.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    check_operands(full=full, **({} if y2 is None else {"y2": y2}))
    rows, width = len(lists.tokens), cluster_width(full.shape[1], len(lists.starts))
    if y2 is not None:
        check_shape("y2", y2, rows, width)
    out = full.new_empty(rows, width)
    n = min(512, max(16, triton.next_power_of_2(width)))
    part = min(lists.block, 16) if full.is_cuda else lists.block
    if out.numel():
        _venom_select_kernel[(rows // part, triton.cdiv(width, n))](
            full, full if y2 is None else y2, out, lists.tokens, lists.block_cluster, full.shape[1], width,
            BLOCK=lists.block, ROWS=part, N=n, BACKWARD=y2 is not None, INNER=inner, num_warps=8,
        )  # fmt: skip
    return out
