"""Downloads against local stand-ins: checks, resumed folders, and what is said off-line."""

import hashlib
import sys
from types import SimpleNamespace

import pytest

from replicate.data import TokenData
from replicate.text import downloads
from replicate.text.corpora import load_corpus
from replicate.text.downloads import CorpusUnavailable

PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 200


@pytest.fixture
def play(tmp_path, monkeypatch):
    """The real download code on a file: address with a small stand-in for the text."""
    source = tmp_path / "upstream.txt"
    source.write_bytes(PLAY)
    monkeypatch.setattr(downloads, "SHAKESPEARE_URL", source.as_uri())
    monkeypatch.setattr(downloads, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
    return source


def test_shakespeare_is_fetched_once_checked_and_cut_at_a_line(play, tmp_path):
    cache = tmp_path / "cache"
    corpus = load_corpus("shakespeare", cache_dir=cache)
    play.unlink()
    assert load_corpus("shakespeare", cache_dir=cache) == corpus
    (train,), (valid,) = corpus.files["train"], corpus.files["valid"]
    assert train.read() + valid.read() == PLAY
    assert train.read().endswith(b"\n") and 0.9 < train.size / len(PLAY) <= 0.95
    assert [file.name for file in cache.iterdir()] == ["tinyshakespeare.txt"]


def test_a_damaged_shakespeare_is_fetched_again(play, tmp_path):
    file = downloads.shakespeare(tmp_path)
    file.write_bytes(PLAY[:-1])
    assert downloads.shakespeare(tmp_path).read_bytes() == PLAY


def test_another_text_than_the_known_one_is_refused(play, tmp_path):
    play.write_bytes(PLAY + b"?")
    with pytest.raises(CorpusUnavailable, match=rf"gave {len(PLAY) + 1} bytes .* try again, or use"):
        downloads.shakespeare(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_offline_points_to_file(play, tmp_path):
    play.unlink()
    with pytest.raises(CorpusUnavailable, match=r"could not be downloaded .*file:PATH"):
        load_corpus("shakespeare", cache_dir=tmp_path / "cache")


@pytest.fixture
def web(monkeypatch):
    """Stands in for the package `datasets`: rows with a text, counting what is read."""
    web = SimpleNamespace(rows=4000, fail_at=None, read=0, arguments=None)

    def load_dataset(**arguments):
        assert arguments.pop("split") == "train" and arguments.pop("streaming") is True
        web.arguments = arguments
        for i in range(web.rows):
            if i == web.fail_at:
                raise ConnectionError("the line is dead")
            web.read += 1
            yield {"text": f"Page {i}: naïve\0 words about number {i * i}.\n" * 5, "url": "x"}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return web


@pytest.mark.parametrize("name", ["fineweb-edu", "dclm"])
def test_stream_stops_at_its_budget_and_holds_out_whole_documents(name, tmp_path, web):
    corpus = load_corpus(f"{name}:100kB", cache_dir=tmp_path)
    assert web.arguments == downloads.STREAMS[name] and web.read < 1000
    assert corpus.name == f"{name}:100kB"
    train, valid = (corpus.files[split][0].read() for split in ("train", "valid"))
    assert 100_000 <= len(train) < 100_500 and 300 < len(valid) < 6000
    pages = [set(text.split(b"\0")) - {b""} for text in (train, valid)]
    assert not pages[0] & pages[1] and len(pages[0] | pages[1]) == web.read
    assert all(page.startswith(b"Page ") and page.endswith(b".\n") for page in pages[1])
    data = TokenData(corpus, 512, 32, cache_dir=tmp_path)
    assert data.tokenizer.decode(data.valid[:-1]) == valid
    web.read = 0
    assert load_corpus(f"{name}:100kB", cache_dir=tmp_path) == corpus and web.read == 0


def test_a_damaged_stream_is_fetched_again(tmp_path, web):
    files = downloads.stream("dclm", "20kB", tmp_path)
    whole = files["train"].read_bytes()
    files["train"].write_bytes(whole[:-5] + b"?" * 5)
    assert downloads.stream("dclm", "20kB", tmp_path)["train"].read_bytes() == whole


def test_a_stream_that_breaks_leaves_nothing(tmp_path, web):
    web.fail_at = 300
    with pytest.raises(CorpusUnavailable, match=r"'dclm' could not be streamed \(ConnectionError: the line"):
        load_corpus("dclm:1MB", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stream_too_short_to_hold_out_is_refused(tmp_path, web):
    web.rows = 3
    with pytest.raises(CorpusUnavailable, match="ended before it filled both parts"):
        load_corpus("dclm", cache_dir=tmp_path)


def test_without_the_package_the_message_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusUnavailable, match=r"'fineweb-edu' needs .* pip install datasets"):
        load_corpus("fineweb-edu:1MB", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("500kB", 500_000), ("1.5gb", 1.5e9), ("2 MB", 2e6)]
)
def test_sizes(text, size):
    assert downloads.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "many", "0", "-5MB", "5TB", "../x"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="write it like '200MB'"):
        downloads.parse_bytes(text)
