"""A run whose loss or gradient is no longer finite: what is kept of it, and the error that says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from replicate.config import TrainConfig
from replicate.settings.text import config_hash, to_dict
from replicate.system import paths
from replicate.system.files import write_atomic


class NonFiniteLoss(RuntimeError):
    """The loss or a gradient became NaN or infinite. `report` holds step, phase and layer statistics."""

    def __init__(self, report: dict[str, Any], path: Path):
        super().__init__(
            f"loss {report['loss']}, gradient norm {report['grad_norm']} at step {report['step']} "
            f"({report['phase']} phase, lr {report['lr']:.3g}); layer statistics: {path}. "
            "A lower lr, a longer lr_warmup or dense_warmup, or clip > 0 usually helps"
        )
        self.report, self.path = report, path


def save_report(report: dict[str, Any], config: TrainConfig, folder: Path | None) -> Path:
    """Save the report of a run that diverged (into `folder`, else runs/nonfinite); its path."""
    folder = folder or paths.runs_dir() / "nonfinite"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"nonfinite-{config_hash(config)}-step-{report['step']}.json"
    content = _finite_or_text(report | {"config": to_dict(config)})
    write_atomic(path, json.dumps(content, indent=1).encode())
    return path


def _finite_or_text(value: Any) -> Any:
    """JSON has no NaN or infinity: such numbers become text."""
    if isinstance(value, dict):
        return {name: _finite_or_text(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite_or_text(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
