"""The formula of a GPU's memory, against what a forward pass saves and what an optimiser holds."""

import pytest
import torch

from replicate.config import ModelConfig, TrainConfig
from replicate.gpt import GPT
from replicate.system.paths import ROOT
from replicate.training.memory import activation_bytes, memory, table
from replicate.training.step import make_optimizer

SHAPES = {
    "tied": ModelConfig(vocab_size=128, n_layer=2, d_model=64, d_ff=320, n_head=2, n_kv_head=1, seq_len=32),
    "apart": ModelConfig(vocab_size=96, n_layer=3, d_model=96, d_ff=256, n_head=3, seq_len=48,
                         tie_embeddings=False),
}  # fmt: skip


def saved(shape, rows):
    """Bytes by kind, parameters apart, that autograd keeps after a forward pass in bfloat16 autocast."""
    model, found = GPT(shape), {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()}
    casts = shapes | {tuple(reversed(shape)) for shape in shapes}

    def keep(t):
        if t.untyped_storage().data_ptr() not in parameters:
            found[t.untyped_storage().data_ptr()] = t
        return t

    idx = torch.randint(shape.vocab_size, (rows, shape.seq_len))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model(idx, idx)
    small = {model.cos.untyped_storage().data_ptr(), model.sin.untyped_storage().data_ptr()}
    sizes = {"casts": 0, "activations": 0}
    for place, t in found.items():
        kind = "casts" if t.dtype == torch.bfloat16 and tuple(t.shape) in casts else "activations"
        if place not in small and t.dtype != torch.int64 and t.dim():
            sizes[kind] += t.untyped_storage().nbytes()
    return sizes


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_what_a_forward_pass_saves(shape):
    found, expected = saved(shape, 5), memory(shape, 5)
    assert {name: expected[name] for name in found} == found
    assert expected["activations"] == 5 * shape.seq_len * activation_bytes(shape)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_gradients_and_moments_are_counted(shape):
    model = GPT(shape)
    optimizer = make_optimizer(model, TrainConfig(model=shape))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moments = (t for state in optimizer.state.values() for t in state.values() if t.dim())
    found = memory(shape, 1)
    assert found["weights"] == sum(p.nbytes for p in model.parameters())
    assert found["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert found["moments"] == sum(t.nbytes for t in moments)
    assert found["gathered"] == 0 and found["total"] == sum(found.values()) - found["total"]


def test_shards():
    shape = SHAPES["apart"]
    whole, sharded = memory(shape, 2), memory(shape, 2, 4, "fsdp")
    for name in ("weights", "gradients", "moments"):
        assert sharded[name] == whole[name] // 4
    model = GPT(shape)
    layer = sum(p.nbytes for p in model.blocks[0].parameters())
    rest = sum(p.nbytes for p in model.parameters()) - shape.n_layer * layer
    assert sharded["gathered"] == 2 * layer + rest
    assert memory(shape, 2, 4, "fsdp", grad_accum=2)["gradients"] == whole["gradients"]
    assert memory(shape, 2, 4) == whole, "DDP shards nothing"


@pytest.mark.parametrize("arguments", [(0, 1, "ddp"), (1, 0, "ddp"), (1, 2, "zero")])
def test_refuses(arguments):
    with pytest.raises(ValueError, match="choose 'ddp' or 'fsdp'"):
        memory(SHAPES["tied"], *arguments)


def test_the_page_has_the_table():
    assert table() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
