"""The README's Python runs as it stands, with a step of training where it says that steps are taken."""

import re

import torch

from replicate import SparseFFN, SparsityConfig
from replicate.system.paths import ROOT

STEP = """
for _ in range(2):
    ffn(torch.randn(64, 512)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def blocks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_examples_run():
    code, n_steps = re.subn(r"# \.\.\. .* \.\.\.\n", STEP, "\n".join(blocks()[:2]))
    assert len(blocks()) == 3 and n_steps == 2 and "fullgraph=True" in code
    torch.manual_seed(0)
    scope = {}
    torch._dynamo.reset()
    exec(
        compile(code.replace("fullgraph=True", "fullgraph=True, backend='eager'"), "README.md", "exec"), scope
    )
    ffn, block = scope["ffn"], scope["block"]
    assert ffn.phase == "dense" and block.ffn.phase == "sparse"
    assert ffn.clustered and "exp_avg" in scope["optimizer"].state[ffn.w1]
    x = torch.randn(2, 8, 512)
    assert torch.equal(block(x), block._orig_mod(x))
    torch._dynamo.reset()


def test_an_optimiser_s_moments_would_move_as_the_weights_do():
    """W1's columns and W2's rows move as `make_clusters` says, and so must an optimiser's moments."""
    torch.manual_seed(1)
    ffn = SparseFFN(16, 64, SparsityConfig(activation="venom", n_clusters=4, top_k=1))
    before = {"w1": ffn.w1.detach().clone(), "w2": ffn.w2.detach().clone()}
    order = ffn.make_clusters(seed=0)
    for name, dim in (("w1", 1), ("w2", 0)):
        assert torch.equal(before[name].index_select(dim, order), getattr(ffn, name))
