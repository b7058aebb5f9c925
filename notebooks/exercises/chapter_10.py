"""Exercises of chapter 10, the headline, measured. Read this after you tried them."""

from functools import cache
from typing import Any

import numpy as np

from exercises import exercise
from exercises.compare import number
from replicate import paper
from replicate.report import step_table, time_to_loss
from replicate.study import plans, results
from replicate.training import flops

AIM = 1.4  # times as fast, the least of the paper's headline


@exercise("10.1")
def layer_needed(answer: Any) -> str:
    """How many times as fast the FFN must be for a 1B step of 1.4x, by its share of the time."""
    r, model = _ffn_share(), paper.model("1B")
    number(
        answer,
        _needed(r),
        hints=[
            (
                _needed(flops.honest_share(model)),
                "You took the FFN's share of the FLOPs. Take that of the time.",
            ),
            (
                _needed(flops.formula_share(model)),
                "You took the paper's formula for r. Take the measured share.",
            ),
            (1 / (1 - r), "That is the step with an FFN that takes no time. Asked is the FFN for 1.4x."),
            (
                flops.run_speedup(r, AIM),
                "That is the step with an FFN of 1.4x. Turn it round: the step is 1.4x.",
            ),
            (
                1 / _needed(r),
                "That is the share of the FFN's time that is left. How many times as fast is it?",
            ),
            (r / (1 - 1 / AIM), "You forgot what is not the FFN: r / s = 1 / 1.4 - (1 - r)."),
            (AIM / r, "Speeds do not divide like this. Times add up: 1 / 1.4 = 1 - r + r / s."),
        ],
        tolerance=5e-3,
    )
    return f"No more than {1 / (1 - r):.2f} is possible, so 1.4 is near the end."


@exercise("10.2")
def composed_step(answer: Any) -> str:
    """Milliseconds of the 7B model's dense step, from depths of 2, 4 and 6 layers."""
    record = step_table.recorded("llama7b")
    layers, wanted = record.config["layers"], record.config["n_layer"]
    times = [record.results["depths"][str(n)]["ms"]["dense"]["ms"] for n in layers]
    slope, base = np.polyfit(layers, times, 1)
    number(
        answer,
        base + wanted * slope,
        hints=[
            (
                wanted / layers[-1] * times[-1],
                "You scaled the whole step. Embedding, head and loss do not grow.",
            ),
            (
                wanted / layers[0] * times[0],
                "You scaled the whole step. Embedding, head and loss do not grow.",
            ),
            (wanted * slope, "These are the layers alone. Add what a step takes without any layer."),
            (
                times[-1] + wanted * slope,
                "The deepest measured step has layers already. Add the missing ones.",
            ),
            (slope, "That is one layer. The model has 32, and a part without layers."),
        ],
        tolerance=1.5e-2,
    )
    return f"{base:.0f} ms do not depend on the depth, a layer takes {slope:.1f} ms."


@exercise("10.3")
def attention_needed(answer: Any) -> str:
    """How many times as fast attention must be to save what 4 of 64 saves over 4 of 16, figure 4d, 1B."""
    parts = {row["arm"]: row for row in step_table.parts(step_table.recorded("llama1b"))}
    first, second, attention = parts["venom16"], parts["venom64"], parts["venom16"]["attention"]
    saved = first["ffn"] - second["ffn"]
    steps = first["step"] - second["step"]
    number(
        answer,
        attention / (attention - saved),
        hints=[
            (saved, "So many milliseconds are saved. How fast must attention be to save as many?"),
            (
                first["ffn"] / second["ffn"],
                "That is how many times as fast the FFN becomes. Compare what is saved.",
            ),
            (
                saved / attention,
                "That is the share of attention's time to be saved. What is left, and how fast is that?",
            ),
            (
                1 + saved / attention,
                "Attention then takes its time less the saving. Divide its time by that.",
            ),
            (
                1 - saved / attention,
                "That is the share of attention's time that is left. Its inverse is the speed-up.",
            ),
            (
                attention / (attention - steps),
                "You took the difference of the steps. Take the FFN's part alone.",
            ),
        ],
        tolerance=5e-3,
    )
    return "A faster attention costs no loss, and sparser activations do. Longer sequences favour it more."


@exercise("10.4")
def speed_that_pays(answer: Any) -> str:
    """How many times as fast a run by algorithms 1, 2 must be to be level with a dense run stopped early."""
    runs = _runs()
    speeds, losses = time_to_loss.stopped_early(runs)
    gap = results.differences(runs)["recipe"].mean
    trained = results.differences(runs, column="final_loss")["recipe"].mean
    half = results.differences(runs)["recipe, 50% sparse first"].mean
    measured = step_table.speeds("llama1b")["recipe"]
    number(
        answer,
        np.interp(gap, losses, speeds),
        hints=[
            (gap, "That is the loss above dense. Which dense run, stopped early, loses as much?"),
            (
                np.interp(trained, losses, speeds),
                "You took the training loss. The curve is of held-out loss.",
            ),
            (
                np.interp(half, losses, speeds),
                "You took the run with half of its steps sparse. Take `recipe`.",
            ),
            (
                np.interp(measured, speeds, losses),
                "That is what a dense run loses that is as fast. Turn it round.",
            ),
            (
                np.interp(gap, speeds, losses),
                "`np.interp(x, xs, ys)` reads y at x. The known value is a loss.",
            ),
            (measured, "That is the measured step. Which one would be needed?"),
        ],
        tolerance=5e-3,
    )
    best = 1 / (1 - _ffn_share())
    return f"A step was measured at {measured:.2f}. With an FFN that takes no time it would be {best:.2f}."


def _ffn_share() -> float:
    """The FFN's share of the time of a dense 1B step."""
    dense = next(row for row in step_table.parts(step_table.recorded("llama1b")) if row["arm"] == "dense")
    return dense["ffn"] / dense["step"]


def _needed(r: float) -> float:
    """s with 1 / (1 - r + r / s) = AIM."""
    return r / (1 / AIM - 1 + r)


@cache
def _runs() -> Any:
    """The recorded runs at gpu scale that 10.4 compares, one row a run."""

    def plan(scale: str) -> Any:
        return plans.some(["dense", "recipe", "recipe, 50% sparse first"], (1, 2, 3), scale)

    return results.all_larger("laptop", plan, min_seeds=3)["gpu"]
