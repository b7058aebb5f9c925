"""Width instead of time: FLOPs by hand, and a picture of whatever is recorded."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest

from replicate import study
from replicate.report import study_plots, study_tables, width
from replicate.settings.text import from_dict, to_dict, with_changes
from replicate.training import flops

WIDE = {"model.d_ff": 6144, "model.sparsity.n_clusters": 64, "model.sparsity.top_k": 16}
WIDE["model.sparsity.inner"] = False
BY_ACTIVATIONS = {"model.sparsity.routing": "activation"}


def runs(**wider):
    """The recorded runs, and copies of the router's with other formats: name -> (changes, loss lower by)."""
    frame = study_tables.runs("gpu")
    made = []
    for name, (base, changes, by) in wider.items():
        for _, row in frame[frame["arm"] == base].iterrows():
            config = with_changes(from_dict(row["record"].config), changes)
            record = replace(row["record"], config=to_dict(config))
            lower = {"valid_loss": row["valid_loss"] - by}
            made.append(row.to_dict() | {"arm": name, "record": record} | lower)
    known = frame[~frame["arm"].str.contains("wide|experts")]
    return pd.concat([known, pd.DataFrame(made)], ignore_index=True)


def test_flops_count_the_share_of_clusters():
    dense, router = (study.arms("gpu", [name])[0] for name in ("dense", "venom16"))
    parts = flops.flops_per_token(dense.model)
    rest = sum(parts.values()) - parts["ffn"]
    assert width.step_flops(dense.model) == sum(parts.values())
    assert width.step_flops(router.model) == pytest.approx(rest + parts["ffn"] / 4)
    looking = with_changes(router, BY_ACTIVATIONS)  # product 1 in full
    assert width.step_flops(looking.model) == pytest.approx(rest + parts["ffn"] * (1 + 5 / 4) / 6)
    weights = study.arms("gpu", ["w1+w2"])[0]  # two of six products in 2:4
    assert width.step_flops(weights.model) == pytest.approx(rest + parts["ffn"] * (4 + 2 / 2) / 6)


def test_a_wider_layer_with_its_share_has_the_dense_flops_after_the_warm_up():
    dense, router = (study.arms("gpu", [name])[0] for name in ("dense", "venom16"))
    wide = with_changes(router, WIDE)
    assert width.step_flops(wide.model) == pytest.approx(width.step_flops(dense.model))
    ffn = flops.flops_per_token(dense.model)["ffn"]
    more = width.run_flops(wide) - width.run_flops(dense)
    assert more == pytest.approx(wide.dense_warmup * 3 * ffn), "the warm-up is dense at the full width"


def test_what_is_recorded_is_shown_and_the_rest_left_out():
    narrow = width.trade(runs())
    assert set(narrow["arm"]) <= set(width.BESIDE) and (narrow["d_ff"] == 1).all()
    assert width.sentence(narrow, {}) == "No wider sparse layer is recorded yet."
    assert width.peer(narrow, runs(), {}) == "No wider mixture of experts is recorded yet."
    wider = {"wide x4, 16 of 64": ("venom16", WIDE, 0.1)}
    wider["wide x4, 16 of 64 by activations"] = ("venom16", WIDE | BY_ACTIVATIONS, 0.12)
    wider["dense, wide x4"] = ("dense", {"model.d_ff": 6144}, 0.07)
    every = runs(**wider)
    found = width.trade(every).set_index("arm")
    assert len(found) == len(narrow) + 3 and found["FLOPs"].is_monotonic_increasing
    row = found.loc["wide x4, 16 of 64"]
    assert (row["label"], row["kind"], row["d_ff"], row["active"]) == ("x4, 16 of 64", "the router", 4, 1)
    assert row["loss"].mean == pytest.approx(found.loc["venom16", "loss"].mean - 0.1)
    assert found.loc["dense, wide x4", "label"] == "dense x4"
    said = width.sentence(width.trade(every), {"wide x4, 16 of 64": (1.2, 1.13)})
    assert "`wide x4, 16 of 64`" in said, "by activations is over 1.2 times"
    assert "takes 1.20 times as long as dense, or 1.13 times if eight" in said
    table = width.table(width.trade(every), {"venom16": (0.8, 0.76)}).set_index("arm")
    time = "time of a 1B step, 1 / 8 micro-batches"
    assert table.loc["venom16", time] == "0.80 / 0.76" and table.loc["wide x4, 16 of 64", time] == ""
    for shown in (every, runs()):
        left, right = width.draw(width.trade(shown), shown, "gpu").axes
        labels = [text.get_text() for ax in (left, right) for text in ax.texts]
        assert sorted(set(labels)) == sorted({"dense", *width.trade(shown)["label"]})


def test_the_peer_is_no_layer_of_ours():
    learned = WIDE | {"model.sparsity.routing": "learned", "dense_warmup": 0}
    every = runs(**{
        "wide x4, 16 of 64": ("venom16", WIDE, 0.1),
        "experts x4, 16 of 64": ("venom16", learned, 0.3),
        "experts x4, 64 of 64": ("venom16", learned | {"model.sparsity.top_k": 64}, 0.9),
    })  # fmt: skip
    traded = width.trade(every)
    said, found = width.peer(traded, every, {}), traded.set_index("arm")["loss"]
    assert "`wide x4, 16 of 64`" in width.sentence(traded, {})
    assert "`experts x4, 16 of 64`" in said, "64 of 64 is over 1.2 times dense's multiplications"
    assert f"{study_tables.brief(found['experts x4, 16 of 64'])} minus dense, at 1.00 times" in said
    assert re.search(r"Seed by seed that is -0\.200 ± 0\.0\d+ \(3\) minus `wide x4, 16 of 64`\.", said)


