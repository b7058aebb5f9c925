"""Curves of the training loss."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from replicate import figures, study
from replicate.report.study_plots import steps_to_show


def first_curves(studies: Mapping[str, pd.DataFrame]) -> Figure:
    """Training loss of every run (scale -> runs of one seed), a panel for each scale."""
    fig, axes = plt.subplots(1, len(studies), figsize=(max(6.5, 4 * len(studies)), 3), squeeze=False)
    for ax, (scale, runs) in zip(axes[0], studies.items(), strict=True):
        config = study.arms(scale, ["dense"])[0]
        for _, run in runs.iterrows():
            losses = run["record"].results["steps"]["loss"]
            steps, losses = steps_to_show(losses, window=max(5, config.steps // 30))
            ax.plot(steps, losses, color=figures.PALETTE[run["arm"]], label=run["arm"])
        ax.axvline(config.dense_warmup, color="0.5", ls="--", lw=1, label="sparse steps start")
        ax.set(xlabel="step", title=f"{scale} scale, one seed")
    axes[0][0].set_ylabel("training loss (nats a token)")
    axes[0][0].legend()
    return fig
