"""Corpora: which files, held out how, pinned by what."""

import os
import platform
import site
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate.text import corpora
from replicate.text.corpora import Document, load_corpus


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus("stdlib")


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def many(n, folder=""):
    return {f"{folder}f{i}.py": b"x = %d\n" % i for i in range(n)}


def names(corpus, split):
    return [document.name for document in corpus.files[split]]


def test_stdlib_is_capped_split_by_file_and_without_tests(stdlib):
    sizes = {split: sum(d.size for d in stdlib.files[split]) for split in stdlib.files}
    assert 4e6 < sizes["train"] <= 8e6 and 1e5 < sizes["valid"] <= 5e5 and stdlib.bytes == sum(sizes.values())
    train, valid = names(stdlib, "train"), names(stdlib, "valid")
    assert not set(train) & set(valid) and 10 < len(train) / len(valid) < 40
    known = {"argparse.py", "ast.py", "dataclasses.py", "json/decoder.py", "random.py", "textwrap.py"}
    assert len(known.intersection(train + valid)) > 3
    folders = {folder for name in train + valid for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "site-packages", "encodings"}
    assert train == sorted(train)


def test_stdlib_is_the_same_every_time(stdlib):
    assert load_corpus("stdlib") == stdlib


def test_documents_are_pinned_by_name_split_and_content(tmp_path):
    root = tree(tmp_path, many(200))
    first = load_corpus(f"file:{root}")
    assert first.files["train"] and first.files["valid"]
    (root / "f7.py").write_bytes(b"x = -7\n")
    changed = load_corpus(f"file:{root}")
    assert changed.sha256 != first.sha256
    (root / "f7.py").write_bytes(b"x = 7\n")
    assert load_corpus(f"file:{root}") == first
    (root / "f7.py").rename(root / "g7.py")
    assert load_corpus(f"file:{root}").sha256 != first.sha256


def test_a_file_that_comes_or_goes_moves_no_other(tmp_path):
    few, more = (load_corpus(f"file:{tree(tmp_path / str(n), many(n))}") for n in (200, 300))
    assert set(names(few, "valid")) <= set(names(more, "valid"))
    assert set(names(few, "train")) <= set(names(more, "train"))


def fake_stdlib(root, monkeypatch, more=()):
    tree(root, {"os.py": b"import sys\n", **many(60), **dict(more)})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    return root


def test_stdlib_takes_bytes_as_they_are_and_leaves_out_what_it_cannot_read(tmp_path, monkeypatch):
    latin = b"# -*- coding: latin-1 -*-\nname = '\xe9\xff'\r\n"
    files = {"latin.py": latin, "empty.py": b"", "copy.py": latin, "test/t.py": b"1\n", "notes.txt": b"no\n",
             "config-3/c.py": b"2\n", "_sysconfigdata_x.py": b"3\n"}  # fmt: skip
    root = fake_stdlib(tmp_path, monkeypatch, files)
    if os.name != "nt":
        (root / "broken.py").symlink_to(root / "nowhere.py")
    corpus = load_corpus("stdlib")
    found = {d.name: d.read() for split in corpus.files for d in corpus.files[split]}
    assert set(found) == {"os.py", "copy.py", *many(60)}  # copy.py comes first of the two equal files
    assert found["copy.py"] == latin
    assert corpus.skipped == (("broken.py",) if os.name != "nt" else ())


def test_stdlib_cap_takes_a_stable_sample(tmp_path, monkeypatch):
    fake_stdlib(tmp_path, monkeypatch)
    everything = load_corpus("stdlib")
    monkeypatch.setattr(corpora, "STDLIB_BYTES", {"train": 100, "valid": 100})
    capped = load_corpus("stdlib")
    assert 80 < sum(d.size for d in capped.files["train"]) <= 100
    assert set(names(capped, "train")) < set(names(everything, "train"))


def test_an_interpreter_without_sources_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for spec in ("stdlib", "pysrc"):
        with pytest.raises(corpora.CorpusUnavailable, match=r"no library sources .* use corpus 'file:PATH'"):
            load_corpus(spec)


