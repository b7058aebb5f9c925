"""Kernels run on the device of their operands, whichever is current."""

import importlib
import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from replicate import kernels
from replicate.config import SparsityConfig
from replicate.ffn import SparseFFN
from replicate.kernels import backend
from replicate.kernels import layer as fused_ffn
from replicate.kernels.venom.down import venom_down
from replicate.kernels.venom.gather import venom_compress
from replicate.kernels.venom.select import venom_select
from replicate.kernels.venom.up import venom_up, venom_up_backward
from replicate.kernels.venom.wgrad import venom_wgrad
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.system.paths import ROOT

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
LAUNCH = re.compile(r"\b(_\w+_kernel)\[")
CONFIGS = {
    **{name: SPARSITY_PRESETS[name] for name in ("w1", "w1+w2+t", "act24", "act24+tile", "all24")},
    **{name: SPARSITY_PRESETS[name] for name in ("venom16", "recipe", "active16", "static16")},
    "scaled": SparsityConfig(w1=True, w2_t=True, activation="24", weight_scale=True),
    "learned": SparsityConfig(activation="24", selection="learned"),
    "experts": SparsityConfig(activation="venom", routing="learned", inner=False),
}


def launched():
    """(module, kernel) of every launch in the package."""
    folder = ROOT / "replicate" / "kernels"
    files = sorted(folder.rglob("*.py"))
    modules = {file: ".".join(file.relative_to(folder).with_suffix("").parts) for file in files}
    return [
        (modules[file], name) for file in files for name in LAUNCH.findall(file.read_text(encoding="utf-8"))
    ]


def test_every_launch_is_on_its_device():
    found = launched()
    assert len(found) >= 17
    for module, name in found:
        kernel = getattr(importlib.import_module(f"replicate.kernels.{module}"), name)
        assert isinstance(kernel, backend.on_its_device), f"{module}.{name}: decorate it with on_its_device"


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (SimpleNamespace(device=torch.device("cuda", 1)), [1]),
        (SimpleNamespace(device=torch.device("cuda", 0)), [0]),
        (SimpleNamespace(base=SimpleNamespace(device=torch.device("cuda", 1))), [1]),  # a descriptor
        (torch.zeros(1), [0]),
    ],
)
def test_a_launch_sets_the_device_and_puts_it_back(monkeypatch, first, expected):
    current, seen = [0], []

    @contextmanager
    def on(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(current[0]) or (grid, args, options)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    assert backend.on_its_device(Kernel())[(3,)](first, 2, N=4) == ((3,), (first, 2), {"N": 4})
    assert (seen, current) == (expected, [0])


def flat(result):
    """The tensors in what a wrapper returned."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, kernels.Compressed24):
        return [kernels.unpack24(result)]
    return [tensor for part in result for tensor in flat(part)]


def results(device, dtype=torch.bfloat16):
    """What every public wrapper gives for the same operands on `device`, by name."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=draw).to(device, dtype)

    x, y1, w1, w2 = normal(128, 64), normal(128, 256), normal(64, 256) / 8, normal(256, 64) / 16
    clusters = torch.rand(128, 4, generator=draw).argsort(1)[:, :2].to(device)
    lists = kernels.token_lists(clusters, 4, 32)
    y2, up = kernels.relu2_prune24(y1), venom_up(x, w1, lists)
    selected, dy1 = venom_select(y1, lists), venom_up_backward(x, w2, up, lists)
    values, columns = venom_compress(y1.relu(), 32, 16)
    leaves = [t.clone().requires_grad_() for t in (x, w1, w2)]
    y3 = kernels.venom_ffn(*leaves, clusters, 4)
    return {
        "token_lists": flat(lists[i] for i in (1, 2, 4, 5)),  # the others have entries that are not written
        "relu2_prune24": flat(y2),
        "relu2_prune24_backward": flat(kernels.relu2_prune24_backward(y1, y2, form="dense")),
        "matmul24": flat(kernels.matmul24(y2, w2)),
        "soft_threshold_prune24": flat(kernels.soft_threshold_prune24(w1, scale=1.5)),
        "soft_threshold_prune24_both": flat(kernels.soft_threshold_prune24_both(w1)),
        "tile_prune24": flat(kernels.tile_prune24(y1)),
        "route_active": flat(kernels.route_active(y1, 4, 2)),
        "route_topk": flat(kernels.route_topk(x, normal(4, 64), 2)),
        "venom_gather_matmul": flat(kernels.venom_gather_matmul(values, columns, w2, 32)),
        "venom_ffn": [y3.detach(), *torch.autograd.grad(y3.square().sum(), leaves)],
        "venom_up, venom_down": [venom_down(up, w2, lists)],
        "venom_select": [venom_down(selected, w2, lists)],
        "venom_up_backward": [venom_down(dy1, w1, lists, transposed=True)],
        "venom_wgrad": [venom_wgrad(x, selected, lists)],
    }


def check_same(ours, theirs, name):
    """Equal whole numbers, and equal other ones to rounding: each card has its own plan for 2:4 products."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        a, b = a.cpu().double(), b.cpu().double()
        assert a.isfinite().all() and b.abs().sum() > 0, name
        assert (a - b).norm() <= 1e-2 * b.norm(), name


@pytest.mark.gpu
@TWO_GPUS
def test_wrappers_on_another_device_than_the_current_one():
    torch.cuda.set_device(0)
    theirs, ours = results("cuda:0"), results("cuda:1")
    assert torch.cuda.current_device() == 0
    for name, tensors in ours.items():
        assert {t.device.index for t in tensors} == {1}, name
        check_same(tensors, theirs[name], name)


def passes(config, device, backend_name, dtype=torch.bfloat16):
    """Output and gradients of one pass of a sparse layer on `device`, and the engine that ran."""
    torch.manual_seed(1)
    ffn = SparseFFN(64, 256, config, backend=backend_name)
    if config.activation == "venom":
        ffn.make_clusters(1)
    ffn.to(device).phase = "sparse"
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(128, 64, generator=draw).to(device, dtype).requires_grad_()
    y3 = ffn(x)
    y3.backward(torch.randn(128, 64, generator=draw).to(device, dtype))
    gradients = [x.grad, *(p.grad for p in ffn.parameters())]
    return [y3.detach(), *gradients], fused_ffn.choose(ffn, x)


@pytest.mark.gpu
@TWO_GPUS
@pytest.mark.parametrize("backend_name", [None, "triton"])
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_on_another_device_than_the_current_one(name, backend_name):
    if name == "learned" and backend_name:
        pytest.skip("learned scores have no kernel")
    torch.cuda.set_device(0)
    theirs, engine = passes(CONFIGS[name], "cuda:0", backend_name)
    ours, same_engine = passes(CONFIGS[name], "cuda:1", backend_name)
    assert torch.cuda.current_device() == 0 and engine == same_engine
    assert (engine == "reference") == (name == "learned")
    assert {t.device.index for t in ours} == {1}
    check_same(ours, theirs, name)
