"""Fused kernels for the sparse FFN: a file an operation, with its formula, torch reference and kernel."""

from replicate.kernels.backend import report, select
from replicate.kernels.compressed24 import Compressed24, unpack24
from replicate.kernels.matmul24 import matmul24
from replicate.kernels.relu2_prune24 import relu2_prune24
from replicate.kernels.relu2_prune24_backward import relu2_prune24_backward
from replicate.kernels.route_active import route_active
from replicate.kernels.route_topk import route_topk
from replicate.kernels.soft_threshold_prune24 import soft_threshold_prune24, soft_threshold_prune24_both
from replicate.kernels.tile_prune24 import tile_prune24
from replicate.kernels.token_lists import BlockLists, token_lists
from replicate.kernels.venom_ffn import venom_ffn
from replicate.kernels.venom_gather import venom_gather_matmul

__all__ = [
    "BlockLists",
    "Compressed24",
    "matmul24",
    "relu2_prune24",
    "relu2_prune24_backward",
    "report",
    "route_active",
    "route_topk",
    "select",
    "soft_threshold_prune24",
    "soft_threshold_prune24_both",
    "tile_prune24",
    "token_lists",
    "unpack24",
    "venom_ffn",
    "venom_gather_matmul",
]
