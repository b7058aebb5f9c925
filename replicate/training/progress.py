"""Progress of long work by tqdm, on stderr: a bar that renews itself, or whole lines in a log file."""

from __future__ import annotations

import sys
import threading
from typing import Any, TextIO

import torch
from tqdm import tqdm

from replicate import schedule
from replicate.config import TrainConfig
from replicate.kernels import backend

STATE = "{desc}{postfix}, {remaining} left"
tqdm.set_lock(threading.RLock())  # its own may start a process


class Bar(tqdm):
    """Renewed in a terminal or a notebook; in a log file a line every so many seconds.

    Args:
        enabled: False shows nothing. total: units of work. every: seconds between lines in a log file.
        stream: by default stderr, which stored notebooks do without.
    """

    def __init__(
        self, enabled: bool, total: float, every: float = 15.0, stream: TextIO | None = None, **options: Any
    ) -> None:
        self.stream = stream or sys.stderr
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        self.live = self.stream.isatty() or hasattr(shell, "kernel")  # IPython in a terminal has none
        options |= {"bar_format": "{percentage:3.0f}%|{bar:12}| " + STATE if self.live else STATE}
        options |= {"file": self.stream if self.live else _Lines(self.stream), "dynamic_ncols": self.live}
        options |= {"mininterval": 0.1 if self.live else every, "miniters": 0}
        options |= {"delay": 1e-9, "leave": False, "position": 0}  # nothing is shown before there is news
        super().__init__(total=total, disable=not enabled, **options)

    def show(self, description: str, state: str, done: float) -> None:
        """Show how it stands after `done` units of work, if it is time to."""
        self.set_description_str(description, refresh=False)
        self.set_postfix_str(state, refresh=False)
        self.update(done - self.n)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self.disable and self.live:
            self.write(text, file=self.fp)
        elif not self.disable:
            print(text, file=self.stream, flush=True)


class _Lines:
    """A log file for tqdm: each state is a line of its own, without cursor movements and padding."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.flush = stream, stream.flush

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self.stream.write(f"{text}\n")


class Progress:
    """Progress of one training run; arguments as for `Bar`."""

    def __init__(
        self, enabled: bool, config: TrainConfig, stream: TextIO | None = None, every: float = 15.0
    ) -> None:
        self.config, self._phase, self._options = config, "dense", (enabled, config.steps, every, stream)

    def start(
        self,
        parameters: int,
        step: int,
        device: torch.device,
        dtype: torch.dtype,
        not_captured: str = "",
        attention: str = "torch",
        group: str = "",
    ) -> None:
        """Say what is about to run; on a GPU its kernels, and why its steps are no CUDA graphs if so.

        `group`: the processes, where there are several.
        """
        c, sparse = self.config, schedule.sparse_steps(self.config)
        parts = [f"{parameters:,} parameters", f"{c.steps} steps of {c.tokens_per_step:,} tokens"]
        if sparse:
            first = next(start for phase, start, _ in schedule.phase_plan(c) if phase == "sparse")
            parts.append(f"{sparse} sparse, the first is step {first} ({c.order})")
        parts.append(f"{device} {str(dtype).removeprefix('torch.')}")
        parts += [group] if group else []
        if device.type == "cuda":
            launched = f"steps launched kernel by kernel ({not_captured})"
            parts += [backend.report(device), f"attention by {attention}"]
            parts += [launched if not_captured else "a step is one CUDA graph"]
        if step:
            parts.append(f"continues after step {step}")
        self.bar = Bar(*self._options, initial=step)
        self.bar.say("train: " + "; ".join(parts))

    def phase(self, step: int, phase: str) -> None:
        """Note a change of phase; interleaved runs change too often to say so each time."""
        self._phase = phase
        if self.config.order != "interleaved" and step:
            self.bar.say(f"step {step}: {phase} steps begin")

    def update(self, done: int, loss: float, tokens_per_s: float) -> None:
        """Show the state after `done` steps."""
        rate = schedule.learning_rate(max(0, done - 1), self.config)
        state = f"loss {loss:.4f}, lr {rate:.2e}, {tokens_per_s / 1000:,.1f}k tokens/s"
        self.bar.show(f"step {done}/{self.config.steps} {self._phase}", state, done)

    def finish(self, done: int, loss: float | None, valid: float | None, seconds: float) -> None:
        """Say how it ended."""
        words = [f"step {done}/{self.config.steps}"]
        words += [f"loss {loss:.4f}"] if loss is not None else []
        words += [f"held-out loss {valid:.4f}"] if valid is not None else []
        self.bar.say(", ".join([*words, tqdm.format_interval(seconds)]))
        self.bar.close()
