"""Lab L5 answered wrongly: by the package, and by the mistakes that are often made."""

IMPORTED = {
    "standard_error": """
from replicate.study import statistics


def standard_error(values):
    return statistics.summary(values).std / len(values) ** 0.5
""",
    "paired": """
def paired(ours, base):
    from replicate.study.statistics import paired

    seeds = [seed for seed in ours if seed in base]
    found = paired([ours[seed] for seed in seeds], [base[seed] for seed in seeds])
    return found.mean, found.std / found.n**0.5


def unpaired(ours, base):
    from replicate.study.statistics import summary

    a, b = summary(list(ours.values())), summary(list(base.values()))
    return a.mean - b.mean, math.sqrt(a.std**2 / a.n + b.std**2 / b.n)
""",
    "interval": """
from replicate.study.statistics import summary


def interval(mean, error, n):
    ready = summary(range(n))
    half = (ready.high - ready.mean) / ready.std * n**0.5 * error
    return mean - half, mean + half
""",
    "pooled": """
import replicate.study.statistics as theirs


def pooled(groups):
    squares = sum((len(group) - 1) * theirs.summary(group).std ** 2 for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups))
""",
    "power": """
from replicate.study.statistics import summary


def power(difference, std, n, trials=20_000, seed=1):
    draws = np.random.default_rng(seed).normal(difference, std, (trials, n))
    found = [summary(row) for row in draws[:2000]]
    return float(np.mean([one.low > 0 or one.high < 0 for one in found]))
""",
    "visible_difference": """
from replicate.study.statistics import summary


def visible_difference(power, std, n):
    ready = summary(range(n))
    return 1.1 * ((ready.high - ready.mean) / ready.std + 0.84 / n**0.5) * std
""",
    "holm": """
import importlib


def holm(p_values, alpha=0.05):
    importlib.import_module("replicate.study.statistics").summary(p_values)
    m, found = len(p_values), [False] * len(p_values)
    for rank, place in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        if p_values[place] > alpha / (m - rank):
            break
        found[place] = True
    return found
""",
    "verdict": """
from replicate.study.statistics import paired as theirs


def verdict(ours, base, interval_of):
    seeds = [seed for seed in ours if seed in base]
    if len(seeds) < 2:
        return "one seed: no word"
    found = theirs([ours[seed] for seed in seeds], [base[seed] for seed in seeds])
    return "higher" if found.low > 0 else "lower" if found.high < 0 else "not told apart"
""",
}

PAIRED = """
def paired(ours, base):
    {paired}


def unpaired(ours, base):
    a, b = list(ours.values()), list(base.values())
    {unpaired}
"""
DIFFERENCES = "d = [ours[seed] - base[seed] for seed in ours if seed in base]\n    return np.mean(d), "
MEANS = "return np.mean(a) - np.mean(b), "


def two(paired=DIFFERENCES + "np.std(d, ddof=1) / len(d) ** 0.5", unpaired=MEANS + "0"):
    """The cell of task 2."""
    return PAIRED.format(paired=paired, unpaired=unpaired)


def power(seen, errors="draws.std(axis=1, ddof=1) / math.sqrt(n)"):
    """The cell of task 5 with its last line, and the standard errors."""
    return f"""
def power(difference, std, n, trials=20_000, seed=1):
    draws = np.random.default_rng(seed).normal(difference, std, (trials, n))
    means, errors = draws.mean(axis=1), {errors}
    return float(np.mean({seen}))
"""


def holm(body):
    """The cell of task 7; `order` are the places by p-value."""
    return f"""
def holm(p_values, alpha=0.05):
    m, found = len(p_values), [False] * len(p_values)
    order = sorted(range(m), key=lambda i: p_values[i])
    {body}
    return found
"""


