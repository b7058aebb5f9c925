"""The recorded benchmark can be read and shown anywhere; on a GPU a small run measures and checks itself."""

import pytest
import torch

from replicate import records
from replicate.kernels import venom_bench


@pytest.fixture(scope="module")
def recorded():
    return records.RecordStore().all(venom_bench.KIND)[0][0]


def test_record_says_where_it_comes_from(recorded):
    assert "H200" in recorded.device
    assert recorded.config == venom_bench.config()
    assert recorded.commit and recorded.date and recorded.versions["triton"]


def test_recorded_speeds_and_memory(recorded):
    """The numbers we stand by: products, FFN and memory at 4 of 16, 32, 64."""
    rows = {(r["d_model"], r["format"]): r for r in venom_bench.rows(recorded)}
    for form, products, ffn in (("4 of 16", 3.3, 3.0), ("4 of 32", 6.0, 5.0), ("4 of 64", 10.0, 8.0)):
        large, small = rows[4096, form], rows[2048, form]
        assert large["products"] >= products
        assert large["ffn"] >= ffn
        assert small["products"] >= 0.8 * products
        assert small["ffn"] >= 0.8 * ffn
        for row in (large, small):
            assert row["peak_gib"] < row["dense_gib"]
            assert row["ffn"] > row["grouped_ffn"]


def test_every_result_was_checked_first(recorded):
    for shape in recorded.results["shapes"]:
        for errors in shape["errors"].values():
            assert set(errors) == {"y3", "dx", "dW1", "dW2", "router"}
            assert max(errors.values()) < 0.02


def test_show_prints_the_recorded_table(capsys):
    assert venom_bench.main(["--show"]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA H200" in out
    assert "4 of 64: products" in out


def test_nothing_recorded_is_said(tmp_path, capsys):
    assert venom_bench.main(["--show", "--out", str(tmp_path)]) == 0
    if not list((records.paths.runs_dir() / "records").glob(f"{venom_bench.KIND}/*")):
        assert "nothing recorded" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_measuring_without_a_gpu_is_refused():
    with pytest.raises(RuntimeError, match="no GPU here"):
        venom_bench.run(venom_bench.config())


@pytest.mark.gpu
def test_a_small_run(tmp_path):
    c = venom_bench.config(tokens=2048, shapes=[(256, 2048)], top_ks=(2,), repeats=2)
    record = venom_bench.run(c)
    assert "D 256 F 2048 4 of 32" in venom_bench.table(record)
