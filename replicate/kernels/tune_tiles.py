"""Times of the element-wise 2:4 kernels over tiles and warps, by replaying CUDA graphs in turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from replicate.kernels.compressed24 import launch_unpack24
from replicate.kernels.relu2_prune24 import launch_relu2_prune24
from replicate.kernels.relu2_prune24_backward import launch_relu2_prune24_backward
from replicate.kernels.soft_threshold_prune24 import launch_soft_threshold_prune24
from replicate.kernels.tile_prune24 import launch_tile_prune24
from replicate.kernels.timing import DTYPE, graph_spreads, randn

# Bands of 16 rows, groups of four, warps; then rows, columns and warps for both orientations.
TILES = [(1, 64, 4), (1, 64, 2), (1, 128, 4), (2, 64, 4), (4, 32, 4), (4, 64, 4), (2, 128, 8), (2, 64, 2)]
BOTH_WAYS = [(64, 64, 4), (128, 64, 4), (128, 64, 8), (64, 128, 4), (128, 128, 8), (128, 128, 4), (64, 64, 2)]
Row = dict[str, Any]


def tune_tiles(tokens: int = 16384, d_ff: int = 16384, d_model: int = 4096, repeats: int = 10) -> list[Row]:
    """Times of the element-wise kernels over tiles and warps; their modules' CONFIG is the fastest one."""
    y1 = randn(tokens, d_ff)
    y2, _ = launch_relu2_prune24(y1, True, False, {"BANDS": 1, "GROUPS": 64, "num_warps": 4})
    functions: dict[str, Callable[[], object]] = {}
    for bands, groups, warps in TILES:
        tile = {"BANDS": bands, "GROUPS": groups, "num_warps": warps}
        functions[f"forward {tile}"] = lambda c=tile: launch_relu2_prune24(y1, True, False, c)
        functions[f"backward {tile}"] = lambda c=tile: launch_relu2_prune24_backward(y1, y2, True, False, c)
        functions[f"unpack {tile}"] = lambda c=tile: launch_unpack24(y2, tokens, d_ff, c)
    axes = {"last": (True, False), "first": (False, True), "both": (True, True)}
    for w, (name, which) in itertools.product(
        (randn(d_model, d_ff), randn(d_model, d_ff).float()), axes.items()
    ):
        for tile_d, tile_f, warps in BOTH_WAYS:
            tile = {"TILE_D": tile_d, "TILE_F": tile_f, "num_warps": warps}
            functions[f"soft {name} {str(w.dtype)[6:]} {tile}"] = lambda c=tile, w=w, which=which: (
                launch_soft_threshold_prune24(w, *which, None, None, True, DTYPE, c)
            )
    which = {"x^T": (False, True), "both": (True, True)}
    for (name, axis), (tile_r, tile_c, warps) in itertools.product(which.items(), BOTH_WAYS):
        tile = {"TILE_R": tile_r, "TILE_C": tile_c, "num_warps": warps}
        functions[f"tile prune {name} {tile}"] = lambda c=tile, axis=axis: launch_tile_prune24(
            y1, *axis, DTYPE, c
        )
    timings = graph_spreads(functions, repeats)
    return [{"name": name, **timing} for name, timing in timings.items()]