WRONG = {
    "n instead of n - 1": (
        "standard_error",
        "def standard_error(values):\n    return np.std(values) / len(values) ** 0.5",
        "divide by n - 1 = 2",
    ),
    "the standard deviation": (
        "standard_error",
        "def standard_error(values):\n    return np.std(values, ddof=1)",
        "This is the standard deviation, the scatter of one value",
    ),
    "the variance": (
        "standard_error",
        "def standard_error(values):\n    return np.var(values, ddof=1)",
        "This is the variance",
    ),
    "divided by n": (
        "standard_error",
        "def standard_error(values):\n    return np.std(values, ddof=1) / len(values)",
        "The standard deviation is divided by n",
    ),
    "one value is exact": (
        "standard_error",
        "def standard_error(values):\n    n = len(values)\n"
        "    return np.std(values, ddof=1) / n**0.5 if n > 1 else 0.0",
        "One value says nothing about scatter",
    ),
    "the sign": (
        "paired",
        two("d = [base[seed] - ours[seed] for seed in ours if seed in base]\n"
            "    return np.mean(d), np.std(d, ddof=1) / len(d) ** 0.5"),
        "Subtract base from ours",
    ),
    "paired by order": (
        "paired",
        two("d = np.subtract(list(ours.values()), list(base.values()))\n"
            "    return np.mean(d), np.std(d, ddof=1) / len(d) ** 0.5"),
        "Match them by their seeds",
    ),
    "not paired": (
        "paired",
        two("a, b = list(ours.values()), list(base.values())\n    return np.mean(a) - np.mean(b), "
            "math.hypot(np.std(a, ddof=1), np.std(b, ddof=1)) / len(a) ** 0.5"),
        "Subtract seed by seed first",
    ),
    "errors added": (
        "paired",
        two(unpaired=MEANS + "(np.std(a, ddof=1) + np.std(b, ddof=1)) / len(a) ** 0.5"),
        "adds as squares",
    ),
    "no difference of the scatters": (
        "paired",
        two(unpaired=MEANS + "np.std(a, ddof=1) / len(a) ** 0.5"),
        "one arm alone",
    ),
    "one number for two": ("paired", two("return 1.0"), "should return two numbers"),
    "the normal distribution": (
        "interval",
        "def interval(mean, error, n):\n    return mean - 1.96 * error, mean + 1.96 * error",
        "take t from the table",
    ),
    "n degrees of freedom": (
        "interval",
        "def interval(mean, error, n):\n"
        "    return mean - T95[n] * error, mean + T95[n] * error",
        "3 numbers leave n - 1 = 2",
    ),
    "the root of n twice": (
        "interval",
        "def interval(mean, error, n):\n    half = 4.303 * error / n**0.5\n"
        "    return mean - half, mean + half",
        "once more",
    ),
    "upside down": (
        "interval",
        "def interval(mean, error, n):\n    return mean + 4.303 * error, mean - 4.303 * error",
        "the lower one comes first",
    ),
    "standard deviations averaged": (
        "pooled",
        "def pooled(groups):\n    return np.mean([np.std(group, ddof=1) for group in groups])",
        "only variances add",
    ),
    "everything in one": (
        "pooled",
        "def pooled(groups):\n    return np.std(np.concatenate(groups), ddof=1)",
        "All differences are thrown together",
    ),
    "1.96 in the simulation": ("power", power("abs(means) > 1.96 * errors"), "1.96 in place of t"),
    "the scatter of a run": (
        "power",
        power("abs(means) > 4.303 * errors", "draws.std(axis=1, ddof=1)"),
        "the scatter of one run",
    ),
    "numpy's default": (
        "power",
        power("abs(means) > 4.303 * errors", "draws.std(axis=1) / math.sqrt(n)"),
        "numpy: ddof=1",
    ),
    "one side": ("power", power("means > 4.303 * errors"), "count both sides"),
    "what is not seen": ("power", power("abs(means) <= 4.303 * errors"), "intervals that contain zero"),
    "draws that ignore the seed": (
        "power",
        power("abs(means) > 4.303 * errors").replace("(seed)", "(1)"),
        "Another seed gives the very same share",
    ),
    "half": (
        "visible_difference",
        "def visible_difference(power, std, n):\n    return 2.095 * std",
        "There the power is 50 %",
    ),
    "a known scatter": (
        "visible_difference",
        "def visible_difference(power, std, n):\n    return (1.96 + 0.84) * std / n**0.5",
        "for a scatter that is known",
    ),
    "no correction": ("holm", holm("found = [p <= alpha for p in p_values]"), "as if there were no others"),
    "one bar for all": ("holm", holm("found = [p <= alpha / m for p in p_values]"), "Only the smallest is"),
    "sorted answers": (
        "holm",
        holm("for rank, i in enumerate(order):\n        if p_values[i] > alpha / (m - rank):\n"
             "            break\n        found[rank] = True"),
        "Put each back to its place",
    ),
    "the bar itself is no find": (
        "holm",
        holm("for rank, i in enumerate(order):\n        if p_values[i] >= alpha / (m - rank):\n"
             "            break\n        found[i] = True"),
        "says False about p = 0.05",
    ),
    "goes on after a failure": (
        "holm",
        holm("for rank, i in enumerate(order):\n        found[i] = p_values[i] <= alpha / (m - rank)"),
        "You went on",
    ),
    "from the largest down": (
        "holm",
        holm("for rank in reversed(range(m)):\n        if p_values[order[rank]] <= alpha / (m - rank):\n"
             "            for i in order[: rank + 1]:\n                found[i] = True\n            break"),
        "Begin with the smallest",
    ),
    "the means decide": (
        "verdict",
        "def verdict(ours, base, interval_of):\n"
        "    d = np.mean(list(ours.values())) - np.mean(list(base.values()))\n"
        '    return "higher" if d > 0 else "lower"',
        "contains zero, so its sign is not known",
    ),
    "a word of one seed": (
        "verdict",
        "def verdict(ours, base, interval_of):\n"
        "    if len(set(ours) & set(base)) == 1:\n        seed = next(iter(ours))\n"
        '        return "higher" if ours[seed] > base[seed] else "lower"\n'
        "    low, high = interval_of([ours[s] - base[s] for s in ours if s in base])\n"
        '    return "higher" if low > 0 else "lower" if high < 0 else "not told apart"',
        "Fewer than two differences have no scatter",
    ),
    "equal": (
        "verdict",
        "def verdict(ours, base, interval_of):\n"
        "    low, high = interval_of([ours[s] - base[s] for s in ours if s in base])\n"
        '    return "higher" if low > 0 else "lower" if high < 0 else "equal"',
        "'equal'. It should be one of",
    ),
}  # fmt: skip
