"""Times of the element-wise 2:4 kernels over tiles and warps, by replaying CUDA graphs in turns."""

from functools import partial

import pandas as pd

from replicate.bench.timing import Calls, compare_graphs
from replicate.bench.two_four import DTYPE, randn
from replicate.kernels.two_four.compressed24 import launch_unpack24
from replicate.kernels.two_four.relu2_prune24 import launch_relu2_prune24, launch_relu2_prune24_backward
from replicate.kernels.two_four.soft_threshold_prune24 import launch_soft_threshold_prune24
from replicate.kernels.two_four.tile_prune24 import launch_tile_prune24

# Bands of 16 rows, groups of four, warps; then rows, columns and warps for both orientations.
TILES = [(1, 64, 4), (1, 64, 2), (1, 128, 4), (2, 64, 4), (4, 32, 4), (4, 64, 4), (2, 128, 8), (2, 64, 2)]
BOTH_WAYS = [(64, 64, 4), (128, 64, 4), (128, 64, 8), (64, 128, 4), (128, 128, 8), (128, 128, 4), (64, 64, 2)]


def tune_tiles() -> str:
    """Times of the element-wise kernels over tiles and warps; their modules' CONFIG is the fastest one."""
    tokens, d_model, d_ff = 16384, 4096, 16384
    y1 = randn(tokens, d_ff)
    y2, _ = launch_relu2_prune24(y1, True, False, {"BANDS": 1, "GROUPS": 64, "num_warps": 4})
    calls: Calls = {}
    for bands, groups, warps in TILES:
        tile = {"BANDS": bands, "GROUPS": groups, "num_warps": warps}
        calls["forward", *tile.values()] = partial(launch_relu2_prune24, y1, True, False, tile)
        calls["backward", *tile.values()] = partial(launch_relu2_prune24_backward, y1, y2, True, False, tile)
        calls["unpack", *tile.values()] = partial(launch_unpack24, y2, tokens, d_ff, tile)
    weights = randn(d_model, d_ff), randn(d_model, d_ff).float()
    for rows, columns, warps in BOTH_WAYS:
        for axes in ((True, False), (False, True), (True, True)):
            tile = {"TILE_D": rows, "TILE_F": columns, "num_warps": warps}
            for w in weights:
                name = f"soft {axes} {w.dtype}"
                call = partial(launch_soft_threshold_prune24, w, *axes, None, None, True, DTYPE, tile)
                calls[name, *tile.values()] = call
            if axes[1]:
                tile = {"TILE_R": rows, "TILE_C": columns, "num_warps": warps}
                call = partial(launch_tile_prune24, y1, *axes, DTYPE, tile)
                calls[f"tile prune {axes}", *tile.values()] = call
    times = compare_graphs(calls, 10)
    rows = [{"kernel": kernel, "tile, warps": tile, **ms} for (kernel, *tile), ms in times.items()]
    return pd.DataFrame(rows).sort_values(["kernel", "ms"]).to_string(index=False)
