import json
import math
import re
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate.config import ModelConfig, SparsityConfig, TrainConfig
from replicate.settings.presets import MODEL_PRESETS, SPARSITY_PRESETS, TRAIN_PRESETS, train_preset
from replicate.settings.text import (
    NOT_HASHED,
    YOUNGER,
    config_hash,
    from_dict,
    same_formats,
    to_dict,
    with_changes,
)

few = settings(max_examples=40, deadline=None)


def refuses(pattern, function, *args, **kwargs):
    """The error's text, of a call that must raise ValueError."""
    with pytest.raises(ValueError, match=pattern) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def suggestion(text):
    return int(re.search(r"try (?:d_model = )?(\d+)", text).group(1))


@pytest.mark.parametrize("cls", [SparsityConfig, ModelConfig, TrainConfig])
def test_configs_are_frozen_and_have_defaults(cls):
    config = cls()
    with pytest.raises(FrozenInstanceError):
        setattr(config, fields(cls)[0].name, None)
    assert cls() == config and hash(cls()) == hash(config)


@pytest.mark.parametrize("name", SPARSITY_PRESETS)
def test_every_preset_has_one_sparse_operand_a_product(name):
    config = SPARSITY_PRESETS[name]
    products = config.products()
    assert len(products) == 6
    for formula, operand, kind in products:
        assert operand == "-" if kind == "dense" else operand in formula.split()
        assert kind in ("dense", "2:4", "venom", "sampled")
    assert config.any == any(kind != "dense" for _, _, kind in products)


def test_products_of_algorithms_1_and_2():
    assert SPARSITY_PRESETS["recipe"].products() == [
        ("y1 = x W1", "W1", "2:4"),
        ("y3 = y2 W2", "y2", "venom"),
        ("dy2 = dy3 W2^T", "W2^T", "2:4"),
        ("dW2 = y2^T dy3", "y2^T", "venom"),
        ("dx = dy1 W1^T", "dy1", "venom"),
        ("dW1^T = dy1^T x", "dy1^T", "venom"),
    ]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("dense", "dense dense dense dense dense dense"),
        ("w1", "2:4 dense dense dense dense dense"),
        ("w1+w1t", "2:4 dense dense dense 2:4 dense"),
        ("w2", "dense 2:4 dense dense dense dense"),
        ("w2+w2t", "dense 2:4 2:4 dense dense dense"),
        ("w1+w2", "2:4 2:4 dense dense dense dense"),
        ("w1+w2+t", "2:4 2:4 2:4 dense 2:4 dense"),
        ("act24", "dense 2:4 dense dense 2:4 dense"),
        ("act24+wgrad", "dense 2:4 dense 2:4 2:4 2:4"),
        ("active16", "dense venom sampled venom venom venom"),
        ("recipe64", "2:4 venom 2:4 venom venom venom"),
        ("venom16", "sampled venom sampled venom venom venom"),
    ],
)
def test_formats_of_the_six_products(name, kinds):
    assert [kind for _, _, kind in SPARSITY_PRESETS[name].products()] == kinds.split()


def test_what_the_products_read_under_each_reading():
    assert SparsityConfig().backward == "same"
    for name in ("w1", "w2", "w1+w2", "recipe"):
        assert SPARSITY_PRESETS[name].backward == "whole", "as algorithms 1 and 2 print it"
        assert SPARSITY_PRESETS[f"{name}, same"] == replace(SPARSITY_PRESETS[name], backward="same")
    same = SPARSITY_PRESETS["recipe, same"]
    assert [formula for formula, _, _ in same.products()] == [
        "y1 = x W1", "y3 = y2 S24(W2^T)^T", "dy2 = dy3 W2^T", "dW2 = y2^T dy3", "dx = dy1 S24(W1)^T",
        "dW1^T = dy1^T x",
    ]  # fmt: skip
    kinds = [[row[1:] for row in config.products()] for config in (same, SPARSITY_PRESETS["recipe"])]
    assert kinds[0] == kinds[1], "no product has another format"
    assert SparsityConfig(w2=True, backward="same").products()[2] == ("dy2 = dy3 S24(W2)^T", "-", "dense")
    assert SparsityConfig(w1_t=True, backward="same").products()[0] == ("y1 = x S24(W1^T)^T", "-", "dense")
    own = SparsityConfig(w1=True, w1_t=True, backward="same")
    assert own.products() == replace(own, backward="whole").products(), "a flag keeps its own pattern"
    refuses("choose one of same, whole", SparsityConfig, backward="mine")


