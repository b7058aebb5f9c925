"""Chapter 04: gradients of scores, a neuron that returns, the backward pass, its own mask, a late token."""

import math

import torch

from exercises import Wrong, compare, exercise


@exercise("04.1")
def scores(answer):
    c, d = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([0.0, 0.0, -1.0, 0.0])
    p, soft = c / c.sum(), c.softmax(0)
    right = 2 * p * (d - (p * d).sum())
    hints = [
        (right / 2, "The factor 2 is missing: two of four are drawn, so m is about 2 p."),
        (
            -right,
            "The signs are turned around. The gradient of the third score is negative, so it will rise.",
        ),
        (2 * p * d, "You left out the average. Raising one score lowers the chances of the others."),
        (2 * (d - (p * d).sum()), "The factor p_j is missing."),
        (2 * p * (d - d.mean()), "The average of d is weighted with p, not with 1/4 each."),
        (2 * p * (d + (p * d).sum()), "The average is subtracted. It is negative here, so you add 0.2."),
        (
            2 * soft * (d - (soft * d).sum()),
            "p is c over its sum. The exponential is in c already: no softmax.",
        ),
        (p, "These are the chances p. Put them into the formula."),
    ]
    steps = "Go step by step: p = c / 10, the average sum(p d), then each 2 p_j (d_j - average)."
    compare.tensor(answer, right, hints, tolerance=1e-3, otherwise=steps)
    return "They add up to zero: what one neuron gains in chance the others lose."


@exercise("04.2")
def returning(answer):
    hints = [
        (math.log(2) / 0.32, "The target is the second, and it falls."),
        (math.log(1.5) / 0.32, "You let the third score rise, but the second falls meanwhile."),
        (
            math.log(2) / 0.48,
            "You compare with the first neuron. Two are kept: it is enough to pass the second.",
        ),
        (math.log(1.5) / 0.22, "Your gradients lack the factor 2 of the formula. Check 04.1."),
        (
            math.log(1.5) / 0.20,
            "You compare 0.32 and 0.12 by their difference. One score rises and the other falls.",
        ),
        (1.0, "You replaced e^s by 1 + s. Take the logarithm of both sides instead."),
        (0.5 / 0.44, "You replaced e^s by 1 + s. Take the logarithm of both sides instead."),
        (math.log10(1.5) / 0.44, "Take the natural logarithm: the criterion has e^s."),
        (1 / 0.44, "You compare scores. It is y2 e^s that must grow from 2 beyond 3."),
        (
            math.log(4 / 3) / 0.44,
            "That is neuron 1 passing neuron 0. It is the third that must pass the second.",
        ),
    ]
    compare.number(answer, math.log(1.5) / 0.44, hints, tolerance=3e-3)
    return "Both criteria are then 2.69: the one rose from 2, the other fell from 3."


