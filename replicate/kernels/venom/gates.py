"""Gates of a mixture of experts in the compact products: what a chosen cluster adds counts g times.

A gate goes into the squared ReLU, so that the products stay as they are. Row r has gate g_r, f_r its root:

    kept[r] = g_r relu(y1[r])^2 = relu(f_r y1[r])^2                       `venom_up` with factor f
    dy1[r]  = 2 g_r dkept[r] relu(y1[r]) = 2 f_r dkept[r] sqrt(kept[r])   `venom_up_backward`, the same f
    dg_r    = sum over columns of dkept[r] relu(y1[r])^2 = sum of dy1[r] sqrt(kept[r]) / (2 f_r^3)
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate.kernels.backend import on_its_device, tl, triton
from replicate.kernels.venom.common import check_factor, check_operands, check_shape
from replicate.kernels.venom.token_lists import BlockLists


def gate_factors(gates: Tensor, lists: BlockLists) -> Tensor:
    """f [R] float32 from the gates [T, k] of each token's choices, every one in a list; other rows are 0.

    Raises:
        ValueError: the gates are not those of the lists' choices.
    """
    check_shape("gates", gates, *lists.inverse.shape)
    factor = gates.new_zeros(len(lists.tokens), dtype=torch.float32)
    return factor.scatter_(0, lists.inverse.flatten().long(), gates.float().sqrt().flatten())


def gate_gradient_reference(dy1: Tensor, kept: Tensor, factor: Tensor, lists: BlockLists) -> Tensor:
    """dg [T, k] float32 in torch."""
    rows = lists.inverse.long()
    total = (dy1.float()[rows] * kept.float()[rows].sqrt()).sum(2)
    return torch.where(factor[rows] == 0, 0.0, total / (2 * factor[rows] ** 3))


@on_its_device
@triton.jit
def _gate_gradient_kernel(
    dy1, kept, factor, inverse, out, n_choices, width, CHOICES: tl.constexpr, N: tl.constexpr
):
    """CHOICES choices; no row is read that is not a choice's."""
    i = tl.program_id(0) * CHOICES + tl.arange(0, CHOICES)
    row = tl.load(inverse + i, mask=i < n_choices, other=-1).to(tl.int64)
    total = tl.zeros((CHOICES,), dtype=tl.float32)
    for col0 in range(0, width, N):
        col = col0 + tl.arange(0, N)
        mask = (row >= 0)[:, None] & (col < width)[None, :]
        at = row[:, None] * width + col[None, :]
        slope = tl.load(dy1 + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(kept + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(slope * tl.sqrt(value), axis=1)
    f = tl.load(factor + row, mask=row >= 0, other=0.0)
    zero = f == 0  # a gate that has underflowed has no slope either
    f = tl.where(zero, 1.0, f)
    tl.store(out + i, tl.where(zero, 0.0, total / (2 * f * f * f)), mask=i < n_choices)


def gate_gradient(dy1: Tensor, kept: Tensor, factor: Tensor, lists: BlockLists) -> Tensor:
    """Gradient of the gates, from what the backward pass has already.

    Args:
        dy1: [R, F / n] from `venom_up_backward`. kept: [R, F / n] from `venom_up`. factor: from
            `gate_factors`, as both were given.

    Returns:
        dg [T, k] float32; 0 where a gate is 0 or a choice in no list.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    check_operands(dy1=dy1, kept=kept)
    check_shape("dy1", dy1, len(lists.tokens), dy1.shape[1])
    check_shape("kept", kept, *dy1.shape)
    check_factor(factor, dy1)
    out = dy1.new_empty(lists.inverse.shape, dtype=torch.float32)
    n = min(512, triton.next_power_of_2(dy1.shape[1]))
    choices = 8192 // n if dy1.is_cuda else 256
    if out.numel():
        _gate_gradient_kernel[(triton.cdiv(out.numel(), choices),)](
            dy1, kept, factor, lists.inverse, out, out.numel(), dy1.shape[1], CHOICES=choices, N=n
        )
    return out
