"""What docs/artifact.md shows: each claim, when it holds, the command that reproduces it, minutes, machine.

Minutes and machines come from the records that a claim rests on, or, where nothing is measured, from what its
notebook says of itself. Which records these are is stated here; tests/report/test_artifact_page.py computes
the claims' numbers from them.
"""

import shlex
from dataclasses import replace
from functools import cache

import pandas as pd

from replicate import figures, paper
from replicate.paper.table import paper_text, shipped_table, verdict_counts
from replicate.paper.verdicts import SAME_SIZE, Claim, text
from replicate.report import (
    diffusion_plots,
    diffusion_values,
    kernel_tables,
    notebooks,
    step_table,
    study_coverage,
    study_tables,
    weight_plots,
    width,
)
from replicate.study import noise
from replicate.study.records import Record, RecordStore

_HALF = study_tables.HALF
_MIXES = (_HALF, "recipe, 67% sparse first", "recipe, 83% sparse first")
ARMS: dict[str, tuple[str, ...]] = {  # claim -> arms it compares: two with each other, else with dense
    **dict.fromkeys(("relu2-init", "relu2-trained", "relu2-rises", "warmup-steps"), ()),
    "warmup-helps": ("recipe, no warm-up", "recipe"),
    "mask-reuse": ("no-mask-reuse", "act24"),
    "mask-reuse-venom": ("venom16, no mask reuse", "venom16"),
    "static-worse": ("static16", "venom16"),
    "quantisation-loss": study_tables.BEYOND_FP8,
    **weight_plots.CLAIMS,
    "table4-30k": (_HALF,),
    "table4-40k": (_MIXES[1],),
    "table4-50k": (_MIXES[2],),
    "table4-60k": ("recipe",),
    "table4-recovers": (_HALF,),
    "table4-helps": ("recipe", _HALF),
    "order": ("recipe, 50% dense-sparse", _HALF),
    "figure5": (*_MIXES, "recipe"),
    "table2-1b-loss": (_HALF,),
    "table2-1b-accuracy": (_HALF,),
    "beyond-venom": ("active16x32",),
    "beyond-width": ("wide x4, 8 of 64 by activations",),
    "beyond-experts": ("experts x4, 8 of 64",),
}
SEEDS = {"mask-reuse": 9}  # of the study's, where it is not three
BENCHES: dict[str, tuple[str, ...]] = {  # claim -> benchmarks that it rests on
    "figure6-speedup": ("kernels",),
    "figure6-conversion": ("kernels",),
    "figure7-speedup": ("venom",),
    "venom-beats-24": ("kernels", "venom"),
    "table2-1b-speedup": ("step --preset llama1b",),
    "table2-7b-speedup": ("step --preset llama7b",),
    "step-speedup": ("step --preset llama1b",),
    "time-is-flops": ("step --preset llama1b",),
    "headline": ("step --preset llama7b",),
    "quantisation": ("ffn --sparsity venom16 'venom16, fp8'",),
}
WIDE = {"beyond-experts-time": "experts x4, 8 of 64"}  # claim -> arm, of all whose timings it is judged by
DRAWN = {  # claim -> kind of diffusion run, arm beside dense
    f"beyond-{what}-{name}": (kind, arm)
    for what, kind in diffusion_values.KINDS.items()
    for name, arm in (("24", "act24"), ("venom", "venom16"))
}
RUN = "python -m replicate"


def tables() -> dict[str, str]:
    """Name -> Markdown of the page's table, of every claim."""
    return {"claims": figures.markdown(claims())}


@cache
def values() -> dict[str, str]:
    """Name -> text of the numbers in the page's sentences."""
    store = RecordStore()
    kinds = [path.name for path in store.recorded.iterdir() if path.is_dir()]
    trained = [record for record, origin in store.all("train") if origin == "recorded"]
    out = {"counts": verdict_counts(shipped_table()), "runs": str(len(trained))}
    out["records"] = str(sum(origin == "recorded" for kind in kinds for _, origin in store.all(kind)))
    out["same size"] = " to ".join(map(text, SAME_SIZE))
    out |= {f"minutes {book.number}": f"{book.minutes('smoke'):g}" for book in notebooks.discover()}
    out["minutes of all"] = f"{sum(book.minutes('smoke') for book in notebooks.discover()):g}"
    out |= {"card, layers": kernel_tables.CARD, "card, steps": step_table.CARD}
    return out | study_coverage.values() | {"drift": f"{noise.drift('gpu')[0]:.3f} nats"}


