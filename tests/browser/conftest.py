"""A real browser, and a JupyterLab that serves a copy of the notebooks to it.

Needs the extra `browser` and a Chromium; without one of them the tests are skipped with the reason.
REPLICATE_SCREENSHOTS names a folder for pictures of what the tests saw.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import browsers
import pytest

from replicate.system import paths

STARTS_IN = 60  # seconds that a server may take


@pytest.fixture(scope="session")
def chromium():
    """The running browser."""
    with browsers.running() as browser:
        yield browser


@pytest.fixture
def screenshot(request):
    """A function of a page and a name: keeps a picture where REPLICATE_SCREENSHOTS says, else nothing."""
    folder = os.environ.get("REPLICATE_SCREENSHOTS")

    def take(page, name):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=Path(folder) / f"{name}.png")

    return take


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Address of a JupyterLab on copies of README, notebooks and docs, as someone has it who cloned them."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copy(paths.ROOT / "README.md", root)
    for name in ("notebooks", "docs"):
        shutil.copytree(paths.ROOT / name, root / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for book in sorted((root / "notebooks").glob("[0-9]*.ipynb")):  # each test has a kernel of its own
        for test in ("touched", "exercise"):
            shutil.copy(book, book.with_name(f"{book.name[:2]}_{test}.ipynb"))
    own = {"REPLICATE_RUNS": root / "runs", "REPLICATE_FIGURES": root / "figures", "HOME": root / "home"}
    own |= {"PYTHONPATH": paths.ROOT, "JUPYTER_PREFER_ENV_PATH": 1, "PYDEVD_DISABLE_FILE_VALIDATION": 1}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--port={port}", "--ServerApp.token="]
    options += ["--expose-app-in-browser"]  # so that a test can ask which cells run
    command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={root}"]
    environment = {name: value for name, value in os.environ.items() if name != "REPLICATE_STATIC"}
    environment |= {name: str(value) for name, value in own.items()}
    with (root / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(f"{address}/api", server, root / "server.log")
            yield address
        finally:
            server.terminate()
            server.wait(20)


def wait_for(address, server, log):
    """Until a server answers. Raises RuntimeError with its log if it does not."""
    begun = time.monotonic()
    while server.poll() is None and time.monotonic() - begun < STARTS_IN:
        try:
            return urllib.request.urlopen(address, timeout=2).close()
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")
