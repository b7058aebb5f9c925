"""A whole training step of a GPT, the arms that take turns on it, and its parts."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from replicate import evaluate
from replicate.bench import ffn, timing
from replicate.gpt import GPT, Block
from replicate.settings.presets import SPARSITY_PRESETS, train_preset
from replicate.training import attention, compiled
from replicate.training.device import pick_residual
from replicate.training.step import clipped_step, make_optimizer

DENSE, WHOLE = "dense", "dense, in one piece"
LR = 1e-6  # small, so that all arms, which take turns on the same weights, see about the same ones


class TrainingStep:
    """A GPT of a preset at some depth, its optimiser and one batch of random tokens, shared by all arms.

    An arm is a sparsity preset, DENSE or WHOLE. DENSE and the sparse arms are compiled as in training, see
    `compiled`; WHOLE is torch.compile of the whole dense model. The neurons count as clustered as they
    stand: of independent random neurons no order is better.

    Args:
        preset: training preset. n_layer: depth instead of its own. seed: of weights and tokens.
        device: "cuda" or "cpu". compile: False runs everything as it is.
        residual: dtype of the residual stream, of all arms; see `TrainConfig`.
    """

    def __init__(
        self,
        preset: str,
        n_layer: int,
        *,
        seed: int = 0,
        device: str = "cuda",
        compile: bool = True,
        residual: str = "float32",
    ) -> None:
        base = train_preset(preset)
        self.config = replace(base, model=replace(base.model, n_layer=n_layer), lr=LR, residual=residual)
        self.device, shape = device, self.config.model
        self.pool = None if device == "cpu" else torch.cuda.graph_pool_handle()
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            self.model = GPT(shape)
            tokens = torch.randint(shape.vocab_size, (self.config.batch_size, shape.seq_len + 1))
        self.model.stream = pick_residual(residual, torch.bfloat16)
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        for layer in self.model.ffns():
            layer.clustered.fill_(True)
        self.model.set_phase("sparse")  # a dense configuration is dense in every phase
        self.parameters = list(self.model.parameters())
        self.optimizer = make_optimizer(self.model, self.config)
        self.bad = torch.zeros((), device=device)
        self.compiled: Callable[[Any], Any] = lambda piece: piece
        if compile:
            self.compiled = partial(torch.compile, dynamic=False, backend=compiled.BACKEND)
        self.forward = compiled.compiled_loss(self.model) if compile else self.model
        self.whole = self.compiled(self.model)

    def use(self, name: str) -> None:
        """Give every FFN the formats of arm `name`."""
        for layer in self.model.ffns():
            layer.config = SPARSITY_PRESETS[DENSE if name == WHOLE else name]

    def autocast(self) -> AbstractContextManager:
        """The precision of all arms: bfloat16, weights in float32."""
        return torch.autocast(self.device, torch.bfloat16)

    def loss(self, name: str) -> Tensor:
        """Mean cross-entropy of the batch, as arm `name` computes it."""
        self.use(name)
        with self.autocast():
            return (self.whole if name == WHOLE else self.forward)(self.inputs, self.targets)[1]

    def step(self, name: str) -> Tensor:
        """One optimiser step of arm `name`, from tokens to new weights; the loss."""
        loss = self.loss(name)
        loss.backward()
        self.update(loss.detach())
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def update(self, loss: Tensor) -> None:
        """Clip the gradients and step the optimiser, as the trainer does."""
        clipped_step(self.optimizer, self.parameters, loss, self.config.clip, self.bad)

    def last_step(self, name: str) -> tuple[float, int | None]:
        """A step's loss, and the most GPU memory allocated in it: weights, optimiser, activations."""
        if self.device == "cpu":
            return float(self.step(name)), None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return float(self.step(name)), torch.cuda.max_memory_allocated()

    def load(self, name: str) -> list[float]:
        """Tokens of each layer's busiest cluster over the mean, on an eighth of the sequence."""
        self.use(name)
        with self.autocast():
            inputs = evaluate.ffn_inputs(self.model, self.inputs[:, : -(-self.inputs.shape[1] // 8)])
        layers = zip(self.model.ffns(), inputs, strict=True)
        return [ffn.load(layer, x.flatten(0, 1)) for layer, x in layers]

    def take_attention(self, asked: str) -> dict[str, Any]:
        """Compute attention as asked, see `step.config`.

        Returns:
            attention: milliseconds of each kernel that was timed, see `attention.times_ms`; attention_used:
            the kernel's name, None if torch chooses.
        """
        device = torch.device(self.device)
        shape = attention.Shape.of(self.config.model, self.config.batch_size, torch.bfloat16)
        times = attention.times_ms(shape, device) if asked == "auto" and device.type == "cuda" else {}
        used = min(times, key=times.__getitem__) if times else attention.pick(asked, shape, device)
        self.model.set_attention(used)
        return {"attention": times, "attention_used": None if used == attention.TORCH else used}

    def components(self, arms: Sequence[str], repeats: int) -> dict[str, Any]:
        """Times of the step's parts alone, forward and backward, see `timing.compare`; CUDA graphs on a GPU.

        "attention" and, by arm, "ffn" are of one layer, norm and residual sum included.
        """
        model, block = self.model, self.model.blocks[0]
        x, cos, sin = self._hidden()
        weight = model.embed.weight if model.head is None else model.head.weight
        y = torch.zeros_like(x, dtype=torch.bfloat16)
        attend, feed, head = map(self.compiled, (attention_half, ffn_half, compiled.head_loss))
        of_ffn = [x, *block.ffn_norm.parameters(), block.ffn.w1, block.ffn.w2]

        def one_ffn(name: str) -> None:
            block.ffn.config = SPARSITY_PRESETS[name]
            self._gradients(feed, (block, x), of_ffn)

        of_attention = [x, *block.attn_norm.parameters(), *block.attn.parameters()]
        into_head, of_head = (model.norm, weight, x, y, self.targets), [x, *model.norm.parameters(), weight]
        loss = self.loss(DENSE)
        loss.backward()  # for the optimiser
        loss = loss.detach()  # a graph that lives on binds later passes to its stream: no capture then
        calls: dict[str, Callable[[], Any]] = {
            "attention": partial(self._gradients, attend, (block, x, cos, sin), of_attention),
            "head and loss": partial(self._gradients, head, into_head, of_head),
            "optimiser": partial(self.update, loss),
        }
        timed = calls | {f"ffn {a}": partial(one_ffn, a) for a in arms}
        on_cpu = self.device == "cpu"
        found = timing.compare(timed, "cpu", repeats) if on_cpu else timing.compare_graphs(timed, repeats)
        self.optimizer.zero_grad(set_to_none=True)
        return {name: found[name] for name in calls} | {"ffn": {a: found[f"ffn {a}"] for a in arms}}

    def _hidden(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random x [B, S, D] of the residual stream's dtype, cos and sin."""
        length, d_model = self.inputs.shape[1], self.model.config.d_model
        how = {"device": self.device, "dtype": self.model.stream or torch.float32}
        x = torch.randn(*self.inputs.shape, d_model, requires_grad=True, **how)
        return x, self.model.cos[:length], self.model.sin[:length]

    def _gradients(self, fn: Callable[..., Tensor], arguments: tuple, wanted: list[Tensor]) -> None:
        with self.autocast():
            y = fn(*arguments)
        torch.autograd.grad(y, wanted, torch.ones_like(y))


def attention_half(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first half of a layer, x [B, S, D]."""
    return x + block.attn(block.attn_norm(x), cos, sin)


def ffn_half(block: Block, x: Tensor) -> Tensor:
    """The second half of a layer, x [B, S, D]."""
    return x + block.ffn(block.ffn_norm(x))
