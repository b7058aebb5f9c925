"""Benchmark of one FFN layer, forward and backward, sparse against dense, all in one process.

A step is a training step's, in bf16 with float32 weights: outputs, gradients of x, W1 and W2, routing and
permutation, and once a step the weights cast, compressed or, by arms in FP8, quantised. The dense side is the
same layer in its dense phase, compiled by torch.compile, by hand (`dense_peers`), and eager (cuBLAS and
torch's element-wise kernels). Times are compared with the faster of the first two (`baseline`), memory with
the compiled layer. Correctness comes first: nothing is timed before every sparse layer, the one in FP8 and
the dense one by hand agreed with the reference on the inputs that are timed.
"""

import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from replicate import router
from replicate.bench import timing
from replicate.bench.dense_peers import dense_by_hand
from replicate.ffn import INIT_STD, SparseFFN
from replicate.kernels import layer as fused_ffn
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.study import records
from replicate.training.compiled import allow_recompiling

KIND = "bench-ffn"
SHAPES = ((16384, 4096, 16384), (16384, 2048, 8192))  # tokens, d_model, d_ff: the 7B and the 1B model
# d_model and d_ff of published video models, `--shapes video`: Wan 2.1 14B (its configuration wan_t2v_14B:
# dim 5120, ffn_dim 13824), and HunyuanVideo (HYVideo-T/2: hidden_size 3072, mlp_width_ratio 4), whose widths
# CogVideoX 5B has too. Tokens: of a clip of some seconds.
VIDEO = ((32768, 5120, 13824), (32768, 3072, 12288))
PAPERS = (
    *("venom16", "venom32", "venom64", "recipe", "recipe32", "recipe64"),
    *("act24", "act24+tile", "all24"),
)
ACTIVE = ("active16", "active64", "active16x32", "active64x32")  # clusters by a token's own activations
FP8 = ("fp8", "venom16, fp8")  # the dense layer in FP8 too: compiled, as DENSE is
SPARSITIES = (*PAPERS, *ACTIVE, *FP8)
DENSE, BY_HAND, EAGER = "dense", "dense, by hand", "dense, eager"
PARTS = ("y3", "dx", "dW1", "dW2")
TOLERANCE, SLACK, LIMIT = 2e-2, 1.5, 0.2  # see `errors`
PROFILED = ("recipe", "act24", "venom16, fp8")
# Stages of a step and the kernels that belong to them, first match first; what matches none is element-wise.
STAGES = {
    "weight refresh": r"soft_threshold_prune24",
    "routing and lists": r"route_topk|_energy_kernel|_top_k_kernel|_(count|scan|place)_kernel|gather_sum",
    "FP8 rounding": r"quantise_",
    "Venom products": r"venom_(up|down|wgrad|gather)",
    "2:4 products": r"[a-z_]sparse|sptensor|spmma|cslt|Sparse(Gemm|Mma)",
    "dense products": r"gemm|nvjet|cutlass|cublas|aten::(add|b)?mm$",
    "element-wise": r"",
}
SECONDS = 0.2  # of back-to-back steps, twice an arm
Row = dict[str, Any]


def config(
    shapes: Sequence[Sequence[int]] = SHAPES, sparsity: Sequence[str] = SPARSITIES, repeats: int = 15
) -> Row:
    """What identifies a run: shapes (tokens, d_model, d_ff), sparsity presets, repeats and seed.

    Raises ValueError for an unknown preset, for the dense one, which is always there, and for a shape that a
    preset cannot carry.
    """
    for name in sparsity:
        if name not in SPARSITY_PRESETS or name == DENSE:
            known = ", ".join(known for known in SPARSITY_PRESETS if known != DENSE)
            raise ValueError(f"sparsity {name!r} is none of the presets {known}")
        for _, d_model, d_ff in shapes:
            SPARSITY_PRESETS[name].check_shape(d_model, d_ff)
    c = {"shapes": [list(shape) for shape in shapes], "sparsity": list(sparsity)}
    return c | {"dtype": "bfloat16", "seed": 0, "repeats": repeats}


