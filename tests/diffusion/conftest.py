import pytest

from replicate.diffusion.model import DiTConfig

TINY = {"size": 16, "patch": 4, "n_layer": 2, "d_model": 16, "d_ff": 64, "n_head": 2}


@pytest.fixture
def tiny():
    """A function that makes the configuration of a tiny model."""
    return lambda **changes: DiTConfig(**(TINY | changes))
