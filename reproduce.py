#!/usr/bin/env python3
"""From a fresh clone to every figure and the claim table, or to the tests, in one command.

    python3 reproduce.py                     every notebook at profile smoke, then the claim table
    python3 reproduce.py --profile laptop    the same at a larger scale (smoke, laptop or gpu)
    python3 reproduce.py --only 03 08        these notebooks only
    python3 reproduce.py --seed 2            with another seed (default: 1)
    python3 reproduce.py --keep-going        go on after a notebook that fails
    python3 reproduce.py --fresh             run notebooks again that are done already
    python3 reproduce.py --list              what there is to run
    python3 reproduce.py test                lint, unit tests, notebooks
    python3 reproduce.py test --everywhere   and labs, site, other models, browser,
                                             another processor, another seed
    python3 reproduce.py test ARGUMENTS      pytest with these arguments
    python3 reproduce.py site                the pages as a website, site/_build/html
    python3 reproduce.py install             only what run and test do first

The first run makes .venv and installs exact versions, checked by hash (requirements.txt); an environment
that has the package already (conda, an active venv) is used as it is. Run again after an interruption:
what is done stays done. The site, and the tests of labs, other models and browser, install packages of
their own (requirements-more.txt). In the environment: REPLICATE_TORCH=cpu or cuda chooses torch's build on
Linux (else by whether there is an NVIDIA GPU), REPLICATE_VENV, REPLICATE_RUNS and REPLICATE_FIGURES name
other folders for .venv, runs/ and figures/.
"""

import os
import subprocess
import sys
import time

import installation
from installation import EXTRAS, ROOT, Stop, ready, ready_for_more

COMMANDS = ("run", "test", "install", "site")
MORE_TESTS = (
    "tests/course/test_labs.py",
    "tests/site",
    "tests/hf",
    "tests/browser",
)  # of packages that `test` does not install
LONG_ENOUGH = 55 * 60  # seconds after which `test --everywhere` begins no further pass


def run_notebooks(arguments):
    """List the notebooks, or run them and print the claim table; the exit status."""
    python, action = str(ready(["notebooks"])), "run"
    if "--list" in arguments:
        action, arguments = "list", [word for word in arguments if word != "--list"]
    return call([python, "-m", "replicate", "notebooks", action, *arguments])


def run_tests(everywhere):
    """Lint, unit tests on all cores, notebooks; the exit status."""
    begun = time.monotonic()
    python = str(ready(EXTRAS))
    pytest, notebooks = [python, "-m", "pytest"], "tests/test_notebooks.py"
    ignored = [f"--ignore={place}" for place in (notebooks, *MORE_TESTS)]
    stages = {
        "Lint": [python, "-m", "ruff", "check", "."],
        "Format": [python, "-m", "ruff", "format", "--check", "."],
        "Unit tests": [*pytest, "tests", *ignored, "-n", str(min(os.cpu_count() or 1, 8))],
        "Notebooks": [*pytest, notebooks],
    }
    if everywhere:
        stages["Labs, site, other models and browser"] = [str(ready_for_more()), "-m", "pytest", *MORE_TESTS]
        stages["Notebooks, as on a processor without AVX"] = [*pytest, notebooks, "--processor=plain"]
        stages["Notebooks, another seed"] = [*pytest, notebooks, "--notebook-seed=drawn"]
    failed = []
    for title, command in stages.items():
        if title.startswith("Notebooks,") and time.monotonic() - begun > LONG_ENOUGH:
            print(f"== {title}: left out, the others took so long", flush=True)
            continue
        print(f"== {title}", flush=True)
        failed += [title] if call(command) else []
    print(f"FAILED: {', '.join(failed)}." if failed else "All passed.")
    return 1 if failed else 0


def call(command):
    """Run a command in the checkout to its end and give its exit status.

    Threads that wait sleep: those that spin make training many times slower where others use the processor.
    """
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUTF8": "1"}
    process = subprocess.Popen(command, cwd=str(ROOT), env=env)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()  # it was interrupted too, and says what it keeps
        raise


def main(arguments):
    """Run the command line; the exit status."""
    command, *rest = arguments if arguments and arguments[0] in COMMANDS else ["run", *arguments]
    if "-h" in rest or "--help" in rest or (command == "install" and rest):
        print(__doc__)
        return 0
    try:
        installation.check_python(sys.version_info)
        if command == "install":
            print(f"Ready: {ready(EXTRAS)}")
            return 0
        if command == "run":
            return run_notebooks(rest)
        if rest in ([], ["--everywhere"]):
            return run_tests(everywhere=bool(rest))
        if command == "site":
            return call([str(ready_for_more()), "site/build.py", *rest])
        more = any(word.startswith(MORE_TESTS) for word in rest)
        python = ready_for_more() if more else ready(EXTRAS)
        return call([str(python), "-m", "pytest", *rest])
    except (Stop, OSError) as problem:
        print(f"reproduce.py: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("reproduce.py: interrupted; run the same command again to go on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
