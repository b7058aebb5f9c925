"""Kernel tests run on the GPU if there is one, else on the CPU through Triton's interpreter."""

import importlib

import pytest
import torch


@pytest.fixture
def device():
    """Where kernels run here."""
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory holds NaN: an element that is not written shows."""
    _fill(monkeypatch, float("nan"))


@pytest.fixture
def zeroed(monkeypatch):
    """Uninitialised memory holds 0: rows that no kernel writes are equal in two runs."""
    _fill(monkeypatch, 0.0)


def _fill(monkeypatch, value):
    # torch.compile lists torch's functions when it first runs, and afterwards takes no other.
    importlib.import_module("torch._dynamo.trace_rules").get_torch_obj_rule_map()
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)

        def filled(*args, plain=plain, **kwargs):
            out = plain(*args, **kwargs)
            return out.fill_(value) if out.is_floating_point() or value == 0 else out

        monkeypatch.setattr(owner, name, filled)
