"""Chapter 03: squared ReLU's gradient, its symmetry, and what 2 of 4 takes from it."""

import torch

from exercises import Wrong, compare, exercise


@exercise("03.1")
def gradient(answer):
    y1, dy2 = torch.tensor([3.0, -2.0, 0.5, 0.0]), torch.tensor([1.0, 5.0, -4.0, 2.0])
    y2, dy1 = _pair(compare.call(answer, y1, dy2), "y2 and dy1")
    active, example = y1.relu(), f"y1 = {y1.tolist()} and dy2 = {dy2.tolist()}"
    hints = [
        (active, "That is relu. Square it."),
        (y1.square(), "A negative y1 must give 0: take relu first, then the square."),
        (2 * dy2 * active, "That is dy1. Return y2 first."),
    ]
    with compare.given(f"{example}, y2"):
        compare.tensor(y2, active.square(), hints)
    hints = [
        (dy2 * active, "The factor 2 is missing: the derivative of a square."),
        (dy2 * (y1 > 0), "That is the gradient of relu. The square adds the factor 2 relu(y1)."),
        (2 * dy2 * (y1 > 0), "2 is there, but relu(y1) is missing as a factor."),
        (2 * dy2 * y1, "The gradient passes where y1 is negative. y2 is flat there."),
        (2 * active, "That is the derivative. Multiply it with the gradient dy2 that comes from above."),
        (2 * dy2 * y1.abs(), "The gradient passes where y1 is negative. y2 is flat there."),
        (dy2 * active.square(), "That is dy2 times y2. Multiply with the derivative of y2."),
        (2 * dy2 * active.square(), "Multiply with relu(y1), not with its square."),
        (2 * dy2.relu() * active, "You cut off a negative dy2. Only y1 is cut off."),
    ]
    with compare.given(f"{example}, dy1"):
        compare.tensor(dy1, _autograd(y1, dy2), hints)
    y1, dy2 = compare.normal(6, 5), compare.normal(6, 5, seed=1)
    with compare.given("normal numbers of shape [6, 5]"):
        y2, dy1 = _pair(compare.call(answer, y1, dy2), "y2 and dy1")
        compare.tensor(y2, y1.relu().square())
        compare.tensor(dy1, _autograd(y1, dy2))
    return "dy1 is zero wherever y2 is: the zeros of the forward pass serve the backward pass too."


@exercise("03.2")
def symmetry(answer):
    w1, w2, x = compare.normal(4, 12), compare.normal(12, 4, seed=1), compare.normal(7, 4, seed=2)
    for c in (3.0, 0.5):
        first, second = _pair(compare.call(answer, w1, w2, c), "c w1 and the new w2")
        with compare.given(f"c = {c:g}, the new w1"):
            compare.tensor(first, c * w1, [(w1, "It is unchanged."), (w1 / c, "It is divided by c.")])
        hints = [
            (w2 / c, "You divided by c. But y2 grows with the square."),
            (w2 * c**2, "y2 grows, so w2 must become smaller."),
            (w2 * c, "y2 grows, so w2 must become smaller."),
            (w2, "It is unchanged, so the output grows with y2."),
            (w2 / (2 * c), "The square of c is c times c, not twice c."),
            (w2 / c**0.5, "y2 grows with the square of c, not with its root."),
        ]
        with compare.given(f"c = {c:g}, the new w2"):
            compare.tensor(second, w2 / c**2, hints)
            same = _layer(x, first, second), _layer(x, w1, w2)
            assert torch.allclose(*same), "the formula and the function agree"
    return "The zeros stay where they are. What a training step does to the two is another matter: 03.3."


@exercise("03.3")
def relative_step(answer):
    x, w1, w2, dy3 = (
        compare.normal(*shape, seed=i) for i, shape in enumerate([(9, 4), (4, 12), (12, 4), (9, 4)])
    )
    moves = []
    for first, second in ((w1, w2), (2 * w1, w2 / 4)):
        second = second.clone().requires_grad_()
        with torch.enable_grad():
            y3 = _layer(x, first, second)
        moves.append((torch.autograd.grad(y3, second, dy3)[0].norm() / second.detach().norm()).item())
    hints = [
        (4, "You have one of two factors: the gradient grows fourfold, or the weight shrinks so. Take both."),
        (1, "The gradient grows and the weight shrinks: the two do not cancel."),
        (1 / 16, "Turned around: the gradient grows, and the weight is smaller."),
        (1 / 4, "Turned around: y2 grows, and the gradient y2^T dy3 with it."),
        (2, "y2 grows with the square of c, and so does the gradient."),
        (8, "y2 is 4 times as large, and the new W2 is a quarter of the old one."),
    ]
    compare.number(answer, moves[1] / moves[0], hints)
    return "Autograd finds the same. With AdamW it is 4: its step does not grow with the gradient."


