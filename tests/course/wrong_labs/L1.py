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
        """
def venom_mask(x, v, m, n=2):
    mask = torch.zeros_like(x, dtype=torch.bool)
    for i in range(0, x.shape[0], v):
        for j in range(0, x.shape[1], m):
            block = x[i : i + v, j : j + m].abs()
            columns = block.amax(0).argsort(descending=True, stable=True)[:4].sort().values
            places = block[:, columns].argsort(dim=1, descending=True, stable=True)[:, :n]
            mask[i : i + v, j : j + m].scatter_(1, columns[places], True)
    return mask
""",
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
}
