"""The layer as operators of PyTorch: well formed, traced whole, the same under its transformations."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

from replicate import SPARSITY_PRESETS, SparseFFN, SparsityConfig
from replicate.config import ModelConfig
from replicate.gpt import GPT
from replicate.kernels import backend as engines
from replicate.kernels import operators
from replicate.kernels.execution import Execution, execution

pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE, BACKEND = ("cuda", "auto") if GPU else ("cpu", "triton")
HALF = torch.bfloat16 if GPU else torch.float16
D_MODEL, D_FF, TOKENS = 64, 256, 64
# One of each family, with and without scales, clusters and operands that are read twice.
CONFIGS = {
    **{
        n: SPARSITY_PRESETS[n]
        for n in ("w1+w2+t", "act24", "tile24", "all24", "venom16", "recipe", "active16", "static16")
    },
    "recipe, same, scaled": replace(SPARSITY_PRESETS["recipe, same"], weight_scale=True),
    "act24 and W2^T": SparsityConfig(w2_t=True, activation="24"),
    "venom16, cosine": replace(SPARSITY_PRESETS["venom16"], metric="cosine"),
    "FP8": SparsityConfig(activation="venom", n_clusters=4, top_k=2, fp8=True),
    "FP8, by activations": SparsityConfig(
        activation="venom", n_clusters=4, top_k=2, routing="activation", fp8=True
    ),
}
EXPERTS = replace(SPARSITY_PRESETS["venom16"], routing="learned", inner=False)  # more in test_experts.py


def layer(config, backend=BACKEND, seed=1):
    torch.manual_seed(seed)
    ffn = SparseFFN(D_MODEL, D_FF, config, backend=backend)
    if config.activation == "venom":
        ffn.make_clusters(seed)
    ffn.phase = "sparse"
    return ffn.to(DEVICE)


def tokens(seed=2):
    return torch.randn(TOKENS, D_MODEL, generator=torch.Generator().manual_seed(seed)).to(DEVICE, HALF)


def arguments(ffn, x, sparse=None):
    """What the layer calls its operator with; `sparse` stands in for what a GPU's plans would say."""
    how = execution(ffn.formats, engines.requested(ffn.backend), x.device, x.dtype, len(x), D_MODEL, D_FF)
    if sparse is not None:
        how = replace(Execution.parse(how), sparse=sparse).text
    c = ffn.config
    scale = ffn.scale / ffn.scaled if c.weight_scale else None
    clusters = ffn.fixed_clusters() if c.activation == "venom" and c.routing == "static" else None
    return [x, ffn.w1, ffn.w2, scale, clusters, None, [], how]


def gradients(fn, ffn, x):
    """y3, dx, dW1, dW2."""
    x = x.detach().requires_grad_()
    y3 = fn(x)
    dy3 = torch.randn(y3.shape, generator=torch.Generator().manual_seed(3)).to(y3)
    return y3.detach(), *torch.autograd.grad(y3, (x, ffn.w1, ffn.w2), dy3)


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_operators_are_well_formed(name, zeroed):
    """Schema, derivative, and the shapes that tracing expects."""
    torch.library.opcheck(operators._forward, arguments(layer(CONFIGS[name]), tokens()))


@pytest.mark.parametrize("name", ["recipe, same, scaled", "act24 and W2^T"])
def test_weights_may_be_held_or_in_half_precision(name, zeroed):
    ffn = layer(CONFIGS[name])
    x, w1, w2, scale, clusters, _, _, how = arguments(ffn, tokens())
    torch.library.opcheck(operators._operands, (w1.detach(), w2.detach(), scale, HALF, how))
    held = operators.operands(w1, w2, scale, HALF, how)
    torch.library.opcheck(operators._forward, (x, w1, w2, scale, clusters, None, held, how))
    half = [w.detach().to(HALF).requires_grad_() for w in (w1, w2)]
    torch.library.opcheck(operators._forward, (x, *half, scale, clusters, None, [], how))


@pytest.mark.parametrize("selection", ["magnitude", "tile"])
@pytest.mark.parametrize("sparse", [(), ("w1", "w2_t", "y2", "dy1"), ("y2",), ("w1", "dy1")])
def test_saved_shapes_follow_from_the_execution(selection, sparse, zeroed):
    """Whichever products a GPU would run on sparse tensor cores; elsewhere all run dense."""
    ffn = layer(SparsityConfig(w1=True, w2_t=True, activation="24", selection=selection))
    args = arguments(ffn, tokens(), sparse)
    torch.library.opcheck(operators._forward, args)
    y3, saved = operators._forward(*args)
    kept = operators._weights(ffn.w1, ffn.w2, None, HALF, args[-1]).kept()
    assert len(saved) == 1 + ("y2" not in sparse) + len(kept)
    assert torch.equal(y3, operators._forward(*arguments(ffn, tokens(), ()))[0])


def test_an_execution_is_read_back():
    formats = layer(SPARSITY_PRESETS["recipe"]).formats
    for how in (Execution(formats), Execution(formats, "triton", "vendor", ("w1", "dy1"), 32)):
        assert Execution.parse(how.text) == how
        assert how.config == SPARSITY_PRESETS["recipe"]


