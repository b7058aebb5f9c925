"""Typical wrong answers to the exercises of chapter 05, and what their hints must say."""

import torch


def ties_to_the_higher(x, means, k):
    scores = (x @ means.T).flip(1)
    return len(means) - 1 - scores.argsort(dim=1, descending=True, stable=True)[:, :k]


def sort_tokens(clusters, n, stable=True, whose=lambda order, k: order // k):
    flat = clusters.flatten()
    order = flat.argsort(stable=True) if stable else len(flat) - 1 - flat.flip(0).argsort(stable=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(flat, minlength=n).cumsum(0)])
    return whose(order, clusters.shape[1]), offsets


def with_offsets(change):
    def sort(clusters, n):
        tokens, offsets = sort_tokens(clusters, n)
        return tokens, change(offsets)

    return sort


def without_empty(clusters, n):
    counts = torch.bincount(clusters.flatten())
    return sort_tokens(clusters, n)[0], torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def first_choices_first(clusters, n):
    return sort_tokens(clusters.T, n, whose=lambda order, _: order % len(clusters))


def tester(
    which=lambda n: range(1, n), change=lambda token: 100 * token.roll(1), compared=None, tolerance=1e-5
):
    """A test of causality: the tokens it changes, how, and the outputs it compares."""
    compared = compared or (lambda y, t: y[:t])

    def leaks(layer, x):
        before = layer(x)
        for t in which(len(x)):
            changed = x.clone()
            changed[t] = change(x[t])
            difference = compared(layer(changed), t) - compared(before, t)
            if difference.numel() and difference.abs().max() > tolerance:
                return True
        return False

    return leaks


def forgets_to_copy(layer, x):
    changed = x
    changed[-1] = 100 * x[-1].roll(1)
    return not torch.allclose(layer(changed)[:-1], layer(x)[:-1])


def leaves_out(layer, x):
    return any(not torch.allclose(layer(x[:t]), layer(x)[:t], atol=1e-5) for t in range(1, len(x)))


def second_half(layer, x):
    changed = x.clone()
    half = len(x) // 2
    changed[half:] = 100 * x[half:].roll(1, 1)
    return not torch.allclose(layer(changed)[:half], layer(x)[:half], atol=1e-5)


def in_place(layer, x):
    before = layer(x)
    for t in range(1, len(x)):
        x[t:] += 100 * x[t:].roll(1, 1)
        if not torch.allclose(layer(x)[:t], before[:t], atol=1e-5):
            return True
    return False


def says_true_after_all(layer, x):
    return layer(x).shape == x.shape


def by_gradient(layer, x):
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        y = layer(x)
    for t in range(len(x)):
        slope = torch.autograd.grad(y[t].sum(), x, retain_graph=True)[0]
        if slope[t + 1 :].abs().sum() > 1e-2:
            return True
    return False


WRONG = [
    ("05.1", lambda x, means, k: (x @ means.T).argsort(dim=1)[:, :k], "smallest scores"),
    ("05.1", lambda x, means, k: torch.cdist(x, means).argsort(dim=1)[:, :k], "nearest means"),
    ("05.1", lambda x, means, k: (x @ means.T).softmax(1), "weights for all clusters"),
    ("05.1", lambda x, means, k: (x @ means.T).topk(k, 1).values, "the best scores"),
    ("05.1", lambda x, means, k: (x @ means.T).argsort(dim=0, descending=True)[:k], "clusters choose tokens"),
    ("05.1", ties_to_the_higher, "Of equal scores the lower number"),
    ("05.2", ([1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]), "equally long"),
    ("05.2", ([2.0, 0.0], [[1.0, 0.0], [2.0, 0.0]]), "Make it longer still"),
    ("05.2", ([1.0, 0.0], [[1.0, 0.0], [-2.0, 0.0]]), "Both choose the shorter mean"),
    ("05.2", ([1.0, 0.0], [[0.0, 1.0], [0.0, 3.0]]), "Two of them are equal"),
    ("05.2", ([1.0, 0.0], [1.0, 0.0]), "means is [2, D]"),
    (
        "05.3",
        lambda clusters, n: sort_tokens(clusters, n, whose=lambda order, k: order),
        "number the choices",
    ),
    ("05.3", lambda clusters, n: sort_tokens(clusters[:, :1], n), "the first choice alone"),
    ("05.3", lambda clusters, n: sort_tokens(clusters, n, stable=False), "order of the text"),
    ("05.3", first_choices_first, "First choices come before"),
    ("05.3", with_offsets(torch.diff), "Add them up"),
    ("05.3", with_offsets(lambda offsets: offsets[1:]), "begin with 0"),
    ("05.3", without_empty, "minlength"),
    ("05.3", lambda clusters, n: (clusters.flatten().sort().values, None), "cluster numbers"),
    ("05.3", lambda clusters, n: sort_tokens(clusters, n)[0], "Return two tensors"),
    ("05.4", 0.125, "That is the router's"),
    ("05.4", 1.125, "Two dense products are 2"),
    ("05.4", 0.53125, "Leave it out"),
    ("05.4", 0.4375, "the share that is saved"),
    ("05.5", tester(compared=lambda y, t: y), "own output may move"),
    ("05.5", tester(compared=lambda y, t: torch.cat([y[:t], y[t + 1 :]])), "Outputs after the changed token"),
    ("05.5", tester(tolerance=0), "allow a small difference"),
    ("05.5", tester(change=lambda token: token + 1e-2), "Make the changed token loud"),
    ("05.5", tester(which=lambda n: [n - 1]), "change each in turn"),
    ("05.5", tester(which=lambda n: [0]), "You change the first token"),
    ("05.5", tester(change=lambda token: 100 * token), "another direction"),
    ("05.5", tester(change=lambda token: token + 100), "another direction"),
    ("05.5", forgets_to_copy, "Change a copy"),
    ("05.5", leaves_out, "You leave tokens out"),
    ("05.5", second_half, "Change one at a time"),
    ("05.5", lambda layer, x: layer(x), "Return True or False"),
    ("05.1", lambda x, means, k: (x @ means.T).abs().topk(k, 1).indices, "no abs"),
    (
        "05.1",
        lambda x, means, k: (x @ means.T).abs().argsort(dim=1, descending=True, stable=True)[:, :k],
        "no abs",
    ),
    (
        "05.3",
        lambda clusters, n: sort_tokens(clusters, n, whose=lambda order, _: order % len(clusters)),
        "number // k",
    ),
    ("05.4", 1 / 64, "shares do not multiply"),
    ("05.5", lambda layer, x: True, "You always answer True"),
    ("05.5", says_true_after_all, "You always answer True"),
    ("05.5", lambda layer, x: False, "You always answer False"),
    ("05.5", in_place, "You changed x itself"),
    ("05.5", by_gradient, "A gradient cannot see a choice"),
    ("05.5", lambda layer, x: not tester()(layer, x), "the other way round"),
]