def test_pysrc_has_every_source_of_library_and_packages(tmp_path, monkeypatch):
    root = fake_stdlib(tmp_path / "lib", monkeypatch, {"test/t.py": b"t\n", "site-packages/no.py": b"no\n"})
    one = tree(tmp_path / "one", {**many(400, "pkg/"), "pkg/data.json": b"{}"})
    two = tree(tmp_path / "two", {"pkg/f0.py": b"shadowed\n", "other/o.py": b"o\n"})
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(one), str(two), str(tmp_path / "missing")])
    corpus = load_corpus("pysrc")
    found = {*names(corpus, "train"), *names(corpus, "valid")}
    assert {
        "stdlib/os.py",
        "stdlib/test/t.py",
        "site-packages/other/o.py",
        "site-packages/pkg/f399.py",
    } <= found
    assert "site-packages/no.py" not in found and not any("json" in name for name in found)
    # pkg/f0.py of `one` equals the library's f0.py, and the one of `two` is behind it
    assert len(found) == 61 + 1 + 340 + 1
    assert root.exists()


def test_pysrc_names_the_packages_and_their_licences(tmp_path, monkeypatch):
    def package(name, *lines):
        text = "\n".join([f"Name: {name}", "Version: 1.2", *lines, ""])
        return {f"{name}-1.2.dist-info/METADATA": text.encode()}

    fake_stdlib(tmp_path / "lib", monkeypatch)
    spdx = package(
        "spdx", "License-Expression: MIT", "License: old words", "Classifier: License :: OSI :: No"
    )
    kinds = package("Kinds", "Classifier: License :: OSI :: BSD License", "Classifier: License :: Other")
    files = {**spdx, **kinds, **package("words", "License: My own", "        and more"), **package("bare")}
    one = tree(
        tmp_path / "one",
        {**files, **many(400, "spdx/"), "spdx/code.py": b"c\n", "broken-3.dist-info/RECORD": b""},
    )
    two = tree(tmp_path / "two", {"spdx-9.dist-info/METADATA": b"Name: spdx\nVersion: 9\n"})
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(one), str(two)])
    corpus, python = load_corpus("pysrc"), f"Python {platform.python_version()} (PSF-2.0)"
    expected = ["bare 1.2 (not stated)", "Kinds 1.2 (BSD License and Other)", "spdx 1.2 (MIT)"]
    assert list(corpus.packages) == [python, *expected, "words 1.2 (My own)"]
    assert load_corpus("stdlib").packages == (python,)
    monkeypatch.setattr(corpora.metadata, "distributions", lambda path: [])
    assert load_corpus("pysrc").sha256 == corpus.sha256, "the packages' names are no part of the hash"
    tiny = tree(tmp_path / "own", {"a.txt": b"a\n" * 50})
    assert load_corpus(f"file:{tiny}").packages == ()


def test_a_file_is_cut_at_a_line_boundary(tmp_path):
    text = b"".join(b"line %d\n" % i for i in range(100))
    corpus = load_corpus(f"file:{tree(tmp_path, {'notes.txt': text}) / 'notes.txt'}")
    assert corpus.name == "file:notes.txt" and corpus.bytes == len(text)
    (train,), (valid,) = corpus.files["train"], corpus.files["valid"]
    assert train.read() + valid.read() == text and valid.read().startswith(b"line 9")
    assert train.name == valid.name == "notes.txt"


@settings(max_examples=40, deadline=None)
@given(
    data=st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\xff"]), min_size=2).map(b"".join),
    share=st.floats(0.01, 1),
)
def test_cut_parts_join_to_the_whole(tmp_path_factory, data, share):
    path = tmp_path_factory.getbasetemp() / "cut"
    path.write_bytes(data)
    at = max(1, int(share * len(data)))
    left, right = Document("cut", path, 0, len(data)).cut(at)
    assert left.read() + right.read() == data and 0 < left.size <= at
    if right.size > 1:
        a, b = right.cut(1)
        assert a.read() + b.read() == right.read()


