"""What docs/kernels.md and the text of notebooks 06 and 07 show of the recorded benchmarks.

Tables, what was aimed at and reached, and the numbers in sentences.
"""

from collections.abc import Iterable
from functools import cache, partial

import pandas as pd

from replicate import figures
from replicate.bench.ffn import ACTIVE, BY_HAND
from replicate.report import decode_tables, kernel_tables, layer_tables, step_table
from replicate.report.kernel_plots import PEAK_DENSE
from replicate.study.records import Record, RecordStore

LAYER_AIMS = {"recipe": 2.2, "venom16": 3.0, "venom32": 5.0}  # times as fast as the faster dense layer
VENOM_AIMS = {"4 of 16": 3.3, "4 of 32": 6.0, "4 of 64": 10.0}  # and as cuBLAS's six products
BANDWIDTH_AIMS = {  # pass of the record -> its name here, rows at the 7B and at the 1B shape, share of a copy
    "relu2_prune24": ("relu2_prune24", 16384, 16384, 0.8),
    "backward": ("its backward", 16384, 16384, 0.75),
    "tile prune, both": ("tile_prune24, both ways", 16384, 16384, 0.5),
    "soft W, W^T": ("soft_threshold_prune24, W and W^T", 4096, 2048, 0.6),
}


MODELS = {name[:2]: d_model for d_model, name in kernel_tables.MODELS.items()}  # "7B" -> d_model
FORM = "4 of 32"  # that stands beside the paper's 6 to 8


