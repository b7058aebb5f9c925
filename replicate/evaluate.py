"""How good a model is, and what its layers do: held-out loss, completion, statistics of the FFNs.

The completion task stands in for the paper's benchmarks at our scale: of several continuations of a
held-out text, which one is the real one?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from replicate.data import TokenData
from replicate.gpt import GPT
from replicate.sparsity import flip_rate


def question(n: int, context: int = 56, length: int = 8, n_choices: int = 4, near: int = 0) -> dict[str, int]:
    """Arguments of `completion_task` as every study puts them; its answers are recorded under these."""
    asked = {"n": n, "context": context, "length": length, "n_choices": n_choices}
    return asked | ({"near": near} if near else {})


# Put to a finished model, by scale. Where the wrong choices come from afar, a model of 10M parameters is
# right nineteen times of twenty; at the largest scale they come from the very next lines.
QUESTIONS = {
    "smoke": question(400),
    "laptop": question(4000),
    "gpu": question(4000),
    "gpu40m": question(4000, near=256),
}


@torch.no_grad()
def valid_loss(
    model: GPT, data: TokenData, n: int = 16, batch_size: int = 8, *, forward: Callable | None = None
) -> float:
    """Mean cross-entropy in nats a token over `n` fixed held-out batches, in the model's present phase.

    `forward` stands in for calling the model, such as a compiled form of it.
    """
    forward = forward or model
    with _evaluating(model):
        device = model.embed.weight.device
        pairs = data.valid_batches(n, batch_size)
        losses = [forward(x.to(device), y.to(device))[1].double() * x.numel() for x, y in pairs]
    return float(torch.stack(losses).sum()) / sum(x.numel() for x, _ in pairs)


@dataclass(frozen=True)
class CompletionTask:
    """Questions with one right answer.

    contexts: [Q, C] token ids. choices: [Q, N, L] continuations. answers: [Q], index of the real one.
    """

    contexts: Tensor
    choices: Tensor
    answers: Tensor

    @property
    def chance(self) -> float:
        """Accuracy of guessing, 1 / N."""
        return 1 / self.choices.shape[1]


def completion_task(
    data: TokenData,
    n: int = 200,
    *,
    n_choices: int = 4,
    length: int = 8,
    context: int | None = None,
    near: int = 0,
    seed: int = 1,
) -> CompletionTask:
    """Multiple choice from held-out text: a context, its real continuation, and others.

    Args:
        data: its `valid` tokens are used.
        n: number of questions Q.
        n_choices: N; the N - 1 wrong ones are equally long pieces of the held-out text.
        length: L, tokens a continuation.
        context: C, tokens before it; by default seq_len - L, a whole sequence.
        near: the wrong ones lie within so many tokens after the real one, which is harder: they are about the
            same. 0 takes them from anywhere.
        seed: of the places and the order; equal seeds give equal questions to every model.

    Raises:
        ValueError: if the sizes do not fit seq_len or the held-out text.
    """
    context = data.seq_len - length if context is None else context
    tokens = np.asarray(data.valid)
    places = len(tokens) - context - length + 1 - near
    if min(n, length, context) < 1 or n_choices < 2 or context + length > data.seq_len:
        raise ValueError(
            f"n {n}, n_choices {n_choices}, context {context} + length {length} tokens: choose n >= 1, "
            f"n_choices >= 2 and at most seq_len = {data.seq_len} tokens"
        )
    if near and near < length * n_choices:
        raise ValueError(f"near is {near}; choose 0, or at least n_choices * length = {length * n_choices}")
    if places < 2 * n_choices:
        raise ValueError(f"{len(tokens)} held-out tokens are too few for contexts of {context}")
    random = np.random.default_rng(seed)
    contexts, choices, answers = [], [], random.integers(0, n_choices, n)
    for answer in answers:
        start = random.integers(0, places)
        real = tokens[start + context : start + context + length]
        after = start + context + length
        pool = tokens[after : after + near] if near else tokens
        options = _distractors(pool, real, n_choices - 1, random)
        options.insert(answer, real)
        contexts.append(tokens[start : start + context])
        choices.append(np.stack(options))
    as_ids = [torch.from_numpy(np.stack(part).astype(np.int64)) for part in (contexts, choices)]
    return CompletionTask(*as_ids, torch.from_numpy(answers))


@torch.no_grad()
def completion(model: GPT, task: CompletionTask, batch_size: int = 8) -> dict[str, Any]:
    """Score a model on a completion task.

    A choice's score is the mean log-likelihood of its tokens after the context; the highest wins.

    Returns:
        accuracy; stderr, its binomial standard error; chance; n; correct, one 0 or 1 a question, so
        that two models can be compared question by question.
    """
    device = model.embed.weight.device
    length = task.choices.shape[2]
    scores = []
    with _evaluating(model):
        for contexts, choices in zip(task.contexts.split(batch_size), task.choices.split(batch_size)):
            repeated = contexts.unsqueeze(1).expand(-1, choices.shape[1], -1)
            rows = torch.cat([repeated, choices], dim=2).flatten(0, 1).to(device)
            logits = model(rows)[0][:, -length - 1 : -1].float()
            chosen = logits.log_softmax(-1).gather(2, rows[:, -length:, None])[..., 0]
            scores.append(chosen.mean(1).view(choices.shape[:2]).cpu())
    correct = (torch.cat(scores).argmax(1) == task.answers).long()
    accuracy = correct.double().mean().item()
    stderr = math.sqrt(accuracy * (1 - accuracy) / len(correct))
    return {
        "accuracy": accuracy,
        "stderr": stderr,
        "chance": task.chance,
        "n": len(correct),
        "correct": correct.tolist(),
    }


def natural_sparsity(model: GPT, data: TokenData, n: int = 1, batch_size: int = 8) -> list[float]:
    """Share of zeros of y2 = relu(x W1)^2 before any mask, per layer, over `n` held-out batches."""
    batches = [x for x, _ in data.valid_batches(n, batch_size)]
    per_batch = [[layer["y2_sparsity"] for layer in layer_stats(model, x)] for x in batches]
    weights = [x.numel() / sum(y.numel() for y in batches) for x in batches]
    return [sum(w * value for w, value in zip(weights, layer)) for layer in zip(*per_batch)]


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
        with _evaluating(model):
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
        row |= {f"{name}_max": getattr(block.ffn, name).abs().max().item() for name in ("w1", "w2")}
        rows.append(row | (block.ffn.stats() if hasattr(block.ffn, "stats") else {}))
    return rows


@torch.no_grad()
def ffn_inputs(model: GPT, idx: Tensor) -> list[Tensor]:
    """What each layer's FFN reads for the batch `idx`: [B, S, D] per layer."""
    inputs: list[Tensor] = []
    hooks = [
        block.ffn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.blocks
    ]
    try:
        with _evaluating(model):
            model(idx.to(model.embed.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


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


def _distractors(
    tokens: np.ndarray, real: np.ndarray, n: int, random: np.random.Generator
) -> list[np.ndarray]:
    """`n` different pieces of `tokens`, none equal to `real`, in random order."""
    found: list[np.ndarray] = []
    for _ in range(1000 * n):
        start = random.integers(0, len(tokens) - len(real) + 1)
        piece = tokens[start : start + len(real)]
        if not any(np.array_equal(piece, other) for other in [real, *found]):
            found.append(piece)
        if len(found) == n:
            return found
    raise ValueError(f"the held-out text repeats itself; no {n} different pieces of {len(real)} tokens")


def _largest(x: Tensor) -> Tensor:
    return x.abs().max() if x.numel() else x.new_tensor(math.nan)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
