"""Answers that students give in chapter 10, and the hint that each must get."""

import numpy as np

from replicate import paper
from replicate.report import step_table, time_to_loss
from replicate.study import results
from replicate.training import flops

PARTS = {row["arm"]: row for row in step_table.parts(step_table.recorded("llama1b"))}
SHARE = PARTS["dense"]["ffn"] / PARTS["dense"]["step"]
DEPTHS = step_table.recorded("llama7b").results["depths"]
TWO, FOUR, SIX = (DEPTHS[n]["ms"]["venom16"]["ms"] for n in "246")
LINE = np.polyfit([2, 4, 6], [TWO, FOUR, SIX], 1)
DENSE = np.polyfit([2, 4, 6], [DEPTHS[n]["ms"]["dense"]["ms"] for n in "246"], 1)
FFN, SPARSER, ATTENTION = PARTS["venom16"]["ffn"], PARTS["venom64"]["ffn"], PARTS["venom16"]["attention"]
RUNS = results.recorded_study("gpu")
SPEEDS, LOSSES = time_to_loss.stopped_early(RUNS)
FOUND = results.differences(RUNS)["recipe"]
HELD_OUT = FOUND.mean
TRAINED = results.differences(RUNS, column="final_loss")["recipe"].mean


def needed(r):
    return r / (1 / 1.4 - 1 + r)


WRONG = [
    ("10.1", needed(flops.honest_share(paper.model("1B"))), "share of the FLOPs"),
    ("10.1", needed(0.75), "the paper's formula"),
    ("10.1", 1 / (1 - SHARE), "takes no time"),
    ("10.1", flops.run_speedup(SHARE, 1.4), "Turn it round"),
    ("10.1", 1.4 / SHARE, "Times add up"),
    ("10.1", 1 + 0.4 / SHARE, "Speeds do not add up"),
    ("10.1", needed(PARTS["dense"]["attention"] / PARTS["dense"]["step"]), "not attention's"),
    ("10.1", SHARE / (1 / 1.7 - 1 + SHARE), "beyond the limit"),
    ("10.2", 48 / 6 * SIX, "You scaled the whole step"),
    ("10.2", 48 / 32 * np.polyval(LINE, 32), "You scaled the whole step"),
    ("10.2", np.polyval(LINE, 32), "the first table"),
    ("10.2", np.polyval(DENSE, 48), "That is the dense step"),
    ("10.2", 48 * LINE[0], "These are the layers alone"),
    ("10.2", SIX + 48 * LINE[0], "has layers already"),
    ("10.2", np.polyval(np.polyfit([2, 4, 6], [TWO, FOUR, SIX], 2), 48), "A parabola"),
    ("10.2", SIX + 42 * (SIX - FOUR) / 2, "two of the three depths"),
    ("10.2", TWO + 46 * (FOUR - TWO) / 2, "two of the three depths"),
    ("10.2", np.polyval(LINE, 48) / 1000, "In milliseconds"),
    ("10.3", FFN - SPARSER, "So many milliseconds"),
    ("10.3", FFN / SPARSER, "how many times as fast the FFN becomes"),
    ("10.3", 1 + (FFN - SPARSER) / ATTENTION, "Divide its time by that"),
    ("10.3", 1 - (FFN - SPARSER) / ATTENTION, "Its inverse"),
    ("10.3", ATTENTION / (ATTENTION - PARTS["dense"]["ffn"] + SPARSER), "not with dense"),
    ("10.3", ATTENTION / (ATTENTION - PARTS["dense"]["ffn"] + FFN), "not with dense"),
    ("10.3", PARTS["venom16"]["step"] / PARTS["venom64"]["step"], "the step's speed-up"),
    ("10.4", HELD_OUT, "Which dense run"),
    ("10.4", np.interp(TRAINED, LOSSES, SPEEDS), "what the training loss would give"),
    ("10.4", 1 / (1 - SHARE), "the step's ceiling"),
    ("10.4", np.interp(FOUND.low, LOSSES, SPEEDS), "not the interval"),
    ("10.4", np.interp(FOUND.high, LOSSES, SPEEDS), "not the interval"),
    ("10.4", np.interp(HELD_OUT, SPEEDS, LOSSES), "reads y at x"),
    ("10.4", step_table.speeds("llama1b")["recipe"], "the measured step"),
]
