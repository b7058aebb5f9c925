"""What the benchmarks share: CUDA graphs, back-to-back times, peak memory, and the time of each kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from replicate import measure

NAME_LENGTH = 160  # characters of a kernel's name that are kept: names of templates run to thousands
Calls = dict[Any, Callable[[], Any]]


def graphed(step: Callable[[], Any]) -> Callable[[], None]:
    """Replay of `step` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
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


def peak_bytes(step: Callable[[], Any]) -> int:
    """Most memory in use during a step, above what is allocated before it."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


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
