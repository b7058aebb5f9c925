"""What the tests of lab L3 call: each function takes an answer, tries it, and names its mistake."""

import marking
import torch
from marking import NotYet, right, show

__all__ = ["HIDDEN", "SHOWN", "integers", "leaks", "right", "route", "sort_neurons", "sort_tokens"]
SAYS = {"dot": "the largest dot products", "l2": "the nearest means", "cosine": "the smallest angles"}


def integers(seed, *shape, high=3):
    """Whole numbers from -high to high: scores of them are exact, and often equal."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-high, high + 1, shape, generator=draw).float()


def route(answer, x, means, top_k, metric):
    """Task 1: right if the scores fall, and no cluster that was left out has a larger one."""
    got = marking.run(answer, x, means, top_k, metric)
    marking.shaped("The result of route", got, (len(x), top_k))
    _integers("The result of route", got)
    if got.min() < 0 or got.max() >= len(means):
        raise NotYet(f"route names cluster {int(got.max())}. The clusters are 0 to {len(means) - 1}.")
    scores = {name: _affinity(x, means, name) for name in SAYS}
    if _best(got, scores[metric]):
        return
    asked = f'With metric="{metric}" route'
    if _best(got, -scores[metric]):
        worst = {"l2": "the farthest means", "dot": "the smallest dot products"}[metric]
        raise NotYet(f"{asked} chooses {worst}. It should choose {SAYS[metric]}.")
    for other in SAYS:
        if other != metric and _best(got, scores[other]):
            raise NotYet(f"{asked} chooses {SAYS[other]}. It should choose {SAYS[metric]}.")
    bad = next(t for t in range(len(x)) if not _best(got[t : t + 1], scores[metric][t : t + 1]))
    chosen, row = got[bad].tolist(), scores[metric][bad]
    where = f"{asked} gives token {bad}, {show(x[bad])}, the clusters {chosen}."
    what, values = ("squared distances", -row) if metric == "l2" else ("dot products", row)
    where += f" The {what} to all means are {show(values)}."
    if len(set(chosen)) < top_k:
        raise NotYet(f"{where} A cluster stands there twice.")
    if sorted(row[chosen].tolist()) == sorted(row.tolist())[-top_k:]:
        if row[chosen].tolist() == sorted(row[chosen].tolist(), reverse=True):
            raise NotYet(f"{where} Of equal ones the lower cluster number counts first.")
        raise NotYet(f"{where} These are the right ones, but the best should stand first.")
    raise NotYet(f"{where} It should choose {SAYS[metric]}.")


def sort_neurons(answer, w1, w2, labels):
    """Task 2."""
    parts = ("the new w1", "the new w2", "order", "inverse")
    new1, new2, order, inverse = _several("sort_neurons", marking.run(answer, w1, w2, labels), parts)
    places = list(range(len(labels)))
    for name, value in (("order", order), ("inverse", inverse)):
        marking.shaped(name, value, labels.shape)
        _integers(name, value)
        if sorted(value.tolist()) != places:
            raise NotYet(
                f"{name} is {_short(value)}. Each number from 0 to {len(labels) - 1} should be in it once."
            )
    in_order = labels[order]
    if (in_order.diff() < 0).any():
        swapped = " Are order and inverse exchanged?" if (labels[inverse].diff() >= 0).all() else ""
        raise NotYet(
            f"labels[order] is {_short(in_order)}. Cluster 0 should stand first, then cluster 1, and so on. "
            f"order[i] says which old neuron comes to place i.{swapped}"
        )
    if ((in_order.diff() == 0) & (order.diff() < 0)).any():
        raise NotYet(
            f"order is {_short(order)}. Inside a cluster the neurons should keep their order. "
            "(`argsort(stable=True)` does so.)"
        )
    if inverse[order].tolist() != places:
        again = " It is the same as order: that undoes a permutation only by luck." * inverse.equal(order)
        raise NotYet(f"inverse[order] is {_short(inverse[order])}. It should be 0, 1, 2, and so on.{again}")
    back = "is sorted by inverse. It should be sorted by order."
    hints = [(w1, "The new w1 is the old one."), (w1[:, inverse], f"The new w1 {back}")]
    marking.equal("The new w1", new1, w1[:, order], hints)
    hints = [
        (
            w2,
            "The new w2 is the old one. Neuron f is column f of w1 and row f of w2: both must move.",
        ),
        (w2[inverse], f"The new w2 {back}"),
    ]
    marking.equal("The new w2", new2, w2[order], hints)


def sort_tokens(answer, clusters, n):
    """Task 3: right if each list holds tokens that chose its cluster, in order, and no choice is missing."""
    parts = ("tokens", "offsets", "inverse")
    tokens, offsets, inverse = _several("sort_tokens", marking.run(answer, clusters, n), parts)
    count, k = clusters.shape
    if isinstance(offsets, torch.Tensor) and offsets.shape == (n,):
        raise NotYet(
            f"offsets has {n} entries, one for each cluster. It needs {n + 1}: a 0 at the beginning, and the "
            "length of `tokens` at the end."
        )
    if isinstance(offsets, torch.Tensor) and len(offsets) < n:
        raise NotYet(
            f"offsets has {len(offsets)} entries for {n} clusters. A cluster that nobody chose has an empty "
            "list: it needs an entry, too."
        )
    marking.shaped("offsets", offsets, (n + 1,))
    marking.shaped("tokens", tokens, (count * k,))
    marking.shaped("inverse", inverse, (count, k))
    for name, value in zip(parts, (tokens, offsets, inverse)):
        _integers(name, value)
    if tokens.max() >= count:
        raise NotYet(
            f"tokens holds {int(tokens.max())}, but there are only {count} tokens. Place p of the flattened "
            f"choices belongs to token p // k, here p // {k}."
        )
    if offsets[0] != 0 or offsets[-1] != count * k or (offsets.diff() < 0).any():
        raise NotYet(
            f"offsets is {_short(offsets)}. It should rise from 0 to {count * k}, the length of tokens."
        )
    chose = clusters.tolist()
    for e, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        members = tokens[begin:end].tolist()
        where = f"The list of cluster {e}, tokens[{begin}:{end}], is {_short(members)}."
        stranger = next((t for t in members if e not in chose[t]), None)
        if stranger is not None:
            raise NotYet(f"{where} But token {stranger} chose {chose[stranger]}.")
        if members != sorted(members):
            raise NotYet(
                f"{where} Inside a list tokens should keep their order. (`argsort(stable=True)` does so.)"
            )
        if len(set(members)) < len(members):
            raise NotYet(f"{where} A token stands there twice.")
    if inverse.min() < 0 or inverse.max() >= count * k:
        raise NotYet(f"inverse holds {int(inverse.max())}. Places in tokens are 0 to {count * k - 1}.")
    for t in range(count):
        for j, place in enumerate(inverse[t].tolist()):
            c = chose[t][j]
            if tokens[place] != t:
                raise NotYet(
                    f"inverse[{t}, {j}] is {place}, but tokens[{place}] is {int(tokens[place])}, not {t}. "
                    "`inverse` says where in `tokens` each choice has gone."
                )
            if not offsets[c] <= place < offsets[c + 1]:
                raise NotYet(
                    f"inverse[{t}, {j}] is {place}, which is not in the list of cluster {c} that was chosen."
                )


def leaks(answer, names, seed):
    """Task 4: the test must accuse the routers that leak, and no other."""
    draw = torch.Generator().manual_seed(seed)
    x, means = torch.randn(14, 8, generator=draw), torch.randn(4, 8, generator=draw)
    for name in names:
        make, guilty, reads, hint = ROUTERS[name]
        got = marking.run(answer, make(means), x)
        if not isinstance(got, bool) and not (isinstance(got, torch.Tensor) and got.numel() == 1):
            raise NotYet(f"leaks returns a {type(got).__name__}. It should return True or False.")
        if bool(got) != guilty:
            raise NotYet(f"leaks says {bool(got)} for a router that {reads}. It should say {guilty}. {hint}")


def _affinity(x, means, metric):
    """[T, n], the larger the closer."""
    if metric == "cosine":
        return torch.cosine_similarity(x[:, None], means[None], dim=2)
    if metric == "dot":
        return (x[:, None] * means).sum(2)
    return -(x[:, None] - means).square().sum(2)


def _best(got, scores):
    """True if each row of `got` names the largest scores, largest first, then the lower number first."""
    for chosen, row in zip(got.tolist(), scores.tolist()):
        keys = [(row[c], -c) for c in chosen]
        others = [(score, -c) for c, score in enumerate(row) if c not in chosen]
        if keys != sorted(set(keys), reverse=True) or (others and max(others) > keys[-1]):
            return False
    return True


def _integers(name, value):
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise NotYet(f"{name} is a tensor of {value.dtype}. It should hold integers.")


def _short(values):
    """The beginning of a list, as text."""
    values = list(map(int, values))
    return str(values) if len(values) <= 12 else str(values[:12])[:-1] + ", ...]"


def _several(name, got, parts):
    if not isinstance(got, tuple | list) or len(got) != len(parts):
        what = f"{len(got)} values" if isinstance(got, tuple | list) else f"one {type(got).__name__}"
        raise NotYet(f"{name} returns {what}. It should return {len(parts)}: {', '.join(parts)}.")
    return got


def _two_nearest(scores):
    return scores.topk(2, dim=1).indices


def by_token(means):
    """A router that reads each token alone."""
    return lambda x: _two_nearest(x @ means.T)


def by_past(means):
    """Reads the mean of all tokens up to this one."""

    def choose(x):
        so_far = torch.arange(1, len(x) + 1).unsqueeze(1)
        return _two_nearest(x.cumsum(0) / so_far @ means.T)

    return choose


def by_place(means):
    """Reads where a token stands, and not what it is."""
    return lambda x: torch.stack(
        [torch.arange(len(x)) % len(means), (torch.arange(len(x)) + 1) % len(means)], 1
    )


def by_block(means):
    """Blocks of four tokens vote together; the last block may be shorter."""

    def choose(x):
        votes = [block.sum(0, keepdim=True).expand(len(block), -1) for block in x.split(4)]
        return _two_nearest(torch.cat(votes) @ means.T)

    return choose


def by_first_block(means):
    """The first four tokens vote together, each later one is alone."""
    return lambda x: _two_nearest(
        torch.cat([x[:4].sum(0, keepdim=True).expand(len(x[:4]), -1), x[4:]]) @ means.T
    )


def by_next(means):
    """Reads the token that comes next."""
    return lambda x: _two_nearest(torch.cat([x[1:], x[-1:]]) @ means.T)


def by_centred(means):
    """Subtracts the mean of the whole text first."""
    return lambda x: _two_nearest((x - x.mean(0)) @ means.T)


def by_capacity(means):
    """A cluster is first choice of half of the tokens at most: those with the largest scores."""

    def choose(x):
        scores = x @ means.T
        rank = scores.argsort(0, descending=True).argsort(0)
        return _two_nearest(scores - 1000.0 * (rank >= len(x) // 2))

    return choose


ALLOWED = "Earlier tokens may be read: only look at places before the one that you change."
ROUTERS = {  # name -> (router, does it leak, what it does, what to try)
    "token": (by_token, False, "looks at each token alone", ALLOWED),
    "past": (by_past, False, "takes the mean of all tokens up to this one", ALLOWED),
    "place": (by_place, False, "looks only at where a token stands", "Nothing moves when tokens change."),
    "block": (
        by_block,
        True,
        "lets each block of four tokens vote",
        "The last token of a block moves the first one. Compare all places before the one that you change.",
    ),
    "first block": (
        by_first_block,
        True,
        "lets the first four tokens vote together",
        "Later changes show nothing here: change the token at every place, one after the other.",
    ),
    "next": (
        by_next,
        True,
        "looks at the next token",
        "Only the place just before the changed token moves. Compare all places before it.",
    ),
    "centred": (
        by_centred,
        True,
        "subtracts the mean of the whole text",
        "Each token moves the mean a little. Change a token by much, and look at all places before it.",
    ),
    "capacity": (
        by_capacity,
        True,
        "lets a full cluster turn away the tokens with the smallest scores",
        "A later token with a larger score takes the place of an earlier one. Try large changes everywhere.",
    ),
}
SHOWN = ("token", "past", "block", "next")
HIDDEN = ("place", "first block", "centred", "capacity")
