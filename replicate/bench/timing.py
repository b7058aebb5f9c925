"""What the benchmarks share: times, CUDA graphs, peak memory, the time of each kernel, relative errors.

Two numbers are compared only within one run: the candidates take turns, so that clock changes and
neighbours hit them alike.
"""

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

FLUSH_BYTES = 256 * 2**20  # larger than any L2 cache
NAME_LENGTH = 160  # characters of a kernel's name that are kept: names of templates run to thousands
WARMUP = 2  # calls
Calls = dict[Any, Callable[[], Any]]
Spread = dict[str, float]


def compare(calls: Calls, device: str, repeats: int) -> dict[Any, Spread]:
    """Milliseconds of calls that take turns: {name: {"ms": median, "ms_p10", "ms_p90"}}.

    On a CPU by the clock; on a GPU by events, so that the launch overhead hides as it does in training, and
    with an L2 cache as cold as inside a training step.
    """
    for fn in calls.values():
        for _ in range(WARMUP):
            fn()
    on_gpu = torch.device(device).type == "cuda"
    cache = torch.empty(FLUSH_BYTES if on_gpu else 0, dtype=torch.int8, device=device)
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, fn in calls.items():
            cache.zero_()
            times[name].append(_by_events(fn) if on_gpu else _by_clock(fn))
    keys = ("ms", "ms_p10", "ms_p90")
    return {n: dict(zip(keys, np.quantile(t, [0.5, 0.1, 0.9]).tolist())) for n, t in times.items()}


def compare_graphs(calls: Calls, repeats: int) -> dict[Any, Spread]:
    """`compare` of CUDA graphs, so that what is timed is the GPU's work and not Python's."""
    graphs = graphed_all(calls)
    found = compare(graphs, "cuda", repeats)
    graphs.clear()
    release()
    return found


def graphed_all(calls: Calls) -> Calls:
    """Replays of all calls, which write their results to the same memory."""
    pool = torch.cuda.graph_pool_handle()
    return {name: graphed(fn, pool) for name, fn in calls.items()}


def graphed(step: Callable[[], Any], pool: Any, warm: int = 2) -> Callable[[], None]:
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
        step()
    return graph.replay


def sustained_ms(step: Callable[[], Any], seconds: float = 0.3) -> float:
    """Milliseconds a call, back to back, once the chip runs as hot as in training."""
    n = max(3, round(1e3 * seconds / compare({"step": step}, "cuda", 3)["step"]["ms"]))

    def back_to_back() -> None:
        for _ in range(n):
            step()

    back_to_back()
    return _by_events(back_to_back) / n


def peak_bytes(step: Callable[[], Any]) -> int:
    """Most memory in use during a step, above what is allocated after a first one."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - start


def release() -> None:
    """Give unused GPU memory back."""
    gc.collect()
    torch.cuda.empty_cache()


def kernel_ms(step: Callable[[], Any], *, device: str = "cuda") -> dict[str, float]:
    """Milliseconds a step spends in each GPU kernel (on a CPU: in each torch operator), longest first.

    By torch.profiler, launched one by one. A name is cut at NAME_LENGTH characters.
    """
    on_gpu, repeats = torch.device(device).type == "cuda", 3
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
        if (event.device_type == DeviceType.CUDA) == on_gpu and not annotation:
            spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / repeats
            name = event.key[:NAME_LENGTH]
            times[name] = times.get(name, 0.0) + spent
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||; NaN if anything is."""
    ours, reference = ours.detach().float(), reference.detach().float()
    return float(torch.linalg.vector_norm(ours - reference) / torch.linalg.vector_norm(reference))


def _by_clock(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return 1e3 * (time.perf_counter() - start)


def _by_events(fn: Callable[[], Any]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    fn()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)
