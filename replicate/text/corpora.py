"""Text to train on: which files, how they are split, and a hash that pins them.

A corpus is named by a spec:

    stdlib           the interpreter's standard library, capped at 8 MB of training text (no network)
    pysrc            every Python source of the environment: standard library and site-packages
    file:PATH        your own text: a file or a folder
    shakespeare      tiny Shakespeare, downloaded once and checked
    fineweb-edu:SIZE, dclm:SIZE    the first SIZE (default 100MB) of the web corpora, streamed once
    synthetic        a random source of known entropy, see `replicate.text.synthetic`

Whole files are held out where there are enough of them, chosen by a hash of their relative path, so
a file that comes or goes moves no other. Of files with equal content only the first is kept, empty
ones are dropped. Text is bytes: no encoding or line ending is assumed or changed.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import mmap
import os
import platform
import site
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from replicate.system import paths
from replicate.text import synthetic
from replicate.text.downloads import STREAM_BYTES, STREAMS, CorpusUnavailable, shakespeare, stream

SPECS = ("stdlib", "pysrc", "file:PATH", "shakespeare", *STREAMS, "synthetic")
SPLITS = ("train", "valid")

# Left out of `stdlib`: tests, what others installed, and tables and settings that a program wrote.
NOT_STDLIB = {"test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "pydoc_data"}
STDLIB_BYTES = {"train": 8_000_000, "valid": 500_000}
HELD_OUT = {"stdlib": 20, "pysrc": 50, "file": 20}  # one file in so many
UTF16_OR_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # 32_LE begins as 16_LE does
CONVERT = "convert it to UTF-8, in an editor or with iconv"
CUT = 0.95  # share of a single file that is training text


@dataclass(frozen=True)
class Document:
    """Bytes start to start + size of one file; `name` is its path, the same on every machine."""

    name: str
    path: Path
    start: int = 0
    size: int = 0
    sha256: str = ""

    def read(self) -> bytes:
        """The document's bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)

    def cut(self, at: int) -> tuple[Document, Document]:
        """The document as two (without hashes), at the last line boundary near before byte `at`.

        Near is a twentieth of `at`; without a line boundary there, the cut is at the byte.
        """
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            stop = self.start + at
            at = (data.rfind(b"\n", stop - at // 20, stop) + 1 or stop) - self.start
        return (
            replace(self, size=at, sha256=""),
            replace(self, start=self.start + at, size=self.size - at, sha256=""),
        )


@dataclass(frozen=True)
class Corpus:
    """Documents per split, and the hash that pins them."""

    name: str  # the spec without folders, such as "stdlib" or "file:notes.txt"
    files: dict[str, tuple[Document, ...]]  # of "train" and "valid", sorted by name
    bytes: int  # of all documents; for "synthetic" its symbols, counted as a byte each
    sha256: str  # over the sorted lines "split path content-hash"
    skipped: tuple[str, ...] = ()  # names of files that could not be read
    packages: tuple[
        str, ...
    ] = ()  # "name version (licence)" of the software that the text is; no part of the hash


def load_corpus(spec: str, *, cache_dir: Path | None = None) -> Corpus:
    """The corpus that `spec` names; every file is read once, to hash it. Downloads go to `cache_dir`.

    Raises:
        ValueError: unknown spec, missing path, or too little text to split.
        CorpusUnavailable: a download that cannot be had, or an interpreter without sources.
    """
    name, colon, option = spec.partition(":")
    if bool(colon) > (name in ("file", *STREAMS)) or name not in (known.split(":")[0] for known in SPECS):
        near = difflib.get_close_matches(spec, SPECS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SPECS)}"
        raise ValueError(f"unknown corpus {spec!r}; {hint}")
    folder = Path(cache_dir or paths.runs_dir() / "corpus")
    if name == "synthetic":
        symbols = sum(synthetic.LENGTH.values())
        return Corpus(name, {"train": (), "valid": ()}, symbols, synthetic.sha256())
    if name == "stdlib":
        return _stdlib()
    if name == "pysrc":
        return _pysrc()
    if name == "file":
        if not option:
            raise ValueError("corpus 'file' needs a path: file:PATH, a text file or a folder")
        try:
            return _file(Path(option).expanduser())
        except RuntimeError:
            raise ValueError(f"no home folder is known for {option!r}; write the path in full") from None
    if name == "shakespeare":
        return _pin(name, _cut_each(_hashed([Document("input.txt", shakespeare(folder))])[0]))
    files = stream(name, option or STREAM_BYTES, folder)
    return _pin(spec, {split: _hashed([Document(f"{split}.txt", path)])[0] for split, path in files.items()})


def _stdlib() -> Corpus:
    """The standard library, in the order of the path's hash until each split's limit is reached."""
    found = _walk(_stdlib_root(), lambda name: name not in NOT_STDLIB and not name.startswith("config-"))
    documents, skipped = _hashed(
        d for d in found if d.name.endswith(".py") and not d.name.startswith("_sysconfigdata")
    )
    parts = _split(documents, HELD_OUT["stdlib"])
    for split, limit in STDLIB_BYTES.items():
        kept, total = [], 0
        for document in sorted(parts[split], key=lambda document: _path_hash(document.name)):
            if total + document.size <= limit:
                kept.append(document)
                total += document.size
        parts[split] = kept
    return replace(_pin("stdlib", parts, skipped), packages=(_python(),))


def _pysrc() -> Corpus:
    """Every *.py of the standard library (tests included) and of all site-packages folders."""
    found: dict[str, Document] = {}
    folders = [("site-packages", Path(folder)) for folder in site.getsitepackages()]
    for prefix, root in [("stdlib", _stdlib_root()), *folders]:
        for document in _walk(root, lambda name: name not in ("site-packages", "dist-packages")):
            name = f"{prefix}/{document.name}"
            if name.endswith(".py"):
                found.setdefault(name, replace(document, name=name))
    documents, skipped = _hashed(found.values())
    corpus = _pin("pysrc", _split(documents, HELD_OUT["pysrc"]), skipped)
    return replace(corpus, packages=(_python(), *_installed(folder for _, folder in folders)))


def _python() -> str:
    return f"Python {platform.python_version()} (PSF-2.0)"


def _installed(folders: Iterable[Path]) -> list[str]:
    """The distributions in site-packages folders as "name version (licence)", sorted; of a name the first.

    The licence is what a package's metadata say: the SPDX expression, else the licence classifiers, else the
    first line of the field License, else "not stated". Left out are folders without metadata.
    """
    found: dict[str, str] = {}
    for package in metadata.distributions(path=[str(folder) for folder in folders]):
        if package.read_text("METADATA") or package.read_text("PKG-INFO"):
            found.setdefault(package.name, f"{package.name} {package.version} ({_licence(package.metadata)})")
    return sorted(found.values(), key=str.lower)


def _licence(fields: metadata.PackageMetadata) -> str:
    said = (kind.split(" :: ") for kind in fields.get_all("Classifier", ()))
    kinds = [kind[-1] for kind in said if kind[0] == "License"]
    line = (fields.get("License") or "").strip().partition("\n")[0]
    return fields.get("License-Expression") or " and ".join(kinds) or line[:60] or "not stated"


def _file(path: Path) -> Corpus:
    """A text file, cut 95 : 5 at a line boundary, or a folder of text files.

    In a folder, files named train.* and valid.* at its top are the split if both are there. Otherwise
    one file in 20 is held out; where that leaves a side empty, each file is cut 95 : 5. Links to folders
    are followed. Hidden files and files that are no text (a NUL byte near the start) are left out.

    Raises ValueError for text in UTF-16 or UTF-32, and for a single file that is no text.
    """
    name = f"file:{path.resolve().name}"
    if path.is_file():
        if _is_binary(path):
            raise ValueError(f"{path} has NUL bytes: no text, or in UTF-16; {CONVERT}")
        return _pin(name, _cut_each(_hashed([Document(path.name, path)])[0]))
    if not path.is_dir():
        raise ValueError(f"no file or folder {str(path)!r} here ({Path.cwd()}); write it as file:PATH")
    found = [d for d in _walk(path, lambda name: name[0] != ".", links=True) if d.path.name[0] != "."]
    documents, skipped = _hashed(found, text_only=True)
    parts = {split: [d for d in documents if d.name.rpartition(".")[0] == split] for split in SPLITS}
    if not all(parts.values()):
        parts = _split(documents, HELD_OUT["file"])
    if not all(parts.values()):
        parts = _cut_each(documents)
    return _pin(name, parts, skipped)


def _pin(name: str, parts: dict[str, list[Document]], skipped: Iterable[str] = ()) -> Corpus:
    """The corpus of these documents, with one hash over all of them."""
    for split in SPLITS:
        if not parts[split]:
            raise ValueError(f"corpus {name!r} has no {split} text that can be read; give it more")
    files = {split: tuple(sorted(parts[split], key=lambda document: document.name)) for split in SPLITS}
    lines = sorted(f"{split} {d.name} {d.sha256}\n" for split in SPLITS for d in files[split])
    sha256 = hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    return Corpus(name, files, sum(d.size for part in files.values() for d in part), sha256, tuple(skipped))


def _stdlib_root() -> Path:
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise CorpusUnavailable(f"this Python has no library sources in {root}; use corpus 'file:PATH'")
    return root


def _walk(root: Path, enter: Callable[[str], bool], links: bool = False) -> list[Document]:
    """Every file under `root`, sorted by name, from the folders whose name `enter` accepts.

    With `links`, links to folders are followed, and each folder is entered once: none leads in a circle.
    """
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=links):
        if (real := Path(folder).resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(filter(enter, folders))
        for path in (Path(folder, name) for name in names):
            found.append(Document(path.relative_to(root).as_posix(), path))
    return sorted(found, key=lambda document: document.name)


def _hashed(documents: Iterable[Document], text_only: bool = False) -> tuple[list[Document], list[str]]:
    """Documents with size and hash, no two equal and none empty; and the names of unreadable ones."""
    kept: dict[str, Document] = {}
    skipped = []
    with ThreadPoolExecutor() as pool:  # reading and hashing release the interpreter lock
        for document in pool.map(_with_hash, documents):
            if not document.sha256:
                skipped.append(document.name)
            elif document.size and not (text_only and _is_binary(document.path)):
                kept.setdefault(document.sha256, document)
    return list(kept.values()), skipped


def _with_hash(document: Document) -> Document:
    """The document with its hash (and size, for a whole file); without a hash if it is unreadable."""
    try:
        if not document.path.is_file():  # reading a pipe would wait for ever
            return document
        if not document.size:
            with document.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
                return replace(document, size=file.tell(), sha256=digest.hexdigest())
        return replace(document, sha256=hashlib.sha256(document.read()).hexdigest())
    except OSError:
        return document


def _is_binary(path: Path) -> bool:
    """True for a NUL byte near the start. Raises ValueError for the mark of UTF-16 or UTF-32."""
    with path.open("rb") as file:
        head = file.read(8192)
    if head.startswith(UTF16_OR_32):
        raise ValueError(f"{path} is text in UTF-16 or UTF-32; {CONVERT}")
    return b"\0" in head


def _path_hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def _split(documents: Iterable[Document], held_out: int) -> dict[str, list[Document]]:
    """Whole documents, one in `held_out` for validation by the hash of its name."""
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        parts["train" if int(_path_hash(document.name)[-8:], 16) % held_out else "valid"].append(document)
    return parts


def _cut_each(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Each document cut 95 : 5 at a line boundary."""
    pairs = [document.cut(int(CUT * document.size)) for document in documents if document.size > 1]
    train, valid = zip(*pairs, strict=True) if pairs else ((), ())
    return {"train": _hashed(train)[0], "valid": _hashed(valid)[0]}
