"""The tokenizer: round trips, the shipped ranks, and a trainer that agrees with the encoder."""

import hashlib
import re
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate.text import corpora, tokenizer

quick = settings(max_examples=40, deadline=None)
SIZES = {size: tokenizer.load(size) for size in (256, 512, 4096)}
messy = st.text(st.sampled_from("ab_Z 0179.,()='\"\n\t\r#é漢\0\x1c\u2028"), max_size=60)


@quick
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)), st.sampled_from([*SIZES]))
def test_decode_inverts_encode_for_any_bytes(data, size):
    ids = SIZES[size].encode(data)
    assert ids.dtype == np.uint16 and (ids < size).all()
    assert SIZES[size].decode(ids) == data


@quick
@given(messy)
def test_pieces_cover_the_text_and_are_encoded_alone(text):
    pieces = re.findall(tokenizer.PATTERN, text)
    assert "".join(pieces) == text
    alone = [SIZES[512].encode(piece) for piece in pieces]
    assert SIZES[512].encode(text).tolist() == [i for ids in alone for i in ids.tolist()]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("def f(self):\n    return self._x1234", "def| f|(self|):|\n    |return| self|._x|123|4"),
        ("To be,  or\n\nnot", "To| be|,|  |or|\n\n|not"),
        ("x = 'naïve'  \n\ty", "x| =| '|naïve|'|  \n\t|y"),
    ],
)
def test_pattern_cuts_code_and_prose(text, pieces):
    assert re.findall(tokenizer.PATTERN, text) == pieces.split("|")


def test_256_tokens_are_the_bytes_and_smaller_sizes_are_prefixes():
    data = bytes(range(256))
    assert SIZES[256].encode(data).tolist() == list(data)
    for i in (0, 100, 300, 511):
        assert SIZES[512].decode([i]) == SIZES[4096].decode([i])
    assert len({t.sha256 for t in SIZES.values()}) == 3
    assert SIZES[512].sha256 == tokenizer.load(512).sha256


def test_more_ranks_compress_more_and_python_well():
    source = Path(tokenizer.__file__).read_bytes()  # not among the files the ranks were trained on
    lengths = [len(SIZES[size].encode(source)) for size in (256, 512, 4096)]
    assert lengths[0] == len(source) > 1.7 * lengths[1] > 1.7 * 1.4 * lengths[2]


def test_bytes_that_are_no_utf8_become_one_token_each():
    assert SIZES[512].encode(b"self\xff\xfeself").tolist() == [
        *SIZES[512].encode("self").tolist(), 255, 254, *SIZES[512].encode("self").tolist()
    ]  # fmt: skip
    assert SIZES[512].encode("self\udcff").tolist()[-1] == 255
    with pytest.raises(ValueError, match="surrogates not allowed"):
        SIZES[512].encode("\ud800")


def test_bad_sizes_and_ids_say_what_works():
    with pytest.raises(ValueError, match=r"vocab_size is 255; .* 256 to 4096"):
        tokenizer.load(255)
    with pytest.raises(ValueError, match=r"128256.*4096 ranks; larger sizes serve only to count"):
        tokenizer.load(128256)
    with pytest.raises(ValueError, match="token id 512 is outside the vocabulary; ids are 0 to 511"):
        SIZES[512].decode([5, 512])
    assert SIZES[512].decode([]) == b""


def test_a_damaged_rank_file_is_refused_and_windows_line_ends_are_not(tmp_path, monkeypatch):
    shipped = tokenizer.RANK_FILE.read_bytes().replace(b"\r\n", b"\n")
    file = tmp_path / "bpe.tiktoken"
    monkeypatch.setattr(tokenizer, "RANK_FILE", file)
    file.write_bytes(shipped.replace(b"\n", b"\r\n"))
    assert tokenizer.load(512).sha256 == SIZES[512].sha256
    file.write_bytes(shipped[:-10])
    with pytest.raises(ValueError, match="was altered; restore it"):
        tokenizer.load(512)


def test_training_by_hand():
    # pieces: "low", " low" twice, " lowest"; lo and ow are met 4 times each, and "lo" is the smaller
    tokens = tokenizer.train([b"low low low lowest"], 260)
    assert tokens[256:] == [b"lo", b"low", b" low", b" lowe"]


