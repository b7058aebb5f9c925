"""Glyphs: drawn alike everywhere, told apart by class, held out by font and by pose, in front or behind."""

import pytest
import torch

from replicate.diffusion import glyphs
from replicate.diffusion.glyphs import CLASSES, HELD_OUT, SPLITS, TRAINED, Glyphs, overlaid, place, specimens


def test_every_character_of_every_font_is_there_whole_and_unlike_the_others():
    for fonts in (TRAINED, HELD_OUT):
        cells = specimens(fonts)
        assert cells.shape == (len(fonts), len(CLASSES), glyphs.CELL, glyphs.CELL)
        assert cells.min() == 0 and cells.max() == 1
        edge = torch.cat([cells[..., 0, :], cells[..., -1, :], cells[..., 0], cells[..., -1]], -1)
        assert edge.max() == 0, "no glyph reaches out of its cell"
        ink = cells.flatten(2).mean(-1)
        assert ink.min() > 0.02 and ink.max() < 0.35
        for font in cells.flatten(2):
            apart = torch.cdist(font, font) + 1e3 * torch.eye(len(CLASSES))
            assert apart.min() > 2


def test_specimens_are_the_same_on_every_machine():
    """Ink of the four quarters of some cells, and bold over plain; tolerant of an anti-aliased edge."""
    cells = specimens(TRAINED)
    quarters = cells.unflatten(-1, (2, -1)).unflatten(-3, (2, -1)).mean((-3, -1))
    l, t = (quarters[0, CLASSES.index(c)].flatten().tolist() for c in "LT")
    assert l == pytest.approx([0.083, 0, 0.097, 0.028], abs=0.004) and t == pytest.approx(
        [0.069, 0.069, 0.042, 0.042], abs=0.004
    )
    plain, bold = (cells[TRAINED.index(f)].mean().item() for f in ("DejaVuSans", "DejaVuSans-Bold"))
    assert bold / plain == pytest.approx(1.72, abs=0.03)


def test_no_font_is_both_trained_and_held_out_and_poses_are_others():
    assert not {*TRAINED} & {*HELD_OUT} and SPLITS["poses"] == TRAINED
    data = Glyphs()
    seen, poses = (data.batch(split, 0, 64, seed=1)[0].flatten(1) for split in ("train", "poses"))
    assert torch.cdist(seen, poses).min() > 1


def test_a_batch_depends_on_split_index_and_seed_alone():
    data = Glyphs()
    x, y = data.batch("train", 3, 8, seed=1)
    assert x.shape == (8, 1, 32, 32) and x.min() >= -1 and x.max() <= 1
    again = Glyphs().batch("train", 3, 8, seed=1)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    for other in (("train", 4, 8, 1), ("train", 3, 8, 2), ("poses", 3, 8, 1)):
        assert not torch.equal(x, data.batch(*other)[0])
    with pytest.raises(ValueError, match="split is 'test'; choose one of train, poses, fonts"):
        data.batch("test", 0, 1)


@pytest.mark.parametrize(("frames", "mean", "spread"), [(1, -0.8044, 0.5227), (8, -0.8755, 0.3955)])
def test_recorded_runs_saw_these_drawings(frames, mean, spread):
    """No setting says how glyphs move: who changes the drawings must give `corpus` another name as well."""
    x, _ = Glyphs(frames).batch("train", 0, 16, seed=1)
    assert [x.mean().item(), x.std().item()] == pytest.approx([mean, spread], abs=2e-4)


def test_classes_are_all_drawn_and_name_what_is_shown():
    x, y = Glyphs().batch("train", 0, 2000)
    assert set(y.tolist()) == set(range(len(CLASSES)))
    ink = torch.stack([(x[y == c] + 1).mean() for c in range(len(CLASSES))])
    assert ink[CLASSES.index("M")] > 1.3 * ink[CLASSES.index("I")]


def bar():
    """A cell with a bar from the middle to the right."""
    cell = torch.zeros(1, glyphs.CELL, glyphs.CELL)
    cell[:, 22:26, 24:44] = 1
    return cell


def centre(picture):
    """Where the ink is, in halves of the side: to the right and down."""
    side = torch.linspace(-1, 1, picture.shape[-1])
    return (picture.sum(-2) @ side / picture.sum()).item(), (picture.sum(-1) @ side / picture.sum()).item()


def placed(turn=0.0, scale=1.0, shift=(0.0, 0.0)):
    return place(bar(), torch.tensor([turn]), torch.tensor([scale]), torch.tensor([shift]), 32)[0]


def test_glyphs_are_turned_scaled_and_shifted():
    right, down = centre(placed())
    assert right == pytest.approx(0.43, abs=0.03) and down == pytest.approx(0, abs=0.03)
    turned = centre(placed(turn=torch.pi / 2))  # to the left: what pointed to the right points up
    assert turned == pytest.approx((0, -right), abs=0.03)
    assert centre(placed(scale=0.5))[0] == pytest.approx(right / 2, abs=0.03)
    assert centre(placed(shift=(-0.5, 0.25))) == pytest.approx((right - 0.5, 0.25), abs=0.04)
    assert placed(scale=0.5).sum().item() == pytest.approx(placed().sum().item() / 4, rel=0.1)


def test_what_is_in_front_hides_what_is_behind():
    front, behind = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5]), torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
    assert overlaid(front, behind).tolist() == [0, 1, 1, 0.5, 0.75]


def test_a_clip_has_a_white_glyph_of_its_class_in_front_of_a_grey_one():
    data = Glyphs(frames=4)
    x, y = data.batch("train", 0, 6, seed=2)
    assert x.shape == (6, 1, 4, 32, 32)
    u = torch.rand(6, 16, generator=torch.Generator().manual_seed(glyphs.seed_of("glyphs", "train", 2, 0)))
    (front, first), (behind, other) = data._path("train", u[:, :8]), data._path("train", u[:, 8:])
    assert torch.equal(y, first) and not torch.equal(first, other)
    shown = (x[:, 0] + 1) / 2
    assert (shown >= front - 1e-6).all() and shown[front > 0.99].min() > 0.99
    grey = (front == 0) & (behind > 0.99)
    assert grey.any() and torch.allclose(shown[grey], torch.tensor(glyphs.GREY), atol=0.006)


def test_glyphs_of_a_clip_move_on_a_straight_line():
    front, _ = Glyphs(frames=3)._path("train", torch.rand(5, 8, generator=torch.Generator().manual_seed(3)))
    for clip in front:
        first, middle, last = (torch.tensor(centre(frame)) for frame in clip)
        assert torch.allclose(middle, (first + last) / 2, atol=0.06)
