"""One call as a CUDA graph, and its time, by which a run chooses between kernels."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call, and what it returned: replays write their results there.

    It runs first on another stream, as passes that capture autograd need.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        return graph, call()


def median_ms(call: Callable[[], object], repeats: int = 7) -> float:
    """Median milliseconds of a call on the GPU, replayed: without Python and a library's planning."""
    graph, _ = captured(call)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))
