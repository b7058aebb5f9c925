"""Fused kernels for the sparse FFN: a file an operation, with its formula, torch reference and kernel."""

from replicate.kernels.backend import report
from replicate.kernels.two_four.compressed24 import Compressed24, unpack24
from replicate.kernels.two_four.matmul24 import matmul24
from replicate.kernels.two_four.relu2_prune24 import relu2_prune24, relu2_prune24_backward
from replicate.kernels.two_four.soft_threshold_prune24 import (
    soft_threshold_prune24,
    soft_threshold_prune24_both,
)
from replicate.kernels.two_four.tile_prune24 import tile_prune24
from replicate.kernels.venom.ffn import venom_ffn
from replicate.kernels.venom.gather import venom_gather_matmul
from replicate.kernels.venom.route_active import route_active
from replicate.kernels.venom.route_topk import route_topk
from replicate.kernels.venom.token_lists import token_lists

__all__ = [
    "Compressed24",
    "matmul24",
    "relu2_prune24",
    "relu2_prune24_backward",
    "report",
    "route_active",
    "route_topk",
    "soft_threshold_prune24",
    "soft_threshold_prune24_both",
    "tile_prune24",
    "token_lists",
    "unpack24",
    "venom_ffn",
    "venom_gather_matmul",
]
