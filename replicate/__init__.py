"""Train GPTs with 2:4 weights and V:N:M activations: a replication of arXiv 2602.06183."""

from replicate.config import ModelConfig, SparsityConfig, TrainConfig
from replicate.ffn import SparseFFN
from replicate.gpt import GPT, DenseFFN
from replicate.settings.presets import MODEL_PRESETS, SPARSITY_PRESETS, TRAIN_PRESETS, train_preset
from replicate.swap import restore_ffn, start_sparse, swap_ffn

__all__ = [
    "GPT",
    "MODEL_PRESETS",
    "SPARSITY_PRESETS",
    "TRAIN_PRESETS",
    "DenseFFN",
    "ModelConfig",
    "SparseFFN",
    "SparsityConfig",
    "TrainConfig",
    "restore_ffn",
    "start_sparse",
    "swap_ffn",
    "train_preset",
]
__version__ = "0.1.0"
