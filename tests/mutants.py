"""Mutation testing by a tool: small mistakes drawn at random, each against the tests of its module.

    pip install -e ".[test,mutation]"
    python tests/mutants.py --sample 320 --seed 1 --workers 8 --out mutants.json

draws mutants of the method files and of ablations.py (not of figures.py, which only draws) by cosmic-ray's
operators, and by two for products that it lacks, runs each on a copy of the tree, and prints a table and the
survivors. One in seven lies in the forward and backward products, half of these in the layer's own; the
others spread over the files by their lines. `--draw FILE` only draws, `--run FILE` only runs, without
cosmic-ray. All takes an hour on one core, hence it is no part of the test suite; test_mutation.py is, a short
list.
"""

import argparse
import ast
import difflib
import json
import queue
import random
import re
import subprocess
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from equivalent_mutants import reason_for
from test_mutation import ROOT, copy_package, run_tests

TESTS = {  # module -> the tests that must notice
    "config": ("test_config.py",),
    "sparsity": ("test_sparsity.py",),
    "router": ("test_router.py", "test_causality.py", "test_ffn.py"),
    "ffn": ("test_ffn.py", "test_causality.py"),
    "ablations": ("test_sparsity.py", "test_ffn.py", "training/test_layer_state.py"),
    "gpt": ("test_gpt.py", "test_causality.py"),
    "data": ("test_data.py",),
    "schedule": ("test_schedule.py",),
    "train": ("test_train.py",),
    "evaluate": ("test_evaluate.py", "test_train.py"),
}
# Where the six products are computed.
PRODUCTS = ("_SparseProducts", "_over_tokens", "own_gradient_mask", "score_gradient", "token_reduction")
# Only junk: arithmetic in place of bits and the reverse, and signs of masks, raise at once on any input; `is`
# for `==` is the same on short strings and small numbers; whether a string is below another means nothing.
JUNK = re.compile(
    r"BinaryOperator_(?!(Add|Sub|Mul|Div|FloorDiv|Mod|Pow)_(Add|Sub|Mul|Div|FloorDiv|Mod|Pow)$"
    r"|Bit\w+_Bit\w+$|.Shift_.Shift$)|UnaryOperator_Invert_U|ComparisonOperator_(?!Is)\w+_Is(Not)?$"
)
# Names that no activation or gradient of a product can stand for: each would raise.
OTHERS = {"ctx", "ffn", "c", "w1", "w2", "score", "tokens", "d_ff", "whole", "wide", "groups", "over_tokens"}


def operators():
    """(name, operator) of cosmic-ray's that need no arguments, and of two more."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes
    from cosmic_ray.operators.operator import Operator

    class DropTranspose(Operator):
        """a.T becomes a."""

        examples = classmethod(lambda cls: ())

        def mutation_positions(self, node):
            if node.type == "trailer" and node.get_code() == ".T":
                yield node.start_pos, node.end_pos

        def mutate(self, node, index):
            return None  # removes it

    class OtherTensor(DropTranspose):
        """In a product's function, a variable becomes another one that is known there."""

        def others(self, node):
            function = node.type == "name" and node.search_ancestor("funcdef")
            if not function or node.is_definition() or node.get_previous_leaf() == ".":
                return []
            if not is_product(qualified(node)) or node.parent.get_code().endswith(".dtype"):
                return []
            names = [other for other in ast_nodes(function) if other.type == "name" and other.is_definition()]
            known = {other.value for other in names if other.line < node.line} - OTHERS
            return sorted(known - {node.value, function.name.value}) if node.value in known else []

        def mutation_positions(self, node):
            return [(node.start_pos, node.end_pos) for _ in self.others(node)]

        def mutate(self, node, index):
            node.value = self.others(node)[index]
            return node

    for name in plugins.operator_names():
        if not plugins.get_operator(name).arguments() and not JUNK.search(name):
            yield name.split("/")[1], plugins.get_operator(name)()
    yield "DropTranspose", DropTranspose()
    yield "OtherTensor", OtherTensor()


def qualified(node):
    """Class and function around a node, "" at the module's top."""
    names = []
    while node := node.parent:
        names += [node.name.value] if node.type in ("funcdef", "classdef") else []
    return ".".join(reversed(names))


def is_product(function):
    return function.split(".")[0] in PRODUCTS


def source(module, root=ROOT):
    return root / "replicate" / f"{module}.py"


class Bare(ast.NodeTransformer):
    """Code without annotations, messages of exceptions and imports for types, none of which runs."""

    def visit_arg(self, node):
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node):
        node.annotation = ast.Constant(0)
        return self.generic_visit(node)

    def visit_Raise(self, node):
        return ast.Raise(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)

    def visit_If(self, node):
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)


def bare(text):
    try:
        return ast.unparse(Bare().visit(ast.parse(text)))
    except SyntaxError:
        return None


