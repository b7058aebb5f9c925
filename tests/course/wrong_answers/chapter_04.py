"""Typical wrong answers to the exercises of chapter 04, and what their hints must say."""

import math


def backward(x, w1, w2, mask, dy3, y2_mask=True, dy1_mask=True, power=2, slope=lambda y1: 2 * y1.relu()):
    y1 = x @ w1
    y2 = y1.relu() ** power
    if y2_mask:
        y2 = y2 * mask
    dy1 = (dy3 @ w2.T) * slope(y1)
    if dy1_mask:
        dy1 = dy1 * mask
    return dy1 @ w1.T, x.T @ dy1, y2.T @ dy3


def turned(x, w1, w2, mask, dy3):
    dx, dw1, dw2 = backward(x, w1, w2, mask, dy3)
    return dx, dw1.T, dw2.T


WRONG = [
    ("04.1", [0.08, 0.06, -0.16, 0.02], "The factor 2 is missing"),
    ("04.1", [-0.16, -0.12, 0.32, -0.04], "signs are turned around"),
    ("04.1", [0, 0, -0.4, 0], "left out the average"),
    ("04.1", [0.4, 0.3, 0.2, 0.1], "These are the chances"),
    ("04.1", [0.1122, 0.0413, -0.1591, 0.0056], "no softmax"),
    ("04.1", [0.16, 0.12, -0.24, 0.04], "Go step by step"),
    ("04.2", math.log(1.5) / 0.32, "the second falls meanwhile"),
    ("04.2", 1.444, "enough to pass the second"),
    ("04.2", 1.843, "Check 04.1"),
    ("04.2", 1.0, "Take the logarithm"),
    ("04.2", 0.4002, "natural logarithm"),
    ("04.3", lambda *given: backward(*given, dy1_mask=False), "dy1 has no mask"),
    ("04.3", lambda *given: backward(*given, y2_mask=False), "y2 without the mask"),
    ("04.3", lambda *given: backward(*given, slope=lambda y1: y1.relu()), "The factor 2 is missing"),
    ("04.3", lambda *given: backward(*given, slope=lambda y1: 2 * (y1 > 0)), "derivative of relu"),
    ("04.3", lambda *given: backward(*given, slope=lambda y1: y1 > 0), "derivative of relu"),
    ("04.3", lambda *given: backward(*given, slope=lambda y1: 2 * y1), "where y1 is negative"),
    ("04.3", turned, "transposed"),
    ("04.3", lambda *given: backward(*given)[0], "Return three tensors"),
    ("04.4", [0, 1], "the forward pass's"),
    ("04.4", [3, 2], "You compare dy2"),
    ("04.4", [2, 3, 1], "Give two of the numbers"),
    ("04.4", [1, 3], "neuron 3 has no gradient"),
    ("04.4", [1, 1], "two different"),
    ("04.3", lambda *given: backward(*given)[::-1], "Return dx, dw1, dw2"),
    ("04.5", 3, "among the two largest"),
    ("04.5", 1, "not kept anyway"),
    ("04.5", 0, "A small newcomer"),
    ("04.2", 2.17, "the second, and it falls"),
    ("04.3", lambda *given: backward(*given, power=1), "square relu(y1)"),
    ("04.3", lambda *given: backward(*given, power=1, y2_mask=False), "and mask it"),
]
