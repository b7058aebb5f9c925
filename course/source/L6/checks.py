"""Tests of lab L6: each function takes an answer, tries it on numbers, and names its mistake."""

import base64
import contextlib
import io
import json
import math
from pathlib import Path

import marking
import numpy as np
from marking import NotYet, right

__all__ = ["right"]

FOLDER = Path(__file__).parent
BENCHMARKS = ("ArcE", "ArcC", "PIQA", "OBQA", "HSwag", "WinoG")
SPEED = ("follows", "does not follow", "out of reach")
QUALITY = ("equal within the margin", "different", "cannot tell")


def load(name):
    """What a JSON file of this folder holds."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def right_or_wrong(name):
    """{model: array of 0 and 1, an entry an item}, from a JSON file of this folder."""
    return {model: np.array([int(c) for c in text]) for model, text in load(name).items()}


def show_table(rows):
    """The paper's Table 2."""
    print("  ".join(f"{column:>9s}" for column in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>9}" for value in row.values()))


@contextlib.contextmanager
def needs(tasks):
    """Inside answers are used. If one is missing or fails, a line says so in place of an error."""
    try:
        yield
    except NotImplementedError:
        print(f"This comes when you have solved {tasks}.")
    except Exception as error:
        print(f"This needs {tasks} to be right. So far: {type(error).__name__}: {error}")


def draw_moves(paper, z_score):
    """Sparse minus dense on every benchmark of both models, with 95 % intervals of independent models."""
    from matplotlib import pyplot as plt

    rows, points = {row["model"]: row for row in paper["table2"]}, {}
    for size in ("1B", "7B"):
        for name in BENCHMARKS:
            a, b = rows[f"{size} sparse"][name], rows[f"{size} dense"][name]
            points[size, name] = a - b, abs(1.96 * (a - b) / z_score(a, b, paper["test_items"][name]))
    fig, ax = plt.subplots(figsize=(8, 3.6), layout="tight")
    for size, shift, colour in (("1B", -0.12, "C0"), ("7B", 0.12, "C1")):
        moves, reach = zip(*(points[size, name] for name in BENCHMARKS), strict=True)
        places = np.arange(len(BENCHMARKS)) + shift
        ax.errorbar(places, moves, reach, fmt="o", color=colour, capsize=3, label=size)
    ax.axhline(0, color="0.6", lw=1)
    ax.set(xticks=range(len(BENCHMARKS)), ylabel="accuracy, sparse - dense", title="Table 2, with intervals")
    ax.set_xticklabels(BENCHMARKS)
    ax.legend()
    _show(fig, "Sparse minus dense on six benchmarks for 1B and 7B, with intervals that all contain zero")


def _show(fig, alt):
    """The picture, with a text for those who cannot see it."""
    from IPython.display import HTML, display
    from matplotlib import pyplot as plt

    picture = io.BytesIO()
    fig.savefig(picture, dpi=100)
    plt.close(fig)
    code = base64.b64encode(picture.getvalue()).decode()
    display(HTML(f'<img src="data:image/png;base64,{code}" alt="{alt}">'))  # pages keep alt of HTML alone


def number(name, got, wanted, hints=(), tolerance=1e-5):
    """Raises NotYet unless got is the number wanted, to a relative tolerance.

    Args:
        hints: (wrong number, what to say about it), tried in order.
    """
    try:
        value = float(got)
    except (TypeError, ValueError):
        raise NotYet(f"{name} should be a number. This is {got!r}.") from None
    if _near(value, wanted, tolerance):
        return
    for wrong, hint in hints:
        if _near(value, wrong, tolerance):
            raise NotYet(hint)
    raise NotYet(f"{name} is {value:.6g}. It should be {wanted:.6g}.")


def _near(a, b, tolerance):
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-12)


def formula_share(answer, d, f, n, k, h, wanted):
    """Task 1."""
    ratio = wanted / (1 - wanted)  # FFN over attention
    hints = [
        (ratio, "This is the FFN's FLOPs over those of attention. A share is a part of the sum of both."),
        (1 - wanted, "This is the share of attention. The other one is the FFN's."),
        (
            2 * ratio / (2 * ratio + 1),
            "Attention counts half. 2 D (N + K) H holds queries and output, N heads each, and keys and "
            "values, K heads each.",
        ),
        (
            ratio / (ratio + n / (n + k)),
            "Attention lacks the K key-value heads: it is 2 D (N + K) H.",
        ),
        (
            2 * ratio / (2 * ratio + 3),
            "This counts two FFN matrices, as squared ReLU has. But the task is the paper's formula, which "
            "counts three.",
        ),
        (
            ratio / (ratio + 3),
            "This counts one FFN matrix. The paper's formula counts three: 3 D F.",
        ),
        (
            ratio / (ratio + 1 / h),
            "Attention lacks the width of a head: it is 2 D (N + K) H.",
        ),
    ]
    number("formula_share", marking.run(answer, d, f, n, k, h), wanted, hints)


