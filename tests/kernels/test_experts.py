"""A mixture of experts by kernels against its masks: outputs, all gradients, its load, compiled and captured.

On a CPU in Triton's interpreter, in float32 and float16; on a GPU also in bfloat16.
"""

import copy

import pytest
import torch
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

from replicate.config import SparsityConfig
from replicate.experts import mixture
from replicate.ffn import SparseFFN
from replicate.kernels import layer as fused_ffn
from replicate.kernels import operators
from replicate.kernels.execution import execution
from replicate.kernels.venom.gates import gate_factors, gate_gradient, gate_gradient_reference
from replicate.kernels.venom.token_lists import token_lists
from replicate.kernels.venom.up import venom_up, venom_up_backward
from replicate.system.graph_time import captured

pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
D_MODEL = 32
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
NAMES = ("y3", "dx", "dW1", "dW2", "d router")
# tokens, clusters, top_k, width of a cluster
SHAPES = [
    (60, 4, 2, 32),
    (37, 4, 1, 24),  # nothing a multiple of anything
    (70, 3, 3, 40),  # all clusters
    (1, 8, 3, 16),
    (200, 8, 5, 16),
]


def layer(n, k, width, seed=1, backend="triton"):
    """A sparse-phase layer whose gates differ clearly from 1 and from each other."""
    torch.manual_seed(seed)
    formats = SparsityConfig(activation="venom", routing="learned", inner=False, n_clusters=n, top_k=k)
    ffn = SparseFFN(D_MODEL, n * width, formats, backend=backend)
    with torch.no_grad():
        ffn.experts.weight.mul_(3)
        for w in (ffn.w1, ffn.w2):
            w.copy_(torch.randint(-64, 65, w.shape) / 512)
    ffn.clustered.fill_(n)
    ffn.phase = "sparse"
    return ffn.to(DEVICE)


def tokens(n, dtype=torch.float32, seed=2):
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def results(fn, ffn, x):
    """What NAMES say of one pass; afterwards the bias is as it was."""
    before, x = ffn.experts.bias.clone(), x.detach().requires_grad_()
    y3 = fn(x)
    dy3 = torch.randn(y3.shape, generator=torch.Generator().manual_seed(3)).to(y3)
    found = torch.autograd.grad(y3, (x, ffn.w1, ffn.w2, ffn.experts.weight), dy3)
    ffn.experts.bias.copy_(before)
    return y3.detach(), *found


def assert_close(ours, theirs, tolerance):
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        assert a.isfinite().all(), name
        error = ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()
        assert error <= tolerance or b.abs().max() < 1e-6, f"{name}: relative error {error:.1e}"


def test_the_line_says_who_computes():
    ffn = layer(4, 2, 16)
    assert fused_ffn.describe(ffn, tokens(8)) == "sampled by triton, venom by triton"
    ffn.hold = True
    with torch.no_grad():  # decoding knows no gates
        assert fused_ffn.choose(ffn, tokens(1)) == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_the_mixtures(shape, dtype, poison):
    """No entry of uninitialised memory, of padding for one, reaches a result."""
    n_tokens, n, k, width = shape
    ffn, x = layer(n, k, width), tokens(n_tokens, dtype)
    exact = results(lambda x: mixture(ffn, x), ffn, x.float())
    assert_close(results(ffn, ffn, x), exact, TOLERANCE[dtype])


def test_clusters_without_tokens(poison):
    ffn, x = layer(6, 2, 16), tokens(40)
    ffn.experts.bias[1], ffn.experts.bias[5] = -9, -9
    expected = results(lambda x: mixture(ffn, x), ffn, x)
    ours = results(ffn, ffn, x)
    assert_close(ours, expected, 1e-5)
    assert not ours[2][:, 16:32].any() and not ours[3][80:].any() and not ours[4][5].any()


def test_one_expert_alone_has_gate_one():
    """So that its router learns nothing; and one of one is the dense layer."""
    ffn, x = layer(1, 1, 64), tokens(20)
    y3, *_, router = results(ffn, ffn, x)
    torch.testing.assert_close(y3, (x @ ffn.w1).relu().square() @ ffn.w2)
    assert router.abs().max() < 1e-6