def tables() -> dict[str, str]:
    """Name -> Markdown of each table of the page."""
    short = partial(figures.markdown, digits=3)
    kinds = (kernel_tables.KERNELS, kernel_tables.VENOM, kernel_tables.LAYER, kernel_tables.BACKENDS)
    kernels, venom, whole, curves = map(kernel_tables.recorded, kinds)
    active = kernel_tables.recorded(kernel_tables.LAYER, ACTIVE)
    others = [r for r in RecordStore().widest_last(kernel_tables.LAYER) if r.device != layer_tables.CARD]
    decoding = [decode_tables.recorded(model) for model in decode_tables.MODELS]
    in_fp8 = {r.config_hash: r for d in MODELS.values() if (r := layer_tables.fp8_record(d))}
    beside = [*step_table.width_records(), *decoding, *in_fp8.values()]
    found = {
        "runs": _runs(kernels, venom, whole, active, curves, *others, *beside),
        "goals": figures.markdown(goals(kernels, venom, whole)),
        "agreement": short(layer_tables.agreement(curves)),
        "cards": short(layer_tables.cards()),
        "layer-small": short(layer_tables.smaller()),
        "memory": short(kernel_tables.memory(kernels), columns={"of copy": "{:.1%}".format}),
        "widths": figures.markdown(step_table.width_table(step_table.widths())),
        "products": short(_products(kernels)),
        **{f"decode-{name.lower()}": short(decode_tables.table(name)) for name in decode_tables.MODELS},
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
    rows = []
    for r in found:
        row = {"record": f"data/recorded/{r.kind}/{r.config_hash}.json", "device": r.device}
        row |= {name: r.versions[name] for name in ("torch", "triton")}
        rows.append(row | {"date": r.date[:10], "commit": r.commit[:7]})
    return figures.markdown(pd.DataFrame(rows))


@cache
def values() -> dict[str, str]:
    """Name -> text of every number of the notebooks, from the records that their figures show."""
    kinds = (kernel_tables.KERNELS, kernel_tables.VENOM, kernel_tables.LAYER, kernel_tables.BACKENDS)
    kernels, venom, layer, backends = map(kernel_tables.recorded, kinds)
    versus = kernel_tables.venom_over_24(kernels, venom, 4096, FORM)
    gain = versus["2:4 ms"].sum() / versus[f"{FORM} ms"].sum()
    out = {"Venom over 2:4": f"{gain:.2f}", "Venom over 2:4, gains": _range(versus["Venom gain / 2:4 gain"])}
    out |= {"kernels device": kernels.device, "venom device": venom.device}
    return (
        out
        | _two_four(kernels)
        | _venom(venom)
        | _layer(layer)
        | layer_tables.fp8_values()
        | step_table.fp8_values()
        | _backends(backends)
    )


def _range(numbers: Iterable[float]) -> str:
    found = list(numbers)
    return f"{min(found):.2f} to {max(found):.2f}"


def _list(numbers: Iterable[float], form: str = "{:.2f}") -> str:
    *first, last = [form.format(number) for number in numbers]
    return f"{', '.join(first)} and {last}"


def _percents(shares: Iterable[float]) -> str:
    found = list(shares)
    return f"{100 * min(found):.0f} to {100 * max(found):.0f} %"


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _two_four(record: Record) -> dict[str, str]:
    """Figure 6's product and its conversion, the passes over memory, and the products of the FFN."""
    row, bandwidth = kernel_tables.figure6(record), kernel_tables.bandwidth(record)
    best, sweep = kernel_tables.products(record)["dense_tflops"].max(), kernel_tables.sweep(record)
    ours, theirs = (kernel_tables.pass_ms(record, n) for n in ("relu2_prune24", "torch: compress y2"))
    ffn = kernel_tables.products(record).query("name not in ['figure 6', 'sweep']")
    seven = kernel_tables.ffn_products(record, 4096).set_index("name")
    tile = seven.loc["dW2 = y2^T dy3"]
    passes = kernel_tables.memory(record).set_index("pass")["of copy"]
    own = passes[~passes.index.str.contains("copy|torch")]
    of_weights = own.index.str.startswith("soft")
    least_ms = 2 * row["m"] * row["k"] * (1 + 9 / 16) / (1e9 * bandwidth)  # bytes over TB/s
    pays = sweep[sweep["speedup_with_conversion"] > 1]
    return {
        "figure 6": f"{row['speedup']:.2f}",
        "figure 6, our conversion": f"{row['speedup_with_conversion']:.2f}",
        "figure 6, torch's conversion": f"{row['with eager conversion']:.2f}",
        "our conversion": _percent(row["convert_ms"] / row["sparse_ms"], 1),
        "activation passes": _percents(own[~of_weights]),
        "weight passes": _percents(own[of_weights]),
        "conversion, least ms": f"{least_ms:.3f}",
        "conversion, torch's ms": f"{row['eager_ms']:.2f}",
        "compressor, of copy": _percent(passes["torch: compress y2"].min()),
        "pays from": str(pays["m"].iloc[0]),
        "torch's conversion": _percent(row["eager_ms"] / row["sparse_ms"]),
        "columns to repay, ours": f"{kernel_tables.columns_to_repay(row, 'convert_ms'):,.0f}",
        "columns to repay, torch's": f"{kernel_tables.columns_to_repay(row, 'eager_ms'):,.0f}",
        "products to share": str(to_share(row)),
        "bandwidth": f"{bandwidth:.2f}",
        "ridge": f"{PEAK_DENSE / bandwidth:.0f}",
        "cuBLAS at best": f"{best:.0f}",
        "cuBLAS share": _percent(best / PEAK_DENSE),
        "relu2_prune24 ms": f"{ours:.2f}",
        "compressor ms": f"{theirs:.2f}",
        "compressor over relu2_prune24": f"{theirs / ours:.0f}",
        "Tensor.copy_": _percent(kernel_tables.memory(record)["of copy"][0]),
        "smallest": f"{sweep['speedup'].iloc[0]:.2f}",
        "smallest, our conversion": f"{sweep['speedup_with_conversion'].iloc[0]:.2f}",
        "largest": f"{sweep['speedup'].iloc[-1]:.2f}",
        "FFN products": _range(ffn["speedup"]),
        "FFN products, default": _range(ffn["default algorithm"]),
        "y3 dense ms": f"{seven.loc['y3 = y2 W2', 'dense_ms']:.2f}",
        "tiles save ms": f"{tile['dense_ms'] - tile['sparse_ms']:.2f}",
        "tiles take ms": f"{tile['convert_ms']:.2f}",
    }


def to_share(row: pd.Series) -> int:
    """The fewest products that must share torch's conversion to be faster than dense together."""
    return int(row["eager_ms"] // (row["dense_ms"] - row["sparse_ms"])) + 1


def _venom(record: Record) -> dict[str, str]:
    """Products, stages, memory and the whole FFN of figure 4d, by model; lists are of 4 of 16, 32 and 64."""
    out = {"largest error": _percent(kernel_tables.largest_error(record), 1)}
    for model, d_model in MODELS.items():
        formats = kernel_tables.venom_formats(record, d_model).set_index("format")
        for form in formats.index:
            out |= {f"{model} {column}, {form}": f"{x:.2f}" for column, x in formats.loc[form].items()}
        for column in ("clusters", "FFN"):
            out[f"{model} {column}"] = _list(formats[column])
        level = formats["gather, V = 128"] / formats["clusters, y3 summed"]
        out[f"{model} gather over summed"] = _range(level)
        out[f"{model} FFN over grouped"] = _range(formats["FFN over grouped"])
        out[f"{model} of dense"] = _list(100 * formats["of dense"], "{:.0f} %")
        shares = kernel_tables.overhead_share(record, d_model).values()
        out[f"{model} not products"] = _list((100 * share for share in shares), "{:.0f} %")
        shape = kernel_tables.shape_of(record, d_model)
        for how, times in (("graph", "ffn_sustained"), ("launched", "ffn_eager")):
            out[f"{model} {how} ms"] = f"{shape[times]['1']:.2f}"
    return out


def _layer(record: Record) -> dict[str, str]:
    """Speed and memory of `SparseFFN` by model and arm, and the stages of the recipe at the 7B shape."""
    out = {"arithmetic recipe": f"{kernel_tables.arithmetic('recipe'):.2f}"}
    for model, d_model in MODELS.items():
        frame = layer_tables.layer(record, d_model).set_index("arm")
        for column in ("x", "launches", "memory"):
            out |= {f"layer {model} {arm}, {column}": f"{x:.2f}" for arm, x in frame[column].items()}
    ms = layer_tables.stages(record, 4096).set_index("stage, ms")[layer_tables.NAMES["recipe"]]
    out |= {f"stage {stage}": f"{time:.2f}" for stage, time in ms.items()}
    return out | {f"share {stage}": _percent(time / ms.sum()) for stage, time in ms.items()}


def _backends(record: Record) -> dict[str, str]:
    """Gaps in nats between training curves: largest between backends, root mean square between seeds."""
    frame = layer_tables.agreement(record)
    return {
        "curves, backends": f"{frame['largest gap of the curves'].max():.3f}",
        "curves, seeds": f"{record.results['seeds']:.3f}",
        "ends, backends": f"{frame['gap of the last 100 steps'].max():.3f}",
        "ends, closest seeds": f"{frame['of two seeds, last 100'].min():.4f}",
        "ends, seeds": f"{record.results['final_seeds']:.3f}",
    }
