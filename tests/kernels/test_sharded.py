"""Kernels read weights that FSDP gathers, frees and gathers again elsewhere, held or not."""

import pytest
import torch
from torch import distributed, nn

from replicate.config import SparsityConfig
from replicate.ffn import SparseFFN

pytest.importorskip("triton")
FORMATS = SparsityConfig(w1=True, w2_t=True, activation="venom", n_clusters=4, top_k=2)


def layer():
    torch.manual_seed(0)
    ffn = SparseFFN(64, 128, FORMATS, backend="triton").half()
    ffn.make_clusters(1)
    ffn.phase = "sparse"
    return nn.Sequential(ffn)


def gradients(model, hold):
    """Of two micro-batches, and where W1 and W2 were when what is held was made."""
    model[0].hold, places, others = hold, [], []
    for seed in range(2):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)).half()
        model(x).float().square().mean().backward()
        places.append(model[0].operands and model[0].operands[0][-1])
        # What takes the places that the weights have left.
        others += [torch.empty(n * 64 * 128, dtype=torch.half) for n in (1, 2) for _ in range(64)]
    model[0].hold = False
    return model[0].w1.grad, places


@pytest.mark.skipif(
    torch.cuda.is_available() or not distributed.is_available() or not distributed.is_gloo_available(),
    reason="interpreted kernels, over gloo",
)
def test_what_is_held_is_made_anew_where_the_weights_have_moved(tmp_path):
    expected, _ = gradients(layer(), hold=False)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard

        model = layer()
        fully_shard(model[0])
        fully_shard(model)
        found, places = gradients(model, hold=True)
        assert torch.equal(found.full_tensor(), expected) and expected.any()
        assert places[0] != places[1], "or nothing has moved"
    finally:
        distributed.destroy_process_group()
