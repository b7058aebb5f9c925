"""The pictures of notebook 13: what is drawn is what was recorded, or follows from the formula."""

import re

import numpy as np
import pytest

from replicate.bench import generate
from replicate.report import decode_plots, decode_tables, decoding
from replicate.report.kernel_plots import PEAK_DENSE


def lines(ax):
    return {line.get_label(): line.get_xydata() for line in ax.get_lines()}


@pytest.mark.parametrize("model", ["7B", "1B"])
def test_dense_times_are_those_of_the_fastest_peer_by_tokens(model):
    times, ffn = decode_plots.dense_times(model), decode_tables.recorded(model).results["ffn"]
    assert list(times) == [1, 8, 64, 2048, 8 * 2048, 64 * 2048]
    peers = {name: ms["ms"] for name, ms in ffn["8"]["prefill"].items() if name.startswith("dense")}
    assert times[8 * 2048] == pytest.approx(1e3 * min(peers.values()))


def test_the_least_time_is_flat_until_the_limits_meet():
    drawn, record = lines(decode_plots.least_times().axes[0]), decode_tables.recorded("7B")
    x, y = drawn["7B: least time"].T
    ridge = 1e12 * PEAK_DENSE / record.results["bandwidth"]
    bytes_us = 1e6 * 4 * 4096 * 16384 / record.results["bandwidth"]
    assert y[x < ridge] == pytest.approx(bytes_us) and (np.diff(y[x > ridge]) > 0).all()
    assert y[-1] == pytest.approx(4 * 2**17 * 4096 * 16384 / 989e6)
    assert dict(drawn["7B: measured"]) == pytest.approx(decode_plots.dense_times("7B"))
    assert (drawn["7B: measured"][:, 1] > np.interp(drawn["7B: measured"][:, 0], x, y)).all()


@pytest.mark.parametrize(("texts", "clusters", "k"), [(1, 16, 4), (8, 16, 4), (3, 32, 32)])
def test_each_text_has_k_clusters_and_read_is_their_union(texts, clusters, k):
    each, together = decode_plots.touched(texts, clusters, k).axes
    grids = [ax.collections[0].get_array().reshape(-1, clusters) for ax in (each, together)]
    assert (grids[0].sum(1) == k).all() and len(grids[0]) == texts
    assert (grids[1][0] == grids[0].any(0)).all()
    own, read, expected = map(int, re.findall(r"(\d+)%", each.get_title()))
    assert own == round(100 * k / clusters) and read == pytest.approx(100 * grids[1].mean(), abs=0.51)
    assert expected == pytest.approx(100 * decoding.share_touched(k, clusters, texts), abs=0.51)


def test_too_few_clusters_are_told_by_the_slider(capsys):
    decode_plots.try_touched(2, 4, 5)
    assert capsys.readouterr().out == "k is 5; choose 1 to the number of clusters, 4\n"


def test_batches_draws_formula_and_record():
    share, gain = map(lines, decode_plots.batches().axes)
    x, y = share["$1 - (1 - k/C)^B$"].T
    assert y == pytest.approx(100 * (1 - 0.75**x))
    assert gain["what the bytes allow"][:, 1] == pytest.approx(100 / y)
    for model in decode_tables.MODELS:
        at = decode_tables.numbers(model).xs("venom16", level="arm")
        assert dict(share[f"{model}, recorded"]) == pytest.approx((100 * at["used"]).to_dict())
        assert dict(gain[f"{model}, recorded"]) == pytest.approx(at["x"].to_dict())


def test_gains_draws_every_measured_speed_and_the_aims():
    axes = decode_plots.gains().axes
    assert len(axes) == 6
    for ax, (model, batch) in zip(axes, [(m, b) for m in ("7B", "1B") for b in (1, 8, 64)], strict=True):
        assert ax.get_title().startswith(f"{model}, {batch} text")
        at = decode_tables.numbers(model).loc[batch]
        drawn = {bars.get_label(): list(bars.datavalues) for bars in ax.containers}
        assert drawn["figure 4d, 4 of 16"] == pytest.approx(
            list(at.loc["venom16", list(decode_plots.MEASURED)])
        )
        assert drawn["algorithms 1, 2, 4 of 16"][0] == pytest.approx(at.loc["recipe, same", "x"])
        aims = [line.get_segments()[0][0][1] for line in ax.collections]
        assert aims == ([aim for _, _, aim in generate.AIMS] if batch == 1 else [])
