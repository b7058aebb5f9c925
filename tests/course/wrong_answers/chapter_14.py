"""Answers that students give in chapter 14, and the hint that each must get."""


def mixed(x0, noise, t):
    return x0 + t[:, None] * (noise - x0)


def squares(v, x0, noise, t):
    return (v(mixed(x0, noise, t), t) - noise + x0) ** 2


def to_the_picture(v, x0, noise, t):
    return ((v(mixed(x0, noise, t), t) + noise - x0) ** 2).mean()


def time_reversed(v, x0, noise, t):
    return ((v(mixed(noise, x0, t), t) - noise + x0) ** 2).mean()


WRONG = [
    ("14.1", 1024, "reaches over two frames"),
    ("14.1", 64, "patches of one picture"),
    ("14.1", 128, "numbers in one patch"),
    ("14.1", 65536, "Those are the pixels"),
    ("14.2", to_the_picture, "points from noise to picture"),
    ("14.2", time_reversed, "t = 0 is the picture"),
    (
        "14.2",
        lambda v, x0, noise, t: ((v(mixed(x0, noise, t), t) - noise) ** 2).mean(),
        "not the noise alone",
    ),
    ("14.2", lambda v, x0, noise, t: ((v(mixed(x0, noise, t), t) - x0) ** 2).mean(), "not the picture"),
    ("14.2", lambda *given: squares(*given).sum(), "not the sum"),
    ("14.2", lambda *given: squares(*given).sum(1).mean(), "summed over the pixels"),
    ("14.2", lambda *given: squares(*given).mean() ** 0.5, "You took its root"),
    ("14.2", lambda v, x0, noise, t: ((v(x0, t) - noise + x0) ** 2).mean(), "and not the picture"),
    ("14.2", lambda v, x0, noise, t: ((v(noise, t) - noise + x0) ** 2).mean(), "and not the noise"),
    ("14.3", 0, "always right"),
    ("14.3", 1, "guessing x0 = 0"),
    ("14.3", 2, "a velocity of zero"),
    ("14.3", 0.8, "standard deviation"),
    ("14.3", 0.6, "how far the mean lies"),
    ("14.3", 0.16, "2 apart"),
    ("14.4", 130, "the token itself"),
    ("14.4", 192, "the next block"),
    ("14.4", 128, "first token of its block"),
    ("14.4", 127, "the block before"),
    ("14.4", 194, "do not start at the token"),
    ("14.4", 193, "do not start at the token"),
]
