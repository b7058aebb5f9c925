"""SparseFFN by kernels against SparseFFN by its reference: outputs, gradients, choice of engine, refresh.

On a CPU the kernels run in Triton's interpreter, in float16; on a GPU in bfloat16 and with cuSPARSELt.
"""

import copy
from dataclasses import replace

import pytest
import torch

from replicate import SPARSITY_PRESETS, SparseFFN, SparsityConfig
from replicate.kernels import backend as engines
from replicate.kernels import layer as fused_ffn
from replicate.system.graph_time import captured

pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKEND = "auto" if GPU else "triton"
HALF = torch.bfloat16 if GPU else torch.float16
TOLERANCE = 2e-2 if GPU else 4e-3
D_MODEL, D_FF, TOKENS = 64, 256, 128

NAMES = [
    *("w1", "w1+w1t", "w2", "w2+w2t", "w1+w2", "w1+w2+t", "act24", "act24+tile", "all24"),
    *("venom16", "venom32", "venom64", "recipe", "recipe32", "recipe64", "static16"),
    *("active16", "active64", "active16x32", "w1, same", "w2, same", "recipe, same"),
]
OTHERS = {
    "recipe, hard": replace(SPARSITY_PRESETS["recipe"], weight_method="hard"),
    "recipe, scaled": replace(SPARSITY_PRESETS["recipe"], weight_scale=True),
    "recipe, no inner": replace(SPARSITY_PRESETS["recipe"], inner=False),
    "recipe, cosine": replace(SPARSITY_PRESETS["recipe"], metric="cosine"),
    "W1 and Venom": SparsityConfig(w1=True, activation="venom", backward="whole"),
    "W1 and Venom by activations": SparsityConfig(w1=True, activation="venom", routing="activation"),
    "recipe by activations": replace(SPARSITY_PRESETS["recipe"], routing="activation"),
    "no inner, by activations": replace(SPARSITY_PRESETS["active16"], inner=False),
    "W2^T and Venom": SparsityConfig(w2_t=True, activation="venom"),
    "act24 and W1": SparsityConfig(w1=True, activation="24"),
    "act24 and both weights": SparsityConfig(w1=True, w2_t=True, activation="24", backward="whole"),
    "W2^T, same": SparsityConfig(w2_t=True),
    "recipe, scaled, same": replace(SPARSITY_PRESETS["recipe, same"], weight_scale=True),
    "W1 and Venom, same": SparsityConfig(w1=True, activation="venom"),
    "act24 and both weights, same": SparsityConfig(w1=True, w2_t=True, activation="24"),
    "act24, tiles of neighbours": SparsityConfig(activation="24", wgrad="tile", wgrad_permute=False),
    "tile24": SPARSITY_PRESETS["tile24"],
    "tile24 and both weights": SparsityConfig(w1=True, w2_t=True, activation="24", selection="tile"),
}
FP8 = SparsityConfig(activation="venom", n_clusters=4, top_k=2, fp8=True)  # needs clusters of 32 neurons
OTHERS |= {
    "FP8": FP8,
    "FP8, no inner": replace(FP8, inner=False),
    "FP8, static": replace(FP8, routing="static"),
    "FP8, by activations": replace(FP8, routing="activation"),
}
CONFIGS = {**{name: SPARSITY_PRESETS[name] for name in NAMES}, **OTHERS}


def layer(config, backend, seed=1, d_model=D_MODEL, d_ff=D_FF):
    """A sparse-phase layer on a 1/512 grid of weights, so that casting them to half precision is exact."""
    torch.manual_seed(seed)
    ffn = SparseFFN(d_model, d_ff, config, backend=backend)
    with torch.no_grad():
        for w in (ffn.w1, ffn.w2):
            w.copy_(torch.randint(-64, 65, w.shape) / 512)
    if config.activation == "venom":
        ffn.make_clusters(seed)
    ffn.phase = "sparse"
    return ffn.to(DEVICE)


def tokens(n=TOKENS, d_model=D_MODEL, seed=2):
    """Inputs whose scores differ clearly between clusters: a tie is broken one way by all precisions."""
    return torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def run(ffn, x, dtype):
    """y3, dx, dW1, dW2 of one pass in `dtype`."""
    x = x.to(dtype).requires_grad_()
    y3 = ffn(x)
    dy3 = torch.randn(y3.shape, generator=torch.Generator().manual_seed(3)).to(y3)
    return y3.detach(), *torch.autograd.grad(y3, (x, ffn.w1, ffn.w2), dy3)


