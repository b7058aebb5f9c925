"""`python -m replicate diffusion`: records, what is missing, and how it ends when something is wrong."""

import pytest

from replicate import __main__ as commands
from replicate.diffusion import command
from replicate.diffusion.score import unpack
from replicate.diffusion.train import ARMS, config_of
from replicate.study.records import RecordStore

SET = ["--set", "steps=4", "batch_size=4", "lr_warmup=1", "dense_warmup=2", "eval_batches=1", "model.size=16",
       "model.d_model=16", "model.d_ff=64", "model.n_head=2"]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))
    judged = {"n": 36, "euler": 2, "steps": 2, "batch_size": 4, "width": 8}
    monkeypatch.setattr(command, "JUDGED", dict.fromkeys(command.JUDGED, judged))
    monkeypatch.setattr(command, "SHOWN", {"image": 3, "video": 2})


def run(capsys, *arguments):
    status = commands.main(["diffusion", "--device", "cpu", *arguments, *SET])
    return status, *capsys.readouterr()


def test_runs_are_trained_scored_and_kept_once(capsys, tmp_path):
    where = ["--out", str(tmp_path / "out"), "--seeds", "1", "--arms", "dense", "venom16"]
    status, out, err = run(capsys, *where)
    assert status == 0 and out.count("\n") == 4 and out.startswith("image dense        seed 1  train ")
    assert "video venom16      seed 1" in out and "the classifier knows" in err
    store = RecordStore(tmp_path / "out", tmp_path / "none recorded")
    records = [record for record, _ in store.all("diffusion")]
    assert len(records) == 4 and {r.results["arm"] for r in records} == {"dense", "venom16"}
    for record in records:
        r, frames = record.results, record.config["model"]["frames"]
        assert unpack(r["samples"]).shape == ((3, 1, 16, 16) if frames == 1 else (2, 1, 8, 16, 16))
        assert r["samples"]["classes"] == (["0", "C", "O"] if frames == 1 else ["0", "I"])
        assert 0 <= r["score"]["accuracy"] <= 1 and r["score"]["frechet"] > 0
        assert record.seed == 1 and record.device.startswith("CPU") and record.seconds > 0
        assert r["real"]["accuracy"].keys() == {"poses", "fonts"}
    assert run(capsys, *where)[1] == "", "what is stored is not trained again"
    status, out, _ = run(capsys, *where, "--status", "--seeds", "1", "2")
    assert out.splitlines()[0] == "image dense          seed 1 cached, seed 2 missing"


def test_records_kept_for_shipping_go_to_the_shipped_ones(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "RecordStore", lambda root: RecordStore(root, tmp_path / "recorded"))
    status, *_ = run(capsys, "--record", "--kind", "image", "--seeds", "1", "--arms", "act24")
    assert status == 0 and len(list((tmp_path / "recorded" / "diffusion").iterdir())) == 1


def test_a_run_that_fails_is_named_and_the_others_go_on(capsys, tmp_path, monkeypatch):
    train = command.train

    def failing(config):
        if not config.model.sparsity.any:
            raise RuntimeError("loss nan")
        return train(config)

    monkeypatch.setattr(command, "train", failing)
    status, out, err = run(
        capsys, "--out", str(tmp_path), "--kind", "image", "--seeds", "1", "--arms", "dense", "act24"
    )
    assert status == 1 and "image dense seed 1 failed: loss nan" in err and out.startswith("image act24")


def test_no_run_starts_that_does_not_fit(capsys, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 50))  # seconds: every look at the clock takes 50
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(clock))
    made = []
    monkeypatch.setattr(command, "_judge", lambda config, profile: None)
    monkeypatch.setattr(command, "run", lambda arm, config, judge: made.append(arm))
    monkeypatch.setattr(command, "line", lambda record: "")
    monkeypatch.setattr(command.RecordStore, "put", lambda store, record, recorded: None)
    runs = [(arm, config_of("image", "smoke", arm, 1)) for arm in ARMS]
    assert command.work(runs, RecordStore(tmp_path), "smoke", minutes=5) == 0
    assert made == list(ARMS)[:3], "starts at 50, 150 and 250 seconds, each takes 50; 350 is past the end"
    assert "runs do not fit into 5 minutes" in capsys.readouterr().err


def test_parts_share_the_runs_out():
    runs = list(range(10))
    parts = [command.part(runs, f"{i}/3") for i in (1, 2, 3)]
    assert parts == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    for text in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(ValueError, match="write i/n"):
            command.part(runs, text)


def test_bad_input_ends_in_one_line(capsys):
    for arguments, expected in (
        (["--arms", "w9"], "arm is 'w9'; choose of dense"),
        (["--part", "3/2"], "--part is '3/2'"),
        (["--set", "seed=9"], "seed cannot be changed here; use --seeds"),
        (["--set", "device=cuda"], "device cannot be changed here; use --device"),
        (["--set", "model.sparsity.top_k=8"], "model.sparsity.top_k cannot be changed here; use --arms"),
        (["--set", "model.activation=gelu"], "model.activation cannot be changed here; use --arms"),
        (["--minutes", "-1"], "--minutes is -1; choose a positive number"),
        (["--minutes", "nan"], "--minutes is nan"),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 2 and err.count("\n") == 1 and expected in err


def test_what_is_named_twice_is_trained_once(capsys, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(command, "work", lambda runs, *_, **options: seen.extend(runs))
    twice = ["--kind", "image", "image", "--seeds", "1", "1", "--arms", "dense", "act24", "dense"]
    assert run(capsys, *twice, "--fresh", "--out", str(tmp_path))[0] == 0
    assert [(arm, config.seed) for arm, config in seen] == [("dense", 1), ("act24", 1)]
