"""Exercises of chapter 13, decoding. Read this after you tried them."""

import math
from typing import Any

import torch
from torch import Tensor

from exercises import exercise
from exercises.compare import call, given, number
from replicate.report import decoding
from replicate.settings.presets import train_preset

MODEL = train_preset("llama7b").model
BANDWIDTH, TOKENS = 4.0e12, 2048  # bytes a second, of the stub; tokens of a text


@exercise("13.1")
def tokens_a_second(answer: Any) -> str:
    """Most tokens a second of the dense 7B model: bandwidth over bytes of weights and KV cache."""
    weights, kept = decoding.weight_bytes(MODEL), decoding.kv_bytes(MODEL, TOKENS)
    right = BANDWIDTH / (weights + kept)
    number(
        answer,
        right,
        hints=[
            (
                BANDWIDTH / weights,
                "You left out the KV cache. Each token reads the keys and values of all before.",
            ),
            (BANDWIDTH / (weights / 2 + kept), "A number in bf16 has two bytes."),
            (BANDWIDTH / (weights + kept / 2), "The cache holds keys and values: twice as much."),
            (BANDWIDTH / kept, "That reads the KV cache alone. Add the weights."),
            (1 / right, "That is the time of a token in seconds. Asked is how many fit into one second."),
            (1e3 / right, "That is the time of a token in ms. Asked is how many fit into one second."),
        ],
    )
    return "No kernel can do better with dense weights in bf16: only fewer bytes help."


@exercise("13.2")
def texts_of_the_weights(answer: Any) -> str:
    """Fewest texts of 2048 tokens whose KV cache takes at least the bytes of all weights of the 7B model."""
    ratio = decoding.weight_bytes(MODEL) / decoding.kv_bytes(MODEL, TOKENS)
    number(
        answer,
        math.ceil(ratio),
        hints=[
            (ratio, "Texts are whole: round up."),
            (math.floor(ratio), "So many are not enough yet: round up."),
            (math.ceil(2 * ratio), "Twice too many: the cache holds keys and values."),
            (math.ceil(ratio * MODEL.n_layer), "Every layer has keys and values of its own."),
            (
                math.ceil(ratio / 2),
                "Half of it: a number of the cache has two bytes, as one of the weights has.",
            ),
            (math.ceil(ratio * TOKENS), "That many tokens. A text has 2048."),
        ],
        tolerance=1e-9,
    )
    return "With more texts a step reads more cache than weights, and the FFN matters less and less."


@exercise("13.3")
def texts_until_share(answer: Any) -> str:
    """Fewest texts that are expected to touch a share s of n clusters: ceil(log(1 - s) / log(1 - k / n))."""
    for share, k, n in ((0.5, 8, 64), (0.9, 4, 16)):
        exact = math.log(1 - share) / math.log(1 - k / n)
        with given(f"share = {share}, k = {k} and n_clusters = {n}"):
            number(
                call(answer, share, k, n),
                math.ceil(exact),
                hints=[
                    (exact, "Texts are whole: round up."),
                    (math.floor(exact), "So many do not reach the share yet: round up."),
                    (
                        math.ceil(share * n / k),
                        "That would do if no two texts chose the same cluster. They do.",
                    ),
                    (
                        math.ceil(math.log(share) / math.log(1 - k / n)),
                        "You solved for the share that nobody touches. It is 1 - share.",
                    ),
                    (
                        math.ceil(math.log(1 - share) / math.log(k / n)),
                        "One text leaves a cluster out with probability 1 - k / n, not k / n.",
                    ),
                ],
                tolerance=1e-9,
            )
    return (
        "With the same share k / n, more and smaller clusters do not help: the formula has only their ratio."
    )


CHOICES = torch.tensor([[0, 5], [5, 2], [0, 2]])  # of three texts, two of eight clusters each


@exercise("13.4")
def bytes_of_a_step(answer: Any) -> str:
    """Bytes of W1 and W2 in bf16 that a step of several texts reads, by a router and by activations."""
    n, d_model, d_ff = 8, 6, 32
    for by_activations in (False, True):
        right, hints = _step(CHOICES, n, d_model, d_ff, by_activations)
        with given(
            f"choices {CHOICES.tolist()}, 8 clusters, D = 6, F = 32, by_activations = {by_activations}"
        ):
            number(call(answer, CHOICES, n, d_model, d_ff, by_activations), right, hints, tolerance=1e-9)
    return "So a choice by activations saves at most half as many bytes: W1 is read whole."


def _step(
    choices: Tensor, n: int, d_model: int, d_ff: int, by_activations: bool
) -> tuple[float, list[tuple[float, str]]]:
    """The bytes of a step, and wrong numbers of bytes with their hints."""

    def read(share: float) -> float:
        return decoding.BYTES * d_model * d_ff * ((1 if by_activations else share) + share)

    share = choices.unique().numel() / n
    other = decoding.BYTES * d_model * d_ff * ((share if by_activations else 1) + share)
    if by_activations:
        said = "By activations y1 must be known in full before the choice: all of W1 is read."
    else:
        said = "A router chooses before product 1: of W1, too, only the chosen clusters are read."
    hints = [
        (read(choices.numel() / n), "A cluster that several texts use is read once."),
        (read(choices.shape[1] / n), "That is what one text reads. Take the clusters that any text uses."),
        (read(1.0), "That reads all clusters. Leave out those that no text uses."),
        (read(share) / 2, "Two bytes a number, and two weights."),
        (other, said),
    ]
    return read(share), hints
