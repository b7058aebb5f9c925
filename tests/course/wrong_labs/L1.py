"""Lab L1 answered wrongly: by the package, and by the mistakes that are often made."""

IMPORTED = {
    "is24": """
from replicate.sparsity import check24

def is24(x, dim=-1):
    try:
        check24(x, dim)
    except ValueError:
        return False
    return True
""",
    "mask24": "from replicate.sparsity import mask24",
    "soft": """
import replicate.sparsity as theirs

def soft_threshold24(w, dim=-1):
    return theirs.soft_threshold24(w, dim)
""",
    "venom": """
def venom_mask(x, v, m, n=2):
    import importlib

    return importlib.import_module("replicate.sparsity").venom_mask(x, v, m, n)
""",
}

VENOM = """
def venom_mask(x, v, m, n=2):
    mask = torch.zeros_like(x, dtype=torch.bool)
    for i in range(0, x.shape[0], v):
        for j in range(0, x.shape[1], m):
            block = x[i : i + v, j : j + m].abs()
            columns = {columns}
            places = block[:, columns].argsort(dim=1, descending=True, stable=True)[:, :{n}]
            mask[i : i + v, j : j + m].scatter_(1, columns[places], True)
    return mask
"""

WRONG = {
    "overlapping groups": (
        "is24",
        """
def is24(x, dim=-1):
    return bool(((x != 0).movedim(dim, -1).unfold(-1, 4, 1).sum(-1) <= 2).all())
""",
        "groups do not overlap",
    ),
    "counts what is positive": (
        "is24",
        """
def is24(x, dim=-1):
    return bool(((x > 0).movedim(dim, -1).unflatten(-1, (-1, 4)).sum(-1) <= 2).all())
""",
        "a negative number is not zero",
    ),
    "four parts of a column": (
        "is24",
        """
def is24(x, dim=-1):
    groups = x.reshape(4, -1).T if dim == 0 else x.movedim(dim, -1).unflatten(-1, (-1, 4))
    return bool(((groups != 0).sum(-1) <= 2).all())
""",
        "rows 0 to 3 hold two, and rows 4 to 7 hold two",
    ),
    "the axes are not undone": (
        "mask24",
        """
def mask24(x, dim=-1):
    groups = x.abs().movedim(dim, -1).unflatten(-1, (-1, 4))
    places = groups.argsort(dim=-1, descending=True, stable=True)[..., :2]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, places, True).reshape(x.shape)
""",
        "With dim=0 the mask has the right entries at wrong places",
    ),
    "another shape": (
        "mask24",
        """
def mask24(x, dim=-1):
    groups = x.abs().movedim(dim, -1).unflatten(-1, (-1, 4))
    places = groups.argsort(dim=-1, descending=True, stable=True)[..., :2]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, places, True).flatten(-2)
""",
        "undo the changes of the axes, in reverse order",
    ),
    "zeros are never kept": (
        "mask24",
        """
def mask24(x, dim=-1):
    groups = x.abs().movedim(dim, -1).unflatten(-1, (-1, 4))
    places = groups.argsort(dim=-1, descending=True, stable=True)[..., :2]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, places, True)
    return (mask & (groups.sum(-1, keepdim=True) > 0)).flatten(-2).movedim(-1, dim)
""",
        "mask24 keeps none of a group with equal magnitudes, [0, 0, 0, 0]",
    ),
    "dim is ignored": (
        "mask24",
        """
def mask24(x, dim=-1):
    places = x.abs().unflatten(-1, (-1, 4)).argsort(dim=-1, descending=True, stable=True)[..., :2]
    return torch.zeros_like(x).unflatten(-1, (-1, 4)).scatter(-1, places, 1.0).flatten(-2).bool()
""",
        "mask24 prunes along the rows (axis 1), not down the columns",
    ),
    "a threshold keeps ties": (
        "mask24",
        """
def mask24(x, dim=-1):
    groups = x.abs().movedim(dim, -1).unflatten(-1, (-1, 4))
    return (groups >= groups.sort(-1).values[..., 2:3]).flatten(-2).movedim(-1, dim)
""",
        "keeps four of a group with equal magnitudes",
    ),
    "no magnitudes": (
        "mask24",
        """
def mask24(x, dim=-1):
    groups = x.movedim(dim, -1).unflatten(-1, (-1, 4))
    places = groups.argsort(dim=-1, descending=True, stable=True)[..., :2]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, places, True).flatten(-2).movedim(-1, dim)
""",
        "keeps the two largest numbers, not the two largest magnitudes",
    ),
    "the last of equal ones": (
        "mask24",
        """
def mask24(x, dim=-1):
    groups = x.abs().movedim(dim, -1).unflatten(-1, (-1, 4))
    places = groups.argsort(dim=-1, stable=True)[..., 2:]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, places, True).flatten(-2).movedim(-1, dim)
""",
        "mask24 keeps the wrong one of equal magnitudes",
    ),
    "values for a mask": (
        "mask24",
        """
def mask24(x, dim=-1):
    groups = x.movedim(dim, -1).unflatten(-1, (-1, 4))
    places = groups.abs().argsort(dim=-1, stable=True)[..., :2]
    return groups.scatter(-1, places, 0.0).flatten(-2).movedim(-1, dim)
""",
        "mask24 returns the kept values. A mask is a bool tensor",
    ),
    "hard pruning": (
        "soft",
        """
def soft_threshold24(w, dim=-1):
    groups = w.movedim(dim, -1).unflatten(-1, (-1, 4))
    t = groups.abs().sort(-1).values[..., 1:2]
    return torch.where(groups.abs() > t, groups, 0.0).flatten(-2).movedim(-1, dim)
""",
        "That is hard pruning",
    ),
    "the second-largest": (
        "soft",
        """
def soft_threshold24(w, dim=-1):
    groups = w.movedim(dim, -1).unflatten(-1, (-1, 4))
    t = groups.abs().sort(-1, descending=True).values[..., 1:2]
    return (groups.sign() * (groups.abs() - t).clamp_min(0)).flatten(-2).movedim(-1, dim)
""",
        "subtracts the second-largest magnitude",
    ),
    "it goes past zero": (
        "soft",
        """
def soft_threshold24(w, dim=-1):
    groups = w.movedim(dim, -1).unflatten(-1, (-1, 4))
    t = groups.abs().sort(-1).values[..., 1:2]
    return (groups.sign() * (groups.abs() - t)).flatten(-2).movedim(-1, dim)
""",
        "-1 became 1: a weight stops at zero",
    ),
    "the mean for t": (
        "soft",
        """
def soft_threshold24(w, dim=-1):
    groups = w.movedim(dim, -1).unflatten(-1, (-1, 4))
    t = groups.abs().mean(-1, keepdim=True)
    return (groups.sign() * (groups.abs() - t).clamp_min(0)).flatten(-2).movedim(-1, dim)
""",
        "It should be [1, 0, 0, -2]. What is the second-smallest magnitude there? It is 2.",
    ),
    "soft, the axes are not undone": (
        "soft",
        """
def soft_threshold24(w, dim=-1):
    groups = w.movedim(dim, -1).unflatten(-1, (-1, 4))
    t = groups.abs().sort(-1).values[..., 1:2]
    return (groups.sign() * (groups.abs() - t).clamp_min(0)).reshape(w.shape)
""",
        "With dim=0 the result has the right entries at wrong places",
    ),
    "the sign is lost": (
        "soft",
        """
def soft_threshold24(w, dim=-1):
    size = w.abs().movedim(dim, -1).unflatten(-1, (-1, 4))
    return (size - size.sort(-1).values[..., 1:2]).clamp_min(0).flatten(-2).movedim(-1, dim)
""",
        "loses the sign",
    ),
    "each row has its own columns": (
        "venom",
        """
def venom_mask(x, v, m, n=2):
    rows = x.abs().unflatten(1, (-1, m))
    places = rows.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(rows, dtype=torch.bool).scatter(-1, places, True).flatten(1)
""",
        "A block keeps 4, the same for all of its rows",
    ),
    "the largest entry chooses the columns": (
        "venom",
        VENOM.format(columns="block.amax(0).argsort(descending=True, stable=True)[:4].sort().values", n="n"),
        "does not decide",
    ),
    "a plain sum": (
        "venom",
        """
def venom_mask(x, v, m, n=2):
    mask = torch.zeros_like(x, dtype=torch.bool)
    for i in range(0, x.shape[0], v):
        for j in range(0, x.shape[1], m):
            block = x[i : i + v, j : j + m]
            columns = block.sum(0).argsort(descending=True, stable=True)[:4].sort().values
            places = block[:, columns].abs().argsort(dim=1, descending=True, stable=True)[:, :n]
            mask[i : i + v, j : j + m].scatter_(1, columns[places], True)
    return mask
""",
        "Numbers of both signs cancel in a plain sum",
    ),
    "only the first step": (
        "venom",
        """
def venom_mask(x, v, m, n=2):
    mask = torch.zeros_like(x, dtype=torch.bool)
    for i in range(0, x.shape[0], v):
        for j in range(0, x.shape[1], m):
            columns = x[i : i + v, j : j + m].abs().sum(0).argsort(descending=True, stable=True)[:4]
            mask[i : i + v, j + columns] = True
    return mask
""",
        "The second step is missing",
    ),
    "two for every n": (
        "venom",
        VENOM.format(
            columns="block.sum(0).argsort(descending=True, stable=True)[:4].sort().values",
            n="2",
        ),
        "It should keep n = 3",
    ),
    "columns in the order of their sums": (
        "venom",
        VENOM.format(
            columns="block.sum(0).argsort(descending=True, stable=True)[:4]",
            n="n",
        ),
        "They are equal, and the first counts",
    ),
    "zeros outside of the four columns": (
        "venom",
        VENOM.format(columns="block.sum(0).argsort(descending=True, stable=True)[:4].sort().values", n="n")
        .replace("block[:, columns]", "torch.zeros_like(block).index_copy(1, columns, block[:, columns])")
        .replace("columns[places]", "places"),
        "keeps column 0, which is none of the 4",
    ),
    "squares": (
        "venom",
        VENOM.format(
            columns="(block**2).sum(0).argsort(descending=True, stable=True)[:4].sort().values",
            n="n",
        ),
        "sum the magnitudes, not their squares",
    ),
    "any of equal columns": (
        "venom",
        VENOM.format(
            columns="block.sum(0).argsort(descending=True)[:4].sort().values",
            n="n",
        ),
        "Of columns with equal sums the first counts",
    ),
    "the last of equal ones in a row": (
        "venom",
        VENOM.format(
            columns="block.sum(0).argsort(descending=True, stable=True)[:4].sort().values", n="n"
        ).replace("descending=True, stable=True)[:, :n]", "stable=True).flip(1)[:, :n]"),
        "They are equal, and the first counts",
    ),
    "blocks are not undone": (
        "venom",
        """
def venom_mask(x, v, m, n=2):
    blocks = x.abs().reshape(x.shape[0] // v, v, x.shape[1] // m, m).transpose(1, 2)
    columns = blocks.sum(2).argsort(dim=-1, descending=True, stable=True)[..., :4].sort(-1).values
    columns = columns.unsqueeze(2).expand(-1, -1, v, -1)
    places = blocks.gather(-1, columns).argsort(dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter(-1, columns.gather(-1, places), True)
    return mask.reshape(x.shape)
""",
        "The mask of venom_mask has the right entries at wrong places",
    ),
}
