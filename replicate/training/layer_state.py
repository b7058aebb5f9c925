"""What a sparse layer knows besides its weights. Buffers: checkpoints, copies and averages carry them.

Every buffer is a float, so that an average of equal states is that state. In an average over a switch, a flag
is on if it was on in more than half, and the scales are exact: both they and `scaled`, by which they are
divided, were averaged with the same weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from replicate.config import SparsityConfig
from replicate.router import load_stats
from replicate.sparsity import soft_scale, sparsity
from replicate.training.sharded import agreed, settle, whole

PHASES = ("dense", "sparse")


class LayerState(nn.Module):
    """Phase, clusters, fixed clusters and scales of a layer with the formats of `config`.

    `load_state_dict` takes the phase from the state. It raises RuntimeError for a sparse state of other
    formats, or without the clusters or scales it needs. A dense one gives its weights to any formats.
    Averages must begin after `make_clusters`, which changes the order of the neurons. Under
    DistributedDataParallel on a GPU, `broadcast_buffers=False` spares a look at the phase in every pass.
    Of weights that `fully_shard` has sharded, what needs whole matrices gathers them, see `sharded`: every
    process calls it.
    """

    def __init__(self, config: SparsityConfig) -> None:
        super().__init__()
        self.config = config
        for name, value in self._fresh().items():
            self.register_buffer(name, value)
        self._phase = "dense"
        self._seen = self._stamp()
        self._hold = False
        self.operands: tuple[Any, list[Tensor]] | None = None  # held weights as kernels read them
        self.decoder: tuple[Any, Any] | None = None  # and as decoding's do
        self.collect = False
        self.seen: dict[str, Tensor | None] = {}  # by the last forward pass with `collect` on

    def _fresh(self) -> dict[str, Tensor]:
        """The buffers of a new layer."""
        flags = {name: torch.zeros((), dtype=torch.float32) for name in ("sparse", "clustered", "scaled")}
        clusters = torch.arange(self.config.top_k, dtype=torch.float32)
        return flags | {"static_clusters": clusters, "scale": torch.zeros(4)}  # beta of w1, w2, w2_t, w1_t

    @property
    def config(self) -> SparsityConfig:
        """The layer's formats."""
        return self._config

    @config.setter
    def config(self, config: SparsityConfig) -> None:
        if not isinstance(config, SparsityConfig):
            raise ValueError(f"sparsity is {config!r:.50}; give a SparsityConfig or one of SPARSITY_PRESETS")
        self._config = config
        self.formats = json.dumps(vars(config), sort_keys=True)  # as operators and compiled code know them

    @property
    def phase(self) -> str:
        """ "dense" or "sparse"; switching to "sparse" freezes S-STE's scales if they are used.

        Setting it raises ValueError for any other name, and RuntimeError for "sparse" where Venom has no
        clusters yet. All processes that share the weights set it, for scales are of whole matrices.
        """
        if not torch.compiler.is_compiling():
            self._follow()
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        if phase not in PHASES:
            raise ValueError(f"phase is {phase!r}; choose one of {', '.join(PHASES)}")
        if phase == "sparse" and self.config.weight_scale and not _on(self.scaled):
            settle(self)
            found = torch.tensor([soft_scale(whole(w).detach(), dim) for w, dim in self._oriented()])
            self.scale.copy_(agreed(found.to(self.scale), self._oriented()[0][0]))
            self.scaled.fill_(1)
        self._enter(phase)
        self.sparse.fill_(phase == "sparse")
        self._seen = self._stamp()

    def beta(self, index: int) -> Tensor:
        """S-STE's scale of w1, w2, w2_t or w1_t, by index; NaN before the first sparse phase."""
        return self.scale[index] / self.scaled

    def fixed_clusters(self) -> Tensor:
        """[k], long: the clusters of routing "static"."""
        return self.static_clusters.round().long()

    @property
    def hold(self) -> bool:
        """True while the weights are promised to stay as they are."""
        return self._hold

    @hold.setter
    def hold(self, hold: bool) -> None:
        self._hold, self.operands, self.decoder = hold, None, None

    def stats(self) -> dict[str, float]:
        """Of the last forward pass with `collect` on: shares of zeros before and after the masks, and load.

        y2_sparsity is the natural sparsity of relu(y1)^2, kept_sparsity that of the masked y2,
        kept_energy the share of y2's sum that the mask keeps; router_load (max over mean) when routed. Of no
        tokens each is NaN.
        """
        if not self.seen:
            return {}
        y2, kept, clusters = (self.seen.get(k) for k in ("y2", "kept", "clusters"))
        if y2.numel() == 0:
            names = ["y2_sparsity", "kept_sparsity", "kept_energy", "router_load"]
            return dict.fromkeys(names if clusters is not None else names[:3], math.nan)
        out = {"y2_sparsity": sparsity(y2), "kept_sparsity": sparsity(kept)}
        total = y2.double().sum().item()
        out["kept_energy"] = kept.double().sum().item() / total if total > 0 else 1.0
        if clusters is not None:
            out["router_load"] = load_stats(clusters, self.config.n_clusters)["max_over_mean"]
        return out

    def note(self, y2: Tensor, kept: Tensor, clusters: Tensor | None) -> None:
        """Keep what `stats` is about."""
        self.seen = {"y2": y2.detach(), "kept": kept.detach(), "clusters": clusters}

    def _enter(self, phase: str) -> None:
        if phase == "sparse" and (missing := self._missing()):
            raise RuntimeError(missing)
        self._phase = phase

    def _missing(self) -> str:
        """What the sparse phase still lacks; empty if nothing."""
        if self.config.activation == "venom" and not _on(self.clustered):
            return "no clusters yet: call make_clusters(seed) at the end of the dense warm-up"
        if self.config.weight_scale and not _on(self.scaled):
            return "no scales yet: enter the sparse phase by setting .phase"
        return ""

    def _follow(self) -> None:
        """Take the phase from its buffer where that was written from outside, by an average for example."""
        stamp, flag = self._stamp(), self.sparse
        if stamp == self._seen or flag.is_meta or torch._C._functorch.is_batchedtensor(flag):
            return  # the layers of an ensemble under vmap share one phase
        self._enter("sparse" if _on(flag) else "dense")
        self._seen = stamp

    def _stamp(self) -> tuple[int, int]:
        """Changes whenever the phase's buffer may have; reading the buffer itself would wait for a GPU."""
        flag = self.sparse
        return id(flag), 0 if flag.is_inference() else flag._version

    def _apply(self, fn: Callable, recurse: bool = True) -> LayerState:
        """Move the buffers without rounding or losing them; off the meta device, where they have no values,
        they are those of a new layer."""
        self._follow()
        self.operands = self.decoder = None
        fresh = self._fresh()
        before = {name: self._buffers[name] for name in fresh}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = self._buffers[name]
            if not moved.is_meta:
                value = fresh[name] if value.is_meta else value
                self._buffers[name] = value.to(moved.device, moved.dtype if name == "scale" else value.dtype)
        if before["sparse"].is_meta and not self.sparse.is_meta:
            self._phase = "dense"
        self._seen = self._stamp()
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})["formats"] = _formats(self.config)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, *lists: list[str]
    ) -> None:
        self._keep_own(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        if prefix + "sparse" not in state_dict or self.sparse.is_meta:
            return
        n, c = float(self.clustered), self.config
        if c.activation == "venom" and n > 1.5 and round(n) != c.n_clusters:
            self.clustered.zero_()  # sorted into another number of clusters
        saved, own, wrong = local_metadata.get("formats"), _formats(c), self._missing()
        if saved not in (None, own):
            wrong = (
                f"its formats are {saved}, this layer's {own}; for the weights alone, save in phase 'dense'"
            )
        if _on(self.sparse) and wrong:
            self.sparse.zero_()
            lists[-1].append(f"{prefix}sparse: the state is sparse, but {wrong}")
        self._follow()

    def _keep_own(self, state: dict, prefix: str) -> None:
        """Give a dense state of other formats what this layer has by its own: clusters, scores, experts."""
        if self.sparse.is_meta or _on(state.get(prefix + "sparse", torch.ones(()))):
            return
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        for name in ("static_clusters", "score", "experts.weight", "experts.bias"):
            given = state.pop(prefix + name, None)
            if name in own:
                fits = given is not None and given.shape == own[name].shape
                state[prefix + name] = given if fits else own[name]
                if not fits and (name, self.config.routing) == ("static_clusters", "static"):
                    state[prefix + "clustered"] = torch.zeros_like(self.clustered)


def _on(flag: Tensor) -> bool:
    """True if a flag, or most of an average, is on; a meta tensor has no value and keeps nothing back."""
    return flag.is_meta or bool(flag > 0.5)


def _formats(config: SparsityConfig) -> dict[str, Any]:
    """The settings that say what a sparse layer computes, where they are not the default.

    States from before `backward` was a setting lack it and mean "whole", so that is what goes unsaid.
    """
    default = vars(SparsityConfig(backward="whole"))
    silent = {"refresh_every"} if config.reading_matters else {"refresh_every", "backward"}
    return {k: v for k, v in vars(config).items() if v != default[k] and k not in silent}
