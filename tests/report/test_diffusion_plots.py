"""Tables and pictures of diffusion runs, from records made here."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from replicate import figures
from replicate.diffusion.glyphs import Glyphs
from replicate.diffusion.score import pack
from replicate.diffusion.train import ARMS, CHOSEN_TOGETHER, config_of
from replicate.report import diffusion_plots, diffusion_values
from replicate.study.records import RecordStore, make_record

OFFSET = {arm: 0.01 * i for i, arm in enumerate(ARMS)}  # of the loss over dense, by arm


def record(kind, arm, seed, profile="gpu"):
    frames = 1 if kind == "image" else 8
    shown = Glyphs(frames).batch("poses", seed, 8)[0]
    loss = 0.2 + OFFSET[arm] + 0.001 * seed
    valid = {"loss": loss, "by_time": [loss] * 8}
    results = {
        "arm": arm,
        "parameters": 21_894_944,
        "valid": {"poses": valid, "fonts": valid | {"loss": loss + 0.1}},
        "zero_loss": 1.9,
        "score": {"accuracy": 0.9, "frechet": 2.0 + seed},
        "real": {"accuracy": {"poses": 0.99, "fonts": 0.9}, "frechet": 1.0 + seed / 6},
        "samples": {"classes": list("01234567"), **pack(shown)},
    }
    return make_record("diffusion", config_of(kind, profile, arm, seed), results, device="cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion")
    store = RecordStore(folder / "cached", folder / "recorded")
    for arm in ARMS:
        for seed in (1, 2) if arm != "gelu" else (1,):
            store.put(record("image", arm, seed), recorded=True)
    for arm in ("dense", "venom16"):
        store.put(record("video", arm, 1), recorded=True)
    store.put(record("image", "dense", 3, "smoke"), recorded=True)
    return store


def test_runs_of_other_settings_and_of_this_computer_alone_are_left_out(tmp_path):
    store = RecordStore(tmp_path / "cached", tmp_path / "recorded")
    shipped = record("video", "dense", 1)
    store.put(shipped, recorded=True)
    store.put(replace(shipped, results={**shipped.results, "zero_loss": 9.0}))
    store.put(record("video", "act24", 1))
    other = config_of("video", "gpu", "dense", 2, **{"model.qk_norm": False})
    store.put(make_record("diffusion", other, shipped.results, device="cpu"), recorded=True)
    (found,) = diffusion_plots.runs("video", store).values()
    assert list(found) == [1] and found[1].results["zero_loss"] == 1.9
    (found,) = diffusion_plots.runs("video", store, **{"model.qk_norm": False}).values()
    assert list(found) == [2]


def test_training_is_drawn_at_the_middle_of_each_stretch():
    figures.theme()
    made = {name: record("video", "dense", seed) for seed, name in enumerate(("one", "two", "three"))}
    for i, run in enumerate(made.values()):
        run.results["losses"] = [2.0, 1.0, 0.5, 0.25 + i]
    lines = diffusion_plots.training(made).axes[0].lines
    assert [line.get_label() for line in lines] == ["one", "two", "three"]
    assert len({line.get_linestyle() for line in lines}) == 3
    quarter = made["one"].config["steps"] / 4
    for i, line in enumerate(lines):
        assert line.get_ydata().tolist() == [2.0, 1.0, 0.5, 0.25 + i]
        assert line.get_xdata().tolist() == [quarter * part for part in (0.5, 1.5, 2.5, 3.5)]


def test_runs_are_found_by_kind_scale_arm_and_seed(store):
    image, video = (diffusion_plots.runs(kind, store) for kind in ("image", "video"))
    assert list(image) == list(ARMS) and list(video) == ["dense", "venom16"]
    assert list(image["dense"]) == [1, 2] and list(image["gelu"]) == [1]
    assert list(diffusion_plots.runs("image", store, "smoke")["dense"]) == [3]
    assert set(diffusion_plots.LABELS) == set(ARMS)


def test_losses_are_compared_over_shared_seeds(store):
    table = diffusion_plots.losses(diffusion_plots.runs("image", store))
    for arm, offset in OFFSET.items():
        gap = table["poses over dense"][arm]
        assert gap.mean == pytest.approx(offset) and gap.n == (1 if arm == "gelu" else 2)
    assert table["poses"]["dense"] == pytest.approx(0.2015) and table["fonts"]["dense"] == pytest.approx(
        0.3015
    )
    assert table["frechet"]["act24"] == pytest.approx(3.5)
    with pytest.raises(ValueError, match="record arm 'dense'"):
        diffusion_plots.losses({"act24": {}})


def test_gaps_show_every_seed_and_which_choices_a_text_forbids(store):
    figures.theme()
    by_arm = diffusion_plots.runs("image", store)
    fig = diffusion_plots.gaps(by_arm, diffusion_values.above)
    arms = list(ARMS)[1:]
    for ax in fig.axes:
        dots = [line for line in ax.lines if line.get_marker() == "o"]
        assert [len(line.get_xdata()) for line in dots] == [1 if arm == "gelu" else 2 for arm in arms]
        assert [line.get_xdata()[0] for line in dots] == pytest.approx([OFFSET[arm] for arm in arms])
        found = diffusion_values.above(by_arm, "poses" if ax is fig.axes[0] else "fonts")
        lines = [bar.get_segments()[0] for bar in ax.collections]
        ends = [tuple(line[:, 0]) for line in lines if np.ptp(line[:, 1]) == 0]
        assert ends == [pytest.approx((found[arm].low, found[arm].high)) for arm in arms if arm != "gelu"]
        hollow = [arm for arm, line in zip(arms, dots) if line.get_markerfacecolor() == "none"]
        assert hollow == list(CHOSEN_TOGETHER)
    assert [text.get_text() for text in fig.axes[0].get_yticklabels()] == [
        diffusion_plots.LABELS[arm] for arm in arms
    ]


def test_the_loss_over_time_is_minus_dense(store):
    figures.theme()
    by_arm = diffusion_plots.runs("image", store)
    ax = diffusion_plots.by_time(by_arm, bands=("act24", "gelu")).axes[0]
    (band,) = ax.collections  # GELU has one seed
    row = diffusion_plots.apart(by_arm).loc["act24"]
    ends = {float(y) for _, y in band.get_paths()[0].vertices}
    assert ends == {end for gap in row for end in (gap.low, gap.high)}
    lines = ax.lines
    for line, arm in zip(lines, ("gelu", "act24")):
        assert line.get_label() == diffusion_plots.LABELS[arm]
        assert line.get_ydata() == pytest.approx([OFFSET[arm]] * 8), "against dense runs of the same seeds"


def test_samples_stand_beside_samples(store):
    for kind in ("image", "video"):
        by_arm = diffusion_plots.runs(kind, store)
        records = [by_arm[arm][1] for arm in ("dense", "venom16")]
        fig = diffusion_plots.samples(records, columns=5)
        shown = [np.asarray(ax.images[0].get_array()) for ax in fig.axes]
        assert [picture.shape for picture in shown] == [(32, 5 * 32)] * 2
        pictures = (Glyphs(1 if kind == "image" else 8).batch("poses", 1, 8)[0] + 1) / 2
        second = pictures[1, 0] if kind == "image" else pictures[1, 0, 4]
        assert np.abs(shown[0][:, 32:64] - second.numpy()).max() < 0.04
        assert [ax.get_ylabel() for ax in fig.axes] == ["dense, squared ReLU", "Venom by the router"]


def test_clips_move(store):
    records = [by_seed[1] for by_seed in diffusion_plots.runs("video", store).values()]
    gif = diffusion_plots.moving(records, columns=3)
    film = Image.open(io.BytesIO(gif))
    frames = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(film)]
    names = 2 * diffusion_plots.NAMES
    assert gif.startswith(b"GIF8") and len(frames) == 8 and frames[0].shape == (128, names + 192)
    assert all((part[:, :names] < 128).any() for part in np.split(frames[0], 2)), "each row has its name"
    frames = [frame[:, names:] for frame in frames]
    clip = (Glyphs(8).batch("poses", 1, 8)[0][0, 0] + 1) / 2
    for i in (0, 7):
        small = torch.nn.functional.avg_pool2d(torch.tensor(frames[i][None] / 255.0), 2)[0, :32, :32]
        assert (small - clip[i]).abs().mean() < 0.03
    assert np.abs(frames[0].astype(int) - frames[7]).max() > 100
    with pytest.raises(ValueError, match="take records of kind 'video'"):
        diffusion_plots.moving([diffusion_plots.runs("image", store)["dense"][1]])


def test_a_film_is_a_gif_told_in_words(store):
    records = [by_seed[1] for by_seed in diffusion_plots.runs("video", store).values()]
    page = diffusion_plots.film(records, 'a "B" turns', columns=3).data
    assert 'alt="a &quot;B&quot; turns"' in page
    data = re.search(r"data:image/gif;base64,([^\"]+)", page)[1]
    assert base64.b64decode(data) == diffusion_plots.moving(records, columns=3)


def test_the_path_goes_from_a_picture_to_noise():
    x0, noise = torch.zeros(1, 16, 16), torch.ones(1, 16, 16)
    axes = diffusion_plots.path(x0, noise, 4, (0, 0.25, 1)).axes
    shown = [float(np.asarray(ax.images[0].get_array()).mean()) for ax in axes]
    assert shown == [0, 0, 0.25, 1]
    edges = [line.get_xdata()[0] for line in axes[0].lines if len(set(line.get_xdata())) == 1]
    assert edges == [3.5, 7.5, 11.5] and not axes[1].lines
