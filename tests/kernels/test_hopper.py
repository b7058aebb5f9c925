"""Every kernel compiles for Hopper, without a GPU: see `hopper.py`, which runs in a process of its own."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import replicate.bench
import replicate.kernels
from replicate.kernels.backend import on_its_device
from replicate.kernels.venom.common import HOPPER_SHARED

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("hopper.py")
PRODUCTS = ("_venom_up_kernel", "_venom_down_kernel", "_venom_wgrad_kernel", "_venom_gather_kernel")


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """What is known of each compiled variant of a kernel."""
    out = tmp_path_factory.mktemp("hopper") / "variants.json"
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["TRITON_CACHE_DIR"] = str(out.parent / "cache")
    done = subprocess.run([sys.executable, SCRIPT, out], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def kernels():
    """The names of all kernels of the package."""
    for package in (replicate.kernels, replicate.bench):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            for name, value in vars(importlib.import_module(found.name)).items():
                if isinstance(value, on_its_device):
                    yield name


def test_every_kernel_is_compiled(variants):
    assert {v["kernel"] for v in variants} == set(kernels())


def test_every_variant_fits_the_chip(variants):
    """Registers hold what a thread computes with, and shared memory what a program stages."""
    slow = [v for v in variants if v["local"] or v["stack"] or v["shared"] > HOPPER_SHARED]
    assert not slow


def test_products_run_on_tensor_cores_in_their_format(variants):
    found = {(v["kernel"], "fp8" in v["case"], *v["wgmma"]) for v in variants if v["kernel"] in PRODUCTS}
    in_half = {(name, False, "bf16") for name in PRODUCTS}
    assert found == in_half | {(name, True, "e4m3") for name in ("_venom_up_kernel", "_venom_down_kernel")}


def test_bytes_rounded_in_pairs_stay_together(variants):
    """GPUs round two numbers to FP8 at a time. Where their bytes go different ways afterwards, ptxas 12.9 has
    stored wrong ones (Triton's issue 11111); right results by other compilers say nothing."""
    found = {v["kernel"] for v in variants if v["pairs"]}
    assert "_quantise_rows_kernel" in found and "_quantise_weight_kernel" not in found
    assert not [v for v in variants if v["apart"]]
