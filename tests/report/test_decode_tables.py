"""Tables of decoding come from its records."""

import pytest

from replicate.paper.table import ClaimBroken
from replicate.report import decode_tables


@pytest.mark.parametrize("model", ["7B", "1B"])
def test_a_row_is_dense_time_over_own(model):
    frame, record = decode_tables.table(model), decode_tables.recorded(model)
    times = record.results["ffn"]["1"]["decode"]
    peers = [ms["ms"] for arm, ms in times.items() if arm not in record.config["arms"]]
    first = frame[frame["texts at a time"] == 1].set_index("times as fast as dense")
    fast = first.loc["figure 4d, 4 of 16"]
    assert float(fast["FFN"].removesuffix("x")) == pytest.approx(
        min(peers) / times["venom16"]["ms"], abs=0.006
    )
    assert fast["limit"] == "4.00x" and fast["clusters used"] == "25%", "4 of 16 clusters, of both weights"
    assert first.loc["by activations, 4 of 16", "limit"] == "1.60x", "all of W1 and a quarter of W2"
    assert len(frame) == len(record.config["arms"]) * len(record.config["batches"])


def test_more_texts_use_more_of_the_weights():
    for model in decode_tables.MODELS:
        used = decode_tables.table(model).groupby("texts at a time")["clusters used"].min()
        shares = [int(share.removesuffix("%")) for share in used]
        assert shares == sorted(shares) and shares[0] == 25 and shares[-1] == 100


def test_numbers_of_the_readme():
    values = decode_tables.values()
    (row,) = decode_tables.table("7B").query("`texts at a time` == 1").iloc[[0]].to_dict("records")
    shown = float(values["decode 7B venom16 1"].removesuffix(" times"))
    assert shown == pytest.approx(float(row["FFN"].removesuffix("x")), abs=0.06)
    assert values["used 7B venom16 1"] == row["clusters used"]


def test_memory_is_the_line_through_two_depths_and_the_caches():
    frame = decode_tables.memory()
    models = decode_tables.recorded("7B").results["models"]
    one, three = (models[depth]["8"]["venom16"]["step_peak_bytes"] for depth in "13")
    row = frame.query("model == '7B'").set_index("GiB")
    found = row.loc["figure 4d, 4 of 16", "peak, 8 texts"]
    assert found == pytest.approx((one + 31 * (three - one) / 2) / 2**30)
    cache = row.loc["KV cache alone"]
    assert cache["peak, 64 texts"] == 64 * cache["peak, 1 text"] == 64 * 2 * 32 * 4096 * 2048 * 2 / 2**30
    assert (row["peak, 64 texts"].iloc[:-1] > cache["peak, 64 texts"]).all()


def test_numbers_of_chapter_13():
    values = decode_tables.chapter_values()
    ffn = decode_tables.recorded("7B").results["ffn"]["1"]["decode"]
    packed = ffn["recipe, same"]["ms"] / ffn["venom16"]["ms"]
    assert float(values["2:4 over whole 7B"]) == pytest.approx(packed, abs=0.0051)
    steps = [
        models[0] + 31 / 2 * (models[1] - models[0])
        for models in (
            [decode_tables.recorded("7B").results["models"][depth]["1"][arm]["step"]["ms"] for depth in "13"]
            for arm in ("dense", "dense, again")
        )
    ]
    fastest = min(ms["ms"] for arm, ms in ffn.items() if arm.startswith("dense"))
    part = 32 * fastest / (sum(steps) / 2)
    assert values["FFN time 7B"] == f"{100 * part:.0f} %"
    left = 1 - part + part * ffn["venom16"]["ms"] / fastest
    assert values["Amdahl 7B"] == f"{1 / left:.2f}"
    assert values["expected touched"] == f"{100 * (1 - 0.75**8):.0f} %"
    assert values["touched 7B venom16 8"] == "91 %" and values["KV text 7B"] == "1.00 GiB"
    weights = 32 * 4096 * (2 * 16384 + 4 * 4096) + 128256 * 4096
    assert values["FFN share 7B"] == f"{100 * 32 * 2 * 4096 * 16384 / weights:.0f} %"


def test_the_check_tells_missed_aims_and_raises_for_what_we_stand_by():
    rows = {row.claim.statement: row for row in decode_tables.checks(True, 0.25)}
    assert len(rows) == 12
    for model in decode_tables.MODELS:
        aim = rows[f"Aim: FFN of one token, {model}"]
        x = float(decode_tables.chapter_values()[f"times {model} venom16 1"])
        assert aim.claim.paper == 3 and aim.ours == pytest.approx(x, abs=0.006)
        assert (aim.verdict.text == "holds") == (x >= 3)
        packed = rows[f"2:4 weights make the FFN of one token faster than whole ones, {model}"]
        ratio = float(decode_tables.chapter_values()[f"2:4 over whole {model}"])
        assert packed.claim.paper == 1.05 and packed.ours == pytest.approx(1 / ratio, abs=0.01)
        assert (packed.verdict.text == "holds") == (packed.ours >= 1.05)
    for wrong in ((False, 0.25), (True, 0.26)):
        with pytest.raises(ClaimBroken, match="chapter 13"):
            decode_tables.checks(*wrong)


@pytest.mark.parametrize(
    ("arm", "column", "value", "said"),
    [
        ("venom16", "used", 0.5, "share of clusters touched"),
        ("venom16", "x", 1.2, "gain of the FFN is gone"),
    ],
)
def test_another_record_would_break_the_check(monkeypatch, arm, column, value, said):
    frames = {model: decode_tables.numbers(model).copy() for model in decode_tables.MODELS}
    for batch in (1, 8):
        frames["1B"].loc[(batch, arm), column] = value
    monkeypatch.setattr(decode_tables, "numbers", frames.get)
    with pytest.raises(ClaimBroken, match=said):
        decode_tables.checks(True, 0.25)