@quick
@given(st.lists(st.text(st.sampled_from("aab (=\n"), max_size=40).map(str.encode), min_size=1, max_size=3))
def test_training_equals_the_plain_algorithm_and_splits_as_the_encoder_does(documents):
    expected = plain_training(documents, 262)
    if len(expected) < 262:
        with pytest.raises(ValueError, match=f"has only {len(expected)} ranks"):
            tokenizer.train(documents, 262)
    assert tokenizer.train(documents, len(expected)) == expected
    assert tokenizer.train(documents[::-1], len(expected)) == expected
    words, ranks = tokenizer.count_words(documents), {token: i for i, token in enumerate(expected[:256])}
    chain, encoder = tokenizer._Words(words), tokenizer.Tokenizer(expected)
    for token in expected[256:]:
        ranks[token] = len(ranks)
        chain.merge(token, ranks)
    assert [ranks[part] for part in chain.tokens if part] == [
        i for word in words for i in encoder.encode(word).tolist()
    ]


def plain_training(documents, vocab_size):
    """Byte-pair encoding from its definition: every round encodes all words anew and counts all pairs."""
    words = tokenizer.count_words(documents)
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size:
        encoder, counts = tokenizer.Tokenizer(tokens), Counter()
        for word, n in words.items():
            for a, b in pairwise(encoder.encode(word).tolist()):
                counts[tokens[a] + tokens[b]] += n
        if not counts:
            break
        tokens.append(min(counts, key=lambda pair: (-counts[pair], pair)))
    return tokens


def chinese(n):
    """A paragraph of n characters without a blank: one word for the trainer."""
    random = np.random.default_rng(0)
    return "".join(chr(0x4E00 + int(i)) for i in random.pareto(0.6, n).clip(max=3000)).encode()


def test_training_on_one_long_word_equals_the_plain_algorithm():
    documents = [chinese(700), b"ab" * 300 + b"aab" * 300]
    assert tokenizer.train(documents, 330) == plain_training(documents, 330)


def test_long_words_take_no_time():
    start = time.perf_counter()
    assert len(tokenizer.train([chinese(10_000)], 1000)) == 1000
    assert tokenizer.load(512).encode(b"ab" * 500_000).size == 500_000
    assert time.perf_counter() - start < 15  # tiktoken before 0.13, or a scan per merge, takes minutes


def test_the_shipped_ranks_come_from_the_trainer():
    data = tokenizer.RANK_FILE.read_bytes().replace(b"\r\n", b"\n")
    assert hashlib.sha256(data).hexdigest() == tokenizer.RANKS_SHA256
    corpus = corpora.load_corpus("stdlib")
    if corpus.sha256 != tokenizer.TRAINED_ON:
        pytest.skip("another standard library than the ranks were trained on")
    tokens = tokenizer.train((document.read() for document in corpus.files["train"]), 270)
    assert tokenizer._rank_lines(tokens) == b"".join(data.splitlines(keepends=True)[:270])


def test_train_command_repeats_itself_byte_for_byte(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(b"the cat sat on the mat, and another rat ran under the blanket\n" * 30)
    for name in ("one", "two"):
        args = ["train", "--corpus", f"file:{text}", "--vocab-size", "280", "--out", str(tmp_path / name)]
        assert tokenizer.main(args) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert "280 ranks in" in capsys.readouterr().out


def test_train_command_looks_first_where_it_will_write(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "load_corpus", lambda name: pytest.fail("began"))
    for out, why in ((tmp_path, "it is a folder"), (tmp_path / "none" / "x", "No such file")):
        with pytest.raises(ValueError, match=rf"--out .* cannot be written \({why}"):
            tokenizer.main(["train", "--out", str(out)])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "name another file with --out"),
        (["--out", "out"], "the text has only 2"),
        (["--out", "out", "--vocab-size", "20"], "vocab_size is 20"),
        (["--out", "out", "--corpus", "file:nowhere"], "no file or folder 'nowhere'"),
    ],
)
def test_train_command_refuses_in_one_sentence(more, message, tmp_path, monkeypatch):
    before = tokenizer.RANK_FILE.read_bytes()
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(b"some other text\n" * 99)
    with pytest.raises(ValueError, match=message):
        tokenizer.main(["train", "--corpus", "file:text.txt", *more])
    assert tokenizer.RANK_FILE.read_bytes() == before and not Path("out").exists()