@pytest.mark.parametrize("name", ["dense", "w1+w1t", "w1+w2+t", "act24", "venom16"])
def test_the_reading_does_not_matter_where_no_weight_is_read_twice_unlike(name):
    config = train_preset("smoke", name)
    whole, same = (
        with_changes(config, {"model.sparsity.backward": reading}) for reading in ("whole", "same")
    )
    assert not config.model.sparsity.reading_matters
    assert config_hash(whole) == config_hash(same) and same_formats(whole.model.sparsity, same.model.sparsity)
    data = to_dict(whole)
    del data["model"]["sparsity"]["backward"]
    assert from_dict(data) == same


def test_the_reading_enters_the_hash_only_if_it_is_not_the_recorded_one():
    config = train_preset("smoke", "recipe")
    data = to_dict(config)
    del data["model"]["sparsity"]["backward"]  # as older records have it
    assert from_dict(data) == config and config_hash(from_dict(data)) == config_hash(config)
    same = with_changes(config, {"model.sparsity.backward": "same"})
    assert config_hash(same) != config_hash(config)
    assert config.model.sparsity.backward == "whole", "hashing changes nothing"


@pytest.mark.parametrize(("top_k", "m"), [(4, 16), (2, 32), (1, 64)])
def test_m_of_16_clusters(top_k, m):
    assert SparsityConfig(activation="venom", top_k=top_k).m == m


def test_presets_of_table_1():
    one, seven = MODEL_PRESETS["llama1b"], MODEL_PRESETS["llama7b"]
    shape = ("n_layer", "d_model", "d_ff", "n_head", "seq_len")
    assert [getattr(one, f) for f in shape] == [22, 2048, 8192, 16, 8192]
    assert [getattr(seven, f) for f in shape] == [32, 4096, 16384, 32, 8192]
    assert (TRAIN_PRESETS["llama1b"].lr, TRAIN_PRESETS["llama7b"].lr) == (3e-4, 4e-4)
    for name in ("llama1b", "llama7b"):
        t = TRAIN_PRESETS[name]
        assert (t.batch_size, t.dense_warmup, t.corpus, t.order) == (2, 1000, "dclm", "sparse-dense")
    assert (TRAIN_PRESETS["llama1b"].steps, TRAIN_PRESETS["llama1b"].sparse_share) == (60000, 0.5)
    assert (TRAIN_PRESETS["llama7b"].steps, TRAIN_PRESETS["llama7b"].sparse_share) == (48000, 10 / 48)


@pytest.mark.parametrize("name", TRAIN_PRESETS)
def test_every_training_preset_takes_every_sparsity(name):
    for sparsity in SPARSITY_PRESETS:
        config = train_preset(name, sparsity)
        assert config.model.sparsity == SPARSITY_PRESETS[sparsity]
        assert replace(config, model=TRAIN_PRESETS[name].model) == TRAIN_PRESETS[name]


