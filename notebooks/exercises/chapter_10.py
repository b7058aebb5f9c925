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
DEPTH = 48  # layers that no table of the chapter has


@exercise("10.1")
def layer_needed(answer: Any) -> str:
    """How many times as fast the FFN must be for a 1B step of 1.4x, by its share of the time."""
    r, model = _share("ffn"), paper.model("1B")
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
            (1 + (AIM - 1) / r, "Speeds do not add up; times do."),
            (_needed(_share("attention")), "Take the FFN's share, not attention's."),
            (_needed(r, 1.7), "1.7x is beyond the limit. Take 1.4x."),
            (AIM / r, "Speeds do not divide like this. Times add up: 1 / 1.4 = 1 - r + r / s."),
        ],
        tolerance=5e-3,
    )
    return f"No more than {1 / (1 - r):.2f} is possible, so 1.4 is near the end."


@exercise("10.2")
def composed_step(answer: Any) -> str:
    """Milliseconds of a step of 48 layers of the 7B model by figure 4d, from depths of 2, 4 and 6 layers."""
    record = step_table.recorded("llama7b")
    layers, model, wanted = record.config["layers"], record.config["n_layer"], DEPTH
    times, dense = (
        [record.results["depths"][str(n)]["ms"][arm]["ms"] for n in layers] for arm in ("venom16", "dense")
    )
    slope, base = np.polyfit(layers, times, 1)
    parabola = np.polyval(np.polyfit(layers, times, 2), wanted)
    pairs = [np.polyval(np.polyfit(layers[i : i + 2], times[i : i + 2], 1), wanted) for i in (0, 1)]
    whole = "You scaled the whole step. Embedding, head and loss do not grow."
    number(
        answer,
        base + wanted * slope,
        hints=[
            (wanted / layers[-1] * times[-1], whole),
            (wanted / layers[0] * times[0], whole),
            (wanted / model * (base + model * slope), whole),
            (base + model * slope, f"That is the model of the first table, with {model} layers."),
            (np.polyval(np.polyfit(layers, dense, 1), wanted), "That is the dense step. Take `venom16`."),
            (parabola, "A parabola goes through any three points. Take a straight line."),
            *((time, "You took two of the three depths. Take all three.") for time in pairs),
            ((base + wanted * slope) / 1000, "In milliseconds, please."),
            (wanted * slope, "These are the layers alone. Add what a step takes without any layer."),
            (
                times[-1] + wanted * slope,
                "The deepest measured step has layers already. Add the missing ones.",
            ),
            (slope, f"That is one layer. There are {wanted}, and a part without layers."),
        ],
        tolerance=2e-3,
    )
    return f"{base:.0f} ms do not depend on the depth, a layer takes {slope:.1f} ms."


@exercise("10.3")
def attention_needed(answer: Any) -> str:
    """How many times as fast attention must be to save what 4 of 64 saves over 4 of 16, figure 4d, 1B."""
    parts = {row["arm"]: row for row in step_table.parts(step_table.recorded("llama1b"))}
    first, second, attention = parts["venom16"], parts["venom64"], parts["venom16"]["attention"]
    dense = parts["dense"]
    saved = first["ffn"] - second["ffn"]
    steps = first["step"] - second["step"]
    against = "Compare `venom64` with `venom16`, not with dense."
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
            *(
                (attention / (attention - (dense["ffn"] - other["ffn"])), against)
                for other in (first, second)
            ),
            (
                first["step"] / second["step"],
                "That is the step's speed-up. Attention is only a part of it.",
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
    found = results.differences(runs)["recipe"]
    gap, best = found.mean, 1 / (1 - _share("ffn"))
    trained = results.differences(runs, column="final_loss")["recipe"].mean
    half = results.differences(runs)["recipe, 50% sparse first"].mean
    measured = step_table.speeds("llama1b")["recipe"]
    either = (
        f"{best:.2f} is either the step's ceiling or what the training loss would give. Take the held-out "
        "loss, and read the black line at it."
    )
    number(
        answer,
        np.interp(gap, losses, speeds),
        hints=[
            (gap, "That is the loss above dense. Which dense run, stopped early, loses as much?"),
            *((speed, either) for speed in (np.interp(trained, losses, speeds), best)),
            *(
                (np.interp(end, losses, speeds), "Take the mean, not the interval.")
                for end in (found.low, found.high)
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
    return f"A step was measured at {measured:.2f}. With an FFN that takes no time it would be {best:.2f}."


def _share(part: str) -> float:
    """The share of the time of a dense 1B step that is the FFN's ("ffn") or another part's."""
    dense = next(row for row in step_table.parts(step_table.recorded("llama1b")) if row["arm"] == "dense")
    return dense[part] / dense["step"]


def _needed(r: float, aim: float = AIM) -> float:
    """s with 1 / (1 - r + r / s) = aim; negative if no s is enough."""
    return r / (1 / aim - 1 + r)


@cache
def _runs() -> Any:
    """The recorded runs at gpu scale that 10.4 compares, one row a run."""

    def plan(scale: str) -> Any:
        return plans.some(["dense", "recipe", "recipe, 50% sparse first"], (1, 2, 3), scale)

    return results.all_larger("laptop", plan, min_seeds=3)["gpu"]
