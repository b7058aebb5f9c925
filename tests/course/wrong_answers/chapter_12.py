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


def together(fired):
    return fired.T.double() @ fired.double()


def cosine(fired):
    both = together(fired)
    return both / both.diagonal().outer(both.diagonal()).sqrt()


def jaccard(fired):
    silent = (~fired).double()
    return together(fired) / (len(fired) - silent.T @ silent)


def agreeing(fired):
    return together(fired) + together(~fired)


def add_up(rows):
    return rows.sum(0)


def grow(fired, n, near=together, join=add_up, free_only=True, start=-1, first=0, highest=False):
    """Greedy clusters; `join` makes one score of the rows of nearness of a cluster's members."""
    near, neurons = near(fired), fired.shape[1]
    labels = torch.full((neurons,), start)
    free = torch.ones(neurons, dtype=torch.bool)
    for cluster in range(n):
        members = [int(free.nonzero()[first])]
        while len(members) < neurons // n:
            score = join(near[members]).clone()
            score[members] = -9
            if free_only:
                score[~free] = -9
            best = (score == score.max()).nonzero().flatten()
            members.append(int(best[-1 if highest else 0]))
        labels[members] = cluster
        free[members] = False
    return labels


def in_parallel(fired, n):
    near = together(fired)
    clusters = [[neuron] for neuron in range(n)]
    while sum(map(len, clusters)) < fired.shape[1]:
        for members in clusters:
            score = near[members].sum(0)
            for taken in clusters:
                score[taken] = -1
            members.append(int(score.argmax()))
    labels = torch.empty(fired.shape[1], dtype=torch.long)
    for cluster, members in enumerate(clusters):
        labels[members] = cluster
    return labels


def too_small(fired, n):
    """Clusters of two neurons, the others left over."""
    labels = grow(fired, fired.shape[1] // 2)
    return torch.where(labels < n, labels, -1)


def swapped(fired, n):
    return n - 1 - grow(fired, n)


WRONG = [
    ("12.1", of_tokens, "You averaged the tokens' shares"),
    ("12.1", vote, "a vote of a block"),
    ("12.1", by_neuron, "by their largest neuron"),
    ("12.1", lambda y2, n, k: y2.topk(k * y2.shape[1] // n).values.sum() / y2.sum(), "single neurons"),
    ("12.1", lambda y2, n, k: energy(y2, n)[:, :k].sum() / y2.sum(), "the first clusters"),
    ("12.1", squared_again, "Do not square it again"),
    ("12.1", lambda y2, n, k: energy(y2, n).topk(k).values.sum(), "Divide it by the whole sum"),
    ("12.1", lambda y2, n, k: 100 * energy(y2, n).topk(k).values.sum() / y2.sum(), "in percent"),
    ("12.1", lambda y2, n, k: y2.unflatten(1, (-1, n)).sum(1).topk(k).values.sum() / y2.sum(), "not 0 and 4"),
    ("12.1", lambda y2, n, k: y2.topk(k).values.sum() / y2.sum(), "k is a number of clusters"),
    ("12.1", lambda y2, n, k: energy(y2, n).topk(2).values.sum() / y2.sum(), "k says how many"),
    ("12.1", lambda y2, n, k: energy(y2, 4).topk(k).values.sum() / y2.sum(), "n_clusters says how many"),
    ("12.1", lambda y2, n, k: energy(y2, 4).topk(2).values.sum() / y2.sum(), "n_clusters says how many"),
    ("12.1", lambda y2, n, k: energy(0 * y2, n).sum() / (0 * y2).sum(), "not a number (NaN)"),
    ("12.2", lambda fired, n: grow(fired, n, join=lambda rows: rows[0]), "with the first neuron alone"),
    ("12.2", lambda fired, n: grow(fired, n, join=lambda rows: rows.amax(0)), "the nearest member alone"),
    ("12.2", lambda fired, n: grow(fired, n, join=lambda rows: rows[-1]), "the newest member alone"),
    ("12.2", lambda fired, n: grow(fired, n, near=agreeing), "both are silent"),
    ("12.2", lambda fired, n: grow(fired, n, first=-1), "starts with the free neuron of the lowest number"),
    ("12.2", lambda fired, n: grow(fired, n, highest=True), "Of equally near neurons"),
    ("12.2", lambda fired, n: grow(fired, n, near=cosine), "Do not scale it"),
    ("12.2", lambda fired, n: grow(fired, n, near=jaccard), "Do not scale it"),
    ("12.2", lambda fired, n: grow(fired, n, near=lambda f: torch.corrcoef(f.T.double())), "Do not scale it"),
    ("12.2", in_parallel, "grow in parallel"),
    ("12.2", lambda fired, n: grow(fired, 2), "n_clusters is 3"),
    ("12.2", lambda fired, n: grow(fired, 3), "Neurons are left over"),
    ("12.2", too_small, "Neurons are left over"),
    ("12.2", swapped, "with other numbers"),
    ("12.2", lambda fired, n: grow(fired, n, free_only=False), "was taken again"),
    ("12.2", lambda fired, n: grow(fired, n, free_only=False, start=0), "was taken again"),
    ("12.2", lambda fired, n: torch.arange(fired.shape[1]) * n // fired.shape[1], "neighbours by number"),
    ("12.2", lambda fired, n: grow(fired.T, len(fired) // 4), "a label for each token"),
    ("12.2", lambda fired, n: [[0, 3, 5, 6], [1, 2, 4, 7]], "Return each neuron's cluster"),
    ("12.3", 0.75, "counts as 1"),
    ("12.3", 1 / 3, "That is 1 / v"),
    ("12.3", 8, "At which v are they level?"),
    ("12.3", 2.25, "asked is v"),
    ("12.3", 1.5, "product 1 in blocks too"),
    ("12.4", 4, "Four times too much"),
    ("12.4", 0.5, "the dense y2"),
    ("12.4", 1.0737, "in GB"),
    ("12.4", 2, "without dx"),
    ("12.4", 0.125, "y3 itself"),
]
