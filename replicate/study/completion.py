"""Completion of held-out text, which stands in for the paper's benchmarks at our scale.

Of several continuations of a held-out text, which one is the real one?
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from replicate.data import TokenData
from replicate.evaluate import evaluating
from replicate.gpt import GPT

# Put to a finished model, by scale: arguments of `completion_task`, under which its answers are recorded.
# Where the wrong choices come from afar, a model of 10M parameters is right nineteen times of twenty; above
# it they come from the very next lines.
QUESTION = {"n": 4000, "context": 56, "length": 8, "n_choices": 4}
QUESTIONS = {
    "smoke": QUESTION | {"n": 400},
    "laptop": QUESTION,
    "gpu": QUESTION,
    "gpu40m": QUESTION | {"near": 256},
    "gpu100m": QUESTION | {"near": 256},
}


@dataclass(frozen=True)
class CompletionTask:
    """Questions with one right answer."""

    contexts: Tensor  # [Q, C] token ids
    choices: Tensor  # [Q, N, L] continuations
    answers: Tensor  # [Q], index of the real one


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
    """Multiple choice from held-out text: a context, its real continuation, and other pieces of the text.

    Args:
        data: its `valid` tokens are used.
        n: number of questions Q. n_choices: N. length: L, tokens a continuation.
        context: C, tokens before it; by default seq_len - L, a whole sequence.
        near: the wrong ones lie within so many tokens after the real one, which is harder; 0: anywhere.
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
        after = start + context + length
        real = tokens[start + context : after]
        pool = tokens[after : after + near] if near else tokens
        options = _distractors(pool, real, n_choices - 1, random)
        options.insert(answer, real)
        contexts.append(tokens[start : start + context])
        choices.append(np.stack(options))
    as_ids = [torch.from_numpy(np.stack(part).astype(np.int64)) for part in (contexts, choices)]
    return CompletionTask(*as_ids, torch.from_numpy(answers))


@torch.no_grad()
def completion(model: GPT, task: CompletionTask, batch_size: int = 8) -> dict[str, Any]:
    """A model's accuracy, its binomial standard error, that of guessing, and n; "correct": 0 or 1 a question.

    A choice's score is the mean log-likelihood of its tokens after the context; the highest wins.
    """
    device = model.embed.weight.device
    length = task.choices.shape[2]
    scores = []
    with evaluating(model):
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
        "chance": 1 / task.choices.shape[1],
        "n": len(correct),
        "correct": correct.tolist(),
    }


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
