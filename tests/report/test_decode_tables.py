"""Tables of decoding come from its records."""

import pytest

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
    assert fast["limit"] == "4.00x" and fast["weights used"] == "25%", "4 of 16 clusters, of both weights"
    assert first.loc["by activations, 4 of 16", "limit"] == "1.60x", "all of W1 and a quarter of W2"
    assert len(frame) == len(record.config["arms"]) * len(record.config["batches"])


def test_more_texts_use_more_of_the_weights():
    for model in decode_tables.MODELS:
        used = decode_tables.table(model).groupby("texts at a time")["weights used"].min()
        shares = [int(share.removesuffix("%")) for share in used]
        assert shares == sorted(shares) and shares[0] == 25 and shares[-1] == 100


def test_numbers_of_the_readme():
    values = decode_tables.values()
    (row,) = decode_tables.table("7B").query("`texts at a time` == 1").iloc[[0]].to_dict("records")
    shown = float(values["decode 7B venom16 1"].removesuffix(" times"))
    assert shown == pytest.approx(float(row["FFN"].removesuffix("x")), abs=0.06)
    assert values["used 7B venom16 1"] == row["weights used"]
