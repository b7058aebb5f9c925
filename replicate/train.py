"""The training loop: dense warm-up, sparse and dense steps, one record of everything, safe to kill.

`train(config)` runs and returns the record; `Trainer` underneath keeps the model. A step is forward,
backward, clip, AdamW; the rest is bookkeeping, kept out of the device's way: losses stay on the device
until a progress line needs them. Should one be NaN or infinite, the optimiser freezes there and then
(as it does for loss scaling), so that the weights which produced it can be examined.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replicate import evaluate, schedule
from replicate.config import TrainConfig
from replicate.data import TokenData
from replicate.gpt import GPT
from replicate.kernels import backend as engines
from replicate.settings.text import config_hash, to_dict
from replicate.system import provenance
from replicate.training import attention, checkpoint, parallel
from replicate.training.compiled import compiled_loss
from replicate.training.device import autocast_in, pick_device, pick_dtype, pick_residual, reproducible
from replicate.training.failure import NonFiniteLoss, save_report
from replicate.training.interrupts import interrupts_between_steps
from replicate.training.progress import Progress
from replicate.training.step import OptimizerStep, layer_tensors, make_optimizer, permute_moments

__all__ = ["NonFiniteLoss", "Trainer", "train"]

# What a checkpoint keeps besides tensors.
_RECORD = ("losses", "speeds", "stats", "valid_losses", "valid_seconds", "seconds")


def train(
    config: TrainConfig,
    *,
    run_dir: Path | str | None = None,
    resume: bool = True,
    progress: bool = True,
    stop_after: int | None = None,
    callback: Callable[[int, Trainer], None] | None = None,
) -> dict[str, Any]:
    """Train a GPT and return its record (JSON types); see `Trainer` for arguments and `result` for keys."""
    trainer = Trainer(config, run_dir=run_dir, resume=resume, progress=progress, callback=callback)
    trainer.run(stop_after)
    if trainer.unsaved:
        warnings.warn(f"the last checkpoint could not be written: {trainer.unsaved}", stacklevel=2)
    return trainer.result()


class Trainer:
    """One training run: `run` it, then read `model`, `data` and `result()`.

    Args:
        config: what to train and how.
        run_dir: folder for checkpoints: every `checkpoint_every` steps (0: as `checkpoint.Pace` allows),
            at the end and on Ctrl-C; None: none.
        resume: continue from the newest intact checkpoint in run_dir; "exactly": only if the losses will be
            those of a run never stopped, else start over; False starts over.
        keep: False does without the checkpoint at the end.
        progress: show progress on stderr.
        callback: called as callback(step, trainer) after each optimiser step.
        data: tokens to train on instead of config.corpus's.

    Raises:
        ValueError: if run_dir holds checkpoints of another configuration or corpus, or the backend that
            config.backend or REPLICATE_BACKEND names is none, or sparse steps cannot run on it here; if
            config.attention's kernel cannot; for a bfloat16 residual elsewhere, or see `schedule.check`.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        run_dir: Path | str | None = None,
        resume: bool | str = True,
        keep: bool = True,
        progress: bool = True,
        callback: Callable[[int, Trainer], None] | None = None,
        data: TokenData | None = None,
    ):
        self.config, self.callback, self.keep = config, callback, keep
        self.group = parallel.start(config)
        self.device = pick_device(self.group.device(config.device))
        self.dtype = pick_dtype(config.dtype, self.device)
        engines.requested(config.backend)
        schedule.check(config)
        self.backend = None  # the engine of sparse steps, if there are any
        if schedule.sparse_steps(config):
            self.backend = engines.select(self.device, config.backend, self.dtype)
        tokens = partial(TokenData, config.corpus, config.model.vocab_size, config.model.seq_len)
        self.data = data or self.group.first_one(tokens)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = GPT(config.model)
        self.model.set_backend(config.backend)
        self.attention = attention.agreed(config, self.dtype, self.device, self.group)
        self.model.set_attention(self.attention)
        self.model.stream = pick_residual(config.residual, self.dtype)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.group.place(self.model, self.device, self.dtype)
        self.forward = compiled_loss(self.model) if config.compile else self.model
        self.optimizer = make_optimizer(self.model, config)
        parts = self.model, self.forward, self.optimizer
        self.optimizer_step = OptimizerStep(*parts, config, self.autocast, self.group)
        self.progress = Progress(progress and self.group.main, config)
        self.step = 0
        self.losses: list[float] = []
        self.speeds: list[float] = []
        self.stats: list[dict[str, Any]] = []
        self.valid_losses: list[tuple[int, float]] = []
        self.valid_seconds: list[float] = []
        self.seconds = 0.0
        self.unsaved: OSError | None = None  # why there is no checkpoint of the last step
        self._failed: NonFiniteLoss | None = None
        self._pending: list[Tensor] = []  # (loss, gradient norm) of steps not yet read back
        self._since = time.perf_counter()
        self.run_dir = Path(run_dir) if run_dir is not None else None
        if self.run_dir is not None:
            self._resume(resume) if resume else self.group.of_first(lambda: checkpoint.clear(self.run_dir))

    def run(self, stop_after: int | None = None) -> None:
        """Train to the end, or until `stop_after` steps are done (counted from the run's start).

        With a run_dir, Ctrl-C ends the run after the step it came in, with a checkpoint of it.

        Raises:
            NonFiniteLoss: naming step and phase, after saving the layers' statistics; again in later calls.
        """
        if self._failed:
            raise self._failed
        config = self.config
        last = config.steps if stop_after is None else min(stop_after, config.steps)
        begun = self.step < last
        why = self.optimizer_step.not_captured
        how = self.device, self.dtype, why, self.attention, str(self.group)
        self.progress.start(self.parameters, self.step, *how)
        repeats = reproducible(self.device, config.deterministic)
        with interrupts_between_steps(self.run_dir is not None) as interrupted, repeats:
            self._since = time.perf_counter()
            self._pace = checkpoint.Pace(12 * self.parameters)  # weights and AdamW's two moments
            while self.step < last:
                self._train_step()
                step = self.step
                if step % config.log_every == 0:
                    self._flush()
                if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                    self._evaluate()
                every = config.checkpoint_every
                due = step % every == 0 if every else self.group.any(self.group.main and self._pace.due())
                if step < last and due:
                    self._save()
                if self.callback:
                    self.callback(step, self)
                if self.group.any(interrupted()):
                    break
            self._flush()
            if self.step == config.steps and (not self.valid_losses or self.valid_losses[-1][0] < self.step):
                self._evaluate()
            if begun and (self.keep or self.step < config.steps):
                self._save()
            result = (self.losses or [None])[-1], (self.valid_losses or [[0, None]])[-1][1]
            self.progress.finish(self.step, *result, self.seconds)

    def result(self) -> dict[str, Any]:
        """The record so far, in JSON types.

        Returns:
            steps: columns step, loss, lr, phase, tokens_per_s, one value a step. stats: rows of
            `stats_every`, see `_statistics`. final_loss: mean loss of the last `final_window` steps.
            valid_loss and valid_losses [(steps done, loss)]; valid_seconds, the training time at each of
            these, evaluations and checkpoints not counted, compilation counted. tokens, seconds,
            tokens_per_s; parameters; attention: its kernel; backend: see `kernels.backend.select`, None
            without sparse steps; cuda_graph: whether steps were replayed as one; corpus: its provenance. Of
            several processes also parallel: how many, and the engine.
        """
        config, n = self.config, len(self.losses)
        window = self.losses[-config.final_window :]
        tokens = n * config.tokens_per_step
        columns = {
            "step": list(range(n)),
            "loss": list(self.losses),
            "lr": [schedule.learning_rate(step, config) for step in range(n)],
            "phase": [schedule.phase_at(step, config) for step in range(n)],
            "tokens_per_s": list(self.speeds),
        }
        return {
            "steps": columns,
            "stats": list(self.stats),
            "final_loss": sum(window) / len(window) if window else None,
            "valid_loss": self.valid_losses[-1][1] if self.valid_losses else None,
            "valid_losses": [list(pair) for pair in self.valid_losses],
            "valid_seconds": [round(seconds, 3) for seconds in self.valid_seconds],
            "tokens": tokens,
            "seconds": self.seconds,
            "tokens_per_s": tokens / self.seconds if self.seconds else None,
            "parameters": self.parameters,
            "attention": self.attention,
            "backend": self.backend,
            "cuda_graph": not self.optimizer_step.not_captured,
            "corpus": self.data.provenance(),
        } | self.group.record()

    def autocast(self) -> AbstractContextManager:
        """The precision the model runs in: bfloat16 autocast, or nothing for float32 and float64."""
        return autocast_in(self.dtype, self.device)

    def batch(self, step: int, micro: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets [B, S] of a micro-batch of all processes together, on the device."""
        where = {"device": self.device} if self.device.type == "cuda" else {}
        return self.data.batch("train", step, self.config.batch_size, self.config.seed, micro, **where)

    def _train_step(self) -> None:
        step, config = self.step, self.config
        self._enter_phase(step)
        due = config.stats_every and (step % config.stats_every == 0 or step == config.steps - 1)
        row = self._statistics(step) if due else None
        masks = [ffn.weight_masks() for ffn in self.model.ffns()] if due else []
        batches = [self.group.share(self.batch(step, micro)) for micro in range(config.grad_accum)]
        result = self.optimizer_step(batches, schedule.learning_rate(step, config), step)
        self._pending.append(result)
        self.step += 1
        if row is not None:
            self._flush()
            row |= {"grad_norm": result[1].item(), "flip_rate": evaluate.weight_flips(masks, self.model)}
            self.stats.append(row)

    def _enter_phase(self, step: int) -> None:
        """Set the FFNs' phase; cluster their neurons before the first sparse step and at refreshes."""
        config, sparsity = self.config, self.config.model.sparsity
        phase = schedule.phase_at(step, config)
        if phase == "sparse" and sparsity.activation == "venom":
            nth = schedule.sparse_before(step, config)
            if nth == 0 or (sparsity.refresh_every and nth % sparsity.refresh_every == 0):
                self._flush()
                self._make_clusters(step)
        if any(ffn.phase != phase for ffn in self.model.ffns()):
            self._flush()
            if phase == "dense" and config.fold:
                for ffn in self.model.ffns():
                    ffn.fold()
            self.model.set_phase(phase)
            self.group.same(buffer for ffn in self.model.ffns() for buffer in ffn.buffers())
            self.progress.phase(step, phase)

    def _make_clusters(self, step: int) -> None:
        """Sort the neurons of every FFN into clusters, and AdamW's moments with them."""
        with self.autocast():
            samples = evaluate.ffn_inputs(self.model, self.batch(step)[0][: evaluate.stats_rows(self.config)])
        for ffn, sample in zip(self.model.ffns(), samples):
            permute_moments(self.optimizer, ffn, ffn.make_clusters(self.config.seed, sample))
        if not self.group.sharded:  # those of rank 0, should a GPU have summed in another order
            self.group.same(layer_tensors(self.model.ffns(), self.optimizer))

    def _statistics(self, step: int) -> dict[str, Any]:
        """What the layers do in this step's forward pass: a list over layers for each statistic."""
        rows = evaluate.stats_rows(self.config)
        with self.autocast():
            layers = evaluate.shared_stats(self.model, self.batch(step)[0], rows, self.group)
        names = layers[0].keys()
        row = {name: [layer[name] for layer in layers] for name in names}
        return {"step": step, "phase": schedule.phase_at(step, self.config)} | row

    def _flush(self) -> None:
        """Read back the pending losses, note the speed, stop if one is not finite."""
        if not self._pending:
            return
        rows = torch.stack(self._pending).tolist()
        self._pending.clear()
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        self.seconds += elapsed
        for loss, norm in rows:
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._stop_at(len(self.losses), loss, norm)
            self.losses.append(loss)
        speed = len(rows) * self.config.tokens_per_step / elapsed
        self.speeds += [round(speed, 1)] * len(rows)
        self.progress.update(self.step, self.losses[-1], speed)

    def _stop_at(self, step: int, loss: float, norm: float) -> None:
        config, layers = self.config, []
        for micro in range(config.grad_accum):
            with self.autocast():
                layers.append(evaluate.layer_stats(self.model, self.group.share(self.batch(step, micro))[0]))
        report = {"step": step, "phase": schedule.phase_at(step, config), "loss": loss, "grad_norm": norm}
        report |= {"lr": schedule.learning_rate(step, config), "losses": self.losses[-100:]}
        report |= {"layers": layers}
        path = self.group.of_first(lambda: save_report(report, config, self.run_dir))
        self._failed = NonFiniteLoss(report, path)
        raise self._failed

    def _evaluate(self) -> None:
        self._flush()
        config = self.config
        with self.autocast():
            how = {"forward": self.forward, "group": self.group}
            loss = evaluate.valid_loss(self.model, self.data, config.eval_batches, config.batch_size, **how)
        self.valid_losses.append((self.step, loss))
        self.valid_seconds.append(self.seconds)
        self._since = time.perf_counter()

    def _save(self) -> None:
        if self.run_dir is None:
            return
        self._flush()
        begun = time.perf_counter()
        record = {name: getattr(self, name) for name in _RECORD}
        state = {"config": to_dict(self.config), "record": record, **self._identity()}
        tensors = checkpoint.pack(self.model, self.optimizer)
        try:
            checkpoint.save(self.run_dir, self.step, tensors, state, self.group)
        except OSError as error:
            if self.step < self.config.steps:
                raise
            self.unsaved = error  # the results are complete without it
        self._since = time.perf_counter()
        self._pace.saved(self._since - begun)

    def _resume(self, how: bool | str) -> None:
        blank = partial(checkpoint.blank, model=self.model, optimizer=self.optimizer)
        found = checkpoint.latest(self.run_dir, self.group, blank)
        if found is None or (how == "exactly" and not self._identity().items() <= found[2].items()):
            return
        self.step, tensors, state = found
        checkpoint.check_same_run(state, self._identity(), self.run_dir)
        checkpoint.unpack(tensors, self.model, self.optimizer)
        for name in _RECORD:
            setattr(self, name, state["record"].get(name, []))  # older checkpoints have fewer
        self.model.set_phase(schedule.phase_at(self.step - 1, self.config))

    def _identity(self) -> dict[str, str]:
        """What must agree for a resumed run to continue exactly."""
        return {
            "config_hash": config_hash(self.config),
            "corpus_sha256": self.data.provenance()["sha256"],
            "torch": torch.__version__,
            "code": provenance.code_fingerprint(),
            "device": str(self.device.type),
        }
