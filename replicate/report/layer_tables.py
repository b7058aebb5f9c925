"""Tables of the whole sparse layer from the records `bench-ffn` and `bench-backends`."""

import pandas as pd

from replicate.bench import ffn as ffn_bench
from replicate.study.records import CARD, Record, RecordStore

FP8 = ("fp8", "venom16", "venom16, fp8")  # presets: dense, and figure 4d in 16 bits and in 8
MODELS = {"7B": 4096, "1B": 2048}  # d_model of its layer
# Published video models -> d_model, d_ff, see `bench.ffn.VIDEO`
VIDEO = dict(zip(("Wan 2.1 14B", "HunyuanVideo"), (shape[1:] for shape in ffn_bench.VIDEO), strict=True))
SMALLER = [[8192, 3072, 12288], [16384, 1024, 4096]]  # tokens, d_model, d_ff
NAMES = {
    "dense": "dense, compiled",
    "dense, by hand": "dense, by hand",
    "dense, eager": "dense, eager",
    "venom16": "figure 4d, 4 of 16",
    "venom32": "figure 4d, 4 of 32",
    "venom64": "figure 4d, 4 of 64",
    "recipe": "algorithms 1, 2, 4 of 16",
    "recipe32": "algorithms 1, 2, 4 of 32",
    "recipe64": "algorithms 1, 2, 4 of 64",
    "active16": "by activations, 4 of 16",
    "active64": "by activations, 4 of 64",
    "active16x32": "by activations, 8 of 32 clusters",
    "active64x32": "by activations, 2 of 32 clusters",
    "act24": "2:4 activations",
    "act24+tile": "2:4 activations, weight gradients too",
    "all24": "all six products 2:4",
    "fp8": "dense, in FP8",
    "venom16, fp8": "figure 4d, 4 of 16, in FP8",
}


def layer(record: Record, d_model: int) -> pd.DataFrame:
    """One row a format: ms a step, times as fast as dense (four ways), peak memory over the compiled dense's.

    Columns: "x" by CUDA graphs, "sustained" back to back, "launches" without graphs, each over the faster
    dense layer, see `bench.ffn.baseline`; "eager" over one neither compiled nor by hand.
    """
    rows = [row for row in ffn_bench.rows(record) if row["shape"][1] == d_model]
    if not rows:
        raise ValueError(f"the record has no shape with d_model {d_model}")
    frame = pd.DataFrame(rows).rename(columns=lambda name: name.removeprefix("x "))
    frame["layer"] = frame["arm"].replace(NAMES)
    columns = ["arm", "layer", "ms", "x", "sustained", "launches", "eager", "memory"]
    return frame.rename(columns={"of dense": "memory"})[columns]


def over_dense(d_model: int, column: str = "x", device: str = CARD) -> dict[str, float]:
    """Arm -> a column of `layer`, by all of a GPU's records of this shape, each over its own dense layer."""
    found: dict[str, float] = {}
    for record in RecordStore().widest_last(ffn_bench.KIND, device=device):
        if any(s["shape"][1] == d_model for s in record.results["shapes"]):
            found |= layer(record, d_model).set_index("arm")[column].to_dict()
    return found


def fp8_record(d_model: int) -> Record | None:
    """The newest record of `CARD` and this shape that timed `FP8` together, or None."""
    records = RecordStore().widest_last(ffn_bench.KIND, device=CARD)
    whole = [r for r in records if set(FP8) <= set(r.config["sparsity"])]
    fits = [r for r in whole if any(s["shape"][1] == d_model for s in r.results["shapes"])]
    return max(fits, key=lambda r: r.date, default=None)


def fp8_gain(d_model: int) -> float | None:
    """Figure 4d's time in bf16 over its time in FP8, by the newest record of this shape, or None."""
    record = fp8_record(d_model)
    if record is None:
        return None
    _, in_bf16, in_fp8 = layer(record, d_model).set_index("arm").loc[list(FP8), "ms"]
    return float(in_bf16 / in_fp8)


def in_fp8(column: str = "x") -> pd.DataFrame:
    """Index `FP8`, one column a model shape: a column of `layer`, such as times as fast as dense in bf16.

    No column without a record.
    """
    found = {}
    for model, d_model in MODELS.items():
        if record := fp8_record(d_model):
            found[model] = layer(record, d_model).set_index("arm").loc[list(FP8), column]
    return pd.DataFrame(found)


