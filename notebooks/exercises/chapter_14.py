"""Exercises of chapter 14, images and clips. Read this after you tried them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exercises import exercise
from exercises.compare import call, given, normal, number


@exercise("14.1")
def tokens_of_a_clip(answer: Any) -> str:
    """16 / 2 times (64 / 8)^2 tokens."""
    frames, size, patch, frame_patch = 16, 64, 8, 2
    number(
        answer,
        frames // frame_patch * (size // patch) ** 2,
        hints=[
            (frames * (size // patch) ** 2, "A patch reaches over two frames. You cut each frame by itself."),
            (
                (size // patch) ** 2,
                "Those are the patches of one picture. How many layers of them are there?",
            ),
            (frames // frame_patch * (size // patch), "A picture is cut along its height and its width."),
            (frame_patch * patch**2, "Those are the numbers in one patch. How many patches are there?"),
            (frames * size**2, "Those are the pixels. A token is a patch of them."),
        ],
    )
    return "Twice as many frames would be twice as many tokens, and four times the pairs in attention."


def loss_of(
    v: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    target: Callable[[Tensor, Tensor], Tensor] = lambda x0, noise: noise - x0,
    reversed_time: bool = False,
) -> Tensor:
    """Flow matching's squared errors [B, N], and those of ways to go wrong."""
    part = 1 - t[:, None] if reversed_time else t[:, None]
    return (v((1 - part) * x0 + part * noise, t) - target(x0, noise)).square()


@exercise("14.2")
def flow_matching_loss(answer: Any) -> str:
    """Mean of (v(x_t, t) - (noise - x0))^2 with x_t = (1 - t) x0 + t noise."""
    x0, noise = normal(3, 4, seed=1), normal(3, 4, seed=2)
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)

    def v(x: Tensor, t: Tensor) -> Tensor:
        return 0.7 * x + t[:, None]

    errors = loss_of(v, x0, noise, t)
    hints = [
        (
            loss_of(v, x0, noise, t, target=lambda x0, noise: x0 - noise).mean(),
            "Your velocity points from noise to picture. It is dx_t/dt, where t grows towards noise.",
        ),
        (
            loss_of(v, x0, noise, t, target=lambda x0, noise: noise).mean(),
            "The target is the velocity of the path, not the noise alone.",
        ),
        (
            loss_of(v, x0, noise, t, target=lambda x0, noise: x0).mean(),
            "The target is the velocity of the path, not the picture.",
        ),
        (
            loss_of(v, x0, noise, t, reversed_time=True).mean(),
            "At t = 0 your x_t is noise. Here t = 0 is the picture.",
        ),
        (errors.sum(), "Take the mean over everything, not the sum."),
        (errors.sum(1).mean(), "You summed over the pixels. Take the mean over them too."),
        (errors.mean().sqrt(), "The loss is the mean square. You took its root."),
        ((v(x0, t) - (noise - x0)).square().mean(), "v has to see x_t, the mix, and not the picture."),
        ((v(noise, t) - (noise - x0)).square().mean(), "v has to see x_t, the mix, and not the noise."),
    ]
    with given("v(x, t) = 0.7 x + t on three pictures of four pixels"):
        number(call(answer, v, x0, noise, t), errors.mean().item(), [(w.item(), hint) for w, hint in hints])
    return "Nothing in it knows of pictures: the same loss draws clips, sounds or molecules."


@exercise("14.3")
def what_noise_cannot_tell(answer: Any) -> str:
    """The variance of x0: the best guess at t = 1 is noise minus the mean of x0."""
    white = 1 / 5
    mean = 2 * white - 1
    number(
        answer,
        1 - mean**2,
        hints=[
            (0, "That would need a guess of x0 that is always right. At t = 1 nothing shows which it was."),
            (1, "That is the error of guessing x0 = 0. Black is likelier than white: there is a better one."),
            (2, "That is the error of a velocity of zero. But the noise is known."),
            (
                (1 - mean**2) ** 0.5,
                "That is a standard deviation, or the error of always guessing black. Guess better.",
            ),
            (-mean, "That is how far the mean lies from zero. Take the mean squared error of that guess."),
            (white * (1 - white), "Black is -1, not 0: the two pixels are 2 apart."),
        ],
    )
    return "It is the variance of the pictures: hence the loss near t = 1 that no model can take away."


@exercise("14.4")
def how_far_ahead(answer: Any) -> str:
    """The last token of 130's block of 64."""
    block, token = 64, 130
    first = token // block * block
    number(
        answer,
        first + block - 1,
        hints=[
            (token, "That is the token itself. All tokens of its block vote."),
            (first + block, "That is the first token of the next block."),
            (first, "That is the first token of its block. Which is the last?"),
            (first - 1, "That is the last token of the block before."),
            (token + block, "Blocks do not start at the token: they start at 0, 64, 128, ..."),
            (token + block - 1, "Blocks do not start at the token: they start at 0, 64, 128, ..."),
        ],
    )
    return "So the model would read dozens of words ahead while it trains, and none while it writes."
