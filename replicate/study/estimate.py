"""How long training will take here, the question before long work, and the runs that a time limit admits."""

import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from replicate.config import TrainConfig
from replicate.settings.presets import PRESET_OF, TRAIN_PRESETS
from replicate.settings.text import config_hash
from replicate.study import pool
from replicate.study.records import Record
from replicate.system import provenance
from replicate.training import flops

ASK_FROM = 15 * 60  # seconds
CONSENT = "REPLICATE_LONG"  # set to 1 where long work is wanted, as `notebooks.KERNEL_ENV` does
# Share of a bare product's speed that training reaches, sparse arms included: on a CPU the median of recorded
# runs, on a GPU that of a portion of the study with captured steps, start-up and evaluation included.
REACHED = {"cpu": 0.4, "cuda": 0.5}
MARGIN = 1.1  # a run is started if this times its expected duration is left


class LongWork(ValueError):
    """What is missing takes long to train here, and nobody has said yet that it should be."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]  # all that a notebook shows


def work(config: TrainConfig) -> float:
    """FLOPs of a run, evaluation not counted."""
    return config.steps * config.tokens_per_step * sum(flops.flops_per_token(config.model).values())


def seconds(configs: Mapping[str, TrainConfig], workers: int) -> float:
    """About how long runs take here, so many at a time: on a CPU each has a core, a GPU's speed is shared."""
    gpu = pool.on_gpu(configs.values())
    device, at_once = ("cuda", torch.cuda.device_count()) if gpu else ("cpu", workers)
    rates = [_rate(device, c.model.d_model, c.model.d_ff) for c in configs.values()]
    each = [work(c) / (REACHED[device] * rate) for c, rate in zip(configs.values(), rates)]
    return max(sum(each) / max(1, at_once), max(each, default=0.0))


def ask_first(
    configs: Mapping[str, TrainConfig], names: Mapping[str, str], workers: int, consent: bool = False
) -> float:
    """`seconds` of missing runs (by hash, as their names are).

    Raises LongWork if that is more than ASK_FROM, without `consent` or the environment variable CONSENT.
    """
    expected = seconds(configs, workers)
    if expected <= ASK_FROM or consent or os.environ.get(CONSENT, "") not in ("", "0"):
        return expected
    arms = list(dict.fromkeys(re.sub(r",? seed \d+$", "", names[key]) for key in configs))
    shown = ", ".join(arms[:4]) + (f" and {len(arms) - 4} more arms" if len(arms) > 4 else "")
    missing = "1 run is" if len(configs) == 1 else f"{len(configs)} runs are"
    raise LongWork(
        f"{missing} missing ({shown}); training takes about {span(expected)} here. "
        f"To do so set the environment variable {CONSENT}=1 (in a notebook: %env {CONSENT}=1) and run this "
        f"again, or run `python -m replicate study run --profile {_scale(configs)}`; what is finished is "
        "kept. Else choose a smaller scale: smoke takes minutes, laptop under an hour"
    )


def span(seconds: float) -> str:
    """A duration in a word or two: "40 minutes", "3 hours", "4 days"."""
    for unit, size in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 60:.0f} minutes"


@dataclass
class TimeLimit:
    """Admits the runs that will end in `minutes` (None: all), by what others of their arm took.

    A run with checkpoint_every > 0 is admitted while there is time at all, since it can be continued.
    """

    minutes: float | None = None
    earlier: dict[str, float] = field(default_factory=dict)  # arm -> seconds of a stored run
    now: dict[str, float] = field(default_factory=dict)  # arm -> seconds of the last run

    def __post_init__(self) -> None:
        self.until = math.inf if self.minutes is None else time.monotonic() + 60 * self.minutes

    def over(self) -> bool:
        """True once the time is up."""
        return time.monotonic() > self.until

    def admits(self, config: TrainConfig) -> bool:
        """True if a run is expected to end in time."""
        needed = 0.0 if config.checkpoint_every else MARGIN * self.expected(config)
        return time.monotonic() + needed < self.until

    def expected(self, config: TrainConfig) -> float:
        """Seconds that a run will take; of an arm not yet seen the longest seen, 0 before any is known."""
        known, arm = self.earlier | self.now, _arm(config)
        return known[arm] if arm in known else max((self.now or self.earlier).values(), default=0.0)

    def learn(self, config: TrainConfig, record: Record, fresh: bool) -> None:
        """Note how long a run took; a stored one counts if it ran on such a device as runs will here."""
        if fresh:
            self.now[_arm(config)] = record.seconds
        elif record.seconds and record.device == provenance.device_name(config.device):
            self.earlier[_arm(config)] = record.seconds


def _arm(config: TrainConfig) -> str:
    return config_hash(replace(config, seed=0))


def _scale(configs: Mapping[str, TrainConfig]) -> str:
    """The scale whose width most of the runs have."""
    widths = [config.model.d_model for config in configs.values()]
    common = max(set(widths), key=widths.count)
    own = {TRAIN_PRESETS[preset].model.d_model: scale for scale, preset in PRESET_OF.items()}
    return own.get(common, "...")


@lru_cache
def _rate(device: str, d_model: int, d_ff: int) -> float:
    """FLOPs a second of one thread, or of the GPU, in a product of an FFN's shape."""
    rows, dtype = (16384, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    x = torch.ones(rows, d_model, device=device, dtype=dtype)
    w = torch.ones(d_model, d_ff, device=device, dtype=dtype)
    threads, best = torch.get_num_threads(), 0.0
    try:
        torch.set_num_threads(1 if device == "cpu" else threads)
        for _ in range(5):
            begun = time.perf_counter()
            (x @ w)[0, 0].item()
            best = max(best, 2.0 * rows * d_model * d_ff / (time.perf_counter() - begun))
    finally:
        torch.set_num_threads(threads)
    return best
