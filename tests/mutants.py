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
import json
import queue
import subprocess
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from draw_mutants import draw, is_product, source
from equivalent_mutants import reason_for
from test_mutation import copy_package, run_tests

TESTS = {  # module -> the tests that must notice
    "config": ("test_config.py",),
    "sparsity": ("test_sparsity.py",),
    "router": ("test_router.py", "test_causality.py", "test_ffn.py"),
    "ffn": ("test_ffn.py", "test_causality.py", "training/test_layer_state.py"),
    "ablations": ("test_sparsity.py", "test_ffn.py", "training/test_layer_state.py"),
    "fp8": ("test_fp8.py", "test_ffn.py"),
    "gpt": ("test_gpt.py", "test_causality.py"),
    "data": ("test_data.py",),
    "schedule": ("test_schedule.py",),
    "train": ("test_train.py",),
    "evaluate": ("test_evaluate.py", "test_train.py"),
}


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
