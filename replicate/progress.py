"""Progress of long work: one line that renews itself in a terminal or a notebook, lines in a log file."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import TextIO

import torch

from replicate import flops, schedule
from replicate.config import TrainConfig
from replicate.config_text import config_hash
from replicate.kernels import backend
from replicate.notebooks import PROGRESS


class Display:
    """Where progress is shown: the notebook's cell if this is one, else a stream, by default stderr.

    A notebook shows the last line and the state below it, in one output marked by PROGRESS; a terminal every
    line, and the state as a line that renews itself; a log file lines, a state among them now and then.

    Args:
        enabled: False shows nothing.
        stream: where to print; in a notebook by default its cell.
        every: seconds between states in a log file.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None, every: float = 15.0) -> None:
        self.enabled, self.stream = enabled, stream or sys.stderr
        self.cell = uuid.uuid4().hex if enabled and stream is None and in_notebook() else None
        self.live = bool(enabled and not self.cell and self.stream.isatty())
        self.every = 1.0 if self.cell else every
        self._last, self._width, self._text, self._published = time.monotonic(), 0, "", False

    def state(self, text: str) -> None:
        """Show how it stands, if it is time to."""
        now = time.monotonic()
        if not self.enabled or (not self.live and now - self._last < self.every):
            return
        self._last = now
        if self.cell:
            self._publish("\n".join(filter(None, (self._text, text))))
        elif self.live:
            self.stream.write("\r" + text.ljust(self._width))
            self.stream.flush()
            self._width = len(text)
        else:
            self.line(text)

    def line(self, text: str) -> None:
        """Show what has happened."""
        if not self.enabled:
            return
        if self.cell:
            self._text = text
            self._publish(text)
            return
        self.stream.write(("\r" if self._width else "") + text.ljust(self._width).rstrip("\n") + "\n")
        self.stream.flush()
        self._width = 0

    def _publish(self, text: str) -> None:
        from IPython.display import display, update_display

        show = update_display if self._published else display
        show({"text/plain": text}, raw=True, metadata=PROGRESS, display_id=self.cell)
        self._published = True


