"""The batches drawn from a corpus's tokens."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate import data
from replicate.data import TokenData
from replicate.text import tokenizer
from replicate.text.corpora import load_corpus

LINES = b"".join(b"def f%d(x):\n    return x + %d  # na\xc3\xafve \xff\n" % (i, i * i) for i in range(600))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "code.py"
    file.write_bytes(LINES)
    return f"file:{file}"


@pytest.fixture(scope="module")
def tokens(text, tmp_path_factory):
    return TokenData(text, 300, 16, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    return TokenData("synthetic", 64, 32, cache_dir=tmp_path_factory.mktemp("cache"))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_tokens_decode_to_the_corpus(tokens):
    assert isinstance(tokens.train, np.memmap) and tokens.train.dtype == np.uint16
    decoded = tokens.tokenizer.decode(tokens.train), tokens.tokenizer.decode(tokens.valid)
    assert decoded[0].endswith(b"\0") and decoded[1].endswith(b"\0")
    assert decoded[0][:-1] + decoded[1][:-1] == LINES
    with pytest.raises(ValueError, match="read-only"):
        tokens.train[0] = 1


def test_targets_are_one_token_ahead(tokens):
    inputs, targets = tokens.batch("train", 0, 4, seed=1)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    stream = tokens.train.tobytes()
    for row, last in zip(inputs.numpy(), targets[:, -1].numpy(), strict=True):
        assert np.append(row, last).astype(np.uint16).tobytes() in stream


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(0, 2**63)] * 3), st.sampled_from(["train", "valid"]))
def test_a_batch_depends_on_its_number_alone(tokens, place, split):
    step, seed, micro = place
    first = tokens.batch(split, step, 6, seed, micro)
    tokens.batch("train", 3, 2, 5)
    assert equal(first, tokens.batch(split, step, 6, seed, micro))
    assert torch.equal(first[0][:3], tokens.batch(split, step, 3, seed, micro)[0])


@pytest.mark.parametrize("vocab_size", [64, 65536])
def test_a_batch_gathered_on_a_device_is_the_same(vocab_size, tmp_path):
    held = TokenData("synthetic", vocab_size, 32, cache_dir=tmp_path)
    for split, place in (("train", (0, 5, 1)), ("valid", (7, 3, 2)), ("train", (2**40, 4, 0))):
        gathered = held.batch(split, *place, device=torch.device("cpu"))
        assert equal(gathered, held.batch(split, *place))
        assert all(part.dtype == torch.int64 and part.is_contiguous() for part in gathered)
    assert len(held._copies) == 2


def test_split_seed_step_and_micro_all_matter(synthetic):
    rows = {
        tuple(synthetic.batch(split, step, 1, seed, micro)[0][0].tolist())
        for split in ("train", "valid")
        for step in range(3)
        for seed in range(3)
        for micro in range(3)
    }
    assert len(rows) == 54


def test_places_are_uniform_and_reach_both_ends(tmp_path):
    data = TokenData("synthetic", 64, 99_990, cache_dir=tmp_path)
    windows = [tuple(data.valid[i : i + 12].tolist()) for i in range(10)]
    drawn = [
        windows.index(tuple(row[:12].tolist())) for s in range(30) for row in data.batch("valid", s, 8, 1)[0]
    ]
    assert set(drawn) == set(range(10))  # all of the 100,000 - 99,990 places
    assert max(np.bincount(drawn)) < 50  # 24 expected


def test_golden_batch(synthetic):
    inputs, _ = synthetic.batch("train", 7, 2, seed=3, micro=1)
    assert inputs[:, :5].tolist() == GOLDEN


def test_bad_batches_say_what_works(synthetic):
    with pytest.raises(ValueError, match="split is 'test'; choose one of train, valid"):
        synthetic.batch("test", 0, 1, 1)
    with pytest.raises(ValueError, match="seed -1"):
        synthetic.batch("train", 0, 1, -1)
    with pytest.raises(ValueError, match="batch_size 0"):
        synthetic.batch("train", 0, 0, 1)
    with pytest.raises(ValueError, match="n is 0"):
        synthetic.valid_batches(0, 1)


def test_valid_batches_are_fixed_spread_out_and_disjoint(synthetic):
    batches = synthetic.valid_batches(5, 8)
    assert len(batches) == 5 and all(x.shape == y.shape == (8, 32) for x, y in batches)
    assert all(equal(a, b) for a, b in zip(batches, synthetic.valid_batches(5, 8), strict=True))
    stream = synthetic.valid.tobytes()
    starts = [stream.index(row.numpy().astype(np.uint16).tobytes()) // 2 for x, _ in batches for row in x]
    assert starts[0] == 0 and starts[-1] > 0.9 * len(synthetic.valid)
    assert min(np.diff(starts)) >= 32
    assert [len(x) for x, _ in synthetic.valid_batches(3, 1)] == [1, 1, 1]


def test_valid_batches_stop_at_the_end_of_the_text(tokens):
    windows = (len(tokens.valid) - 1) // 16
    everything = tokens.valid_batches(10**6, 4)
    assert len(everything) == windows // 4 and all(len(x) == 4 for x, _ in everything)
    (only,) = tokens.valid_batches(3, 10**6)
    assert only[0].shape == (windows, 16)


def test_provenance_pins_text_and_vocabulary(tokens, text):
    found = json.loads(json.dumps(tokens.provenance()))
    corpus = load_corpus(text)
    assert found["corpus"] == "file:code.py" and found["bytes"] == len(LINES)
    assert found["sha256"] == corpus.sha256 and found["vocab_sha256"] == tokenizer.load(300).sha256
    assert found["tokens"] == len(tokens.train) + len(tokens.valid)
    assert found["bytes_per_token"] == len(LINES) / found["tokens"] > 1.3
    assert found["files"] == sum(map(len, corpus.files.values())) and found["packages"] == []


def test_settings_that_cannot_work_say_so(text, tmp_path):
    with pytest.raises(ValueError, match=r"valid part of 'file:code.py' has \d+ tokens, too few for seq_len"):
        TokenData(text, 300, 5000, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="seq_len is 0"):
        TokenData(text, 300, 0, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="128256"):
        TokenData("dclm", 128256, 8, cache_dir=tmp_path)  # before anything is downloaded
    with pytest.raises(ValueError, match="5 to 65536"):
        TokenData("synthetic", 4, 8, cache_dir=tmp_path)


def test_synthetic_needs_no_tokenizer(synthetic):
    assert synthetic.tokenizer is None and int(synthetic.train.max()) == 63
    assert synthetic.provenance()["bytes_per_token"] == 1
    assert data.synthetic_entropy(64) == pytest.approx(1.29965)


def test_stdlib_is_ready_in_seconds(tmp_path):
    tokens = TokenData("stdlib", 512, 128, cache_dir=tmp_path)
    assert len(tokens.train) > 1_500_000 and len(tokens.valid) > 50_000
    assert 1.8 < tokens.provenance()["bytes_per_token"] < 3


GOLDEN = [[39, 20, 27, 50, 58], [11, 42, 9, 12, 39]]
