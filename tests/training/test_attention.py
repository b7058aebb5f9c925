"""The kernel that computes attention: which one is taken, remembered and used."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from replicate.config import ATTENTION, ModelConfig, TrainConfig
from replicate.data import TokenData
from replicate.gpt import GPT
from replicate.settings.text import to_dict
from replicate.train import Trainer
from replicate.training import attention, compiled
from replicate.training.attention import TORCH, Shape

MODEL = ModelConfig(vocab_size=32, n_layer=2, d_model=64, d_ff=64, n_head=4, seq_len=32)
SHAPE = Shape.of(MODEL, 2, torch.float32)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
ON_CPU = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}  # what works on a CPU
RUN = TrainConfig(model=MODEL, corpus="synthetic", steps=6, batch_size=2, lr_warmup=1, dense_warmup=2,
                  stats_every=0, eval_batches=1, device="cpu")  # fmt: skip


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """No choice is in memory, and "math" is a kernel that can be asked for, on a CPU without another."""
    monkeypatch.setattr(attention, "_known", {})
    monkeypatch.setattr(attention, "KERNELS", attention.KERNELS | ON_CPU)
    monkeypatch.setitem(attention.ORDERS, "math", [SDPBackend.MATH])


@pytest.fixture
def data(tmp_path):
    return TokenData("synthetic", 32, 32, tmp_path / "corpus")


class Timer:
    """Runs each call once and says what it took: the given times, one after the other."""

    def __init__(self, *times):
        self.times, self.gradients = list(times), []

    def __call__(self, call):
        self.gradients.append(call())
        return self.times.pop(0)


class Products(TorchDispatchMode):
    """The attention operators that run inside it."""

    def __enter__(self):
        self.seen = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "attention" in name or "softmax" in name.split(".")[1]:
            self.seen.add(name.split(".")[1])
        return func(*args, **(kwargs or {}))


def kernels_of(call):
    with Products() as products:
        call()
    return products.seen


FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def test_settings_are_the_kernels_that_there_are():
    assert set(ATTENTION) == {"auto", TORCH, *attention.KERNELS} - {"math"}
    for name, order in attention.ORDERS.items():
        assert order[0] == attention.KERNELS[name] and len(set(order)) == len(order)
    assert set(attention.ORDERS["flash"]) == set(attention.ORDERS["cudnn"]) > set(ON_CPU.values())


@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_a_kernel_comes_first_inside_and_torch_s_order_is_back_after(name):
    before = torch._C._get_sdp_priority_order()
    with attention.attention_by(name):
        assert torch._C._get_sdp_priority_order()[0] == int(attention.KERNELS[name])
    with attention.attention_by(TORCH):
        assert torch._C._get_sdp_priority_order() == before


def test_a_cpu_leaves_the_choice_to_torch_and_refuses_a_gpu_s_kernel(data):
    assert attention.pick("auto", SHAPE, CPU) == attention.pick(TORCH, SHAPE, CPU) == TORCH
    for name in ("flash", "cudnn"):
        with pytest.raises(
            ValueError, match=f"attention is '{name}', a kernel of GPUs, on cpu; choose 'auto'"
        ):
            Trainer(replace(RUN, attention=name), data=data, progress=False)


def test_every_kernel_that_works_is_timed_forward_and_backward():
    """cuDNN has none for a CPU. The gradients of all others agree."""
    grouped = Shape.of(replace(MODEL, n_kv_head=2), 3, torch.float32)
    assert (grouped.batch, grouped.seq, grouped.n_head, grouped.n_kv_head, grouped.d_head) == (
        3,
        32,
        4,
        2,
        16,
    )
    for shape in (SHAPE, grouped):
        timer = Timer(3.0, 1.0)
        kernels = {"cudnn": SDPBackend.CUDNN_ATTENTION, **ON_CPU}
        assert attention.times_ms(shape, CPU, timer, kernels) == {"flash": 3.0, "math": 1.0}
        for flash, math, heads in zip(*timer.gradients, (4, shape.n_kv_head, shape.n_kv_head), strict=True):
            assert flash.shape == (shape.batch, heads, 32, 16) and flash.abs().sum() > 0
            torch.testing.assert_close(flash, math)
    calls = {name: attention._call(SHAPE, CPU, kernel) for name, kernel in ON_CPU.items()}
    assert kernels_of(calls["flash"]) == {FLASH, f"{FLASH}_backward"} != kernels_of(calls["math"])


def test_the_timed_operands_lie_as_the_model_s(monkeypatch):
    seen, plain = [], torch.nn.functional.scaled_dot_product_attention

    def note(q, k, v, attn_mask=None, **options):
        seen.append(([(t.shape, t.stride()) for t in (q, k, v)], attn_mask, options))
        return plain(q, k, v, attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    for shape in (MODEL, replace(MODEL, n_kv_head=2)):
        GPT(replace(shape, n_layer=1))(torch.zeros(2, 32, dtype=torch.long))
        attention._call(Shape.of(shape, 2, torch.float32), CPU, SDPBackend.MATH)()
    assert seen[0] == seen[1] and seen[2] == seen[3] and seen[0] != seen[2]


def test_the_fastest_is_kept_for_the_process_and_for_the_next(tmp_path, monkeypatch):
    file = tmp_path / "attention" / "card.json"
    ask = lambda *times, shape=SHAPE: attention.remembered(shape, CPU, file, Timer(*times))  # noqa: E731
    assert ask(3.0, 1.0) == "math"
    assert ask() == "math", "from memory: a timer without times raises"
    longer = replace(SHAPE, batch=4)
    assert ask(1.0, 3.0, shape=longer) == "flash", "another shape is timed"
    assert ask(3.0, 1.0, shape=replace(SHAPE, deterministic=True)) == "math"
    attention._known.clear()
    assert (ask(), ask(shape=longer)) == ("math", "flash"), "from the file"
    stored = json.loads(file.read_text())
    assert stored["2x32x4x4x16-float32"] == {"used": "math", "ms": {"flash": 3.0, "math": 1.0}}
    assert set(stored) == {SHAPE.key, longer.key, "2x32x4x4x16-float32-deterministic"}
    for damaged in ('{"2x32x4', '{"2x32x4x4x16-float32": {"used": "gone"}}', "[]", '{"a": 1}'):
        attention._known.clear()
        file.write_text(damaged)
        assert ask(1.0, 3.0) == "flash"


def test_of_two_processes_that_time_at_once_the_first_decides(tmp_path):
    file = tmp_path / "card.json"

    def slow(call):
        file.write_text(json.dumps({SHAPE.key: {"used": "flash", "ms": {}}}))  # by the other one
        return times.pop(0)

    times = [9.0, 5.0, 1.0]  # of flash, cuDNN, math
    assert attention.remembered(SHAPE, CPU, file, slow) == "flash"


def test_where_no_fused_kernel_works_torch_chooses(tmp_path):
    def refuse(call):
        raise RuntimeError("No available kernel. Aborting execution.")

    assert attention.remembered(SHAPE, CPU, tmp_path / "card.json", refuse) == TORCH


def test_a_full_memory_decides_nothing(tmp_path):
    def refuse(call):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        attention.remembered(SHAPE, CPU, tmp_path / "card.json", refuse)
    assert not list(tmp_path.iterdir()) and not attention._known


def test_auto_on_a_gpu_is_the_fastest_and_a_named_kernel_must_work(monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "_cache_file", lambda device: tmp_path / "card.json")
    monkeypatch.setattr(attention, "times_ms", lambda *_: {"flash": 2.0, "cudnn": 1.0})
    monkeypatch.setattr(attention, "reproducible", lambda *_: attention.nullcontext())
    monkeypatch.setattr(attention, "settle", lambda device: None)
    assert attention.pick("auto", SHAPE, GPU) == "cudnn"
    monkeypatch.setattr(attention, "_call", lambda shape, device, kernel: lambda: None)
    assert attention.pick("flash", SHAPE, GPU) == "flash"

    def broken(shape, device, kernel):
        raise RuntimeError("No available kernel.\nmore")

    monkeypatch.setattr(attention, "_call", broken)
    with pytest.raises(
        ValueError, match=r"attention is 'flash', which cannot compute 2x32.*\(No available ke"
    ):
        attention.pick("flash", SHAPE, GPU)


@pytest.mark.parametrize("piece", ["model", "compiled"])
def test_a_model_computes_by_the_kernel_that_is_set_and_by_another_where_there_is_none(piece, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    compiled.compiled_piece.cache_clear()
    torch.manual_seed(1)
    model, idx = GPT(MODEL), torch.randint(32, (2, 32))
    forward = model if piece == "model" else compiled.compiled_loss(model)
    seen, gradients = {}, {}
    for name in ("flash", "math", "cudnn", TORCH, "math", "flash"):
        model.set_attention(name)
        seen[name] = kernels_of(lambda: forward(idx, idx)[1].backward())
        gradients[name] = model.blocks[0].attn.qkv.weight.grad.clone()
        model.zero_grad()
        torch.testing.assert_close(gradients[name], gradients["flash"])
    attention.settle(CPU)
    of = {name: FLASH in found for name, found in seen.items()}
    assert of == {"flash": True, "math": False, "cudnn": True, TORCH: True}
    torch._dynamo.reset()
    compiled.compiled_piece.cache_clear()


def test_a_trainer_uses_and_reports_its_kernel_and_compiles_once(data, monkeypatch, capsys):
    """Compiled pieces are traced anew for another kernel, but not in every step."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    torch._dynamo.reset()
    compiled.compiled_piece.cache_clear()
    monkeypatch.setattr("replicate.training.attention.pick", lambda asked, shape, device: asked)
    run, counts, losses = replace(RUN, compile=True, attention="flash"), [], {}
    for name in ("flash", "flash", "torch"):
        trainer = Trainer(replace(run, attention=name), data=data, progress=False)
        assert {block.attn.kernel for block in trainer.model.blocks} == {name}
        for stop in (2, 4, 6):
            trainer.run(stop)
            counts.append(len(graphs))
        losses[name] = trainer.losses
        assert trainer.result()["attention"] == name
    first, other = counts[0], counts[6]
    assert counts[:2] == [first, first] and counts[2] == counts[3] == counts[5], "evaluation is a trace more"
    assert other > counts[5] and counts[6:8] == [other, other]
    assert losses["flash"] == losses["torch"], "torch's choice on a CPU is the same kernel"
    torch._dynamo.reset()
    compiled.compiled_piece.cache_clear()


