"""Drawing mutants for `mutants.py`: all over the code, by the operators of cosmic-ray and two more."""

import ast
import difflib
import random
import re
from collections import Counter

from test_mutation import ROOT

# Where the six products are computed.
PRODUCTS = (
    "_SparseProducts",
    "_sparse_gradients",
    "_DenseProducts",
    "_dense_gradients",
    "_over_tokens",
    "own_gradient_mask",
    "score_gradient",
    "token_reduction",
)
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
