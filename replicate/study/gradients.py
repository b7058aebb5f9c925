"""The gradient that a backward pass sends down against the true one: how long, in which direction, by layer.

The true gradient is that of what the forward pass computed: every product reads backward the weight that its
partner read forward. A pass that reads weights whole, or in a 2:4 pattern of their own, sends another one.
`python -m replicate.study.gradients` compares the two in models being trained, for the records `gradients`.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from replicate.config import SparsityConfig, TrainConfig
from replicate.ffn import SparseFFN, relu2
from replicate.gpt import GPT
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.settings.text import config_hash
from replicate.study import records
from replicate.study.plans import arms, describe
from replicate.system.console import ended
from replicate.train import Trainer

KIND = "gradients"
ARMS = ("w1", "w2", "w1+w2", "recipe")
SEQUENCES = 16  # of the batch that is measured


def by_layer(model: GPT, x: Tensor, y: Tensor) -> list[dict[str, float]]:
    """One row a layer, first to last: the gradient as the model's backward pass has it over the true one.

    `length` and `cosine` are about the gradient that reaches the layer's input [B, S, D]; `weights length`
    and `weights cosine` about that of all its parameters. The loss is the mean over the batch x, y [B, S], in
    the model's dtype, by the reference backend. The model and its gradients stay as they were.

    Raises ValueError if the model is in its dense phase, or if its backward pass is the true one already.
    """
    ffns, own = model.ffns(), model.ffns()[0].config
    if any(ffn.phase != "sparse" for ffn in ffns):
        raise ValueError("the model is in its dense phase, where no weight is 2:4; set_phase('sparse') first")
    true = replace(own, w1_t=False, w2_t=False, backward="same")
    if true == own or (own.reading_matters and own.backward == "same"):
        raise ValueError("every product reads backward what was read forward: there is nothing to compare")
    found = []
    for config in (true, own):
        with _formats(model, config):
            found.append(_gradients(model, x, y))
    rows = []
    for theirs, ours in zip(*found, strict=True):
        row = {}
        for name, a, b in zip(("", "weights "), theirs, ours):
            row[f"{name}length"] = float(b.norm() / a.norm())
            row[f"{name}cosine"] = float(a @ b / (a.norm() * b.norm()))
        rows.append(row)
    return rows


def sent_down(plain: SparseFFN, sparsity: SparsityConfig, x: Tensor, upstream: Tensor) -> dict[str, float]:
    """One layer's dx as it is sent down, against the true gradient of what the layer computed.

    Args:
        plain: a dense layer, whose weights are taken. sparsity: formats of weights alone.
        x, upstream: [T, D], the layer's input, and the gradient of the loss by its output.

    Returns:
        "length" and "cosine" of the dx sent down over the true one; "output", the size of y3 over dense's.
    """
    ffn = SparseFFN(*plain.w1.shape, sparsity).to(x.dtype)
    ffn.load_state_dict(plain.state_dict())
    ffn.phase = "sparse"
    sent, true = x.clone().requires_grad_(), x.clone().requires_grad_()
    y3 = ffn(sent)
    y3.backward(upstream)
    same = relu2(true @ ffn.sparse_weight("w1", x.dtype)) @ ffn.sparse_weight("w2", x.dtype)
    same.backward(upstream)
    if not torch.allclose(same, y3):
        raise ValueError("the layer computes more than products with pruned weights; give formats of weights")
    ours, theirs = sent.grad.flatten(), true.grad.flatten()
    cosine = torch.cosine_similarity(ours, theirs, 0)
    found = {"length": ours.norm() / theirs.norm(), "cosine": cosine, "output": y3.norm() / plain(x).norm()}
    return {name: value.item() for name, value in found.items()}


def measure(config: TrainConfig, steps: Sequence[int]) -> records.Record:
    """Train `config` and compare the gradients after each of `steps`; the first is the first sparse step.

    The record's results: "steps", and after each "layers", see `by_layer`, and "losses".
    """
    start = time.perf_counter()
    trainer, layers = Trainer(config, progress=False), []
    for step in steps:
        trainer.run(step)
        x, y = trainer.batch(step - 1)
        layers.append(by_layer(trainer.model, x[:SEQUENCES], y[:SEQUENCES]))
    results = {"steps": list(steps), "layers": layers, "losses": [trainer.losses[step - 1] for step in steps]}
    asked = {"train": config_hash(config), "arm": describe(config), "steps": list(steps)}
    seconds = time.perf_counter() - start
    corpus = trainer.data.provenance()
    return records.make_record(KIND, asked, results, seconds=seconds, corpus=corpus, device=config.device)


@contextmanager
def _formats(model: GPT, config: SparsityConfig):
    """The reference in eval mode, every layer in these formats."""
    was, training = [(ffn.config, ffn.backend) for ffn in model.ffns()], model.training
    model.eval()
    for ffn in model.ffns():
        ffn.config, ffn.backend = config, "reference"
    try:
        yield
    finally:
        model.train(training)
        for ffn, (before, backend) in zip(model.ffns(), was, strict=True):
            ffn.config, ffn.backend = before, backend


def _gradients(model: GPT, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(gradient of a layer's input, of its parameters in one line) for every layer."""
    inputs: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.blocks
    ]
    try:
        loss = model(x, y)[1]
    finally:
        for hook in hooks:
            hook.remove()
    parameters = [list(block.parameters()) for block in model.blocks]
    wanted = [*inputs, *(p for block in parameters for p in block)]
    flat = [gradient.detach().double().flatten() for gradient in torch.autograd.grad(loss, wanted)]
    of_inputs, rest = flat[: len(inputs)], iter(flat[len(inputs) :])
    return [
        (g, torch.cat([next(rest) for _ in block])) for g, block in zip(of_inputs, parameters, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Train arms of Table 3, compare the gradients at the first sparse step, halfway and at the end."""
    parser = argparse.ArgumentParser(prog="replicate.study.gradients", description=main.__doc__)
    parser.add_argument("--profile", default="gpu")
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    for config in arms(args.profile, args.arms, (args.seed,)):
        record = measure(config, (config.dense_warmup + 1, config.steps // 2, config.steps))
        path = records.RecordStore().put(record, recorded=True)
        print(f"{record.config['arm']}: {path}")
        for step, rows in zip(record.results["steps"], record.results["layers"], strict=True):
            shown = "  ".join(f"{row['length']:.2f} ({row['cosine']:.2f})" for row in rows)
            print(f"  step {step}, length (cosine) a layer: {shown}", flush=True)
    return 0


def ends() -> dict[str, list[dict[str, float]]]:
    """Arm -> `by_layer` after the last step, of every record; arms in the order of the presets."""
    stored = records.RecordStore().all(KIND)
    found = {r.config["arm"].rsplit(" seed ", 1)[0]: r.results["layers"][-1] for r, _ in stored}
    return dict(sorted(found.items(), key=lambda item: list(SPARSITY_PRESETS).index(item[0])))


if __name__ == "__main__":
    raise SystemExit(ended(main))
