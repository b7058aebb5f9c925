"""Chapter 05: the router by hand, two distances, sorting tokens, what is saved, a test for leaks."""

import torch

from exercises import Wrong, compare, exercise
from replicate import router


@exercise("05.1")
def routing(answer):
    x = torch.tensor([[2.0, 1.0], [-1.0, 3.0], [1.0, -2.0], [0.0, 1.0]])
    means = torch.tensor([[1.0, -3.0], [3.0, 1.0], [0.0, 3.0], [-1.0, -2.0], [4.0, 4.0]])
    scores, k = x @ means.T, 3
    right = router.route(x, means, k)
    chosen = torch.zeros_like(scores).scatter(1, right, 1.0)
    no_abs = "A negative score is a bad one: no abs."
    hints = [
        (scores.argsort(dim=1)[:, :k], "You took the smallest scores. Sort in descending order."),
        (scores.abs().argsort(dim=1, descending=True, stable=True)[:, :k], no_abs),
        (scores.abs().topk(k, 1).indices, no_abs),
        (right.flip(1), "The clusters are right, but the best comes last."),
        (right.sort(1).values, "The clusters are right, but sorted by number. The best comes first."),
        (router.route(x, means, k, metric="l2"), "You took the nearest means. The score is a dot product."),
        (torch.cdist(x, means).argsort(dim=1, descending=True)[:, :k], "You took the farthest means."),
        (
            router.route(x, means, k, metric="cosine"),
            "You divided by the lengths: that is the cosine. The score is the plain dot product.",
        ),
        (
            scores.softmax(1),
            "These are weights for all clusters. A router picks k of them: give their numbers.",
        ),
        (scores, "These are the scores. Give the numbers of the k best."),
        (scores.gather(1, right), "These are the best scores. Give the numbers of their clusters."),
        (chosen, "That is a mask. Give the numbers of the clusters, the best first."),
        (
            scores.argsort(dim=0, descending=True)[:k],
            "Your clusters choose tokens. A token then depends on the others, later ones too. Sort each row.",
        ),
    ]
    with compare.given(f"x = {x.tolist()}, means = {means.tolist()} and k = {k}"):
        found = compare.call(answer, x, means, k)
        if isinstance(found, tuple):
            raise Wrong("These are scores and numbers. Give the numbers alone, the indices of topk.")
        compare.tensor(found, right, hints)
    # a tie of sixteen, then a lower score, then better ones
    means = torch.tensor([*[[1.0, 0.0]] * 16, [0.5, 0.0], *[[2.0, 0.0]] * 16])
    right = router.route(torch.ones(2, 2), means, 20)
    with compare.given("means with equal scores"):
        tie = "Of equal scores the lower number comes first. argsort with stable=True keeps that order."
        compare.tensor(compare.call(answer, torch.ones(2, 2), means, 20), right, otherwise=tie)
    x, means = compare.normal(50, 8), compare.normal(12, 8, seed=1)
    with compare.given("normal numbers, 50 tokens, 12 clusters and k = 4"):
        compare.tensor(compare.call(answer, x, means, 4), router.route(x, means, 4))
    return "Each row was sorted on its own, so the choice is causal."


@exercise("05.2")
def two_distances(answer):
    try:
        token, means = (torch.as_tensor(part, dtype=torch.float64) for part in answer)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong("Give a token, a list of numbers, and means, a list of such lists.") from None
    if token.dim() != 1 or means.dim() != 2 or means.shape != (2, len(token)):
        shapes = f"{tuple(token.shape)} and {tuple(means.shape)}"
        raise Wrong(f"token is [D] and means is [2, D]; yours are {shapes}.")
    dot, distance = means @ token, (token - means).norm(dim=1)
    said = f"Dot products {_short(dot)}, distances {_short(distance)}. "
    if torch.isclose(dot[0], dot[1]) or torch.isclose(distance[0], distance[1]):
        raise Wrong(said + "Two of them are equal, so one of the rules has no clear choice.")
    if dot.argmax() != distance.argmin():
        return said + "The longer mean wins the dot product: |mu|^2 is what the two rules differ by."
    lengths = means.norm(dim=1)
    if torch.isclose(lengths[0], lengths[1]):
        raise Wrong(
            said + "The means are equally long, so the last term of the formula is the same for both."
        )
    longer = lengths.argmax()
    if dot.argmax() != longer:
        raise Wrong(said + "Both choose the shorter mean. Let the longer one have the larger dot product.")
    raise Wrong(
        said + "Both choose the longer mean. Make it longer still: how far from the token is it then?"
    )


