"""Ctrl-C between two steps, and in a notebook in one line."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_between_steps(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Make Ctrl-C wait: what is inside asks the function given whether it came, and ends in good order.

    KeyboardInterrupt is raised after that, and at once if Ctrl-C comes twice. Nothing changes where `wanted`
    is False, outside the main thread, and where somebody else handles Ctrl-C.
    """
    came = False

    def note(*_: Any) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    ours = wanted and threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def quiet_interrupts() -> None:
    """Make an interrupted cell say in one line how to go on; does nothing outside IPython."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        shell.set_custom_exc((KeyboardInterrupt,), _interrupted)


def _interrupted(*_: Any, **__: Any) -> list[str]:
    print("Interrupted. Run the cell again: it continues where it stopped.")
    return []
