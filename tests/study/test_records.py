import gzip
import json
import multiprocessing
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate import config
from replicate.settings import text as config_text
from replicate.study import records
from replicate.system import paths, provenance


def test_a_record_comes_back_as_it_went_in(store):
    ask = config.TrainConfig(steps=50)
    record = records.make_record(
        "train", ask, {"loss": [1.25, 0.1], "note": None}, seconds=2.5, corpus={"sha256": "ab"}
    )
    path = store.put(record)
    assert path.parent.name == "train"
    assert path.name == config_text.config_hash(ask) + ".json"
    found, origin = store.find("train", ask)
    assert (found, origin) == (record, "cached")
    assert found.seed == ask.seed
    assert config_text.from_dict(found.config) == ask


def test_provenance_names_device_versions_commit_and_date(store):
    record = records.make_record("bench", {"shape": [4, 4]}, {})
    assert record.device
    assert {"python", "torch", "numpy", "platform", "code"} <= set(record.versions)
    assert record.commit
    assert record.date.endswith("Z")
    assert record.seed is None


def test_the_code_of_a_result_is_what_makes_it_kernels_included(tmp_path):
    """Real files, in a copy: a cached run ends with a change to a kernel, not with one to a picture."""
    package = tmp_path / "replicate"
    shutil.copytree(paths.ROOT / "replicate", package, ignore=shutil.ignore_patterns("__pycache__"))
    before = provenance.fingerprint(package)
    assert before == provenance.code_fingerprint()

    def changes_it(name):
        path, text = package / name, (package / name).read_text()
        path.write_text(text + "\n# changed\n")
        now = provenance.fingerprint(package)
        path.write_text(text)
        return now != before

    kernels = [path.relative_to(package).as_posix() for path in (package / "kernels").rglob("*.py")]
    assert len(kernels) > 10 and all(map(changes_it, ("ffn.py", "train.py", "training/step.py", *kernels)))
    assert not any(map(changes_it, ("figures.py", "report/study_plots.py", "bench/step.py", "study/pool.py")))
    assert provenance.fingerprint(package) == before


def test_commit_can_be_stated_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("REPLICATE_COMMIT", "abc123")
    provenance.commit.cache_clear()
    assert provenance.commit() == "abc123"
    monkeypatch.delenv("REPLICATE_COMMIT")
    monkeypatch.setenv("PATH", "")
    provenance.commit.cache_clear()
    assert provenance.commit() == "unknown"
    provenance.commit.cache_clear()


def test_only_what_differs_in_substance_is_another_record(store):
    store.put(records.make_record("train", config.TrainConfig(), {}))
    assert store.find("train", config.TrainConfig(log_every=3))
    assert store.find("train", config.TrainConfig(seed=2)) is None
    assert store.find("bench", config.TrainConfig()) is None


def test_recorded_goes_before_cached(store):
    ask = {"n": 1}
    store.put(records.make_record("stat", ask, {"x": 1}))
    store.put(records.make_record("stat", ask, {"x": 2}), recorded=True)
    record, origin = store.find("stat", ask)
    assert (record.results["x"], origin) == (2, "recorded")
    assert [origin for _, origin in store.all("stat")] == ["recorded", "cached"]


def test_a_cached_record_of_another_corpus_or_other_code_does_not_count(store):
    ask = config.TrainConfig()
    record = records.make_record("train", ask, {}, corpus={"sha256": "old"})
    store.put(record)
    assert store.find("train", ask, "old")
    assert store.find("train", ask, "new") is None
    store.put(replace(record, versions={**record.versions, "code": "0" * 16}))
    assert store.find("train", ask, "old") is None
    store.put(replace(record, versions={}), recorded=True)
    assert store.find("train", ask, "new")[1] == "recorded"