@exercise("05.3")
def sorting(answer):
    clusters, n = torch.tensor([[2], [0], [2], [0]]), 4
    tokens, offsets = _lists(answer, clusters, n)
    with compare.given(f"clusters = {clusters.tolist()} and n = {n}"):
        early = "In a list the tokens stand in the order of the text. Sort with stable=True."
        hints = [
            (torch.tensor([0, 0, 2, 2]), "tokens holds cluster numbers. It should hold the tokens' numbers."),
            (
                torch.tensor([2, 0, 3, 1]),
                "tokens says where each token goes. It should say which token comes.",
            ),
            *((torch.tensor(order), early) for order in ([3, 1, 2, 0], [3, 1, 0, 2], [1, 3, 2, 0])),
        ]
        compare.tensor(tokens, torch.tensor([1, 3, 0, 2]), hints)
        last = "Clusters 1 and 3 get no token. Count with minlength=n, so that they are not forgotten."
        hints = [
            (torch.tensor([2, 0, 2, 0]), "offsets holds the lengths of the lists. Add them up."),
            (torch.tensor([0, 2, 0, 2, 0]), "offsets holds the lengths of the lists. Add them up."),
            (torch.tensor([2, 2, 4, 4]), "offsets must begin with 0: it has n + 1 entries."),
            (torch.tensor([0, 2, 2, 4]), last),
            (torch.tensor([2, 2, 4]), last),
            (torch.tensor([0, 2, 4]), last),
        ]
        compare.tensor(offsets, torch.tensor([0, 2, 2, 4, 4]), hints)
    clusters, n = torch.tensor([[1, 0], [2, 1], [0, 2]]), 3
    tokens, offsets = _lists(answer, clusters, n)
    with compare.given(f"clusters = {clusters.tolist()} and n = {n}"):
        hints = [
            (torch.tensor([1, 4, 0, 3, 2, 5]), "These number the choices, k for each token. Whose are they?"),
            (torch.tensor([1, 1, 0, 0, 2, 2]), "A pair's token is its number // k."),
            (
                torch.tensor([1, 0, 0, 1, 0, 1]),
                "That is the choice inside the token. Whole numbers of k count tokens.",
            ),
            (torch.tensor([2, 0, 1]), "You sort by the first choice alone. Each token stands in k lists."),
            (
                torch.tensor([2, 0, 0, 1, 1, 2]),
                "First choices come before second ones. Keep the order of the text.",
            ),
        ]
        compare.tensor(tokens, torch.tensor([0, 2, 0, 1, 1, 2]), hints)
        compare.tensor(offsets, torch.tensor([0, 2, 4, 6]))
    clusters = router.route(compare.normal(200, 8), compare.normal(12, 8, seed=1), 3)
    tokens, offsets = _lists(answer, clusters, 12)
    right = router.token_permutation(clusters, 12)
    with compare.given("200 tokens with 3 of 12 clusters each"):
        compare.tensor(tokens, right.tokens)
        compare.tensor(offsets, right.offsets)
    return "A kernel now multiplies each list with the weights of its cluster alone."


@exercise("05.4")
def saved(answer):
    hints = [
        (4 / 32, "That is the router's. Own activations must be known first: what does product 1 cost then?"),
        (1 + 4 / 32, "That is the sum in units of one product. Two dense products are 2."),
        (1 / 2, "Product 2 is not free: it reads 4 of 32 clusters."),
        (2 / 32, "You counted the 2 of 4 inside, and product 1 must be computed in full."),
        ((1 + 2 / 32) / 2, "You counted the 2 of 4 inside the clusters. Leave it out."),
        ((4 / 32) ** 2, "Work adds up over the two products; shares do not multiply."),
        (1 - (1 + 4 / 32) / 2, "That is the share that is saved. Give the share that is left."),
    ]
    compare.number(answer, (1 + 4 / 32) / 2, hints, tolerance=5e-3)  # two decimals will do
    return "With fewer clusters it falls to a half, never below. Chapter 12 weighs this against the loss."


@exercise("05.5")
def causality(answer):
    x = compare.normal(8, 8)
    alike = x.clamp(-2, 2)
    alike[:, :2] = 3.0  # all want the first cluster
    two_each = torch.eye(4).repeat_interleave(2, dim=1).repeat(2, 1)  # two tokens want each cluster
    spread = x.clamp(-1, 1) + 3 * two_each
    false = "Nothing leaks, and you say it does. "
    for layer, what, hint in [
        (
            _by_token,
            "each token keeps its own loudest cluster",
            "The changed token's own output may move. Compare the outputs before it.",
        ),
        (
            _mean_so_far,
            "each output is the mean of the tokens so far",
            "Outputs after the changed token may move too. Compare those before it.",
        ),
        (
            _rounded,
            "each token stands for itself, up to rounding",
            "Results differ by rounding: allow a small difference.",
        ),
    ]:
        _judge(answer, layer, x, False, what, false + hint)
    _judge(answer, _reads_next, x, True, "each output has a hundredth of the next token in it")
    _judge(answer, _votes, alike, True, "blocks of four tokens choose a cluster together, 8 tokens")
    _judge(
        answer,
        _votes,
        torch.cat([alike, alike[:1]]),
        True,
        "blocks of four tokens choose a cluster together, 9 tokens",
    )
    _judge(answer, _full, spread, True, "a cluster takes the two loudest tokens and turns others away")
    return "It even sees a later, louder token take an earlier one's place in a full cluster."


