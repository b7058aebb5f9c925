"""The package keeps its shape: what may import what, how long files are, what a step on a CPU reads."""

import ast
import re
import subprocess
import sys
from functools import cache

import pytest
import torch

from replicate.ffn import SparseFFN
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.system.paths import ROOT

PACKAGE = ROOT / "replicate"
METHOD = ("config", "sparsity", "router", "ffn", "gpt", "data", "schedule", "train", "evaluate", "figures")
BUDGETS = (2300, 10620, 26200)  # lines: the method files; root, kernels and training; all
# From the lowest to the highest: a module imports from its own folder, from lower ones and from the root.
FOLDERS = (
    "system",
    "text",
    "settings",
    "kernels",
    "training",
    "study",
    "diffusion",
    "paper",
    "bench",
    "report",
)
# The root's own modules may use these folders.
BELOW_THE_ROOT = ("system", "text", "settings", "training", "kernels")
LAZY = {"ffn": ("kernels",)}  # imports inside functions: Triton is optional


@cache
def modules():
    """Dotted name (without the package's) -> path."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(name):
    """(module of the package, True if the import stands inside a function) of each import of a module."""
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing:
            continue
        if (node.module or "").split(".")[0] != "replicate":
            continue
        base = node.module.removeprefix("replicate").lstrip(".")
        for alias in node.names:
            full = f"{base}.{alias.name}".lstrip(".")
            target = full if full in modules() else base
            yield target, id(node) not in top and not isinstance(node, ast.Try)


def folder(name):
    return name.split(".")[0] if name.split(".")[0] in FOLDERS else ""


@pytest.mark.parametrize("name", [name for name in modules() if name not in ("", "__main__")])
def test_imports_point_down(name):
    own = folder(name)
    for target, _ in imports(name):
        other = folder(target)
        if not own:
            assert other == "" or other in BELOW_THE_ROOT, f"{name} imports {target}"
        elif other:
            assert FOLDERS.index(other) <= FOLDERS.index(own), f"{name} imports {target}, which is above it"


def test_there_is_no_circle():
    graph = {name: {target for target, _ in imports(name)} - {name} for name in modules()}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        path.append(name)
        for target in sorted(graph.get(name, ())):
            visit(target)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_no_import_of_the_package_hides_inside_a_function():
    hidden = [(name, target) for name in modules() for target, inside in imports(name) if inside]
    assert all(folder(target) in LAZY.get(name, ()) for name, target in hidden), hidden


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_module_is_long():
    long = {name: lines(path) for name, path in modules().items() if lines(path) > 350}
    assert not long


def test_budgets_of_lines():
    count = {name: lines(path) for name, path in modules().items()}
    core = sum(n for name, n in count.items() if name in METHOD)
    inner = sum(n for name, n in count.items() if not folder(name) or folder(name) in ("kernels", "training"))
    assert set(METHOD) <= set(count) and count["ffn"] <= 265
    assert core <= BUDGETS[0] and inner <= BUDGETS[1] and sum(count.values()) <= BUDGETS[2]


def test_a_step_on_a_cpu_reads_no_kernel():
    entered = set()

    def note(frame, event, _):
        if event == "call":
            entered.add(frame.f_code.co_filename)

    for name in ("dense", "recipe", "act24", "w1+w2+t"):
        ffn = SparseFFN(64, 256, SPARSITY_PRESETS[name])
        ffn.make_clusters(1)
        ffn.phase = "dense" if name == "dense" else "sparse"
        sys.setprofile(note)
        try:
            ffn(torch.randn(16, 64)).sum().backward()
        finally:
            sys.setprofile(None)
    assert any(file.endswith("ffn.py") for file in entered)
    assert not [file for file in entered if "/kernels/" in file.replace("\\", "/")]


def test_to_import_the_package_is_quick():
    """torch._dynamo takes a second; what needs it imports it when it compiles."""
    code = "import sys, replicate.train; sys.exit('torch._dynamo' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], check=False).returncode


def test_a_new_rule_for_clusters_is_a_function_and_a_line(monkeypatch):
    """As docs/architecture.md shows it."""
    from replicate import config, router

    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(def nearest_by_angle.*?)```", text, re.DOTALL)[1]
    scope = dict(vars(router))
    exec(compile(code, "docs/architecture.md", "exec"), scope)
    assert list(config.ROUTINGS) == [*router.RULES, "oracle-block"], "the table alone says what there is"
    monkeypatch.setitem(router.RULES, "angle", scope["nearest_by_angle"])
    monkeypatch.setattr(config, "ROUTINGS", (*config.ROUTINGS, "angle"))
    ffn = SparseFFN(
        64, 256, config.SparsityConfig(activation="venom", n_clusters=8, top_k=2, routing="angle")
    )
    ffn.make_clusters(1)
    ffn.phase = "sparse"
    assert ffn.clusters(torch.randn(10, 64)).shape == (10, 2) and ffn(torch.randn(10, 64)).shape == (10, 64)


def test_readme_and_architecture_name_every_folder_and_method_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    layout = readme[readme.index("## Layout") :]
    for name in METHOD:
        assert f"{name}.py" in layout, f"README's layout lacks {name}.py"
    for name in FOLDERS:
        assert f"{name}/" in layout and f"`{name}/`" in page, f"{name}/ is missing"
    graph = re.search(r"(?s)```mermaid\n(.+?)```", page).group(1)
    drawn = re.findall(r"\b(\w+)(/|\.py)", graph)
    assert len(drawn) > 12 and all((PACKAGE / f"{name}{end}").exists() for name, end in drawn)
    places = [layout.index(f"{name}.py") for name in METHOD]
    assert places == sorted(places), "in reading order"
