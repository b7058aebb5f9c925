"""The suite notices a wrong formula: each mutation of the package must turn a test red.

A copy of the package gets one small mistake; the tests of that module run on the copy until one fails.
The same test must pass on an unchanged copy, so that it is the mistake it saw.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutation:
    """One mistake: in `file`, the text `old`, which occurs once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation(
        "threshold-rank",
        "replicate/sparsity.py",
        "t = torch.minimum(low, high)",
        "t = torch.maximum(low, high)",
        "tests/test_sparsity.py",
    ),
    Mutation(
        "threshold-not-subtracted",
        "replicate/sparsity.py",
        "torch.copysign(mag - t, wide)",
        "torch.copysign(mag, wide)",
        "tests/test_sparsity.py",
    ),
    Mutation(
        "mask-rank",
        "replicate/sparsity.py",
        "(p & q) | (r & (p | q)) for",
        "(p & q & r) for",
        "tests/test_sparsity.py",
    ),
    Mutation(
        "tie-rule",
        "replicate/sparsity.py",
        "a >= b, a >= c, a >= d, b >= c, b >= d, c >= d",
        "a > b, a > c, a > d, b > c, b > d, c > d",
        "tests/test_sparsity.py",
    ),
    Mutation(
        "venom-columns-by-vote-of-the-smallest",
        "replicate/sparsity.py",
        "weight.argsort(dim=-1, descending=True, stable=True)",
        "weight.argsort(dim=-1, descending=False, stable=True)",
        "tests/test_sparsity.py",
    ),
    Mutation(
        "mvue-not-divided",
        "replicate/sparsity.py",
        "groups / p.clamp_min(tiny)",
        "groups * 1",
        "tests/test_sparsity.py",
    ),
    Mutation(
        "permutation-inverse",
        "replicate/router.py",
        "inverse[order] = torch.arange(len(order), device=order.device)",
        "inverse = order.clone()",
        "tests/test_router.py",
    ),
    Mutation(
        "l2-without-the-norm",
        "replicate/router.py",
        "2 * dot - means.square().sum(1)",
        "2 * dot",
        "tests/test_router.py",
    ),
    Mutation(
        "mask-reuse",
        "replicate/ffn.py",
        "dy1.masked_fill(~mask, 0) if c.mask_reuse else ffn.own_gradient_mask(dy1)",
        "ffn.own_gradient_mask(dy1)",
        "tests/test_ffn.py",
    ),
    Mutation(
        "group-axis",
        "replicate/ffn.py",
        "return [(self.w1, 0), (self.w2, 0), (self.w2, 1), (self.w1, 1)]",
        "return [(self.w1, 1), (self.w2, 1), (self.w2, 0), (self.w1, 0)]",
        "tests/test_ffn.py",
    ),
    Mutation(
        "token-groups-along-features",
        "replicate/ffn.py",
        "prune(head, 0)",
        "prune(head, 1)",
        "tests/test_ffn.py",
    ),
    Mutation(
        "derivative-of-the-square",
        "replicate/ffn.py",
        "dy1 = 2 * dy2 * relu_y1",
        "dy1 = dy2 * relu_y1",
        "tests/test_ffn.py",
    ),
    Mutation(
        "rows-of-w2-not-permuted",
        "replicate/ffn.py",
        "self.w2.copy_(self.w2[perm])",
        "self.w2.copy_(self.w2)",
        "tests/test_ffn.py",
    ),
]


def copy_package(target: Path) -> Path:
    """Package, data and tests in a folder of their own."""
    skip = shutil.ignore_patterns("__pycache__", "recorded")
    for name in ("replicate", "data", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


def run_tests(copy: Path, *which: str) -> subprocess.CompletedProcess:
    """pytest on the copy, whose package comes first; conftest.py refuses any other."""
    env = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "REPLICATE_EXPECTED_ROOT": str(copy),
        "OMP_NUM_THREADS": "1",
    }
    for name in [key for key in env if key.startswith(("COVERAGE", "COV_", "PYTEST_"))]:
        del env[name]
    command = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-x",
        "-rf",
        "--color=no",
        "-p",
        "no:cacheprovider",
        *which,
    ]
    return subprocess.run(
        command, cwd=copy, env=env, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False
    )


def first_failure(output: str) -> str:
    """The test that failed, without its parameters, from pytest's summary."""
    found = re.search(r"^FAILED (\S+?::[^\s\[]+)", output, re.MULTILINE)
    assert found, output[-2000:]
    return found.group(1)


@functools.cache
def passes(copy: Path, test: str) -> str:
    """Empty if the test passes on the copy, else what pytest said."""
    done = run_tests(copy, test)
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    return copy_package(tmp_path_factory.mktemp("unchanged"))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_wrong_formula_turns_a_test_red(mutation, unchanged, tmp_path):
    copy = copy_package(tmp_path / "mutated")
    path = copy / mutation.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, f"{mutation.old!r} is not in {mutation.file} exactly once"
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    red = run_tests(copy, mutation.tests)
    assert red.returncode == 1, (
        f"no test failed (exit {red.returncode}):\n{(red.stdout + red.stderr)[-2000:]}"
    )
    test = first_failure(red.stdout)
    problem = passes(unchanged, test)
    assert not problem, f"{test} fails without the mutation too:\n{problem}"


def test_another_package_than_the_copy_is_refused(unchanged, tmp_path):
    """Else a mutation could go unseen because the tests ran on the original."""
    env = {**os.environ, "REPLICATE_EXPECTED_ROOT": str(tmp_path / "elsewhere")}
    command = [sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider", "tests/test_mutation.py"]
    done = subprocess.run(command, cwd=unchanged, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "replicate comes from" in done.stdout + done.stderr
