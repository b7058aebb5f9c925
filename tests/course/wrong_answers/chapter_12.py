"""Answers that students give in chapter 12, and the hint that each must get."""

import torch


def energy(y2, n):
    return y2.unflatten(1, (n, -1)).sum(2)


def of_tokens(y2, n, k):
    """The mean of the tokens' shares."""
    return (energy(y2, n).topk(k).values.sum(1) / y2.sum(1)).mean()


def vote(y2, n, k):
    """The same clusters for all tokens."""
    return energy(y2, n).sum(0).topk(k).values.sum() / y2.sum()


def by_neuron(y2, n, k):
    chosen = y2.unflatten(1, (n, -1)).amax(2).topk(k).indices
    return energy(y2, n).gather(1, chosen).sum() / y2.sum()


def squared_again(y2, n, k):
    chosen = energy(y2.square(), n).topk(k).indices
    return energy(y2, n).gather(1, chosen).sum() / y2.sum()


def grow(fired, n, first_only=False, free_only=True, start=-1):
    together = fired.T.float() @ fired.float()
    neurons = fired.shape[1]
    labels = torch.full((neurons,), start)
    free = torch.ones(neurons, dtype=torch.bool)
    for cluster in range(n):
        members = [int(free.nonzero()[0])]
        while len(members) < neurons // n:
            score = together[members[:1] if first_only else members].sum(0)
            score[members] = -1
            if free_only:
                score[~free] = -1
            members.append(int(score.argmax()))
        labels[members] = cluster
        free[members] = False
    return labels


WRONG = [
    ("12.1", of_tokens, "You averaged the tokens' shares"),
    ("12.1", vote, "a vote of a block"),
    ("12.1", by_neuron, "by their largest neuron"),
    ("12.1", lambda y2, n, k: y2.topk(k * y2.shape[1] // n).values.sum() / y2.sum(), "single neurons"),
    ("12.1", lambda y2, n, k: energy(y2, n)[:, :k].sum() / y2.sum(), "the first clusters"),
    ("12.1", squared_again, "Do not square it again"),
    ("12.1", lambda y2, n, k: energy(y2, n).topk(k).values.sum(), "Divide it by the whole sum"),
    ("12.1", lambda y2, n, k: 100 * energy(y2, n).topk(k).values.sum() / y2.sum(), "in percent"),
    ("12.2", lambda fired, n: grow(fired, n, first_only=True), "with the first neuron alone"),
    ("12.2", lambda fired, n: grow(fired, n, free_only=False), "was taken again"),
    ("12.2", lambda fired, n: grow(fired, n, free_only=False, start=0), "was taken again"),
    ("12.2", lambda fired, n: torch.arange(fired.shape[1]) * n // fired.shape[1], "neighbours by number"),
    ("12.2", lambda fired, n: grow(fired.T, len(fired) // 4), "a label for each token"),
    ("12.2", lambda fired, n: [[0, 3, 5, 6], [1, 2, 4, 7]], "Return each neuron's cluster"),
    ("12.3", 0.75, "counts as 1"),
    ("12.3", 1 / 3, "That is 1 / v"),
    ("12.3", 8, "At which v are they level?"),
    ("12.4", 4, "all 32 clusters"),
    ("12.4", 1.0737, "in GB"),
    ("12.4", 2, "two bytes"),
    ("12.4", 0.125, "y3 itself"),
]
