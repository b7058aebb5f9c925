"""The study's arms, in one table, by groups; the configurations of each at a scale; the order of the runs."""

from collections.abc import Iterable, Sequence
from typing import Any

from replicate.config import TrainConfig
from replicate.settings.presets import SPARSITY_PRESETS, preset_of, train_preset
from replicate.settings.text import config_hash, same_formats

# Groups of arms that are sparsity presets as they stand
TABLE3 = (
    *("dense", "w1", "w1+w1t", "w2", "w2+w2t", "w1+w2", "w1+w2+t"),
    *("act24", "venom16", "venom32", "venom64", "recipe"),
)
# What the backward pass reads of a 2:4 weight: the values of the forward pass, not the whole weight
SAME = ("w1, same", "w2, same", "w1+w2, same", "recipe, same")
ACTIVE = ("active16", "active32", "active64", "active16x32", "active64x32")  # clusters by own activations
CONTROLS = ("static16", "no-mask-reuse", "act24+wgrad", "recipe32", "recipe64")

Arms = dict[str, tuple[str, dict[str, Any]]]  # name -> (sparsity preset, changes to the scale's training)
SHARES = (1 / 2, 2 / 3, 5 / 6)  # Table 4's 30, 40 and 50 of 60 thousand steps; 0 and 1 are arms of Table 3
MIXES: Arms = {
    **{f"recipe, {share:.0%} sparse first": ("recipe", {"sparse_share": share}) for share in SHARES},
    "recipe, 50% dense-sparse": ("recipe", {"sparse_share": 0.5, "order": "dense-sparse"}),
    "recipe, 50% interleaved": ("recipe", {"sparse_share": 0.5, "order": "interleaved"}),
}
SAME_MIXES: Arms = {  # with the backward pass that reads the forward pass's weights
    name.replace("recipe", "recipe, same"): ("recipe, same", changes) for name, (_, changes) in MIXES.items()
}
HARD, SCALED = {"model.sparsity.weight_method": "hard"}, {"model.sparsity.weight_scale": True}
WHOLE = {"model.sparsity.backward": "whole"}  # as the recipe is printed
OF_64 = {"model.sparsity.n_clusters": 64, "model.sparsity.top_k": 16}
BY_ACTIVATIONS = {"model.sparsity.routing": "activation"}
VARIANTS: Arms = {
    "recipe, no warm-up": ("recipe", {"dense_warmup": 0}),
    "act24, no warm-up": ("act24", {"dense_warmup": 0}),
    "act24, learned": ("act24", {"model.sparsity.selection": "learned"}),
    "act24, soft": ("act24", {"model.sparsity.selection": "soft"}),
    "act24, static": ("act24", {"model.sparsity.selection": "static"}),
    "recipe, hard": ("recipe", HARD),
    "recipe, scaled": ("recipe", SCALED),
    "w1+w2, hard": ("w1+w2", HARD),
    "w1+w2, scaled": ("w1+w2", SCALED),
    "w1+w2, hard, same": ("w1+w2, same", HARD),
    "w1+w2, scaled, same": ("w1+w2, same", SCALED),
    "recipe, hard, same": ("recipe, same", HARD),
    "recipe, scaled, same": ("recipe, same", SCALED),
    "recipe, same, 64 clusters": ("recipe, same", OF_64),
    "recipe, same, 64 clusters by activations": ("recipe, same", {**OF_64, **BY_ACTIVATIONS}),
    "venom16, no mask reuse": ("venom16", {"model.sparsity.mask_reuse": False}),
    "recipe, no mask reuse": ("recipe", {"model.sparsity.mask_reuse": False}),
    "venom16, no inner": ("venom16", {"model.sparsity.inner": False}),
    "GELU": ("dense", {"model.activation": "gelu"}),
    # What the paper leaves open: a quarter of the neurons a token throughout, chosen otherwise
    "venom16, l2": ("venom16", {"model.sparsity.metric": "l2"}),
    "venom16, cosine": ("venom16", {"model.sparsity.metric": "cosine"}),
    "venom16, 8 clusters": ("venom16", {"model.sparsity.n_clusters": 8, "model.sparsity.top_k": 2}),
    "venom16, 32 clusters": ("venom16", {"model.sparsity.n_clusters": 32, "model.sparsity.top_k": 8}),
    "venom16, 64 clusters": ("venom16", OF_64),
    "recipe, l2": ("recipe", {"model.sparsity.metric": "l2"}),
    "recipe, no inner": ("recipe", {"model.sparsity.inner": False}),
    "recipe, learned": ("recipe", {"model.sparsity.selection": "learned"}),
    "active16, 64 clusters": ("active16", OF_64),
    "active16x32, W1 scaled": ("active16x32", {"model.sparsity.w1": True, **WHOLE, **SCALED}),
    # Sparse steps first, a long dense end
    "active16x32, 50% sparse first": ("active16x32", {"sparse_share": 0.5}),
    "recipe, folded, 50% sparse first": ("recipe", {"fold": True, "sparse_share": 0.5}),
    "recipe, hard, 50% sparse first": ("recipe", {**HARD, "sparse_share": 0.5}),
    "recipe, scaled, 50% sparse first": ("recipe", {**SCALED, "sparse_share": 0.5}),
}
FP8: Arms = {"dense, FP8": ("fp8", {}), "venom16, FP8": ("venom16, fp8", {})}  # in both phases
AS_THEY_STAND: Arms = {name: (name, {}) for name in (*TABLE3, *SAME, *ACTIVE, *CONTROLS)}
ARMS = AS_THEY_STAND | MIXES | SAME_MIXES | VARIANTS | FP8

