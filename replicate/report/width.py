"""Width instead of time: wider layers of which each token uses a share, at the FLOPs of a dense run."""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from replicate import figures
from replicate.bench import wide
from replicate.config import ModelConfig, TrainConfig
from replicate.report import study_plots, study_tables, time_to_loss
from replicate.schedule import sparse_steps
from replicate.settings.text import from_dict
from replicate.study import results
from replicate.study.records import CARD, Record, RecordStore
from replicate.study.statistics import Stats
from replicate.training import flops

BESIDE = ("venom16", "venom16, 64 clusters", "active16x32", "active16, 64 clusters")  # as wide as dense
PEER = "a learned router"
ON_ONE_CARD = ("experts x4, 8 of 64", "wide x4, 8 of 64 by activations")  # dense was trained again for these
KINDS = {  # who chooses a token's neurons -> entry of the palette
    "all neurons": "dense",
    "the router": "venom",
    "own activations": "control",
    PEER: "mixture",
    "the router, 2:4 weights": "recipe",
}
PANELS = (("the router", PEER), ("own activations", "the router, 2:4 weights"))
_COST = {"dense": 1.0, "2:4": 0.5}  # share of a product's multiplications, as tensor cores count them


def step_flops(model: ModelConfig, phase: str = "sparse") -> float:
    """FLOPs of a token, forward and backward: products in blocks count by the share of clusters, 2:4 half.

    The router's own products (under one per cent) are left out, and so is the 2 of 4 inside clusters, which
    saves our kernels nothing.
    """
    found, sparsity = flops.flops_per_token(model), model.sparsity
    blocks = sparsity.top_k / sparsity.n_clusters
    kinds = [kind for *_, kind in sparsity.products()]
    share = sum(_COST.get(kind, blocks) for kind in kinds) / len(kinds) if phase == "sparse" else 1.0
    return sum(found.values()) - (1 - share) * found["ffn"]


def run_flops(config: TrainConfig) -> float:
    """FLOPs of a run for each token of a step, its dense steps counted as dense ones of its own width."""
    sparse = sparse_steps(config)
    return sparse * step_flops(config.model) + (config.steps - sparse) * step_flops(config.model, "dense")


def kind(config: TrainConfig) -> str:
    """Who chooses, one of KINDS."""
    s = config.model.sparsity
    if not s.any:
        return "all neurons"
    if s.w1 or s.w2_t:
        return "the router, 2:4 weights"
    return {"token": "the router", "activation": "own activations"}.get(s.routing, PEER)


def trade(runs: pd.DataFrame) -> pd.DataFrame:
    """What width gains: one row an arm whose layers are wider than dense's, or that is in BESIDE.

    Columns: "arm", "label", "kind", "loss" (Stats of the held-out loss minus dense, seed by seed), and over
    dense's: "d_ff", "active" (neurons that a token uses), "parameters", "FLOPs" of the run.

    Args:
        runs: of a study at one scale, "dense" among them; fewest FLOPs first in the result.
    """
    configs = {arm: from_dict(part["record"].iloc[0].config) for arm, part in runs.groupby("arm", sort=False)}
    dense, rows = configs["dense"], []
    same = [arm for arm, c in configs.items() if c.model.activation == dense.model.activation]
    arms = [arm for arm in same if arm in BESIDE or configs[arm].model.d_ff > dense.model.d_ff]
    gaps = results.differences(runs, arms=arms)
    for arm in arms:
        config, model, s = configs[arm], configs[arm].model, configs[arm].model.sparsity
        row = {"arm": arm, "kind": kind(config), "d_ff": model.d_ff / dense.model.d_ff}
        sizes = [flops.param_count(c.model)["total"] for c in (config, dense)]
        row |= {"parameters": sizes[0] / sizes[1], "FLOPs": run_flops(config) / run_flops(dense)}
        row["active"] = row["d_ff"] * (s.top_k / s.n_clusters if s.any else 1)
        width = f"x{row['d_ff']:g}"
        chosen = f"{width}, {s.top_k} of {s.n_clusters}"
        row["label"] = (
            f"dense {width}" if not s.any else f"experts {chosen}" if row["kind"] == PEER else chosen
        )
        rows.append(row | {"loss": gaps[arm]})
    return pd.DataFrame(rows).sort_values("FLOPs", ignore_index=True)