def test_train_preset_arguments():
    config = train_preset("smoke", SparsityConfig(w1=True), steps=50, **{"model.d_ff": 512})
    assert (config.steps, config.model.d_ff, config.model.sparsity.w1) == (50, 512, True)
    refuses("unknown training preset 'smok'.*smoke", train_preset, "smok")
    refuses("unknown sparsity preset 'recipee'.*recipe", train_preset, "smoke", "recipee")
    refuses("'stepz'; did you mean 'steps'", train_preset, "smoke", stepz=3)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"weight_method": "softt"}, "weight_method is 'softt'; choose one of soft, hard"),
        ({"weight_method": "hard", "weight_scale": True}, "set weight_scale=False or weight_method='soft'"),
        ({"activation": "48"}, "activation is '48'"),
        ({"selection": "best"}, "selection is 'best'"),
        ({"wgrad": "sparse"}, "wgrad is 'sparse'"),
        ({"routing": "expert"}, "routing is 'expert'"),
        ({"metric": "l1"}, "metric is 'l1'"),
        ({"n_clusters": 0}, "n_clusters is 0"),
        ({"v": 0}, "v is 0"),
        ({"refresh_every": -1}, "refresh_every is -1"),
        ({"top_k": 0}, "top_k is 0.*1 to n_clusters = 16"),
        ({"top_k": 17}, "top_k is 17.*1 to n_clusters = 16"),
        ({"wgrad_dense_share": 1.01}, "wgrad_dense_share is 1.01"),
        ({"wgrad_dense_share": math.nan}, "wgrad_dense_share is nan"),
        # two sparse operands of one product
        ({"activation": "24", "w2": True}, "one sparse operand"),
        ({"activation": "24", "w1_t": True}, "one sparse operand"),
        ({"activation": "venom", "w2": True}, "one sparse operand"),
        ({"activation": "venom", "w1_t": True}, "one sparse operand"),
        # what was never computed cannot be ranked
        ({"activation": "venom", "inner": False, "selection": "learned"}, "inner=False"),
        ({"activation": "venom", "routing": "oracle-block", "selection": "soft"}, "selection='magnitude'"),
        ({"activation": "venom", "routing": "oracle-block", "top_k": 3}, "try 1"),
        ({"activation": "venom", "routing": "oracle-block", "top_k": 12}, "try 4"),
        ({"selection": "tile"}, "needs activation='24'"),
        ({"activation": "venom", "selection": "tile"}, "needs activation='24'"),
        ({"activation": "24", "selection": "tile", "wgrad": "tile"}, "needs wgrad='dense'"),
        ({"activation": "24", "selection": "tile", "mask_reuse": False}, "needs mask_reuse=True"),
        # wrong types
        ({"w1": 1}, "w1 of SparsityConfig is 1; it must be of type bool"),
        ({"w1": "true"}, "type bool"),
        ({"top_k": 2.0}, "top_k of SparsityConfig is 2.0; it must be of type int"),
        ({"top_k": True}, "type int"),
        ({"metric": None}, "type str"),
    ],
)
def test_impossible_sparsity(changes, pattern):
    refuses(pattern, SparsityConfig, **changes)


@pytest.mark.parametrize("name", ["w1", "w2+w2t", "act24", "recipe", "block16", "act24+wgrad"])
@pytest.mark.parametrize(("d_model", "d_ff"), [(96, 387), (98, 384), (97, 386), (96, 3), (2, 384)])
def test_impossible_shapes_suggest_one_that_works(name, d_model, d_ff):
    config, shape = SPARSITY_PRESETS[name], {"d_model": d_model, "d_ff": d_ff}
    SPARSITY_PRESETS["dense"].check_shape(**shape)
    while True:  # each step mends the one it names
        try:
            config.check_shape(**shape)
        except ValueError as error:
            which = str(error).split()[0]
            assert suggestion(str(error)) != shape[which]
            shape[which] = suggestion(str(error))
        else:
            break
    assert shape != {"d_model": d_model, "d_ff": d_ff}


@given(n=st.integers(1, 20), k=st.integers(1, 20), d_ff=st.integers(1, 600), block=st.booleans())
@few
def test_suggested_d_ff_always_works(n, k, d_ff, block):
    routing = "oracle-block" if block and 4 * n % min(k, n) == 0 else "token"
    config = SparsityConfig(activation="venom", n_clusters=n, top_k=min(k, n), routing=routing)
    for _ in range(2):  # the multiple of four first, then the clusters
        try:
            config.check_shape(32, d_ff)
        except ValueError as error:
            d_ff = suggestion(str(error))
    config.check_shape(32, d_ff)
    assert d_ff % (4 * n) == 0


SIZES = ((0, 8, "d_model is 0"), (-4, 8, "d_model is -4"), (8, 0, "d_ff is 0"), (8, -8, "d_ff is -8"))


