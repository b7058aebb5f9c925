"""Typical wrong answers to the exercises of chapter 01, and what their hints must say."""

import linecache

import torch


def by_threshold(w, dim):
    groups = w.movedim(dim, -1).unflatten(-1, (-1, 4))
    second = groups.abs().sort(-1, descending=True).values[..., 1:2]
    return torch.where(groups.abs() >= second, groups, 0).flatten(-2).movedim(-1, dim)


def strictly_above(w, dim):
    groups = w.movedim(dim, -1).unflatten(-1, (-1, 4))
    third = groups.abs().sort(-1, descending=True).values[..., 2:3]
    return torch.where(groups.abs() > third, groups, 0).flatten(-2).movedim(-1, dim)


def top_two(w, dim, key=torch.abs, stable=True, largest=True):
    groups = w.movedim(dim, -1).unflatten(-1, (-1, 4))
    if not stable:
        groups = groups.flip(-1)
    two = key(groups).argsort(dim=-1, descending=largest, stable=True)[..., :2]
    kept = torch.zeros_like(groups).scatter(-1, two, groups.gather(-1, two))
    if not stable:
        kept = kept.flip(-1)
    return kept.flatten(-2).movedim(-1, dim)


def of_the_row(w, dim):
    two = w.abs().argsort(dim=dim, descending=True, stable=True).narrow(dim, 0, 2)
    return torch.zeros_like(w).scatter(dim, two, w.gather(dim, two))


def venom(x, v, m, keep=2, shared=True, reduce=torch.sum, size=torch.abs, own=torch.abs):
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for i in range(0, x.shape[0], v):
        for j in range(0, x.shape[1], m):
            block = x[i : i + v, j : j + m]
            for r, row in enumerate(block):
                weights = reduce(size(block), 0) if shared else row.abs()
                columns = weights.argsort(descending=True, stable=True)[:4].sort().values
                best = own(row[columns]).argsort(descending=True, stable=True)[:keep]
                mask[i + r, j + columns[best]] = True
    return mask


