"""Every setting of a run as frozen dataclasses, with checks.

A configuration is complete: two runs with equal `config_hash` on the same machine give the same
losses (on a GPU with `deterministic`; else its attention sums in no fixed order). Impossible values raise
`ValueError` with a value that would work. `settings` has presets, the text form and the hash.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from replicate.ablations import SELECTIONS, WGRADS
from replicate.router import METRICS, READS_Y2, RULES
from replicate.settings.checks import alone, at_least, check_types, near, one_of

ACTIVATIONS = ("relu2", "gelu", "swiglu")  # functions, of `ModelConfig.activation`
ORDERS = ("sparse-dense", "dense-sparse", "interleaved")
# Who chooses a token's clusters: a rule of `router`, or "oracle-block", a vote of v tokens, not causal.
ROUTINGS = (*RULES, "oracle-block")
# What a product without a flag reads of a weight that its other product reads in 2:4. "same": the values that
# the other product reads, so that the backward pass is the gradient of what the forward pass computed, as
# automatic differentiation has it; the stored weight alone is passed straight through. A flag of the forward
# pass (w1, w2) so changes the backward product, one of the backward pass (w2_t, w1_t) the forward product.
# "whole": the stored weight, as algorithms 1 and 2 print it, so that the two passes read two weights.
READINGS = ("same", "whole")
ATTENTION = ("auto", "torch", "flash", "cudnn")
RESIDUALS = ("float32", "bfloat16")
BACKENDS = ("auto", "reference", "triton", "cusparselt")


@dataclass(frozen=True)
class SparsityConfig:
    """Which operand of the FFN's six products is sparse in the sparse phase, and how.

    The products are the paper's equations 1, 3, 4, 5, 7 and 8; `products()` lists them. At most one
    operand of a product is sparse, as sparse tensor cores require.
    """

    # 2:4 weights, one flag for each product that reads a weight (straight-through gradients).
    w1: bool = False  # product 1, y1 = x S24(W1), groups of four along d_model
    w2: bool = False  # product 2, y3 = y2 S24(W2), groups along d_ff
    w2_t: bool = False  # product 3, dy2 = dy3 S24(W2^T), groups along d_model
    w1_t: bool = False  # product 5, dx = dy1 S24(W1^T), groups along d_ff
    weight_method: str = "soft"  # "soft" (section 2.2) or "hard" (top 2 of 4)
    weight_scale: bool = False  # S-STE's beta, computed at the first sparse step and frozen
    backward: str = "same"  # see READINGS

    # Format of y2 and dy1: "dense", "24" (2 of 4 per token) or "venom" (clusters of neurons, then 2 of 4).
    activation: str = "dense"
    selection: str = "magnitude"  # the 2 of 4, see `ablations.select24`
    inner: bool = True  # Venom only: also keep 2 of 4 inside the chosen clusters
    mask_reuse: bool = True  # dy1 carries the forward mask; False prunes dy1 on its own

    # dW2 = y2^T dy3 and dW1 = x^T dy1, whose reduction runs over tokens (2503.16672).
    wgrad: str = "dense"  # "dense"; "24" (2 of 4 tokens by magnitude), "mvue" (unbiased draw), "tile" (4 x 4)
    wgrad_dense_share: float = 0.05  # share of the densest features kept dense; not by "tile"
    wgrad_permute: bool = True  # shuffle tokens by a fixed permutation before grouping them

    # Venom's blocks. With n clusters and top-k, M = 4 n / k: top-4, 2, 1 of 16 give M = 16, 32, 64.
    routing: str = "token"  # who chooses, see ROUTINGS
    n_clusters: int = 16
    top_k: int = 4
    metric: str = "dot"  # see `router.scores`
    v: int = 64  # tokens of a block of "oracle-block"; kernels take theirs from venom_ffn.block_rows
    refresh_every: int = 0  # sparse steps between re-clusterings; 0 never

    # Of both phases: products 1, 2, 3 and 5 read both operands in FP8, weight gradients do not, see `fp8`.
    fp8: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        one_of("weight_method", self.weight_method, ("soft", "hard"))
        one_of("backward", self.backward, READINGS)
        one_of("activation", self.activation, ("dense", "24", "venom"))
        one_of("selection", self.selection, SELECTIONS)
        one_of("wgrad", self.wgrad, WGRADS)
        one_of("routing", self.routing, ROUTINGS)
        one_of("metric", self.metric, METRICS)
        at_least("n_clusters", self.n_clusters, 1)
        at_least("v", self.v, 1)
        at_least("refresh_every", self.refresh_every, 0)
        if not 1 <= self.top_k <= self.n_clusters:
            raise ValueError(f"top_k is {self.top_k}; choose 1 to n_clusters = {self.n_clusters}")
        unit = 4 * self.n_clusters
        if self.routing == "oracle-block" and unit % self.top_k:
            raise ValueError(
                f"top_k is {self.top_k}; blocks of M = {unit} / top_k columns need a divisor of {unit}: "
                f"try {math.gcd(self.top_k, unit)}"
            )
        if not 0 <= self.wgrad_dense_share <= 1:
            raise ValueError(f"wgrad_dense_share is {self.wgrad_dense_share}; choose 0 to 1")
        if self.activation != "dense" and (self.w2 or self.w1_t):
            raise ValueError(
                "products 2 and 5 already have a sparse activation; set w2=False and w1_t=False "
                "(one sparse operand a product, as sparse tensor cores require)"
            )
        if self.weight_scale and self.weight_method == "hard":
            raise ValueError(
                "weight_scale=True undoes the shrinking by weight_method='soft'; 'hard' shrinks nothing: "
                "set weight_scale=False or weight_method='soft'"
            )
        if self.fp8:
            self._check_fp8()
        if self.routing == "learned":
            self._check_experts()
        clusters = self.inner and self.routing != "oracle-block"
        if self.activation == "venom" and not clusters and self.selection != "magnitude":
            raise ValueError(
                f"selection {self.selection!r} picks the 2 of 4 inside clusters; inner=False picks none and "
                "'oracle-block' has V:N:M's own: set selection='magnitude'"
            )

        if self.selection == "tile":
            alone(self, "selection 'tile'", activation=("24",), mask_reuse=(True,), wgrad=("dense",))

    def _check_fp8(self) -> None:
        """Raise ValueError for formats that are not computed in FP8."""
        alone(self, "fp8=True", **dict.fromkeys(("w1", "w2", "w2_t", "w1_t"), (False,)))
        alone(self, "fp8=True", activation=("dense", "venom"), routing=("token", "static", "activation"))
        alone(self, "fp8=True", selection=("magnitude",), mask_reuse=(True,), wgrad=("dense",))

    def _check_experts(self) -> None:
        """Raise ValueError for what a mixture of experts does not have."""
        plain = {"activation": ("venom",), "inner": (False,), "mask_reuse": (True,), "wgrad": ("dense",)}
        plain |= {"w1": (False,), "w2_t": (False,), "refresh_every": (0,)}
        alone(self, "routing 'learned', which has dense experts,", **plain)

    @property
    def any(self) -> bool:
        """True if the sparse phase differs from the dense one; FP8, which is of both, is no difference."""
        weights = self.w1 or self.w2 or self.w1_t or self.w2_t
        return weights or self.activation != "dense" or self.wgrad != "dense"

    @property
    def causal(self) -> bool:
        """False if tokens of a batch choose together, later ones included: for pictures, not for texts."""
        return self.routing != "oracle-block" and self.selection != "tile"

    @property
    def reading_matters(self) -> bool:
        """True if a weight is 2:4 in one of its two products only: `backward` is about the other one."""
        return self.w1 != self.w1_t or self.w2 != self.w2_t

    @property
    def m(self) -> int:
        """Venom's M: 4 of M columns survive the block choice, so M = 4 n_clusters / top_k."""
        return 4 * self.n_clusters // self.top_k

    def source(self, name: str) -> str:
        """The flag whose 2:4 values product `name` reads (w1, w2, w2_t or w1_t), "" if the stored weight.

        Its own flag, if set; with backward="same" else that of the other product of the same weight.
        """
        other = name.removesuffix("_t") if name.endswith("_t") else f"{name}_t"
        if getattr(self, name):
            return name
        return other if self.backward == "same" and getattr(self, other) else ""

    def products(self) -> list[tuple[str, str, str]]:
        """(formula, sparse operand, format) of the six products in the paper's order.

        The format is "dense", "2:4", "venom" (sparse operand) or "sampled" (only some outputs). A weight that
        is pruned, but no sparse operand, is written so: "dx = dy1 S24(W1)^T".
        """
        kind = {"dense": "dense", "24": "2:4", "venom": "venom"}[self.activation]
        along_tokens = self.wgrad != "dense" or self.selection == "tile"
        tokens = "2:4" if along_tokens else kind if kind == "venom" else "dense"

        def row(formula: str, flag: str, activation: str) -> tuple[str, str, str]:
            output, _, left, right = formula.split()
            if flag and getattr(self, flag):
                return formula, right, "2:4"
            if flag and (source := self.source(flag)):
                pruned = f"S24({right.removesuffix('^T')}{'^T' if source.endswith('_t') else ''})^T"
                formula = f"{output} = {left} {pruned}"
            if activation == "dense":
                return formula, "-", "dense"
            return formula, output if activation == "sampled" else left, activation

        # Only the blocks of a known mask are computed (figure 4d): of dy2 by the forward mask, and of y1 too
        # unless y1 itself chooses the clusters.
        known = kind == "venom" and self.routing != "oracle-block" and self.mask_reuse and not self.w2_t
        chosen = known and not self.w1 and self.routing not in READS_Y2
        return [
            row("y1 = x W1", "w1", "sampled" if chosen else "dense"),
            row("y3 = y2 W2", "w2", kind),
            row("dy2 = dy3 W2^T", "w2_t", "sampled" if known else "dense"),
            row("dW2 = y2^T dy3", "", tokens),
            row("dx = dy1 W1^T", "w1_t", kind),
            row("dW1^T = dy1^T x", "", tokens),
        ]

    def check_model(self, activation: str, d_model: int, d_ff: int) -> None:
        """Raise ValueError if a model with this activation function and shape cannot have these formats."""
        if (self.any or self.fp8) and activation != "relu2":
            what = "sparsity" if self.any else "fp8=True"
            raise ValueError(f"{what} needs activation='relu2', not {activation!r}")
        self.check_shape(d_model, d_ff)

    def check_shape(self, d_model: int, d_ff: int) -> None:
        """Raise ValueError if an FFN of this shape cannot carry these formats."""
        for name, value in (("d_model", d_model), ("d_ff", d_ff)):
            at_least(name, value, 1)
            if self.any and value % 4:
                raise ValueError(f"{name} is {value}, no multiple of 4; try {near(value, 4)}")
        if self.activation != "venom":
            return
        unit = 4 * self.n_clusters
        if d_ff % unit:
            raise ValueError(
                f"d_ff is {d_ff}; {self.n_clusters} equal clusters of groups of four need a "
                f"multiple of {unit}: try {near(d_ff, unit)}, or fewer clusters"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the GPT: a Llama-3-like decoder with a two-matrix squared-ReLU FFN by default."""

    vocab_size: int = 512
    n_layer: int = 3
    d_model: int = 96
    d_ff: int = 384
    n_head: int = 3
    n_kv_head: int = 0  # 0 means n_head; fewer is grouped-query attention
    seq_len: int = 128
    activation: str = "relu2"  # "relu2", "gelu" or "swiglu"
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("vocab_size", "n_layer", "d_model", "d_ff", "n_head", "seq_len"):
            at_least(name, getattr(self, name), 1)
        at_least("n_kv_head", self.n_kv_head, 0)
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta is {self.rope_theta}; choose a positive number (10000 is usual)")
        one_of("activation", self.activation, ACTIVATIONS)
        if self.d_model % self.n_head or (self.d_model // self.n_head) % 2:
            raise ValueError(
                f"d_model {self.d_model} over n_head {self.n_head} must be an even whole number; "
                f"try d_model = {2 * self.n_head * max(1, round(self.d_model / 2 / self.n_head))}"
            )
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        self.sparsity.check_model(self.activation, self.d_model, self.d_ff)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_kv_head or self.n_head


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Lengths are in optimiser steps unless the name says otherwise."""

    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: str = "stdlib"  # see `replicate.text.corpora`
    steps: int = 240
    batch_size: int = 8  # sequences a micro-batch
    grad_accum: int = 1  # micro-batches a step
    lr: float = 3e-3
    min_lr_share: float = 0.1  # the cosine ends at lr * min_lr_share
    lr_warmup: int = 20
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # gradient norm; 0 never clips
    dense_warmup: int = 60  # dense steps before the first sparse one (the paper: 1000)
    sparse_share: float = 1.0  # share of the steps after the warm-up that are sparse
    order: str = "sparse-dense"  # order of those steps
    fold: bool = False  # store, at the switch to dense, the weights that the forward pass read
    interleave: int = 10  # period in steps of order "interleaved"
    seed: int = 1
    dtype: str = "auto"  # "auto": float32 on a CPU, bfloat16 autocast on a GPU
    residual: str = "float32"  # dtype of the residual stream; under bfloat16 autocast also "bfloat16"
    stats_every: int = 20
    eval_every: int = 0  # 0: at the end only
    eval_batches: int = 16
    final_window: int = 100  # the paper's loss is the mean over the last 100 steps
    # How, not what: these do not enter the hash.
    device: str = "auto"
    backend: str = "auto"  # of the sparse products: kernels where there are any, or "reference"
    compile: bool = False
    parallel: str = "auto"  # of several processes: "ddp" (as "auto") or "fsdp", see `training.parallel`
    attention: str = "auto"  # its kernel on a GPU: the fastest, "torch" (its choice), "flash" or "cudnn"
    cuda_graph: str = "auto"  # a step as one graph: "auto" where it can be, "on" or an error, "off"
    deterministic: bool = False  # on a GPU, attention's gradient too, by a slower kernel
    log_every: int = 10
    checkpoint_every: int = 0  # 0: by time, see `checkpoint.Pace`

    def __post_init__(self) -> None:
        check_types(self)
        counts = ("steps", "batch_size", "grad_accum", "interleave", "eval_batches", "final_window")
        for name in (*counts, "log_every"):
            at_least(name, getattr(self, name), 1)
        for name in ("lr_warmup", "dense_warmup", "stats_every", "eval_every", "checkpoint_every"):
            at_least(name, getattr(self, name), 0)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; choose 0 to {2**63 - 1}, the numbers torch takes")
        if not 0 < self.lr <= 1:
            raise ValueError(f"lr is {self.lr}; choose above 0, at most 1 (3e-4 is a usual value)")
        for name in ("min_lr_share", "sparse_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; choose 0 to 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; choose 0 up to, but not, 1")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; choose 0 (none) or a positive number")
        one_of("order", self.order, ORDERS)
        one_of("backend", self.backend, BACKENDS)
        one_of("attention", self.attention, ATTENTION)
        one_of("parallel", self.parallel, ("auto", "ddp", "fsdp"))
        one_of("cuda_graph", self.cuda_graph, ("auto", "on", "off"))
        one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float64"))
        one_of("residual", self.residual, RESIDUALS)
        if self.residual == "bfloat16" and self.dtype in ("float32", "float64"):
            raise ValueError(
                f"residual is 'bfloat16' and dtype {self.dtype!r}; set dtype='bfloat16' or residual='float32'"
            )
        if self.fold and self.order != "sparse-dense":
            raise ValueError(
                f"fold=True with order {self.order!r} would shrink the weights again at every switch; "
                "it needs order='sparse-dense'"
            )
        if self.lr_warmup > self.steps:
            raise ValueError(f"lr_warmup is {self.lr_warmup}, longer than steps = {self.steps}")
        s = self.model.sparsity
        tokens = self.batch_size * self.model.seq_len
        if s.activation == "venom" and s.routing == "oracle-block" and (s.v > tokens or tokens % s.v):
            raise ValueError(f"v is {s.v}; blocks of v rows must divide the {tokens} tokens of a batch")
        if (s.wgrad != "dense" or s.selection == "tile") and tokens % 4:
            raise ValueError(f"a batch has {tokens} tokens; 2:4 along tokens needs a multiple of 4")

    @property
    def tokens_per_step(self) -> int:
        """Training tokens one optimiser step reads."""
        return self.batch_size * self.grad_accum * self.model.seq_len
