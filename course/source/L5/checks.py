"""Tests of lab L5: each function takes an answer, tries it on numbers, and names its mistake."""

import base64
import contextlib
import csv
import io
import math
from pathlib import Path

import marking
import numpy as np
from marking import NotYet, right

__all__ = ["right"]


def losses():
    """{arm: {seed: held-out loss in nats}}, from losses.csv."""
    found = {}
    with (Path(__file__).parent / "losses.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["arm"], {})[int(row["seed"])] = float(row["loss"])
    return found


def number(name, got, wanted, hints=(), tolerance=1e-4):
    """Raises NotYet unless got is the number wanted, to a relative tolerance.

    Args:
        hints: (wrong number, what to say about it), tried in order.
    """
    try:
        value = float(got)
    except (TypeError, ValueError):
        raise NotYet(f"{name} should be a number. This is a {type(got).__name__}.") from None
    if _near(value, wanted, tolerance):
        return
    for wrong, hint in hints:
        if _near(value, wrong, tolerance):
            raise NotYet(hint)
    if wanted and not math.isnan(wanted) and _near(value, -wanted, tolerance):
        raise NotYet(f"{name} is {value:.6g}. The size is right, the sign is not.")
    raise NotYet(f"{name} is {value:.6g}. It should be {wanted:.6g}.")


def pair(name, got, parts):
    """Raises NotYet unless got is a pair of numbers. parts: (what it is, wanted, hints) for each."""
    if not isinstance(got, tuple | list | np.ndarray) or len(got) != 2:
        raise NotYet(f"{name} should return two numbers: {parts[0][0]}, {parts[1][0]}.")
    for value, (what, wanted, hints) in zip(got, parts, strict=True):
        number(f"{name}: {what}", value, wanted, hints)


def _near(a, b, tolerance):
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return abs(a - b) <= max(tolerance * abs(b), 1e-9)


def standard_error(answer, values, wanted):
    """Task 1. wanted: the right number, or None where one value is given."""
    got = marking.run(answer, values)
    n = len(values)
    if n == 1:
        if _is_zero(got):
            raise NotYet(
                "For one value it is 0, as if one run were exact. One value says nothing about scatter: "
                "return math.nan."
            )
        return number("standard_error of one value", got, math.nan)
    hints = [
        (
            wanted * math.sqrt((n - 1) / n),
            f"The sum of squares is divided by n = {n}. The mean was computed from the same numbers, so "
            f"they lie nearer to it than to the truth: divide by n - 1 = {n - 1}. (In numpy: ddof=1.)",
        ),
        (
            wanted * math.sqrt(n),
            "This is the standard deviation, the scatter of one value. The mean of n values scatters less: "
            "divide by the square root of n.",
        ),
        (
            wanted * math.sqrt(n - 1),
            "This is the standard deviation with n below the root. The standard error divides by n - 1 "
            "there, and then by the square root of n.",
        ),
        (wanted**2, "This is the square of the standard error. Take the root."),
        (
            wanted**2 * n,
            "This is the variance. The standard error is its root, divided by the square root of n.",
        ),
        (
            wanted / math.sqrt(n),
            "The standard deviation is divided by n. The standard error divides it by the square root of n.",
        ),
    ]
    return number(f"standard_error({values})", got, wanted, hints)


def _is_zero(got):
    try:
        return float(got) == 0
    except (TypeError, ValueError):
        return False


def paired(answer, ours, base, mean, error, others=()):
    """Task 2. others: (wrong mean, wrong error, hint) of typical mistakes on these numbers."""
    got = marking.run(answer, ours, base)
    by_mean = [
        (
            -mean,
            "The sign is turned around: a loss above the base's counts as positive. Subtract base from ours.",
        ),
        *((wrong, hint) for wrong, _, hint in others),
    ]
    by_error = [(wrong, hint) for _, wrong, hint in others]
    pair("paired", got, [("mean difference", mean, by_mean), ("standard error", error, by_error)])


def paired_example(answer, ours, base):
    """Task 2 on three seeds that stand in another order in base."""
    others = [
        (
            1.0,
            1.755942,
            "The standard error is that of the unpaired difference. Subtract seed by seed first, then look "
            "at the scatter of the differences.",
        ),
        (
            1.0,
            2.254625,
            "The values are matched by their order. Match them by their seeds: ours[seed] - base[seed].",
        ),
        (1.0, 0.235702, "The squares are divided by n. Divide by n - 1 (in numpy: ddof=1)."),
        (1.0, 0.5, "This is the scatter of one difference. Their mean scatters less: by the root of n."),
    ]
    paired(answer, ours, base, 1.0, 0.288675, others)


def unpaired(answer, ours, base, mean, errors):
    """Task 2. errors: the two standard errors."""
    got = marking.run(answer, ours, base)
    a, b = errors
    hints = [
        (
            a + b,
            "The two standard errors are added. Independent scatter adds as squares: the root of a² + b².",
        ),
        (a * a + b * b, "This is the sum of the squares. Take the root."),
        (math.sqrt(abs(a * a - b * b)), "The squares are subtracted. Both runs scatter: add them."),
        (a, "This is the standard error of one arm alone. Both scatter."),
        (b, "This is the standard error of one arm alone. Both scatter."),
        (
            math.sqrt((a * a + b * b) / 2),
            "This is the mean scatter of the two arms. A difference scatters more than either: do not "
            "divide by 2.",
        ),
    ]
    pair("unpaired", got, [("mean difference", mean, []), ("standard error", math.hypot(a, b), hints)])


def interval(answer, mean, error, n, t, t_n):
    """Task 3. t: the quantile for n - 1 degrees of freedom, t_n: that for n."""
    got = marking.run(answer, mean, error, n)
    if not isinstance(got, tuple | list | np.ndarray) or len(got) != 2:
        raise NotYet("interval should return two numbers: its lower and its upper end.")
    if float(got[0]) > float(got[1]):
        raise NotYet("The ends are in the wrong order: the lower one comes first.")
    if not _near((float(got[0]) + float(got[1])) / 2, mean, 1e-4):
        raise NotYet(
            f"The interval [{got[0]:.6g}, {got[1]:.6g}] is not centred on the mean {mean:.6g}. It reaches "
            "as far down as up."
        )
    hints = [
        (
            1.96 * error,
            f"1.96 belongs to the normal distribution, for which the scatter is known. Here it is "
            f"estimated from {n} numbers: take t from the table.",
        ),
        (
            t_n * error,
            f"Your t is that for {n} degrees of freedom. {n} numbers leave n - 1 = {n - 1}: one was used "
            "up by the mean.",
        ),
        (
            error,
            "It reaches one standard error to either side, which covers far less than 95 %. Multiply by t.",
        ),
        (
            t * error / math.sqrt(n),
            "The standard error is divided by the square root of n once more. That was done already: it is "
            "the scatter of the mean.",
        ),
        (t * error / 2, "It reaches half as far as it should: t standard errors to *either* side."),
    ]
    number("Half the width of the interval", (float(got[1]) - float(got[0])) / 2, t * error, hints)


def pooled(answer, groups, wanted):
    """Task 4."""
    got = marking.run(answer, groups)
    deviations = [np.std(group, ddof=1) for group in groups]
    everything = np.concatenate([np.asarray(group, dtype=float) for group in groups])
    hints = [
        (
            float(np.mean(deviations)),
            "The standard deviations are averaged. Average the variances (their squares), then take the "
            "root: only variances add.",
        ),
        (
            float(everything.std(ddof=1)),
            "All differences are thrown together, so that the distances between the arms count as scatter. "
            "Measure each arm's differences from their own mean.",
        ),
        (wanted**2, "This is the pooled variance. Take the root."),
        (
            math.sqrt(float(np.mean([np.var(group) for group in groups]))),
            "The squares are divided by n. Divide by n - 1, arm by arm, as in task 1.",
        ),
        (
            math.sqrt(float(np.mean(np.square(deviations)))),
            "Each arm counts the same, however many runs it has. Sum the squares of all arms, and divide "
            "by the sum of their n - 1.",
        ),
    ]
    number("pooled", got, wanted, hints)


def power(answer, difference, std, n, wanted, mistakes=()):
    """Task 5, by simulation, so the tolerance is wide. mistakes: (share, hint), nearest first."""
    got = marking.run(answer, difference, std, n)
    number("power", got, got)
    value = float(got)
    if abs(value - wanted) < 0.015:
        again = float(marking.run(answer, difference, std, n, seed=2))
        if again == value:
            raise NotYet("Another seed gives the very same share. Draw with np.random.default_rng(seed).")
        return
    if not 0 <= value <= 1:
        raise NotYet(f"power is {value:.4g}. It should be a share, between 0 and 1.")
    for wrong, hint in [
        *mistakes,
        (
            1 - wanted,
            "This is the share of intervals that contain zero: the others have seen the difference.",
        ),
    ]:
        if abs(value - wrong) < 0.015:
            raise NotYet(hint)
    raise NotYet(f"power({difference}, {std}, n={n}) is {value:.3f}. It should be about {wanted:.3f}.")


T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def _power(size, n):
    """The power for a difference of so many standard deviations: an integral over the estimated one."""
    estimated = np.linspace(1e-6, 6, 2001)
    weight = estimated ** (n - 2) * np.exp(-(n - 1) * estimated**2 / 2)
    reach = T95[n - 1] * estimated
    beyond = np.array([_above(r - size * math.sqrt(n)) + _above(r + size * math.sqrt(n)) for r in reach])
    return float((beyond * weight).sum() / weight.sum())


def _above(z):
    return math.erfc(z / math.sqrt(2)) / 2


def _interval(values):
    if len(values) < 2:
        raise NotYet("interval_of was asked about fewer than two numbers. Of those there is no interval.")
    half = T95[len(values) - 1] * np.std(list(values), ddof=1) / math.sqrt(len(values))
    return np.mean(list(values)) - half, np.mean(list(values)) + half


def power_examples(answer):
    """Task 5 for three runs, with a difference of three standard deviations and with none."""
    normal = "That is the power with 1.96 in place of t. It sees more than it may, also where nothing is."
    freedom = "That is the power with t for n degrees of freedom. n numbers leave n - 1: take T95[n - 1]."
    spread = "That is the power with a standard deviation that divides by n. Divide by n - 1 (numpy: ddof=1)."
    single = "That is the power with the scatter of one run. The mean scatters less: divide by the root of n."
    lower = "An interval that lies below zero leaves it out as well: count both sides."
    power(
        answer, 0.009, 0.003, 3, 0.745, [(0.992, normal), (0.901, freedom), (0.859, spread), (0.385, single)]
    )
    power(answer, 0.0, 0.003, 3, 0.05, [(0.189, normal), (0.086, freedom), (0.025, lower)])


def visible_example(answer):
    """Task 6 for three runs."""
    mistakes = [
        (2.095, "There the power is 50 %. It should be 80 %."),
        (
            1.617,
            "This is (1.96 + 0.84) std / sqrt(n), for a scatter that is known. Here it is estimated: use "
            "your power.",
        ),
        (
            2.97,
            "This is (t + 0.84) std / sqrt(n), which is a tenth too small for three runs. Use `power`.",
        ),
    ]
    visible_difference(answer, 1.0, 3, 3.264, mistakes)


def visible_difference(answer, std, n, wanted, mistakes=()):
    """Task 6; wanted in the same unit as std."""
    got = marking.run(answer, lambda difference, std, n: _power(difference / std, n), std, n)
    number("visible_difference", got, got)
    value = float(got)
    if abs(value - wanted) <= 0.04 * wanted:
        return
    for wrong, hint in mistakes:
        if abs(value - wrong) <= 0.04 * wrong:
            raise NotYet(hint)
    raise NotYet(f"visible_difference({std}, n={n}) is {value:.4g}. It should be about {wanted:.4g}.")


def holm(answer, values, wanted, mistakes=()):
    """Task 7. mistakes: (a wrong list, hint)."""
    got = marking.run(answer, list(values))
    try:
        kept = [bool(value) for value in got]
    except TypeError:
        raise NotYet("holm should return a list with True or False for each p-value.") from None
    if len(kept) != len(values):
        raise NotYet(
            f"holm returns {len(kept)} answers for {len(values)} p-values. It should be one for each."
        )
    if kept == wanted:
        return
    for wrong, hint in mistakes:
        if kept == wrong:
            raise NotYet(hint)
    at = next(i for i, (a, b) in enumerate(zip(kept, wanted, strict=True)) if a != b)
    raise NotYet(
        f"holm({list(values)}) says {kept[at]} about p = {values[at]}. It should be {wanted[at]}. Sort the "
        "p-values, write the bar of each beside it, and see where the first one fails."
    )


@contextlib.contextmanager
def needs(tasks):
    """Inside answers are used. If one is missing or fails, a line says so in place of an error."""
    try:
        yield
    except NotImplementedError:
        print(f"This comes when you have solved {tasks}.")
    except Exception as error:
        print(f"This needs {tasks} to be right. So far: {type(error).__name__}: {error}")


def draw_losses(losses, arms):
    """The held-out losses of some arms: a line for each seed."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for seed in losses["dense"]:
        values = [losses[arm][seed] for arm in arms]
        axes[0].plot(values, "o-", label=f"seed {seed}")
        axes[1].plot([value - losses["dense"][seed] for value in values], "o-", label=f"seed {seed}")
    span = max(high - low for low, high in (ax.get_ylim() for ax in axes))
    for ax, title in zip(axes, ("held-out loss (nats)", "the same, above dense of the same seed")):
        middle = sum(ax.get_ylim()) / 2
        ax.set(title=title, xticks=range(len(arms)), ylim=(middle - span / 2, middle + span / 2))
        ax.set_xticklabels(arms, rotation=20)
        ax.legend()
    fig.tight_layout()
    _show(
        fig,
        f"Losses of {', '.join(arms)}: lines of the seeds, apart on the left, close together on the right",
    )


def _show(fig, alt):
    """The picture, with a text for those who cannot see it."""
    from IPython.display import HTML, display
    from matplotlib import pyplot as plt

    picture = io.BytesIO()
    fig.savefig(picture, dpi=100)
    plt.close(fig)
    code = base64.b64encode(picture.getvalue()).decode()
    display(HTML(f'<img src="data:image/png;base64,{code}" alt="{alt}">'))  # pages keep alt of HTML alone


def draw_power(power, std):
    """Power over the difference, for three and six seeds."""
    from matplotlib import pyplot as plt

    differences = np.linspace(0, 6 * std, 13)
    curves = {n: [power(d, std, n, trials=4000) for d in differences] for n in (3, 6)}
    fig, ax = plt.subplots(figsize=(6, 3.4), layout="tight")
    for n, curve in curves.items():
        ax.plot(differences, curve, "o-", label=f"{n} seeds")
    ax.axhline(0.8, color="0.6", lw=1)
    ax.set_xticks(np.arange(0, 6 * std, 0.005))
    ax.set(xlabel="true difference (nats)", ylabel="power", title=f"What is seen, if pairs scatter by {std}")
    ax.legend()
    _show(fig, "Power over the true difference: six seeds see half the difference that three seeds see")


def show_table(losses, paired, interval_of, p_value, holm, verdict):
    """Every arm against dense: difference, interval, verdict, and what Holm leaves of it."""
    arms = [arm for arm in losses if arm != "dense"]
    differences = [paired(losses[arm], losses["dense"]) for arm in arms]
    pairs = [[losses[arm][seed] - loss for seed, loss in losses["dense"].items()] for arm in arms]
    ends = [interval_of(pair) for pair in pairs]
    kept = holm([p_value(mean, error) for mean, error in differences])
    words = [verdict(losses[arm], losses["dense"], interval_of) for arm in arms]
    print(f"{'arm':22s} {'difference':>10s}  {'95 % interval':>18s}  {'verdict by itself':18s} after Holm")
    for arm, (mean, _), (low, high), keep, word in zip(arms, differences, ends, kept, words, strict=True):
        after = word if keep else "not told apart"
        print(f"{arm:22s} {mean:+10.4f}  {low:+9.4f} {high:+8.4f}  {word:18s} {after}")


def holm_examples(answer):
    """Task 7 on two lists of four."""
    none = (
        "Each p-value is compared with 0.05, as if there were no others. The bar of the smallest is 0.05 / m."
    )
    same = (
        "Each p-value is compared with 0.05 / m. Only the smallest is: the next ones have 0.05 / (m - 1) ..."
    )
    order = "The answers stand in the order of the sorted p-values. Put each back to its place."
    on = "The rule stops at the first p-value that fails. You went on, and kept a larger one."
    up = (
        "All are kept because the largest passes its bar. Begin with the smallest, stop at the first failure."
    )
    first = [0.0136, 0.2806, 0.0043, 0.0436], [True, False, True, False]
    second = [0.045, 0.001, 0.04, 0.03], [False, True, False, False]
    mistakes = [([True, False, True, True], none), ([False, False, True, False], same)]
    holm(answer, *first, [*mistakes, ([True, True, False, False], order)])
    holm(answer, *second, [([True, True, False, False], on), ([True] * 4, up)])


WORDS = ("higher", "lower", "not told apart", "one seed: no word")


def verdict(answer, ours, base, wanted):
    """Task 8."""
    got = marking.run(answer, ours, base, lambda values: _interval(values))
    if got == wanted:
        return
    shared = sorted(set(ours) & set(base))
    what = f"ours has seeds {sorted(ours)}, base has {sorted(base)}. "
    if got not in WORDS:
        raise NotYet(f"verdict returns {got!r}. It should be one of: {', '.join(map(repr, WORDS))}.")
    if wanted == WORDS[3]:
        raise NotYet(
            what
            + f"Seeds in both: {len(shared)}. Fewer than two differences have no scatter to judge them by. "
            f"Your verdict is {got!r}. It should be {wanted!r}."
        )
    if got == WORDS[3]:
        raise NotYet(
            what + f"{len(shared)} seeds are in both, so the differences have a scatter. Judge by it."
        )
    if wanted == WORDS[2]:
        raise NotYet(
            f"The 95 % interval of the difference contains zero, so its sign is not known. Your verdict is "
            f"{got!r}. It should be {wanted!r}, however the means stand."
        )
    if got == WORDS[2]:
        raise NotYet(
            f"The 95 % interval of the paired difference does not contain zero. It should be {wanted!r}. "
            "Is yours the interval of the differences, seed by seed?"
        )
    raise NotYet(f"Your verdict is {got!r}. It should be {wanted!r}: the difference is ours - base.")