@exercise("03.4")
def crowded(answer):
    p, q = 0.2, 0.8
    right = 4 * p**3 * q + p**4
    hints = [
        (4 * p**3 * q, "That is exactly three. Four lose something too."),
        (p**4, "That is all four. With three firing one is lost already."),
        (p**3 * q + p**4, "Which three fire? There are 4 ways to choose them."),
        (p**3, "That is three chosen ones. There are 4 ways to choose three, and the fourth must be silent."),
        (4 * p**3, "In the 4 ways the fourth neuron must be silent, or you count 'all four' more than once."),
        (4 * p**3 + p**4, "With exactly three firing the fourth is silent, which has a chance too."),
        (6 * p**2 * q**2 + right, "Two firing neurons both survive. Count three and four."),
        (6 * p**2 * q**2, "That is exactly two, and both survive. Count three and four."),
        (1 - right, "That is the share that loses nothing."),
        (4 * q**3 * p + q**4, "You took 0.8 as the chance to fire. It is the chance to be silent."),
        *(
            (5 / 16 * part, "The share does not shrink in proportion. Count patterns with chance 0.2.")
            for part in (0.2, 0.4)
        ),
        (5 / 16, "That is the new model, where half of the neurons fire."),
    ]
    compare.number(answer, right, hints, tolerance=1e-2)
    return "From 31 % to under 3 %, and what is lost is the smallest that fires."


@exercise("03.5")
def energy(answer):
    y1 = torch.tensor([[1.0, 2.0, -5.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    y2 = y1.relu().square()
    two = y2.topk(2, 1).values
    by_size = y2.gather(1, y1.abs().topk(2, 1).indices)
    squares = y2.square()
    hints = [
        (by_size.sum() / y2.sum(), "You kept the largest |y1|, and so -5, which gives 0. Compare y2."),
        (two.sum(1).div(y2.sum(1)).mean(), "You averaged the shares of the groups. Divide sum by sum."),
        (
            squares.topk(2, 1).values.sum() / squares.sum(),
            "You squared y2 once more. The energy is the sum of y2.",
        ),
        (y1.relu().topk(2, 1).values.sum() / y1.relu().sum(), "You added relu(y1). Square it: that is y2."),
        (4 / 7, "You counted activations. Add their values."),
        (1 - two.sum() / y2.sum(), "That is the share that is lost."),
        (two.sum(), "That is the energy that is left. Divide it by all of it."),
        (y1.square().topk(2, 1).values.sum() / y1.square().sum(), "-5 must give 0: relu before the square."),
        (y2.topk(2, 1, largest=False).values.sum() / y2.sum(), "You kept the two smallest."),
        (y2.flatten().topk(2).values.sum() / y2.sum(), "You kept two of all. Each group keeps two."),
    ]
    with compare.given(f"y1 = {y1.tolist()}"):
        compare.number(compare.call(answer, y1), (two.sum() / y2.sum()).item(), _numbers(hints))
    y1 = torch.cat([y1, torch.tensor([[-1.0, -2.0, -3.0, -4.0]])])
    with compare.given(f"y1 = {y1.tolist()}"):
        found = compare.call(answer, y1)
        if found != found:
            raise Wrong("The last group is silent, so its own share is 0/0. Divide sum by sum.")
        compare.number(found, (two.sum() / y2.sum()).item())
    y2 = (compare.normal(5000, 4) - 1).relu().square()
    with compare.given("normal numbers - 1 of shape [5000, 4]"):
        right = (y2.topk(2, 1).values.sum() / y2.sum()).item()
        compare.number(compare.call(answer, compare.normal(5000, 4) - 1), right)
    y2 = (compare.normal(200_000, 4) - 1).relu().square()  # enough for three digits
    shifted = (y2.topk(2, 1).values.sum() / y2.sum()).item()
    return f"With a bias of -1 it is {shifted:.3f}, without one 0.96: 2 of 4 needs no help."


def _pair(found, what):
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise Wrong(f"Return two tensors: {what}.")
    return found


def _numbers(hints):
    return [(float(wrong), hint) for wrong, hint in hints]


def _layer(x, w1, w2):
    return (x @ w1).relu().square() @ w2


def _autograd(y1, dy2):
    y1 = y1.clone().requires_grad_()
    with torch.enable_grad():
        y2 = y1.relu().square()
    return torch.autograd.grad(y2, y1, dy2)[0]
