"""How good samples are: a classifier of real glyphs reads them, and its features say how far they are off.

accuracy   share of the samples that the classifier takes for the class which was asked for
frechet    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), means and covariances of the classifier's features
           of samples and of real pictures (1706.08500, whose features are another network's)
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replicate.diffusion.glyphs import CLASSES, Glyphs
from replicate.diffusion.model import DiT, sample
from replicate.evaluate import evaluating

LEVELS = 15  # grey levels above black in a stored picture, four bits a pixel
CHUNK = 512  # pictures at a time


class Classifier(nn.Module):
    """A small convolutional network that reads pictures, and clips by the mean of their frames' features."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU(), nn.MaxPool2d(2)]
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * width, 4 * width)]
        self.body = nn.Sequential(*layers, nn.LayerNorm(4 * width))
        self.head = nn.Linear(4 * width, len(CLASSES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, 1, H, W] or clips [B, 1, T, H, W] to logits [B, classes], features [B, 4 width]."""
        frames = x.flatten(1, -3)
        features = self.body(frames.flatten(0, 1)[:, None]).unflatten(0, frames.shape[:2]).mean(1)
        return self.head(features), features


def train_classifier(
    data: Glyphs, *, steps: int = 2000, batch_size: int = 256, width: int = 32, seed: int = 0
) -> Classifier:
    """A classifier of the training fonts' glyphs, by AdamW at a rate that falls from 1e-3 along a cosine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(width)
    model.to(data.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x, y = data.batch("train", step, batch_size, seed)
        loss = F.cross_entropy(model(x)[0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    return model.eval()


class Judge:
    """A classifier, and what it makes of real held-out glyphs: a scale for samples.

    `n` is the number of pictures in a set, `euler` that of the steps to a sample; `training` is for
    `train_classifier`. `real` has n, euler, "accuracy" by held-out split, and "frechet" of two real sets.
    """

    def __init__(self, data: Glyphs, *, n: int = 2304, euler: int = 50, **training: int) -> None:
        self.n, self.euler, self.model = n, euler, train_classifier(data, **training)
        found = {split: self.read(*data.batch(split, 0, n, seed=1)) for split in ("poses", "fonts")}
        self.features = found["poses"][1]
        again = self.read(*data.batch("poses", 1, n, seed=1))[1]
        self.real: dict[str, Any] = {"n": n, "euler": euler}
        self.real["accuracy"] = {split: right for split, (right, _) in found.items()}
        self.real["frechet"] = frechet(self.features, again)

    @torch.no_grad()
    def read(self, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
        """Share of x that is taken for its class in y, and x's features [N, F]."""
        parts = [self.model(part) for part in x.split(CHUNK)]
        right = torch.cat([logits.argmax(-1) for logits, _ in parts]) == y
        return right.double().mean().item(), torch.cat([features for _, features in parts])

    def score(self, model: DiT, batch_size: int) -> dict[str, float]:
        """ "accuracy" and "frechet" of `n` samples without guidance, every class as often as the others.

        A batch has as many pictures as in training, for which kernels are tuned already.
        """
        y = torch.arange(self.n, device=self.features.device) % len(CLASSES)
        with evaluating(model):
            parts = [
                sample(model, part, seed=i, steps=self.euler) for i, part in enumerate(y.split(batch_size))
            ]
        accuracy, features = self.read(torch.cat(parts), y)
        return {"accuracy": accuracy, "frechet": frechet(features, self.features)}


def frechet(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of two Gaussians with the means and covariances of features a and b [N, F].

    tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2). Raises ValueError
    for fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} rows have no covariance; give two or more")
    a, b = a.double().cpu(), b.double().cpu()
    s1, s2 = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, (apart + s1.trace() + s2.trace() - 2 * cross).item())


def pack(x: Tensor) -> dict[str, Any]:
    """Pictures or clips [N, 1, ...] from -1 to 1 as JSON: four bits a pixel, compressed; see `unpack`."""
    levels = ((x.float().cpu().clamp(-1, 1) + 1) / 2 * LEVELS).round().to(torch.uint8).numpy().reshape(-1)
    levels = np.append(levels, np.zeros(len(levels) % 2, np.uint8))
    packed = zlib.compress((levels[::2] << 4 | levels[1::2]).tobytes(), 9)
    return {"shape": list(x.shape), "pixels": base64.b64encode(packed).decode()}


def unpack(stored: dict[str, Any]) -> np.ndarray:
    """The pictures of `pack`, from 0 (black) to 1, as float32 of the stored shape."""
    packed = np.frombuffer(zlib.decompress(base64.b64decode(stored["pixels"])), np.uint8)
    levels = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: int(np.prod(stored["shape"]))]
    return (levels / np.float32(LEVELS)).astype(np.float32).reshape(stored["shape"])
