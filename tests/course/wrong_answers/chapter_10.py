"""Answers that students give in chapter 10, and the hint that each must get."""

import numpy as np

from replicate import paper
from replicate.report import step_table, time_to_loss
from replicate.study import results
from replicate.training import flops

PARTS = {row["arm"]: row for row in step_table.parts(step_table.recorded("llama1b"))}
SHARE = PARTS["dense"]["ffn"] / PARTS["dense"]["step"]
DEPTHS = step_table.recorded("llama7b").results["depths"]
SIX, FOUR = (DEPTHS[n]["ms"]["dense"]["ms"] for n in "64")
FFN, SPARSER, ATTENTION = PARTS["venom16"]["ffn"], PARTS["venom64"]["ffn"], PARTS["venom16"]["attention"]
RUNS = results.recorded_study("gpu")
SPEEDS, LOSSES = time_to_loss.stopped_early(RUNS)
HELD_OUT = results.differences(RUNS)["recipe"].mean
TRAINED = results.differences(RUNS, column="final_loss")["recipe"].mean


def needed(r):
    return r / (1 / 1.4 - 1 + r)


WRONG = [
    ("10.1", needed(flops.honest_share(paper.model("1B"))), "share of the FLOPs"),
    ("10.1", needed(0.75), "the paper's formula"),
    ("10.1", 1 / (1 - SHARE), "takes no time"),
    ("10.1", flops.run_speedup(SHARE, 1.4), "Turn it round"),
    ("10.1", 1.4 / SHARE, "Times add up"),
    ("10.2", 32 / 6 * SIX, "You scaled the whole step"),
    ("10.2", 16 * (SIX - FOUR), "These are the layers alone"),
    ("10.2", SIX + 16 * (SIX - FOUR), "has layers already"),
    ("10.3", FFN - SPARSER, "So many milliseconds"),
    ("10.3", FFN / SPARSER, "how many times as fast the FFN becomes"),
    ("10.3", 1 + (FFN - SPARSER) / ATTENTION, "Divide its time by that"),
    ("10.3", 1 - (FFN - SPARSER) / ATTENTION, "Its inverse"),
    ("10.4", HELD_OUT, "Which dense run"),
    ("10.4", np.interp(TRAINED, LOSSES, SPEEDS), "You took the training loss"),
    ("10.4", np.interp(HELD_OUT, SPEEDS, LOSSES), "reads y at x"),
    ("10.4", step_table.speeds("llama1b")["recipe"], "the measured step"),
]
