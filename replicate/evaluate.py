"""How good a model is, and what its layers do: held-out loss, statistics of the FFNs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from replicate.config import TrainConfig
from replicate.data import TokenData
from replicate.gpt import GPT
from replicate.sparsity import flip_rate
from replicate.training import parallel
from replicate.training.sharded import whole

STATS_TOKENS = 4096


@torch.no_grad()
def valid_loss(
    model: GPT, data: TokenData, n: int = 16, batch_size: int = 8, *, forward: Callable | None = None,
    group: parallel.Alone = parallel.ALONE,
) -> float:  # fmt: skip
    """Mean cross-entropy in nats a token over `n` fixed held-out batches, in the model's present phase.

    `forward` stands in for calling the model, such as a compiled form of it. Of a `group` each process takes
    its rows of every batch.
    """
    forward = forward or model
    with evaluating(model):
        device = model.embed.weight.device
        pairs = data.valid_batches(n, batch_size)
        losses = []
        for x, y in pairs:
            mine = group.rows(len(x))
            rows = mine if mine.start < mine.stop else slice(0, 1)  # all take part, if only to be counted out
            loss = forward(x[rows].to(device), y[rows].to(device))[1].double()
            losses.append(loss * x[mine].numel())
    return group.total([float(torch.stack(losses).sum())])[0] / sum(x.numel() for x, _ in pairs)


@torch.no_grad()
def layer_stats(model: GPT, idx: Tensor) -> list[dict[str, float]]:
    """Statistics of every layer for the batch `idx` [B, S], in the model's present phase.

    Each layer gives output_max, the largest magnitude in the residual stream after it, w1_max and
    w2_max, and what `SparseFFN.stats` adds: y2_sparsity, kept_sparsity, kept_energy, router_load.
    """
    peaks: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda *call: peaks.append(_largest(call[2]))) for block in model.blocks
    ]
    try:
        with evaluating(model):
            for ffn in model.ffns():
                ffn.collect = True
            model(idx.to(model.embed.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
        for ffn in model.ffns():
            ffn.collect = False
    rows = []
    for block, peak in zip(model.blocks, peaks):
        row = {"output_max": peak.item()}
        row |= {f"{name}_max": whole(getattr(block.ffn, name)).abs().max().item() for name in ("w1", "w2")}
        rows.append(row | (block.ffn.stats() if hasattr(block.ffn, "stats") else {}))
    return rows


def shared_stats(model: GPT, idx: Tensor, rows: int, group: parallel.Alone) -> list[dict[str, float]]:
    """`layer_stats` of the first rows of `idx` [B, S], which are the same in all processes of a group.

    Of several processes, where clusters are routed, router_load_slowest is added: router_load of each
    process's own tokens, the largest of all, for which the others wait.
    """
    layers = layer_stats(model, idx[:rows])
    if group.world > 1 and all("router_load" in layer for layer in layers):
        own = layer_stats(model, group.share((idx,))[0][:rows])
        for layer, load in zip(layers, group.most([layer["router_load"] for layer in own])):
            layer["router_load_slowest"] = load
    return layers


@torch.no_grad()
def ffn_inputs(model: nn.Module, idx: Tensor, ffns: Sequence[nn.Module] | None = None) -> list[Tensor | None]:
    """What each layer's FFN, or each of `ffns`, reads for the batch `idx`: [B, S, D], None if not run."""
    ffns = [block.ffn for block in model.blocks] if ffns is None else ffns
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [ffn.register_forward_pre_hook(lambda ffn, x: inputs.update({ffn: x[0]})) for ffn in ffns]
    try:
        with evaluating(model):
            model(idx.to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return [inputs.get(ffn) for ffn in ffns]


def stats_rows(config: TrainConfig) -> int:
    """Sequences of a batch that a statistic reads, whole blocks of V rows where these are routed.

    At most half of them and about STATS_TOKENS tokens: statistics are to cost next to nothing.
    """
    seq_len, sparsity = config.model.seq_len, config.model.sparsity
    unit = sparsity.v if sparsity.routing == "oracle-block" else 4 if sparsity.selection == "tile" else 1
    for rows in range(max(1, min(STATS_TOKENS // seq_len, config.batch_size // 2)), config.batch_size):
        if rows * seq_len % unit == 0:
            return rows
    return config.batch_size


def weight_flips(before: list[dict[str, Tensor]], model: GPT) -> dict[str, list[float]]:
    """Flip rate of the 2:4 weight masks since `before`, per weight and layer (S-STE's r_k).

    Args:
        before: `weight_masks()` of every FFN at the earlier time.

    Returns:
        weight name to one rate per layer; empty without weight sparsity.
    """
    rates: dict[str, list[float]] = {}
    for old, ffn in zip(before, model.ffns()):
        for name, mask in ffn.weight_masks().items():
            rates.setdefault(name, []).append(flip_rate(old[name], mask))
    return rates


def _largest(x: Tensor) -> Tensor:
    return x.abs().max() if x.numel() else x.new_tensor(math.nan)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; after it, as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
