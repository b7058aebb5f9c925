"""A few tokens times a weight by rows: product 1 in the chosen clusters, and W2^T's rows in product 2.

    y1[t, f] = x[t] . W1^T[f]      y2 = relu(y1)^2      for the neurons f of the clusters that t uses

A program reads some rows of one cluster once, for all tokens that use it; what the other tokens would read is
masked off. One token is multiplied and summed without tensor cores, more are padded to a tile of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicate.kernels.backend import check, on_its_device, tl, triton
from replicate.kernels.decode.route import Choice, chosen_reference, slot_of
from replicate.kernels.decode.rows import GROUPS, Rows, load_kept, load_rows, of_four, rows_reference
from replicate.kernels.venom.common import Tile, check_operands, dot_precision, relu2

# Tuning: rows (n) and columns (k) of a program's tile by tokens: 1, up to MOST_FEW, more; for 16 bits.
ONE, FEW, MANY = Tile(16, 512, 4, 4), Tile(64, 256, 4, 4), Tile(64, 128, 4, 4)
MOST_FEW, MOST_TOKENS = 16, 64


def decode_up_reference(x: Tensor, rows: Rows, choice: Choice | None = None, relu2: bool = True) -> Tensor:
    """[T, R] in torch; zero in clusters that a token does not use."""
    y = x @ rows_reference(rows).T
    y = y.relu().square() if relu2 else y
    if choice is None:
        return y
    use = chosen_reference(choice)
    return (y.unflatten(1, (use.shape[1], -1)) * use[..., None]).flatten(1)


@on_its_device
@triton.jit
def _decode_up_kernel(
    x, values, positions, scores, out, n_tokens, n_rows, n_cols, width, n_clusters, stride,
    TOKENS: tl.constexpr, TOP_K: tl.constexpr, CLUSTERS: tl.constexpr, BY_CHOICE: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, TWO_FOUR: tl.constexpr, RELU2: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """N rows of the cluster of a slot."""
    token = tl.arange(0, TOKENS)
    cluster, use = slot_of(
        scores, tl.program_id(1), token, n_tokens, n_clusters, stride, TOP_K, CLUSTERS, BY_CHOICE
    )
    if tl.max(use.to(tl.int32), axis=0) == 0:
        return
    own = tl.program_id(0) * N + tl.arange(0, N)
    inside = own < width
    row = cluster * width + own
    if TOKENS == 1:
        if TWO_FOUR:
            acc = tl.zeros((N, K // 4), dtype=tl.float32)
            fours = x.to(tl.pointer_type(tl.int64))  # x has 16 bits: a group's four columns are one int64
            for c0 in tl.range(0, n_cols, K, num_stages=STAGES):
                first, second, p, q = load_kept(values, positions, row, inside, c0, n_cols, K)
                group = c0 // 4 + tl.arange(0, K // 4)
                four = tl.load(fours + group, mask=group < n_cols // 4, other=0)[None, :]
                at_p = of_four(four, p).to(x.dtype.element_ty, bitcast=True)
                at_q = of_four(four, q).to(x.dtype.element_ty, bitcast=True)
                acc += first.to(tl.float32) * at_p.to(tl.float32)
                acc += second.to(tl.float32) * at_q.to(tl.float32)
        else:
            acc = tl.zeros((N, K), dtype=tl.float32)
            for c0 in tl.range(0, n_cols, K, num_stages=STAGES):
                c = c0 + tl.arange(0, K)
                w = load_rows(values, positions, row, inside, c0, n_cols, K, False)
                acc += w.to(tl.float32) * tl.load(x + c, mask=c < n_cols, other=0.0).to(tl.float32)[None, :]
        y = tl.sum(acc, axis=1)[None, :]
    else:
        turned = tl.zeros((N, TOKENS), dtype=tl.float32)  # weights first: they are made in registers
        for c0 in tl.range(0, n_cols, K, num_stages=STAGES):
            c = c0 + tl.arange(0, K)
            mask = use[:, None] & (c < n_cols)[None, :]
            a = tl.load(x + token.to(tl.int64)[:, None] * n_cols + c[None, :], mask=mask, other=0.0)
            w = load_rows(values, positions, row, inside, c0, n_cols, K, TWO_FOUR)
            turned = tl.dot(w, tl.trans(a), turned, input_precision=PRECISION)
        y = tl.trans(turned)
    if RELU2:
        y = relu2(y, False)
    at = out + token.to(tl.int64)[:, None] * n_rows + row[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=use[:, None] & inside[None, :])


def decode_up(x: Tensor, rows: Rows, choice: Choice | None = None, *, relu2: bool = True) -> Tensor:
    """x [T, C] times the rows [R, C] of a weight, in the clusters that each token uses.

    Args:
        x: [T, C], T at most MOST_TOKENS. rows: R in cluster order, in x's dtype.
        choice: of clusters; None takes all rows. relu2: with squared ReLU.

    Returns:
        [T, R] in x's dtype; entries of clusters that a token does not use are not written. Of 2:4 rows a
        single token skips what was pruned: an infinite or NaN x there does not show.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    n_rows, n_cols = check_decode(x, rows, choice)
    check(x.shape[1] == n_cols, f"x {tuple(x.shape)} does not fit rows of {n_cols} columns")
    if rows.two_of_four and len(x) == 1 and x.data_ptr() % 8:  # it is read 8 bytes at a time
        x = x.clone()
    tile, width, out = pick(x, ONE, FEW, MANY), n_rows // of_clusters(choice), x.new_empty(len(x), n_rows)
    slots = choice.slots if choice else 1
    if len(x) <= MOST_FEW and slots * width < 256 * tile.n:  # else too few programs
        tile = Tile(tile.n // 2, tile.k, tile.warps, tile.stages)
    _decode_up_kernel[(triton.cdiv(width, tile.n), slots)](
        x, rows.values, x if rows.positions is None else rows.positions, choice.scores if choice else x, out,
        len(x), n_rows, n_cols, width, of_clusters(choice), choice.scores.stride(0) if choice else 0,
        N=tile.n, K=tile.k, TWO_FOUR=rows.two_of_four, RELU2=relu2, PRECISION=dot_precision(x.dtype),
        STAGES=tile.stages, num_warps=tile.warps, **slot_options(x, choice),
    )  # fmt: skip
    return out


def of_clusters(choice: Choice | None) -> int:
    """Clusters that a weight is divided into."""
    return choice.scores.shape[1] if choice else 1


def slot_options(x: Tensor, choice: Choice | None) -> dict[str, int | bool]:
    """What `slot_of` is compiled for."""
    tokens = 1 if len(x) == 1 else max(16, triton.next_power_of_2(len(x)))
    if choice is None:
        return {"TOKENS": tokens, "TOP_K": 0, "CLUSTERS": 1, "BY_CHOICE": False}
    clusters = triton.next_power_of_2(of_clusters(choice))
    return {"TOKENS": tokens, "TOP_K": choice.top_k, "CLUSTERS": clusters, "BY_CHOICE": choice.by_choice}


def pick(x: Tensor, one: Tile, few: Tile, many: Tile) -> Tile:
    """The tile for so many tokens; half as deep in float32."""
    tile = one if len(x) == 1 else few if len(x) <= MOST_FEW else many
    return tile if x.dtype.itemsize == 2 else Tile(tile.n, tile.k // 2, tile.warps, tile.stages)


def check_decode(x: Tensor, rows: Rows, choice: Choice | None) -> tuple[int, int]:
    """Rows and columns of a weight; ValueError unless it, the tokens and the choice fit each other."""
    check_operands(x=x, rows=rows.values.flatten(1))
    (n_rows, n_cols), n = rows.size, of_clusters(choice)
    check(1 <= len(x) <= MOST_TOKENS, f"{len(x)} tokens; decoding takes 1 to {MOST_TOKENS}")
    if rows.positions is not None:
        fits = rows.positions.dtype == torch.int32 and rows.positions.is_contiguous()
        words = [n_rows, triton.cdiv(n_cols, 4 * GROUPS)]
        check(fits and list(rows.positions.shape) == words, f"positions must be int32 {words}, contiguous")
    check(n_rows % n == 0, f"{n_rows} rows do not divide into {n} clusters")
    if choice is not None:
        fits = len(choice.scores) == len(x) and choice.scores.dtype == torch.float32
        check(fits and choice.scores.stride(1) == 1, f"scores must be float32 [{len(x)}, n], rows contiguous")
        check(1 <= choice.top_k <= n, f"top_k is {choice.top_k}; choose 1 to the number of clusters, {n}")
    return n_rows, n_cols