def draw(sample, seed, modules):
    """The mutants, by module and line; most places of the code are met once before any is met twice."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    rng, pools, lines = random.Random(seed), {}, {}
    for module in modules:
        text = source(module).read_text(encoding="utf-8")
        tree, lines[module] = get_ast(text), text.count("\n")
        for name, operator in operators():
            places = [n for n in ast_nodes(tree) for _ in operator.mutation_positions(n)]
            for nth, node in enumerate(places):
                last = node.children[-1] if node.type == "comparison" else node
                if last.type == "string" and not name.endswith("Eq"):
                    continue
                function = qualified(node)
                pool = pools.setdefault((module, is_product(function)), [])
                pool.append((module, function, node.start_pos, name, operator, nth))
    quota = {(module, True): -(-sample // 14) for module in modules if (module, True) in pools}
    rest, total, done = sample - sum(quota.values()), sum(lines.values()), 0
    for module in modules:
        quota[module, False] = rest * (done + lines[module]) // total - rest * done // total
        done += lines[module]
    drawn = []
    for stratum, pool in pools.items():
        rng.shuffle(pool)
        met, ranks, seen = Counter(), {}, set()
        for item in pool:
            met[item[:3]] += 1
            ranks[id(item)] = met[item[:3]] + (item[3] == "OtherTensor")
        for module, function, _, name, operator, nth in sorted(pool, key=lambda item: ranks[id(item)]):
            old = source(module).read_text(encoding="utf-8")
            new = mutate_code(old, operator, nth) if len(seen) < quota[stratum] else None
            if new and bare(new) not in {None, bare(old), *seen}:
                seen.add(bare(new))
                drawn.append({"module": module, "function": function, "operator": name})
                drawn[-1] |= changed(old.splitlines(), new.splitlines())
    return sorted(drawn, key=lambda m: (modules.index(m["module"]), m["line"]))


def changed(old, new):
    """The first line (from 1) that differs, and the old and new lines from there to the last that does."""
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    edits = [block for block in blocks if block[0] != "equal"]
    first, last, first_new, last_new = edits[0][1], edits[-1][2], edits[0][3], edits[-1][4]
    return {"line": first + 1, "old": old[first:last], "new": new[first_new:last_new]}


def tests_pass(copy, module, timeout=None):
    """True if the module's tests pass on a copy; False if one fails, breaks or is too slow."""
    files = [f"tests/{name}" for name in TESTS[module]]
    try:
        done = run_tests(copy, *files, "--hypothesis-seed=1", timeout=timeout)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode in (3, 4, 5):
        raise SystemExit(f"pytest did not run the tests of {module}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def run(mutants, workers):
    """Each mutant with "result": "killed" or "survived"."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        copies, limits = queue.Queue(), {}
        for i in range(workers):
            copies.put(copy_package(Path(folder) / str(i)))

        def measure(module):
            copy, begun = copies.get(), time.perf_counter()
            if not tests_pass(copy, module):
                raise SystemExit(f"the tests of {module} fail without any mutation")
            limits[module] = 60 + 5 * (time.perf_counter() - begun)
            copies.put(copy)

        def judge(mutant):
            copy = copies.get()
            path = source(mutant["module"], copy)
            text = path.read_text(encoding="utf-8")
            lines, first = text.splitlines(), mutant["line"] - 1
            stop = first + len(mutant["old"])
            if lines[first:stop] != mutant["old"]:
                raise SystemExit(f"{path.name} has changed since the mutants were drawn; draw again")
            lines[first:stop] = mutant["new"]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            survived = tests_pass(copy, mutant["module"], limits[mutant["module"]])
            path.write_text(text, encoding="utf-8")
            copies.put(copy)
            return mutant | {"result": "survived" if survived else "killed"}

        list(pool.map(measure, dict.fromkeys(mutant["module"] for mutant in mutants)))
        results = []
        for result in pool.map(judge, mutants):
            results.append(result)
            print(
                f"{len(results)}/{len(mutants)} {result['result']}: {result['module']}.{result['function']}",
                flush=True,
            )
        return results


def report(results):
    """A table by module, then every survivor with its lines and, if it changes nothing, the reason."""
    print(f"\n{'module':12}{'mutants':>8}{'killed':>8}{'survived':>9}{'equivalent':>11}{'killed %':>9}")
    groups = {module: [r for r in results if r["module"] == module] for module in TESTS}
    groups |= {"products": [r for r in results if is_product(r["function"])], "all": results}
    for name, group in groups.items():
        killed = sum(r["result"] == "killed" for r in group)
        same = sum(r["result"] == "survived" and bool(reason_for(r)) for r in group)
        share = f"{100 * killed / (len(group) - same):.1f}" if len(group) > same else "-"
        print(f"{name:12}{len(group):8}{killed:8}{len(group) - killed - same:9}{same:11}{share:>9}")
    for r in results:
        if r["result"] == "survived":
            print(f"\n{r['module']}.py:{r['line']} {r['function']} ({r['operator']})")
            print("\n".join([f"- {line}" for line in r["old"]] + [f"+ {line}" for line in r["new"]]))
            print(f"  equivalent: {reason_for(r)}" if reason_for(r) else "  survived")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=320, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--workers", type=int, default=1, help="copies of the tree that run at a time")
    parser.add_argument("--only", nargs="+", choices=TESTS, default=list(TESTS), help="modules")
    parser.add_argument("--draw", type=Path, help="write the mutants here, and run none")
    parser.add_argument("--run", type=Path, help="run the mutants of this file, drawn before")
    parser.add_argument("--out", type=Path, help="write the mutants and what became of them here")
    args = parser.parse_args()
    if args.run:
        mutants = [m for m in json.loads(args.run.read_text(encoding="utf-8")) if m["module"] in args.only]
    else:
        mutants = draw(args.sample, args.seed, args.only)
    if args.draw:
        args.draw.write_text(json.dumps(mutants, indent=1), encoding="utf-8")
        print(Counter(mutant["module"] for mutant in mutants))
        return
    results = run(mutants, args.workers)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    report(results)


if __name__ == "__main__":
    main()
