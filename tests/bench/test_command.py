"""The benchmark command: what it measures and stores on a GPU, and shows elsewhere."""

import pytest
import torch

from replicate.bench import command
from replicate.ffn import SparseFFN
from replicate.kernels.layer import why_not
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.study import records
from replicate.system import paths

RECORDED = {name for name, b in command.BENCHMARKS.items() if (paths.RECORDED / b.KIND).exists()} - {"train"}
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def made_up(c):
    return records.make_record("bench-made-up", c, {})


@on_cpu
@pytest.mark.parametrize("what", sorted(RECORDED))
def test_without_a_gpu_what_is_recorded_is_shown(tmp_path, monkeypatch, capsys, what):
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))
    assert command.main([what, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no GPU here and nothing recorded\n"
    assert command.main([what]) == 0
    out = capsys.readouterr().out
    kind = command.BENCHMARKS[what].KIND
    assert out.startswith(f"no GPU here: showing {len(list((paths.RECORDED / kind).iterdir()))} recorded\n")
    assert "NVIDIA H" in out and "commit" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ffn", "--shapes", "64,64,256", "--sparsity", "recipe"], [{"shapes": [[64, 64, 256]]}]),
        (["kernels", "--repeats", "3"], [{"repeats": 3}]),
        (
            ["step", "--no-whole", "--attention", "flash"],
            [{"preset": name} for name in ("llama1b", "llama7b")],
        ),
        (["venom"], [{"clusters": 16}]),
        (
            [
                "generate",
                "--preset",
                "llama7b",
                "--batches",
                "8",
                "1",
                "--arms",
                "venom16",
                "--layers",
                "1",
                "2",
            ],
            [{"batches": [1, 8], "arms": ["venom16"], "layers": [1, 2]}],
        ),
    ],
)
def test_with_a_gpu_every_record_is_kept(tmp_path, monkeypatch, capsys, words, expected):
    module, seen = command.BENCHMARKS[words[0]], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(records.provenance, "device_name", lambda kind="auto": "made up")
    monkeypatch.setattr(module, "run", lambda c: seen.append(c) or made_up(c))
    monkeypatch.setattr(module, "table", lambda record: "the table")
    assert command.main([*words, "--out", str(tmp_path)]) == 0
    assert [{name: c[name] for name in own} for c, own in zip(seen, expected, strict=True)] == expected
    kept = [str(path) for path in (tmp_path / "bench-made-up").iterdir()]
    out = capsys.readouterr().out
    assert len(kept) == len(expected) and all(path in out for path in kept) and "the table" in out


def test_the_loop_is_measured_anywhere_and_the_workers_are_handed_on(tmp_path, monkeypatch, capsys):
    words = ["train", "--repeats", "2", "--turn", "3", "--preset", "smoke", "--set", "batch_size=2", "lr=0.1"]
    seen = []
    monkeypatch.setattr(command.loop, "run", lambda c: seen.append(c) or made_up(c))
    monkeypatch.setattr(command.loop, "table", lambda record: "the table")
    assert command.main([*words, "--out", str(tmp_path)]) == 0
    assert (seen[0]["repeats"], seen[0]["turn"], seen[0]["train"]["batch_size"]) == (2, 3, 2)
    assert (tmp_path / "bench-made-up").exists() and "the table" in capsys.readouterr().out
    assert command._configs("backends", command.backends, {"workers": 2})[1] == {"workers": 2}


def test_shapes_of_video_models_have_a_name_and_fit_every_preset():
    """d_model and d_ff in multiples that compression and the clusters of each preset take."""
    (config,), _ = command._configs("ffn", command.ffn, {"shapes": ["video", "64,64,256"]})
    assert config["shapes"] == [*map(list, command.ffn.VIDEO), [64, 64, 256]]
    for name in command.ffn.SPARSITIES:
        for tokens, d_model, d_ff in command.ffn.VIDEO:
            with torch.device("meta"):
                layer = SparseFFN(d_model, d_ff, SPARSITY_PRESETS[name])
                x = torch.empty(tokens, d_model, dtype=torch.bfloat16)
            assert why_not(layer, x) == "", name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--repeats", "0"], "--repeats is 0; choose 1 or more"),
        (["ffn", "--shapes", "64x64"], "shape '64x64' is not tokens,d_model,d_ff"),
        (["ffn", "--shapes", "8,64,0"], "shape '8,64,0' is not tokens,d_model,d_ff"),
        (["kernels", "--shapes", "64,64,65"], "in multiples of 64"),
        (["venom", "--shapes", "64,64,256"], "bench venom has no --shapes"),
        (["kernels", "--no-whole", "--set", "lr=1"], "bench kernels has no --no-whole, --set"),
        (["ffn", "--tune"], "--tune is for"),
        (["step", "--layers", "2", "4"], "give 22, the model's"),
    ],
)
def test_bad_input_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        command.main(words)
