"""A layer's few tokens by the kernels of decoding, in every family, against `SparseFFN.reference`."""

from dataclasses import replace

import pytest
import torch

from replicate import SPARSITY_PRESETS, SparseFFN, SparsityConfig
from replicate.kernels import layer as fused_ffn
from replicate.kernels.decode.ffn import decode_ffn, prepare, why_not

pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE, BACKEND = ("cuda", "auto") if GPU else ("cpu", "triton")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
D_MODEL, D_FF = 64, 256

ROUTED = {name: SPARSITY_PRESETS[name] for name in ("venom16", "static16", "active16", "recipe, same")}
FAMILIES = ROUTED | {
    "venom, no inner": replace(SPARSITY_PRESETS["venom64"], inner=False),
    "venom, cosine": SparsityConfig(activation="venom", n_clusters=4, top_k=1, metric="cosine"),
    "active, no inner": replace(SPARSITY_PRESETS["active16"], inner=False),
    "recipe": SPARSITY_PRESETS["recipe"],  # product 2 reads the stored W2
    "recipe, scaled": replace(SPARSITY_PRESETS["recipe, same"], weight_scale=True),
    "recipe, hard": replace(SPARSITY_PRESETS["recipe, same"], weight_method="hard"),
    "recipe by activations": replace(SPARSITY_PRESETS["recipe, same"], routing="activation"),
    "W1": SparsityConfig(w1=True),
    "W1^T, same": SparsityConfig(w1_t=True),  # pruned along F: read as it is
    "W2^T, same": SparsityConfig(w2_t=True),
    "w1+w2": SPARSITY_PRESETS["w1+w2"],
    "act24": SPARSITY_PRESETS["act24"],
    "act24+tile": SPARSITY_PRESETS["act24+tile"],
    "own gradient mask": SparsityConfig(activation="24", mask_reuse=False),
}


def layer(config, backend=BACKEND, dtype=torch.float32):
    """A sparse-phase layer on a grid of weights, so that casting them to half precision is exact."""
    torch.manual_seed(1)
    ffn = SparseFFN(D_MODEL, D_FF, config, backend=backend)
    with torch.no_grad():
        for w in (ffn.w1, ffn.w2):
            w.copy_(torch.randint(-64, 65, w.shape) / 512)
    if config.activation == "venom":
        ffn.make_clusters(1, torch.randn(50, D_MODEL))
    ffn.phase, ffn.hold = "sparse", True
    return ffn.to(DEVICE, dtype)


def tokens(n, dtype):
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)


def assert_close(ours, reference, dtype):
    assert ours.dtype == dtype and ours.shape == reference.shape and reference.any()
    error = ((ours.double() - reference.double()).norm() / reference.double().norm()).item()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_is_the_reference(name, dtype):
    ffn = layer(FAMILIES[name])
    for n in (1, 3) if dtype == torch.float32 or GPU else (1,):
        x = tokens(n, dtype)
        assert fused_ffn.choose(ffn, x) == "decode"
        assert_close(ffn(x), ffn.reference(x.float()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "n"), [*((name, 16) for name in ROUTED), ("venom16", 64)])