@pytest.mark.parametrize(("d_model", "d_ff", "pattern"), SIZES)
@pytest.mark.parametrize("name", ["dense", "act24", "venom16"])
def test_a_layer_has_a_size(name, d_model, d_ff, pattern):
    refuses(f"{pattern}; choose 1 or more", SPARSITY_PRESETS[name].check_shape, d_model, d_ff)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"d_ff": -4}, "d_ff is -4"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_kv_head": 2}, "multiple of n_kv_head 2"),
        ({"n_kv_head": -1}, "n_kv_head is -1"),
        ({"n_kv_head": 6}, "n_kv_head 6"),
        ({"d_model": 100}, "try d_model = 102"),
        ({"d_model": 3}, "try d_model = 6"),
        ({"rope_theta": 0.0}, "rope_theta is 0"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"activation": "relu"}, "relu2, gelu, swiglu"),
        ({"activation": "gelu", "sparsity": SPARSITY_PRESETS["w1"]}, "activation='relu2', not 'gelu'"),
        ({"d_ff": 390, "sparsity": SPARSITY_PRESETS["act24"]}, "d_ff is 390"),
        ({"d_ff": 400, "sparsity": SPARSITY_PRESETS["recipe"]}, "try 384"),
        ({"sparsity": "recipe"}, "type SparsityConfig"),
        ({"d_model": 96.5}, "type int"),
    ],
)
def test_impossible_models(changes, pattern):
    refuses(pattern, ModelConfig, **changes)


def test_kv_heads():
    assert ModelConfig().kv_heads == 3
    assert ModelConfig(n_kv_head=1).kv_heads == 1


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        *(({name: 0}, f"{name} is 0") for name in ("steps", "batch_size", "grad_accum", "interleave")),
        *(({name: 0}, f"{name} is 0") for name in ("eval_batches", "final_window", "log_every")),
        *(({name: -1}, f"{name} is -1") for name in ("lr_warmup", "dense_warmup", "stats_every")),
        *(({name: -1}, f"{name} is -1") for name in ("eval_every", "checkpoint_every", "weight_decay")),
        *(({name: math.inf}, f"{name} is inf") for name in ("clip", "weight_decay", "lr", "beta1")),
        *(
            ({name: math.nan}, f"{name} is nan")
            for name in ("lr", "clip", "weight_decay", "min_lr_share", "sparse_share", "beta2")
        ),
        ({"lr": 0.0}, "lr is 0.*3e-4"),
        ({"lr": -1e-3}, "lr is -0.001"),
        ({"lr": 30.0}, "lr is 30"),
        ({"min_lr_share": 1.1}, "min_lr_share is 1.1"),
        ({"seed": -1}, "seed is -1; choose 0 to 9223372036854775807"),
        ({"seed": 2**63}, "seed is 9223372036854775808; choose 0 to 9223372036854775807"),
        ({"sparse_share": -0.1}, "sparse_share is -0.1"),
        ({"beta1": 1.0}, "beta1 is 1"),
        ({"clip": -1.0}, "clip is -1"),
        ({"order": "dense"}, "sparse-dense, dense-sparse, interleaved"),
        ({"dtype": "fp16"}, "dtype is 'fp16'"),
        ({"residual": "float16"}, "residual is 'float16'; choose one of float32, bfloat16"),
        (
            {"residual": "bfloat16", "dtype": "float32"},
            "dtype 'float32'; set dtype='bfloat16' or residual='float",
        ),
        (
            {"residual": "bfloat16", "dtype": "float64"},
            "dtype 'float64'; set dtype='bfloat16' or residual='float",
        ),
        ({"attention": "xformers"}, "attention is 'xformers'; choose one of auto, torch, flash, cudnn"),
        ({"lr_warmup": 241}, "lr_warmup is 241, longer than steps = 240"),
        ({"steps": "240"}, "steps of TrainConfig is '240'; it must be of type int"),
        ({"steps": 240.0}, "type int"),
        ({"lr": "3e-3"}, "type float"),
        ({"compile": 1}, "type bool"),
        ({"model": {}}, "type ModelConfig"),
    ],
)
def test_impossible_runs(changes, pattern):
    refuses(pattern, TrainConfig, **changes)