def distances(ours, reference):
    """Relative Frobenius distance of each pair."""
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(ours, reference)]


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_the_references(name):
    """As close to the float32 reference as the reference in half precision is, or nearly."""
    config = CONFIGS[name]
    tiles = "tile" in (config.wgrad, config.selection)
    near = 3 if tiles else 2  # rounding decides between tiles of nearly equal sums
    x = tokens().to(HALF).float()
    exact = run(layer(config, "reference"), x, torch.float32)
    half = distances(run(layer(config, "reference"), x, HALF), exact)
    ours = layer(config, BACKEND)
    assert fused_ffn.choose(ours, x.to(HALF)) != "reference"
    results = run(ours, x, HALF)
    assert [r.dtype for r in results] == [HALF, HALF, torch.float32, torch.float32]
    for mine, theirs in zip(distances(results, exact), half, strict=True):
        assert mine <= max(near * theirs, TOLERANCE)


@pytest.mark.parametrize("name", ["act24", "recipe", "venom16", "active16", "w1+w2+t", "FP8"])
@pytest.mark.parametrize("n", [1, 8, 37])
def test_any_number_of_tokens(name, n):
    x = tokens(n).to(HALF).float()
    exact = run(layer(CONFIGS[name], "reference"), x, torch.float32)
    limit = 5 if name == "FP8" else 2  # its rounding makes a last bit a sixteenth
    assert max(distances(run(layer(CONFIGS[name], BACKEND), x, HALF), exact)) <= limit * TOLERANCE


@pytest.mark.parametrize(
    "name", ["act24", "act24+tile", "tile24", "recipe", "venom16", "active16", "w1+w2+t", "FP8"]
)
def test_no_tokens_at_all(name):
    y3, dx, dw1, dw2 = run(layer(CONFIGS[name], BACKEND), tokens(0), HALF)
    assert y3.shape == dx.shape == (0, D_MODEL)
    assert not dw1.any() and not dw2.any()
    described = fused_ffn.describe(layer(CONFIGS[name], BACKEND), tokens(0).to(HALF))
    assert described == "reference (there are no tokens)"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["act24", "act24+tile", "tile24", "recipe", "venom16", "w1+w2+t", "FP8"])
def test_a_pass_after_an_optimiser_step_sees_the_new_weights(name, fused):
    """Fused AdamW changes weights without counting it in their version."""
    ffn, x = layer(CONFIGS[name], BACKEND), tokens()
    optimizer = torch.optim.AdamW(ffn.parameters(), lr=0.1, fused=fused)
    before = run(ffn, x, HALF)
    ffn(x.to(HALF)).square().sum().backward()
    optimizer.step()
    fresh = layer(CONFIGS[name], BACKEND)
    fresh.load_state_dict(ffn.state_dict())
    after = run(ffn, x, HALF)
    for mine, theirs in zip(after, run(fresh, x, HALF), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("name", ["act24", "recipe", "w1+w2+t", "FP8"])
def test_operands_are_shared_while_the_weights_are_held(name):
    ffn, x = layer(CONFIGS[name], BACKEND), tokens()
    before = run(ffn, x, HALF)
    assert ffn.operands is None
    ffn.hold = True
    held = run(ffn, x, HALF)
    kept = ffn.operands
    again = run(ffn, x, HALF)
    assert kept is not None and ffn.operands is kept
    for one, two, three in zip(before, held, again, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    ffn.hold = False
    assert ffn.operands is None


def test_a_copy_of_the_layer_has_its_own_operands():
    ffn, x = layer(CONFIGS["recipe"], BACKEND), tokens()
    before = run(ffn, x, HALF)
    twin = copy.deepcopy(ffn)
    with torch.no_grad():
        twin.w1.mul_(2)
    assert not torch.equal(run(twin, x, HALF)[0], before[0])
    assert torch.equal(run(ffn, x, HALF)[0], before[0])


def test_changing_a_weight_between_forward_and_backward_is_an_error():
    for name in ("act24", "recipe"):
        ffn, x = layer(CONFIGS[name], BACKEND), tokens().to(HALF).requires_grad_()
        y3 = ffn(x)
        with torch.no_grad():
            ffn.w1.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y3.sum().backward()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"selection": "learned"}, "selection 'learned'"),
        ({"routing": "oracle-block"}, "routing 'oracle-block'"),
        ({"mask_reuse": False}, "mask_reuse=False"),
        ({"wgrad": "24"}, "wgrad '24'"),
    ],
)
def test_what_has_no_kernel_runs_by_the_reference_or_says_so(changes, reason):
    config = replace(SPARSITY_PRESETS["venom16"], **changes)
    ffn, x = layer(config, BACKEND if not GPU else "triton"), tokens().to(HALF)
    with pytest.raises(ValueError, match=reason):
        ffn(x)
    ffn.backend = "reference"
    assert ffn(x).isfinite().all()
    assert fused_ffn.why_not(ffn, x).startswith(reason)