def test_a_captured_step_takes_its_kernel_for_granted(data):
    trainer = Trainer(RUN, data=data, progress=False)
    batches = [trainer.batch(0)]
    before = trainer.optimizer_step._now(batches)
    assert before == trainer.optimizer_step._now(batches)
    trainer.model.set_attention("math")
    assert before != trainer.optimizer_step._now(batches)


@pytest.mark.gpu
def test_a_gpu_s_choice_is_timed_stored_and_trained_with(monkeypatch, tmp_path):
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path))
    monkeypatch.setattr(attention, "KERNELS", {k: v for k, v in attention.KERNELS.items() if k != "math"})
    run = replace(RUN, device="cuda", model=replace(MODEL, n_head=1))
    data = TokenData("synthetic", 32, 32, tmp_path / "corpus")
    trainer = Trainer(run, data=data, progress=False)
    trainer.run()
    (file,) = (tmp_path / "attention").iterdir()
    ((key, row),) = json.loads(file.read_text()).items()
    assert key == "2x32x1x1x64-bfloat16" and row["used"] == trainer.attention == trainer.result()["attention"]
    assert row["ms"][row["used"]] == min(row["ms"].values()) > 0
    named = Trainer(replace(run, attention="flash"), data=data, progress=False)
    named.run()
    assert named.attention == "flash" and "attention" in to_dict(run)
    assert named.losses == pytest.approx(trainer.losses, rel=1e-2)
