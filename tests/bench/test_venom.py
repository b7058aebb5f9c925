"""The recorded benchmark can be read and shown anywhere; on a GPU a small run measures and checks itself."""

import pytest
import torch

from replicate.bench import venom as venom_bench
from replicate.study import records


@pytest.fixture(scope="module")
def recorded():
    return records.RecordStore().all(venom_bench.KIND)[0][0]


def test_record_says_where_it_comes_from(recorded):
    assert "H200" in recorded.device
    assert recorded.config == venom_bench.config()
    assert recorded.commit and recorded.date and recorded.versions["triton"]


def test_recorded_speeds_and_memory(recorded):
    """The numbers we stand by: products, FFN and memory at 4 of 16, 32, 64."""
    for shape, share in zip(recorded.results["shapes"], (1, 0.8), strict=True):
        x, peak = venom_bench.speedups(shape), shape["peak_bytes"]
        for k, products, ffn in (("4", 3.3, 3.0), ("2", 6.0, 5.0), ("1", 10.0, 8.0)):
            assert x.loc[k, "products"] >= share * products and x.loc[k, "ffn"] >= share * ffn
            assert peak[k] < peak["dense"] and x.loc[k, "ffn"] > x.loc[f"grouped {k}", "ffn"]


def test_every_result_was_checked_first(recorded):
    for shape in recorded.results["shapes"]:
        for errors in shape["errors"].values():
            assert set(errors) == {"y3", "dx", "dW1", "dW2", "router"}
            assert max(errors.values()) < 0.02


def test_the_table_has_ratios_and_times(recorded):
    text = venom_bench.table(recorded)
    assert "d_model 4096, d_ff 16384: times as fast as dense" in text and "sum of k parts" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_measuring_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="nothing to measure"):
        venom_bench.run(venom_bench.config())


@pytest.mark.gpu
def test_a_small_run():
    c = venom_bench.config(tokens=2048, shapes=[(256, 2048)], top_ks=(2,), repeats=2)
    record = venom_bench.run(c)
    assert "d_model 256, d_ff 2048" in venom_bench.table(record)
