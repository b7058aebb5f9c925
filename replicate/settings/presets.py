"""Named settings: the formats of Table 3, the models of Table 1, and the project's own scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from replicate.config import ModelConfig, SparsityConfig, TrainConfig
from replicate.settings.text import with_changes

SPARSITY_PRESETS: dict[str, SparsityConfig] = {
    "dense": SparsityConfig(),
    # Table 3's rows, read as algorithms 1 and 2 print them: a weight without a transpose is whole backward
    "w1": SparsityConfig(w1=True, backward="whole"),
    "w1+w1t": SparsityConfig(w1=True, w1_t=True),
    "w2": SparsityConfig(w2=True, backward="whole"),
    "w2+w2t": SparsityConfig(w2=True, w2_t=True),
    "w1+w2": SparsityConfig(w1=True, w2=True, backward="whole"),
    "w1+w2+t": SparsityConfig(w1=True, w1_t=True, w2=True, w2_t=True),
    "act24": SparsityConfig(activation="24"),
    "act24+wgrad": SparsityConfig(activation="24", wgrad="24"),
    "act24+tile": SparsityConfig(activation="24", wgrad="tile"),
    "all24": SparsityConfig(
        w1=True, w2_t=True, activation="24", wgrad="tile", backward="whole"
    ),  # all six products 2:4
    "venom16": SparsityConfig(activation="venom", top_k=4),
    "venom32": SparsityConfig(activation="venom", top_k=2),
    "venom64": SparsityConfig(activation="venom", top_k=1),
    # The recipe the paper's table lacks: algorithms 1 and 2 as printed
    "recipe": SparsityConfig(w1=True, w2_t=True, activation="venom", top_k=4, backward="whole"),
    "recipe32": SparsityConfig(w1=True, w2_t=True, activation="venom", top_k=2, backward="whole"),
    "recipe64": SparsityConfig(w1=True, w2_t=True, activation="venom", top_k=1, backward="whole"),
    # The same with a backward pass that reads the values which the forward pass read
    "w1, same": SparsityConfig(w1=True),
    "w2, same": SparsityConfig(w2=True),
    "w1+w2, same": SparsityConfig(w1=True, w2=True),
    "recipe, same": SparsityConfig(w1=True, w2_t=True, activation="venom", top_k=4),
    # Beyond the paper: a token's clusters are those it fires most in, known once y1 is there in full
    "active16": SparsityConfig(activation="venom", top_k=4, routing="activation"),
    "active32": SparsityConfig(activation="venom", top_k=2, routing="activation"),
    "active64": SparsityConfig(activation="venom", top_k=1, routing="activation"),
    "active16x32": SparsityConfig(activation="venom", n_clusters=32, top_k=8, routing="activation"),
    "active64x32": SparsityConfig(activation="venom", n_clusters=32, top_k=2, routing="activation"),
    # Beyond the paper: products 1, 2, 3 and 5 in FP8, in both phases
    "fp8": SparsityConfig(fp8=True),
    "venom16, fp8": SparsityConfig(activation="venom", top_k=4, fp8=True),
    # Controls
    "static16": SparsityConfig(activation="venom", top_k=4, routing="static"),
    "block16": SparsityConfig(activation="venom", top_k=4, routing="oracle-block"),
    "no-mask-reuse": SparsityConfig(activation="24", mask_reuse=False),
    "tile24": SparsityConfig(activation="24", selection="tile"),
}

MODEL_PRESETS: dict[str, ModelConfig] = {
    "smoke": ModelConfig(),
    "laptop": ModelConfig(vocab_size=1024, n_layer=4, d_model=128, d_ff=512, n_head=4, seq_len=128),
    "study10m": ModelConfig(vocab_size=4096, n_layer=6, d_model=384, d_ff=1536, n_head=6, seq_len=512),
    "study40m": ModelConfig(vocab_size=4096, n_layer=8, d_model=640, d_ff=2560, n_head=10, seq_len=1024),
    "study100m": ModelConfig(
        vocab_size=4096, n_layer=10, d_model=896, d_ff=3584, n_head=14, seq_len=1024
    ),
    "llama1b": ModelConfig(
        vocab_size=128256, n_layer=22, d_model=2048, d_ff=8192, n_head=16, seq_len=8192, rope_theta=500000.0
    ),
    "llama7b": ModelConfig(
        vocab_size=128256, n_layer=32, d_model=4096, d_ff=16384, n_head=32, seq_len=8192,
        tie_embeddings=False, rope_theta=500000.0,
    ),
}  # fmt: skip

TRAIN_PRESETS: dict[str, TrainConfig] = {
    "smoke": TrainConfig(steps=150, batch_size=4, lr_warmup=15, dense_warmup=40, final_window=30),
    "laptop": TrainConfig(
        model=MODEL_PRESETS["laptop"], steps=500, batch_size=16, lr=3e-3, lr_warmup=40, dense_warmup=100,
    ),
    "study10m": TrainConfig(
        model=MODEL_PRESETS["study10m"], corpus="pysrc", steps=3000, batch_size=64, lr=2e-3, lr_warmup=100,
        dense_warmup=200, stats_every=100, eval_batches=16, eval_every=250, compile=True, log_every=50,
    ),
    "study40m": TrainConfig(
        # lr: study10m's, which was tuned, in proportion to 1 / d_model (Yang et al., 2203.03466)
        model=MODEL_PRESETS["study40m"], corpus="pysrc", steps=1600, batch_size=64, lr=1.2e-3, lr_warmup=100,
        dense_warmup=110, stats_every=100, eval_batches=16, eval_every=250, compile=True, log_every=50,
    ),
    "study100m": TrainConfig(
        # lr in proportion, as for study40m; its tokens are one for each parameter
        model=MODEL_PRESETS["study100m"], corpus="pysrc", steps=1600, batch_size=64, lr=8.5e-4, lr_warmup=100,
        dense_warmup=110, stats_every=100, eval_batches=16, eval_every=250, compile=True, log_every=50,
    ),
    "llama1b": TrainConfig(
        model=MODEL_PRESETS["llama1b"], corpus="dclm", steps=60000, batch_size=2, lr=3e-4, lr_warmup=1000,
        dense_warmup=1000, sparse_share=0.5, stats_every=1000,
    ),
    "llama7b": TrainConfig(
        model=MODEL_PRESETS["llama7b"], corpus="dclm", steps=48000, batch_size=2, lr=4e-4, lr_warmup=1000,
        dense_warmup=1000, sparse_share=10 / 48, stats_every=1000,
    ),
}  # fmt: skip
# One family from 4 million to 6.5 billion parameters, layers by d_model, for timing what width alone gains.
WIDTHS = {256: 4, 384: 6, 640: 8, 1024: 12, 1536: 16, 2048: 22, 3072: 28, 4096: 32}
TRAIN_PRESETS |= {
    f"width{d}": TrainConfig(
        model=ModelConfig(
            vocab_size=4096, n_layer=n, d_model=d, d_ff=4 * d, seq_len=1024,
            n_head=d // (64 if d < 2048 else 128),
        ),
        corpus="pysrc", batch_size=16, compile=True,
    )
    for d, n in WIDTHS.items()
}  # fmt: skip
PRESET_OF = {  # scale -> training preset, ascending
    "smoke": "smoke", "laptop": "laptop", "gpu": "study10m", "gpu40m": "study40m", "gpu100m": "study100m",
}  # fmt: skip


def preset_of(profile: str) -> str:
    """The training preset of a scale of PRESET_OF, or the one of that name; ValueError names the scales."""
    if profile not in PRESET_OF and profile not in TRAIN_PRESETS:
        raise ValueError(f"profile is {profile!r}; choose one of {', '.join(PRESET_OF)}")
    return PRESET_OF.get(profile, profile)


def train_preset(name: str, sparsity: str | SparsityConfig = "dense", **changes: Any) -> TrainConfig:
    """The training preset `name` with a sparsity (preset name or config) and field changes.

    Raises ValueError naming the known presets, or the unknown field, with the nearest match.
    """
    config = _preset(TRAIN_PRESETS, name, "training preset")
    if isinstance(sparsity, str):
        sparsity = _preset(SPARSITY_PRESETS, sparsity, "sparsity preset")
    config = replace(config, model=replace(config.model, sparsity=sparsity))
    return with_changes(config, changes)


def _preset(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(table)}")
    return table[name]
