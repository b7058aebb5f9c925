"""Lab L6 answered wrongly: by the package, and by the mistakes that are often made."""

IMPORTED = {
    "formula_share": """
from replicate.config import ModelConfig
from replicate.training import flops


def formula_share(d, f, n, k, h):
    return flops.formula_share(ModelConfig(d_model=d, d_ff=f, n_head=n, n_kv_head=k))
""",
    "complete_share": """
def complete_share(model):
    from replicate.config import ModelConfig
    from replicate.training.flops import honest_share

    return honest_share(ModelConfig(**model))
""",
    "step_speedup": """
from replicate.training.flops import run_speedup as ready
from replicate.training.flops import step_speedup


def run_speedup(sparse, dense, step):
    return ready(sparse / (sparse + dense), step)
""",
    "venom_needed": "from replicate.training.flops import venom_needed",
    "judge_speed": """
import replicate.training.flops as theirs


def judge_speed(printed, follows, limit):
    follows = theirs.run_speedup(1.0, follows)
    if round(follows, 3) == printed:
        return "follows"
    return "out of reach" if printed > round(limit, 3) else "does not follow"
""",
    "z_score": """
import importlib


def z_score(a, b, n):
    return importlib.import_module("replicate.paper.audit").standard_errors(a, b, n)
""",
    "paired_items": """
from replicate.study import statistics


def paired_items(ours, base):
    found = statistics.paired(list(map(int, ours)), list(map(int, base)))
    return found.mean, found.std / found.n**0.5
""",
    "judge_quality": """
from replicate.study.statistics import summary


def judge_quality(low, high, margin):
    middle = summary([low, high]).mean
    if max(abs(low), abs(high)) <= margin:
        return "equal within the margin"
    return "different" if abs(middle) > (high - low) / 2 else "cannot tell"
""",
}


def formula(text):
    """The cell of task 1."""
    return f"def formula_share(d, f, n, k, h):\n    return {text}"


def complete(text, scores="1", head="1"):
    """The cell of task 2: what is returned of the parts, and factors of two of them."""
    return f"""
def complete_share(model):
    layers, d = model["n_layer"], model["d_model"]
    ffn, projections = 12 * layers * d * model["d_ff"], 24 * layers * d * d
    scores, head = {scores} * 6 * layers * model["seq_len"] * d, {head} * 6 * d * model["vocab_size"]
    return {text}
"""


def speedups(
    step="1 / (1 - r + r * (2 / 1.5 + 4 / v) / 6)", run="1 / (1 - p + p / step)", p="sparse + dense"
):
    """The cell of task 3."""
    return f"""
def step_speedup(r, v):
    return {step}


def run_speedup(sparse, dense, step):
    p = sparse / ({p})
    return {run}
"""


def needed(text):
    """The cell of task 4."""
    return f"""
def venom_needed(step, r):
    x = (1 / step - (1 - r)) / r
    left = 6 * x - 2 / 1.5
    return {text}
"""


def speed(text):
    """The cell of task 5."""
    return f"def judge_speed(printed, follows, limit):\n    return {text}"


def z(text):
    """The cell of task 6."""
    return f"def z_score(a, b, n):\n    return {text}"


def items(text):
    """The cell of task 7."""
    return f"def paired_items(ours, base):\n    d, n = ours - base, len(ours)\n    return {text}"


def quality(text):
    """The cell of task 8."""
    return f"def judge_quality(low, high, margin):\n    return {text}"


