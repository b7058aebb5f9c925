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
    if len(values) > 12:
        values, which = values[chosen], "these"
    else:
        which = "all means"
    where += f" The {what} to {which} are {show(values)}."
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
        if inverse.equal(order):
            raise NotYet(
                "inverse is the same as order. That is the sort order; you need its inverse: `inverse[f]` is "
                "the place to which neuron f has gone."
            )
        raise NotYet(f"inverse[order] is {_short(inverse[order])}. It should be 0, 1, 2, and so on.")
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
    _name_the_row(tokens, clusters)
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
    chose, order = clusters.tolist(), clusters.flatten().argsort(stable=True)
    for c, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        members = tokens[begin:end].tolist()
        where = f"The list of cluster {c}, tokens[{begin}:{end}], is {_short(members)}."
        stranger = next((t for t in members if c not in chose[t]), None)
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
    if inverse.flatten().tolist() == order.tolist() != order.argsort().tolist():
        raise NotYet(
            "inverse is the sort order: place i of `tokens` came from place order[i] of the row. You need "
            "its inverse: it says where in `tokens` each choice has gone."
        )
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


def _name_the_row(tokens, clusters):
    """Raises NotYet if the tokens fit a row of choices that was read in a wrong way."""
    (count, k), row = clusters.shape, clusters.T.flatten()
    order, other = clusters.flatten().argsort(stable=True), row.argsort(stable=True)
    if k > 1 and count > 1 and tokens.tolist() != (order // k).tolist():
        if tokens.tolist() == (order % k).tolist():
            raise NotYet(
                "tokens holds p % k, which choice of a token it is. Place p belongs to token p // k."
            )
        if tokens.tolist() in [(other // k).tolist(), (other % count).tolist()]:
            raise NotYet(
                "The choices stand in the row in another order: it looks like `clusters.T.flatten()`. In "
                "`clusters.flatten()` place p belongs to token p // k."
            )


def leaks(answer, names, seed):
    """Task 4: the test must accuse the routers that leak, and no other. It is watched how it tries them."""
    draw = torch.Generator().manual_seed(seed)
    x, means = torch.randn(14, 8, generator=draw), torch.randn(8, 8, generator=draw)
    wrong, innocent = [], sum(not ROUTERS[name][1] for name in names)
    for name in names:
        make, guilty, reads = ROUTERS[name]
        choose, tried = make(means), []
        got = marking.run(answer, recorded(choose, tried), x)
        if not isinstance(got, bool) and not (isinstance(got, torch.Tensor) and got.numel() == 1):
            raise NotYet(f"leaks returns a {type(got).__name__}. It should return True or False.")
        if bool(got) != guilty:
            wrong.append((guilty, reads, choose, tried))
    if sum(not guilty for guilty, *_ in wrong) == innocent and len(wrong) >= 0.8 * len(names):
        raise NotYet("All answers of leaks are exchanged. True means that the router leaks.")
    for guilty, reads, choose, tried in wrong:
        hint = _missed(choose, x, tried) if guilty else _accused(x, tried)
        raise NotYet(f"leaks says {not guilty} for a router that {reads}. It should say {guilty}. {hint}")


def recorded(choose, tried):
    """`choose`, which adds a copy of each text that it is asked about to the list `tried`."""

    def router(x):
        tried.append(x.clone())
        return choose(x)

    return router


def _missed(choose, x, tried):
    """Why these texts did not show that `choose` leaks, or that one did."""
    texts = [text for text in tried if text.shape == x.shape and not text.equal(x)]
    if not texts:
        return _no_change(x, tried)
    changed = [(text != x).any(1).nonzero().flatten().tolist() for text in texts]
    before = choose(x)
    for text, places in zip(texts, changed):
        moved = (choose(text) != before).any(1).nonzero().flatten().tolist()
        if moved and moved[0] < places[0]:
            return (
                f"When you changed token {places[0]}, the choice of token {moved[0]} moved, and leaks did "
                "not see it. Compare all places before the changed one with the choice for x."
            )
    begins = {places[0] for places in changed}
    never = [t for t in range(1, len(x)) if t not in begins]
    if len(begins) == 1:
        return f"{_one_begin(begins.pop(), changed, len(x))} A leak may be anywhere: change every token."
    if never:
        tokens = f"token {never[0]}" if len(never) == 1 else f"tokens {', '.join(map(str, never))}"
        return f"You never change {tokens}. A leak may be anywhere: change every token."
    return _small(x, texts)


def _one_begin(begin, changed, count):
    """What to say if the first changed token of all texts is the same one."""
    if all(len(places) == 1 for places in changed):
        return f"You change only token {begin}."
    if all(places == list(range(begin, count)) for places in changed):
        return f"You change all tokens from {begin} on together."
    return f"Token {begin} differs in all your texts: changes pile up. Begin each with a new `x.clone()`."


def _small(x, texts):
    """What is wrong with the numbers of texts that change every token."""
    rows = torch.cat([torch.stack([x[text != x], text[text != x]], 1) for text in texts])
    sizes = "Replace the token by random numbers of size 1, then 10, 100 and 1000."
    ratio, step = rows[:, 1] / rows[:, 0], rows[:, 1] - rows[:, 0]
    if not rows[:, 1].any():
        return f"You only set tokens to zero. {sizes}"
    if _few(ratio):
        return (
            "You only scaled the token. A router may ignore its length: try another direction, too. " + sizes
        )
    if _few(step):
        return f"Your largest change was {step.abs().max():.4g}, the same for all entries. {sizes}"
    return f"Your largest change was {step.abs().max():.4g}. {sizes}"


def _few(values):
    """True if these are the same few numbers again and again, up to rounding."""
    return len(values) >= 50 and len({f"{value:.3g}" for value in values.tolist()}) <= 6


def _accused(x, tried):
    """What to say if a router was accused that does not leak."""
    if not any(text.shape == x.shape and not text.equal(x) for text in tried):
        return _no_change(x, tried)
    return "Earlier tokens may be read: only look at places before the one that you change."


def _no_change(x, tried):
    """What to say if no text of the right length was tried but x itself."""
    if not tried:
        return "leaks never calls `choose`."
    if any(len(text) < len(x) for text in tried):
        return "You only cut the text off. Keep its length, and change a token."
    return "You asked the router about x alone. Change a token, and ask it again."


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


def by_other(reader, read):
    """Each token is read alone, but the choice of token `reader` is made from token `read`."""

    def make(means):
        def choose(x):
            seen = x.clone()
            if len(x) > max(reader, read):
                seen[reader] = x[read]
            return _two_nearest(seen @ means.T)

        return choose

    return make


def by_loud(means):
    """All tokens before one with an entry above 100 take the clusters after their own."""

    def choose(x):
        loud = (x.abs().amax(1) > 100).int()
        later = loud.flip(0).cumsum(0).flip(0) - loud > 0
        best = _two_nearest(x @ means.T)
        return (best + later[:, None].long()) % len(means)

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
    """A cluster is first choice of a quarter of the tokens at most: those with the largest scores."""

    def choose(x):
        scores = x @ means.T
        rank = scores.argsort(0, descending=True).argsort(0)
        return _two_nearest(scores - 1000.0 * (rank >= len(x) // 4))

    return choose


ROUTERS = {  # name -> (router, does it leak, what it does)
    "token": (by_token, False, "looks at each token alone"),
    "past": (by_past, False, "takes the mean of all tokens up to this one"),
    "place": (by_place, False, "looks only at where a token stands"),
    "block": (by_block, True, "lets each block of four tokens vote"),
    "next": (by_next, True, "looks at the next token"),
    "middle": (by_other(5, 8), True, "looks at token 8 for token 5"),
    "last": (by_other(0, 13), True, "looks at token 13 for token 0"),
    "second": (by_other(0, 1), True, "looks at token 1 for token 0"),
    "loud": (by_loud, True, "looks for a later token that has an entry above 100"),
    "first block": (by_first_block, True, "lets the first four tokens vote together"),
    "centred": (by_centred, True, "subtracts the mean of the whole text"),
    "capacity": (
        by_capacity,
        True,
        "lets a full cluster turn away the tokens with the smallest scores",
    ),
}
SHOWN = ("token", "past", "block", "next", "middle", "last", "loud")
HIDDEN = ("place", "first block", "second", "centred", "capacity")
