"""Typical wrong answers to the exercises of chapter 03, and what their hints must say."""


def squared_relu(slope, activation=lambda y: y.relu() ** 2):
    return lambda y1, dy2: (activation(y1), dy2 * slope(y1))


def kept(y1, key=lambda y: y.relu() ** 2, energy=lambda y: y.relu() ** 2):
    two = key(y1).topk(2, 1).indices
    return energy(y1).gather(1, two).sum() / energy(y1).sum()


def mean_of_shares(y1):
    y2 = y1.relu() ** 2
    return (y2.topk(2, 1).values.sum(1) / y2.sum(1)).mean()


def kept_by_group_then_mean(y1):
    """Right where no group is silent: weights each group's share by its energy."""
    y2 = y1.relu() ** 2
    shares = y2.topk(2, 1).values.sum(1) / y2.sum(1)
    return (shares * y2.sum(1)).sum() / y2.sum()


WRONG = [
    ("03.1", squared_relu(lambda y: y.relu()), "The factor 2 is missing"),
    ("03.1", squared_relu(lambda y: y > 0), "the gradient of relu"),
    ("03.1", squared_relu(lambda y: 2 * y), "where y1 is negative"),
    ("03.1", squared_relu(lambda y: 2 * y.relu(), lambda y: y**2), "take relu first"),
    ("03.1", lambda y1, dy2: (y1.relu() ** 2, 2 * y1.relu()), "comes from above"),
    ("03.1", lambda y1, dy2: 2 * y1.relu() * dy2, "Return two tensors"),
    ("03.2", lambda w1, w2, c: (c * w1, w2 / c), "grows with the square"),
    ("03.2", lambda w1, w2, c: (c * w1, w2 * c**2), "must become smaller"),
    ("03.2", lambda w1, w2, c: (c * w1, w2), "the output grows"),
    ("03.2", lambda w1, w2, c: (w1, w2 / c**2), "It is unchanged"),
    ("03.3", 4, "Take both"),
    ("03.3", 1, "do not cancel"),
    ("03.3", 1 / 16, "Turned around"),
    ("03.3", 2, "grows with the square"),
    ("03.4", 0.0256, "exactly three"),
    ("03.4", 0.008, "There are 4 ways"),
    ("03.4", 0.1808, "Two firing neurons both survive"),
    ("03.4", 0.3125, "the new model"),
    ("03.4", 2.72, "in percent"),
    ("03.5", lambda y1: kept(y1, key=lambda y: y.abs()), "Compare y2"),
    ("03.5", mean_of_shares, "Divide sum by sum"),
    ("03.5", kept_by_group_then_mean, "0/0"),
    ("03.5", lambda y1: kept(y1, energy=lambda y: y.relu() ** 4), "once more"),
    ("03.5", lambda y1: 1 - kept(y1), "the share that is lost"),
    ("03.4", 0.0625, "does not shrink in proportion"),
    ("03.4", 0.125, "does not shrink in proportion"),
]
