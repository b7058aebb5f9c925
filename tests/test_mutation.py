"""The suite notices a wrong formula: each mutation of the package must turn a test red.

A copy of the package gets one small mistake; the tests that should see it run on the copy until one
fails. On an unchanged copy all of them pass, so it is the mistake that they see.
"""

import ast
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutation:
    """One mistake: in `place`, a function or constant of `file`, `old`, there once, becomes `new`."""

    name: str
    file: str
    place: str  # with the classes and functions around it: "SparseFFN.fold"
    old: str
    new: str
    tests: str
    select: str  # pytest's -k, to save time


MUTATIONS = [
    Mutation(
        "clipping-multiplies",
        "replicate/training/step.py",
        "clipped_step",
        "(norm + CLIP_EPS) / clip",
        "clip / (norm + CLIP_EPS)",
        "tests/training/test_step.py",
        "clip",
    ),
    Mutation(
        "fp8-one-scale-for-all-rows",
        "replicate/fp8.py",
        "quantise",
        "amax(-1 if rows else (0, 1), keepdim=True)",
        "amax((0, 1), keepdim=True)",
        "tests/test_fp8.py",
        "formula or autograd",
    ),
    Mutation(
        "fp8-weight-gradient-reads-the-rounded",
        "replicate/fp8.py",
        "_dense_gradients",
        "dw2 = relu_y1.square().T @ dy3",
        "dw2 = product(relu_y1.square().T, dy3)",
        "tests/test_fp8.py",
        "autograd or not_rounded",
    ),
    Mutation(
        "fp8-not-in-the-sparse-phase",
        "replicate/ffn.py",
        "SparseFFN.product",
        "if not self.config.fp8:",
        "if True:",
        "tests/test_ffn.py",
        "autograd and fp8",
    ),
    Mutation(
        "fp8-one-scale-for-all-clusters",
        "replicate/ffn.py",
        "SparseFFN.product",
        "self.config.n_clusters if own else 1",
        "1",
        "tests/test_ffn.py",
        "autograd and fp8",
    ),
    Mutation(
        "means-are-sums",
        "replicate/kernels/venom/cast_means.py",
        "_cast_means_kernel",
        "mean = total / width",
        "mean = total",
        "tests/kernels/venom/test_cast_means.py",
        "hand_made",
    ),
    Mutation(
        "second-derivative-is-zero",
        "replicate/system/once.py",
        "once",
        "_Once.apply(gradients, *args) if torch.is_grad_enabled() else gradients(*args)",
        "gradients(*args)",
        "tests/kernels/test_operators.py",
        "torch_func and recipe",
    ),
    Mutation(
        "compressed-weights-go-stale",
        "replicate/training/layer_state.py",
        "LayerState.__init__",
        "self._hold = False",
        "self._hold = True",
        "tests/kernels/test_layer.py",
        "after_an_optimiser_step and act24",
    ),
    Mutation(
        "token-order-not-undone",
        "replicate/kernels/operators.py",
        "_two_four_forward",
        "else y3[order[1]]",
        "else y3[order[0]]",
        "tests/kernels/test_layer.py",
        "references and tile",
    ),
    Mutation(
        "energy-not-squared",
        "replicate/kernels/venom/route_active.py",
        "_energy_kernel",
        "total += value * value",
        "total += value",
        "tests/kernels/venom/test_lists.py",
        "active_by_hand",
    ),
    Mutation(
        "scan-forgets-earlier-chunks",
        "replicate/kernels/venom/token_lists.py",
        "_scan_kernel",
        "before += tl.sum(own, axis=0)",
        "before = tl.sum(own, axis=0)",
        "tests/kernels/venom/test_lists.py",
        "more_chunks",
    ),
    Mutation(
        "gates-enter-squared",
        "replicate/kernels/venom/gates.py",
        "gate_factors",
        "gates.float().sqrt()",
        "gates.float()",
        "tests/kernels/test_experts.py",
        "outputs_and_gradients and shape0",
    ),
    Mutation(
        "gates-missing-in-the-backward-pass",
        "replicate/kernels/operators.py",
        "_venom_backward",
        "y2, lists, factor)",
        "y2, lists)",
        "tests/kernels/test_experts.py",
        "outputs_and_gradients and shape0",
    ),
    Mutation(
        "gates-slope-divided-once",
        "replicate/kernels/venom/gates.py",
        "_gate_gradient_kernel",
        "total / (2 * f * f * f)",
        "total / (2 * f)",
        "tests/kernels/test_experts.py",
        "gates_is_their_slope",
    ),
    Mutation(
        "gates-read-rows-of-padding",
        "replicate/kernels/venom/gates.py",
        "_gate_gradient_kernel",
        "(row >= 0)[:, None] & (col < width)[None, :]",
        "(col < 512)[None, :]",
        "tests/kernels/test_experts.py",
        "kernel_is_the_references and 24",
    ),
    Mutation(
        "same-reads-the-whole-weight",
        "replicate/config.py",
        "SparsityConfig.source",
        'return other if self.backward == "same"',
        'return other if self.backward == "always"',
        "tests/test_ffn.py",
        "gradient_true and w1",
    ),
    Mutation(
        "whole-reads-the-pruned-weight",
        "replicate/config.py",
        "SparsityConfig.source",
        'return other if self.backward == "same" and',
        "return other if",
        "tests/test_ffn.py",
        "gradient_true and w1",
    ),
    Mutation(
        "kernels-read-the-other-orientation",
        "replicate/kernels/operands.py",
        "Operands._make",
        "made = made.t().contiguous()",
        "made = made.view(w.shape)",
        "tests/kernels/test_layer.py",
        "references and same",
    ),
    Mutation(
        "fold-does-nothing",
        "replicate/ffn.py",
        "SparseFFN.fold",
        "self.sparse_weight(name, self.w1.dtype)",
        "getattr(self, name)",
        "tests/test_train.py",
        "folding_leaves",
    ),
    Mutation(
        "threshold-rank",
        "replicate/sparsity.py",
        "soft_threshold24",
        "t = torch.minimum(low, high)",
        "t = torch.maximum(low, high)",
        "tests/test_sparsity.py",
        "soft_threshold and by_hand",
    ),
    Mutation(
        "threshold-not-subtracted",
        "replicate/sparsity.py",
        "soft_threshold24",
        "torch.copysign(mag - t, wide)",
        "torch.copysign(mag, wide)",
        "tests/test_sparsity.py",
        "soft_threshold and by_hand",
    ),
    Mutation(
        "mask-rank",
        "replicate/sparsity.py",
        "_top_of_four",
        "(p & q) | (r & (p | q)) for",
        "(p & q & r) for",
        "tests/test_sparsity.py",
        "mask24 or prune24",
    ),
    Mutation(
        "tie-rule",
        "replicate/sparsity.py",
        "_top_of_four",
        "a >= b, a >= c, a >= d, b >= c, b >= d, c >= d",
        "a > b, a > c, a > d, b > c, b > d, c > d",
        "tests/test_sparsity.py",
        "mask24 or tie",
    ),
    Mutation(
        "venom-columns-by-vote-of-the-smallest",
        "replicate/sparsity.py",
        "venom_mask",
        "weight.argsort(dim=-1, descending=True, stable=True)",
        "weight.argsort(dim=-1, descending=False, stable=True)",
        "tests/test_sparsity.py",
        "venom_mask_by_hand",
    ),
    Mutation(
        "mvue-not-divided",
        "replicate/ablations.py",
        "mvue24",
        "groups / p.clamp_min(tiny)",
        "groups * 1",
        "tests/test_sparsity.py",
        "mvue_is_unbiased",
    ),
    Mutation(
        "permutation-inverse",
        "replicate/router.py",
        "token_permutation",
        "inverse[order] = torch.arange(len(order), device=order.device)",
        "inverse = order.clone()",
        "tests/test_router.py",
        "permutation_by_hand or restore_the_order",
    ),
    Mutation(
        "l2-without-the-norm",
        "replicate/router.py",
        "scores",
        "2 * dot - means.square().sum(1)",
        "2 * dot",
        "tests/test_router.py",
        "metrics_differ",
    ),
    Mutation(
        "mask-reuse",
        "replicate/ffn.py",
        "_sparse_gradients",
        "dy1.masked_fill(~mask, 0) if c.mask_reuse else ablations.own_gradient_mask(dy1, c)",
        "ablations.own_gradient_mask(dy1, c)",
        "tests/test_ffn.py",
        "mask or autograd",
    ),
    Mutation(
        "group-axis",
        "replicate/ffn.py",
        "SparseFFN._oriented",
        "return [(self.w1, 0), (self.w2, 0), (self.w2, 1), (self.w1, 1)]",
        "return [(self.w1, 1), (self.w2, 1), (self.w2, 0), (self.w1, 0)]",
        "tests/test_ffn.py",
        "axis",
    ),
    Mutation(
        "token-groups-along-features",
        "replicate/ablations.py",
        "token_reduction.prune",
        "prune24(head, 0)",
        "prune24(head, 1)",
        "tests/test_ffn.py",
        "wgrad",
    ),
    Mutation(
        "derivative-of-the-square",
        "replicate/ffn.py",
        "_sparse_gradients",
        "dy1 = 2 * dy2 * relu_y1",
        "dy1 = dy2 * relu_y1",
        "tests/test_ffn.py",
        "autograd or differences",
    ),
    Mutation(
        "rows-of-w2-not-permuted",
        "replicate/ffn.py",
        "SparseFFN.make_clusters",
        "(self.w1, 1), (self.w2, 0)",
        "(self.w1, 1)",
        "tests/test_ffn.py",
        "make_clusters",
    ),
    Mutation(
        "soft-threshold-comparison",
        "replicate/sparsity.py",
        "soft_threshold24",
        "torch.where(mag <= t,",
        "torch.where(mag < t,",
        "tests/test_sparsity.py",
        "infinities",
    ),
    Mutation(
        "mvue-draws-a-third",
        "replicate/ablations.py",
        "mvue24",
        "((low <= u) & (u < high)) | ((low <= u + 1) & (u + 1 < high))",
        "(high - u).floor() > (low - u).floor()",
        "tests/test_sparsity.py",
        "mvue_draws_no_third",
    ),
    Mutation(
        "score-order",
        "replicate/router.py",
        "route",
        "metric).argsort(dim=1, descending=True, stable=True)[:, :top_k]",
        "metric).argsort(dim=1, stable=True)[:, :top_k]",
        "tests/test_router.py",
        "route or metric",
    ),
    Mutation(
        "cluster-size",
        "replicate/router.py",
        "_equal_assignment",
        "refused = order[rank >= size]",
        "refused = order[rank > size]",
        "tests/test_router.py",
        "clusters",
    ),
    Mutation(
        "routing-reads-other-tokens",
        "replicate/router.py",
        "by_token",
        "route(x, ffn.cluster_means()",
        "route(x - x.mean(0), ffn.cluster_means()",
        "tests/test_causality.py",
        "earlier_logits",
    ),
    Mutation(
        "block-vote-without-the-inner-two",
        "replicate/ablations.py",
        "block_votes",
        "n=2 if c.inner else 4",
        "n=4",
        "tests/test_ffn.py",
        "autograd or venom",
    ),
    Mutation(
        "sparsest-features-stay-dense",
        "replicate/ablations.py",
        "token_reduction",
        "(kept != 0).sum(0).argsort(descending=True",
        "(kept != 0).sum(0).argsort(descending=False",
        "tests/test_ffn.py",
        "wgrad",
    ),
    Mutation(
        "scale-not-frozen",
        "replicate/training/layer_state.py",
        "LayerState.phase",
        'if phase == "sparse" and self.config.weight_scale and not _on(self.scaled):',
        'if phase == "sparse" and self.config.weight_scale:',
        "tests/test_ffn.py",
        "scale",
    ),
    Mutation(
        "score-gradient-without-its-mean",
        "replicate/ablations.py",
        "score_gradient",
        "(dmask - (p * dmask).sum(-1, keepdim=True))",
        "dmask",
        "tests/test_ffn.py",
        "score",
    ),
    Mutation(
        "hash-ignores-the-model",
        "replicate/settings/text.py",
        "NOT_HASHED",
        "NOT_HASHED = (",
        'NOT_HASHED = ("model", ',
        "tests/test_config.py",
        "hash",
    ),
]