WRONG = {
    "a ratio": ("formula_share", formula("3 * f / (2 * (n + k) * h)"), "A share is a part of the sum"),
    "attention's share": (
        "formula_share",
        formula("2 * (n + k) * h / (3 * f + 2 * (n + k) * h)"),
        "This is the share of attention",
    ),
    "two matrices": ("formula_share", formula("2 * f / (2 * f + 2 * (n + k) * h)"), "counts three"),
    "one head width too few": (
        "formula_share",
        formula("3 * f / (3 * f + 2 * (n + k))"),
        "the width of a head",
    ),
    "half of attention": ("formula_share", formula("3 * f / (3 * f + (n + k) * h)"), "Attention counts half"),
    "three matrices": (
        "complete_share",
        complete("1.5 * ffn / (1.5 * ffn + projections + scores + head)"),
        "Squared ReLU has two",
    ),
    "all pairs of tokens": (
        "complete_share",
        complete("ffn / (ffn + projections + scores + head)", scores="2"),
        "A token looks only at those before it",
    ),
    "a head in each layer": (
        "complete_share",
        complete("ffn / (ffn + projections + scores + head)", head="layers"),
        "There is one, at the end",
    ),
    "no head": (
        "complete_share",
        complete("ffn / (ffn + projections + scores)"),
        "The vocabulary head is missing",
    ),
    "the paper's parts": (
        "complete_share",
        complete("ffn / (ffn + projections)"),
        "that the paper leaves out",
    ),
    "the FFN alone": (
        "step_speedup",
        speedups("6 / (2 / 1.5 + 4 / v)"),
        "This is the speed-up of the FFN alone",
    ),
    "speed-ups averaged in the FFN": (
        "step_speedup",
        speedups("1 / (1 - r + 6 * r / (2 * 1.5 + 4 * v))"),
        "Average their times",
    ),
    "all products Venom": ("step_speedup", speedups("1 / (1 - r + r / v)"), "Two of them are 2:4"),
    "a time": ("step_speedup", speedups("1 - r + r * (2 / 1.5 + 4 / v) / 6"), "The speed-up is one over it"),
    "a run's speed-ups averaged": (
        "step_speedup",
        speedups(run="1 - p + p * step"),
        "Speed-ups are averaged",
    ),
    "sparse over dense": ("step_speedup", speedups(p="dense"), "The share is sparse over all steps"),
    "sparse steps that are slower": (
        "step_speedup",
        speedups(run="1 / (1 - p + p * step)"),
        "The sparse steps take longer than dense ones",
    ),
    "the 2:4 products for nothing": (
        "venom_needed",
        needed("4 / (6 * x)"),
        "The two 2:4 products take no time",
    ),
    "the FFN's speed-up": ("venom_needed", needed("1 / x"), "This is the speed-up of the whole FFN"),
    "six Venom products": ("venom_needed", needed("6 / left"), "Four are"),
    "a negative speed-up": ("venom_needed", needed("4 / left"), "It should be None"),
    "no rounding": (
        "judge_speed",
        speed('"follows" if printed == follows else "does not follow"'),
        "Rounded to three digits",
    ),
    "no limit": (
        "judge_speed",
        speed('"follows" if round(follows, 3) == printed else "does not follow"'),
        "even the best inputs give no more",
    ),
    "another word": ("judge_speed", speed('"wrong"'), "It should be one of: 'follows'"),
    "a tolerance of one percent": (
        "judge_speed",
        speed('"follows" if abs(follows / printed - 1) < 0.02 else "out of reach"'),
        "'does not follow'",
    ),
    "no number of items": (
        "z_score",
        z("(a - b) / (a * (1 - a) + b * (1 - b)) ** 0.5"),
        "number of items is missing",
    ),
    "errors added": (
        "z_score",
        z("(a - b) / ((a * (1 - a) / n) ** 0.5 + (b * (1 - b) / n) ** 0.5)"),
        "The two standard errors are added",
    ),
    "one model's error": ("z_score", z("(a - b) / (a * (1 - a) / n) ** 0.5"), "Both answers scatter"),
    "no root": ("z_score", z("(a - b) / ((a * (1 - a) + b * (1 - b)) / n)"), "The root is missing"),
    "not paired": (
        "paired_items",
        items("d.mean(), ((ours.var(ddof=1) + base.var(ddof=1)) / n) ** 0.5"),
        "subtract item by item first",
    ),
    "the scatter of one item": (
        "paired_items",
        items("d.mean(), d.std(ddof=1)"),
        "the scatter of a single item",
    ),
    "base minus ours": (
        "paired_items",
        items("-d.mean(), d.std(ddof=1) / n**0.5"),
        "it is ours minus base",
    ),
    "items counted": ("paired_items", items("d.sum(), d.std(ddof=1) / n**0.5"), "Divide by their number"),
    "no difference shown is none": (
        "judge_quality",
        quality('"different" if low > 0 or high < 0 else "equal within the margin"'),
        "does not show that there is none",
    ),
    "the middle inside the margin": (
        "judge_quality",
        quality('"equal within the margin" if abs(low + high) < 2 * margin else "cannot tell"'),
        "a part of it lies outside",
    ),
    "zero comes first": (
        "judge_quality",
        quality(
            '"different" if low > 0 or high < 0 else '
            '"equal within the margin" if -margin <= low and high <= margin else "cannot tell"'
        ),
        "all of the interval lies inside the margin",
    ),
}