def timed(preset: str = "llama1b") -> dict[str, Record]:
    """Arm -> the newest shipped record of `CARD` that timed its step; ValueError if there is none at all."""
    records = RecordStore().widest_last(wide.KIND, device=CARD, preset=preset)
    if not records:
        raise ValueError(f"no steps of wider layers of {preset} are recorded on {CARD}")
    return {arm: record for record in sorted(records, key=lambda r: r.date) for arm in record.config["arms"]}


def times(preset: str = "llama1b") -> dict[str, tuple[float, float]]:
    """Arm -> a training step's time over dense's at one and at eight micro-batches a step, see `timed`.

    Records compose the model's depth from different ones; each time is over the dense step of its own record.
    """
    found = {}
    for arm, record in timed(preset).items():
        row = next(row for row in wide.rows(record) if row["arm"] == arm)
        found[arm] = row["x time, 1"], row["x time, 8"]
    return found


def timings(arm: str, preset: str = "llama1b") -> list[Record]:
    """All shipped records of `CARD` that timed an arm's step."""
    records = RecordStore().widest_last(wide.KIND, device=CARD, preset=preset)
    return [record for record in records if arm in record.config["arms"]]


def command(record: Record) -> str:
    """The benchmark that makes a record of wider layers again: "bench wide --preset ..."."""
    c = record.config
    options = ["--preset", c["preset"], "--layers", *map(str, c["layers"]), "--repeats", str(c["repeats"])]
    return shlex.join(["bench", "wide", *options, "--arms", *c["arms"]])


def slowest(arm: str) -> float:
    """The largest time of an arm's step over dense's in `timings`, at one or eight micro-batches."""
    found = [row for record in timings(arm) for row in wide.rows(record) if row["arm"] == arm]
    return max(row[f"x time, {micro}"] for row in found for micro in (1, 8))


def table(found: pd.DataFrame, times: Mapping[str, tuple[float, float]]) -> pd.DataFrame:
    """`trade` for the eye: numbers over dense's, the loss with half of its 95 % interval.

    Args:
        times: arm -> times of a 1B model's step over dense's, see `times`.
    """
    shown = found[["arm", "kind"]].rename(columns={"kind": "chosen by"})
    columns = {"d_ff": "width", "active": "active neurons", "parameters": "parameters"}
    columns["FLOPs"] = "multiplications of the run"
    for column, title in columns.items():
        shown[title] = found[column].map("{:.2f}".format)
    shown["time of a 1B step, 1 / 8 micro-batches"] = [
        " / ".join(f"{x:.2f}" for x in times[arm]) if arm in times else "" for arm in found["arm"]
    ]
    return shown.assign(**{"held-out loss minus dense": found["loss"].map(study_tables.brief)})


def sentence(found: pd.DataFrame, times: Mapping[str, tuple[float, float]]) -> str:
    """Our wider sparse arm with the lowest loss, see `_best`, with the time of its step if measured."""
    best = _best(found, [kind for kind in KINDS if kind not in ("all neurons", PEER)])
    if best is None:
        return "No wider sparse layer is recorded yet."
    return (
        "Of our wider layers with at most 1.2 times the dense run's multiplications, "
        f"{_lowest(best)} and {best.parameters:.2f} times the parameters.{_clock(best, times)}"
    )


def peer(found: pd.DataFrame, runs: pd.DataFrame, times: Mapping[str, tuple[float, float]]) -> str:
    """The wider mixture of experts with the lowest loss, see `_best`, beside our best arms seed by seed, with
    the time of its step if measured."""
    best = _best(found, [PEER])
    if best is None:
        return "No wider mixture of experts is recorded yet."
    rivals = filter(None, (_best(found, [kind]) for kind in ("the router", "own activations")))
    beside = [
        f"{study_tables.brief(study_tables.contrast(runs, (best.arm, ours.arm), 'valid_loss'))} minus "
        f"`{ours.arm}`"
        for ours in rivals
    ]
    against = f" Seed by seed that is {' and '.join(beside)}." if beside else ""
    return f"Here {_lowest(best)}.{against}{_clock(best, times)}"


def finer(found: pd.DataFrame, runs: pd.DataFrame) -> dict[tuple[str, str], Stats | None]:
    """(coarser, finer) -> held-out loss of the finer above the other, of wider layers of ours that differ in
    the number of clusters alone."""
    ours, pairs = found[(found["d_ff"] > 1) & ~found["kind"].isin(["all neurons", PEER])], []
    for _, alike in ours.groupby(["kind", "d_ff", "active"]):
        arms = sorted(zip(alike["label"].str.split().str[-1].map(int), alike["arm"], strict=True))
        pairs += itertools.pairwise(arm for _, arm in arms)
    return {(one, other): study_tables.contrast(runs, (other, one), "valid_loss") for one, other in pairs}


