"""Other people's models: each feed-forward block becomes a `SparseFFN`, and back.

    swap = swap_ffn(model, "act24")            # a Hugging Face GPT-2, GPT-NeoX, OPT or Nemotron
    ... dense warm-up ...
    start_sparse(model, optimizer=optimizer)   # clusters first, where the formats have them
    restore_ffn(model)                         # the original modules with the trained weights, to be saved

Blocks are known by their parts, two linear maps with an activation between; `transformers` is not imported.
A bias of the first map is a row of W1 that reads a constant 1, so the kernels need not know of it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim

from replicate.config import SparsityConfig
from replicate.evaluate import ffn_inputs
from replicate.ffn import SparseFFN, relu2
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.training.sharded import whole
from replicate.training.step import moments, permute_moments

LAYOUTS = (  # first and second map, activation: GPT-2, GPT-NeoX, Nemotron, OPT
    ("c_fc", "c_proj", "act"),
    ("dense_h_to_4h", "dense_4h_to_h", "act"),
    ("up_proj", "down_proj", "act_fn"),
    ("fc1", "fc2", "activation_fn"),
)
GATE = "gate_proj"  # of a block with three matrices
NAMES = ("activation_function", "hidden_act")  # of the activation, in a model's configuration
PAD = 64  # columns for the bias: 2:4 compression wants d_model in multiples of it


@dataclass(frozen=True)
class Swap:
    """What `swap_ffn` did: names of the blocks, and the activation that squared ReLU took the place of."""

    blocks: tuple[str, ...]
    activation: str  # "" if it was squared ReLU
    biases: bool

    def __str__(self) -> str:
        kept = (
            "squared ReLU as before" if not self.activation else f"squared ReLU instead of {self.activation}"
        )
        return f"{len(self.blocks)} feed-forward blocks are sparse FFNs: {kept}"


class BlockFFN(nn.Module):
    """`SparseFFN` with the biases of the block that it stands for: y = relu(x W1 + b1)^2 W2 + b2.

    With b1 the FFN is PAD wider than the model: [x, 1, 0, ...] times [W1; b1; 0]. Its further rows of W1 and
    columns of W2 are zero and get no gradient.
    """

    def __init__(self, first: nn.Module, second: nn.Module, act: Any, sparsity: SparsityConfig) -> None:
        super().__init__()
        (w1, b1), (w2, b2) = weight_of(first), weight_of(second)
        self.d_model, d_ff = w1.shape
        pad = 0 if b1 is None else PAD
        self.ffn = SparseFFN(self.d_model + pad, d_ff, sparsity).to(w1.device, w1.dtype)
        with torch.no_grad():
            for target in (self.ffn.w1, self.ffn.w2):
                target.zero_()
            self.ffn.w1[: self.d_model], self.ffn.w2[:, : self.d_model] = w1, w2
            if b1 is not None:
                self.ffn.w1[self.d_model] = b1
        self.bias = None if b2 is None else nn.Parameter(b2.detach().clone())
        one = torch.zeros(pad, device=w1.device)
        one[:1] = 1
        self.register_buffer("one", one, persistent=False)
        self.replaced = first, second, act  # a tuple: no modules of the model

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] to the same shape."""
        if len(self.one):
            x = torch.cat([x, self.one.to(x.dtype).expand(*x.shape[:-1], -1)], -1)
        y = self.ffn(x)[..., : self.d_model]
        return y if self.bias is None else y + self.bias.to(y.dtype)


def swap_ffn(model: nn.Module, sparsity: str | SparsityConfig = "act24", *, activation: str = "same") -> Swap:
    """Replace each feed-forward block of a model by a `SparseFFN` of these formats, in the dense phase.

    Where a block computes squared ReLU, the model's function stays as it is until `start_sparse`. Optimisers
    are to be made afterwards: the weights are new parameters, W1 with its bias as one matrix, so that weight
    decay of matrices takes this bias too.

    Args:
        model: with blocks of LAYOUTS. sparsity: a preset's name, or formats.
        activation: "relu2" also takes blocks of another activation and computes squared ReLU in its place,
            which is another function: the model has to be trained with it.

    Raises:
        ValueError: no such block; a block with three matrices; another activation with activation="same";
            a shape that cannot carry the formats; a model that is swapped already.
    """
    if activation not in ("same", "relu2"):
        raise ValueError(f"activation is {activation!r}; choose 'same' or 'relu2'")
    if isinstance(sparsity, str):
        if sparsity not in SPARSITY_PRESETS:
            raise ValueError(f"sparsity is {sparsity!r}; choose one of {', '.join(SPARSITY_PRESETS)}")
        sparsity = SPARSITY_PRESETS[sparsity]
    if any(isinstance(module, BlockFFN) for module in model.modules()):
        raise ValueError("this model's blocks are swapped already; call restore_ffn first")
    found = _blocks(model)
    acts = [getattr(block, act) for _, block, (*_, act) in found]
    others = {_name(act) for act in acts if not _is_relu2(act)}
    if others and activation == "same":
        raise ValueError(
            f"these blocks compute {', '.join(sorted(others))}, not squared ReLU; activation='relu2' puts "
            "that in its place, which is another function: train the model with it"
        )
    new = [BlockFFN(*(getattr(block, part) for part in parts), sparsity) for _, block, parts in found]
    for (_, block, (up, down, act)), ffn in zip(found, new, strict=True):
        nn.ModuleList(ffn.replaced[:2]).to("meta")  # once no block can be refused any more
        setattr(block, up, ffn)
        setattr(block, down, nn.Identity())
        setattr(block, act, nn.Identity())
    if others:
        _say_relu2(model)
    biases = any(len(ffn.one) > 0 or ffn.bias is not None for ffn in new)
    return Swap(tuple(name for name, *_ in found), ", ".join(sorted(others)), biases)


