"""Memory of a GPU that trains a GPT in bfloat16 autocast, by formula, for one process or several.

P parameters, of which M in matrices; L layers of D, F, N query and K key heads of H; T tokens in a process's
micro-batch; n processes, s = n where the engine shards, else 1. In bytes:

    weights     4 P / s                       float32
    gathered    4 (2 P_layer + P_rest)        "fsdp": a layer, the next one, and what belongs to no layer
    gradients   4 P / s                       "fsdp" with several micro-batches: 4 P, see `parallel`
    moments     8 P / s                       AdamW's two, float32
    casts       2 M                           bfloat16 copies that the backward pass reads again
    activations T (L A + 10 D + 4 + 4 V)    A = 16 D + 8 + 2 (4 D + (2 N + 3 K) H) + 4 N + 4 F

The last two are what dense layers save for the backward pass, not compiled: compiled ones save less, and
their head none of the float32 logits (4 V). Not counted: what kernels, nccl and the allocator take besides,
and what lives for one operation only. Nothing here is measured.
"""

from __future__ import annotations

from replicate.config import ModelConfig
from replicate.settings.presets import MODEL_PRESETS
from replicate.training.flops import param_count

GB = 1e9


def activation_bytes(model: ModelConfig) -> int:
    """Bytes a token that the forward pass saves; squared ReLU, float32 residual stream."""
    d, n, k = model.d_model, model.n_head, model.kv_heads
    heads = (2 * n + 3 * k) * (d // n)  # rotated queries and keys, and all three again as they were computed
    layer = 16 * d + 8 + 2 * (4 * d + heads) + 4 * n + 4 * model.d_ff
    return model.n_layer * layer + 10 * d + 4 + 4 * model.vocab_size


def memory(
    model: ModelConfig, rows: int, processes: int = 1, engine: str = "ddp", grad_accum: int = 1
) -> dict[str, int]:
    """Bytes of one of `processes` GPUs by what they hold, and their sum, "total".

    Args:
        rows: sequences of a micro-batch of one process. engine: "ddp" or "fsdp".
        grad_accum: micro-batches a step.

    Raises ValueError for an unknown engine, or fewer than one row, process or micro-batch.
    """
    if engine not in ("ddp", "fsdp") or min(rows, processes, grad_accum) < 1:
        raise ValueError(
            f"engine {engine!r}, rows {rows}, processes {processes}, grad_accum {grad_accum}: "
            "choose 'ddp' or 'fsdp', and 1 or more of each"
        )
    sharded = engine == "fsdp" and processes > 1
    share, count = processes if sharded else 1, param_count(model)
    total, vectors = count["total"], (2 * model.n_layer + 1) * model.d_model
    layer = (count["non_embedding"] - model.d_model) // model.n_layer
    rest = total - model.n_layer * layer
    inputs = 0 if model.tie_embeddings else model.vocab_size * model.d_model  # looked up, in float32
    found = {
        "weights": 4 * total // share,
        "gathered": 4 * (2 * layer + rest) if sharded else 0,
        "gradients": 4 * total // (1 if grad_accum > 1 else share),
        "moments": 8 * total // share,
        "casts": 2 * (total - vectors - inputs),
        "activations": rows * model.seq_len * activation_bytes(model),
    }
    return found | {"total": sum(found.values())}


def table() -> str:
    """The table of docs/scaling.md: GB a GPU with one sequence and one micro-batch, in Markdown."""
    names = list(memory(MODEL_PRESETS["llama1b"], 1))
    lines = ["| model | engine | GPUs | " + " | ".join(names) + " |"]
    lines.append("|---|---|---:|" + "---:|" * len(names))
    for preset, label in (("llama1b", "1B"), ("llama7b", "7B")):
        for engine, processes in (("ddp", 8), ("fsdp", 8), ("fsdp", 16), ("fsdp", 32), ("fsdp", 64)):
            found = memory(MODEL_PRESETS[preset], 1, processes, engine)
            numbers = " | ".join(f"{value / GB:.1f}" for value in found.values())
            lines.append(f"| {label} | {engine} | {processes} | {numbers} |")
    return "\n".join(lines)