def claims() -> pd.DataFrame:
    """One row a claim: what it says, when it holds, the command, minutes, machine, and who judges it."""
    return pd.DataFrame(
        {"claim": f"`{name}`", "it says": claim.statement, "holds if": holds_if(claim)} | _reproduced(claim)
        for name, claim in paper.claims().items()
    )


def holds_if(claim: Claim) -> str:
    """The rule by which a claim's verdict is "holds", in words."""
    if claim.rule == "true":
        rule = "our check says yes"
    elif claim.rule == "equals":
        rule = paper_text(claim) + (f", give or take {text(claim.tolerance)}" if claim.tolerance else "")
    elif claim.rule == "effect":
        size = f"{' to '.join(map(text, SAME_SIZE))} times the effect of {paper_text(claim)}"
        rule = paper_text(claim) if claim.paper is None else size
    else:
        limit = claim.paper - claim.tolerance * (1 if claim.rule == "at least" else -1)
        rule = paper_text(replace(claim, paper=limit))
    interval = ", whole interval" if claim.noisy else ""
    scale = f", at scale {claim.holds_from} or larger" if claim.holds_from != "smoke" else ""
    return rule + interval + scale


def records(name: str) -> list[Record]:
    """The shipped records of runs or timings that a claim rests on; none where nothing is measured."""
    if name in BENCHES:
        return [_timed(bench) for bench in BENCHES[name]]
    if name in WIDE:
        return width.timings(WIDE[name])
    if name in DRAWN:
        kind, arm = DRAWN[name]
        runs = diffusion_plots.runs(kind)
        return [record for each in ("dense", arm) for record in runs[each].values()]
    if name not in ARMS:
        return []
    frame = study_tables.every_run(shipped_table().loc[name, "scale"])
    mine = frame["arm"].isin(arms(name)) & frame["seed"].isin(_seeds(name))
    return frame.loc[mine, "record"].tolist()


def arms(name: str) -> list[str]:
    """The arms that have to be trained for a claim: two that are compared, or some and the dense model."""
    compared = ARMS[name]
    return list(compared if len(compared) == 2 else ("dense", *compared))


def _seeds(name: str) -> range:
    return range(1, SEEDS.get(name, 3) + 1)


def _timed(bench: str) -> Record:
    what, *options = shlex.split(bench)
    if "--preset" in options:
        return step_table.recorded(options[1])
    return kernel_tables.recorded(f"bench-{what}", options[1:] or None)


def _reproduced(claim: Claim) -> dict[str, str]:
    """The cells command, minutes, machine and judged by."""
    name, row = claim.id, shipped_table().loc[claim.id]
    if not row["source"] or row["ours"] == "–":
        needs = f"none: needs {claim.needs}" if claim.needs else "none: not measured here"
        return {"command": needs, "minutes": "", "machine": "", "judged by": ""}
    again = f"{RUN} notebooks run --only {claim.notebook}"
    if not (found := records(name)):
        minutes = next(b.minutes("smoke") for b in notebooks.discover() if b.number == claim.notebook)
        shown = {"command": f"`{again}`", "minutes": f"{minutes:g}", "machine": "any CPU"}
    else:
        if name in BENCHES:
            commands = [f"{RUN} bench {bench}" for bench in BENCHES[name]]
        elif name in WIDE:
            commands = [f"{RUN} {width.command(record)}" for record in found]
        elif name in DRAWN:
            kind, arm = DRAWN[name]
            train = f"diffusion --kind {kind} --profile gpu --fresh --record"
            commands = [f"{RUN} {train} --arms dense {arm}"]
        else:
            study = shlex.join(["study", "run", "--profile", row["scale"], "--arms", *arms(name)])
            seeds = f" --seeds {' '.join(map(str, _seeds(name)))}" if name in SEEDS else ""
            commands = [f"{RUN} {study}{seeds} --fresh --record"]
        devices = ", ".join(sorted({record.device for record in found}))
        minutes = sum(record.seconds for record in found) / 60
        shown = {"command": ", ".join(f"`{command}`" for command in commands)}
        shown |= {"minutes": f"{minutes:.1f}", "machine": devices}
    return shown | {"judged by": f"notebook {claim.notebook}"}
