"""`python -m replicate bench <what>`: measure and record on a GPU; elsewhere show what was recorded."""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from replicate.bench import backends, ffn, generate, loop, scale, step, tune_tiles, two_four, venom, wide
from replicate.study.records import Record, RecordStore
from replicate.system import paths
from replicate.system.console import changes, check_folder

BENCHMARKS = {
    "kernels": two_four,
    "venom": venom,
    "ffn": ffn,
    "step": step,
    "wide": wide,
    "generate": generate,
    "scale": scale,
    "backends": backends,
    "train": loop,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and record on a GPU; elsewhere show what was recorded. `train` measures on a CPU too."""
    options = vars(_parser().parse_args(argv))
    what, out, tune = (options.pop(name, None) for name in ("what", "out", "tune"))
    benchmark, on_gpu = BENCHMARKS[what], torch.cuda.is_available()
    configs, how = _configs(what, benchmark, options)
    if tune and (what != "kernels" or not on_gpu):
        raise ValueError("--tune is for `bench kernels` on a GPU")
    store = RecordStore(recorded=out or paths.RECORDED)
    if not on_gpu and benchmark is not loop:
        found = store.all(benchmark.KIND)
        head = f"no GPU here: showing {len(found)} recorded" if found else "no GPU here and nothing recorded"
        print("\n\n".join([head, *(_shown(benchmark, record) for record, _ in found)]))
        return 0
    if out:
        check_folder("--out", out)
    if tune:
        print(tune_tiles.tune_tiles())
    for config in configs:
        record = benchmark.run(config, **how)
        path = store.put(record, recorded=on_gpu or out is not None)
        print(f"{_shown(benchmark, record)}\nrecord: {path}", flush=True)
    return 0


def _configs(what: str, benchmark: Any, options: dict[str, Any]) -> tuple[list[dict], dict[str, Any]]:
    """The configurations to run, and the options of `run`. Raises ValueError for an option of neither."""
    for name in ("repeats", "turn", "workers", "micro"):
        if options.get(name, 1) < 1:
            raise ValueError(f"--{name} is {options[name]}; choose 1 or more")
    if "shapes" in options:
        options["shapes"] = [shape for text in options["shapes"] for shape in _shapes(text)]
    if "changes" in options:
        options["changes"] = changes(options["changes"])
    of_config, of_run = (inspect.signature(f).parameters for f in (benchmark.config, benchmark.run))
    known = {*of_config, *of_run} - ({"shapes"} if what == "venom" else set())  # its shapes have no tokens
    other = [name for name in options if name not in known]
    if other:
        names = ", ".join(f"--{_SPELLED.get(name, name)}" for name in other)
        raise ValueError(f"bench {what} has no {names}; see `python -m replicate bench --help`")
    how = {name: options.pop(name) for name in list(options) if name in of_run}
    presets = options.pop("preset", getattr(benchmark, "PRESETS", None))
    if presets is None:
        return [benchmark.config(**options)], how
    return [benchmark.config(preset=preset, **options) for preset in presets], how


_SPELLED = {"changes": "set", "whole": "no-whole"}


def _shown(benchmark: Any, record: Record) -> str:
    head = f"{record.device}, torch {record.versions.get('torch')}, {record.date}, commit {record.commit}"
    return f"{head}\n{benchmark.table(record)}"


def _shapes(text: str) -> list[list[int]]:
    return [list(shape) for shape in ffn.VIDEO] if text == "video" else [_shape(text)]


def _shape(text: str) -> list[int]:
    numbers = [int(n) if n.strip().isdecimal() else 0 for n in text.split(",")]
    if len(numbers) != 3 or not all(numbers):
        raise ValueError(f"shape {text!r} is not tokens,d_model,d_ff, like 16384,4096,16384")
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="replicate bench", description=main.__doc__, argument_default=argparse.SUPPRESS
    )
    add = parser.add_argument
    add("what", choices=list(BENCHMARKS))
    add("--out", type=Path, help="folder of the records (default: data/recorded; on a CPU, runs/records)")
    add("--repeats", type=int, help="timed calls of each candidate")
    add("--shapes", nargs="+", metavar="T,D,F", help="kernels, ffn: tokens, d_model, d_ff; ffn: or video")
    add("--sparsity", nargs="+", metavar="NAME", help="ffn, step, scale: sparsity presets")
    add("--arms", nargs="+", metavar="NAME", help="wide: arms of the study; generate: its own")
    add("--batches", nargs="+", type=int, help="generate: texts at a time, 1 to 64 (1 8 64)")
    add("--preset", nargs="+", metavar="NAME", help="step, wide, scale, generate, train: training presets")
    depth = "step, wide: depth, or three or more to fit; scale: one; generate: two"
    add("--layers", nargs="+", type=int, help=depth)
    add("--processes", type=int, help="scale: processes beside one, each with a GPU (default: all GPUs)")
    add("--micro", type=int, help="scale: micro-batches a step")
    add("--attention", help="step: flash, cudnn, torch; auto is the fastest")
    add("--residual", help="step: dtype of the residual stream: float32 (default) or bfloat16")
    add("--no-whole", dest="whole", action="store_false", help="step: compile the dense model only by layer")
    add("--tune", action="store_true", help="kernels: time tiles and warps of the element-wise kernels first")
    add("--workers", type=int, help="backends: runs at a time")
    add("--turn", type=int, help="train: steps until the next loop takes its turn")
    add(
        "--set",
        dest="changes",
        action="extend",
        nargs="+",
        metavar="KEY=VALUE",
        help="backends, scale, train",
    )
    return parser