def complete_share(answer, model, ffn, projections, scores, head):
    """Task 2, from the four parts, each by its FLOPs for one token."""
    total = ffn + projections + scores + head
    layers = model["n_layer"]
    hints = [
        (1.5 * ffn / (total + 0.5 * ffn), "This counts three FFN matrices. Squared ReLU has two."),
        (
            ffn / (ffn + projections),
            "The two parts that the paper leaves out are missing: the scores of attention, and the head.",
        ),
        (ffn / (total - head), "The vocabulary head is missing: 6 D V, once."),
        (ffn / (total - scores), "The scores of attention are missing: 6 L T D."),
        (
            ffn / (total + scores),
            "The scores count each pair of tokens. A token looks only at those before it, on average at "
            "half of the sequence: 6 L T D.",
        ),
        (
            ffn / (total + (layers - 1) * head),
            "The vocabulary head is counted in every layer. There is one, at the end: no L.",
        ),
        (
            ffn / (ffn + (projections + scores) / layers + head),
            "Attention is counted in one layer. It is in every one: times L.",
        ),
        (
            (ffn / layers) / (ffn / layers + projections + scores + head),
            "The FFN is counted in one layer. It is in every one: times L.",
        ),
        (ffn, "These are FLOPs. Divide by the sum of all four parts."),
        (ffn / (total - ffn), "This is the FFN over all the rest. A share is a part of the whole."),
    ]
    number("complete_share", marking.run(answer, dict(model)), ffn / total, hints)


def step_speedup(answer, r, v, wanted):
    """Task 3, a step."""
    dense = 1 - r
    ffn = r / (1 / wanted - dense)
    hints = [
        (ffn, "This is the speed-up of the FFN alone. The rest of a step, 1 - r, stays as slow as it was."),
        (1 / wanted, "This is the time of a step, with dense as 1. The speed-up is one over it."),
        (
            dense + r * ffn,
            "Speed-ups are averaged. Times add up, speed-ups do not: sum the times, then take one over the "
            "sum.",
        ),
        (
            1 / (dense + r / v),
            "All six products are taken as Venom. Two of them are 2:4, at 1.5 times the speed.",
        ),
    ]
    if not math.isinf(v):
        averaged = (2 * 1.5 + 4 * v) / 6
        told = "The speed-ups of the six products are averaged. Average their times: 2 / 1.5 + 4 / v of 6."
        hints += [(1 / (dense + r / averaged), told), (averaged, told)]
    number(f"step_speedup(r={r:g}, v={v:g})", marking.run(answer, r, v), wanted, hints)


def run_speedup(answer, sparse, dense, step, wanted):
    """Task 3, a run."""
    p, q = sparse / (sparse + dense), sparse / dense
    hints = [
        (
            1 / (1 - p + p * step),
            "The sparse steps take longer than dense ones here: their time is divided by their speed-up.",
        ),
        (1 - p + p * step, "Speed-ups are averaged. Times add up: sparse steps take p / step of the time."),
        (1 / wanted, "This is the time of a run, with dense as 1. The speed-up is one over it."),
        (step, "This is the speed-up of a step. The dense steps are as slow as before."),
    ]
    if q < 1:
        told = f"The share is sparse over all steps, {sparse} / {sparse + dense}, not sparse over dense."
        hints.append((1 / (1 - q + q / step), told))
    number(
        f"run_speedup({sparse}, {dense}, step={step:g})",
        marking.run(answer, sparse, dense, step),
        wanted,
        hints,
    )


def venom_needed(answer, step, r, wanted):
    """Task 4; wanted is None where no v is enough."""
    got = _given_or_none(answer, step, r)
    if wanted is None:
        if got is not None:
            raise NotYet(
                f"venom_needed(step={step}, r={r}) is {got:.4g}. It should be None: even if Venom products "
                "took no time, the two 2:4 products and the rest of the step would take more than a step may."
            )
        return
    if got is None:
        raise NotYet(f"venom_needed(step={step}, r={r}) is None. There is one: {wanted:.4g}.")
    left = 4 / wanted + 2 / 1.5  # time of the six products
    hints = [
        (
            6 / left,
            "This is the speed-up of the whole FFN. Its two 2:4 products take 2 / 1.5 of 6: take that away.",
        ),
        (4 / left, "The two 2:4 products take no time here. They take 2 / 1.5: take that away from the 6 x."),
        (1 / wanted, "This is the time of a Venom product, with dense as 1. v is one over it."),
        (6 / (left - 2 / 1.5), "Six products are Venom here. Four are."),
    ]
    number(f"venom_needed(step={step}, r={r})", got, wanted, hints)


