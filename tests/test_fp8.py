"""FP8: what is rounded and how, the dense layer in it, and that nothing else changes."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from replicate import fp8
from replicate.config import ModelConfig, SparsityConfig, TrainConfig
from replicate.ffn import SparseFFN
from replicate.gpt import GPT
from replicate.kernels import layer
from replicate.kernels.decode import ffn as decode
from replicate.settings.presets import SPARSITY_PRESETS, train_preset
from replicate.settings.text import config_hash, from_dict, to_dict, with_changes
from replicate.study import plans
from replicate.system.graph_time import captured

T, D, FF = 48, 32, 128
DENSE, VENOM = SPARSITY_PRESETS["fp8"], SPARSITY_PRESETS["venom16, fp8"]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def e4m3(v):
    """float64 to the nearest number of E4M3, ties to even: 3 bits after the first, exponents down to -6."""
    exponent = v.abs().clamp_min(2.0**-6).log2().floor()
    step = 2.0 ** (exponent - 3)
    return (v / step).round() * step


def expected(t, rows):
    """`rounded` by formula in float64."""
    most = t.double().abs().amax(1, keepdim=True) if rows else t.double().abs().max()
    scale = (most.float() / 448).double()
    scale = torch.where(most == 0, torch.ones_like(scale), scale)
    return e4m3(t.double() / scale) * scale


def make(config=DENSE, d_model=D, d_ff=FF, dtype=torch.float32, seed=0):
    ffn = SparseFFN(d_model, d_ff, config).to(dtype)
    with torch.no_grad():
        ffn.w1.copy_(normal(d_model, d_ff, seed=seed) / d_model**0.5)
        ffn.w2.copy_(normal(d_ff, d_model, seed=seed + 1) / d_ff**0.5)
    if config.activation == "venom":
        ffn.make_clusters(seed)
        ffn.phase = "sparse"
    return ffn


def gradients(ffn, x, dy3):
    x = x.clone().requires_grad_()
    y3 = ffn(x)
    return y3.detach(), *torch.autograd.grad(y3, (x, ffn.w1, ffn.w2), dy3.to(y3.dtype))


def relative(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


# Rounding


def test_e4m3_by_hand():
    t = torch.tensor([[448.0, 17.0, 18.9, 0.0, -1.06, 2.0**-9, 2.0**-10, 3 * 2.0**-10]])
    values, scale = fp8.quantise(t, rows=True)
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (1, 1)
    assert scale.item() == 1
    assert values.float().tolist() == [[448, 16, 18, 0, -1, 2.0**-9, 0, 2.0**-8]], "ties to even, subnormals"
    half, _ = fp8.quantise(t / 2, rows=True)
    assert torch.equal(half.float(), values.float()), "the scale takes up every power of two"


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rounding_against_the_formula(rows, dtype):
    t = normal(16, 64) * torch.logspace(-3, 3, 16).unsqueeze(1)
    t = t.to(dtype)
    t[3], t[5, ::2] = 0, 0
    values, scale = fp8.quantise(t, rows)
    assert scale.shape == ((16, 1) if rows else (1, 1)) and values.float().abs().max() == 448
    assert scale.flatten()[3 if rows else 0].item() != 0 and (not rows or scale[3] == 1)
    wide = values.double() * scale.double()
    at = (wide - expected(t, rows)).abs() > 1e-9 * wide.abs()
    assert at.double().mean() < 0.002, "float32 quotients next to a tie may fall on either side"
    assert fp8.rounded(t, rows).dtype == dtype
    assert relative(fp8.rounded(t, rows), wide) <= (
        4e-3 if dtype in (torch.bfloat16, torch.float16) else 1e-7
    )
    if not rows:
        return
    assert torch.equal(fp8.rounded(t, rows)[3], t[3]) and torch.equal(
        fp8.rounded(t[:7], rows), fp8.rounded(t, rows)[:7]
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(bad):
    t = normal(4, 16)
    t[1, 3] = bad
    out = fp8.rounded(t, rows=True)
    assert out[1].isnan().all() and out[[0, 2, 3]].isfinite().all()
    assert fp8.rounded(t, rows=False).isnan().all()
    ffn, x = make(), normal(T, D)
    x[7, 2] = bad
    y3, _, dw1, _ = gradients(ffn, x, normal(T, D, seed=1))
    assert y3[7].isnan().all() and y3[:7].isfinite().all() and not dw1.isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-42, 1e-39, 1e-36, 1e-30, 1e30, 3e38])
def test_any_size_of_numbers(size):
    t = size * normal(4, 64).clamp(-1, 1)
    out = fp8.rounded(t, rows=True)
    assert out.isfinite().all()
    assert torch.equal(out, 0 * t) if size < 5e-36 else relative(out, t) < 0.04


# The dense layer


def straight_through(t, rows):
    """R(t) with the gradient of t, by formula."""
    return t + (expected(t, rows).to(t.dtype) - t).detach()


def model(x, w1, w2):
    """y3 by autograd: both operands of products 1, 2, 3, 5 rounded, those of 4 and 6 not."""
    return _product(_product(x, w1).relu() ** 2, w2)


def _product(a, w):
    to_a = (a - a.detach()) @ expected(w.detach(), False).to(a.dtype)  # worth zero: carries the gradient
    if to_a.requires_grad:
        to_a.register_hook(lambda dy: expected(dy, True).to(dy.dtype))
    to_w = a.detach() @ w
    value = straight_through(a.detach(), True) @ straight_through(w.detach(), False)
    return to_a + to_w + (value - to_w).detach()


@pytest.mark.parametrize("seed", [0, 3])
def test_the_dense_layer_against_autograd(seed):
    ffn, x, dy3 = make(dtype=torch.float64, seed=seed), normal(T, D, dtype=torch.float64), None
    dy3 = normal(T, D, seed=seed + 9, dtype=torch.float64)
    ours = gradients(ffn, x, dy3)
    leaves = [t.detach().clone().requires_grad_() for t in (x, ffn.w1, ffn.w2)]
    y3 = model(*leaves)
    theirs = (y3.detach(), *torch.autograd.grad(y3, leaves, dy3))
    for name, a, b in zip(("y3", "dx", "dW1", "dW2"), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("config", [DENSE, VENOM], ids=["dense", "venom16"])
def test_the_error_is_that_of_three_bits_of_mantissa(config):
    """Rounding to 3 bits costs 2^-5 to 2^-4 at most, some 2.6 % of a normal number, in each operand."""
    half, whole = make(config, 64, 256), make(replace(config, fp8=False), 64, 256)
    x, dy3 = normal(256, 64, seed=2), normal(256, 64, seed=5)
    whole.load_state_dict(half.state_dict()) if config is DENSE else None
    assert torch.equal(half.w1, whole.w1)
    one = relative(fp8.rounded(x, True), x)
    assert 0.02 < one < 0.03
    found = [relative(a, b) for a, b in zip(gradients(half, x, dy3), gradients(whole, x, dy3), strict=True)]
    limits = (0.03, 0.15) if config is DENSE else (0.03, 0.35)  # where y1 changes, so does the choice
    assert all(limits[0] < error < limits[1] for error in found), found


def test_weight_gradients_read_operands_that_are_not_rounded():
    ffn, x, dy3 = make(dtype=torch.float64), normal(T, D, dtype=torch.float64), normal(T, D, seed=4).double()
    _, _, dw1, dw2 = gradients(ffn, x, dy3)
    relu_y1 = F.relu(fp8.product(x, ffn.w1.detach()))
    assert torch.equal(dw2, relu_y1.square().T @ dy3)
    dy1 = 2 * fp8.product(dy3, ffn.w2.detach().T) * relu_y1
    assert torch.equal(dw1, x.T @ dy1)


@pytest.mark.parametrize("shape", [(D,), (0, D), (1, D), (2, 3, D)])
def test_leading_axes_statistics_and_dtypes(shape):
    ffn, x = make(), normal(*shape)
    ffn.collect = True
    y3, dx, dw1, _ = gradients(ffn, x, normal(*shape, seed=1))
    assert y3.shape == dx.shape == shape and dw1.dtype == torch.float32
    y2 = F.relu(fp8.product(x.reshape(-1, D), ffn.w1.detach())).square()
    assert torch.equal(ffn.seen["y2"], y2.view(*shape[:-1], FF))
    with torch.autocast("cpu", torch.bfloat16):
        y3, dx, dw1, dw2 = gradients(ffn, x, normal(*shape, seed=1))
    assert (y3.dtype, dx.dtype, dw1.dtype, dw2.dtype) == (torch.bfloat16, *3 * [torch.float32])


def test_the_backward_pass_keeps_x_and_one_activation():
    kept, ffn, x = [], make(), normal(T, D).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ffn(x)
    own = [t for t in kept if t is not ffn.w1 and t is not ffn.w2]
    assert sorted(tuple(t.shape) for t in own) == sorted([(T, D), (T, FF)])


def test_a_second_derivative_is_refused():
    ffn, x = make(), normal(T, D).requires_grad_()
    (dx,) = torch.autograd.grad(ffn(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("config", [DENSE, VENOM], ids=["dense", "venom16"])
def test_compiled_is_eager(config):
    ffn, x, dy3 = make(config), normal(T, D), normal(T, D, seed=1)
    torch._dynamo.reset()
    whole = torch.compile(ffn, backend="aot_eager", fullgraph=True, dynamic=False)
    y3 = whole(leaf := x.clone().requires_grad_())
    ours = (y3, *torch.autograd.grad(y3, (leaf, ffn.w1, ffn.w2), dy3))
    assert all(map(torch.equal, ours, gradients(ffn, x, dy3)))


def test_who_multiplies(monkeypatch):
    """On FP8 tensor cores the operands lie as these read them; torch's CPU product stands in for them."""
    ffn, x, seen = make(), normal(T, D).bfloat16(), []
    right = torch._scaled_mm

    def watched(a, b, of_rows, of_columns, **how):
        assert a.is_contiguous() and b.t().is_contiguous() and of_columns.is_contiguous()
        assert of_rows.shape == (len(a), 1) and of_columns.shape == (1, b.shape[1])
        assert how == {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        seen.append((a.shape[1], b.shape[1]))
        return ((a.float() @ b.float()) * of_rows * of_columns).bfloat16()

    assert fp8.why_not(x.device, x.dtype, D, FF) == "cpu has no FP8 tensor cores"
    plain = gradients(ffn, x, normal(T, D, seed=1))
    monkeypatch.setattr(torch, "_scaled_mm", watched)
    assert torch.equal(ffn(x), plain[0]) and not seen
    monkeypatch.setattr(fp8, "why_not", lambda *_: "")
    for a, b in zip(gradients(ffn, x, normal(T, D, seed=1)), plain, strict=True):
        assert 0 < relative(a, b) < 0.03
    assert seen == [(D, FF), (FF, D), (D, FF), (FF, D)], "products 1, 2, 3 and 5"
    assert right is not watched
    for set_to in ("layer", "variable"):
        ffn.backend = "reference" if set_to == "layer" else None
        monkeypatch.setenv("REPLICATE_BACKEND", "auto" if set_to == "layer" else "reference")
        assert torch.equal(ffn(x), plain[0]) and len(seen) == 4


def test_a_backend_that_is_none(monkeypatch):
    ffn, x = make(), normal(T, D)
    with pytest.raises(ValueError, match=r"^backend is 'referense'; choose one of auto, reference"):
        fp8.dense_ffn(x, ffn.w1, ffn.w2, backend="referense")
    monkeypatch.setenv("REPLICATE_BACKEND", "referense")
    with pytest.raises(ValueError, match=r"^REPLICATE_BACKEND is 'referense'; choose one of auto, reference"):
        ffn(x)
    ffn.backend = "reference"  # the layer's own comes first
    assert ffn(x).shape == x.shape


@pytest.mark.parametrize(
    "found, reason", [((8, 0), "FP8 needs compute capability 8.9, not 8.0"), ((9, 0), "")]
)
def test_older_gpus_compute_by_the_reference(found, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)
    cuda = torch.device("cuda")
    assert fp8.why_not(cuda, torch.bfloat16, 32, 128) == reason == fp8.too_old(cuda)
    assert fp8.why_not(cuda, torch.float16, 32, 128)
    if not reason:
        assert fp8.why_not(cuda, torch.bfloat16, 24, 128).startswith("d_model 24 and d_ff 128")
    monkeypatch.setattr(fp8, "too_old", lambda device: reason)
    assert layer.why_not(make(VENOM, 64, 512), normal(T, 64)) == reason


def test_descriptions_say_fp8(monkeypatch):
    x = normal(T, 64)
    assert layer.describe(make(DENSE, 64, 256), x) == "reference (cpu has no FP8 tensor cores)"
    monkeypatch.setattr(fp8, "why_not", lambda *_: "")
    assert layer.describe(make(DENSE, 64, 256), x) == "dense in FP8 by torch._scaled_mm"
    monkeypatch.setattr(layer, "choose", lambda *_: "triton")
    assert layer.describe(make(VENOM, 64, 256), x) == "sampled by triton, venom by triton, in FP8"
    assert (
        layer.describe(make(SPARSITY_PRESETS["venom16"], 64, 256), x) == "sampled by triton, venom by triton"
    )
    assert "FP8" in decode.why_not(make(VENOM, 64, 256), x[:1])
    assert decode.why_not(make(SPARSITY_PRESETS["venom16"], 64, 256), x[:1]) == ""


# Sparse phase, training, configurations


def test_the_sparse_layer_without_routing_losses_is_the_dense_one():
    """One cluster, nothing pruned inside: the six products are those of the dense layer in FP8."""
    every = replace(VENOM, n_clusters=1, top_k=1, inner=False)
    ffn, x, dy3 = make(every, dtype=torch.float64), normal(T, D).double(), normal(T, D, seed=4).double()
    sparse = gradients(ffn, x, dy3)
    ffn.phase = "dense"
    before = ffn.w1.clone()
    for a, b in zip(sparse, gradients(ffn, x, dy3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    ffn.fold()
    assert torch.equal(ffn.w1, before), "folding rounds no weight"


def test_a_rule_that_reads_y2_reads_that_of_the_forward_pass():
    ffn, x = make(replace(VENOM, routing="activation"), 64, 256), normal(T, 64)
    y2 = F.relu(fp8.product(x, ffn.w1.detach())).square()
    assert torch.equal(ffn.clusters(x), ffn.clusters(x, y2))


@pytest.mark.parametrize("name", ["fp8", "venom16, fp8"])
def test_a_tiny_model_trains(name):
    shape = ModelConfig(
        n_layer=2, d_model=32, d_ff=128, n_head=2, seq_len=32, sparsity=SPARSITY_PRESETS[name]
    )
    torch.manual_seed(0)
    model, losses = GPT(shape), []
    for ffn in model.ffns():
        ffn.make_clusters(0)
    model.set_phase("sparse")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = (torch.arange(33) * 7 % 19).expand(4, -1)
    for _ in range(25):
        loss = model(text[:, :-1], text[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    other = GPT(shape)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(text[:, :-1])[0], model(text[:, :-1])[0])
    plain = GPT(replace(shape, sparsity=replace(shape.sparsity, fp8=False)))
    if shape.sparsity.any:
        with pytest.raises(RuntimeError, match="'fp8': True"):
            plain.load_state_dict(model.state_dict())
    model.set_phase("dense")
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(plain(text[:, :-1])[0], model(text[:, :-1])[0]), "the dense phase is in FP8 too"


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        *(({w: True}, f"{w} is True; fp8=True needs {w}=False") for w in ("w1", "w2", "w2_t", "w1_t")),
        ({"activation": "24"}, "activation is '24'; fp8=True needs activation='dense' or 'venom'"),
        ({"wgrad": "tile"}, "wgrad is 'tile'; fp8=True needs wgrad='dense'"),
        ({"activation": "venom", "selection": "soft"}, "selection is 'soft'; .* selection='magnitude'"),
        ({"activation": "venom", "mask_reuse": False}, "mask_reuse is False; .* mask_reuse=True"),
        ({"activation": "venom", "routing": "oracle-block"}, "'oracle-block'; .*'token' or 'static'"),
        ({"activation": "venom", "routing": "learned", "inner": False}, "routing is 'learned'; fp8=True"),
        ({"fp8": 1}, "type bool"),
    ],
)  # fmt: skip
def test_what_is_not_computed_in_fp8(changes, pattern):
    with pytest.raises(ValueError, match=pattern):
        SparsityConfig(**{"fp8": True, **changes})
    for routing in ("token", "static", "activation"):
        assert SparsityConfig(fp8=True, activation="venom", routing=routing).any
    assert not DENSE.any and DENSE.products() == SparsityConfig().products()
    with pytest.raises(ValueError, match="fp8=True needs activation='relu2', not 'gelu'"):
        ModelConfig(activation="gelu", sparsity=DENSE)


def test_a_configuration_without_fp8_is_written_as_before():
    assert "fp8" not in json.dumps(
        [to_dict(TrainConfig()), to_dict(ModelConfig()), to_dict(SparsityConfig())]
    )
    assert config_hash(train_preset("study10m")) == "8614b1afe0b78e4c"
    ours = train_preset("study10m", "fp8")
    assert to_dict(ours)["model"]["sparsity"]["fp8"] is True and from_dict(to_dict(ours)) == ours
    assert config_hash(ours) != config_hash(train_preset("study10m"))
    assert config_hash(with_changes(ours, {"model.sparsity.fp8": "no"})) == config_hash(
        train_preset("study10m")
    )


def test_the_study_has_arms_in_fp8():
    runs = [(name, c.model.sparsity, c.seed) for name, c in plans.queue("gpu") if "FP8" in name]
    assert sorted(runs, key=str) == [
        *(("dense, FP8", DENSE, seed) for seed in (1, 2, 3)),
        *(("venom16, FP8", VENOM, seed) for seed in (1, 2, 3)),
    ]
    assert plans.describe(train_preset("study10m", "fp8")) == "fp8 seed 1"


# On a GPU


@pytest.fixture
def hopper():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with FP8 tensor cores")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 256, 0])
def test_tensor_cores_multiply_what_is_rounded(hopper, tokens):
    for d_in, d_out, transposed in ((64, 256, False), (256, 64, True)):
        a = normal(tokens, d_in).to(hopper, torch.bfloat16)
        w = normal(*((d_out, d_in) if transposed else (d_in, d_out)), seed=1).to(hopper)
        w = w.T if transposed else w
        ours, exact = fp8.product(a, w, on_cores=True), fp8.product(a.float(), w)
        assert ours.dtype == torch.bfloat16 and ours.shape == exact.shape
        torch.testing.assert_close(ours.float(), exact, rtol=1e-2, atol=1e-2)
        assert not tokens or relative(ours, exact) < 4e-3
    a[:1] = float("nan")
    assert fp8.product(a, w, on_cores=True)[:1].isnan().all()


@pytest.mark.gpu
def test_the_layer_compiles_and_is_captured(hopper):
    ffn = make(DENSE, 256, 1024).to(hopper)
    x, dy3 = (normal(512, 256, seed=s).to(hopper, torch.bfloat16) for s in (2, 3))
    whole = torch.compile(ffn, fullgraph=True, dynamic=False)
    leaf = x.clone().requires_grad_()

    def step():
        y3 = whole(leaf)
        return y3.detach(), *torch.autograd.grad(y3, (leaf, ffn.w1, ffn.w2), dy3)

    graph, found = captured(step)
    graph.replay()
    ffn.backend = "reference"
    exact = gradients(ffn, x.float(), dy3.float())
    for ours, theirs in zip(found, exact, strict=True):
        assert 1e-4 < relative(ours, theirs) < 0.04
