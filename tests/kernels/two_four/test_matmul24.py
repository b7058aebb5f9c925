"""matmul24 and its plans: the products in both orientations, refusals, and the plan cache."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from replicate.kernels import backend as engines
from replicate.kernels import matmul24, relu2_prune24, report, soft_threshold_prune24
from replicate.kernels.two_four import plan24
from replicate.kernels.two_four.compressed24 import Compressed24, pack24_reference
from replicate.kernels.two_four.matmul24 import matmul24_reference
from replicate.kernels.two_four.plan24 import Plan, Shape
from replicate.sparsity import prune24
from replicate.system.paths import ROOT

HALF = [torch.float16, torch.bfloat16]


def operands(rows, cols, n, dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = prune24(torch.randn(rows, cols, generator=g)).to(dtype).to(device)
    b = torch.randn(cols, n, generator=g).to(dtype).to(device)
    return a, Compressed24(pack24_reference(a), rows, cols), b


def test_golden_4x4():
    a = torch.zeros(64, 64, dtype=torch.float16)
    a[0, :4] = torch.tensor([1, 0, 2, 0])
    a[1, :4] = torch.tensor([0, 3, 0, 4])
    b = torch.zeros(64, 4, dtype=torch.float16)
    b[:4] = torch.eye(4)
    out = matmul24(Compressed24(pack24_reference(a), 64, 64), b)
    assert out[:2].tolist() == [[1, 0, 2, 0], [0, 3, 0, 4]] and not out[2:].any()


@pytest.mark.parametrize("rows, cols, n", [(64, 64, 8), (70, 128, 13), (1, 64, 1), (64, 192, 0)])
@pytest.mark.parametrize("dtype", HALF)
def test_dense_engine(rows, cols, n, dtype):
    a, sparse, b = operands(rows, cols, n, dtype, "cpu")
    expected = (a.double() @ b.double()).to(dtype)
    for right in (b, b.t().contiguous().t()):
        assert matmul24(sparse, right).shape == (rows, n)
        torch.testing.assert_close(matmul24(sparse, right), expected, rtol=0.02, atol=0.05)
        assert torch.equal(matmul24_reference(sparse, right), matmul24(sparse, right))
        transposed = matmul24(sparse, right, transpose=True)
        assert torch.equal(matmul24_reference(sparse, right, True), transposed)
        torch.testing.assert_close(transposed, expected.t(), rtol=0.02, atol=0.05)


def test_products_of_the_ffn():
    """y1 = x S24(W1), y3 = y2 W2, dy2 = dy3 S24(W2^T) as compressed operands see them."""
    g = torch.Generator().manual_seed(0)
    x, w1, w2 = (torch.randn(s, generator=g).half() * 0.2 for s in ((24, 64), (64, 128), (128, 64)))
    from replicate.sparsity import soft_threshold24

    y1 = matmul24(soft_threshold_prune24(w1, True), x.t(), transpose=True)
    torch.testing.assert_close(y1, x @ soft_threshold24(w1, 0), rtol=0.01, atol=0.01)
    y2 = y1.clamp_min(0).square()
    torch.testing.assert_close(matmul24(relu2_prune24(y1), w2), prune24(y2) @ w2, rtol=0.01, atol=0.01)
    dy2 = matmul24(soft_threshold_prune24(w2), x.t(), transpose=True)
    torch.testing.assert_close(dy2, x @ soft_threshold24(w2, 1).t(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    "dense, message",
    [
        (torch.zeros(64, dtype=torch.float16), "must be a matrix"),
        (torch.zeros(128, 8, dtype=torch.float16), "inner sizes"),
        (torch.zeros(64, 8), "cast one"),
        (torch.zeros(64, 8, dtype=torch.float16, device="meta"), "meta"),
    ],
)
def test_bad_input_is_refused(dense, message):
    _, sparse, _ = operands(64, 64, 8, torch.float16, "cpu")
    with pytest.raises(ValueError, match=message):
        matmul24(sparse, dense)


def test_operator_is_registered_right():
    _, sparse, b = operands(70, 64, 8, torch.float16, "cpu")
    op = torch.ops.replicate.matmul24.default
    for transpose, shape in ((False, (70, 8)), (True, (8, 70))):
        with torch._subclasses.FakeTensorMode() as mode:
            fake = [mode.from_tensor(t) for t in (sparse.buffer, b)]
            out = op(fake[0], None, fake[1], 70, 64, transpose, "sm90", False)
        assert out.shape == shape and out.dtype == torch.float16


def test_compiles_without_a_graph_break():
    _, sparse, b = operands(64, 64, 8, torch.float16, "cpu")

    def product(buffer, right):
        return matmul24(Compressed24(buffer, 64, 64), right)

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(sparse.buffer, b), product(sparse.buffer, b))


def test_backend_selection(monkeypatch):
    monkeypatch.delenv("REPLICATE_BACKEND", raising=False)
    assert engines.select("cpu") == "reference"
    assert "reference on cpu (by capability" in report("cpu")
    with pytest.raises(ValueError, match=r"device is 'cuda:99', and there are .* choose 'cpu'"):
        report("cuda:99")
    with pytest.raises(ValueError, match="'cusparselt' cannot run on cpu"):
        engines.select("cpu", "cusparselt")
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        engines.select("cpu", "cuda")
    monkeypatch.setenv("REPLICATE_BACKEND", "reference")
    assert "REPLICATE_BACKEND=reference" in report("cpu")
    monkeypatch.setenv("REPLICATE_BACKEND", "fast")
    with pytest.raises(ValueError, match="REPLICATE_BACKEND is 'fast'"):
        engines.select("cpu")


@pytest.mark.parametrize("argument", [None, "auto"])
def test_the_variable_replaces_auto_and_gives_way_to_a_name(monkeypatch, argument):
    monkeypatch.setenv("REPLICATE_BACKEND", "triton")
    assert engines.requested(argument) == "triton"
    assert engines.requested("reference") == "reference"
    monkeypatch.setenv("REPLICATE_BACKEND", "fast")
    with pytest.raises(ValueError, match="REPLICATE_BACKEND is 'fast'"):
        engines.select("cpu", argument)


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, replicate.kernels as k\n"
        "y2 = k.relu2_prune24(torch.ones(8, 64).half())\n"
        "assert k.matmul24(y2, torch.ones(64, 8).half()).eq(32).all()\n"
        "assert 'reference on cpu' in k.report('cpu')\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "REPLICATE_BACKEND")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)


def test_pays_is_false_without_sparse_tensor_cores():
    assert not plan24.pays(Shape(4096, 4096, 4096, torch.float16), torch.device("cpu"))


def test_shapes_are_rounded_so_that_few_are_tuned():
    shape = Shape(16384, 16384, 4096, torch.float16)
    assert shape.rounded() == shape
    assert Shape(5632, 8, 192, torch.float16).rounded() == Shape(5632, 8, 192, torch.float16)
    assert Shape(64, 1001, 192, torch.float16).rounded() == Shape(64, 1024, 192, torch.float16)
    keys = {Shape(64, n, 64, torch.float16).rounded().key for n in range(8, 16385, 8)}
    assert len(keys) < 80


def fake_library(monkeypatch, results):
    """algorithm -> (ms, factor on the right result); the library refuses other numbers."""
    running = []

    def product(buffer, b, transpose, algorithm):
        if algorithm not in results:
            raise RuntimeError("CUDA error: invalid value")
        running.append(algorithm)
        return (b.t() @ buffer.t() if transpose else buffer @ b) * results[algorithm][1]

    def median_ms(fn, repeats):
        running.clear()
        fn()
        return results[running[0]][0] if running else 1.0

    monkeypatch.setattr(plan24, "sparse_product", product)
    monkeypatch.setattr(plan24, "compress_by_library", lambda a: a)
    monkeypatch.setattr(plan24, "median_ms", median_ms)


@pytest.mark.parametrize("transpose", [False, True])
def test_tuning_takes_the_fastest_right_algorithm(monkeypatch, transpose):
    results = {0: (2.0, 1), 1: (0.1, 1.1), 2: (0.7, 1), 3: (0.6, 1), 4: (0.2, float("nan")), 5: (0.9, 1)}
    fake_library(monkeypatch, results | {7: (0.01, 1)})
    shape = Shape(64, 16, 64, torch.float16, True, transpose)
    plan = plan24.tune(shape, torch.device("cpu"))
    assert (plan.algorithm, plan.ms, plan.default_ms) == (3, 0.6, 2.0)
    assert (plan.tried, plan.wrong) == (6, 2)
    assert plan.engine() == "cusparselt"


def test_a_slow_or_wrong_library_means_a_dense_product(monkeypatch):
    shape = Shape(64, 16, 64, torch.float16)
    fake_library(monkeypatch, {0: (1.5, 1)})
    slow = plan24.tune(shape, torch.device("cpu"))
    assert slow.engine() == "dense" and slow.engine(unpacks=True) == "cusparselt"  # 1.5 against 1 + 1
    fake_library(monkeypatch, {0: (0.1, 2)})
    wrong = plan24.tune(shape, torch.device("cpu"))
    assert wrong.algorithm is None and wrong.engine(unpacks=True) == "dense"


@pytest.fixture
def plan_file(tmp_path, monkeypatch):
    """The file of plans of a device that is not there."""
    file = tmp_path / "plans" / "device.json"
    monkeypatch.setattr(plan24, "_cache_file", lambda device: file)
    monkeypatch.setattr(plan24, "_known", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    return file


def test_a_worker_keeps_the_plans_that_another_wrote_while_it_tuned(plan_file, monkeypatch):
    ours, theirs = Shape(64, 8, 64, torch.float16), Shape(64, 16, 64, torch.float16)

    def tune(shape, device):
        plan24._save(plan_file, {theirs.key: Plan(3)})
        return Plan(7)

    monkeypatch.setattr(plan24, "tune", tune)
    assert plan24.plan_for(ours, torch.device("cuda:0")) == Plan(7)
    assert plan24._read(plan_file) == {ours.key: Plan(7), theirs.key: Plan(3)}


def test_plans_survive_on_disk_and_a_damaged_file_is_replaced(plan_file, monkeypatch):
    file = plan_file
    shape = Shape(64, 8, 64, torch.float16)
    tuned = []

    def tune(shape, device):
        tuned.append(shape)
        return Plan(7, ms=1.0, dense_ms=2.0)

    monkeypatch.setattr(plan24, "tune", tune)
    device = torch.device("cuda:0")
    assert plan24.plan_for(shape, device).algorithm == 7
    assert json.loads(file.read_text())[shape.key]["dense_ms"] == 2.0
    plan24.forget()
    assert plan24.plan_for(shape, device).algorithm == 7 and len(tuned) == 1
    other = dataclasses.replace(shape, transpose=True)
    assert plan24.plan_for(other, device) and len(tuned) == 2
    assert plan24.plan_for(shape, device) is plan24.plan_for(shape, device)
    file.write_text("{ damaged")
    plan24.forget()
    assert plan24.plan_for(shape, device).algorithm == 7 and len(tuned) == 3
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run it once"):
        plan24.plan_for(dataclasses.replace(shape, n=16), device)


def test_float16_algorithms_that_may_crash_are_not_tried():
    for row_major, transpose, most in (
        (True, True, 9),
        (True, False, 9),
        (False, False, 9),
        (False, True, 1),
    ):
        assert Shape(64, 8, 64, torch.float16, row_major, transpose).algorithms == most
        bfloat16 = Shape(64, 8, 64, torch.bfloat16, row_major, transpose)
        assert bfloat16.algorithms == plan24.MOST_ALGORITHMS


@pytest.fixture
def own_plans(tmp_path, monkeypatch):
    """Plans are tuned in this test and kept to it."""
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path))
    monkeypatch.setattr(plan24, "_known", {})


needs_cusparselt = pytest.mark.skipif(
    not torch.cuda.is_available() or not torch.backends.cusparselt.is_available(), reason="needs cuSPARSELt"
)


@pytest.mark.gpu
@needs_cusparselt
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows, cols, n", [(256, 512, 128), (70, 128, 13), (1, 64, 1)])
def test_cusparselt_engine(rows, cols, n, dtype, poison, own_plans):
    a, sparse, b = operands(rows, cols, n, dtype, "cuda")
    expected = a.double() @ b.double()
    for right in (b, b.t().contiguous().t(), torch.stack([b, b], 2)[:, :, 0]):
        for transpose in (False, True):
            out = matmul24(sparse, right, transpose=transpose, backend="cusparselt")
            assert out.is_contiguous()
            out = out.t() if transpose else out
            error = (out.double() - expected).norm() / expected.norm()
            assert error < plan24.TOLERANCE[dtype]
            reference = matmul24_reference(sparse, right)
            assert (reference.double() - expected).norm() / expected.norm() < plan24.TOLERANCE[dtype]


@pytest.mark.gpu
@needs_cusparselt
def test_misaligned_operand_and_cuda_graph(own_plans):
    _, sparse, b = operands(128, 256, 64, torch.bfloat16, "cuda")
    shifted = torch.empty(256 * 64 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(256, 64).copy_(b)
    expected = matmul24(sparse, b, backend="cusparselt")
    assert torch.equal(matmul24(sparse, shifted, backend="cusparselt"), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = matmul24(sparse, b, backend="cusparselt")
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected)


@pytest.mark.gpu
@needs_cusparselt
def test_compiled_product_equals_eager(own_plans):
    _, sparse, b = operands(256, 512, 128, torch.bfloat16, "cuda")

    def product(buffer, right):
        return matmul24(Compressed24(buffer, 256, 512), right) * 2

    assert torch.equal(torch.compile(product, fullgraph=True)(sparse.buffer, b), product(sparse.buffer, b))