def test_the_gradient_of_gates_is_their_slope():
    """By finite differences of the operator, gate by gate, with gates that no router makes."""
    ffn, x = layer(4, 2, 16), tokens(6)
    how = execution(ffn.formats, "triton", x.device, x.dtype, 0, *ffn.w1.shape)
    clusters = torch.rand(6, 4, generator=torch.Generator().manual_seed(4)).argsort(1)[:, :2].to(DEVICE)
    gates = (torch.rand(6, 2, generator=torch.Generator().manual_seed(5)) + 0.3).to(DEVICE).requires_grad_()

    def loss(gates):
        y3 = operators.sparse_ffn(x, ffn.w1, ffn.w2, None, clusters, gates, [], how)
        return (y3.double() * torch.arange(D_MODEL, device=DEVICE)).sum()

    (slopes,) = torch.autograd.grad(loss(gates), gates)
    for t in range(6):
        for j in range(2):
            step = torch.zeros_like(gates)
            step[t, j] = 0.1  # y3 is linear in a gate
            slope = (loss(gates + step) - loss(gates - step)) / 0.2
            torch.testing.assert_close(slopes[t, j].double(), slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width", [8, 24, 520])
def test_the_gradient_by_kernel_is_the_references(width, poison):
    clusters = torch.rand(70, 5, generator=torch.Generator().manual_seed(4)).argsort(1)[:, :2].to(DEVICE)
    lists, gates = token_lists(clusters, 5, 16), torch.rand(70, 2).to(DEVICE) + 0.1
    gates[3, 1] = 0
    factor = gate_factors(gates, lists)
    assert torch.equal(factor[lists.inverse.long()], gates.sqrt())
    w1 = torch.randn(D_MODEL, 5 * width).to(DEVICE) / 8
    kept = venom_up(tokens(70), w1, lists, inner=False, factor=factor)
    dy1 = venom_up_backward(tokens(70, seed=6), w1.T.contiguous(), kept, lists, factor=factor)
    ours = gate_gradient(dy1, kept, factor, lists)
    assert ours[3, 1] == 0
    torch.testing.assert_close(ours, gate_gradient_reference(dy1, kept, factor, lists))


def test_a_router_gone_wrong_is_seen():
    ffn, x = layer(4, 2, 16), tokens(8)
    with torch.no_grad():
        ffn.experts.weight[1] = float("nan")
    y3, *_, router = results(ffn, ffn, x)
    assert y3.isnan().any() and router.isnan().any()


def test_gates_and_routing_learned_need_each_other():
    x, lists = tokens(8), token_lists(torch.zeros(8, 1, dtype=torch.int32, device=DEVICE), 2, 16)
    with pytest.raises(ValueError, match=r"gates must be \[8, 1\]"):
        gate_factors(torch.ones(8, 2, device=DEVICE), lists)
    ffn = layer(4, 2, 16)
    how = execution(ffn.formats, "triton", x.device, x.dtype, 0, *ffn.w1.shape)
    with pytest.raises(ValueError, match="got routing 'learned', clusters=False, gates=False"):
        operators.sparse_ffn(x, ffn.w1, ffn.w2, None, None, None, [], how)
    with pytest.raises(ValueError, match="got routing 'token', clusters=False, gates=True"):
        other = how.replace('"learned"', '"token"')
        operators.sparse_ffn(x, ffn.w1, ffn.w2, None, None, torch.ones(8, 2, device=DEVICE), [], other)


def test_the_load_is_evened_as_by_masks_and_only_with_gradients():
    ours, masks, x = layer(4, 2, 16), layer(4, 2, 16), tokens(50)
    with torch.no_grad():
        ours(x)
    assert not ours.experts.bias.any()
    for _ in range(3):
        ours(x), mixture(masks, x)
    assert ours.experts.bias.any() and torch.equal(ours.experts.bias, masks.experts.bias)


def test_weights_may_be_held():
    ffn, x = layer(4, 2, 16), tokens(50, torch.float16)
    before = results(ffn, ffn, x)
    ffn.hold = True
    held, again = results(ffn, ffn, x), results(ffn, ffn, x)
    assert ffn.operands is not None
    for one, two, three in zip(before, held, again, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_checkpointing_and_copies():
    ffn, x = layer(4, 2, 16), tokens(50)
    plain = results(ffn, ffn, x)
    twin = copy.deepcopy(ffn)
    ffn.experts.even_out = twin.experts.even_out = lambda chosen: None  # or a recomputation chooses anew
    for fn, owner in ((lambda x: checkpoint(ffn, x, use_reentrant=False), ffn), (twin, twin)):
        for a, b in zip(results(fn, owner, x), plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_torch_func_differentiates(backend):
    """If it is given the bias, which a pass moves. Kernels have no second derivative, masks have one."""
    ffn, x = layer(4, 2, 16, backend=backend), tokens(50)
    weights = {key: w.detach() for key, w in ffn.named_parameters()}

    def loss(weights, bias):
        return functional_call(ffn, weights | {"experts.bias": bias}, (x,)).square().sum()

    bias = ffn.experts.bias.clone()
    found = grad(loss)(weights, bias)
    assert bias.any() and not ffn.experts.bias.any()
    ffn(x).square().sum().backward()
    for name, w in ffn.named_parameters():
        torch.testing.assert_close(found[name], w.grad)
    if backend == "triton":
        with pytest.raises(NotImplementedError, match="no second derivative"):
            grad(lambda w, b: sum(g.square().sum() for g in grad(loss)(w, b).values()))(weights, bias)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_in_one_piece_of_compiled_code(backend):
    """Numbers, and the load, of the uncompiled layer; another number of tokens is a variable."""
    plain, compiled, graphs = layer(4, 2, 16, backend=backend), layer(4, 2, 16, backend=backend), []

    def traced(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fn = torch.compile(compiled, fullgraph=True, backend=traced)
    for n_tokens in (48, 80, 112):
        x = tokens(n_tokens).requires_grad_()
        for a, b in zip(results(fn, compiled, x), results(plain, plain, x), strict=True):
            torch.testing.assert_close(a, b)
        fn(x), plain(x)
        assert torch.equal(compiled.experts.bias, plain.experts.bias) and plain.experts.bias.any()
    assert len(graphs) == 2
    torch._dynamo.reset()


def test_inductor_computes_the_same():
    plain, compiled, x = layer(4, 2, 16), layer(4, 2, 16), tokens(48)
    torch._dynamo.reset()
    fn = torch.compile(lambda x: 2 * compiled(x / 2), fullgraph=True)
    expected = results(lambda x: 2 * plain(x / 2), plain, x)
    assert_close(results(fn, compiled, x), expected, 1e-5)
    fn(x), plain(x / 2)
    assert torch.equal(compiled.experts.bias, plain.experts.bias) and plain.experts.bias.any()
    torch._dynamo.reset()


def test_the_operator_is_well_formed(zeroed):
    """Schema, derivative of gates too, and the shapes that tracing expects; with held weights as well."""
    ffn, x = layer(4, 2, 16), tokens(40, torch.float16)
    clusters, gates = ffn.experts(x)
    gates = gates.detach().requires_grad_()
    how = execution(ffn.formats, "triton", x.device, x.dtype, 0, *ffn.w1.shape)
    held = operators.operands(ffn.w1, ffn.w2, None, x.dtype, how)
    for forms in ([], held):
        args = (x.requires_grad_(), ffn.w1, ffn.w2, None, clusters, gates, forms, how)
        torch.library.opcheck(operators._forward, args)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_pass_in_bfloat16_evens_out_the_load(compiled):
    """A replay reads the weights of its time and moves the bias, as a launched pass does."""
    ffn, x = layer(64, 8, 128, backend="auto"), tokens(4096, torch.bfloat16).requires_grad_()
    exact = results(lambda x: mixture(ffn, x), ffn, x.float())
    fn = torch.compile(ffn, fullgraph=True) if compiled else ffn
    assert fused_ffn.describe(ffn, x) == "sampled by triton, venom by triton"
    assert_close(results(fn, ffn, x), exact, TOLERANCE[torch.bfloat16])
    dy3 = torch.randn_like(x)

    def step():
        y3 = fn(x)
        return y3, *torch.autograd.grad(y3, (x, ffn.w1, ffn.w2, ffn.experts.weight), dy3)

    graph, found = captured(step)
    with torch.no_grad():
        ffn.w1.mul_(-0.5)
        ffn.experts.bias.normal_()
    before = ffn.experts.bias.clone()
    graph.replay()
    replayed = ffn.experts.bias.clone()
    ffn.experts.bias.copy_(before)
    for mine, theirs in zip(found, step(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(replayed, ffn.experts.bias) and not torch.equal(replayed, before)