def _short(values):
    return " and ".join(f"{value:.3g}" for value in values.tolist())


def _lists(answer, clusters, n):
    found = compare.call(answer, clusters, n)
    if not isinstance(found, (tuple, list)) or len(found) < 2:
        raise Wrong("Return two tensors: tokens and offsets.")
    return found[:2]


def _judge(answer, layer, x, leaks, what, hint=None):
    """Raise Wrong if the student's test misjudges a layer, with what it tried as the hint."""
    tried, by_gradient = [], []
    own = x.clone()  # the student's, to see whether the test changes it

    def watched(inputs):
        tried.append(torch.as_tensor(inputs).detach().clone())
        by_gradient.append(inputs.requires_grad)
        return layer(inputs.clone())

    def test(layer):
        return answer(layer, own)

    found = compare.call(test if callable(answer) else answer, watched)
    with compare.given(f"a layer where {what}"):
        if not isinstance(found, (bool, torch.Tensor)) or torch.as_tensor(found).numel() != 1:
            raise Wrong(f"Return True or False; this is a {type(found).__name__}.")
        if bool(found) != leaks:
            if not tried or (found and _always_true(answer, x)):
                raise Wrong(f"You always answer {bool(found)}.")
            if any(by_gradient):
                raise Wrong(
                    "A gradient cannot see a choice: compare outputs before and after a change, "
                    "and allow for rounding."
                )
            if not own.detach().equal(x) and not all(one.equal(tried[0]) for one in tried):
                raise Wrong(
                    "You changed x itself, so the next round starts from another x: `changed = x.clone()`."
                )
            if found and not compare.call(answer, _reads_next, x):
                raise Wrong("It is the other way round: True means that a later token leaks.")
            raise Wrong(hint or "There is a leak, and you say there is none. " + _why_missed(tried, x))


def _always_true(answer, x):
    """Whether a test finds a leak where nothing depends on x, and where all outputs do."""
    return all(compare.call(answer, layer, x) for layer in (_nothing, _everything))


def _why_missed(tried, x):
    """What the inputs of a test lack."""
    if any(one.shape != x.shape for one in tried):
        return "You leave tokens out. A choice may stay without them: change them instead, loudly."
    if all(one.equal(tried[0]) for one in tried):
        return "It only ever saw one input. Change a copy, changed = x.clone(), and call the layer again."
    changes = [one - x for one in tried if one.shape == x.shape and not one.equal(x)]
    where = [change.any(1).nonzero().flatten().tolist() for change in changes]  # tokens that were changed
    if all(tokens == [0] for tokens in where):
        return "You change the first token. No output is earlier: change later ones."
    if all(len(tokens) > 1 for tokens in where):
        return (
            "You change several tokens at once, so few outputs are before all of them. Change one at a time."
        )
    if all(change.abs().max() < 5 for change in changes):
        return "Your changes are small, and a choice does not flip. Make the changed token loud."
    if all(tokens == [len(x) - 1] for tokens in where):
        return "You change the last token alone. A leak may sit anywhere: change each in turn."
    wanted = _energy(x).argmax(1)
    if all(_energy(x + change).argmax(1).equal(wanted) for change in changes):
        return "The changed token is loud, but asks for the cluster it had. Give it another direction."
    return "Compare all outputs before the changed token, and try more than one direction."


def _energy(x):
    """[T, 4]: sums of magnitudes of four clusters of two neighbours each."""
    return x.abs().unflatten(1, (4, 2)).sum(2)


def _keep(x, cluster):
    """x [T, 8] with only the neurons of each token's cluster [T]."""
    return x * (torch.arange(8) // 2 == cluster.unsqueeze(1))


def _nothing(x):
    return 0 * x


def _everything(x):
    return x + x.sum(0) + x.abs().sum(0)


def _by_token(x):
    return _keep(x, _energy(x).argmax(1))


def _mean_so_far(x):
    return x.cumsum(0) / torch.arange(1, len(x) + 1).unsqueeze(1)


def _rounded(x):
    return _by_token(x) * (1 + 1e-7 * torch.sin(1e3 * x.sum()))


def _reads_next(x):
    return x + 0.01 * torch.cat([x[1:], torch.zeros_like(x[:1])])


def _votes(x):
    votes = torch.cat([block.sum(0, keepdim=True).expand(len(block), -1) for block in _energy(x).split(4)])
    return _keep(x, votes.argmax(1))


def _full(x):
    score, cluster = _energy(x).max(1)
    louder = (cluster.unsqueeze(1) == cluster) & (score > score.unsqueeze(1))
    return _keep(x, cluster) * (louder.sum(1) < 2).unsqueeze(1)
