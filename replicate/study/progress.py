"""Progress of many runs side by side, with the time left as the work done so far gives it."""

import time
from collections.abc import Iterable, Mapping

from tqdm import tqdm

from replicate.config import TrainConfig
from replicate.study.estimate import work
from replicate.training.progress import Bar

clock = tqdm.format_interval


class StudyProgress:
    """Progress of `configs`, by hash as their names are, so many at a time; `label` before each line."""

    def __init__(
        self,
        enabled: bool,
        label: str,
        configs: Mapping[str, TrainConfig],
        names: Mapping[str, str],
        workers: int,
        expected: float,  # seconds
    ) -> None:
        self.label, self.names, self.begun = f"{label} " if label else "", names, time.monotonic()
        self.work = {key: work(config) for key, config in configs.items()}  # FLOPs of what has not ended
        self.total, self.done, self.waits = len(configs), 0.0, False
        self.found = 0.0  # FLOPs that were done before or elsewhere, and say nothing about the speed
        self.bar = Bar(enabled, sum(self.work.values()), every=60.0, smoothing=0)
        runs = f"{self.total} run{'s' if self.total > 1 else ''} to train"
        at_once = max(1, min(workers, self.total))
        self.bar.say(f"{self.label}{runs}, {at_once} at a time, about {clock(expected)}")

    def watch(self, at_work: Mapping[str, tuple[float, float]]) -> None:
        """Show what is at work: hash -> (share done when it began, share done now)."""
        there = {key: shares for key, shares in at_work.items() if key in self.work}
        began, now = (sum(self.work[key] * shares[i] for key, shares in there.items()) for i in (0, 1))
        self.bar.initial = self.found + began
        names = "".join(f"; {self.names[key]} {now:.0%}" for key, (_, now) in there.items())
        self.bar.show(f"{self.label}{self._ended} of {self.total} done{names}", "", self.done + now)

    def finished(self, key: str, text: str, began: float = 1.0) -> None:
        """Say how a run ended, of which the share `began` was not done here."""
        flops = self.work.pop(key)
        self.done, self.found = self.done + flops, self.found + began * flops
        spent = clock(time.monotonic() - self.begun)
        self.bar.say(f"{self.label}{self._ended}/{self.total} {self.names[key]}: {text}, {spent}")

    def wait(self, keys: Iterable[str]) -> None:
        """Say, once, that only runs are left which another process is at."""
        if not self.waits:
            self.waits = True
            names = "; ".join(self.names[key] for key in keys)
            self.bar.say(f"{self.label}waits for another process, which trains {names}")

    @property
    def _ended(self) -> int:
        return self.total - len(self.work)
