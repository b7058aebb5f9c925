"""Typical wrong answers to the exercises of chapter 02, and what their hints must say."""

import math


def block(factor=6, matrices=2, causal=1):
    return lambda d, f, t: factor * (matrices * d * f + 4 * d * d + causal * t * d)


def venom_speed(step, r, two_four=2 / 1.5, checked=True):
    left = 6 * (1 / step - 1 + r) / r - two_four
    return 4 / left if left > 0 or not checked else math.inf


def none_is_enough(step, r):
    found = venom_speed(step, r)
    return found if found < math.inf else None


WRONG = [
    ("02.1", block(factor=3), "two FLOPs"),
    ("02.1", block(factor=2), "That is the forward pass"),
    ("02.1", block(matrices=3), "SwiGLU has three"),
    ("02.1", block(causal=2), "T/2 on average"),
    ("02.1", block(causal=0), "T^2 part is missing"),
    ("02.1", lambda d, f, t: block()(d, f, t) * t, "Count one token"),
    ("02.2", 8192, "without the causal half"),
    ("02.2", 4096, "Solve T D = 2 D F"),
    ("02.2", 32768, "not 3 T D"),
    ("02.3", 0.534, "with 32 key heads"),
    ("02.3", 0.8276, "the paper's formula"),
    ("02.3", 59.35, "in percent"),
    ("02.3", 0.4065, "share of all the rest"),
    ("02.4", 1.6, "mean of the speeds"),
    ("02.4", 1.1, "half of 2.2"),
    ("02.4", 0.727, "Turn it over"),
    ("02.5", lambda step, r: venom_speed(step, r, checked=False), "is no speed-up"),
    ("02.5", none_is_enough, "instead of None"),
    ("02.5", lambda step, r: r / (1 / step - 1 + r), "speed-up of the whole FFN"),
    ("02.5", lambda step, r: venom_speed(step, r, two_four=2), "1/1.5 each, not their full time"),
    ("02.5", lambda step, r: venom_speed(step, r, two_four=3), "1/1.5 of the time"),
    ("02.5", lambda step, r: 4 / (6 / step - 2 / 1.5), "Only the FFN becomes faster"),
    ("02.5", lambda step, r: 1 / venom_speed(step, r), "Its speed is the inverse"),
    ("02.1", lambda d, f, t: block(causal=0)(d, f, t) + 2 * t * d, "twice the forward's"),
    ("02.3", 0.668, "Only the projections of keys and values shrink"),
    ("02.3", 0.183, "one layer against the whole head"),
    ("02.5", lambda step, r: (6 * step - 3) / 4, "You averaged speeds"),
    ("02.5", lambda step, r: (6 * r / (1 / step - 1 + r) - 3) / 4, "You averaged speeds"),
    ("02.5", lambda step, r: 4 / (6 / (step * r) - 2 / 1.5), "Take off the rest"),
    ("02.5", lambda step, r: 2 / (6 * (1 / step - 1 + r) / r - 4 / 1.5), "four are Venom"),
]
