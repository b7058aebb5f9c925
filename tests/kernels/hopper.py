"""Compiles every kernel for Hopper (sm_90) as layers of the 7B model launch it, on a machine without a GPU.

    python tests/kernels/hopper.py [file.json]

prints a row for each variant, or writes them. Wrappers run as they are, on tensors without memory that claim
to be on a GPU; in place of each launch its kernel is compiled by the Triton that is installed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch._library.custom_ops import CustomOpDef
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from replicate import SPARSITY_PRESETS, SparseFFN, SparsityConfig
from replicate.bench import dense_peers
from replicate.kernels import backend, operators
from replicate.kernels.decode import ffn as decode
from replicate.kernels.decode import rows
from replicate.kernels.execution import execution
from replicate.kernels.venom import common
from replicate.kernels.venom.gather import venom_gather_matmul

TOKENS, D_MODEL, D_FF = 16384, 4096, 16384
NAMES = (
    *("w1+w2+t", "act24", "act24+tile", "all24", "recipe", "recipe, same"),
    *("venom16", "active16", "venom16, fp8"),
)
LAYERS = {name: SPARSITY_PRESETS[name] for name in NAMES} | {
    "experts": SparsityConfig(activation="venom", routing="learned", inner=False)
}
DECODED = ("dense", "act24", "venom16", "active16", "recipe, same", "w2, same")
FOUND: list[dict] = []


class Hopper:
    """What Triton asks its driver while it compiles."""

    @staticmethod
    def get_current_target() -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0


def compiled(kernel: backend.on_its_device, grid: tuple) -> object:
    """In place of a launch."""

    def launch(*args, **options):
        made = kernel.kernel.warmup(*args, grid=grid, **options)
        if all(made.hash != other["hash"] for other in FOUND):
            FOUND.append({"kernel": kernel.fn.__name__, "case": launch.case, "hash": made.hash} | about(made))

    launch.case = compiled.case
    return launch


def about(made: object) -> dict:
    """Shared memory, registers, bytes that do not fit into them, the tensor cores' instructions, and if pairs
    that were rounded to FP8 are taken apart."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    used = {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    ptx = made.asm["ptx"]
    wgmma = re.findall(r"wgmma\.mma_async\S+?\.f32\.(\w+)", ptx)
    pairs, apart = rounded_pairs(ptx)
    found = {"shared": made.metadata.shared, **used, "wgmma": sorted(set(wgmma))}
    return found | {"pairs": pairs, "apart": apart}


def rounded_pairs(ptx: str) -> tuple[int, bool]:
    """How many pairs are rounded to FP8, and if anything is done with one but to store it, also in a word."""
    pairs, apart = set(), False
    for line in ptx.splitlines():
        names = re.findall(r"%\w+", line)
        if re.match(r"\s*cvt\.rn\.satfinite\.e4m3x2\.f32\s", line):
            pairs.add(names[0])
        elif not pairs.isdisjoint(names):
            if re.match(r"\s*mov\.b32\s", line):
                pairs.add(names[0])
            apart |= not re.match(r"\s*(mov\.b32|(@%\w+\s+)?st\.global\S*)\s", line)
    return len(pairs), apart


def pretend() -> None:
    """Let wrappers launch for a GPU that is not there."""
    driver.set_active(Hopper())
    torch.Tensor.is_cuda = property(lambda self: self.is_meta)
    backend._best = lambda device: ("triton", "")
    common._device_limits = lambda device: (132, common.HOPPER_SHARED)
    backend.on_its_device.__getitem__ = compiled
    rows.check24 = lambda matrix, dim: None  # there are no values to check
    CustomOpDef.__call__ = lambda self, *args, **kwargs: self._init_fn(*args, **kwargs)


def compile_all() -> list[dict]:
    """One dictionary a variant of a kernel."""
    pretend()
    x = torch.empty(TOKENS, D_MODEL, dtype=torch.bfloat16)
    for name, formats in LAYERS.items():
        compiled.case = name
        ffn = SparseFFN(D_MODEL, D_FF, formats)
        clusters, gates = (None, None) if ffn.experts is None else ffn.experts(x)
        how = execution(ffn.formats, "triton", x.device, x.dtype, TOKENS, D_MODEL, D_FF)
        y3, saved = operators._forward(x, ffn.w1, ffn.w2, None, clusters, gates, [], how)
        operators._backward(torch.empty_like(y3), x, ffn.w1, ffn.w2, None, saved, [], how)
    for name in DECODED:
        ffn = SparseFFN(D_MODEL, D_FF, SPARSITY_PRESETS[name])
        weights = decode.prepare(ffn, torch.bfloat16)
        for n in (1, 8, 64):
            compiled.case = f"{name}, {n} tokens"
            decode.decode_ffn(ffn, torch.empty(n, D_MODEL, dtype=torch.bfloat16), weights)
    compiled.case = "V:N:M"
    values, w = torch.empty(TOKENS, 512, dtype=torch.bfloat16), torch.empty(D_FF, D_MODEL, dtype=x.dtype)
    venom_gather_matmul(values, torch.empty(TOKENS // 64, 512, dtype=torch.int32), w, 64)
    compiled.case = "dense, by hand"
    y = torch.empty(TOKENS, D_FF, dtype=torch.bfloat16)
    dense_peers.relu2_backward_(dense_peers.relu2_(y), torch.empty_like(y))
    return FOUND


if __name__ == "__main__":
    with torch.no_grad(), torch.device("meta"):
        variants = compile_all()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(variants))
    else:
        print("triton", triton.__version__)
        for found in variants:
            print({k: v for k, v in found.items() if k != "hash"})