def test_one_seed_is_a_hollow_mark_without_a_bar():
    """It has no name, unless it is dense, and the line does not reach it."""
    wider = {"wide x4, 16 of 64": ("venom16", WIDE, 0.1)}
    wider |= {"dense, wide x2": ("dense", {"model.d_ff": 3072}, 0.03)}
    wider |= {"dense, wide x4": ("dense", {"model.d_ff": 6144}, 0.07)}
    every = runs(**wider)
    alone = ["wide x4, 16 of 64", "dense, wide x4"]
    every = every[~every["arm"].isin(alone) | (every["seed"] == 1)]
    found = width.trade(every)
    assert all(found.set_index("arm").loc[arm, "loss"].n == 1 for arm in alone)
    figure = width.draw(found, every, "gpu")
    left, right = figure.axes
    named = {text.get_text() for ax in (left, right) for text in ax.texts}
    assert {"dense x4", "dense x2", "dense"} <= named and "x4, 16 of 64" not in named
    hollow = [line for line in left.lines if line.get_marker() != "None" and line.get_mfc() == "white"]
    assert len(hollow) == 2 and "hollow: one seed" in figure.get_suptitle()
    assert left.lines[0].get_xdata()[-1] == pytest.approx(
        found.set_index("arm").loc["dense, wide x2", "FLOPs"]
    )
    for ax in (left, right):
        low, high = ax.get_ylim()
        assert all(low < x.mean < high for x in found["loss"]), "no point is cut off"


def test_finer_pairs_differ_in_the_clusters_alone():
    fine = {"model.sparsity.n_clusters": 128, "model.sparsity.top_k": 32}
    every = runs(**{
        "wide x4, 16 of 64": ("venom16", WIDE, 0.1),
        "wide x4, 8 of 64": ("venom16", WIDE | {"model.sparsity.top_k": 8}, 0.2),
        "wide x4, 32 of 128": ("venom16", WIDE | fine, 0.3),
        "wide x4, 16 of 64 by activations": ("venom16", WIDE | BY_ACTIVATIONS, 0.4),
        "wide x2, 16 of 64": ("venom16", WIDE | {"model.d_ff": 3072}, 0.5),
    })  # fmt: skip
    pairs = width.finer(width.trade(every), every)
    assert list(pairs) == [("wide x4, 16 of 64", "wide x4, 32 of 128")]
    (pair,) = pairs.values()
    assert pair.n == 3 and pair.mean == pytest.approx(-0.2)


def test_names_do_not_cover_each_other(ax):
    ax.set(xlim=(0, 10), ylim=(0, 10))
    study_plots.label_points(
        ax, [("first", 5, 5), ("second", 5, 5.1), ("third", 5.1, 5)], avoid=[[(0, 1), (9, 1)]]
    )
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 3 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_names_keep_off_lines(ax):
    ax.set(xlim=(0, 10), ylim=(0, 10))
    for x in (4.5, 5.5):  # left of the point and right of it
        study_plots.label_points(ax, [("a point", 5, 5)], avoid=[[(x, 0), (x, 10)], [(0, 1), (9, 1)]])
        ax.figure.canvas.draw()
        box = ax.texts[-1].get_window_extent().transformed(ax.transData.inverted())
        assert not box.x0 < x < box.x1, f"{box} is on the line at {x}"


def test_the_page_says_of_which_depths_times_are_made():
    depths = {tuple(record.config["layers"]) for record in width.timed("llama1b").values()}
    assert depths == {(3, 6, 9)}, "docs/replication.md and chapter 12: three, six and nine layers"


def test_times_come_from_the_newest_record_of_each_arm(monkeypatch):
    """Each over the dense step beside it; other cards and models do not count."""
    made = {
        "2026-02": {"wide x4, 16 of 64": 1.1},
        "2026-01": {"wide x4, 16 of 64": 1.3, "dense, wide x1.5": 1.2},
    }

    def widest_last(kind, device, preset):
        fits = (device, preset) == ("NVIDIA H200", "1b")
        return [SimpleNamespace(date=date, config={"arms": list(made[date])}) for date in made if fits]

    def rows(record):
        found = {"dense": 1.01, **made[record.date]}
        return [{"arm": arm, "x time, 1": x, "x time, 8": x / 2} for arm, x in found.items()]

    monkeypatch.setattr(width, "RecordStore", lambda: SimpleNamespace(widest_last=widest_last))
    monkeypatch.setattr(width.wide, "rows", rows)
    assert width.times("1b") == {"wide x4, 16 of 64": (1.1, 0.55), "dense, wide x1.5": (1.2, 0.6)}
    with pytest.raises(ValueError, match="no steps of wider layers of 7b are recorded"):
        width.times("7b")
