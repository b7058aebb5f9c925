"""Kernel tests run on the GPU if there is one, else on the CPU through Triton's interpreter."""

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
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)

        def filled(*args, plain=plain, **kwargs):
            out = plain(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, filled)