@torch.no_grad()
def test_more_tokens_share_clusters(name, n, dtype):
    ffn, x = layer(ROUTED[name]), tokens(n, dtype)
    x[n // 2 :] = x[: n // 2]  # equal tokens choose equally
    y3 = ffn(x)
    assert_close(y3, ffn.reference(x.float()), dtype)
    assert_close(y3[n // 2 :], y3[: n // 2], dtype)


@torch.no_grad()
def test_a_token_of_zeros_ties_all_clusters():
    ffn = layer(FAMILIES["venom16"])
    assert not ffn(tokens(2, torch.float32).zero_()).any()
    x = tokens(3, torch.float32)
    x[1] = 0
    assert_close(ffn(x), ffn.reference(x), torch.float32)


@torch.no_grad()
def test_only_what_is_chosen_is_read():
    """With all other clusters' weights NaN nothing changes."""
    ffn = layer(SparsityConfig(activation="venom", n_clusters=8, top_k=2, routing="static", inner=False))
    x, chosen = tokens(3, torch.float32), set(ffn.fixed_clusters().tolist())
    before = ffn(x)
    weights = prepare(ffn, torch.float32)
    for e in set(range(8)) - chosen:
        for rows in (weights.up, weights.down):
            rows.values[e * D_FF // 8 : (e + 1) * D_FF // 8] = float("nan")
    assert torch.equal(decode_ffn(ffn, x, weights), before)


@torch.no_grad()
def test_bytes_of_each_form():
    dense = prepare(layer(FAMILIES["venom16"]), torch.float16)
    assert dense.nbytes == 2 * D_MODEL * D_FF * 2
    recipe, one = (prepare(layer(FAMILIES[name]), torch.float16) for name in ("recipe, same", "recipe"))
    assert recipe.nbytes == dense.nbytes * 9 // 16 and one.nbytes == dense.nbytes * 25 // 32


def test_it_needs_held_weights_few_tokens_and_no_gradients():
    ffn, x = layer(FAMILIES["venom16"]), tokens(4, torch.float32)
    usual = "cusparselt" if GPU else "triton"
    assert fused_ffn.choose(ffn, x) == usual  # with gradients
    with torch.no_grad():
        assert fused_ffn.describe(ffn, x) == "decoding of 4 tokens by triton, weights by rows"
        assert fused_ffn.choose(ffn, tokens(65, torch.float32)) == usual
        ffn.hold = False
        assert fused_ffn.choose(ffn, x) == usual
        ffn.hold, ffn.backend = True, "reference"
        assert fused_ffn.choose(ffn, x) == "reference"


@torch.no_grad()
def test_changed_weights_are_seen_once_they_are_held_anew():
    ffn, x = layer(FAMILIES["venom16"]), tokens(2, torch.float32)
    before, kept = ffn(x), ffn.decoder
    assert kept is not None and ffn.decoder is kept
    ffn(x)
    assert ffn.decoder is kept, "prepared once"
    ffn.hold = False
    assert ffn.decoder is None
    ffn.w1.mul_(2)
    ffn.hold = True
    assert_close(ffn(x), 4 * before, torch.float32)
    ffn.half()
    assert ffn.decoder is None
    assert_close(ffn(x.half()), 4 * before, torch.float16)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"selection": "learned"}, "selection 'learned'"),
        ({"routing": "learned", "inner": False}, "routing 'learned' weighs clusters by gates"),
        ({"routing": "oracle-block"}, "routing 'oracle-block'"),
    ],
)
def test_what_has_no_kernel_is_named(changes, reason):
    ffn, x = layer(replace(SPARSITY_PRESETS["venom16"], **changes), "reference"), tokens(2, torch.float32)
    assert why_not(ffn, x).startswith(reason)
    with pytest.raises(ValueError, match=f"no decoding: {reason}"):
        decode_ffn(ffn, x, None)
    assert why_not(layer(FAMILIES["act24"]), tokens(65, torch.float32)) == "65 tokens are not 1 to 64"
    assert (
        why_not(layer(FAMILIES["act24"]), tokens(1, torch.float64)) == "no kernel computes in torch.float64"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 8, 64])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_captured_step_in_bfloat16(name, n):
    """At a real width, replayed with other tokens: the same bits as launched."""
    torch.manual_seed(1)
    ffn = SparseFFN(1024, 4096, FAMILIES[name]).cuda()
    if FAMILIES[name].activation == "venom":
        ffn.make_clusters(1)
    ffn.phase = "sparse"
    ffn.bfloat16()
    ffn.hold = True
    x = torch.randn(n, 1024, device="cuda", dtype=torch.bfloat16)
    assert fused_ffn.choose(ffn, x) == "decode"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ffn(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ffn(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, ffn(x))
    wide = SparseFFN(1024, 4096, FAMILIES[name], backend="reference").cuda()
    wide.load_state_dict(ffn.state_dict())
    wide.cluster_means = lambda: ffn.cluster_means().float()
    exact = wide(x.float())
    limit = max(2e-2, 1.5 * ((ffn.reference(x).float() - exact).norm() / exact.norm()).item())
    assert ((captured.float() - exact).norm() / exact.norm()).item() <= limit
