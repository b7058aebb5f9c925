"""The file of tokens: used again, noticed when damaged, whole or not there."""

import threading

import numpy as np
import pytest

from replicate.data import TokenData
from replicate.system import files
from replicate.text import token_cache
from replicate.text.tokenizer import Tokenizer

LINES = b"".join(b"def f%d(x):\n    return x + %d  # na\xc3\xafve \xff\n" % (i, i * i) for i in range(600))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "code.py"
    file.write_bytes(LINES)
    return f"file:{file}"


def test_a_name_as_long_as_names_can_be(tmp_path):
    file = tmp_path / ("漢" * 80 + ".txt")
    file.write_bytes(LINES)
    cached = TokenData(f"file:{file}", 300, 16, cache_dir=tmp_path / "cache")
    assert cached.corpus.name == f"file:{file.name}" and len(list((tmp_path / "cache").iterdir())) == 1


def test_cache_is_one_file_used_again(text, tmp_path, monkeypatch):
    first = TokenData(text, 300, 16, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name == f"file-code.py-{first.corpus.sha256[:16]}-300.bin"
    monkeypatch.setattr(token_cache, "_build", None)
    assert np.array_equal(TokenData(text, 300, 16, cache_dir=tmp_path).train, first.train)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-2], "wrong length"),
        (lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:], "does not match its checksum"),
        (lambda b: b"{" + b[2:], "no readable header"),
        (lambda b: b"", "no readable header"),
        (lambda b: b"[]" + b" " * 4094 + b[4096:], "no readable header"),
        (lambda b: b.replace(b'"vocab_size": 300', b'"vocab_size": 301'), "another corpus or vocabulary"),
    ],
)
def test_a_damaged_cache_is_noticed_and_built_again(text, tmp_path, damage, message):
    whole = TokenData(text, 300, 16, cache_dir=tmp_path).train.tolist()
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match=f"{message}; building it again"):
        again = TokenData(text, 300, 16, cache_dir=tmp_path)
    assert again.train.tolist() == whole and [f.name for f in tmp_path.iterdir()] == [file.name]


def test_an_interrupted_build_leaves_no_cache(text, tmp_path, monkeypatch):
    def stop(self, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        TokenData(text, 300, 16, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_builders_at_once_agree(text, tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(TokenData(text, 300, 16, cache_dir=tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({d.train.tobytes() for d in found}) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_blocks_do_not_change_the_bytes(text, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BLOCK_BYTES", 1000)
    small = TokenData(text, 300, 16, cache_dir=tmp_path)
    assert small.tokenizer.decode(small.train)[:-1] + small.tokenizer.decode(small.valid)[:-1] == LINES
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i}").write_bytes(b"file %d\n" % i * (i + 1))
    many = TokenData(f"file:{folder}", 300, 16, cache_dir=tmp_path)
    texts = [document.read() + b"\0" for document in many.corpus.files["train"]]
    assert many.tokenizer.decode(many.train) == b"".join(texts)


def test_a_file_that_windows_protects_stays(text, tmp_path, monkeypatch):
    whole = TokenData(text, 300, 16, cache_dir=tmp_path).train.tobytes()
    found = iter(["is missing", ""])  # looked for before another process has made it

    def refuse(*_):
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(token_cache, "_problem", lambda *_: next(found))
    monkeypatch.setattr(files, "_rename", refuse)
    with pytest.warns(UserWarning, match="is missing"):
        assert TokenData(text, 300, 16, cache_dir=tmp_path).train.tobytes() == whole
