#!/usr/bin/env python3
"""From a fresh clone to every figure and the claim table, or to the tests, in one command.

    python3 reproduce.py                     every notebook at profile smoke, then the claim table
    python3 reproduce.py --profile laptop    the same at a larger scale (smoke, laptop or gpu)
    python3 reproduce.py --only 03 08        these notebooks only
    python3 reproduce.py --list              what there is to run
    python3 reproduce.py test                lint, unit tests, notebooks
    python3 reproduce.py test --everywhere   and the notebooks as on another processor and with another seed
    python3 reproduce.py install             only what each of these does first

The first run makes .venv and installs exact versions, checked by hash (requirements.txt); an environment
that has the package already (conda, an active venv) is used as it is. Run again after an interruption:
what is done stays done. In the environment: REPLICATE_TORCH=cpu or cuda chooses torch's build on Linux
(else by whether there is an NVIDIA GPU), REPLICATE_VENV, REPLICATE_RUNS and REPLICATE_FIGURES name other
folders for .venv, runs/ and figures/.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time

import installation
from installation import ROOT, Stop, duration

LONG_ENOUGH = 45 * 60  # seconds after which `test --everywhere` begins no further pass
OF_RUN = ("--profile", "--only", "--seed", "--keep-going", "--fresh", "--list")


def notebooks():
    """(number, name, title) of each notebook, in reading order."""
    found = []
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        found.append((path.name[:2], path.stem, title.group(1) if title else path.stem))
    return found


def run_notebooks(options):
    """Every notebook of the profile, then the claim table; the exit status."""
    known = notebooks()
    for name in options.only or []:
        if not any(name.zfill(2) == number or name == stem for number, stem, _ in known):
            have = ", ".join(number for number, _, _ in known) or "none"
            raise Stop(f"There is no notebook {name!r}; there are {have} (see --list).")
    installation.folder("REPLICATE_FIGURES", "figures")  # a place that cannot be written stops here
    python = installation.ready(["notebooks"])
    command = [str(python), "-m", "replicate", "notebooks", "run", "--profile", options.profile]
    command += ["--seed", str(options.seed)]
    command += ["--only", *options.only] if options.only else []
    command += ["--keep-going"] if options.keep_going else []
    command += ["--fresh"] if options.fresh else []
    return call(command)


def run_tests(arguments, everywhere, begun):
    """Lint, unit tests on all cores, notebooks; or pytest with `arguments`; the exit status."""
    python = str(installation.ready(installation.EXTRAS))
    pytest = [python, "-m", "pytest"]
    if arguments:
        return call(pytest + arguments)
    last = "tests/test_notebooks.py"
    workers = str(min(os.cpu_count() or 1, 8))
    stages = [
        ("Lint", [python, "-m", "ruff", "check", "."]),
        ("Format", [python, "-m", "ruff", "format", "--check", "."]),
        ("Unit tests", [*pytest, "tests", f"--ignore={last}", "-n", workers]),
        ("Notebooks", [*pytest, last]),
    ]
    passes = {
        "Notebooks, as on a processor without AVX": "--processor=plain",
        "Notebooks, another seed": "--notebook-seed=drawn",
    }
    stages += [(title, [*pytest, last, option]) for title, option in passes.items() if everywhere]
    failed = []
    for title, command in stages:
        start = time.monotonic()
        if title in passes and start - begun > LONG_ENOUGH:
            print(f"== {title}: left out, {duration(start - begun)} have gone", flush=True)
            continue
        print(f"== {title}", flush=True)
        code = call(command)
        failed += [title] if code else []
        verdict = "FAILED" if code else "passed"
        print(f"== {title}: {verdict} in {duration(time.monotonic() - start)}", flush=True)
    print(f"FAILED: {', '.join(failed)}." if failed else "All passed.")
    return 1 if failed else 0


def call(command):
    """Run a command in the checkout to its end and give its exit status; Ctrl-C goes to it first."""
    process = subprocess.Popen(command, cwd=str(ROOT), env={**os.environ, "PYTHONUTF8": "1"})
    try:
        return process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout=20)
        process.kill()
        raise


def parse(arguments):
    """The command line's options, and what is left of it for pytest."""
    parser = argparse.ArgumentParser("reproduce.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", nargs="?", choices=("run", "test", "install"), default="run")
    parser.add_argument("--profile", choices=("smoke", "laptop", "gpu"), default="smoke")
    parser.add_argument("--only", nargs="+", metavar="NN", help="numbers of notebooks, like 03 08")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep-going", action="store_true", help="go on after a notebook that fails")
    parser.add_argument("--fresh", action="store_true", help="run notebooks again that are done already")
    parser.add_argument("--list", action="store_true", help="list the notebooks and stop")
    parser.add_argument("--everywhere", action="store_true", help="test: see above")
    options, rest = parser.parse_known_args(arguments)
    for word in arguments if options.command != "run" else ():
        if word.split("=")[0] in OF_RUN:
            parser.error(f"{word.split('=')[0]} belongs to run; test takes pytest's options, install none")
    if options.everywhere and (rest or options.command != "test"):
        parser.error("--everywhere belongs to test, and takes no options of pytest")
    if rest and options.command != "test":
        parser.error(f"unknown argument {rest[0]}")
    return options, rest


def main(arguments=None):
    """Run the command line; the exit status."""
    start = time.monotonic()
    if hasattr(sys.stdout, "reconfigure"):  # a closed one is None
        sys.stdout.reconfigure(errors="replace")  # titles have signs that not every encoding has
    try:
        installation.check_python(sys.version_info)
        options, rest = parse(sys.argv[1:] if arguments is None else arguments)
        if options.list:
            print("\n".join(title for _, _, title in notebooks()), flush=True)
            return 0
        if options.command == "install":
            print(f"Ready: {installation.ready(installation.EXTRAS)}")
            return 0
        code = (
            run_tests(rest, options.everywhere, start)
            if options.command == "test"
            else run_notebooks(options)
        )
        print(f"{'Ended with errors' if code else 'Done'} after {duration(time.monotonic() - start)}.")
        return code
    except Stop as problem:
        print(f"reproduce.py: {problem}", file=sys.stderr)
    except KeyboardInterrupt:
        print("reproduce.py: interrupted; run the same command again to go on.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # Python writes what is left at its end
        return 141
    except OSError as error:
        print(f"reproduce.py: {installation.explain_os(error)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
