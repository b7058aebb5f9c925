"""The benchmark of several GPUs, rehearsed by two processes on a CPU."""

import pytest
import torch

from replicate.bench import command, scale
from replicate.settings.text import from_dict
from replicate.study import records

TINY = {"device": "cpu", "dtype": "float32", "compile": False, "model.vocab_size": 64, "model.d_model": 32,
        "model.n_head": 2, "model.seq_len": 16, "model.d_ff": 128, "batch_size": 2}  # fmt: skip


def config(**changes):
    asked = {"preset": "smoke", "layers": [1], "processes": 2, "repeats": 3, "changes": TINY}
    return scale.config(**(asked | changes))


def made_up(speeds):
    """A record of {(processes, engine, sparsity): tokens/s}."""
    cases = [
        {
            "processes": n,
            "engine": engine,
            "sparsity": name,
            "ms": 1.0,
            "tokens_per_s": speed,
            "peak_bytes": 0,
        }
        for (n, engine, name), speed in speeds.items()
    ]
    return records.make_record(scale.KIND, config(processes=4), {"cases": cases})


def test_rows_compare_with_one_process_and_with_the_dense_case():
    record = made_up({
        (1, "", "dense"): 100.0, (1, "", "recipe"): 150.0,
        (4, "ddp", "dense"): 300.0, (4, "ddp", "recipe"): 360.0,
    })  # fmt: skip
    found = {(row["engine"], row["formats"]): row for row in scale.rows(record)}
    assert found["one process", "recipe"]["x dense"] == 1.5
    sparse = found["ddp", "recipe"]
    assert (sparse["x one process"], sparse["of linear"], sparse["x dense"]) == pytest.approx((2.4, 0.6, 1.2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1, 2]}, r"layers \[1, 2\]: scale measures one depth"),
        ({"sparsity": ["none"]}, "unknown sparsity preset 'none'"),
        *(
            ({"changes": TINY | {name: value}}, f"{name} cannot be changed here; {way}")
            for name, value, way in (
                ("grad_accum", 2, "use --micro"),
                ("model.n_layer", 2, "use --layers"),
                ("lr", 1e-3, "it is"),
                ("lr_warmup", 5, "it is 0"),
                ("model.sparsity.top_k", 2, "use --sparsity"),
                ("parallel", "fsdp", "both ways"),
            )
        ),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_one_process_is_no_scaling():
    with pytest.raises(ValueError, match="processes is 1; scaling needs 2 or more"):
        scale.run(config(processes=1), "cpu")


def test_the_options_are_those_of_the_command():
    options = {"preset": ["smoke"], "layers": [2], "processes": 3, "micro": 2, "changes": ["batch_size=6"]}
    (found,), how = command._configs("scale", scale, options)
    train = from_dict(found["train"])
    assert (found["processes"], train.batch_size, train.grad_accum, train.model.n_layer) == (3, 6, 2, 2)
    assert not how and found["sparsity"] == ["dense", "recipe"]


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)
def test_one_call_measures_one_process_and_two():
    c = config()
    record = scale.run(c, "cpu")
    cases = record.results["cases"]
    assert [(case["processes"], case["engine"], case["sparsity"]) for case in cases] == [
        (1, "", "dense"), (1, "", "recipe"), (2, "ddp", "dense"), (2, "ddp", "recipe"),
        (2, "fsdp", "dense"), (2, "fsdp", "recipe"),
    ]  # fmt: skip
    for case in cases:
        tokens = 2 * 16 * case["processes"]
        assert case["ms_p10"] <= case["ms"] <= case["ms_p90"]
        assert case["tokens_per_s"] == pytest.approx(1e3 * tokens / case["ms"])
    assert record.config == c and "fsdp" in scale.table(record)


def test_what_fails_in_a_process_is_told():
    c = config()
    c["sparsity"] = ["no such"]
    with pytest.raises(RuntimeError, match=r"(?s)1 processes failed.*unknown sparsity preset 'no such'"):
        scale.run(c, "cpu")