def model(config, backend):
    torch.manual_seed(1)
    shape = ModelConfig(
        vocab_size=32, n_layer=1, d_model=D_MODEL, d_ff=D_FF, n_head=2, seq_len=64, sparsity=config
    )
    net = GPT(shape)
    for ffn in net.ffns():
        if config.activation == "venom":
            ffn.make_clusters(1)
    net.set_backend(backend)
    return net.to(DEVICE)


def trained(net, forward, phases, accumulate=1):
    """Losses of a few steps of AdamW, under autocast; the phase changes as `phases` says."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    draw, losses = torch.Generator().manual_seed(4), []
    for phase in phases:
        net.set_phase(phase)
        net.hold_weights(accumulate > 1)
        for _ in range(accumulate):
            idx = torch.randint(32, (1, 65), generator=draw).to(DEVICE)
            with torch.autocast(DEVICE, HALF):
                loss = forward(idx[:, :-1], idx[:, 1:])[1]
            loss.backward()
            losses.append(loss.item())
        net.hold_weights(False)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("backend", [BACKEND, "reference"])
@pytest.mark.parametrize("name", ["dense", *CONFIGS, "experts"])
def test_a_model_compiles_in_one_piece(name, backend):
    """fullgraph=True; equal losses as the weights change; one graph a phase, however many steps."""
    config = (CONFIGS | {"dense": SPARSITY_PRESETS["dense"], "experts": EXPERTS})[name]
    if backend == "reference" and (config.wgrad != "dense" or config.selection == "tile"):
        pytest.skip("tokens choose apart from compiled code")
    graphs = []

    def traced(graph, _):
        graphs.append(graph)
        return graph.forward

    phases = ["dense", "sparse", "sparse", "dense"]
    plain = model(config, backend)
    expected = trained(plain, plain, phases)
    torch._dynamo.reset()
    net = model(config, backend)
    assert trained(net, torch.compile(net, fullgraph=True, dynamic=False, backend=traced), phases) == expected
    assert len(graphs) == (2 if config.any else 1)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["recipe", "act24", "tile24", "venom16", "active16"])
def test_compiled_code_takes_any_number_of_tokens(name):
    """The second number of tokens makes it a variable, unless 2:4 products are planned by shape."""
    ffn, graphs = layer(CONFIGS[name]), []

    def traced(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(ffn, fullgraph=True, backend=traced)
    for n in (64, 128, 192):
        x = tokens()[:1].repeat(n, 1) + torch.arange(n, device=DEVICE, dtype=HALF)[:, None] / n
        assert torch.equal(compiled(x), ffn(x))
    planned = GPU and name in ("recipe", "act24", "tile24")
    assert len(graphs) == (3 if planned else 2)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["recipe", "act24", "FP8"])
def test_micro_batches_share_operands_in_compiled_code(name):
    """The first makes them, the others read them: two graphs, not one a micro-batch."""
    graphs = []

    def traced(graph, _):
        graphs.append(graph)
        return graph.forward

    plain = model(CONFIGS[name], BACKEND)
    expected = trained(plain, plain, ["sparse"] * 2, accumulate=2)
    torch._dynamo.reset()
    net = model(CONFIGS[name], BACKEND)
    compiled = torch.compile(net, fullgraph=True, dynamic=False, backend=traced)
    assert trained(net, compiled, ["sparse"] * 2, accumulate=2) == expected
    assert len(graphs) == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["recipe", "act24", "venom16"])
def test_inductor_computes_the_same(name):
    ffn = layer(CONFIGS[name])
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: 2 * ffn(x / 2), fullgraph=True)
    ours, plain = gradients(compiled, ffn, tokens()), gradients(lambda x: 2 * ffn(x / 2), ffn, tokens())
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).float().norm() <= 1e-3 * b.float().norm()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_and_copies(name):
    ffn, x = layer(CONFIGS[name]), tokens()
    plain = gradients(ffn, ffn, x)
    assert equal(gradients(lambda x: checkpoint(ffn, x, use_reentrant=False), ffn, x), plain)
    twin = copy.deepcopy(ffn)
    assert equal(gradients(twin, twin, x), plain)


@pytest.mark.parametrize("backend", [BACKEND, "reference"])
@pytest.mark.parametrize("name", ["recipe", "act24", "w1+w2+t", "venom16"])
def test_torch_func_differentiates_once(name, backend):
    ffn, x = layer(CONFIGS[name], backend), tokens()
    weights = {key: w.detach() for key, w in ffn.named_parameters()}

    def loss(weights):
        return functional_call(ffn, weights, (x,)).float().square().sum()

    ffn(x).float().square().sum().backward()
    found = grad(loss)(weights)
    assert torch.equal(found["w1"], ffn.w1.grad) and torch.equal(found["w2"], ffn.w2.grad)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad(lambda weights: sum(g.square().sum() for g in grad(loss)(weights).values()))(weights)
