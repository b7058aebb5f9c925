"""Lab L3 answered wrongly: by the package, and by the mistakes that are often made."""

IMPORTED = {
    "route": """
from replicate.router import route as theirs

def route(x, means, top_k, metric):
    return theirs(x, means, top_k, metric=metric)
""",
    "neurons": """
from replicate import router

def sort_neurons(w1, w2, labels):
    lists = router.token_permutation(labels[:, None], int(labels.max()) + 1)
    return w1[:, lists.tokens], w2[lists.tokens], lists.tokens, lists.inverse[:, 0]
""",
    "tokens": """
def sort_tokens(clusters, n):
    from replicate.router import token_permutation

    return tuple(token_permutation(clusters, n))
""",
    "leaks": """
from replicate.sparsity import flip_rate

def leaks(choose, x):
    before = choose(x)
    for t in range(1, len(x)):
        changed = x.clone()
        changed[t] = 100 * torch.randn(x.shape[1])
        if flip_rate(choose(changed)[:t] > 0, before[:t] > 0) or not choose(changed)[:t].equal(before[:t]):
            return True
    return False
""",
}

LEAKS = """
def leaks(choose, x):
    before = choose(x)
    for t in range({begin}, {end}):
        changed = x.clone()
        changed[t] = {new}
        if not choose(changed)[{look}].equal(before[{look}]):
            return {found}
    return {not_found}
"""


def leaks(begin=1, end="len(x)", new="100 * torch.randn(x.shape[1])", look=":t", found=True):
    """A test of each token with one change."""
    return LEAKS.format(begin=begin, end=end, new=new, look=look, found=found, not_found=not found)


