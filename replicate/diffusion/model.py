"""A diffusion transformer (DiT, 2212.09748) whose FFN is the layer under study, trained by flow matching.

A picture [C, H, W] or a clip [C, T, H, W] is cut into patches, a token each; every token attends to every
other one. Time t and class y steer each block by adaLN-zero: c = embedding(t) + embedding(y) gives shift,
scale and gate of both halves of a block, and starts at zero, so that a new block changes nothing.

    h = x + g1 Attention(norm(x) (1 + s1) + b1),   x' = h + g2 FFN(norm(h) (1 + s2) + b2)

Flow matching (2210.02747) goes in a straight line from a picture x0 at t = 0 to noise e at t = 1, and learns
the velocity: x_t = (1 - t) x0 + t e, dx_t/dt = e - x0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replicate.config import SparsityConfig
from replicate.ffn import INIT_STD, SparseFFN
from replicate.gpt import DenseFFN
from replicate.settings.checks import at_least, check_types, one_of
from replicate.training.attention import attention_by
from replicate.training.sparse_model import SparseModel

FREQUENCIES = 64  # sine and cosine pairs that stand for a time


@dataclass(frozen=True)
class DiTConfig:
    """Shape of the model: pictures where frames is 1, else clips. A token is a patch of
    frame_patch x patch x patch numbers in each channel."""

    channels: int = 1
    frames: int = 1
    size: int = 32  # pixels, height and width
    patch: int = 4
    frame_patch: int = 1
    n_classes: int = 36
    n_layer: int = 8
    d_model: int = 384
    d_ff: int = 1536
    n_head: int = 6
    activation: str = "relu2"  # or "gelu", the usual one of such models; dense only
    qk_norm: bool = False  # queries and keys of length sqrt(d_head), see `Attention`
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)

    def __post_init__(self) -> None:
        check_types(self)
        counts = ("channels", "frames", "size", "patch", "frame_patch", "n_classes")
        for name in (*counts, "n_layer", "d_model", "d_ff", "n_head"):
            at_least(name, getattr(self, name), 1)
        for whole, part in (("size", "patch"), ("frames", "frame_patch"), ("d_model", "n_head")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} is {getattr(self, whole)}, no multiple of {part} = {getattr(self, part)}"
                )
        one_of("activation", self.activation, ("relu2", "gelu"))
        self.sparsity.check_model(self.activation, self.d_model, self.d_ff)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture [C, H, W], or one clip [C, T, H, W]."""
        frames = () if self.frames == 1 else (self.frames,)
        return self.channels, *frames, self.size, self.size

    @property
    def seq_len(self) -> int:
        """Tokens of a picture or clip."""
        return self.frames // self.frame_patch * (self.size // self.patch) ** 2

    @property
    def patch_numbers(self) -> int:
        """Numbers in a token's patch."""
        return self.channels * self.frame_patch * self.patch**2


def run_block(block: Block, h: Tensor, c: Tensor) -> Tensor:
    """block(h, c), as a function that can be compiled once for all blocks."""
    return block(h, c)


class DiT(SparseModel):
    """Velocity of pictures or clips at times t, given their classes; random initial weights of torch's
    global generator."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.stream = None  # the residual stream is float32, see `GPT.stream`
        d = config.d_model
        self.patches = nn.Linear(config.patch_numbers, d)
        self.places = nn.Parameter(torch.randn(config.seq_len, d) * INIT_STD)
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, d), nn.SiLU(), nn.Linear(d, d))
        self.classes = nn.Embedding(config.n_classes + 1, d)  # the last one stands for no class
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.last = _zero(nn.Linear(d, 2 * d))
        self.out = _zero(nn.Linear(d, config.patch_numbers))
        nn.init.normal_(self.classes.weight, std=INIT_STD)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, run: Callable[[Block, Tensor, Tensor], Tensor] = run_block
    ) -> Tensor:
        """The velocity, of x's shape.

        Args:
            x: [B, C, H, W] or [B, C, T, H, W], the config's shape. t: [B], from 0 (picture) to 1 (noise).
            y: [B], class; n_classes stands for none.

        Raises ValueError for pictures of another shape.
        """
        c = self.condition(t, y)
        h = self.tokens(x)
        for block in self.blocks:
            h = run(block, h, c)
        return self.velocity(h, c).view_as(x)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """What steers the blocks [B, D]: times t [B] and classes y [B]."""
        rates = torch.exp(-math.log(1e4) * torch.arange(FREQUENCIES, device=t.device) / FREQUENCIES)
        angles = 1000 * t[:, None].float() * rates
        return F.silu(self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.classes(y))

    def tokens(self, x: Tensor) -> Tensor:
        """[B, seq_len, D]: a token a patch, with its place."""
        if x.shape[1:] != self.config.shape:
            raise ValueError(f"pictures of shape {tuple(x.shape[1:])}; the model's is {self.config.shape}")
        return self.patches(patchify(x, self.config)) + self.places

    def velocity(self, h: Tensor, c: Tensor) -> Tensor:
        """[B, C, T, H, W] from the last block's tokens h [B, seq_len, D] and c [B, D]."""
        shift, scale = self.last(c)[:, None].chunk(2, -1)
        return unpatchify(self.out(modulated(h, shift, scale)).float(), self.config)