# Groups with arms of `_of_scale`
SWEEP = ("dense", "dense, lr x 0.5", "dense, lr x 2")
RATES = ("dense", "w1+w2", "act24", "venom16", "recipe")  # arms that also run at half and twice the rate
# Dense runs planned to end sooner: what a step 1.1, 1.2, 1.4, 1.55 or 1.7 times as fast has to beat
SHORTER = ((10, 11), (5, 6), (5, 7), (20, 31), (10, 17))
PLANNED = {f"dense, {n}/{of} of the steps": n / of for n, of in SHORTER}
# Sparsity spent on width: times as wide, clusters a token uses, of how many. Without the 2 of 4 inside, which
# saves no time.
WIDER = (
    *((2, 8, 16), (2, 32, 64), (2, 16, 64), (4, 4, 16), (4, 16, 64), (4, 8, 64), (4, 32, 128)),
    *((8, 8, 64), (8, 16, 128), (8, 8, 128)),
)
WIDER_BY_ACTIVATIONS = (
    *((2, 32, 64), (2, 16, 64), (4, 16, 64), (4, 8, 64), (4, 4, 64)),
    *((4, 16, 128), (4, 8, 128), (8, 16, 128)),
)
WIDER_24 = ((2, 32, 64), (4, 16, 64))  # with 2:4 weights, read the same
EXPERTS = ((4, 16, 64), (4, 8, 64))  # peers with a learned router, which trains sparse from the start
DENSE_WIDER = (1.5, 4)
# Other text: English prose in the folder "english" of the current one, `train.txt` and `valid.txt`
ENGLISH, ENGLISH_STEPS = "on English", 1500
IN_ENGLISH = ("dense", "act24", "venom16", "recipe", "recipe, same", "active16, 64 clusters")
ON_GPU = ("study10m", "study40m", "study100m")  # presets of the scales that train on one
AT_40M = (
    *("dense", "recipe", "active16x32", "recipe, 50% sparse first"),
    *("venom16", "venom16, 64 clusters", "active16, 64 clusters", "act24"),
    *("w1", "w1+w1t", "w2", "w2+w2t", "w1+w2", "w1+w2+t", *SAME),
    *("recipe, same, 50% sparse first", "wide x4, 16 of 64", "experts x4, 16 of 64", "experts x4, 8 of 64"),
    *("wide x4, 8 of 64 by activations", "wide x4, 4 of 64 by activations"),
)
AT_100M = ("dense", "recipe", "active16, 64 clusters", "experts x4, 8 of 64")
PARTLY = {"gpu40m": AT_40M, "gpu100m": AT_100M}  # scales at which only some arms are trained, seed by seed
ON_CPU = (11, 12, 13)  # seeds of laptop runs on a CPU, whose standard library is another text
EVERY_SEED = (*range(1, 10), *ON_CPU)  # of recorded runs; 1 to 3 are the study's
# What the paper leaves open: (question, an arm, the same with one change), read as "that arm instead of this"
OPEN: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("dense warm-up", "recipe", ("recipe, no warm-up", "recipe, short warm-up", "recipe, long warm-up")),
    ("dense warm-up", "act24", ("act24, no warm-up",)),
    ("the router's metric", "venom16", ("venom16, l2", "venom16, cosine")),
    ("number of clusters", "venom16", tuple(f"venom16, {n} clusters" for n in (8, 32, 64))),
    ("clusters formed anew", "venom16", ("venom16, refreshed",)),
    ("no router", "venom16", ("static16",)),
    ("whole clusters", "venom16", ("venom16, no inner",)),
    ("whole clusters", "recipe", ("recipe, no inner",)),
    ("mask reuse", "act24", ("no-mask-reuse",)),
    ("mask reuse", "venom16", ("venom16, no mask reuse",)),
    ("mask reuse", "recipe", ("recipe, no mask reuse",)),
    ("threshold", "w1+w2", ("w1+w2, scaled", "w1+w2, hard")),
    ("threshold", "recipe", ("recipe, scaled", "recipe, hard")),
    ("threshold", "w1+w2, same", ("w1+w2, scaled, same", "w1+w2, hard, same")),
    ("threshold", "recipe, same", ("recipe, scaled, same", "recipe, hard, same")),
    *(("backward reads", name.removesuffix(", same"), (name,)) for name in SAME),
    ("number of clusters", "recipe, same", ("recipe, same, 64 clusters",)),
    ("who chooses", "recipe, same, 64 clusters", ("recipe, same, 64 clusters by activations",)),
    ("criterion for 2 of 4", "act24", ("act24, learned", "act24, soft", "act24, static")),
    ("criterion for 2 of 4", "recipe", ("recipe, learned",)),
    ("2:4 weight gradients", "act24", ("act24+wgrad",)),
    ("activation function", "dense", ("GELU", "SwiGLU")),
)