WRONG = {
    "dot for both": (
        "route",
        """
def route(x, means, top_k, metric):
    return (x @ means.T).argsort(dim=1, descending=True, stable=True)[:, :top_k]
""",
        'With metric="l2" route chooses the largest dot products. It should choose the nearest means',
    ),
    "the farthest": (
        "route",
        """
def route(x, means, top_k, metric):
    scores = x @ means.T if metric == "dot" else (x[:, None] - means).square().sum(2)
    return scores.argsort(dim=1, descending=True, stable=True)[:, :top_k]
""",
        'With metric="l2" route chooses the farthest means',
    ),
    "the worst first": (
        "route",
        """
def route(x, means, top_k, metric):
    scores = x @ means.T if metric == "dot" else -(x[:, None] - means).square().sum(2)
    return scores.argsort(dim=1, descending=True, stable=True)[:, :top_k].flip(1)
""",
        "These are the right ones, but the best should stand first",
    ),
    "the last of equal ones": (
        "route",
        """
def route(x, means, top_k, metric):
    scores = x @ means.T if metric == "dot" else -(x[:, None] - means).square().sum(2)
    return scores.argsort(dim=1, stable=True).flip(1)[:, :top_k]
""",
        "Of equal ones the lower cluster number counts first",
    ),
    "any of equal ones": (
        "route",
        """
def route(x, means, top_k, metric):
    scores = x @ means.T if metric == "dot" else -(x[:, None] - means).square().sum(2)
    return scores.argsort(dim=1, descending=True)[:, :top_k]
""",
        "Of equal ones the lower cluster number counts first",
    ),
    "scores, no numbers": (
        "route",
        """
def route(x, means, top_k, metric):
    scores = x @ means.T if metric == "dot" else -(x[:, None] - means).square().sum(2)
    return scores.sort(dim=1, descending=True).values[:, :top_k]
""",
        "It should hold integers",
    ),
    "w2 stays": (
        "neurons",
        """
def sort_neurons(w1, w2, labels):
    order = labels.argsort(stable=True)
    return w1[:, order], w2, order, order.argsort()
""",
        "both must move",
    ),
    "inverse is order": (
        "neurons",
        """
def sort_neurons(w1, w2, labels):
    order = labels.argsort(stable=True)
    return w1[:, order], w2[order], order, order
""",
        "That is the sort order; you need its inverse",
    ),
    "neurons of a cluster in any order": (
        "neurons",
        """
def sort_neurons(w1, w2, labels):
    order = labels.argsort()
    return w1[:, order], w2[order], order, order.argsort()
""",
        "Inside a cluster the neurons should keep their order",
    ),
    "order and inverse exchanged": (
        "neurons",
        """
def sort_neurons(w1, w2, labels):
    order = labels.argsort(stable=True)
    return w1[:, order], w2[order], order.argsort(), order
""",
        "Are order and inverse exchanged?",
    ),
    "places for tokens": (
        "tokens",
        """
def sort_tokens(clusters, n):
    order = clusters.flatten().argsort(stable=True)
    ends = torch.bincount(clusters.flatten(), minlength=n).cumsum(0)
    return order, torch.cat([ends[:1] * 0, ends]), order.argsort().view_as(clusters)
""",
        "tokens holds 5, but there are only 3 tokens",
    ),
    "the number of the choice": (
        "tokens",
        """
def sort_tokens(clusters, n):
    order = clusters.flatten().argsort(stable=True)
    ends = torch.bincount(clusters.flatten(), minlength=n).cumsum(0)
    return order % clusters.shape[1], torch.cat([ends[:1] * 0, ends]), order.argsort().view_as(clusters)
""",
        "tokens holds p % k, which choice of a token it is",
    ),
    "the choices in columns": (
        "tokens",
        """
def sort_tokens(clusters, n):
    row = clusters.T.flatten()
    order = row.argsort(stable=True)
    ends = torch.bincount(row, minlength=n).cumsum(0)
    return order % len(clusters), torch.cat([ends[:1] * 0, ends]), order.argsort().view_as(clusters)
""",
        "it looks like `clusters.T.flatten()`",
    ),
    "tokens in any order": (
        "tokens",
        """
def sort_tokens(clusters, n):
    order = clusters.flatten().argsort()
    ends = torch.bincount(clusters.flatten(), minlength=n).cumsum(0)
    return order // clusters.shape[1], torch.cat([ends[:1] * 0, ends]), order.argsort().view_as(clusters)
""",
        "Inside a list tokens should keep their order",
    ),
    "no zero at the beginning": (
        "tokens",
        """
def sort_tokens(clusters, n):
    order = clusters.flatten().argsort(stable=True)
    ends = torch.bincount(clusters.flatten(), minlength=n).cumsum(0)
    return order // clusters.shape[1], ends, order.argsort().view_as(clusters)
""",
        "a 0 at the beginning",
    ),
    "empty clusters are missing": (
        "tokens",
        """
def sort_tokens(clusters, n):
    order = clusters.flatten().argsort(stable=True)
    ends = torch.bincount(clusters.flatten()).cumsum(0)
    return order // clusters.shape[1], torch.cat([ends[:1] * 0, ends]), order.argsort().view_as(clusters)
""",
        "A cluster that nobody chose has an empty list",
    ),
    "order for inverse": (
        "tokens",
        """
def sort_tokens(clusters, n):
    order = clusters.flatten().argsort(stable=True)
    ends = torch.bincount(clusters.flatten(), minlength=n).cumsum(0)
    return order // clusters.shape[1], torch.cat([ends[:1] * 0, ends]), order.view_as(clusters)
""",
        "inverse is the sort order",
    ),
    "the order is lost": (
        "tokens",
        """
def sort_tokens(clusters, n):
    order = clusters.flatten().flip(0).argsort(stable=True)
    order = clusters.numel() - 1 - order
    ends = torch.bincount(clusters.flatten(), minlength=n).cumsum(0)
    return order // clusters.shape[1], torch.cat([ends[:1] * 0, ends]), order.argsort().view_as(clusters)
""",
        "Inside a list tokens should keep their order",
    ),
    "every change counts": (
        "leaks",
        """
def leaks(choose, x):
    for t in range(len(x)):
        changed = x.clone()
        changed[t] = 100 * torch.randn(x.shape[1])
        if not choose(changed).equal(choose(x)):
            return True
    return False
""",
        "a router that looks at each token alone. It should say False",
    ),
    "all other places": (
        "leaks",
        """
def leaks(choose, x):
    for t in range(len(x)):
        changed = x.clone()
        changed[t] = 100 * torch.randn(x.shape[1])
        others = torch.arange(len(x)) != t
        if not choose(changed)[others].equal(choose(x)[others]):
            return True
    return False
""",
        "Earlier tokens may be read",
    ),
    "only the first place": (
        "leaks",
        """
def leaks(choose, x):
    changed = x.clone()
    changed[-1] = 100 * torch.randn(x.shape[1])
    return not choose(changed)[0].equal(choose(x)[0])
""",
        "You change only token 13",
    ),
    "only the last token": (
        "leaks",
        """
def leaks(choose, x):
    changed = x.clone()
    changed[-1] = 100 * torch.randn(x.shape[1])
    return not choose(changed)[:-1].equal(choose(x)[:-1])
""",
        "You change only token 13. A leak may be anywhere",
    ),
    "a small step": (
        "leaks",
        leaks(new="x[t] + 0.01"),
        "Your largest change was 0.01, the same for all entries",
    ),
    "small random steps": (
        "leaks",
        leaks(new="x[t] + 0.001 * torch.randn(x.shape[1]).clamp(-1, 1)"),
        "Your largest change was 0.001",
    ),
    "scaling keeps the choice": (
        "leaks",
        leaks(new="1000 * x[t]"),
        "You only scaled the token. A router may ignore its length: try another direction",
    ),
    "zeros": ("leaks", leaks(new="0"), "You only set tokens to zero"),
    "one step of the last token": ("leaks", leaks(begin="len(x) - 1", new="x[t] + 1"), "only token 13"),
    "random numbers of size 1": (
        "leaks",
        leaks(new="torch.randn(x.shape[1])"),
        "It should say True. Your largest change was",
    ),
    "the last token is never changed": ("leaks", leaks(end="len(x) - 1"), "You never change token 13"),
    "the second token is never changed": ("leaks", leaks(begin=2), "You never change token 1"),
    "only the place before": (
        "leaks",
        leaks(look="t - 1 : t"),
        "When you changed token 8, the choice of token 5 moved, and leaks did not see it",
    ),
    "exchanged": (
        "leaks",
        leaks(new="1000 * torch.randn(x.shape[1])", found=False),
        "All answers of leaks are exchanged",
    ),
    "only cut off": (
        "leaks",
        """
def leaks(choose, x):
    return any(not choose(x[:t]).equal(choose(x)[:t]) for t in range(1, len(x)))
""",
        "You only cut the text off",
    ),
    "changes pile up": (
        "leaks",
        """
def leaks(choose, x):
    changed, before = x.clone(), choose(x)
    for t in range(1, len(x)):
        changed[t] = 1000 * torch.randn(x.shape[1])
        if not choose(changed)[:1].equal(before[:1]):
            return True
    return False
""",
        "changes pile up",
    ),
    "the text itself is changed": (
        "leaks",
        """
def leaks(choose, x):
    before = choose(x)
    for t in range(1, len(x)):
        x[t] = 100 * torch.randn(x.shape[1])
        if not choose(x)[:t].equal(before[:t]):
            return True
    return False
""",
        "changes its argument number 2 in place",
    ),
}