def mutated(mutation: Mutation, text: str) -> str:
    """The text of the mutation's file with its mistake; AssertionError if it is not once in its place."""
    nodes = [ast.parse(text)]
    for name in mutation.place.split("."):  # a property and its setter share one
        nodes = [inner for node in nodes for inner in ast.walk(node) if name in names_defined(inner)]
    lines = text.splitlines(keepends=True)
    spans = [slice(node.lineno - 1, node.end_lineno) for node in nodes]
    found = [span for span in spans for _ in range("".join(lines[span]).count(mutation.old))]
    assert len(found) == 1, f"{mutation.place} of {mutation.file} has {mutation.old!r} {len(found)} times"
    lines[found[0]] = "".join(lines[found[0]]).replace(mutation.old, mutation.new)
    return "".join(lines)


def names_defined(node: ast.AST) -> list[str]:
    """The name of a class or function, or the names an assignment gives."""
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [node.name] if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else []


def copy_package(target: Path) -> Path:
    """Package, data and tests in a folder of their own."""
    skip = shutil.ignore_patterns("recorded")
    for name in ("replicate", "data", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


def run_tests(copy: Path, *which: str, timeout: float | None = 600) -> subprocess.CompletedProcess:
    """pytest on the copy, whose package comes first; conftest.py refuses any other."""
    env = {**os.environ, "PYTHONPATH": str(copy), "REPLICATE_EXPECTED_ROOT": str(copy)}
    for name in [key for key in env if key.startswith(("COVERAGE", "COV_", "PYTEST_"))]:
        del env[name]
    command = [sys.executable, "-B", "-m", "pytest", "-x", "--color=no"]
    for plugin in ("cacheprovider", "nbval", "xdist", "pytest_cov"):  # slow to load
        command += ["-p", f"no:{plugin}"]
    command += which
    return subprocess.run(
        command,
        cwd=copy,
        env=env,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    return copy_package(tmp_path_factory.mktemp("unchanged"))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_wrong_formula_turns_a_test_red(mutation, tmp_path):
    copy = copy_package(tmp_path / "mutated")
    path = copy / mutation.file
    path.write_text(mutated(mutation, path.read_text(encoding="utf-8")), encoding="utf-8")
    red = run_tests(copy, mutation.tests, "-k", mutation.select)
    said = (red.stdout + red.stderr)[-2000:]
    assert red.returncode == 1, f"no test failed (exit {red.returncode}):\n{said}"


@pytest.mark.parametrize(
    "place, old", [("SparseFFN.fold", "2 * dy2 * relu_y1"), ("_SparseProducts.fold", "w"), ("fold", "w")]
)
def test_a_mutation_whose_place_or_text_is_gone_says_so(place, old):
    """Another function of the file may well hold the text."""
    lost = Mutation("lost", "replicate/ffn.py", place, old, "", "", "")
    with pytest.raises(AssertionError, match="fold"):
        mutated(lost, (ROOT / lost.file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", sorted({mutation.tests for mutation in MUTATIONS}))
def test_the_unchanged_copy_is_green(unchanged, file):
    """Else the mutated copies could be red because they are copies."""
    select = " or ".join(sorted({f"({mutation.select})" for mutation in MUTATIONS if mutation.tests == file}))
    green = run_tests(unchanged, file, "-k", select)
    assert green.returncode == 0, (green.stdout + green.stderr)[-2000:]


def test_another_package_than_the_copy_is_refused(unchanged, tmp_path):
    """Else a mutation could go unseen because the tests ran on the original."""
    env = {**os.environ, "REPLICATE_EXPECTED_ROOT": str(tmp_path / "elsewhere")}
    command = [sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider", "tests/test_mutation.py"]
    done = subprocess.run(command, cwd=unchanged, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "replicate comes from" in done.stdout + done.stderr
