"""What every notebook begins with: its parameters are checked, figures and interrupts get their look."""

import os
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from replicate import figures
from replicate.report.runner import check_profile, check_seed
from replicate.training.interrupts import quiet_interrupts


class BadParameter(ValueError):
    """A notebook was started with a parameter it cannot run with; shown as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # what IPython asks an exception for
        return [f"{type(self).__name__}: {self}"]


def begin(profile: Any, seed: Any) -> None:
    """Check a notebook's parameters, set the look of its figures, and let an interrupt be one line.

    Raises BadParameter, naming what would work.
    """
    try:
        check_profile(profile)
        check_seed(seed)
    except ValueError as error:
        raise BadParameter(str(error)) from None
    quiet_interrupts()
    figures.theme()


def touch(draw: Callable[..., Any], *, button: str = "", **controls: Any) -> None:
    """Sliders below a picture, in a notebook that someone has open: draw(**values) runs anew at each move.

    Args:
        draw: makes a figure, prints or shows something; what it returns is not shown.
        button: what stands on a button that starts `draw`, for what takes longer than a move.
        controls: by argument of `draw`: (low, high) or (low, high, step), or a list of values.
    """
    if os.environ.get("REPLICATE_STATIC"):
        return
    import ipywidgets

    def shown(**values: Any) -> None:
        draw(**values)
        plt.show()

    if button:
        ipywidgets.interact_manual.options(manual_name=button)(shown, **controls)
    else:
        ipywidgets.interact(shown, **controls)


def normal_numbers() -> Callable[..., Tensor]:
    """A function of a shape: standard normal float64 numbers, the same on every processor.

    torch.randn draws others where a processor has other instructions, so that a picture would differ.
    """
    random = np.random.default_rng(0)
    return lambda *shape: torch.from_numpy(random.standard_normal(shape))