def _of_scale(dense: TrainConfig) -> Arms:
    """The arms whose changes follow from a scale's dense training."""
    arms: Arms = {
        "recipe, short warm-up": ("recipe", {"dense_warmup": dense.dense_warmup // 4}),
        "recipe, long warm-up": ("recipe", {"dense_warmup": 3 * dense.dense_warmup}),
    }
    for name, share in PLANNED.items():
        arms[name] = ("dense", {"steps": round(share * dense.steps)})
    arms["venom16, refreshed"] = ("venom16", {"model.sparsity.refresh_every": dense.steps // 5})
    for factor in (0.5, 2.0):  # does the ranking depend on the learning rate, tuned for dense?
        for name in RATES:
            arms[f"{name}, lr x {factor:g}"] = (name, {"lr": factor * dense.lr})
    of_equal_parameters = {"model.activation": "swiglu", "model.d_ff": 2 * dense.model.d_ff // 3}
    return arms | {"SwiGLU": ("dense", of_equal_parameters)}


def in_english() -> Arms:
    """The main arms on other text, fewer steps of it, "venom16, on English" for one; see IN_ENGLISH."""
    changes = {"corpus": "file:english", "steps": ENGLISH_STEPS}
    return {f"{name}, {ENGLISH}": (ARMS[name][0], ARMS[name][1] | changes) for name in IN_ENGLISH}


def wider(dense: TrainConfig) -> Arms:
    """Layers that are wider than the dense one and sparser by as much, their peers, and wider dense layers.

    By the router, w times as wide with a share 1 / w of the clusters has the dense layer's FLOPs. By
    activations product 1 is there in full: (w + 5 w k / n) / 6 times the FFN's FLOPs.
    """

    def of(w: float, k: int, n: int, **more: Any) -> dict[str, Any]:
        clusters = {"n_clusters": n, "top_k": k, "inner": False}
        formats = {f"model.sparsity.{name}": value for name, value in clusters.items()}
        return {"model.d_ff": round(w * dense.model.d_ff)} | formats | more

    arms: Arms = {f"wide x{w}, {k} of {n}": ("venom16", of(w, k, n)) for w, k, n in WIDER}
    for w, k, n in WIDER_BY_ACTIVATIONS:
        arms[f"wide x{w}, {k} of {n} by activations"] = ("venom16", of(w, k, n, **BY_ACTIVATIONS))
    for w, k, n in WIDER_24:
        arms[f"wide x{w}, {k} of {n}, 2:4 weights"] = ("recipe, same", of(w, k, n))
    for w, k, n in EXPERTS:
        learned = {"model.sparsity.routing": "learned", "dense_warmup": 0}
        arms[f"experts x{w}, {k} of {n}"] = ("venom16", of(w, k, n, **learned))
    for w in DENSE_WIDER:
        arms[f"dense, wide x{w}"] = ("dense", {"model.d_ff": round(w * dense.model.d_ff)})
    return arms


def arms(
    profile: str, sparsity: Iterable[str], seeds: Iterable[int] = (1,), **changes: Any
) -> list[TrainConfig]:
    """Configurations of every sparsity preset with every seed, seeds outermost.

    Args:
        profile: a scale of PRESET_OF, or the name of a training preset.
        changes: fields to change in each, as in `train_preset`: steps=50.
    """
    preset, names = preset_of(profile), list(sparsity)
    return [train_preset(preset, name, **{**changes, "seed": seed}) for seed in seeds for name in names]


def describe(config: TrainConfig) -> str:
    """A short name of a run: sparsity preset, seed, and the share of sparse steps if not all."""
    sparsity = config.model.sparsity
    alike = (name for name, preset in SPARSITY_PRESETS.items() if same_formats(preset, sparsity))
    name = next(alike, "own sparsity")
    share = f" {config.order} {config.sparse_share:.0%}" if sparsity.any and config.sparse_share < 1 else ""
    activation = "" if config.model.activation == "relu2" else f" {config.model.activation}"
    return f"{name}{activation}{share} seed {config.seed}"


def names_of(runs: Iterable[tuple[str, TrainConfig]]) -> dict[str, str]:
    """Hash -> "arm, seed N" of runs (arm name, configuration); of two names the first counts."""
    return {config_hash(config): f"{name}, seed {config.seed}" for name, config in reversed(list(runs))}


def everything(profile: str, seeds: Sequence[int] = (1, 2, 3)) -> dict[str, list[TrainConfig]]:
    """Arm name -> configurations, one a seed, of all arms at a scale, Table 3's first.

    Variants with more clusters than the scale's d_ff divides into are left out; `wider` is for ON_GPU alone.
    """
    dense = train_preset(preset_of(profile))
    more = wider(dense) | in_english() if preset_of(profile) in ON_GPU else {}
    return {
        name: arms(profile, [preset], seeds, **changes)
        for name, (preset, changes) in (ARMS | _of_scale(dense) | more).items()
        if dense.model.d_ff % (4 * changes.get("model.sparsity.n_clusters", 1)) == 0
    }


def some(names: Sequence[str], seeds: Sequence[int], profile: str) -> dict[str, list[TrainConfig]]:
    """The arms of `everything` with these names, in this order; ValueError names one that does not exist."""
    plan = everything(profile, seeds)
    unknown = [name for name in names if name not in plan]
    if unknown:
        raise ValueError(f"the study has no arm {unknown[0]!r}; it has {', '.join(plan)}")
    return {name: plan[name] for name in names}


def queue(
    profile: str, seeds: Sequence[int] = (1, 2, 3), names: Sequence[str] | None = None
) -> list[tuple[str, TrainConfig]]:
    """(arm name, configuration) of a scale's runs, most important first, each once.

    The dense model's learning rate, checked with the first seed; Table 3 and the recipe, seed by seed;
    Table 4's mixes; clusters by activations; shorter dense runs; one seed of all variants; FP8; all else.
    Of the scales in PARTLY only those arms, seed by seed.

    With `names` only these arms, in this order, seed by seed; ValueError for one that does not exist.
    """
    if names is not None:
        plan, stages = some(names, seeds, profile), [(names, seeds)]
    else:
        plan, first = everything(profile, seeds), seeds[:1]
        stages = [(SWEEP, first), ((*TABLE3, *SAME), seeds), (MIXES | SAME_MIXES, seeds), (ACTIVE, seeds)]
        stages += [(PLANNED, seeds), (VARIANTS, first), (FP8, seeds), (plan, seeds)]
        stages = [(PARTLY[profile], seeds)] if profile in PARTLY else stages
    runs: dict[str, tuple[str, TrainConfig]] = {}
    for group, some_seeds in stages:
        for i in range(len(some_seeds)):
            for name in filter(plan.__contains__, group):
                runs.setdefault(config_hash(plan[name][i]), (name, plan[name][i]))
    return list(runs.values())
