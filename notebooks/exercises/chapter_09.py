"""Exercises of chapter 09, sparse first, dense last. Read this after you tried them."""

import math
from functools import cache
from typing import Any

from exercises import exercise
from exercises.compare import number
from replicate import paper, schedule
from replicate.report import step_table
from replicate.study import plans, results, statistics
from replicate.training import flops

HALF, WHOLE = "recipe, 50% sparse first", "recipe"
ACCURACY, APART = 0.7, 0.01


@exercise("09.1")
def speed_of_the_mix(answer: Any) -> str:
    """The speed-up of the "50 %" run at gpu scale, with the measured step of the 1B model."""
    config = plans.everything("gpu", (1,))[HALF][0]
    sparse, steps, warm = schedule.sparse_steps(config), config.steps, config.dense_warmup
    step = step_table.speeds("llama1b")["recipe"]
    by_paper, by_count = (
        flops.step_speedup(share(paper.model("1B")), 8) for share in (flops.formula_share, flops.honest_share)
    )
    p = sparse / steps
    number(
        answer,
        flops.run_speedup(p, step),
        hints=[
            (
                flops.run_speedup(0.5, step),
                "Half of the steps *after the warm-up* are sparse. What share of all?",
            ),
            (step, "That is the sparse step. The other steps of the run are dense."),
            (1 - p + p * step, "You averaged speeds. Times add up: 1 / (1 - p + p / step)."),
            (1 / (1 - p + p * step), "Divide p by the step: the sparse part takes less time."),
            (1 - p + p / step, "That is the time over the dense run's. How many times as fast is it?"),
            (
                flops.run_speedup(p, by_paper),
                "You took the step by the paper's count. Take the measured one.",
            ),
            *(
                (
                    flops.run_speedup(share, by_count),
                    "You took the step by the complete count. Take the measured one.",
                )
                for share in (p, 0.5)
            ),
            (flops.run_speedup((sparse + warm) / steps, step), "The warm-up is dense, so it is not in p."),
        ],
        tolerance=1e-3,
    )
    return f"{sparse:,} of {steps:,} steps are sparse, p = {p:.3f}."


@exercise("09.2")
def dense_steps_of_equal_flops(answer: Any) -> str:
    """Dense steps with the FLOPs of 3000 steps of which 1400 are by the recipe, 1B model."""
    r, formula = (count(paper.model("1B")) for count in (flops.honest_share, flops.formula_share))
    in_time = (2 / 1.5 + 4 / 8) / 6
    number(
        answer,
        _equal(r, 2 / 2 + 4 / 8),
        hints=[
            (3000 - _equal(r, 1.5), "So many dense steps are saved. How many are left?"),
            (
                _equal(r, 6 * in_time),
                "You took 1.5 times as fast. That is time; of the FLOPs 2:4 needs half.",
            ),
            (_equal(r, 6 / 8), "You gave all six products an eighth. Two have weights in 2:4: a half."),
            (_equal(r, 6 / 2), "You gave all six products a half. Four are Venom: an eighth."),
            (_equal(r, 2 / 2 + 4 * 7 / 8), "87.5 % are zero. An eighth is left."),
            (_equal(1, 0), "Sparse steps have FLOPs too."),
            (_equal(1, 1.5), "You made whole steps sparse. Only the FFN's share of a step is."),
            (_equal(formula, 1.5), "You took the paper's formula for r. Take the complete count."),
            (_equal(r, 1.5, 1500), "1,400 of the 3,000 steps are sparse: the warm-up is not."),
            (_equal(r, 1.5, 3000), "You made all steps sparse. 1,400 of them are."),
        ],
        tolerance=1e-3,
    )
    return "On the clock the mix gains less: a quarter of the FLOPs takes more than a quarter of the time."


@exercise("09.3")
def surely_won_back(answer: Any) -> str:
    """The low end of the interval of recipe - half sparse, held out, gpu scale, paired by seed."""
    loss = _runs().pivot(index="seed", columns="arm", values="valid_loss")
    apart = (loss[WHOLE] - loss[HALF]).dropna().tolist()
    s, n = statistics.summary(apart), len(apart)
    t, error = statistics.t_quantile(n - 1), s.std / math.sqrt(n)
    alone = math.sqrt((loss[WHOLE].var() + loss[HALF].var()) / n)
    trained = results.differences(_runs(), base=HALF, column="final_loss")[WHOLE]
    number(
        answer,
        s.low,
        hints=[
            (s.mean, "That is the mean. How much is it at least, by the 95 % interval?"),
            (s.high, "That is the other end of the interval."),
            (-s.high, "You subtracted the other way round: the run that stays sparse minus the mix."),
            (-s.low, "You subtracted the other way round: the run that stays sparse minus the mix."),
            (s.mean - 1.96 * error, "You took 1.96. With three seeds t is 4.30."),
            (
                s.mean - t * s.std,
                "You took the spread of one seed. The mean's is smaller by the square root of n.",
            ),
            (
                s.mean - t * error * math.sqrt((n - 1) / n),
                "Your s divides by n. From three seeds it divides by n - 1: `ddof=1`.",
            ),
            (s.mean - t * alone, "You did not pair the seeds. Take each seed's difference first."),
            (s.mean - error, "That is one standard error below the mean. Multiply it by t."),
            (
                trained.low,
                "That is the training loss, which reaches back before the end. Take the held-out loss.",
            ),
            (results.differences(_runs())[HALF].low, "That is against the dense run. Compare with `recipe`."),
        ],
        tolerance=1.5e-2,
    )
    share = s.mean / results.differences(_runs())[WHOLE].mean
    return f"It is above zero: the dense end surely helps. On average it wins back {share:.0%} of the cost."


@exercise("09.4")
def questions_needed(answer: Any) -> str:
    """Questions with which a difference of 0.01 is two standard errors, both accuracies near 0.7."""
    one = ACCURACY * (1 - ACCURACY)
    right = 2 * one * (2 / APART) ** 2
    number(
        answer,
        right,
        hints=[
            (
                right / 2,
                "Half of it. Either you counted only one score's variance, or you took 2 instead of 2^2 "
                "for two standard errors.",
            ),
            (right / 4, "That makes 0.01 *one* standard error. Asked are two."),
            (right * 1.96**2 / 4, "That is for 1.96 standard errors. Asked are two."),
            (2 * 0.25 * (2 / APART) ** 2, "You took a (1 - a) = 0.25, for a = 0.5. Here a is 0.7."),
            (2 * ACCURACY * (2 / APART) ** 2, "The variance of one answer is a (1 - a), not a."),
            (math.sqrt(right), "That is the square root of the number."),
            (right * 2, "The two variances add up once: 2 a (1 - a) / n."),
        ],
        tolerance=5e-3,
    )
    return "The paper's largest benchmark has 10,042 items, its smallest 500."


def _equal(r: float, products: float, sparse: int = 1400, steps: int = 3000) -> float:
    """Dense steps with the same FLOPs if the FFN's six products need those of `products` dense ones."""
    return steps - sparse * r * (1 - products / 6)


@cache
def _runs() -> Any:
    """The recorded runs at gpu scale that 09.3 compares, one row a run."""

    def plan(scale: str) -> Any:
        return plans.some(["dense", WHOLE, HALF], (1, 2, 3), scale)

    return results.all_larger("laptop", plan, min_seeds=3)["gpu"]