def _best(found: pd.DataFrame, kinds: Sequence[str]) -> Any | None:
    """The row with the lowest loss of those wider than dense with at most a fifth more FLOPs; None for none.

    Of those with three seeds, if there are any.
    """
    rows = found[(found["d_ff"] > 1) & found["kind"].isin(kinds) & (found["FLOPs"] <= 1.2)]
    seeds = rows["loss"].map(lambda loss: loss.n)
    rows = rows[seeds >= min(3, seeds.max())] if len(rows) else rows
    return min(rows.itertuples(), key=lambda row: row.loss.mean, default=None)


def _clock(row: Any, times: Mapping[str, tuple[float, float]]) -> str:
    if row.arm not in times:
        return ""
    one, eight = times[row.arm]
    return (
        f" A training step of the 1B model with such layers takes {one:.2f} times as long as dense, or "
        f"{eight:.2f} times if eight micro-batches share one update of the weights."
    )


def _lowest(row: Any) -> str:
    seeds = " of those with three seeds or more" if row.loss.n > 2 else ""
    cost = f"{study_tables.brief(row.loss)} minus dense, at {row.FLOPs:.2f} times the multiplications"
    return f"`{row.arm}` ends lowest{seeds}: {cost}"


def draw(found: pd.DataFrame, runs: pd.DataFrame, scale: str) -> Figure:
    """Held-out loss minus dense over the FLOPs of a run, beside a line of dense runs, cut short and wider.

    Arms with one seed are hollow marks, without a name if they are sparse, and not on the line.
    """
    fig, axes = plt.subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True)
    speed, lost = time_to_loss.stopped_early(runs)
    sure = found["loss"].map(lambda loss: loss.n > 1)
    dense = found[sure & (found["kind"] == "all neurons")]
    line = [*zip(1 / speed[::-1], lost[::-1]), *((row.FLOPs, row.loss.mean) for row in dense.itertuples())]
    ends = [0.0, *(end for s in found["loss"] for end in ((s.low, s.high) if s.n > 1 else (s.mean, s.mean)))]
    room, labels = max(ends) - min(ends), []
    what = "dense: stopped early" + (", and wider" if len(dense) else "")
    for ax, kinds in zip(axes, PANELS, strict=True):
        ax.plot(*zip(*line), color=figures.PALETTE["dense"], lw=1.4, label=what)
        ax.plot(1, 0, "o", color=figures.PALETTE["dense"], ms=7)
        ax.set(xscale="log", ylim=(min(ends) - 0.1 * room, max(ends) + 0.15 * room))
        ax.set_xlim(0.65 * min(0.7, *found["FLOPs"]), 1.15 * max(1.6, *found["FLOPs"]))
        ticks = [tick for tick in (0.6, 0.8, 1, 1.2, 1.5, 2, 3, 4) if tick < ax.get_xlim()[1]]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        ax.set_xticks([], minor=True)
        names, lines = [("dense", 1.0, 0.0)], [line]
        for kind in ("all neurons", *kinds):
            mark, colour = figures.MARKERS[KINDS[kind]], figures.PALETTE[KINDS[kind]]
            label = None if kind == "all neurons" else f"chosen by {kind}"
            for row in found[found["kind"] == kind].itertuples():
                at, full = (row.FLOPs, row.loss.mean), row.loss.n > 1
                look = {"ms": 7, "mfc": colour, "zorder": 3} if full else {"ms": 6, "mfc": "white"}
                ax.errorbar(*at, row.loss.half, fmt=mark, color=colour, elinewidth=1, label=label, **look)
                bar = (row.loss.low, row.loss.high) if full else at[1:] * 2
                lines.append([(row.FLOPs, end) for end in bar])
                names += [(row.label, *at)] if full or kind == "all neurons" else []
                label = None  # one entry of the legend
        ax.axhline(0, color="0.6", lw=0.8)
        ax.set_xlabel("multiplications of the run over those of the dense run")
        ax.legend(loc="upper right")
        labels.append((names, lines))
    axes[0].set_ylabel(f"held-out loss minus dense (nats), {scale} scale")
    hollow = "" if sure.all() else "; hollow: one seed"
    fig.suptitle(f"Below the line multiplications are well spent (bars: 95 % intervals{hollow})")
    for ax, (names, lines) in zip(axes, labels, strict=True):  # now that the layout is final
        study_plots.label_points(ax, names, avoid=lines)
    return fig
