"""The benchmark of wider layers: one model an arm, micro-batches, composed depths."""

import pytest

from replicate.bench import wide
from replicate.study import records


def made_up(layers=(2, 4, 6)):
    """As a GPU would write it: a step is 10 + 3 a layer for every micro-batch, and 5 + 1 a layer once."""
    c = wide.config("llama1b", ["wide x4, 16 of 64"], layers)
    depths = {}
    for n in layers:
        arms = {wide.DENSE: 1.0, "wide x4, 16 of 64": 2.0, wide.AGAIN: 1.1}
        depths[str(n)] = {
            name: {
                "parameters": n,
                "ms": {str(m): {"ms": f * (m * (10 + 3 * n) + 5 + n)} for m in wide.MICRO},
            }
            for name, f in arms.items()
        }
    return records.make_record(wide.KIND, c, {"attention": "flash", "depths": depths})


@pytest.mark.parametrize("micro", [1, 8])
def test_a_step_is_composed_from_depths_and_micro_batches(micro):
    expected = micro * (10 + 3 * 22) + 5 + 22
    assert wide.step_ms(made_up(), wide.DENSE, micro) == pytest.approx(expected)


def test_times_are_over_the_mean_of_both_dense_runs():
    found = {row["arm"]: row for row in wide.rows(made_up())}
    assert found["wide x4, 16 of 64"]["x time, 8"] == pytest.approx(2 / 1.05)
    assert found[wide.AGAIN]["x time, 1"] == pytest.approx(1.1 / 1.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "llama1b", "arms": ["wide x3"]}, "no arm 'wide x3'"),
        ({"preset": "llama1b", "layers": [3, 6]}, "give 22, the model's, or three depths"),
        ({"preset": "llama3b"}, "unknown training preset"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        wide.config(**arguments)


def test_an_arm_has_its_own_shape():
    config = wide.of_arm("llama1b", "wide x4, 8 of 64", 3)
    assert config.model.d_ff == 4 * 8192 and config.model.sparsity.top_k == 8 and config.model.n_layer == 3


def test_it_times_whole_steps_on_this_processor():
    c = wide.config("smoke", ["wide x2, 8 of 16", "experts x4, 16 of 64"], [3], repeats=1)
    record = wide.run(c, "cpu", compile=False)
    found = record.results["depths"]["3"]
    assert found["wide x2, 8 of 16"]["parameters"] > found[wide.DENSE]["parameters"]
    assert all(arm["ms"]["4"]["ms"] > arm["ms"]["1"]["ms"] > 0 for arm in found.values())
    assert "wide x2, 8 of 16" in wide.table(record)
