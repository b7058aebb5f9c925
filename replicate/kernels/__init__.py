"""Fused kernels for the sparse FFN: a file an operation, with its formula, torch reference and kernel."""

from replicate.kernels.backend import report, select
from replicate.kernels.compressed24 import Compressed24, unpack24
from replicate.kernels.matmul24 import matmul24
from replicate.kernels.relu2_prune24 import relu2_prune24
from replicate.kernels.relu2_prune24_backward import relu2_prune24_backward
from replicate.kernels.soft_threshold_prune24 import soft_threshold_prune24, soft_threshold_prune24_both

__all__ = [
    "Compressed24",
    "matmul24",
    "relu2_prune24",
    "relu2_prune24_backward",
    "report",
    "select",
    "soft_threshold_prune24",
    "soft_threshold_prune24_both",
    "unpack24",
]