class Block(nn.Module):
    """Attention, then the FFN, each on a copy of the residual stream that c has shifted and scaled."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d = config.d_model
        self.steer = _zero(nn.Linear(d, 6 * d))
        self.attn = Attention(d, config.n_head, config.qk_norm)
        if config.activation == "relu2":
            self.ffn = SparseFFN(d, config.d_ff, config.sparsity)
        else:
            self.ffn = DenseFFN(d, config.d_ff, config.activation)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [B, S, D], c [B, D] to x's shape."""
        b1, s1, g1, b2, s2, g2 = self.steer(c)[:, None].chunk(6, -1)
        x = x + g1 * self.attn(modulated(x, b1, s1))
        return x + g2 * self.ffn(modulated(x, b2, s2))


class Attention(nn.Module):
    """Self-attention in which every token sees every other one.

    With qk_norm queries and keys are divided by their root mean square (2302.05442; here without weights), so
    that no score is above sqrt(d_head). Without it training on clips broke (lr 1e-3; one of four trials is
    recorded).

    Not by cuDNN's kernel, torch's first choice on an H200: its backward pass gave NaN at 64 tokens with all
    scores of a query at about -120. Pytorch issue 196678 has it with a mask that is a tensor (here is none):
    where tokens % 128 is 64 and all scores of a query are below about -89.
    """

    kernel = "flash"  # see `attention.attention_by`

    def __init__(self, d_model: int, n_head: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.n_head, self.qk_norm = n_head, qk_norm
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, D] to the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        with attention_by(self.kernel):
            y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift, the norm without weights of its own."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def patchify(x: Tensor, c: DiTConfig) -> Tensor:
    """[B, C, (T,) H, W] to [B, seq_len, patch_numbers], patches in the order frames, rows, columns."""
    n, side = c.frames // c.frame_patch, c.size // c.patch
    x = x.reshape(len(x), c.channels, n, c.frame_patch, side, c.patch, side, c.patch)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(len(x), c.seq_len, c.patch_numbers)


def unpatchify(p: Tensor, c: DiTConfig) -> Tensor:
    """The inverse of `patchify`, [B, C, T, H, W] for pictures too."""
    n, side = c.frames // c.frame_patch, c.size // c.patch
    p = p.reshape(len(p), n, side, side, c.channels, c.frame_patch, c.patch, c.patch)
    return p.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(p), c.channels, c.frames, c.size, c.size)


def between(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise, for x0 and noise [B, ...] and t [B]."""
    t = t.view(-1, *[1] * (x0.dim() - 1))
    return (1 - t) * x0 + t * noise


def flow_loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of a velocity [B, ...] against the straight path's, noise - x0."""
    return F.mse_loss(velocity.float(), noise - x0)


@torch.no_grad()
def sample(model: nn.Module, y: Tensor, *, steps: int = 50, guidance: float = 1.0, seed: int = 1) -> Tensor:
    """Pictures or clips [B, *shape] of the classes y [B], the same ones for the same seed and device.

    Euler's method from noise at t = 1 to t = 0: x <- x - v / steps. With guidance w other than 1,
    v = v(none) + w (v(y) - v(none)) (2207.12598), at twice the work.

    Raises ValueError for less than one step.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; choose 1 or more (50 is usual)")
    c, device = model.config, y.device
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every device
    x = torch.randn(len(y), *c.shape, generator=generator).to(device)
    nothing = torch.full_like(y, c.n_classes)
    for i in range(steps):
        t = torch.full((len(y),), 1 - i / steps, device=device)
        v = model(x, t, y).float()
        if guidance != 1:
            none = model(x, t, nothing).float()
            v = none + guidance * (v - none)
        x = x - v / steps
    return x


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
