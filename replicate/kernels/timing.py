"""What the benchmarks share: operands, CUDA graphs, times, peak memory, and the time of each kernel."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from replicate import measure

DTYPE = torch.bfloat16
NAME_LENGTH = 160  # characters of a kernel's name that are kept: names of templates run to thousands
Calls = dict[Any, Callable[[], Any]]


def randn(rows: int, cols: int) -> Tensor:
    """A random [rows, cols] of DTYPE on the GPU."""
    return torch.randn(rows, cols, device="cuda", dtype=DTYPE)


def graphed(step: Callable[[], Any], pool: Any = None, warm: int = 2) -> Callable[[], None]:
    """Replay of `step` as a CUDA graph, captured after `warm` calls, none if it has run before.

    Graphs that share a `pool` write their results to the same memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        kept = step()
    if pool is not None:
        kept = None
    return lambda: (graph.replay(), kept)[0]


def medians(calls: Calls, repeats: int) -> dict[Any, float]:
    """Median milliseconds of each call as a CUDA graph, in turns."""
    graphs = {name: graphed(fn) for name, fn in calls.items()}
    return {n: t.median for n, t in measure.compare(graphs, device="cuda", repeats=repeats).items()}


def sustained_ms(step: Callable[[], Any], seconds: float = 0.3) -> float:
    """Milliseconds a call, back to back, once the chip runs as hot as in training."""
    n = max(3, round(1e3 * seconds / measure.time_ms(step, device="cuda", repeats=3).median))
    for _ in range(n):
        step()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(n):
        step()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / n


def peak_bytes(step: Callable[[], Any], before: Callable[[], Any] | None = None) -> int:
    """Most memory in use during a step, above what is allocated once a first step and `before` have run."""
    step()
    if before:
        before()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - start


def kernel_ms(step: Callable[[], Any], *, device: str = "cuda", repeats: int = 3) -> dict[str, float]:
    """Milliseconds a step spends in each GPU kernel (on a CPU: in each torch operator), longest first.

    By torch.profiler, launched one by one. A name is cut at NAME_LENGTH characters.
    """
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    wait = torch.cuda.synchronize if on_gpu else contextlib.nullcontext
    step()
    wait()
    with profile(activities=activities) as found:
        for _ in range(repeats):
            step()
        wait()
    times: dict[str, float] = {}
    for event in found.key_averages():
        annotation = event.is_user_annotation or event.key.startswith("##")
        if (event.device_type == DeviceType.CUDA) != on_gpu or annotation:
            continue
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / repeats
        name = event.key[:NAME_LENGTH]
        times[name] = times.get(name, 0.0) + spent
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def spreads(
    calls: dict[str, Callable[[], Any]], device: str, repeats: int, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Median, 10th and 90th percentile of each call's milliseconds, in turns: {name: {"ms", ...}}."""
    timings = measure.compare(calls, device=device, repeats=repeats, warmup=warmup)
    return {n: {"ms": t.median, "ms_p10": t.low, "ms_p90": t.high} for n, t in timings.items()}


def graph_spreads(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """`spreads` of graph replays, so that what is timed is the GPU's work and not Python's."""
    pool = torch.cuda.graph_pool_handle()
    graphs = {name: graphed(fn, pool) for name, fn in calls.items()}
    found = spreads(graphs, "cuda", repeats)
    graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return found