def test_block_larger_than_the_batch_is_refused():
    model = replace(ModelConfig(), seq_len=16, sparsity=SPARSITY_PRESETS["block16"])
    TrainConfig(model=model, batch_size=4)
    refuses("v is 64; .*48 tokens", TrainConfig, model=model, batch_size=3)
    refuses("v is 64; .*80 tokens", TrainConfig, model=model, batch_size=5)
    model = replace(model, seq_len=15, sparsity=SPARSITY_PRESETS["act24+wgrad"])
    refuses("45 tokens; .* multiple of 4", TrainConfig, model=model, batch_size=3)
    TrainConfig(model=model, batch_size=4)


def test_tokens_per_step():
    assert TrainConfig(batch_size=3, grad_accum=5).tokens_per_step == 3 * 5 * 128


def test_with_changes_reads_text_as_the_type_of_the_field():
    text = {
        "steps": "50",
        "lr_warmup": "7",
        "lr": "1e-3",
        "compile": "yes",
        "corpus": "synthetic",
        "model.d_ff": "512",
        "model.tie_embeddings": "False",
        "model.sparsity.w1": "TRUE",
        "model.sparsity.activation": "24",
    }
    config = with_changes(TrainConfig(), text)
    assert (config.steps, config.lr, config.compile, config.corpus) == (50, 1e-3, True, "synthetic")
    assert (config.model.d_ff, config.model.tie_embeddings) == (512, False)
    assert (config.model.sparsity.w1, config.model.sparsity.activation) == (True, "24")
    assert TrainConfig() == TrainConfig(), "the original is untouched"
    assert with_changes(TrainConfig(), {}) == TrainConfig()


def test_with_changes_applies_changes_that_only_fit_together_at_once():
    config = with_changes(TrainConfig(), {"model.sparsity.top_k": 24, "model.sparsity.n_clusters": 32})
    assert (config.model.sparsity.top_k, config.model.sparsity.n_clusters) == (24, 32)
    recipe = train_preset("smoke", "recipe")
    changed = with_changes(recipe, {"model.sparsity.n_clusters": 20, "model.d_ff": 400})
    assert changed.model.d_ff == 400
    whole = with_changes(recipe, {"model": ModelConfig(d_ff=256), "model.seq_len": 64})
    assert (whole.model.d_ff, whole.model.seq_len) == (256, 64)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"stepz": 1}, "TrainConfig has no setting 'stepz'; did you mean 'steps'"),
        ({"model.d_modle": 1}, "ModelConfig has no setting 'd_modle'; did you mean 'd_model'"),
        ({"model.sparsity.topk": 1}, "SparsityConfig has no setting 'topk'; did you mean 'top_k'"),
        ({"zzz": 1}, "no setting 'zzz'; known: model, corpus"),
        ({"": 1}, "no setting ''"),
        ({"steps.x": 1}, r"steps of TrainConfig has no parts.*steps\.x"),
        ({"steps": "many"}, "steps='many' is no int"),
        ({"steps": "1.5"}, "steps='1.5' is no int"),
        ({"steps": 1.5}, "type int"),
        ({"lr": "fast"}, "lr='fast' is no float"),
        ({"lr": "nan"}, "lr is nan"),
        ({"compile": "maybe"}, "compile='maybe' is no bool"),
        ({"model": "llama"}, "model cannot be set from text"),
        ({"model": 3}, "type ModelConfig"),
        ({"model.sparsity": "recipe"}, "cannot be set from text"),
        ({"model.sparsity": None}, "type SparsityConfig"),
    ],
)
def test_with_changes_refuses(changes, pattern):
    refuses(pattern, with_changes, TrainConfig(), changes)


@pytest.mark.parametrize("name", TRAIN_PRESETS)
@pytest.mark.parametrize("sparsity", ["dense", "recipe", "act24+wgrad"])
def test_round_trip_through_json(name, sparsity):
    config = train_preset(name, sparsity)
    text = json.dumps(to_dict(config))
    assert from_dict(json.loads(text)) == config
    assert config_hash(from_dict(json.loads(text))) == config_hash(config)


