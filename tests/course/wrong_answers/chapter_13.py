"""Answers that students give in chapter 13, and the hint that each must get."""

import math

WEIGHTS, CACHE, BANDWIDTH = 13_936_107_520, 2**30, 4.0e12  # of the 7B model, bytes


def exact(share, k, n):
    return math.log(1 - share) / math.log(1 - k / n)


def step(share_of, whole_w1=None):
    """Bytes of a step if `share_of` the choices gives the share of clusters that is read."""

    def bytes_read(choices, n, d_model, d_ff, by_activations):
        share = share_of(choices) / n
        first = 1 if (by_activations if whole_w1 is None else whole_w1) else share
        return 2 * d_model * d_ff * (first + share)

    return bytes_read


def any_text(choices):
    return choices.unique().numel()


WRONG = [
    ("13.1", BANDWIDTH / WEIGHTS, "left out the KV cache"),
    ("13.1", BANDWIDTH / CACHE, "the KV cache alone"),
    ("13.1", (WEIGHTS + CACHE) / BANDWIDTH, "in seconds"),
    ("13.1", 1e3 * (WEIGHTS + CACHE) / BANDWIDTH, "in ms"),
    ("13.1", BANDWIDTH / (WEIGHTS + CACHE / 2), "keys and values"),
    ("13.1", BANDWIDTH / (WEIGHTS / 2 + CACHE), "two bytes"),
    ("13.2", WEIGHTS / CACHE, "Texts are whole"),
    ("13.2", 12, "not enough yet"),
    ("13.2", 26, "Twice too many"),
    ("13.2", math.ceil(32 * WEIGHTS / CACHE), "Every layer"),
    ("13.2", 7, "has two bytes"),
    ("13.2", math.ceil(2048 * WEIGHTS / CACHE), "A text has 2048"),
    ("13.3", exact, "Texts are whole"),
    ("13.3", lambda s, k, n: int(exact(s, k, n)), "do not reach"),
    ("13.3", lambda s, k, n: math.ceil(s * n / k), "They do"),
    ("13.3", lambda s, k, n: math.ceil(math.log(0.1) / math.log(1 - k / n)), "too large"),
    ("13.3", lambda s, k, n: math.ceil(math.log(1 - s) / math.log(k / n)), "not k / n"),
    (
        "13.3",
        lambda s, k, n: {0.5: 6, 0.9: math.ceil(math.log(s) / math.log(1 - k / n))}[s],
        "nobody touches",
    ),
    ("13.4", step(lambda choices: choices.numel()), "is read once"),
    ("13.4", step(lambda choices: choices.shape[1]), "what one text reads"),
    ("13.4", step(lambda choices: 8), "Leave out those"),
    ("13.4", step(any_text, whole_w1=False), "all of W1 is read"),
    ("13.4", step(any_text, whole_w1=True), "of W1, too"),
    ("13.4", lambda *given: step(any_text)(*given) / 2, "Two bytes a number"),
]