class LayerCase:
    """One layer's random inputs, shared by all arms: x and dy3 [T, D] in bf16, W1 and W2 in float32.

    The neurons count as clustered as they stand: of independent random neurons no order is better.

    The shape is tokens T, d_model D, d_ff F; the device "cuda" or "cpu".
    """

    def __init__(self, shape: Sequence[int], seed: int, device: str) -> None:
        tokens, self.d_model, self.d_ff = shape
        draw = torch.Generator(device).manual_seed(seed)
        randn = partial(torch.randn, generator=draw, device=device)
        self.device = device
        self.x = randn(tokens, self.d_model).bfloat16().requires_grad_()
        self.dy3 = randn(tokens, self.d_model).bfloat16()
        self.w1 = nn.Parameter(randn(self.d_model, self.d_ff) * INIT_STD)
        self.w2 = nn.Parameter(randn(self.d_ff, self.d_model) * INIT_STD)

    def layer(self, name: str, backend: str | None = None) -> SparseFFN:
        """A layer on the shared weights: preset `name` in its sparse phase, if it has one, or DENSE."""
        with torch.device(self.device):
            ffn = SparseFFN(self.d_model, self.d_ff, SPARSITY_PRESETS[name])
        ffn.w1, ffn.w2, ffn.backend = self.w1, self.w2, backend
        ffn.clustered.fill_(True)
        ffn.phase = "sparse" if ffn.config.any else "dense"
        return ffn

    def forward(self, name: str, backend: str | None = None) -> Callable[[Tensor], Tensor]:
        """What computes arm `name`: a preset's layer, DENSE, or BY_HAND, which is DENSE with a backend.

        On a GPU, and with no backend, layers in their dense phase are compiled.
        """
        if name == BY_HAND and backend is None:
            return partial(dense_by_hand, w1=self.w1, w2=self.w2)
        layer = self.layer(DENSE if name == BY_HAND else name, backend)
        if backend is not None or self.device == "cpu" or layer.phase == "sparse":
            return layer
        allow_recompiling()
        return torch.compile(layer, dynamic=False)

    def step(self, forward: Callable[[Tensor], Tensor], x: Tensor | None = None) -> tuple[Tensor, ...]:
        """y3, dx, dW1 and dW2; the weights are cast or compressed anew, as in every training step."""
        x = self.x if x is None else x
        y3 = forward(x)
        return y3, *torch.autograd.grad(y3, (x, self.w1, self.w2), self.dy3.to(x.dtype))


@torch.no_grad()
def load(ffn: SparseFFN, x: Tensor) -> float:
    """Tokens of the busiest cluster over the mean, for inputs x [T, D]."""
    return router.load_stats(ffn.clusters(x), ffn.config.n_clusters)["max_over_mean"]