def tied_venom(x, v, m):
    blocks = x.abs().reshape(x.shape[0] // v, v, x.shape[1] // m, m)
    weight = blocks.sum(1, keepdim=True)
    columns = weight >= weight.sort(-1, descending=True).values[..., 3:4]
    inside = blocks * columns
    return (columns & (inside >= inside.sort(-1, descending=True).values[..., 1:2])).reshape(x.shape)


def soft(groups, place=1, size=torch.abs):
    t = size(groups).sort(1).values[:, place : place + 1]
    return groups.sign() * (groups.abs() - t).clamp_min(0)


def one_sided(groups):
    t = groups.abs().sort(1).values[:, 1:2]
    return torch.where(groups.abs() > t, groups - t, 0)


def one_threshold(groups):
    t = groups.abs().flatten().sort().values[1]
    return groups.sign() * (groups.abs() - t).clamp_min(0)


def places(x, v, m, ordered=True):
    """Marks the two of the four columns as if they were the first four of the block."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for i in range(0, x.shape[0], v):
        for j in range(0, x.shape[1], m):
            block = x[i : i + v, j : j + m].abs()
            columns = block.sum(0).topk(4).indices
            two = block[:, columns.sort().values if ordered else columns].topk(2).indices
            mask[i : i + v, j : j + m].scatter_(1, two, True)
    return mask


BY_POSITION = """
def two_of_four(w, dim):
    order = w.abs().argsort(1, descending=True, stable=True)
    return order
"""


def in_a_cell(name, source):
    """The function as a notebook's cell defines it: in __main__, with its lines at hand."""
    linecache.cache["a cell"] = (len(source), None, source.splitlines(keepends=True), "a cell")
    cell = {"__name__": "__main__"}
    exec(compile(source, "a cell", "exec"), cell)
    return cell[name]


def turned_blocks(x, v, m):
    """Cuts m rows and v columns at the places of blocks with v rows and m columns."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for i in range(0, x.shape[0], v):
        for j in range(0, x.shape[1], m):
            block = x[i : i + m, j : j + v].abs()
            columns = block.sum(0).argsort(descending=True, stable=True)[:4].sort().values
            for r, row in enumerate(block[:, columns]):
                mask[i + r, j + columns[row.argsort(descending=True, stable=True)[:2]]] = True
    return mask


def by_sum(x, v, m):
    """A Venom mask whose columns stay in the order of their sums."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for i in range(0, x.shape[0], v):
        for j in range(0, x.shape[1], m):
            block = x[i : i + v, j : j + m].abs()
            columns = block.sum(0).argsort(descending=True, stable=True)[:4]
            for r, row in enumerate(block[:, columns]):
                mask[i + r, j + columns[row.argsort(descending=True, stable=True)[:2]]] = True
    return mask


WRONG = [
    ("01.1", by_threshold, "more than two stay"),
    ("01.1", strictly_above, "tied ones are all lost"),
    ("01.1", lambda w, dim: top_two(w, dim, key=lambda x: x), "Compare magnitudes"),
    ("01.1", lambda w, dim: top_two(w, dim, largest=False), "two smallest magnitudes"),
    ("01.1", lambda w, dim: top_two(w, dim) != 0, "That is the mask"),
    ("01.1", lambda w, dim: top_two(w, dim, stable=False), "argsort with stable=True"),
    ("01.1", lambda w, dim: top_two(w, dim).abs(), "lost the sign"),
    ("01.1", of_the_row, "two of the whole row"),
    ("01.1", lambda w, dim: top_two(w, 1), "You pruned along the rows"),
    ("01.1", lambda w, dim: top_two(w.T, 1) if dim == 0 else top_two(w, 1), "transposed"),
    ("01.2", 0.5, "the question is about groups"),
    ("01.2", 0.374, "exactly two of four"),
    ("01.2", 5 / 16, "share that fails"),
    ("01.2", 68.75, "in percent"),
    ("01.3", lambda x, v, m: venom(x, v, m, keep=4), "The 4 columns are right"),
    ("01.3", lambda x, v, m: venom(x, v, m, shared=False), "Each row has its own columns"),
    ("01.3", lambda x, v, m: venom(x, v, m, size=lambda b: b), "these cancel"),
    ("01.3", lambda x, v, m: venom(x, v, m, reduce=torch.amax), "Compare sums of magnitudes"),
    ("01.3", lambda x, v, m: venom(x, v, m, own=lambda row: row), "a large negative number stays"),
    ("01.3", lambda x, v, m: venom(x, v, m) * x, "Give the mask"),
    ("01.3", lambda x, v, m: venom(x, len(x), m), "anew for every v rows"),
    ("01.3", places, "You marked places among the 4"),
    ("01.3", lambda x, v, m: places(x, v, m, ordered=False), "You marked places among the 4"),
    ("01.3", tied_venom, "no threshold"),
    ("01.3", lambda x, v, m: venom(x.flip(1), v, m).flip(1), "the last of equal ones"),
    ("01.4", lambda groups: top_two(groups, 1), "that is hard pruning"),
    ("01.4", lambda groups: soft(groups, place=2), "second-largest magnitude"),
    ("01.4", lambda groups: soft(groups, place=0), "the smallest magnitude"),
    ("01.4", lambda groups: soft(groups, size=lambda x: x), "Sort magnitudes"),
    ("01.4", lambda groups: soft(groups).abs(), "The sign is lost"),
    ("01.4", one_sided, "must shrink too"),
    ("01.4", one_threshold, "Each row has its own t"),
    ("01.5", [1.0, 1.0, 1.0, 1.0], "Does the smallest change the distance"),
    ("01.5", [4.0, 3.0, 2.0, 1.0], "Need these be larger than t"),
    ("01.5", [1.0, 1.0, 0.0, 0.0], "takes nothing away"),
    ("01.5", [1.0, 2.0, 3.0], "A group has four numbers"),
    ("01.1", in_a_cell("two_of_four", BY_POSITION), "dim by name"),
    ("01.1", in_a_cell("two_of_four", BY_POSITION), "this line of yours: order = w.abs().argsort(1,"),
    ("01.3", lambda x, v, m: venom(x, v, m, size=lambda b: b, own=lambda row: row), "not signed values"),
    ("01.3", lambda x, v, m: venom(x, v, m, size=torch.square), "magnitudes, not squares"),
    ("01.3", lambda x, v, m: venom(x, m, v), "v counts rows, m columns"),
    ("01.3", turned_blocks, "v counts rows, m columns"),
    ("01.3", by_sum, "the leftmost two"),
]