@pytest.mark.parametrize("damage", ["alter", "truncate", "rename", "empty", "other"])
def test_a_damaged_file_is_noticed(store, damage):
    ask = {"a": 1}
    for recorded in (False, True):
        path = store.put(records.make_record("stat", ask, {"loss": 2.758}), recorded=recorded)
        text = path.read_text()
        if damage == "alter":
            path.write_text(text.replace("2.758", "2.758001"))
        elif damage == "truncate":
            path.write_text(text[: len(text) // 2])
        elif damage == "empty":
            path.write_text("")
        elif damage == "other":
            path.write_text("[1, 2]")
        else:
            store.put(records.make_record("stat", {"a": 2}, {}), recorded=recorded).replace(path)
        with pytest.raises(records.RecordDamaged, match=path.name):
            records.read_record(path)
        if recorded:
            with pytest.raises(records.RecordDamaged):
                store.find("stat", ask)
        else:
            with pytest.warns(UserWarning, match="measuring again"):
                assert store.find("stat", ask) is None


def test_line_endings_of_a_windows_checkout_do_no_damage(store):
    path = store.put(records.make_record("stat", {"a": 1}, {"x": 1}), recorded=True)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert store.find("stat", {"a": 1})[0].results == {"x": 1}


def test_large_records_are_compressed_and_replace_small_ones(store):
    ask = {"a": 1}
    small = store.put(records.make_record("stat", ask, {"x": [1.0]}))
    large = store.put(records.make_record("stat", ask, {"x": [float(i) for i in range(40_000)]}))
    assert large.name == small.name + ".gz"
    assert not small.exists()
    assert len(store.find("stat", ask)[0].results["x"]) == 40_000
    assert json.loads(gzip.decompress(large.read_bytes()))["kind"] == "stat"
    store.put(records.make_record("stat", ask, {"x": []}))
    assert store.find("stat", ask)[0].results == {"x": []}
    assert not large.exists()


@pytest.mark.parametrize(
    ("value", "place"), [(float("nan"), r"results\.a\[1\] is nan"), (object(), "object")]
)
def test_what_json_cannot_hold_is_refused_by_place(store, value, place):
    with pytest.raises(ValueError, match=place):
        store.put(records.make_record("stat", {"a": 1}, {"a": [0.0, value]}))
    assert not list(store.root.rglob("*.json*"))


def test_array_scalars_become_numbers(store):
    store.put(records.make_record("stat", {"a": 1}, {"x": np.float32(0.5), "y": (np.int64(3), np.ones(2))}))
    assert store.find("stat", {"a": 1})[0].results == {"x": 0.5, "y": [3, [1.0, 1.0]]}


@pytest.mark.parametrize("kind", ["", "../claim", "Train", "a/b"])
def test_a_kind_is_a_plain_name(store, kind):
    with pytest.raises(ValueError, match="record kind"):
        store.find(kind, {"a": 1})


scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)
values = st.recursive(
    scalars | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=6), values, max_size=4))
def test_any_json_survives_exactly(tmp_path_factory, results):
    base = tmp_path_factory.mktemp("any")
    store = records.RecordStore(root=base, recorded=base / "none")
    store.put(records.make_record("stat", {"a": 1}, results))
    assert store.find("stat", {"a": 1})[0].results == results


def _write_many(root, number):
    store = records.RecordStore(root=root, recorded=root / "none")
    for _ in range(15):
        store.put(records.make_record("stat", {"a": 1}, {"x": [number] * 500}))


def test_two_writers_never_show_a_reader_half_a_record(tmp_path):
    _write_many(tmp_path, 0)
    (path,) = (tmp_path / "stat").iterdir()
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(tmp_path, i)) for i in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        seen = records.read_record(path).results["x"]
        assert len(set(seen)) == 1
        assert len(seen) == 500
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert not [p for p in (tmp_path / "stat").iterdir() if p.name.startswith(".")]


def test_the_latest_of_one_gpu_is_not_that_of_another(store):
    def put(device, date, sparsity):
        ask = {"shape": [4, 4], "sparsity": sparsity, "on": device}
        record = records.make_record("bench", ask, {})
        store.put(replace(record, device=device, date=date), recorded=True)

    put("A", "2026-01-01T00:00:00Z", ["recipe"])
    put("A", "2026-01-02T00:00:00Z", ["recipe", "act24"])
    put("B", "2026-01-03T00:00:00Z", ["recipe"])
    assert store.latest("bench").device == "B"
    assert store.latest("bench", device="A", timed=["recipe"]).date.startswith("2026-01-02")
    assert [r.device for r in store.widest_last("bench", device="A")] == ["A", "A"]
    with pytest.raises(ValueError, match="with act24, device B"):
        store.latest("bench", device="B", timed=["act24"])
