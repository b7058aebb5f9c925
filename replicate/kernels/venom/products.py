"""Products 1, 2, 3 and 5 in the selected blocks as a layer's formats have them: as they are, or in FP8.

In FP8 both operands are rounded first, see `quantise`. What a row of the result is multiplied by, the scales
of its operands, goes into the kernels as a factor. So do gates, which formats in FP8 do not have. Results are
in the tokens' dtype.
"""

from __future__ import annotations

from torch import Tensor

from replicate.kernels.operands import Operands
from replicate.kernels.venom.down import venom_down
from replicate.kernels.venom.quantise import quantise_rows
from replicate.kernels.venom.token_lists import BlockLists
from replicate.kernels.venom.up import venom_up, venom_up_backward


def up(x: Tensor, weights: Operands, lists: BlockLists, gates: Tensor | None = None) -> Tensor:
    """y2 [R, W] of x [T, D]: product 1, squared ReLU and mask; `gates` [R] from `gate_factors`."""
    inner = weights.how.config.inner
    if not weights.how.config.fp8:
        return venom_up(x, weights.dense("w1"), lists, inner=inner, factor=gates)
    values, w1, factor = _by_tokens(x, weights, "w1", lists)
    return venom_up(values, w1, lists, inner=inner, transposed=True, factor=factor, dtype=x.dtype)


def up_backward(
    dy3: Tensor, weights: Operands, y2: Tensor, lists: BlockLists, gates: Tensor | None = None
) -> Tensor:
    """dy1 [R, W] of dy3 [T, D]: product 3 and the derivative; `gates` as `up` had them."""
    if not weights.how.config.fp8:
        return venom_up_backward(dy3, weights.dense("w2_t"), y2, lists, factor=gates)
    values, w2, factor = _by_tokens(dy3, weights, "w2_t", lists)
    return venom_up_backward(values, w2, y2, lists, factor=factor)


def down(y: Tensor, weights: Operands, name: str, lists: BlockLists) -> Tensor:
    """y3 or dx [T, D]: product 2, of y2 and weight "w2", or 5, of dy1 and "w1_t"."""
    if not weights.how.config.fp8:
        return venom_down(y, weights.dense(name), lists, transposed=name == "w1_t")
    (values, scale), (w, of_weight) = quantise_rows(y), weights.fp8(name)
    return venom_down(values, w, lists, transposed=True, factor=scale * of_weight, dtype=y.dtype)


def _by_tokens(t: Tensor, weights: Operands, name: str, lists: BlockLists) -> tuple[Tensor, Tensor, Tensor]:
    """t [T, D] and weight `name` in FP8, and the factor of each compact row."""
    (values, scale), (w, of_weight) = quantise_rows(t), weights.fp8(name)
    return values, w, (scale * of_weight)[lists.tokens.clamp(0, len(t) - 1)]
