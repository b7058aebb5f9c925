"""What samples are judged by: a classifier, the Fréchet distance, and pictures kept in a record."""

import json

import pytest
import torch

from replicate.diffusion.glyphs import CLASSES, Glyphs
from replicate.diffusion.model import DiT
from replicate.diffusion.score import Classifier, Judge, frechet, pack, unpack


def test_the_classifier_learns_to_read():
    judge = Judge(Glyphs(size=16), n=180, steps=150, batch_size=32, width=8)
    assert min(judge.real["accuracy"].values()) > 5 / len(CLASSES)
    assert judge.real["frechet"] > 0 and judge.real["n"] == 180


def test_clips_are_read_by_the_mean_of_their_frames():
    torch.manual_seed(0)
    model, x = Classifier(8), torch.randn(2, 1, 3, 16, 16)
    logits, features = model(x)
    each = torch.stack([model(x[:, :, i])[1] for i in range(3)]).mean(0)
    assert torch.allclose(features, each, atol=1e-5) and logits.shape == (2, len(CLASSES))


def test_the_frechet_distance_by_hand():
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=draw, dtype=torch.float64)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + torch.tensor([3.0, 4.0, 0.0])) == pytest.approx(25)
    assert frechet(a, 3 * a) == pytest.approx(
        4 * a.T.cov().trace().item() + 4 * a.mean(0).square().sum().item()
    )
    turned = torch.linalg.qr(torch.randn(3, 3, generator=draw, dtype=torch.float64))[0]
    b = a * torch.tensor([1.0, 2.0, 3.0])
    assert frechet(a @ turned, b @ turned) == pytest.approx(frechet(a, b))
    with pytest.raises(ValueError, match="1 and 4000 rows"):
        frechet(a[:1], a)


def test_real_pictures_score_as_real_and_noise_does_not(tiny):
    """A model that hands out real glyphs of the class asked for is as near as real ones are."""
    data = Glyphs(size=16)
    judge = Judge(data, n=144, euler=1, steps=100, batch_size=32, width=8)

    class Real(DiT):
        def forward(self, x, t, y):
            pool, classes = data.batch("poses", 9, 3000)
            rows = torch.stack([(classes == c).nonzero()[i % 40, 0] for i, c in enumerate(y)])
            return x - pool[rows]  # one step of Euler's method then gives the pictures

    real, noise = (judge.score(model(tiny()), 40) for model in (Real, DiT))
    assert real["accuracy"] > noise["accuracy"] + 0.1
    assert real["frechet"] < 3 * judge.real["frechet"] < noise["frechet"]


@pytest.mark.parametrize("shape", [(3, 1, 5, 5), (2, 1, 3, 5, 5)])
def test_pictures_survive_being_packed(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    stored = json.loads(json.dumps(pack(x)))
    back = torch.from_numpy(unpack(stored))
    assert back.shape == shape
    assert ((x.clamp(-1, 1) + 1) / 2 - back).abs().max() <= 0.5 / 15 + 1e-6


def test_samples_of_a_record_are_small():
    for frames, n in ((1, 72), (8, 12)):
        assert len(pack(Glyphs(frames).batch("train", 0, n)[0])["pixels"]) < 30_000