def in_notebook() -> bool:
    """True inside a notebook's kernel, False in a terminal, IPython's included."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


class Progress:
    """Progress of one training run."""

    def __init__(
        self, enabled: bool, config: TrainConfig, stream: TextIO | None = None, every: float = 15.0
    ) -> None:
        self.config, self.display, self._phase = config, Display(enabled, stream, every), "dense"

    def start(
        self, parameters: int, step: int, device: torch.device, dtype: torch.dtype, not_captured: str = ""
    ) -> None:
        """Say what is about to run, and on a GPU why its steps are no CUDA graphs if they are not."""
        if not self.display.enabled:
            return
        c, plan = self.config, schedule.phase_plan(self.config)
        sparse = schedule.sparse_steps(c)
        parts = [f"{parameters:,} parameters", f"{c.steps} steps of {c.tokens_per_step:,} tokens"]
        if sparse:
            first = next(start for phase, start, _ in plan if phase == "sparse")
            parts.append(f"{sparse} sparse, the first is step {first} ({c.order})")
        parts.append(f"{device} {str(dtype).removeprefix('torch.')}")
        if device.type == "cuda":
            parts.append(backend.report(device))
            launched = f"steps launched kernel by kernel ({not_captured})"
            parts.append(launched if not_captured else "a step is one CUDA graph")
        if step:
            parts.append(f"continues after step {step}")
        self.display.line("train: " + "; ".join(parts))

    def phase(self, step: int, phase: str) -> None:
        """Note a change of phase; interleaved runs change too often to say so each time in a log file."""
        self._phase = phase
        if self.config.order != "interleaved" and step:
            self.display.line(f"step {step}: {phase} steps begin")

    def update(self, done: int, loss: float, tokens_per_s: float) -> None:
        """Report the state after `done` steps, if it is time to."""
        steps, rate = self.config.steps, tokens_per_s / self.config.tokens_per_step
        self.display.state(
            f"step {done:>{len(str(steps))}}/{steps} {self._phase:6} loss {loss:.4f} "
            f"lr {schedule.learning_rate(max(0, done - 1), self.config):.2e} "
            f"{tokens_per_s / 1000:,.1f}k tokens/s, {clock((steps - done) / rate)} left"
        )

    def finish(self, done: int, loss: float | None, valid: float | None, seconds: float) -> None:
        """Report the end."""
        words = [f"step {done}/{self.config.steps}"]
        words += [f"loss {loss:.4f}"] if loss is not None else []
        words += [f"held-out loss {valid:.4f}"] if valid is not None else []
        self.display.line(", ".join(words) + f", {clock(seconds)}")


class StudyProgress:
    """Progress of many runs side by side, with the time left as the work at hand and its speed give it.

    Args:
        enabled: False shows nothing. label: of the study, before each line.
        configs: hash -> what is to be trained. names: hash -> what its run is called.
        workers: runs at a time. expected: seconds that all will take, until the speed is known.
    """

    def __init__(
        self,
        enabled: bool,
        label: str,
        configs: Mapping[str, TrainConfig],
        names: Mapping[str, str],
        workers: int,
        expected: float,
    ) -> None:
        self.display, self.names, self.expected = Display(enabled, every=60.0), names, expected
        self.label, self.workers = f"{label} " if label else "", max(1, min(workers, len(configs)))
        self.work = {key: work(config) for key, config in configs.items()}  # FLOPs to do
        self.begun, self.total, self.ended = time.monotonic(), len(configs), 0
        self.waits = False
        self.done = self.busy = 0.0  # FLOPs done here, seconds that workers took for them
        runs = f"{self.total} run{'s' if self.total > 1 else ''} to train, {self.workers} at a time"
        self.display.line(f"{self.label}{runs}, about {clock(expected)}")

    def watch(self, at_work: Mapping[str, tuple[float, float, float]]) -> None:
        """Show what is at work: hash -> (share done when it began, share done now, seconds at it)."""
        there = {key: run for key, run in at_work.items() if key in self.work}
        names = [f"{self.names[key]} {now:.0%}" for key, (_, now, _) in there.items()]
        left = f"about {clock(self._left(there))} left"
        state = f"{self.ended} of {self.total} done"
        self.display.state(f"{self.label}{'; '.join([state, *names, left])}")

    def wait(self, keys: Iterable[str]) -> None:
        """Say, once, that only runs are left which another process is at."""
        if not self.waits:
            self.waits = True
            names = "; ".join(self.names[key] for key in keys)
            self.display.line(f"{self.label}waits for another process, which trains {names}")

    def finished(self, key: str, text: str, run: tuple[float, float, float] | None = None) -> None:
        """Report the end of a run, of which `run` is what `watch` would be told, now 1."""
        whole = self.work.pop(key, 0.0)
        if run:
            self.done, self.busy = self.done + whole * (1 - run[0]), self.busy + run[2]
        self.ended += 1
        left = f", about {clock(self._left({}))} left" if self.work else ""
        spent = clock(time.monotonic() - self.begun)
        self.display.line(f"{self.label}{self.ended}/{self.total} {self.names[key]}: {text}, {spent}{left}")

    def _left(self, at_work: Mapping[str, tuple[float, float, float]]) -> float:
        """Seconds: the work left over the workers, and never less than the longest run alone."""
        done = self.done + sum(self.work[k] * (now - began) for k, (began, now, _) in at_work.items())
        busy = self.busy + sum(seconds for _, _, seconds in at_work.values())
        rest = [whole * (1 - at_work.get(key, (0, 0, 0))[1]) for key, whole in self.work.items()]
        if done <= 0 or busy <= 0:
            return max(0.0, self.expected - (time.monotonic() - self.begun))
        return max(sum(rest) / self.workers, max(rest, default=0.0)) * busy / done


def work(config: TrainConfig) -> float:
    """FLOPs of a run, evaluation not counted."""
    return config.steps * config.tokens_per_step * sum(flops.flops_per_token(config.model).values())


def names_of(runs: Iterable[tuple[str, TrainConfig]]) -> dict[str, str]:
    """Hash -> "arm, seed N" of runs (arm name, configuration); of two names the first counts."""
    return {config_hash(config): f"{name}, seed {config.seed}" for name, config in reversed(list(runs))}


def clock(seconds: float) -> str:
    """A duration as people write it: 0:07, 12:30, 3:05:00."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