def test_shapes_and_dtypes_without_kernels_are_named():
    ffn = layer(SPARSITY_PRESETS["act24"], "triton", d_model=68, d_ff=256)
    with pytest.raises(ValueError, match="multiples of 64, not 68 and 256"):
        ffn(tokens(d_model=68).to(HALF))
    with pytest.raises(ValueError, match="float32"):
        layer(SPARSITY_PRESETS["recipe"], "triton")(tokens())
    with pytest.raises(ValueError, match="16 neurons and d_model 64 are no multiples of 32"):
        layer(replace(FP8, n_clusters=16, top_k=4), "triton")(tokens().to(HALF))
    for name in ("act24+tile", "tile24"):
        with pytest.raises(ValueError, match="65 tokens are no multiple of 64"):
            layer(SPARSITY_PRESETS[name], "triton")(tokens(65).to(HALF))


def test_statistics_read_all_of_y2_by_the_reference():
    ffn, x = layer(SPARSITY_PRESETS["recipe"], BACKEND), tokens().to(HALF)
    ffn.collect = True
    assert fused_ffn.choose(ffn, x) == "reference"
    ffn(x)
    assert 0.8 < ffn.stats()["kept_sparsity"] < 1


def test_on_a_cpu_the_reference_is_the_default():
    ffn = SparseFFN(D_MODEL, D_FF, SPARSITY_PRESETS["act24"])
    ffn.phase = "sparse"
    assert fused_ffn.choose(ffn, torch.randn(4, D_MODEL)) == "reference"
    assert fused_ffn.describe(ffn, torch.randn(4, D_MODEL)).startswith("reference (2:4 needs float16")


def test_the_variable_decides_where_the_layer_does_not(monkeypatch):
    for name in ("triton", "reference"):
        monkeypatch.setenv("REPLICATE_BACKEND", name)
        assert fused_ffn.choose(layer(CONFIGS["act24"], "auto"), tokens().to(HALF)) == name


def test_the_line_names_formats_and_engines():
    ffn = layer(SPARSITY_PRESETS["recipe"], BACKEND)
    line = fused_ffn.describe(ffn, tokens().to(HALF))
    best = engines.select(DEVICE, BACKEND)
    assert line == f"2:4 by {best}, venom by triton"


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        layer(SPARSITY_PRESETS["act24"], "cuda")(tokens().to(HALF))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["act24", "act24+tile", "tile24", "recipe", "venom16", "w1+w2+t", "FP8"])
def test_a_cuda_graph_replays_with_the_weights_of_its_time(name):
    d_model, d_ff, n = 512, 2048, 2048
    ffn = layer(CONFIGS[name], "auto", d_model=d_model, d_ff=d_ff)
    x = tokens(n, d_model).to(HALF).requires_grad_()
    dy3 = torch.randn_like(x)

    def step():
        y3 = ffn(x)
        return y3, *torch.autograd.grad(y3, (x, ffn.w1, ffn.w2), dy3)

    graph, found = captured(step)
    with torch.no_grad():
        ffn.w1.mul_(-0.5)
        ffn.w2.mul_(2)
    graph.replay()
    for mine, theirs in zip(found, step()):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["act24", "recipe"])
def test_named_cusparselt_runs_every_two_four_product_there(name):
    config, d_model, d_ff, n = CONFIGS[name], 512, 2048, 2048
    x = tokens(n, d_model).to(HALF).float()
    reference = layer(config, "reference", d_model=d_model, d_ff=d_ff)
    exact = run(reference, x, torch.float32)
    half = distances(run(reference, x, HALF), exact)  # a few tokens' clusters differ already here
    ours = distances(run(layer(config, "cusparselt", d_model=d_model, d_ff=d_ff), x, HALF), exact)
    assert all(mine <= max(1.5 * theirs, TOLERANCE) for mine, theirs in zip(ours, half, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["act24", "tile24", "recipe", "venom16", "FP8"])
def test_under_torch_compile(name):
    ffn, x = layer(CONFIGS[name], "auto"), tokens()
    eager = run(ffn, x, HALF)
    compiled = torch.compile(ffn)
    x = x.to(HALF).requires_grad_()
    y3 = compiled(x)
    dy3 = torch.randn(y3.shape, generator=torch.Generator().manual_seed(3)).to(y3)
    ours = (y3.detach(), *torch.autograd.grad(y3, (x, ffn.w1, ffn.w2), dy3))
    assert max(distances(ours, eager)) <= 1e-3
