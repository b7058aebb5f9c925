"""Exercises of chapter 11, the audit. Read this after you tried them."""

import math
from typing import Any

from exercises import exercise
from exercises.compare import Wrong, number
from replicate import paper
from replicate.paper import audit
from replicate.training import flops


def _printed_run() -> float:
    """Table 2's speed-up of the 7B run."""
    return next(row["speedup"] for row in paper.rows(2) if row["model"] == "7B sparse")


@exercise("11.1")
def least_sparse_steps(answer: Any) -> str:
    """The smallest number of 48k steps that must be sparse for 1.387x if sparse steps take no time."""
    run, steps = _printed_run(), sum(paper.number("mix_7b"))
    least = math.ceil(steps * (1 - 1 / run))
    said = paper.number("step_speedup_text")
    if isinstance(answer, float) and abs(answer - least / steps) < 0.005:
        raise Wrong(f"{answer:.3f} is the share of the steps. How many of {steps:,} is that?")
    number(
        answer,
        least,
        hints=[
            (least - 1, "You rounded down, and so many are just too few."),
            (steps / run, "So many steps may be dense: they take all the time. The others are sparse."),
            (1 / run, f"That share of the steps may be dense. The others, of {steps:,}, are sparse."),
            (
                steps * flops.share_needed(run, said),
                f"That is for sparse steps of {said}x. Here they take no time at all.",
            ),
            (steps / 2, f"{steps // 2:,} is half. Solve 1 / (1 - p) = {run}."),
            (
                steps * (run - 1),
                f"The run takes 1 / {run} of the time. It saves 1 - 1 / {run}, not {run} - 1.",
            ),
            (
                paper.number("mix_7b")[0],
                "That is the printed mix. It gives 1.263x at most, as section 2 shows.",
            ),
        ],
        tolerance=2e-5,
    )
    return f"The table prints {paper.number('mix_7b')[0]:,}, too few, however fast a sparse step is."


@exercise("11.2")
def needed_v(answer: Any) -> str:
    """v that gives Table 2's 7B run at a 1:1 mix with r = 0.80."""
    run, r = _printed_run(), paper.number("ffn_share_text")
    step = flops.step_needed(run, 0.5)
    if answer == "none":  # a check takes None for no answer, so the stub passes this word
        raise Wrong("`None` means that no v is enough. Did you take the 1:1 mix (p = 0.5) and r = 0.80?")
    number(
        answer,
        flops.venom_needed(step, r),
        hints=[
            (step, "That is the speed-up of a sparse step. Which v gives such a step? `flops.venom_needed`."),
            (
                flops.venom_needed(run, r),
                f"You took {run}x for a step. It is a run: first `flops.step_needed`.",
            ),
            (
                flops.venom_needed(step, flops.formula_share(paper.model("7B"))),
                "You took r = 0.75, here it is 0.80.",
            ),
            (
                paper.number("venom_speedup_table2"),
                "That is the printed v close by. Which v is needed exactly?",
            ),
            (
                flops.venom_needed(paper.number("step_speedup_text"), r),
                "You took 2.2x, the step of the text.",
            ),
        ],
        tolerance=5e-3,
    )
    near = flops.run_speedup(0.5, flops.step_speedup(r, paper.number("venom_speedup_table2")))
    return (
        f"Table 2's v = 8 is close by: with r = 0.80 it gives {near:.3f}x. So the row may mix the table's v "
        "with the text's r and the 1B model's mix."
    )