def _given_or_none(answer, *arguments):
    """`marking.run`, where None is an answer too."""
    result = []

    def kept(*given):
        result.append(answer(*given))
        return 0

    for name, other in (("__name__", "The answer"), ("__module__", "")):
        setattr(kept, name, getattr(answer, name, other))
    marking.run(kept, *arguments)
    return result[0]


def judge_speed(answer, printed, follows, limit, wanted):
    """Task 5."""
    got = _word(answer, SPEED, printed, follows, limit)
    if got == wanted:
        return
    if wanted == "follows":
        raise NotYet(
            f"{printed} is printed, {follows:.6g} follows. Rounded to three digits after the point they "
            f"are the same. Your verdict is {got!r}. It should be 'follows'."
        )
    if wanted == "out of reach":
        raise NotYet(
            f"{printed} is printed, but even the best inputs give no more than {limit:.6g}. Your verdict "
            f"is {got!r}. "
            "It should be 'out of reach'."
        )
    raise NotYet(
        f"{printed} is printed, {follows:.6g} follows, {limit:.6g} is the limit. Your verdict is {got!r}. "
        "It should be 'does not follow'."
        + (" The printed number does not pass the limit." * (got == SPEED[2]))
    )


def z_score(answer, a, b, n, wanted):
    """Task 6."""
    error = (a - b) / wanted
    one, two = math.sqrt(a * (1 - a) / n), math.sqrt(b * (1 - b) / n)
    hints = [
        (a - b, "This is the difference. Divide it by its standard error."),
        (error, "This is the standard error of the difference. Divide the difference by it."),
        (
            wanted / math.sqrt(n),
            f"The number of items is missing: with {n} items the standard error is smaller by the root of "
            f"{n}.",
        ),
        (wanted / n, "The standard error is multiplied by n, where it should be divided by its root."),
        (wanted * math.sqrt(n), "The variance is divided by n twice. Divide by n once, below the root."),
        (
            (a - b) / (one + two),
            "The two standard errors are added. Independent scatter adds as squares: sum below one root.",
        ),
        ((a - b) / one, "Only one model's error is there. Both answers scatter."),
        ((a - b) / two, "Only one model's error is there. Both answers scatter."),
        ((a - b) / error**2, "The root is missing: you divide by the variance."),
        (-wanted, "The sign is turned around: it is the first accuracy minus the second."),
    ]
    number("z_score", marking.run(answer, a, b, n), wanted, hints)


def paired_items(answer, ours, base, difference, error):
    """Task 7."""
    got = marking.run(answer, ours.copy(), base.copy())
    if not isinstance(got, tuple | list | np.ndarray) or len(got) != 2:
        raise NotYet("paired_items should return two numbers: the difference and its standard error.")
    n = len(ours)
    hints = [
        (-difference, "The sign is turned around: it is ours minus base."),
        (difference * n, "This counts items. Divide by their number."),
    ]
    number("The difference", got[0], difference, hints)
    a, b = ours.mean(), base.mean()
    unpaired = math.sqrt((a * (1 - a) + b * (1 - b)) / n)
    told = (
        "This is the standard error for independent items. Both models answered the same ones: subtract "
        "item by item first. Where both are right, or both wrong, the difference is 0 and does not scatter."
    )
    whole = float(np.std(ours - base, ddof=1))
    hints = [
        (unpaired, told),
        (math.sqrt(np.var(ours, ddof=1) / n + np.var(base, ddof=1) / n), told),
        (whole, "This is the scatter of a single item. The mean of n items scatters less: by the root of n."),
        (whole / n, "The standard deviation is divided by n. Divide it by the root of n."),
    ]
    number("The standard error", got[1], error, hints, tolerance=2e-3 if n > 100 else 1e-5)


def judge_quality(answer, low, high, margin, wanted):
    """Task 8."""
    got = _word(answer, QUALITY, low, high, margin)
    if got == wanted:
        return
    what = f"The interval is [{low}, {high}], the margin ±{margin}. Your verdict is {got!r}. "
    why = {
        "equal within the margin": "all of the interval lies inside the margin.",
        "different": "zero is not in the interval, and a part of it lies outside of the margin.",
        "cannot tell": "zero is in the interval, but so are differences beyond the margin. That no "
        "difference was shown does not show that there is none.",
    }
    raise NotYet(f"{what}It should be {wanted!r}: {why[wanted]}")


def _word(answer, words, *arguments):
    got = marking.run(answer, *arguments)
    if got not in words:
        raise NotYet(
            f"{answer.__name__} returns {got!r}. It should be one of: {', '.join(map(repr, words))}."
        )
    return got
