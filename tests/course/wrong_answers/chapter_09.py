"""Answers that students give in chapter 09, and the hint that each must get."""

import math

from replicate import paper
from replicate.report import step_table
from replicate.study import plans, results, statistics
from replicate.training import flops

STEP = step_table.speeds("llama1b")["recipe"]
P = 1400 / 3000
R = flops.honest_share(paper.model("1B"))
ARMS = ["dense", "recipe", "recipe, 50% sparse first"]
RUNS = results.all_larger("laptop", lambda scale: plans.some(ARMS, (1, 2, 3), scale), min_seeds=3)["gpu"]
LOSS = RUNS.pivot(index="seed", columns="arm", values="valid_loss")
WON = LOSS["recipe"] - LOSS["recipe, 50% sparse first"]
ERROR = WON.std() / math.sqrt(3)
T = statistics.t_quantile(2)
UNPAIRED = math.sqrt((LOSS["recipe"].var() + LOSS["recipe, 50% sparse first"].var()) / 3)

WRONG = [
    ("09.1", flops.run_speedup(0.5, STEP), "after the warm-up"),
    ("09.1", STEP, "That is the sparse step"),
    ("09.1", 1 - P + P * STEP, "You averaged speeds"),
    ("09.1", 1 - P + P / STEP, "How many times as fast"),
    ("09.1", flops.run_speedup(P, flops.step_speedup(0.75, 8)), "by the paper's count"),
    ("09.1", flops.run_speedup(P, flops.step_speedup(R, 8)), "by the complete count"),
    ("09.1", flops.run_speedup(0.5, flops.step_speedup(R, 8)), "by the complete count"),
    ("09.1", 1 / (1 - P + P * STEP), "Divide p by the step"),
    ("09.2", 1400 * R * 0.75, "How many are left?"),
    ("09.2", 3000 - 1400 * R * (1 - (2 / 1.5 + 4 / 8) / 6), "That is time"),
    ("09.2", 3000 - 1400 * R * 7 / 8, "all six products an eighth"),
    ("09.2", 3000 - 1400 * 0.75, "Only the FFN's share"),
    ("09.2", 3000 - 1400 * 0.75 * 0.75, "the paper's formula"),
    ("09.2", 3000 - 1500 * R * 0.75, "the warm-up is not"),
    ("09.2", 3000 - 1400 * R * (1 - (2 / 2 + 4 * 0.875) / 6), "An eighth is left"),
    ("09.2", 1600, "Sparse steps have FLOPs too"),
    ("09.3", WON.mean(), "That is the mean"),
    ("09.3", -WON.mean() - T * ERROR, "the other way round"),
    ("09.3", WON.mean() - 1.96 * ERROR, "You took 1.96"),
    ("09.3", WON.mean() - T * UNPAIRED, "did not pair"),
    ("09.3", WON.mean() - T * WON.std(), "the spread of one seed"),
    ("09.3", WON.mean() - T * WON.std(ddof=0) / math.sqrt(3), "ddof=1"),
    ("09.3", math.nan, "not a number (NaN)"),
    ("09.4", 8_400, "took 2 instead of 2^2"),
    ("09.4", 4_200, "Asked are two"),
    ("09.4", 20_000, "Here a is 0.7"),
    ("09.4", 16_135, "1.96 standard errors"),
]