def test_a_folder_with_its_own_split_keeps_it(tmp_path):
    root = tree(tmp_path, {"train.txt": b"a\n", "valid.txt": b"b\n", "README.md": b"c\n"})
    corpus = load_corpus(f"file:{root}")
    assert names(corpus, "train") == ["train.txt"] and names(corpus, "valid") == ["valid.txt"]


def test_a_folder_with_few_files_cuts_each(tmp_path):
    lines = {name: b"".join(b"%s %d\n" % (name.encode(), i) for i in range(50)) for name in ("a", "b/c")}
    corpus = load_corpus(f"file:{tree(tmp_path, lines)}")
    assert names(corpus, "train") == names(corpus, "valid") == ["a", "b/c"]
    assert corpus.files["train"][0].read() + corpus.files["valid"][0].read() == lines["a"]


def test_a_folder_leaves_out_hidden_and_binary_files(tmp_path):
    root = tree(tmp_path, {**many(100), ".git/config": b"1\n", ".env": b"2\n", "x.png": b"PNG\0"})
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "pipe")
    corpus = load_corpus(f"file:{root}")
    assert {*names(corpus, "train"), *names(corpus, "valid")} == {*many(100)}


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_to_folders_are_followed_once_and_in_no_circle(tmp_path):
    real = tree(tmp_path / "real", {**many(100), "deep/g.py": b"g\n"})
    root = tree(tmp_path / "root", {"own.py": b"own\n"})
    (root / "one").symlink_to(real)
    (root / "two").symlink_to(real)
    (real / "back").symlink_to(root)
    (real / "deep" / "up").symlink_to(real / "deep")
    corpus = load_corpus(f"file:{root}")
    found = [*names(corpus, "train"), *names(corpus, "valid")]
    assert sorted(found) == sorted(["own.py", "one/deep/g.py", *many(100, "one/")])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_another_encoding_is_refused(tmp_path, encoding):
    text = "\ufeff" if encoding.endswith("e") else ""
    data = f"{text}漢字かな交じり文\n".encode(encoding) * 9
    file = tree(tmp_path, {**many(100), "notes.txt": data}) / "notes.txt"
    for spec in (file, tmp_path):
        with pytest.raises(ValueError, match=r"notes.txt is text in UTF-16 or UTF-32; convert it .*iconv"):
            load_corpus(f"file:{spec}")


def test_a_file_with_nul_bytes_is_refused_and_a_binary_one_in_a_folder_is_left_out(tmp_path):
    root = tree(tmp_path, {**many(100), "x.bin": b"\xff\0\xd8", "y.txt": "no mark\n".encode("utf-16-le")})
    for name in ("x.bin", "y.txt"):
        with pytest.raises(
            ValueError, match=f"{name} has NUL bytes: no text, or in UTF-16; convert it to UTF-8"
        ):
            load_corpus(f"file:{root / name}")
    corpus = load_corpus(f"file:{root}")
    assert {*names(corpus, "train"), *names(corpus, "valid")} == {*many(100)}


def test_a_home_that_is_not_known_is_a_sentence():
    with pytest.raises(
        ValueError, match="no home folder is known for '~nobody-here/x'; write the path in full"
    ):
        load_corpus("file:~nobody-here/x")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stdlibs", "unknown corpus 'stdlibs'; did you mean 'stdlib'"),
        ("wikipedia", "unknown corpus 'wikipedia'; known: stdlib, pysrc, file:PATH"),
        ("stdlib:5MB", "unknown corpus 'stdlib:5MB'"),
        ("", "unknown corpus ''"),
        ("file", "needs a path"),
        ("file:", "needs a path"),
        ("file:no/such", "no file or folder 'no.{1,2}such'"),
        ("dclm:lots", "'lots' is no number of bytes"),
    ],
)
def test_bad_specs_say_what_would_work(spec, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(spec)


def test_too_little_text_is_refused(tmp_path):
    for name, data in {"empty": b"", "one": b"x"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"corpus 'file:{name}' has no train text"):
            load_corpus(f"file:{tmp_path / name}")


def test_synthetic_has_no_files():
    corpus = load_corpus("synthetic")
    assert corpus.name == "synthetic" and corpus.bytes == 2_100_000 and not corpus.files["train"]
