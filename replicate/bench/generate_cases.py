"""What the generation benchmark times: one FFN after another with weights of its own, and whole models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from replicate.bench import timing
from replicate.bench.dense_peers import relu2_
from replicate.bench.ffn import LIMIT, SLACK, TOLERANCE
from replicate.config import ModelConfig, SparsityConfig
from replicate.ffn import INIT_STD, SparseFFN, relu2
from replicate.generate import KVCache, TokenStep
from replicate.gpt import GPT
from replicate.kernels import layer as fused_ffn
from replicate.kernels.decode.down import decode_down
from replicate.kernels.decode.rows import Rows
from replicate.kernels.decode.up import decode_up
from replicate.settings.presets import SPARSITY_PRESETS

DENSE, AGAIN = "dense", "dense, again"
COMPILED, LINEAR, BY_HAND, BY_ROWS = (
    f"dense, {how}" for how in ("compiled", "weights transposed", "by hand", "our kernels")
)
PEERS = (DENSE, COMPILED, LINEAR, BY_HAND, BY_ROWS)
NAMES = ("venom16", "recipe", "recipe, same", "active16", "w1+w2")
ARMS: dict[str, SparsityConfig] = {name: SPARSITY_PRESETS[name] for name in NAMES}
ARMS["venom16x64"] = SparsityConfig(activation="venom", n_clusters=64, top_k=16)
OFF = 0.05  # see `check`
CYCLED = 2**30  # bytes of weights that a timed call reads at least, many times an L2 cache
Row = dict[str, Any]


class Layers:
    """FFN layers of one shape, each with random weights of its own that all arms share, in their dtype.

    Their neurons count as clustered as they stand: of independent random neurons no order is better.
    """

    def __init__(self, d_model: int, d_ff: int, dtype: torch.dtype, seed: int, device: str) -> None:
        self.shape, self.dtype, self.device = (d_model, d_ff), dtype, device
        draw = torch.Generator(device).manual_seed(seed)
        self.randn = partial(torch.randn, generator=draw, device=device)
        count = math.ceil(CYCLED / (2 * d_model * d_ff * dtype.itemsize)) if device != "cpu" else 2

        def weight(*size: int) -> nn.Parameter:
            return nn.Parameter((self.randn(size) * INIT_STD).to(dtype), requires_grad=False)

        self.weights = [(weight(d_model, d_ff), weight(d_ff, d_model)) for _ in range(max(2, count))]

    def inputs(self, n_tokens: int) -> Tensor:
        """x [T, D]."""
        return self.randn(n_tokens, self.shape[0]).to(self.dtype)

    def sparse(self, name: str, count: int | None = None) -> list[SparseFFN]:
        """The layers of an arm, weights held."""
        found = []
        for w1, w2 in self.weights[:count]:
            with torch.device("meta"):  # no random weights that are thrown away
                ffn = SparseFFN(*self.shape, ARMS[name])
            ffn.to_empty(device=self.device)
            ffn.w1, ffn.w2 = w1, w2
            ffn.clustered.fill_(ARMS[name].n_clusters)
            ffn.phase, ffn.hold = "sparse", True
            found.append(ffn)
        return found

    def dense(self, name: str, count: int | None = None) -> list[Callable[[Tensor], Tensor]]:
        """The layers by a dense peer."""
        weights = self.weights[:count]
        if name == LINEAR:
            turned = [(w1.T.contiguous(), w2.T.contiguous()) for w1, w2 in weights]
            return [partial(_by_linear, w1=w1, w2=w2) for w1, w2 in turned]
        if name == BY_ROWS:
            rows = [(Rows(w1.T.contiguous()), Rows(w2.data)) for w1, w2 in weights]
            return [partial(_by_rows, w1=w1, w2=w2) for w1, w2 in rows]
        how = {DENSE: _plain, BY_HAND: _by_hand}.get(name)
        if how is None:
            torch.compiler.reset()  # few shapes of a function are compiled before torch gives up
            how = torch.compile(_plain, dynamic=False)
        return [partial(how, w1=w1, w2=w2) for w1, w2 in weights]

    def peers(self, few: bool, compile: bool) -> list[str]:
        """The dense peers that there are; BY_ROWS, decoding's kernels on all neurons, is for `few` tokens."""
        on_gpu = self.device != "cpu"
        skipped = {COMPILED: not compile, BY_ROWS: not (on_gpu and few)}
        return [name for name in PEERS if not skipped.get(name)]


