import pytest
import torch

from replicate.study.records import RecordStore


@pytest.fixture(autouse=True)
def runs_dir(tmp_path, monkeypatch):
    """Runs are kept in a folder of the test's own, and there is no GPU."""
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes; this one has counted already
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def store(tmp_path):
    return RecordStore(tmp_path / "records", tmp_path / "recorded")