def start_sparse(
    model: nn.Module, seed: int = 1, optimizer: optim.Optimizer | None = None, sample: Tensor | None = None
) -> None:
    """Enter the sparse phase: sort neurons into clusters where the formats have them, then switch.

    Args:
        seed: of the clustering. optimizer: whose moments follow the neurons.
        sample: what the model reads, `model(sample)`; routing "static" fixes its clusters by it.

    Raises ValueError, before it changes anything, for a model without SparseFFN, an optimiser without the
    weights, and routing "static" without a sample.
    """
    ffns = [module for module in model.modules() if isinstance(module, SparseFFN)]
    if not ffns:
        raise ValueError(f"{type(model).__name__} has no SparseFFN; call swap_ffn first")
    new = [ffn for ffn in ffns if ffn.config.activation == "venom" and not ffn.clustered]
    samples = [None] * len(new) if sample is None else ffn_inputs(model, sample, new)
    for ffn, x in zip(new, samples, strict=True):
        if ffn.config.routing == "static" and x is None:
            raise ValueError("routing is 'static', whose clusters are fixed by a sample; give sample=")
        if optimizer is not None:
            moments(optimizer, ffn)
    for ffn, x in zip(new, samples, strict=True):
        perm = ffn.make_clusters(seed, x)
        if optimizer is not None:
            permute_moments(optimizer, ffn, perm)
    for ffn in ffns:
        ffn.phase = "sparse"


def restore_ffn(model: nn.Module) -> int:
    """Give every swapped block its own modules back, with the weights as they are now; how many there were.

    They compute what the dense phase does. A block of another activation keeps squared ReLU, and so says the
    model's configuration.
    """
    count = 0
    for block in list(model.modules()):
        for up, down, act in LAYOUTS:
            ffn = getattr(block, up, None)
            if not isinstance(ffn, BlockFFN):
                continue
            first, second, before = ffn.replaced
            with torch.no_grad():
                w1, w2 = whole(ffn.ffn.w1), whole(ffn.ffn.w2)
                _set(first, w1[: ffn.d_model], w1[ffn.d_model] if len(ffn.one) else None)
                _set(second, w2[:, : ffn.d_model], None if ffn.bias is None else whole(ffn.bias))
            setattr(block, up, first)
            setattr(block, down, second)
            setattr(block, act, before if _is_relu2(before) else ReLU2())
            count += 1
    return count


class ReLU2(nn.Module):
    """Squared ReLU as a module."""

    def forward(self, y1: Tensor) -> Tensor:
        """relu(y1)^2."""
        return relu2(y1)


def weight_of(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight [in, out], bias [out] or None) of a linear map, `nn.Linear` or GPT-2's transposed `Conv1D`."""
    weight = linear.weight.T if isinstance(linear, nn.Linear) else linear.weight
    return weight, getattr(linear, "bias", None)


def _set(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    linear.to_empty(device=weight.device).to(weight.dtype)
    weight_of(linear)[0].copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module, tuple[str, str, str]]]:
    """(name, module, attributes of LAYOUTS) of every feed-forward block."""
    found, gated = [], []
    for name, module in model.named_modules():
        for layout in LAYOUTS:
            if all(hasattr(module, part) for part in layout):
                gated += [name] if hasattr(module, GATE) else []
                found.append((name, module, layout))
    if gated:
        raise ValueError(
            f"{gated[0]} has three matrices ({GATE}): a gated block, whose zeros are not the paper's; only "
            "blocks of two matrices can be swapped"
        )
    if not found:
        known = "; ".join(", ".join(layout) for layout in LAYOUTS)
        raise ValueError(f"{type(model).__name__} has no block of two matrices with these parts: {known}")
    for name, module, parts in found:
        *maps, act = (getattr(module, part) for part in parts)
        first, second = (tuple(weight_of(m)[0].shape) if hasattr(m, "weight") else () for m in maps)
        if len(first) != 2 or second != first[::-1] or not callable(act):
            raise ValueError(
                f"{name or type(module).__name__} has weights {first} and {second}, activation {act!r:.60}; "
                "only maps [D, F] and [F, D] with a function between can be swapped"
            )
    return found


def _is_relu2(act: Any) -> bool:
    t = torch.linspace(-3, 3, 13)
    with suppress(Exception):  # it takes no such tensor
        return torch.equal(act(t), relu2(t))
    return False


def _name(act: Any) -> str:
    return getattr(act, "__name__", type(act).__name__)


def _say_relu2(model: nn.Module) -> None:
    """Name squared ReLU in a Hugging Face configuration, as it is saved with the model."""
    config = getattr(model, "config", None)
    for name in NAMES:
        if hasattr(config, name):
            setattr(config, name, "relu2")