@exercise("11.3")
def run_with_three_quarters(answer: Any) -> str:
    """The 7B run with 36k of 48k steps sparse, complete count, v = 7."""
    model, v, p = paper.model("7B"), paper.number("venom_speedup_text"), 0.75
    r = flops.honest_share(model)
    step, mix = flops.step_speedup(r, v), paper.number("mix_7b")
    formula = flops.step_speedup(flops.formula_share(model), v)
    small = flops.step_speedup(flops.honest_share(paper.model("1B")), v)
    only = "Only the FFN is faster: use `step_speedup(r, v)`."
    number(
        answer,
        flops.run_speedup(p, step),
        hints=[
            (step, "That is the speed-up of a sparse step. A quarter of the run's steps is dense."),
            (flops.run_speedup(p, formula), "You took the paper's formula for r. Take the complete count."),
            (flops.run_speedup(p, v), only),
            (flops.run_speedup(p, flops.ffn_speedup(v)), only),
            (flops.run_speedup(0.5, step), "That is for 24k, as in section 4. Here it is 36k."),
            (
                flops.run_speedup(1 - p, step),
                "You took the share of the dense steps. p is that of the sparse.",
            ),
            (flops.run_speedup(p, small), "That is the 1B model. The question is about 7B."),
            (
                flops.run_speedup(mix[0] / sum(mix), step),
                "You took the printed mix, 10k of 48k. Here it is 36k.",
            ),
            (
                flops.run_speedup(p, flops.step_speedup(r, math.inf)),
                "That is the limit of a large v. Here v = 7.",
            ),
            (flops.run_speedup(p, flops.step_speedup(r, 8)), "You took v = 8. Here v = 7."),
            (1 - p + p * step, "You averaged the speeds. Times add up: a run is 1 / (1 - p + p / step)."),
        ],
        tolerance=1e-3,
    )
    return f"So even with three sparse steps in four the complete count stays below {_printed_run()}x."


@exercise("11.4")
def correlation(answer: Any) -> str:
    """rho with which the largest difference is two standard errors."""
    largest = max(abs(move["standard errors"]) for move in audit.accuracy_moves())
    number(
        answer,
        1 - (largest / 2) ** 2,
        hints=[
            ((largest / 2) ** 2, "That is 1 - ρ. What is ρ?"),
            (math.sqrt(1 - (largest / 2) ** 2), "That is the root of ρ."),
            (1 - largest**2, "Asked are two standard errors."),
            (1 - largest / 2, "The error shrinks by the square root of 1 - ρ. You solved for 1 - ρ itself."),
            (largest / 2, "By this factor the error must shrink, and it is the square root of 1 - ρ."),
            (1 - 2 / largest, "The error must become smaller, from 1 to 0.97 / 2. You made it larger."),
            (1 - (2 / largest) ** 2, "The error must become smaller. You made it larger: ρ is not negative."),
            (
                1 - (largest / 1.96) ** 2,
                "That is for 1.96 standard errors, half of a 95 % interval; asked are 2.",
            ),
        ],
        tolerance=5e-3,
    )
    return "Without the answers to each item nobody can tell whether the correlation is so large."


@exercise("11.5")
def errors_of_the_average(answer: Any) -> str:
    """Table 4's drop in the average of six scores, from 0 to 60k sparse steps, in standard errors."""
    dense, sparse = paper.rows(4)[0], paper.rows(4)[-1]
    of_dense, both = _variances(dense), [a + b for a, b in zip(_variances(dense), _variances(sparse))]
    drop, n = audit.mean_accuracy(dense) - audit.mean_accuracy(sparse), len(both)
    error = math.sqrt(sum(both)) / n
    printed = dense["avg"] - sparse["avg"]
    number(
        answer,
        drop / error,
        hints=[
            (error, "That is the standard error of the drop. How many of them is the drop?"),
            (drop / error / n, "That is the error of the sum of six scores. An average is a sixth of it."),
            (2 * drop / error, "The average is over six, not twelve."),
            (
                drop / math.sqrt(sum(both) / n),
                "You divided the sum of the variances by 6. Half way: the variance of a sixth is a 36th.",
            ),
            (
                drop / (sum(map(math.sqrt, both)) / n),
                "You averaged the standard errors. Of independent scores the variances add up.",
            ),
            (drop * n / math.sqrt(sum(of_dense)), "You counted one model's error. Both models have one."),
            (printed / error, f"You took the printed average, {sparse['avg']}. Take the recomputed one."),
        ],
        tolerance=5e-3,
    )
    return (
        "More than the choice of test items explains. What another seed would give, one run of each "
        "model cannot say."
    )


def _variances(row: dict[str, Any]) -> list[float]:
    """a (1 - a) / n of each of the six scores of a row."""
    items = paper.data()["test_items"]
    return [row[name] * (1 - row[name]) / items[name] for name in audit.BENCHMARKS]