def fp8_values() -> dict[str, str]:
    """The numbers of `in_fp8`, memory too, figure 4d's gain over itself in bf16, both gains multiplied."""
    memory = in_fp8("memory").items()
    out = {f"memory FP8 {model} {arm}": f"{share:.2f}" for model, x in memory for arm, share in x.items()}
    for model, x in in_fp8().items():
        out |= {f"beside FP8 {model} {arm}": f"{times:.2f}" for arm, times in x.items()}
        out[f"FP8 gains {model}"] = f"{x.iloc[2] / x.iloc[1]:.2f}"
        out[f"beside FP8 {model} multiplied"] = f"{x.iloc[0] * x.iloc[1]:.2f}"
    return out


def smaller() -> pd.DataFrame:
    """One row a format: times as fast as the faster dense layer, and memory, at `SMALLER` shapes."""
    record = RecordStore().latest(ffn_bench.KIND, shapes=SMALLER)
    found: dict[str, pd.Series] = {}
    for tokens, d_model, d_ff in SMALLER:
        table = layer(record, d_model).set_index("layer")
        name = f"{tokens} x {d_model} x {d_ff}"
        found |= {name: table["x"], f"{name}, memory": table["memory"]}
    return pd.DataFrame(found).rename_axis("layer").reset_index()


def video() -> pd.DataFrame:
    """One row a format, one column a model of VIDEO: times as fast as the faster dense layer of its shape."""
    shapes = [list(shape) for shape in ffn_bench.VIDEO]
    record = RecordStore().latest(ffn_bench.KIND, device=CARD, shapes=shapes)
    found = {}
    for model, (d_model, d_ff) in VIDEO.items():
        x = layer(record, d_model).set_index("arm")["x"]
        found[f"{model}, {d_model} x {d_ff}"] = x[~x.index.str.startswith("dense")]
    return by_name(pd.DataFrame(found), "layer")


def video_values() -> dict[str, str]:
    """Name -> times as fast as dense, by `video`: "Wan 2.1 14B venom16", "HunyuanVideo venom16", ..."""
    table = video().set_index("layer").set_axis(list(VIDEO), axis=1)
    arms = {name: arm for arm, name in NAMES.items()}
    return {f"{m} {arms[name]}": f"{x:.2f}" for m, column in table.items() for name, x in column.items()}


def cards() -> pd.DataFrame:
    """`over_dense`, one row a format that every recorded GPU has timed, one column a GPU and model shape."""
    devices = {r.device for r in RecordStore().widest_last(ffn_bench.KIND)}
    found = {
        f"{device.removeprefix('NVIDIA ')}, {model}": over_dense(d_model, device=device)
        for model, d_model in MODELS.items()
        for device in (CARD, *sorted(devices - {CARD}))
    }
    frame = pd.DataFrame(found).dropna()
    return by_name(frame[(frame != 1).any(axis=1)], "layer")  # without the baseline


def by_name(frame: pd.DataFrame, what: str) -> pd.DataFrame:
    """A frame by arm in the order and with the words of NAMES, as column `what`."""
    named = [name for name in NAMES if name in frame.index]
    return frame.loc[named].rename(index=NAMES).rename_axis(what).reset_index()


def stages(record: Record, d_model: int) -> pd.DataFrame:
    """Milliseconds of a step by kind of kernel: one row a stage, one column a profiled format."""
    (shape,) = [s for s in record.results["shapes"] if s["shape"][1] == d_model]
    frame = pd.DataFrame({NAMES.get(arm, arm): ffn_bench.stages(shape, arm) for arm in shape["kernels"]})
    return frame[(frame > 0).any(axis=1)].rename_axis("stage, ms").reset_index()


def agreement(record: Record) -> pd.DataFrame:
    """Gaps in nats between training curves by kernels and by the reference, beside those of two seeds."""
    names = {"arm": "arm", "backends": "largest gap of the curves", "seeds": "of two seeds"}
    names |= {"final_backends": "gap of the last 100 steps", "final_seeds": "of two seeds, last 100"}
    frame = pd.DataFrame(record.results["arms"]).rename(columns=names)
    frame["within"] = frame["within"].map({True: "yes", False: "no"})
    return frame[[*names.values(), "within"]]