def _plain(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return relu2(x @ w1) @ w2


def _by_hand(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return relu2_(x @ w1) @ w2


def _by_linear(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return nn.functional.linear(relu2_(nn.functional.linear(x, w1)), w2)


def _by_rows(x: Tensor, w1: Rows, w2: Rows) -> Tensor:
    return decode_down(decode_up(x, w1), w2)


def check(name: str, ffn: SparseFFN, x: Tensor) -> Row:
    """What computes an arm's layer on x [T, D], its "error" over the float32 reference, and its "limit".

    The error is the median over tokens: where two clusters' activations are nearly equal, rounding chooses
    between them, and such a token is another one. So at most OFF of the tokens, or one of several, may be
    off by more than LIMIT. The limit is TOLERANCE, or SLACK times the error of the reference in x's dtype.
    Raises AssertionError for what is over a limit, ValueError if plain torch would be timed on a GPU.
    """
    engine = fused_ffn.describe(ffn, x)
    if x.is_cuda and engine.startswith("reference"):
        raise ValueError(f"no kernels to measure for {name}: {engine}; leave it out with --arms")
    with torch.device("meta"):
        wide = SparseFFN(*ffn.w1.shape, ffn.config)
    wide.to_empty(device=x.device)
    wide.w1, wide.w2 = (nn.Parameter(w.float(), requires_grad=False) for w in (ffn.w1, ffn.w2))
    wide.clustered.fill_(ffn.config.n_clusters)
    means = ffn.cluster_means().to(x.dtype).float()
    wide.cluster_means = lambda: means
    exact = wide.reference(x.float())
    half, ours = (_errors(y3, exact) for y3 in (ffn.reference(x), ffn(x)))
    limit = min(LIMIT, max(TOLERANCE, SLACK * float(half.median())))
    off, error = int((~(ours <= LIMIT)).sum()), float(ours.median())
    if not error <= limit or off > max(OFF * len(x), len(x) > 1):
        raise AssertionError(
            f"{name}, {len(x)} tokens: error {error:.2e}, at most {limit:.2e}; {off} tokens off by {LIMIT}"
        )
    return {"engine": engine, "error": error, "limit": limit, "off": off}


def _errors(y3: Tensor, exact: Tensor) -> Tensor:
    """Relative errors [T] of each token."""
    return (y3.float() - exact).norm(dim=1) / exact.norm(dim=1)


def used_share(layers: list[SparseFFN], x: Tensor) -> float:
    """Share of the clusters that any token of x uses, mean over layers; 1 without clusters."""
    c = layers[0].config
    if c.activation != "venom":
        return 1.0
    return sum(ffn.clusters(x).unique().numel() for ffn in layers) / len(layers) / c.n_clusters


def bytes_read(c: SparsityConfig | None, d_model: int, d_ff: int, share: float, itemsize: int = 2) -> float:
    """Bytes of both weights that a decoding step of one FFN reads.

    Args:
        c: formats; None is dense. share: of the clusters that are used. itemsize: bytes of a number.
    """
    whole = float(itemsize * d_model * d_ff)
    if c is None:
        return 2 * whole
    packed = (2 * itemsize + 0.5) / (4 * itemsize)  # of four numbers two, and four bits
    up = packed if c.source("w1") == "w1" else 1.0
    down = packed if c.source("w2") else 1.0
    routed = c.activation == "venom"
    return whole * (
        up * (share if routed and c.routing != "activation" else 1) + down * (share if routed else 1)
    )


class Model:
    """A GPT of some depth, with random weights in `dtype`, that takes every arm's formats in turn."""

    def __init__(
        self, shape: ModelConfig, n_layer: int, places: int, dtype: torch.dtype, device: str
    ) -> None:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            self.gpt = GPT(replace(shape, n_layer=n_layer, seq_len=places)).to(dtype)
        self.gpt.requires_grad_(False)
        self.device = device

    def use(self, name: str) -> None:
        """Be arm `name`; the dense one computes its FFN by hand, as fast as when compiled."""
        for ffn in self.gpt.ffns():
            ffn.hold = False
            vars(ffn).pop("forward", None)
            if name in ARMS:
                ffn.config = ARMS[name]
                ffn.clustered.fill_(ffn.config.n_clusters)
                ffn.phase, ffn.hold = "sparse", True
            else:
                ffn.config = SparsityConfig()
                ffn.forward = partial(_by_hand, w1=ffn.w1, w2=ffn.w2)

    def measure(self, ids: Tensor, repeats: int) -> Row:
        """Of the arm in use: "prefill" and "step" in ms with spread, and on a GPU their peaks in bytes.

        Args:
            ids: the prompts [B, S]; a step adds one token to each.
            repeats: timed steps; of prefill at most 3.
        """
        found: Row = {}

        def prefill() -> Tensor:
            return self.gpt.extend(ids, [KVCache() for _ in self.gpt.blocks])

        found |= self._timed("prefill", prefill, min(3, repeats))
        step = TokenStep(self.gpt, ids.shape[1] + timing.WARMUP + repeats + 4)
        token = step(ids).argmax(-1, keepdim=True)
        for _ in range(2):  # the second one is captured
            logits = step(token)
        if not logits.isfinite().all():
            raise AssertionError("logits are not finite")
        found |= self._timed("step", lambda: step(token), repeats)
        found["weight_bytes"] = self.weight_bytes()
        return found

    def _timed(self, name: str, call: Callable[[], Any], repeats: int) -> Row:
        on_gpu = self.device != "cpu"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        found = {name: timing.compare({name: call}, self.device, repeats)[name]}
        return found | ({f"{name}_peak_bytes": torch.cuda.max_memory_allocated()} if on_gpu else {})

    def weight_bytes(self) -> int:
        """Bytes of all that is held for inference: parameters, and the forms that kernels have prepared."""
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._held()}
        return sum(kept.values())

    def _held(self) -> Iterator[Tensor]:
        yield from self.gpt.parameters()
        for ffn in self.gpt.ffns():
            yield from ffn.operands[1] if ffn.operands else ()
            if ffn.decoder:
                up, down, _, means, fixed = ffn.decoder[1]
                yield from (t for t in (*up, *down, means, fixed) if t is not None)
