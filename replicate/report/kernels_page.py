"""What docs/kernels.md shows: tables of the recorded benchmarks, and what was aimed at and reached."""

from __future__ import annotations

from functools import partial

import pandas as pd

from replicate import figures
from replicate.bench.ffn import ACTIVE, BY_HAND
from replicate.report import kernel_tables, layer_tables, step_table
from replicate.study.records import Record, RecordStore

LAYER_AIMS = {"recipe": 2.2, "venom16": 3.0, "venom32": 5.0}  # times as fast as the faster dense layer
VENOM_AIMS = {"4 of 16": 3.3, "4 of 32": 6.0, "4 of 64": 10.0}  # and as cuBLAS's six products
BANDWIDTH_AIMS = {  # pass of the record -> its name here, rows at the 7B and at the 1B shape, share of a copy
    "relu2_prune24": ("relu2_prune24", 16384, 16384, 0.8),
    "backward": ("its backward", 16384, 16384, 0.75),
    "tile prune, both": ("tile_prune24, both ways", 16384, 16384, 0.5),
    "soft W, W^T": ("soft_threshold_prune24, W and W^T", 4096, 2048, 0.6),
}


def tables() -> dict[str, str]:
    """Name -> Markdown of each table of the page."""
    short = partial(figures.markdown, digits=3)
    kinds = (kernel_tables.KERNELS, kernel_tables.VENOM, kernel_tables.LAYER, kernel_tables.BACKENDS)
    kernels, venom, whole, curves = map(kernel_tables.recorded, kinds)
    active = kernel_tables.recorded(kernel_tables.LAYER, ACTIVE)
    others = [r for r in RecordStore().widest_last(kernel_tables.LAYER) if r.device != layer_tables.CARD]
    found = {
        "runs": _runs(kernels, venom, whole, active, curves, *others, *step_table.width_records()),
        "goals": figures.markdown(goals(kernels, venom, whole)),
        "agreement": short(layer_tables.agreement(curves)),
        "cards": short(layer_tables.cards()),
        "layer-small": short(layer_tables.smaller()),
        "memory": short(kernel_tables.memory(kernels), columns={"of copy": "{:.1%}".format}),
        "widths": figures.markdown(step_table.width_table(step_table.widths())),
        "products": short(_products(kernels)),
    }
    for d_model, name in {4096: "7b", 2048: "1b"}.items():
        formats = kernel_tables.venom_formats(venom, d_model).set_index("format").T
        stages = pd.DataFrame(kernel_tables.stages(venom, d_model))
        shown = {
            "venom-products": kernel_tables.venom_products(venom, d_model),
            "venom-ffn": formats.rename_axis("").reset_index(),
            "layer": layer_tables.layer(whole, d_model).drop(columns="arm"),
            "layer-active": layer_tables.layer(active, d_model).drop(columns="arm"),
            "layer-stages": layer_tables.stages(whole, d_model),
            "stages": stages.rename_axis("stage, ms").reset_index(),
        }
        found |= {f"{table}-{name}": short(frame) for table, frame in shown.items()}
    return found


def goals(kernels: Record, venom: Record, whole: Record) -> pd.DataFrame:
    """What was aimed at for the 7B shape, what was reached there and at the 1B shape."""
    share, times = "{:.0%}".format, "{:.2f}x".format
    copies = {(r["name"], r["rows"], r["cols"]): r["share_of_copy"] for r in kernels.results["memory"]}
    found = []  # what, against, aim, reached at the 7B shape, at the 1B shape, how they are written
    for name, (what, large, small, least) in BANDWIDTH_AIMS.items():
        reached = copies[name, large, 16384], copies[name, small, 8192]
        found.append((what, "copy bandwidth", least, *reached, share))
    ms = {(r["name"], r["cols"]): r["ms"] for r in kernels.results["memory"]}
    theirs, ours = "torch: compress y2", "relu2_prune24"
    faster = (ms[theirs, cols] / ms[ours, cols] for cols in (16384, 8192))
    found.insert(3, (ours, "torch's compressor", 20, *faster, times))
    gain = kernel_tables.figure6(kernels)["speedup_with_conversion"]
    found.append(("figure 6, conversion included", "cuBLAS", 1.45, gain, None, times))
    formats = [kernel_tables.venom_formats(venom, d).set_index("format")["clusters"] for d in (4096, 2048)]
    for form, least in VENOM_AIMS.items():
        found.append((f"figure 7, six products, {form}", "cuBLAS", least, *(x[form] for x in formats), times))
    layers = [layer_tables.layer(whole, d).set_index("arm") for d in (4096, 2048)]
    names, dense = layer_tables.NAMES, "compiled dense layer"
    faster = "faster dense layer" if BY_HAND in layers[0].index else dense
    for arm, least in LAYER_AIMS.items():
        found.append((f"whole layer, {names[arm]}", faster, least, *(x.loc[arm, "x"] for x in layers), times))
    rows = []
    for what, against, least, large, small, show in found:
        other = show(small) if small else ""
        rows.append([what, against, show(least), show(large), "yes" if large >= least else "no", other])
    for arm in layers[0].index[~layers[0].index.str.startswith("dense")]:
        large, small = (frame.loc[arm, "memory"] for frame in layers)
        cells = ["at most 1.00", f"{large:.2f}", "yes" if large <= 1 else "no", f"{small:.2f}"]
        rows.append([f"peak memory, {names[arm]}", dense, *cells])
    return pd.DataFrame(rows, columns=["what", "against", "aim", "7B shape", "reached", "1B shape"])


def _products(kernels: Record) -> pd.DataFrame:
    frame = kernel_tables.products(kernels)
    names = {"name": "product", "m, n, k": "m, n, k", "dense_ms": "dense ms", "sparse_ms": "2:4 ms"}
    names |= {"convert_ms": "convert ms", "speedup": "speed-up", "speedup_with_conversion": "with conversion"}
    frame["m, n, k"] = frame[["m", "n", "k"]].astype(str).agg(", ".join, axis=1)
    return frame.rename(columns=names)[[*names.values(), "default algorithm", "with eager conversion"]]


def _runs(*found: Record) -> str:
    rows = [
        (f"data/recorded/{r.kind}/{r.config_hash}.json", r.device, r.versions["torch"], r.versions["triton"])
        + (r.date[:10], r.commit[:7])
        for r in found
    ]
    columns = ["record", "device", "torch", "triton", "date", "commit"]
    return figures.markdown(pd.DataFrame(rows, columns=columns))
