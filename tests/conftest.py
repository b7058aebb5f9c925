"""Tests write to a temporary folder, use one thread, skip what needs a GPU, and run notebooks last."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

# Before torch is imported. Workers of pytest-xdist inherit all of it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
OURS = "REPLICATE_RUNS" not in os.environ
if OURS:
    folder = Path(tempfile.mkdtemp(prefix="replicate-tests-"))
    os.environ["REPLICATE_RUNS"] = str(folder / "runs")
    os.environ["REPLICATE_FIGURES"] = str(folder / "figures")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import Phase, settings  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when @triton.jit decorates, hence before any module with kernels is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

LAST = ("test_mutation.py", "test_notebooks_runner.py", "test_notebooks.py")

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("mutated", phases=[Phase.explicit, Phase.generate], deadline=None)  # no shrinking
if os.environ.get("REPLICATE_EXPECTED_ROOT"):
    settings.load_profile("mutated")
elif os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture
def ax():
    """Axes to draw on."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def pytest_addoption(parser):
    group = parser.getgroup("notebooks", "how tests/test_notebooks.py runs the notebooks")
    group.addoption("--processor", default="own", choices=("own", "avx2", "plain"), help="compute as on this")
    group.addoption("--notebook-seed", default="1", help="a number, or 'drawn' from the files' content")


def pytest_configure():
    """A copy of the package under test must be the one that is imported (see test_mutation.py)."""
    expected = os.environ.get("REPLICATE_EXPECTED_ROOT")
    found = importlib.util.find_spec("replicate").origin
    if expected and not Path(found).resolve().is_relative_to(Path(expected).resolve()):
        pytest.exit(f"replicate comes from {found}, not from {expected}", returncode=3)


def pytest_unconfigure(config):
    if OURS and not hasattr(config, "workerinput"):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    if HAS_GPU:
        for item in items:
            if "device" in item.fixturenames:  # on a GPU, where there is one
                item.add_marker(pytest.mark.gpu)
    items.sort(key=lambda item: LAST.index(item.path.name) if item.path.name in LAST else -1)
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    if not HAS_GPU:
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