@exercise("04.3")
def backward(answer):
    x, w1, w2, dy3 = (
        compare.normal(*shape, seed=i) for i, shape in enumerate([(6, 5), (5, 8), (8, 5), (6, 5)])
    )
    mask = compare.normal(6, 8, seed=4) > -0.5
    found = compare.call(answer, x, w1, w2, mask, dy3)
    if not isinstance(found, (tuple, list)) or len(found) != 3:
        raise Wrong("Return three tensors: dx, dw1 and dw2, in this order.")
    right = _autograd(x, w1, w2, mask, dy3)
    half = "The factor 2 is missing: the derivative of a square."
    hints = [
        ({"in_dy1": False}, "dy1 has no mask. Neurons that the forward pass dropped get a gradient."),
        ({"in_y2": False}, "dW2 reads y2 without the mask. It must be the y2 that made y3."),
        ({"power": 1}, "dW2 reads y2: square relu(y1)."),
        ({"power": 1, "in_y2": False}, "dW2 reads y2: square relu(y1), and mask it."),
        ({"factor": 1}, half),
        (
            {"active": lambda y: (y > 0).double()},
            "You used the derivative of relu. The square's is 2 relu(y1).",
        ),
        ({"active": lambda y: (y > 0) / 2}, "You used the derivative of relu. The square's is 2 relu(y1)."),
        ({"active": lambda y: y}, "The gradient passes where y1 is negative. relu(y1) is zero there."),
        (
            {"active": lambda y: y.relu() ** 2},
            "dy1 has y2 in it. The derivative of the square is 2 relu(y1).",
        ),
        ({"active": lambda y: y.abs()}, "The gradient passes where y1 is negative. relu(y1) is zero there."),
    ]
    variants = [(_by_hand(x, w1, w2, mask, dy3, **how), hint) for how, hint in hints]
    names = ((2, "dw2"), (1, "dw1"), (0, "dx"))
    for place, name in names:
        with compare.given(f"normal numbers, {name}"):
            others = [(wrong[place], hint) for wrong, hint in variants]
            others += [(right[i], f"This is {said}. Return dx, dw1, dw2.") for i, said in names if i != place]
            if right[place].shape[0] != right[place].shape[-1]:
                others.append((right[place].T, "It is transposed: a gradient has the shape of its weight."))
            compare.tensor(found[place], right[place], others)
    return "Autograd gives the same three, with the mask held fixed."


@exercise("04.4")
def own_mask(answer):
    try:
        kept = sorted(int(number) for number in answer)
    except (TypeError, ValueError):
        raise Wrong("The answer is a list of two neurons, like [0, 3].") from None
    if len(kept) != 2 or not set(kept) <= {0, 1, 2, 3}:
        raise Wrong("Give two of the numbers 0, 1, 2 and 3: the first neuron is number 0.")
    hints = {
        (0, 1): "These are the forward pass's, with the largest y2. What is dy1 = 2 dy2 relu(y1)?",
        (2, 3): "You compare dy2. The derivative 2 relu(y1) comes in between, and is zero for neuron 3.",
        (1, 3): "You multiplied with the magnitude of y1. relu(-1) is 0, so neuron 3 has no gradient.",
        (0, 2): "Neuron 0 has 2 * 0.1 * 3 = 0.6. Is that among the largest two?",
        (
            0,
            3,
        ): "You compare magnitudes of something else. Compute dy1 = 2 dy2 relu(y1) for each of the four.",
    }
    if kept != [1, 2]:
        raise Wrong(hints.get(tuple(kept), "Name two different neurons."))
    return "Neuron 2 gets a gradient for something it did not do, and neuron 0 gets none for what it did."


@exercise("04.5")
def late_token(answer):
    hints = [
        (3, "At 3 it passes the largest. It is kept as soon as it is among the two largest."),
        (1, "At 1 it passes the second token, which was not kept anyway. Nothing changes there yet."),
        (0, "A small newcomer is dropped itself. Which two are kept without it?"),
        (1.5, "Compare with one token: the weaker of the two that are kept without the newcomer."),
    ]
    compare.number(answer, 2, hints)
    return "Then the third token's activation is zero, because of a token that comes after it."


def _by_hand(x, w1, w2, mask, dy3, *, factor=2, power=2, in_y2=True, in_dy1=True, active=torch.relu):
    """(dx, dw1, dw2) with one mistake."""
    y1 = x @ w1
    y2 = y1.relu() ** power * (mask if in_y2 else 1)
    dy1 = factor * (dy3 @ w2.T) * active(y1) * (mask if in_dy1 else 1)
    return dy1 @ w1.T, x.T @ dy1, y2.T @ dy3


def _autograd(x, w1, w2, mask, dy3):
    x, w1, w2 = (value.clone().requires_grad_() for value in (x, w1, w2))
    with torch.enable_grad():
        y3 = ((x @ w1).relu().square() * mask) @ w2
    return torch.autograd.grad(y3, (x, w1, w2), dy3)
