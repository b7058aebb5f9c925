import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from replicate.ablations import token_order, transposable_mask
from replicate.config import SparsityConfig
from replicate.ffn import SparseFFN, relu2
from replicate.gpt import DenseFFN
from replicate.router import cluster_means
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.sparsity import check24, check_venom, mask24, sparsity

T, D, FF = 64, 16, 128
VENOM = [name for name, c in SPARSITY_PRESETS.items() if c.activation == "venom"]


def name_of(config):
    """A config's test name: the settings that are not the default."""
    base = SparsityConfig()
    changed = {k: v for k, v in vars(config).items() if v != getattr(base, k)}
    return ",".join(k if v is True else f"{k}={v}" for k, v in changed.items())


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(config=None, d_model=D, d_ff=FF, seed=0, dtype=torch.float64, phase="sparse"):
    """An FFN with weights of a size that makes y1 of order one, clustered if need be."""
    if isinstance(config, str):
        config = SPARSITY_PRESETS[config]
    ffn = SparseFFN(d_model, d_ff, config).to(dtype)
    with torch.no_grad():
        ffn.w1.copy_(normal(d_model, d_ff, seed=seed) / d_model**0.5)
        ffn.w2.copy_(normal(d_ff, d_model, seed=seed + 1) / d_ff**0.5)
        if ffn.score is not None:
            ffn.score.copy_(0.5 * normal(d_ff, seed=seed + 2))
    if ffn.config.activation == "venom":
        ffn.make_clusters(seed)
    ffn.phase = phase
    return ffn


def gradients(ffn, x, dy3):
    """(y3, dx, dw1, dw2) of one forward and backward pass."""
    x = x.clone().requires_grad_()
    ffn.zero_grad()
    y3 = ffn(x)
    y3.backward(dy3.to(y3.dtype))
    return y3.detach(), x.grad, ffn.w1.grad, ffn.w2.grad


# A second implementation: autograd with straight-through tricks, sorting and loops


def top_two(x):
    """[..., F] bool: the two largest magnitudes of each group of four by a stable sort."""
    four = x.unflatten(-1, (-1, 4))
    best = four.abs().argsort(dim=-1, descending=True, stable=True)[..., :2]
    return torch.zeros_like(four, dtype=torch.bool).scatter(-1, best, True).flatten(-2)


