"""The training study: which runs it has, running them side by side, their records and statistics."""

from replicate.settings.presets import PRESET_OF
from replicate.study.estimate import LongWork
from replicate.study.plans import arms, describe
from replicate.study.runs import StudyFailed, look_up, run, trained

__all__ = ["PRESET_OF", "LongWork", "StudyFailed", "arms", "describe", "look_up", "run", "trained"]
