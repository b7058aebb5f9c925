#!/usr/bin/env python3
"""From a fresh clone to every figure and the claim table, or to the tests, in one command.

    python3 reproduce.py                     every notebook at profile smoke, then the claim table
    python3 reproduce.py --profile laptop    the same at a larger scale (smoke, laptop or gpu)
    python3 reproduce.py --only 03 08        these notebooks only
    python3 reproduce.py --list              what there is to run
    python3 reproduce.py test                lint, unit tests, notebooks

The first run makes .venv and installs the package with the exact versions of constraints.txt; an
environment that already has them (conda, an active venv) is used as it is. Run again after an
interruption: what is done stays done.
"""

import argparse
import contextlib
import errno
import json
import os
import re
import subprocess
import sys
import time

import installation
from installation import ROOT, Stop, duration


def notebooks():
    """(number, name, title) of each notebook, in reading order."""
    found = []
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        found.append((path.name[:2], path.stem, title.group(1) if title else path.stem))
    return found


def check_only(only):
    """Raise Stop if --only names a notebook there is not."""
    known = notebooks()
    for name in only or []:
        if not any(name.zfill(2) == number or name == stem for number, stem, _ in known):
            have = ", ".join(number for number, _, _ in known) or "none"
            raise Stop(f"There is no notebook {name!r}; there are {have} (see --list).")


def run_notebooks(options):
    """Every notebook of the profile, then the claim table; the exit status."""
    check_only(options.only)
    python = installation.ready(["notebooks"])
    command = [str(python), "-m", "replicate", "notebooks", "run", "--profile", options.profile]
    command += ["--seed", str(options.seed)]
    command += ["--only", *options.only] if options.only else []
    command += ["--keep-going"] if options.keep_going else []
    command += ["--fresh"] if options.fresh else []
    return call(command)


def run_tests(arguments):
    """Lint, unit tests on all cores, notebooks; or pytest with `arguments`; the exit status."""
    python = str(installation.ready(["notebooks", "test"]))
    pytest = [python, "-m", "pytest"]
    if arguments:
        return call(pytest + arguments)
    last = "tests/test_notebooks.py"
    workers = str(min(os.cpu_count() or 1, 8))
    stages = (
        ("Lint", [python, "-m", "ruff", "check", "."]),
        ("Format", [python, "-m", "ruff", "format", "--check", "."]),
        ("Unit tests", [*pytest, "tests", f"--ignore={last}", "-n", workers]),
        ("Notebooks", [*pytest, last]),
    )
    failed = []
    for title, command in stages:
        start = time.monotonic()
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
    parser = argparse.ArgumentParser(
        prog="reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("run", "test"), default="run")
    parser.add_argument("--profile", choices=("smoke", "laptop", "gpu"), default="smoke")
    parser.add_argument("--only", nargs="+", metavar="NN", help="numbers of notebooks, like 03 08")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep-going", action="store_true", help="go on after a notebook that fails")
    parser.add_argument("--fresh", action="store_true", help="run notebooks again that are done already")
    parser.add_argument("--list", action="store_true", help="list the notebooks and stop")
    of_run = ("profile", "only", "seed", "keep_going", "fresh", "list")
    options, rest = parser.parse_known_args(arguments, argparse.Namespace(**dict.fromkeys(of_run)))
    if rest and options.command != "test":
        parser.error(f"unknown argument {rest[0]}")
    for name in of_run:
        if getattr(options, name) is None:
            setattr(options, name, parser.get_default(name))
        elif options.command == "test":
            parser.error(f"--{name.replace('_', '-')} belongs to run; test takes pytest's options")
    return options, rest


def main(arguments=None):
    """Run the command line; the exit status."""
    start = time.monotonic()
    if hasattr(sys.stdout, "reconfigure"):  # a closed one is None
        sys.stdout.reconfigure(errors="replace")  # titles have signs that not every encoding has
    try:
        installation.check_python(sys.version_info)
        options, rest = parse(arguments)
        if options.list:
            print("\n".join(title for _, _, title in notebooks()), flush=True)
            return 0
        code = run_tests(rest) if options.command == "test" else run_notebooks(options)
        print(f"{'Ended with errors' if code else 'Done'} after {duration(time.monotonic() - start)}.")
        return code
    except Stop as problem:
        print(f"reproduce.py: {problem}", file=sys.stderr)
    except KeyboardInterrupt:
        print("reproduce.py: interrupted; run the same command again to go on.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # Python writes what is left at its end
        return 141
    except OSError as error:
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
        full = full or getattr(error, "winerror", None) == 112
        print(f"reproduce.py: {installation.disk_sentence() if full else error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