def best_tiles(x):
    """[T, F] bool: in each 4 x 4 tile, of all masks with two a row and two a column, the best one."""
    pairs = [[float(i in pair) for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    every = torch.tensor(list(itertools.product(pairs, repeat=4)), dtype=x.dtype)
    every = every[(every.sum(1) == 2).all(1)]
    mask = torch.zeros_like(x, dtype=torch.bool)
    for i, j in itertools.product(range(0, x.shape[0], 4), range(0, x.shape[1], 4)):
        mask[i : i + 4, j : j + 4] = every[
            (every * x[i : i + 4, j : j + 4].abs()).sum((1, 2)).argmax()
        ].bool()
    return mask


def soft(x):
    four = x.unflatten(-1, (-1, 4))
    t = four.abs().sort(-1).values[..., 1:2]
    return (four.sign() * (four.abs() - t).clamp_min(0)).flatten(-2)


def s24(w, dim, c, used, beta):
    """The weight a product reads, 2:4 along `dim`."""
    if not used:
        return w.detach()
    rows = w.detach().movedim(dim, -1)
    out = soft(rows) if c.weight_method == "soft" else rows * top_two(rows)
    return (out * beta if c.weight_scale and c.weight_method == "soft" else out).movedim(-1, dim)


def read(w, c, *products):
    """What the forward and the backward product read of w; `products` are their (flag, axis, scale)."""
    pruned = [s24(w, dim, c, flag, scale) for flag, dim, scale in products]
    flags = [flag for flag, _, _ in products]
    if c.backward == "same" and any(flags):
        pruned = [own if flag else pruned[flags.index(True)] for own, flag in zip(pruned, flags)]
    return pruned


def beta(w, dim):
    rows = w.detach().movedim(dim, -1)
    return (rows * soft(rows)).sum() / soft(rows).square().sum()


def product(x, w, forward, backward, c=None, parts=(1, 1)):
    """x @ forward, whose gradient to x goes through `backward` and to w straight through; in FP8 by c.

    `parts` of a row of x and of the product's gradient have a scale each.
    """
    if c is None or not c.fp8:
        return x.detach() @ (w + (forward - w).detach()) + (x - x.detach()) @ backward
    to_x, to_w = (x - x.detach()) @ eight(backward, (0, 1)), x.detach() @ w
    if to_x.requires_grad:
        to_x.register_hook(lambda dy: eight(dy, 2, parts[1]))
    return to_x + to_w + (eight(x.detach(), 2, parts[0]) @ eight(forward, (0, 1)) - to_w).detach()


def eight(t, axes, parts=0):
    """float64 to the nearest E4M3 number times a scale for all along the axes, of [T, parts, rest] if so."""
    t, shape = t.view(len(t), parts, -1) if parts else t, t.shape
    most = t.abs().amax(axes, keepdim=True)
    scale = torch.where(most == 0, 1, (most.float() / 448).double())
    step = 2.0 ** ((t / scale).abs().clamp_min(2.0**-6).log2().floor() - 3)
    return ((t / scale / step).round() * step * scale).view(shape)


def best_clusters(values, top_k):
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:top_k]


def clusters_mask(chosen, n, width):
    mask = torch.zeros(len(chosen), n * width, dtype=torch.bool)
    for t, clusters in enumerate(chosen):
        for e in clusters:
            mask[t, e * width : (e + 1) * width] = True
    return mask


def outer_mask(c, x, y2, w1, static):
    """[T, F] bool: which neurons Venom's outer choice keeps (for a block vote, the inner one too)."""
    d_ff, n = y2.shape[1], c.n_clusters
    width = d_ff // n
    energy = y2.view(-1, n, width).sum(2).tolist()
    if c.routing == "oracle-block":
        mask = torch.zeros(y2.shape, dtype=torch.bool)
        m = 4 * n // c.top_k
        for top, left in itertools.product(range(0, len(y2), c.v), range(0, d_ff, m)):
            total = y2[top : top + c.v, left : left + m].sum(0).tolist()
            columns = sorted(left + j for j in best_clusters(total, 4))
            for row in range(top, top + c.v):
                four = y2[row, columns].tolist()
                mask[row, [columns[i] for i in best_clusters(four, 2 if c.inner else 4)]] = True
        return mask
    means = torch.stack([w1[:, e * width : (e + 1) * width].mean(1) for e in range(n)])
    if c.routing == "static":
        chosen = [static] * len(x)
    elif c.routing == "activation":
        chosen = [best_clusters(row, c.top_k) for row in energy]
    else:
        similar = {
            "dot": lambda a, b: a @ b,
            "l2": lambda a, b: -(a - b).norm(),
            "cosine": lambda a, b: a @ b / a.norm() / b.norm(),
        }[c.metric]
        chosen = [best_clusters([similar(t, mean).item() for mean in means], c.top_k) for t in x]
    return clusters_mask(chosen, n, width)


def reference(c, x, w1, w2, score=None, static=(), scales=(1, 1, 1, 1)):
    """y3 with the gradients of algorithms 1 and 2, in one readable function."""
    n = c.n_clusters if c.activation == "venom" else 1
    y1 = product(x, w1, *read(w1, c, (c.w1, 0, scales[0]), (c.w1_t, 1, scales[3])), c, (1, n))
    y2 = F.relu(y1) ** 2
    weights = read(w2, c, (c.w2, 0, scales[1]), (c.w2_t, 1, scales[2]))
    if c.activation == "dense":
        return product(y2, w2, *weights, c)
    outer = torch.ones(y2.shape, dtype=torch.bool)
    if c.activation == "venom":
        outer = outer_mask(c, x.detach(), y2.detach(), w1.detach(), static)
    inside = y2.detach() * outer
    mask, kept = outer, inside
    if c.activation == "24" or (c.inner and c.routing != "oracle-block"):
        criterion = inside * score.detach().exp() if c.selection == "learned" else inside
        static_two = (torch.arange(y2.shape[1]) % 4 < 2).expand(y2.shape)
        two = {"static": static_two, "tile": best_tiles(inside) if c.selection == "tile" else None}
        mask = outer & (two[c.selection] if c.selection in two else top_two(criterion))
        kept = soft(inside) * mask if c.selection == "soft" else inside * mask
    if c.mask_reuse:
        y2 = y2 * mask
    else:
        y1.register_hook(lambda dy1: prune_gradient(c, dy1))
    return product(y2 + (kept - y2).detach(), w2, *weights, c, (n, 1))


def prune_gradient(c, dy1):
    if c.activation == "venom":
        n = c.n_clusters
        energy = dy1.abs().view(len(dy1), n, -1).sum(2).tolist()
        chosen = [best_clusters(row, c.top_k) for row in energy]
        dy1 = dy1 * clusters_mask(chosen, n, dy1.shape[1] // n)
        if not c.inner:
            return dy1
    return dy1 * top_two(dy1)


def compare_with_reference(ffn, x, dy3, scales=(1, 1, 1, 1)):
    ours = gradients(ffn, x, dy3)
    leaves = [t.detach().clone().requires_grad_() for t in (x, ffn.w1, ffn.w2)]
    static = ffn.fixed_clusters().tolist()
    y3 = reference(ffn.config, *leaves, ffn.score, static, scales)
    y3.backward(dy3)
    for name, a, b in zip(("y3", "dx", "dw1", "dw2"), ours, (y3.detach(), *(t.grad for t in leaves))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", [n for n, c in SPARSITY_PRESETS.items() if c.wgrad == "dense"])
@pytest.mark.parametrize("seed", [0, 7])
def test_presets_against_autograd(name, seed):
    compare_with_reference(make(name, seed=seed), normal(T, D, seed=seed + 3), normal(T, D, seed=seed + 4))


RECIPE = SPARSITY_PRESETS["recipe"]
SAME = [
    *(SparsityConfig(**{flag: True}, backward="same") for flag in ("w1", "w2", "w2_t", "w1_t")),
    *(replace(SPARSITY_PRESETS[name], backward="same") for name in ("w1+w2", "w1+w1t", "w1+w2+t", "recipe")),
    replace(RECIPE, backward="same", weight_method="hard"),
    replace(RECIPE, backward="same", routing="activation"),
    SparsityConfig(activation="24", w1=True, w2_t=True, backward="same"),
]


@pytest.mark.parametrize(
    "config",
    [
        SparsityConfig(w1_t=True),
        SparsityConfig(w2_t=True),
        replace(SPARSITY_PRESETS["w1+w2+t"], weight_method="hard"),
        replace(RECIPE, weight_method="hard"),
        replace(RECIPE, metric="l2"),
        replace(RECIPE, metric="cosine"),
        replace(RECIPE, n_clusters=8, top_k=3),
        replace(RECIPE, n_clusters=1, top_k=1),
        replace(RECIPE, n_clusters=32, top_k=32),
        replace(RECIPE, inner=False),
        replace(RECIPE, selection="soft"),
        replace(RECIPE, selection="static"),
        replace(RECIPE, selection="learned"),
        replace(RECIPE, mask_reuse=False),
        replace(RECIPE, mask_reuse=False, inner=False),
        replace(RECIPE, routing="static"),
        replace(RECIPE, routing="activation"),
        replace(RECIPE, routing="oracle-block", v=16),
        replace(SPARSITY_PRESETS["venom16"], inner=False),
        SparsityConfig(activation="24", selection="soft"),
        SparsityConfig(activation="24", selection="static"),
        SparsityConfig(activation="24", selection="tile", w2_t=True),
        SparsityConfig(activation="24", selection="learned", w1=True),
    ],
    ids=name_of,
)
def test_other_formats_against_autograd(config):
    compare_with_reference(make(config), normal(T, D, seed=3), normal(T, D, seed=4))


@pytest.mark.parametrize("config", SAME, ids=name_of)
def test_one_pruned_weight_for_both_products_against_autograd(config):
    compare_with_reference(make(config), normal(T, D, seed=3), normal(T, D, seed=4))


@pytest.mark.parametrize("config", SAME, ids=name_of)
def test_reading_the_same_weight_makes_the_gradient_true(config):
    """dx is what finite differences of the very function say, unless a transpose has a pattern of its own."""
    small = config.activation == "venom"
    ffn = make(replace(config, n_clusters=4, top_k=2) if small else config, d_model=8, d_ff=16, seed=2)
    x, dy3 = normal(6, 8, seed=5), normal(6, 8, seed=6)
    own = (config.w1 and config.w1_t) or (config.w2 and config.w2_t)
    for reading in ("same", "whole"):
        ffn.config = replace(ffn.config, backward=reading)
        dx = gradients(ffn, x, dy3)[1]
        numeric = torch.zeros_like(x)
        with torch.no_grad():
            for i in range(x.numel()):
                up, down = x.clone(), x.clone()
                up.view(-1)[i] += 1e-6
                down.view(-1)[i] -= 1e-6
                numeric.view(-1)[i] = ((ffn(up) - ffn(down)) * dy3).sum() / 2e-6
        true = torch.allclose(dx, numeric, rtol=1e-6, atol=1e-7)
        assert true == (reading == "same" and not own)


@pytest.mark.parametrize("name", ["w1", "w2", "w1+w2"])
def test_under_same_the_layer_is_the_dense_one_at_its_pruned_weights(name):
    ffn, dense = make(replace(SPARSITY_PRESETS[name], backward="same")), DenseFFN(D, FF).double()
    dense.load_state_dict({key: ffn.sparse_weight(key, torch.float64) for key in ("w1", "w2")})
    x, dy3 = normal(T, D, seed=3), normal(T, D, seed=4)
    for ours, theirs in zip(gradients(ffn, x, dy3), gradients(dense, x, dy3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reading", ["whole", "same"])
@pytest.mark.parametrize("name", ["w1+w2+t", "recipe"])
def test_weight_scales_against_autograd(name, reading):
    ffn = make(replace(SPARSITY_PRESETS[name], weight_scale=True, backward=reading))
    scales = [beta(ffn.w1, 0), beta(ffn.w2, 0), beta(ffn.w2, 1), beta(ffn.w1, 1)]
    torch.testing.assert_close(ffn.scale, torch.stack(scales), rtol=1e-6, atol=0)
    compare_with_reference(ffn, normal(T, D, seed=3), normal(T, D, seed=4), ffn.scale.tolist())


# Dense


@pytest.mark.parametrize("shape", [(1, D), (5, D), (2, 3, D), (0, D)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_phase_is_the_dense_ffn_bit_for_bit(shape, dtype):
    dense = DenseFFN(D, FF).to(dtype)
    for config, phase in [
        ("recipe", "dense"),
        ("act24+wgrad", "dense"),
        ("dense", "sparse"),
        (None, "sparse"),
    ]:
        ffn = make(config, dtype=dtype, phase=phase)
        dense.load_state_dict({"w1": ffn.w1, "w2": ffn.w2})
        x, dy3 = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
        for collect in (False, True):
            ffn.collect = collect and len(x) > 0
            for a, b in zip(gradients(ffn, x, dy3), gradients(dense, x, dy3)):
                assert a.dtype == dtype and torch.equal(a, b)


def test_dense_phase_is_the_dense_ffn_under_autocast():
    ffn, dense = make("recipe", dtype=torch.float32, phase="dense"), DenseFFN(D, FF)
    dense.load_state_dict({"w1": ffn.w1, "w2": ffn.w2})
    x, dy3 = normal(9, D, dtype=torch.float32), normal(9, D, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = gradients(ffn, x, dy3), gradients(dense, x, dy3)
    assert ours[0].dtype == torch.bfloat16
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("activation", ["relu2", "gelu", "swiglu"])
def test_dense_baselines(activation):
    ffn = DenseFFN(D, FF, activation).double()
    x = normal(3, 5, D)
    y1 = x @ ffn.w1
    y2 = {
        "relu2": lambda: y1.clamp_min(0) ** 2,
        "gelu": lambda: y1 * 0.5 * (1 + torch.erf(y1 / math.sqrt(2))),
        "swiglu": lambda: y1 * torch.sigmoid(y1) * (x @ ffn.w3),
    }[activation]()
    torch.testing.assert_close(ffn(x), y2 @ ffn.w2)
    assert len(list(ffn.parameters())) == (3 if activation == "swiglu" else 2)
    assert (ffn.w1.shape, ffn.w2.shape) == ((D, FF), (FF, D))
    with pytest.raises(ValueError, match="'relu'; choose one of relu2, gelu, swiglu"):
        DenseFFN(D, FF, "relu")


def test_relu2():
    assert relu2(torch.tensor([-3.0, -0.0, 0.5, 3.0])).tolist() == [0, 0, 0.25, 9]


def test_weights_start_with_standard_deviation_0_02():
    torch.manual_seed(0)
    ffn = SparseFFN(64, 512)
    for w in (ffn.w1, ffn.w2):
        assert w.std().item() == pytest.approx(0.02, rel=0.03) and abs(w.mean().item()) < 5e-4
    assert ffn.phase == "dense" and ffn.score is None


# Where masks are locally constant and weights dense, the backward is the true gradient


@pytest.mark.parametrize(
    "name", ["dense", "act24", *(n for n in VENOM if "recipe" not in n and "fp8" not in n)]
)
def test_finite_differences(name):
    config = SPARSITY_PRESETS[name]
    config = replace(config, n_clusters=4, top_k=config.top_k // 2 or 1, v=3)
    ffn = make(config, d_model=4, d_ff=16, seed=2)
    x = normal(6, 4, seed=5)
    dy3 = normal(6, 4, seed=6)
    _, dx, dw1, dw2 = gradients(ffn, x, dy3)

    def loss():
        with torch.no_grad():
            return (ffn(x) * dy3).sum().item()

    step = 1e-6
    for tensor, grad in ((x, dx), (ffn.w1.data, dw1), (ffn.w2.data, dw2)):
        flat, numeric = tensor.view(-1), torch.zeros_like(grad)
        for i in range(flat.numel()):
            old = flat[i].item()
            flat[i] = old + step
            up = loss()
            flat[i] = old - step
            numeric.view(-1)[i] = (up - loss()) / (2 * step)
            flat[i] = old
        torch.testing.assert_close(grad, numeric, rtol=1e-6, atol=1e-7)


def test_gradcheck_of_the_module():
    ffn = make("venom16", d_model=4, d_ff=64)
    x = normal(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: ffn(x), (x, ffn.w1, ffn.w2), fast_mode=True)


# The mask of dy1


def masks_of(config, seed=0):
    """(y2 kept, dy1) [T, F] read off through identities: with dy3 = I dW2 is y2^T, with x = I dW1 is dy1."""
    ffn = make(config, d_model=T, d_ff=FF, seed=seed)
    eye = torch.eye(T, dtype=torch.float64)
    return gradients(ffn, eye, eye)[3].T, gradients(ffn, eye, normal(T, T, seed=5))[2]


@pytest.mark.parametrize("name", ["act24", *VENOM])
def test_dy1_carries_the_forward_mask(name):
    kept, dy1 = masks_of(name)
    assert ((kept == 0) == (dy1 == 0)).all() and kept.any()
    if name == "block16":
        check_venom(kept, 64, 16)
    else:
        check24(kept)


def test_tiles_are_two_of_four_along_tokens_too():
    """So that the weight gradients' operand is 2:4 as the forward pass left it."""
    for kept in masks_of("tile24"):
        assert kept.any()
        for dim in (0, 1):
            check24(kept, dim)
    assert [row[2] for row in SPARSITY_PRESETS["tile24"].products()] == [
        "dense",
        "2:4",
        "dense",
        "2:4",
        "2:4",
        "2:4",
    ]


def test_without_mask_reuse_dy1_has_a_mask_of_its_own():
    kept, dy1 = masks_of("no-mask-reuse")
    check24(kept), check24(dy1)
    assert ((kept == 0) != (dy1 == 0)).double().mean() > 0.02
    kept, dy1 = masks_of(replace(SPARSITY_PRESETS["venom16"], mask_reuse=False))
    assert ((kept == 0) != (dy1 == 0)).double().mean() > 0.02


@pytest.mark.parametrize("name", VENOM)
def test_venom_keeps_two_of_m(name):
    """Two of M columns a row, of the four of M that the outer choice keeps (Table 5)."""
    config = SPARSITY_PRESETS[name]
    ffn = make(config)
    y2 = normal(T, FF).abs()  # no natural zeros
    values, mask = ffn.activation_mask(normal(T, D), y2)
    assert (mask.sum(1) == FF * 2 // config.m).all()
    assert ((values != 0) == mask).all()
    outer = make(replace(config, inner=False)).activation_mask(normal(T, D), y2)[1]
    assert (outer.sum(1) == FF * 4 // config.m).all() and (outer | ~mask).all()


# Learned criteria


@pytest.mark.parametrize(
    "config",
    [
        SparsityConfig(activation="24", selection="learned"),
        SparsityConfig(activation="24", selection="learned", w1=True, w2_t=True),
        SparsityConfig(activation="24", selection="learned", wgrad="24"),
        replace(RECIPE, selection="learned", n_clusters=4, top_k=2),
    ],
    ids=name_of,
)
def test_score_gradient_is_that_of_the_soft_surrogate(config):
    """Finite differences of sum_tf dy2 y2 (2 p), p the share of y2 exp(score) in its group of four."""
    ffn = make(config, d_model=8, d_ff=32)
    x, dy3 = normal(12, 8, seed=3), normal(12, 8, seed=4)
    gradients(ffn, x, dy3)
    w1 = s24(ffn.w1, 0, config, config.w1, 1)
    y2 = F.relu(x @ w1) ** 2
    if config.activation == "venom":  # a score cannot revive a neuron outside the chosen clusters
        y2 = y2 * outer_mask(config, x, y2, ffn.w1.detach(), ())
    dy2 = dy3 @ s24(ffn.w2, 1, config, config.w2_t, 1).T

    def surrogate(score):
        total = 0.0
        criterion = y2 * score.exp()
        for start in range(0, y2.shape[1], 4):
            four = slice(start, start + 4)
            share = criterion[:, four] / criterion[:, four].sum(1, keepdim=True).clamp_min(1e-300)
            total += (dy2[:, four] * y2[:, four] * 2 * share).sum().item()
        return total

    score = ffn.score.detach()
    for i in range(score.numel()):
        unit = torch.zeros_like(score)
        unit[i] = 1e-6
        numeric = (surrogate(score + unit) - surrogate(score - unit)) / 2e-6
        assert ffn.score.grad[i].item() == pytest.approx(numeric, rel=1e-5, abs=1e-7)
    assert ffn.score.grad.abs().max() > 1e-3


def test_scores_exist_only_where_they_choose():
    assert SparseFFN(D, FF, SparsityConfig(selection="learned")).score is None
    assert SparseFFN(D, FF, SparsityConfig(activation="24")).score is None
    score = SparseFFN(D, FF, SparsityConfig(activation="24", selection="learned")).score
    assert score.shape == (FF,) and not score.any()


# Clusters


@pytest.mark.parametrize("config", ["venom16", replace(RECIPE, selection="learned")])
def test_make_clusters_leaves_the_function(config):
    config = SPARSITY_PRESETS.get(config) if isinstance(config, str) else config
    ffn = SparseFFN(D, FF, config).double()
    if ffn.score is not None:
        ffn.score.data = normal(FF)
    before = copy.deepcopy(ffn)
    x = normal(T, D)
    for seed in (1, 2):  # the second time re-clusters
        old = copy.deepcopy(ffn)
        perm = ffn.make_clusters(seed)
        assert perm.dtype == torch.long and torch.equal(perm.sort().values, torch.arange(FF))
        assert torch.equal(ffn.w1, old.w1[:, perm]) and torch.equal(ffn.w2, old.w2[perm])
        if ffn.score is not None:
            assert torch.equal(ffn.score, old.score[perm])
        torch.testing.assert_close(ffn(x), before(x), rtol=1e-12, atol=1e-15)
    assert not torch.equal(ffn.w1, before.w1)


def test_clusters_become_contiguous_columns():
    """Planted clusters, shuffled, come together again; the means are those of the columns."""
    ffn = SparseFFN(D, FF, SPARSITY_PRESETS["venom16"]).double()
    truth = torch.arange(FF)[torch.randperm(FF, generator=torch.Generator().manual_seed(1))] % 16
    ffn.w1.data = 50 * normal(D, 16)[:, truth] + 0.1 * normal(D, FF, seed=1)
    perm = ffn.make_clusters(0)
    blocks = truth[perm].view(16, -1)
    assert (blocks == blocks[:, :1]).all()
    labels = torch.arange(16).repeat_interleave(FF // 16)
    torch.testing.assert_close(ffn.cluster_means(), cluster_means(ffn.w1.detach(), labels, 16))
    ffn.w1.data += 1  # the router follows W1
    torch.testing.assert_close(ffn.cluster_means(), cluster_means(ffn.w1.detach(), labels, 16))


def test_the_permutation_serves_the_optimiser_moments():
    """Training on after the clustering, moments permuted, is training on without it, permuted."""

    def train(ffn, adam, steps):
        for i in range(steps):
            adam.zero_grad()
            (ffn(normal(T, D, seed=i)) - normal(T, D, seed=i + 50)).square().mean().backward()
            adam.step()

    ffn = make("venom16", phase="dense")
    adam = torch.optim.AdamW(ffn.parameters(), lr=1e-2)
    train(ffn, adam, 5)
    plain = copy.deepcopy(ffn)
    plain_adam = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    plain_adam.load_state_dict(copy.deepcopy(adam.state_dict()))
    perm = ffn.make_clusters(9)
    for moment in ("exp_avg", "exp_avg_sq"):
        state = adam.state[ffn.w1]
        state[moment] = state[moment][:, perm]
        state = adam.state[ffn.w2]
        state[moment] = state[moment][perm]
    train(ffn, adam, 5)
    train(plain, plain_adam, 5)
    torch.testing.assert_close(ffn.w1.detach(), plain.w1.detach()[:, perm], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ffn.w2.detach(), plain.w2.detach()[perm], rtol=1e-9, atol=1e-11)
    assert not torch.equal(perm, torch.arange(FF))


def test_static_clusters_are_the_strongest_of_the_sample():
    ffn = make("static16", phase="dense")
    assert ffn.static_clusters.tolist() == [0, 1, 2, 3]
    sample = normal(4, T, D, seed=11)
    ffn.make_clusters(0, sample)
    energy = (F.relu(sample.view(-1, D) @ ffn.w1) ** 2).view(-1, 16, FF // 16).sum((0, 2))
    assert ffn.static_clusters.tolist() == best_clusters(energy.tolist(), 4)
    ffn.phase = "sparse"
    compare_with_reference(ffn, normal(T, D, seed=3), normal(T, D, seed=4))


@pytest.mark.parametrize("shape", [(T, D + 1), (D, T + 1), ()])
def test_a_sample_of_another_width_changes_nothing(shape):
    ffn = make("static16", phase="dense")
    before = copy.deepcopy(ffn.state_dict())
    with pytest.raises(ValueError, match=rf"sample is of shape \(.*\); give inputs \[..., d_model = {D}\]"):
        ffn.make_clusters(0, torch.zeros(shape))
    assert all(torch.equal(t, before[name]) for name, t in ffn.state_dict().items())


@pytest.mark.parametrize("config", [replace(RECIPE, weight_scale=True, selection="learned"), RECIPE])
def test_state_dict_round_trip(config):
    ffn = make(config)
    ffn.make_clusters(4, normal(T, D))
    other = SparseFFN(D, FF, config).double()
    other.load_state_dict(ffn.state_dict())
    other.phase = "sparse"  # the clusters came with it
    x, dy3 = normal(T, D, seed=3), normal(T, D, seed=4)
    for a, b in zip(gradients(ffn, x, dy3), gradients(other, x, dy3)):
        assert torch.equal(a, b)
    for (name, a), b in zip(ffn.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), name


# S-STE's scale


def test_scale_is_computed_at_the_first_switch_and_frozen():
    ffn = make(replace(SPARSITY_PRESETS["w1"], weight_scale=True), phase="dense")
    assert ffn.beta(0).isnan()
    ffn.w1.data *= normal(D, FF).abs()
    expected = beta(ffn.w1, 0)
    ffn.phase = "sparse"
    torch.testing.assert_close(ffn.scale[0], expected, rtol=1e-6, atol=0)
    frozen = ffn.scale.clone()
    ffn.w1.data = normal(D, FF, seed=8) ** 3
    ffn.phase = "dense"
    ffn.phase = "sparse"
    assert torch.equal(ffn.scale, frozen) and abs(beta(ffn.w1, 0) - frozen[0]) > 1e-3
    loaded = SparseFFN(D, FF, ffn.config).double()
    loaded.load_state_dict(ffn.state_dict())
    loaded.phase = "sparse"
    assert torch.equal(loaded.scale, frozen)


def test_weights_are_not_folded_before_their_scales_are_known():
    ffn = make(replace(SPARSITY_PRESETS["w1"], weight_scale=True), phase="dense")
    before = ffn.w1.detach().clone()
    with pytest.raises(RuntimeError, match="no scales yet: enter the sparse phase first"):
        ffn.fold()
    assert torch.equal(ffn.w1, before)
    ffn.phase = "sparse"
    ffn.fold()
    assert ffn.w1.isfinite().all() and not torch.equal(ffn.w1, before)
    plain = make("w1", phase="dense")
    plain.fold()  # needs no scales
    check24(plain.w1, 0)


def test_without_weight_scale_there_is_none():
    ffn = make("w1")
    assert not ffn.scaled
    assert (ffn.sparse_weight("w1", torch.float64).abs() <= ffn.w1.abs()).all()


@pytest.mark.parametrize(("name", "dim"), [("w1", 0), ("w2", 0), ("w2_t", 1), ("w1_t", 1)])
@pytest.mark.parametrize("method", ["soft", "hard"])
def test_weights_are_2_of_4_along_the_axis_their_product_sums(name, dim, method):
    ffn = make(SparsityConfig(**{name: True}, weight_method=method))
    w = ffn.w1 if name.startswith("w1") else ffn.w2
    used = ffn.sparse_weight(name, torch.float64)
    check24(used, dim)
    with pytest.raises(ValueError, match="not 2:4"):
        check24(used, 1 - dim)
    assert list(ffn.weight_masks()) == [name]
    assert torch.equal(ffn.weight_masks()[name], mask24(w, dim))
    twin = name.removesuffix("_t") if name.endswith("_t") else f"{name}_t"
    assert torch.equal(ffn.sparse_weight(twin, torch.float64), used), "the same values in the other product"
    for other in {"w1", "w2", "w2_t", "w1_t"} - {name, twin}:
        assert torch.equal(ffn.sparse_weight(other, torch.float64), ffn.w1 if "1" in other else ffn.w2)
    ffn.config = replace(ffn.config, backward="whole")
    assert torch.equal(ffn.sparse_weight(twin, torch.float64), w)


# Weight gradients with 2:4 along tokens


def wgrad_operands(config, y1, seed=0):
    """(y2, dy1) as the weight gradients' products read them, [T, F], for given y1 [T, F] and dy2 = 1."""
    (tokens, d_ff), d_model = y1.shape, -(-len(y1) // 4) * 4
    ffn = SparseFFN(d_model, d_ff, config).double()
    eye = torch.eye(tokens, d_model, dtype=torch.float64)
    ffn.w1.data = eye.T @ y1
    ffn.w2.data = torch.ones(d_ff, d_model, dtype=torch.float64)
    ffn.phase = "sparse"
    torch.manual_seed(seed)
    _, _, dw1, dw2 = gradients(ffn, eye, eye)
    return dw2.T[:tokens], dw1[:tokens]


def token_groups(tokens, **options):
    """The groups of four tokens, found out: three tokens of one group cannot all be kept."""
    triples = list(itertools.combinations(range(tokens), 3))
    triples += [()] * (-len(triples) % 4)
    y1 = torch.zeros(tokens, len(triples), dtype=torch.float64)
    for f, triple in enumerate(triples):
        y1[list(triple), f] = 1
    y2, dy1 = wgrad_operands(SparsityConfig(wgrad="24", wgrad_dense_share=0.0, **options), y1)
    assert torch.equal(y2 != 0, dy1 != 0)
    together = [set(triples[f]) for f in range(len(triples)) if (y2[:, f] != 0).sum() == 2]
    groups = {frozenset(a | b) for a in together for b in together if len(a | b) == 4 and len(a & b) == 2}
    groups = [g for g in groups if all(set(t) in together for t in itertools.combinations(g, 3))]
    assert len(together) == 4 * len(groups)
    return sorted(sorted(g) for g in groups)


def test_token_groups_are_a_fixed_shuffled_partition():
    groups = token_groups(16)
    assert sorted(itertools.chain(*groups)) == list(range(16)) and len(groups) == 4
    assert groups == token_groups(16), "the same in every call"
    neighbours = [[4 * i + j for j in range(4)] for i in range(4)]
    assert groups != neighbours
    assert token_groups(16, wgrad_permute=False) == neighbours


@pytest.mark.parametrize(("tokens", "left_over"), [(10, 2), (7, 3), (5, 1), (3, 3)])
def test_tokens_past_the_last_group_stay_dense(tokens, left_over):
    groups = token_groups(tokens)
    assert sorted(itertools.chain(*groups)) == list(range(tokens - left_over))


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 1.0])
@pytest.mark.parametrize("activation", ["dense", "24"])
def test_wgrad_24_prunes_groups_of_tokens_but_for_the_densest_features(permute, share, activation):
    tokens, d_ff = 16, 40
    y1 = normal(tokens, d_ff) + torch.linspace(-1, 1, d_ff, dtype=torch.float64)  # later features fire more
    config = SparsityConfig(activation=activation, wgrad_dense_share=share, wgrad_permute=permute)
    full_y2, full_dy1 = wgrad_operands(config, y1)
    y2, dy1 = wgrad_operands(replace(config, wgrad="24"), y1)
    fires = (full_y2 != 0).sum(0).tolist()
    dense = sorted(range(d_ff), key=lambda f: (-fires[f], f))[: round(share * d_ff)]
    for full, ours in ((full_y2, y2), (full_dy1, dy1)):
        expected = full.clone()
        for group, f in itertools.product(token_groups(tokens, wgrad_permute=permute), range(d_ff)):
            if f not in dense:
                smallest = sorted(group, key=lambda t: abs(full[t, f].item()))[:2]
                expected[smallest, f] = 0
        assert torch.equal(ours, expected)
        assert torch.equal(ours[:, dense], full[:, dense])


def test_wgrad_touches_neither_the_output_nor_dx():
    x, dy3 = normal(T, D, seed=3), normal(T, D, seed=4)
    full, ours = gradients(make("act24"), x, dy3), gradients(make("act24+wgrad"), x, dy3)
    assert torch.equal(full[0], ours[0]) and torch.equal(full[1], ours[1])
    assert not torch.equal(full[2], ours[2]) and not torch.equal(full[3], ours[3])


@pytest.mark.parametrize("permute", [True, False])
def test_wgrad_tile_keeps_the_best_transposable_pattern_of_each_tile(permute):
    """The tiles are the groups of tokens that wgrad "24" uses, in its order; no feature stays dense."""
    tokens, d_ff = 18, 40
    y1 = normal(tokens, d_ff) + 1
    config = SparsityConfig(activation="24", wgrad_permute=permute, wgrad_dense_share=0.5)
    full = wgrad_operands(config, y1)
    ours = wgrad_operands(replace(config, wgrad="tile"), y1)
    order, back = token_order(16, torch.device("cpu"))
    assert torch.equal(order[back], torch.arange(16))
    rows = order if permute else torch.arange(16)
    assert sorted(sorted(rows[i : i + 4].tolist()) for i in range(0, 16, 4)) == token_groups(
        16, wgrad_permute=permute
    )
    for exact, pruned in zip(full, ours):
        expected = exact.clone()
        expected[rows] = exact[rows] * transposable_mask(exact[rows])
        assert torch.equal(pruned, expected)
        assert torch.equal(pruned[16:], exact[16:]), "tokens past the last group stay dense"
        check24(pruned[rows], 0)
        check24(pruned[rows], 1)
        assert (pruned != exact).any()


def test_wgrad_mvue_is_unbiased_and_2_of_4():
    """Every feature stands 4000 times, each with its own draws; dense features are not drawn."""
    tokens, copies = 8, 4000
    y1 = (normal(tokens, 5).abs() + 0.1).repeat_interleave(copies, 1)
    config = SparsityConfig(wgrad="mvue", wgrad_dense_share=0.2)
    full = wgrad_operands(replace(config, wgrad="dense"), y1)
    drawn = wgrad_operands(config, y1)
    assert not torch.equal(drawn[0], wgrad_operands(config, y1, seed=1)[0])
    for exact, sample in zip(full, drawn):
        assert torch.equal(sample[:, :copies], exact[:, :copies]), "all as dense: the first 20 % stay"
        sample = sample[:, copies:]
        for group in token_groups(tokens):
            assert (sample[group] != 0).sum(0).max() == 2
        sample = sample.view(tokens, 4, copies)
        error = sample.std(2) / copies**0.5
        expected = exact[:, copies:].view(tokens, 4, copies)[:, :, 0]
        assert ((sample.mean(2) - expected).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 63])
@pytest.mark.parametrize("name", ["act24+wgrad", "recipe"])
def test_any_number_of_tokens(tokens, name):
    ffn = make(name)
    x, dy3 = normal(tokens, D, seed=3), normal(tokens, D, seed=4)
    if name == "recipe":
        compare_with_reference(ffn, x, dy3)
    outputs = gradients(ffn, x, dy3)
    assert all(out.isfinite().all() for out in outputs)


# The module


@pytest.mark.parametrize("name", [*SPARSITY_PRESETS])
def test_leading_axes_are_tokens(name):
    ffn = make(name)
    x, dy3 = normal(4, T, D, seed=3), normal(4, T, D, seed=4)
    ours = gradients(ffn, x, dy3)
    flat = gradients(ffn, x.view(-1, D), dy3.view(-1, D))
    assert ours[0].shape == x.shape and ours[1].shape == x.shape
    assert torch.equal(ours[0].view(-1, D), flat[0]) and torch.equal(ours[1].view(-1, D), flat[1])
    assert torch.equal(ours[2], flat[2]) and torch.equal(ours[3], flat[3])
    strided = gradients(ffn, x.transpose(0, 1).contiguous().transpose(0, 1), dy3)
    assert torch.equal(strided[0], ours[0])


@pytest.mark.parametrize("name", ["recipe", "w1+w2+t", "act24+wgrad"])
def test_autocast_computes_in_bfloat16_and_gives_float32_gradients(name):
    ffn = make(name, dtype=torch.float32)
    x, dy3 = normal(T, D, seed=3, dtype=torch.float32), normal(T, D, seed=4, dtype=torch.float32)
    full = gradients(ffn, x, dy3)
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(ffn, x, dy3)
    assert half[0].dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in half[1:])
    for a, b in zip(half, full):
        cosine = F.cosine_similarity(a.float().flatten(), b.flatten(), dim=0)
        assert cosine > 0.95


@pytest.mark.parametrize(
    "own, variable, kernels",
    [
        (None, None, False),  # on a CPU
        (None, "", False),
        ("auto", "auto", False),
        (None, "triton", True),
        ("auto", "triton", True),
        ("auto", "reference", False),
        ("reference", "triton", False),  # the layer's own comes first
        ("triton", "reference", True),
        ("triton", None, True),
    ],
)
def test_who_computes_the_sparse_phase(own, variable, kernels, monkeypatch):
    ffn, x = make("act24"), normal(T, D)
    reference, ffn.backend = ffn(x), own
    monkeypatch.setattr("replicate.kernels.layer.sparse_phase", lambda layer, x: torch.zeros_like(x))
    if variable is None:
        monkeypatch.delenv("REPLICATE_BACKEND", raising=False)
    else:
        monkeypatch.setenv("REPLICATE_BACKEND", variable)
    assert torch.equal(ffn(x), torch.zeros_like(x) if kernels else reference)


@pytest.mark.parametrize("name", ["recipe", "act24"])
def test_autocast_rounds_the_input_and_leaves_the_router_in_float32(name):
    """Under autocast the scores of tokens and clusters would be in bfloat16, in which many are equal."""
    ffn, x = make(name, dtype=torch.float32), normal(512, D, seed=3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = ffn(x)
    assert torch.equal(half, ffn(x.bfloat16()))


def test_frozen_parts_and_no_grad():
    ffn = make("recipe")
    x = normal(T, D)
    with torch.no_grad():
        assert torch.equal(ffn(x), ffn(x)) and not ffn(x).requires_grad
    ffn.w1.requires_grad_(False)
    ffn(x).sum().backward()
    assert ffn.w1.grad is None and ffn.w2.grad is not None


@pytest.mark.parametrize("weight", ["w1", "w2"])
def test_changing_a_weight_before_the_backward_pass_raises(weight):
    ffn = make("recipe")
    y3 = ffn(normal(T, D))
    with torch.no_grad():
        getattr(ffn, weight).add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y3.sum().backward()


def test_a_second_derivative_is_refused_and_not_wrong():
    ffn, x = make("act24"), normal(T, D).requires_grad_()
    (dx,) = torch.autograd.grad(ffn(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("name", ["w1+w2+t", "recipe"])
def test_backward_reads_the_weights_that_forward_read(name):
    """Weights lent for one call (torch.func), as for an average of weights, are those of its gradients."""
    ffn, other = make(name), make(name, seed=5)
    x, dy3 = normal(T, D, seed=3).requires_grad_(), normal(T, D, seed=4)
    weights = {"w1": other.w1, "w2": other.w2}
    torch.func.functional_call(ffn, weights, x).backward(dy3)
    ours = x.grad, other.w1.grad.clone(), other.w2.grad.clone()
    for a, b in zip(ours, gradients(other, x.detach(), dy3)[1:]):
        assert torch.equal(a, b)
    assert ffn.w1.grad is None


def test_stats_by_hand():
    ffn = make(replace(SPARSITY_PRESETS["venom16"]))
    x = normal(T, D, seed=3)
    ffn(x)
    assert ffn.stats() == {}, "nothing is collected unless asked for"
    ffn.collect = True
    ffn(x)
    y2 = F.relu(x @ ffn.w1.detach()) ** 2
    outer = outer_mask(ffn.config, x, y2, ffn.w1.detach(), ())
    kept = y2 * (outer & top_two(y2 * outer))
    stats = ffn.stats()
    assert stats["y2_sparsity"] == pytest.approx(sparsity(y2)) and 0.4 < stats["y2_sparsity"] < 0.6
    assert stats["kept_sparsity"] == pytest.approx(sparsity(kept)) and stats["kept_sparsity"] >= 0.875
    assert stats["kept_energy"] == pytest.approx((kept.sum() / y2.sum()).item())
    load = outer.view(T, 16, -1)[:, :, 0].double().mean(0)
    assert stats["router_load"] == pytest.approx((load.max() / load.mean()).item())
    assert all(type(value) is float for value in stats.values())
    ffn.phase = "dense"
    ffn(x)
    assert ffn.stats() == {"y2_sparsity": sparsity(y2), "kept_sparsity": sparsity(y2), "kept_energy": 1.0}


@pytest.mark.parametrize("name", ["act24", "block16", "static16", "w1"])
def test_stats_name_a_router_only_where_there_is_one(name):
    ffn = make(name)
    ffn.collect = True
    ffn(normal(T, D))
    assert ("router_load" in ffn.stats()) == (name == "static16")
    ffn(-1e9 * torch.ones(T, D, dtype=torch.float64).abs())
    assert all(math.isfinite(value) for value in ffn.stats().values())


@pytest.mark.parametrize("phase", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["act24", "static16", "recipe", "block16", "w1"])
def test_stats_of_no_tokens_are_none(name, phase):
    ffn = make(name, phase=phase)
    ffn.collect = True
    ffn(normal(T, D))
    some = ffn.stats()
    assert ffn(normal(0, D)).shape == (0, D)
    assert ffn.stats().keys() == some.keys()
    assert all(math.isnan(value) for value in ffn.stats().values())


# What cannot be


def test_a_phase_that_is_none():
    ffn = make("w1")
    with pytest.raises(ValueError, match="'spars'; choose one of dense, sparse"):
        ffn.phase = "spars"
    assert ffn.phase == "sparse"


@pytest.mark.parametrize("name", VENOM)
def test_venom_needs_clusters_first(name):
    ffn = SparseFFN(D, FF, SPARSITY_PRESETS[name])
    with pytest.raises(RuntimeError, match="make_clusters"):
        ffn.phase = "sparse"
    assert ffn.phase == "dense"
    ffn.make_clusters(0)
    ffn.phase = "sparse"


@pytest.mark.parametrize(
    ("name", "d_model", "d_ff", "pattern"),
    [
        ("w1", 18, 128, "d_model is 18"),
        ("w2+w2t", 16, 130, "d_ff is 130"),
        ("act24", 16, 126, "d_ff is 126"),
        ("venom16", 16, 132, "d_ff is 132.*multiple of 64: try 128"),
        ("act24+wgrad", 17, 128, "d_model is 17"),
    ],
)
def test_impossible_shapes(name, d_model, d_ff, pattern):
    with pytest.raises(ValueError, match=pattern):
        SparseFFN(d_model, d_ff, SPARSITY_PRESETS[name])


@pytest.mark.parametrize("name", ["dense", "act24", "fp8"])
def test_a_backend_that_is_none(name):
    with pytest.raises(ValueError, match="backend is 'referense'; choose one of auto, reference, triton"):
        SparseFFN(64, 256, SPARSITY_PRESETS[name], backend="referense")
    assert SparseFFN(64, 256, SPARSITY_PRESETS[name], backend="reference").backend == "reference"


@pytest.mark.parametrize("tokens", [32, 65])
def test_blocks_must_divide_the_tokens(tokens):
    ffn = make("block16")
    with pytest.raises(ValueError, match=f"{tokens} x {FF} does not divide into blocks of v = 64"):
        ffn(normal(tokens, D))


def test_compiled_code_contains_the_sparse_phase_unless_it_is_watched():
    """Statistics leave the graph: compiled code then ends before the sparse phase and begins after it."""
    ffn = SparseFFN(16, 32, SparsityConfig(activation="24"))
    ffn.phase, graphs = "sparse", []

    def backend(graph, example):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph

    x = torch.randn(4, 16)
    assert torch.compile(ffn, backend=backend, fullgraph=True)(x).equal(ffn(x))
    assert len(graphs) == 1
    ffn.collect = True
    assert torch.compile(ffn, backend=backend)(x).equal(ffn(x))
    assert graphs[1:] == [["reshape"], ["view"]]
    assert ffn.stats()["kept_sparsity"] >= 0.5