def test_from_dict_leaves_its_argument_and_refuses_unknown_keys():
    data = to_dict(train_preset("smoke", "recipe"))
    before = json.dumps(data)
    from_dict(data)
    assert json.dumps(data) == before
    assert from_dict({}) == TrainConfig()
    assert from_dict({"model": {"d_ff": 512}}).model == ModelConfig(d_ff=512)
    refuses("did you mean 'seed'", from_dict, {"sead": 1})
    refuses("ModelConfig.*did you mean 'd_ff'", from_dict, {"model": {"dff": 1}})
    refuses("SparsityConfig.*'w1'", from_dict, {"model": {"sparsity": {"w11": True}}})
    refuses("type int", from_dict, {"model": {"d_ff": "512"}})


def test_folding_is_for_one_switch():
    assert TrainConfig(fold=True).fold
    refuses("order='sparse-dense'", TrainConfig, fold=True, order="interleaved")


def test_hash_sees_what_and_not_how():
    base = TrainConfig()
    how = {"device": "cpu", "backend": "reference", "compile": True, "cuda_graph": "off", "log_every": 3}
    how |= {"checkpoint_every": 5, "deterministic": True, "attention": "flash", "parallel": "fsdp"}
    assert config_hash(replace(base, **how)) == config_hash(base)
    assert set(NOT_HASHED) == set(how)
    changes = {
        "corpus": "synthetic",
        "order": "dense-sparse",
        "dtype": "float64",
        "lr": 1e-3,
        "model.sparsity.metric": "l2",
        "model.rope_theta": 5e5,
        "model.tie_embeddings": False,
    }
    numbers = (f.name for f in fields(TrainConfig) if f.type == "int" and f.name not in NOT_HASHED)
    changes |= {name: getattr(base, name) + 1 for name in numbers}
    hashes = {config_hash(with_changes(base, {name: value})) for name, value in changes.items()}
    assert len(hashes | {config_hash(base)}) == len(changes) + 1
    assert all(re.fullmatch("[0-9a-f]{16}", h) for h in hashes)


def test_a_head_of_odd_width_has_no_pairs_to_rotate():
    with pytest.raises(ValueError, match="d_model 6 over n_head 2 must be an even whole number"):
        ModelConfig(d_model=6, n_head=2)
    assert ModelConfig(d_model=8, n_head=2).kv_heads == 2


def test_compilation_is_asked_for():
    assert not TrainConfig().compile


def test_hash_of_known_configs_does_not_drift():
    """Recorded results are found by hash: a changed hash orphans them."""
    assert config_hash(TrainConfig()) == "b990a20124f3ca47", "every default"
    assert config_hash(train_preset("study10m")) == "8614b1afe0b78e4c"
    assert config_hash(train_preset("study10m", "recipe")) == "d4657c24ae2bfc2e"
    assert all(getattr(TrainConfig(), name) == value for name, value in YOUNGER.items())
    assert config_hash(TrainConfig(fold=True)) != config_hash(TrainConfig())
    assert config_hash(TrainConfig(residual="bfloat16")) != config_hash(TrainConfig())
    assert config_hash({"b": [1, 2.5, None], "a": {"y": "x", "x": True}}) == "2ed3ba076b85164b"
    assert config_hash({"a": {"x": True, "y": "x"}, "b": [1, 2.5, None]}) == "2ed3ba076b85164b"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"clip": 1}, {"clip": 1.0}),
        ({"weight_decay": 0}, {"weight_decay": 0.0}),
        ({"sparse_share": 1}, {"sparse_share": "1"}),
        ({"steps": np.int64(100)}, {"steps": 100}),
        ({"lr": np.float32(0.5)}, {"lr": 0.5}),
        ({"model.rope_theta": 500000}, {"model.rope_theta": 5e5}),
        ({"model.sparsity.wgrad_dense_share": 0}, {"model.sparsity.wgrad_dense_share": 0.0}),
    ],
)
def test_equal_configs_hash_alike_however_they_were_written(one, other):
    a, b = with_changes(TrainConfig(), one), with_changes(TrainConfig(), other)
    assert a == b and config_hash(a) == config_hash(b)


def test_hash_refuses_what_json_cannot_say():
    with pytest.raises(ValueError, match="JSON"):
        config_hash({"x": math.nan})
