"""How far apart runs are by chance: what no interval of a few seeds may fall below.

A paired standard deviation of two or three seeds is often far too small. All arms of a scale together know
it better (`pooled`), and so do runs that should be one and are not (`drift`, `apart`).
"""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pandas as pd

from replicate.config import SparsityConfig, TrainConfig
from replicate.schedule import sparse_steps
from replicate.settings.presets import PRESET_OF, train_preset
from replicate.settings.text import from_dict
from replicate.study import plans
from replicate.study.records import Record, RecordStore

NEAR = 0.1  # nats: an arm this far above dense is noisier than others, and is not pooled
LOSSES = {"final_loss": "training", "valid_loss": "held-out"}
LAST = 100  # steps whose mean training loss is compared between runs that share a beginning


@lru_cache
def recorded(scale: str, kind: str = "train") -> tuple[tuple[str, Record], ...]:
    """(arm, record) of every recorded run of the study at a scale; kind "rerun-1": of those trained again."""
    store = RecordStore()
    plan = plans.everything(scale, plans.EVERY_SEED)
    found = [(arm, store.find(kind, config)) for arm, configs in plan.items() for config in configs]
    return tuple((arm, run[0]) for arm, run in found if run and run[1] == "recorded")


def scale_of(config: TrainConfig) -> str | None:
    """The scale whose model this is, whatever its sparsity and its training; None for another model."""

    def shape(c: TrainConfig) -> tuple[int, ...]:
        return c.model.n_layer, c.model.d_model, c.model.seq_len, c.model.vocab_size

    shapes = {shape(train_preset(preset)): scale for scale, preset in PRESET_OF.items()}
    return shapes.get(shape(config))


@lru_cache
def pooled(scale: str, column: str) -> float:
    """Root mean variance over seeds of (arm - dense) at a scale, weighted by degrees of freedom; 0 for none.

    Of the arms that start from the dense model's weights, train as it does and end within NEAR of it, each
    with two seeds or more of one text.
    """
    if column not in LOSSES:
        return 0.0
    dense, losses = train_preset(PRESET_OF[scale]), {}
    for arm, record in recorded(scale):
        config = from_dict(record.config)
        alike = replace(config.model, sparsity=SparsityConfig()) == dense.model
        if alike and all(getattr(config, name) == getattr(dense, name) for name in ("lr", "steps", "corpus")):
            losses.setdefault(arm, {})[config.seed] = record.results[column]
    variances, freedom = [], []
    for arm in losses.keys() - {"dense"}:
        for cpu in (False, True):
            seeds = [s for s in losses[arm] if s in losses["dense"] and (s in plans.ON_CPU) == cpu]
            above = [losses[arm][seed] - losses["dense"][seed] for seed in seeds]
            if len(above) > 1 and abs(np.mean(above)) < NEAR:
                variances.append(np.var(above, ddof=1))
                freedom.append(len(above) - 1)
    return float(np.sqrt(np.average(variances, weights=freedom))) if variances else 0.0


def drifts(scale: str) -> list[tuple[float, bool]]:
    """Differences in nats between runs that should be one, before they part; True if one card made both.

    The recipe's runs of a seed that turn dense after some of the steps are the same run until then; compared
    are the means of their training losses over the LAST steps that they share.
    """
    names = ["recipe", *(f"recipe, {share:.0%} sparse first" for share in plans.SHARES)]
    found: dict[int, list[tuple[int, Record]]] = {}
    for arm, record in recorded(scale):
        if arm in names:
            config = from_dict(record.config)
            found.setdefault(config.seed, []).append((config.dense_warmup + sparse_steps(config), record))
    gaps = []
    for (one, a), (other, b) in itertools.chain(*(itertools.combinations(x, 2) for x in found.values())):
        shared = slice(min(one, other) - LAST, min(one, other))
        means = [float(np.mean(record.results["steps"]["loss"][shared])) for record in (a, b)]
        gaps.append((means[0] - means[1], a.device == b.device))
    return gaps


@lru_cache
def drift(scale: str) -> tuple[float, float]:
    """(root mean square, largest) of `drifts` in nats; zeros where no runs part."""
    gaps = [gap for gap, _ in drifts(scale)] or [0.0]
    return root_mean_square(gaps), max(map(abs, gaps))


def floor(configs: Iterable[TrainConfig], column: str) -> float:
    """The least standard deviation, over seeds, of a difference between arms: one configuration of each.

    The largest of `pooled`, sqrt(n / 2) x `apart` with n the arms, and sqrt(k / 2) x `drift` with k those
    that compute as the recipe does, with 2:4 weights and Venom activations: a run is off by apart / sqrt(2)
    on its own, such a one by drift / sqrt(2). Each of the three that is 0 at a scale, as where no runs
    tell, is the next smaller one's. 0 for a column that is no loss, and for models of no recorded scale.
    """
    configs = list(configs)
    scale = scale_of(configs[0]) if configs else None
    if scale is None or column not in LOSSES:
        return 0.0
    formats = [config.model.sparsity for config in configs]
    like_recipe = sum(s.activation == "venom" and (s.w1 or s.w2_t) for s in formats)
    ascending = list(PRESET_OF)
    scales = ascending[ascending.index(scale) :: -1]  # it and the smaller ones
    spread, rerun, parted = (
        next(filter(None, map(known, scales)), 0.0)
        for known in (lambda s: pooled(s, column), lambda s: apart(s, column), lambda s: drift(s)[0])
    )
    return max(spread, (len(configs) / 2) ** 0.5 * rerun, (like_recipe / 2) ** 0.5 * parted)


@lru_cache
def apart(scale: str, column: str) -> float:
    """Root mean square of what lies between the two runs of `reruns`, in nats; 0 if none ran twice."""
    found = reruns(scale)
    return root_mean_square(found[LOSSES[column]]) if len(found) else 0.0


def root_mean_square(values: Iterable[float]) -> float:
    """Square root of the mean of the squares of one value or more."""
    return float(np.sqrt(np.mean(np.square(list(values)))))


def reruns(scale: str) -> pd.DataFrame:
    """Runs trained twice: arm, seed, both cards, and how far apart they end in training and held out.

    From the records of the kinds "rerun-1", "rerun-2" and so on (`study run --rerun 1 --record`).
    """
    first = {(arm, r.seed): r for arm, r in recorded(scale)}
    rows = []
    for kind in sorted(path.name for path in RecordStore().recorded.glob("rerun-*")):
        for arm, again in recorded(scale, kind):
            if once := first.get((arm, again.seed)):
                row = {"arm": arm, "seed": again.seed, "first on": once.device, "again on": again.device}
                rows.append(row | {n: again.results[c] - once.results[c] for c, n in LOSSES.items()})
    return pd.DataFrame(rows)
