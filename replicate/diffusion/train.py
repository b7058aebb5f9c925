"""Train a DiT on glyphs: the settings, the arms, the loop, and the loss on held-out pictures.

The parts are the text study's: schedule and phases, the optimiser's step (one CUDA graph on a GPU), compiled
blocks, clusters with AdamW's moments in their order. What an arm's FFN may do here and not in a text: let the
tokens of a picture choose together, since a picture has no future that could leak.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from replicate import schedule
from replicate.config import TrainConfig
from replicate.diffusion.glyphs import Glyphs, seed_of
from replicate.diffusion.model import Attention, DiT, DiTConfig, between, flow_loss, run_block
from replicate.evaluate import evaluating
from replicate.kernels import layer
from replicate.settings.checks import alone
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.settings.text import with_changes
from replicate.swap import start_sparse
from replicate.training import compiled
from replicate.training.attention import settle
from replicate.training.device import pick_device, pick_dtype, reproducible
from replicate.training.progress import Progress
from replicate.training.step import OptimizerStep, make_optimizer

BINS = 8  # of times, in which the held-out loss is split
WINDOWS = 100  # of a run, each with its mean training loss in the record
NO_EFFECT = {  # settings of texts, at the only value that they have here
    "corpus": ("glyphs",), "grad_accum": (1,), "residual": ("float32",), "stats_every": (20,),
    "eval_every": (0,), "checkpoint_every": (0,), "attention": ("auto",), "parallel": ("auto",),
}  # fmt: skip
CHOSEN_TOGETHER = ("block16", "tile24")  # tokens choose together, which a text forbids


@dataclass(frozen=True)
class DiffusionConfig(TrainConfig):
    """One run: `TrainConfig` with a DiT. A batch is batch_size pictures or clips, a token is a patch."""

    model: DiTConfig = field(default_factory=DiTConfig)
    corpus: str = "glyphs"
    weight_decay: float = 0.0
    class_drop: float = 0.1  # share of training pictures without their class, for guidance

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.class_drop < 1:
            raise ValueError(f"class_drop is {self.class_drop}; choose 0 up to, but not, 1")
        alone(self, "a diffusion run, where it has no effect,", **NO_EFFECT)

    @property
    def kind(self) -> str:
        """ "image" or "video"."""
        return "image" if self.model.frames == 1 else "video"


CLIP = {"frames": 8, "frame_patch": 2, "qk_norm": True}
_SMALL = DiTConfig(n_layer=2, d_model=96, d_ff=384, n_head=4)
_TOY = DiffusionConfig(
    model=_SMALL, steps=300, batch_size=16, lr=3e-3, lr_warmup=30, dense_warmup=60, final_window=30
)
_GPU = DiffusionConfig(
    steps=5000, batch_size=256, lr=1e-3, lr_warmup=200, dense_warmup=400, eval_batches=8, compile=True,
    log_every=100,
)  # fmt: skip
PRESETS: dict[tuple[str, str], DiffusionConfig] = {  # (kind, profile); equal tokens a step in both kinds
    ("image", "smoke"): _TOY,
    ("video", "smoke"): replace(_TOY, model=replace(_SMALL, **CLIP), batch_size=4),
    ("image", "gpu"): _GPU,
    ("video", "gpu"): replace(_GPU, model=replace(_GPU.model, **CLIP), batch_size=64),
}
ARMS: dict[str, dict[str, Any]] = {  # name -> changes to the model
    "dense": {},
    "gelu": {"activation": "gelu"},
    **{
        name: {"sparsity": SPARSITY_PRESETS[name]}
        for name in ("act24", "venom16", "active16", *CHOSEN_TOGETHER, "act24+tile")
    },
}


def config_of(kind: str, profile: str, arm: str, seed: int, **changes: Any) -> DiffusionConfig:
    """The configuration of a run. Raises ValueError for an unknown kind, profile, arm or setting."""
    if (kind, profile) not in PRESETS:
        known = ", ".join(" ".join(pair) for pair in PRESETS)
        raise ValueError(f"there is no {kind!r} {profile!r}; kinds and profiles are {known}")
    if arm not in ARMS:
        raise ValueError(f"arm is {arm!r}; choose of {', '.join(ARMS)}")
    config = with_changes(PRESETS[kind, profile], changes)
    return replace(config, model=replace(config.model, **ARMS[arm]), seed=seed)


def train(config: DiffusionConfig, *, progress: bool = True) -> tuple[DiT, dict[str, Any]]:
    """A trained model, in the phase of its last step, and results in JSON types.

    Returns:
        Model and results. final_loss: mean of the last `final_window` steps. losses: means of WINDOWS
        stretches of the run. valid: per held-out split "loss", and "by_time", the same for BINS equal
        stretches of t, from picture to noise. zero_loss: the held-out loss of the velocity 0. seconds of
        training, compilation counted; step_ms: the median of steps between two reports. parameters, engine,
        attention (its kernel), cuda_graph.

    Raises:
        RuntimeError: the loss or the gradient is not finite. ValueError: a device that is not here, or see
            `schedule.check`.
    """
    schedule.check(config)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)

    def autocast() -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = DiT(config.model)
    model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    model.set_backend(config.backend)
    data = Glyphs(config.model.frames, config.model.size, device)
    optimizer = make_optimizer(model, config)
    step_once = OptimizerStep(model, loss_of(model, config.compile), optimizer, config, autocast)
    shown = Progress(progress, config)
    parameters = sum(p.numel() for p in model.parameters())
    shown.start(parameters, 0, device, dtype, step_once.not_captured, Attention.kernel)
    settle(device)

    def bad_gradients(step: int) -> list[str]:
        return step_once.not_finite([batch_at(data, config, step)], step)

    losses: list[float] = []
    pending: list[Tensor] = []
    rates: list[float] = []  # seconds a step between two reports
    start = last = time.perf_counter()
    with reproducible(device, config.deterministic):
        for step in range(config.steps):
            _enter_phase(model, optimizer, config, step, shown)
            batch = batch_at(data, config, step)
            pending.append(step_once([batch], schedule.learning_rate(step, config), step))
            if (step + 1) % config.log_every == 0 or step == config.steps - 1:
                losses += _finite(torch.stack(pending).tolist(), len(losses), bad_gradients)
                now = time.perf_counter()
                rates.append((now - last) / len(pending))
                shown.update(step + 1, losses[-1], config.tokens_per_step / rates[-1])
                pending, last = [], now
        seconds = time.perf_counter() - start
        with autocast():
            valid = {split: held_out(model, data, config, split) for split in ("poses", "fonts")}
    shown.finish(config.steps, losses[-1], valid["poses"]["loss"], seconds)
    window = losses[-config.final_window :]
    return model, {
        "final_loss": sum(window) / len(window),
        "losses": stretches(losses),
        "valid": valid,
        "zero_loss": held_out(None, data, config, "poses")["loss"],
        "seconds": round(seconds, 3),
        "step_ms": round(1000 * sorted(rates)[len(rates) // 2], 3),
        "parameters": parameters,
        "engine": engine(model, config, device, dtype),
        "attention": Attention.kernel,
        "cuda_graph": not step_once.not_captured,
    }


def loss_of(model: DiT, compiles: bool) -> Callable[..., tuple[None, Tensor]]:
    """(x0, noise, t, y) to (None, loss): flow matching's loss on one batch, blocks compiled or not."""
    run = compiled.compiled_piece(run_block, compiled.BACKEND) if compiles else run_block

    def forward(x0: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> tuple[None, Tensor]:
        return None, flow_loss(model(between(x0, noise, t), t, y, run), x0, noise)

    return forward


def batch_at(data: Glyphs, config: DiffusionConfig, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures, noise, times and classes of a training step, on the data's device.

    Pictures are the same everywhere; noise and times on every device of a kind.
    """
    x0, y = data.batch("train", step, config.batch_size, config.seed)
    draw = torch.Generator(x0.device).manual_seed(seed_of("noise", config.seed, step))
    noise = torch.randn(x0.shape, generator=draw, device=x0.device)
    t, u = torch.rand(2, len(x0), generator=draw, device=x0.device)
    return x0, noise, t, y.masked_fill(u < config.class_drop, config.model.n_classes)


@torch.no_grad()
def held_out(model: DiT | None, data: Glyphs, config: DiffusionConfig, split: str) -> dict[str, Any]:
    """Loss on `eval_batches` fixed batches of a split with fixed noise and evenly spread times.

    Args:
        model: None is the model whose velocity is 0.

    Returns:
        "loss" and "by_time", see `train`.
    """
    sums = torch.zeros(2, BINS, dtype=torch.float64)
    with evaluating(model) if model is not None else nullcontext():
        for i in range(config.eval_batches):
            x0, y = data.batch(split, i, config.batch_size)
            draw = torch.Generator().manual_seed(seed_of("held-out noise", i))  # the same anywhere
            noise = torch.randn(x0.shape, generator=draw).to(x0.device)
            t = (torch.arange(len(x0), device=x0.device) + 0.5) / len(x0)
            v = torch.zeros_like(x0) if model is None else model(between(x0, noise, t), t, y)
            errors = (v.float() - (noise - x0)).square().flatten(1).mean(1).double().cpu()
            places = (t.cpu() * BINS).long()
            sums[0].index_add_(0, places, errors)
            sums[1].index_add_(0, places, torch.ones_like(errors))
    by_time = [total / count if count else None for total, count in sums.T.tolist()]
    return {"loss": float(sums[0].sum() / sums[1].sum()), "by_time": by_time}


def engine(model: DiT, config: DiffusionConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """What computes the sparse steps, see `layer.describe`; None without any."""
    if not schedule.sparse_steps(config):
        return None
    x = torch.zeros(config.tokens_per_step, config.model.d_model, device=device, dtype=dtype)
    return layer.describe(model.ffns()[0], x)


def stretches(losses: list[float]) -> list[float]:
    """Means of WINDOWS stretches of about equal length, or the losses themselves where there are fewer."""
    count = min(WINDOWS, len(losses))
    edges = [i * len(losses) // count for i in range(count + 1)]
    return [round(sum(losses[a:b]) / (b - a), 5) for a, b in pairwise(edges)]


def _enter_phase(
    model: DiT, optimizer: torch.optim.Optimizer, config: DiffusionConfig, step: int, shown: Progress
) -> None:
    """Set the FFNs' phase; `start_sparse` clusters the neurons before the first sparse step."""
    phase = schedule.phase_at(step, config)
    if all(ffn.phase == phase for ffn in model.ffns()):
        return
    if phase == "sparse":
        start_sparse(model, config.seed, optimizer)
    elif config.fold:
        for ffn in model.ffns():
            ffn.fold()
    model.set_phase(phase)
    shown.phase(step, phase)


def _finite(rows: list[list[float]], done: int, found: Callable[[int], list[str]]) -> list[float]:
    """The losses of (loss, gradient norm) rows, the first of which is step `done`.

    RuntimeError unless all are finite; it says in which gradients, as `found` of the step names them.
    """
    for step, (loss, norm) in enumerate(rows, done):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            names = found(step)[::-1]
            where = f"not finite, from the output back: {', '.join(names[:4])}" if names else "all finite"
            raise RuntimeError(
                f"loss {loss}, gradient norm {norm} at step {step}; gradients of that step, repeated "
                f"without a graph: {where}{' ...' if len(names) > 4 else ''}; "
                "a lower lr or a longer lr_warmup helps"
            )
    return [loss for loss, _ in rows]