def check(p: LayerCase, arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What computes each preset ("engines"), and the "errors" of each arm; AssertionError for one too large.

    Arms are presets and BY_HAND. Raises ValueError if on a GPU a preset would be computed by plain torch.
    """
    engines = {name: fused_ffn.describe(p.layer(name), p.x) for name in arms if name != BY_HAND}
    slow = {name: text for name, text in engines.items() if text.startswith("reference")}
    if slow and p.device != "cpu":
        raise ValueError(f"no kernels to measure for {slow}; leave them out with --sparsity")
    found = {name: errors(p, name) for name in arms}
    wrong = [
        f"{name}, {part}: {error:.2e}, at most {e['limit'][part]:.2e}"
        for name, e in found.items()
        for part, error in e["error"].items()
        if not error <= e["limit"][part]
    ]
    if wrong:
        raise AssertionError(f"[{len(p.x)}, {p.d_model}, {p.d_ff}] differs from the reference: {wrong}")
    return {"engines": engines, "errors": found}


def errors(p: LayerCase, name: str) -> dict[str, dict[str, float]]:
    """{"error": relative errors of y3, dx, dW1 and dW2, "limit": of each}.

    The reference is the reference backend in float32. Where two activations of a group differ by less than
    bf16 resolves, either may be kept, and each such pair counts as an error, as does a number that bf16 moves
    over a border of FP8; so the limit is TOLERANCE, or
    SLACK times the error of the reference backend itself in bf16 where that is more, and LIMIT at most. Both
    route by the same means, rounded to bf16.
    """
    half, wide = p.forward(name, "reference"), p.forward(name, "reference")
    wide.cluster_means = lambda: half.cluster_means().to(p.x.dtype).float()
    exact = p.step(wide, p.x.detach().float().requires_grad_())
    found: dict[str, dict[str, float]] = {}
    for key, layer in (("limit", half), ("error", p.forward(name))):
        pairs = zip(PARTS, p.step(layer), exact, strict=True)
        found[key] = {part: timing.relative_error(ours, reference) for part, ours, reference in pairs}
    found["limit"] = {n: min(LIMIT, max(TOLERANCE, SLACK * e)) for n, e in found["limit"].items()}
    return found


def run(c: Row, device: str = "cuda") -> records.Record:
    """Check all shapes, then measure them, then profile them: the record's results are {"shapes": [...]}.

    On a CPU nothing is compiled, and there are no graphs and no peak memory.
    """
    start, results = time.perf_counter(), [{"shape": shape} for shape in c["shapes"]]
    for stage in (lambda c, p: check(p, (BY_HAND, *c["sparsity"])), measure, profile):
        for found in results:
            found |= stage(c, LayerCase(found["shape"], c["seed"], device))
            timing.release()
    return records.make_record(KIND, c, {"shapes": results}, seconds=time.perf_counter() - start)


def measure(c: Row, p: LayerCase) -> Row:
    """By arm: milliseconds ("graph", "launches", "sustained"), "peak_bytes", and "load" of routed ones."""
    routed = [name for name in c["sparsity"] if SPARSITY_PRESETS[name].activation == "venom"]
    calls, out = _steps(p, c["sparsity"]), {"load": {name: load(p.layer(name), p.x) for name in routed}}
    on_gpu = p.device != "cpu"
    if on_gpu:
        out["peak_bytes"] = {name: timing.peak_bytes(call) for name, call in calls.items()}
    out["launches"] = timing.compare(calls, p.device, c["repeats"])
    if on_gpu:
        graphs = timing.graphed_all(calls)
        out["graph"] = timing.compare(graphs, p.device, c["repeats"])
        out["sustained"] = {name: timing.sustained_ms(graph, SECONDS) for name, graph in graphs.items()}
    return out


def profile(c: Row, p: LayerCase) -> Row:
    """ "kernels": milliseconds of every kernel of a step, by arm."""
    calls = _steps(p, [name for name in PROFILED if name in c["sparsity"]])
    return {"kernels": {name: timing.kernel_ms(call, device=p.device) for name, call in calls.items()}}


def _steps(p: LayerCase, sparsity: Sequence[str]) -> timing.Calls:
    """A step of every arm: DENSE, BY_HAND, the presets, and EAGER."""
    forwards: dict[str, Callable] = {name: p.forward(name) for name in (DENSE, BY_HAND, *sparsity)}
    forwards[EAGER] = p.layer(DENSE)
    return {name: partial(p.step, forward) for name, forward in forwards.items()}


def stages(shape: Row, name: str) -> dict[str, float]:
    """Milliseconds of each of STAGES in a profiled arm's step, its kernels sorted by name.

    Casts of weights are element-wise; "weight refresh" is their compression.
    """
    found = dict.fromkeys(STAGES, 0.0)
    for kernel, ms in shape["kernels"][name].items():
        found[next(stage for stage, pattern in STAGES.items() if re.search(pattern, kernel))] += ms
    return found


def baseline(times: dict[str, timing.Spread]) -> str:
    """The faster dense arm, DENSE or BY_HAND, by these times of one shape; older records lack BY_HAND."""
    return min((name for name in (DENSE, BY_HAND) if name in times), key=lambda name: times[name]["ms"])


def _speedups(times: dict[str, timing.Spread]) -> dict[str, float]:
    """Arm -> times as fast as the baseline."""
    base = times[baseline(times)]["ms"]
    return {name: base / spread["ms"] for name, spread in times.items()}


def rows(record: records.Record) -> list[Row]:
    """One row a shape and arm: milliseconds with spread, times as fast as dense, memory, largest error.

    "x" is over the faster dense FFN, see `baseline`, by CUDA graphs with a cold cache; "x sustained" back to
    back, "x launches" without graphs, each over the one faster there; "x eager" over the dense FFN that is
    neither compiled nor by hand. "of dense" is peak memory over that of the compiled dense FFN, always.
    """
    table = []
    for s in record.results["shapes"]:
        times = s.get("graph", s["launches"])
        sustained = {name: {"ms": ms} for name, ms in s.get("sustained", {}).items()}
        x, launched = _speedups(times), _speedups(s["launches"])
        back_to_back = _speedups(sustained) if sustained else {}
        for name, ms in times.items():
            row = {"shape": tuple(s["shape"]), "arm": name, **ms, "x": x[name]}
            row["x launches"] = launched[name]
            row["x eager"] = times[EAGER]["ms"] / ms["ms"]
            if sustained:
                row["x sustained"] = back_to_back[name]
                row["peak GiB"] = s["peak_bytes"][name] / 2**30
                row["of dense"] = s["peak_bytes"][name] / s["peak_bytes"][DENSE]
            if name in s["errors"]:
                row["error"] = max(s["errors"][name]["error"].values())
            table.append(row)
    return table


def table(record: records.Record) -> str:
    """Times, speed-ups, memory and stages as plain text."""
    frame, lines = pd.DataFrame(rows(record)), []
    for s in record.results["shapes"]:
        lines.append("tokens {}, d_model {}, d_ff {}".format(*s["shape"]))
        own = frame[frame["shape"] == tuple(s["shape"])].drop(columns="shape").set_index("arm")
        lines.append(own.to_string(float_format="{:.4g}".format, na_rep=""))
        split = pd.DataFrame({name: stages(s, name) for name in s["kernels"]}).rename_axis("ms by kernel")
        lines.append(split.to_string(float_format="{:.3f}".format))
        if s["load"]:
            lines.append(f"busiest cluster over the mean: at most {max(s['load'].values()):.2f}")
    return "\n".join(lines)
