"""The fixtures of kernel tests leave no trace in later tests."""

import pytest
import torch
from kernels.conftest import _fill


def test_what_is_compiled_while_memory_is_filled_harms_no_later_test():
    """Alone in its process, as torch.compile looks at torch's functions once."""
    x = torch.ones(3)
    with pytest.MonkeyPatch.context() as patch:
        _fill(patch, float("nan"))
        torch.compile(lambda x: x + 1, backend="eager")(x)
    compiled = torch.compile(
        lambda x: torch.empty(3, device=x.device).fill_(1) + x, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x), 2 * x)
