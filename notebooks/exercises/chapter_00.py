"""Chapter 00: the dense layer by hand, counting zeros, reading an interval."""

import torch

from exercises import compare, exercise


@exercise("00.1")
def layer(answer):
    x, w1 = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, -1.0, 3.0], [1.0, -1.0, -1.0]])
    w2 = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    y1 = x @ w1  # [3, -3, 1]
    y2 = y1.relu().square()
    hints = [
        (y1.square() @ w2, "The neuron with y1 = -3 counts as 9. Take relu first, then the square."),
        (y1.relu() @ w2, "This is relu without the square."),
        ((y1.relu() @ w2).square(), "You square the output. The square belongs to y2, before W2."),
        (y1 @ w2, "Nothing happens between the two products. y2 is relu(y1) squared."),
        ((y1 @ w2).relu().square(), "relu and the square come after W1, not after W2."),
        (y2, "This is y2. Multiply it with w2."),
    ]
    with compare.given(f"x = {x.tolist()}, w1 = {w1.tolist()} and w2 = {w2.tolist()}"):
        compare.tensor(compare.call(answer, x, w1, w2), y2 @ w2, hints)
    x, w1, w2 = compare.normal(5, 4), compare.normal(4, 12, seed=1), compare.normal(12, 4, seed=2)
    with compare.given("normal numbers, 5 tokens, D = 4 and F = 12"):
        compare.tensor(compare.call(answer, x, w1, w2), (x @ w1).relu().square() @ w2)
    return "These are two of the six products. The other four compute gradients."


@exercise("00.2")
def zeros(answer):
    hints = [
        (
            1 - 2 / 32,
            "That is only the missing clusters. Inside those that are left, half of the neurons go too.",
        ),
        (1 / 32, "That is the share that is left. Give the share that is zero."),
        (2 / 32, "That is the share of the clusters that is left. Half of it survives; give the rest."),
        (7 / 8, "That is for 4 of 16 clusters. Here 2 of 32 are used."),
        (1 / 2, "That is the 2 of 4 alone. Most clusters are not used at all."),
        (30 / 32 * 1 / 2, "Multiply the shares that are left, not those that are zero: 2/32 times 1/2."),
        (1 - (2 / 32 + 2 / 4), "The two shares follow one another. Multiply what they leave."),
    ]
    compare.number(answer, 31 / 32, hints, tolerance=3e-3)  # two decimals will do
    return "Squared ReLU makes some of the rest zero as well, so it is 'at least'."


@exercise("00.3")
def interval(answer):
    hints = {
        "a and b": "B's mean is above zero, but its interval begins at 0.017 - 0.032. Is that above zero?",
        "all": "C's mean is even below zero. Compute the lower end of each interval: mean minus half.",
        "none": "A's interval begins at 0.110 - 0.016. Is zero in it?",
    }
    compare.one_of(answer, ["a", *hints], "a", hints)
    return "B and C may cost something or nothing: three seeds cannot tell."
