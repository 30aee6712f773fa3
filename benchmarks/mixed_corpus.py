"""A mixed corpus in which everything that a build has to find is planted and counted, and a check that its report is exact.

Run, in the project's folder:

    python benchmarks/mixed_corpus.py make [FOLDER] [--megabytes 200]
    pretrain data build configs/data/mixed.yaml
    python benchmarks/mixed_corpus.py check [DATASET] [--planted FOLDER/planted.json]

`make` takes texts of this machine: Python sources, and the Debian packages linux-doc, perl-doc and dict-wn, which are
downloaded and unpacked into a temporary folder where `apt-get` is (no root is needed; what cannot be had is said); the rest
comes from headers and documentation that are installed. They are made distinct by their content after cleaning. Then
duplicates, broken and foreign content, and documents for every rule are planted among them, seeded. Out, in FOLDER: the
seven sources of configs/data/mixed.yaml; `documents.parquet` with what must become of every document, which the rules'
functions said one by one, and of what was planted its construction; `planted.json` with counts. For another FOLDER than
the default, `mixed.yaml` in it is the run file to build.

`check` compares a built dataset with that, line by line, and ends with status 1 where they differ. How many near duplicates
the texts have by themselves nobody knows beforehand: these are counted apart, and a sample is compared word by word.
"""

import argparse
import gzip
import io
import json
import os
import random
import re
import string
import subprocess
import sys
import sysconfig
import tempfile
import tokenize
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import pyarrow
import pyarrow.parquet
import zstandard

from configs.errors import UserError
from configs.loader import load_config
from data_pipeline.cleaning import bind_rules
from data_pipeline.documents import Document, Rule, identify_document, place_document
from data_pipeline.manifest import SPLITS, UNITS, Manifest, load_manifest, verify_dataset
from data_pipeline.minhash import hash_shingles, hash_words
from data_pipeline.shards import Shard, read_spans
from data_pipeline.sources import plan_units, read_unit
from data_pipeline.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
RUN_FILE = "configs/data/mixed.yaml"
FOLDER, DATASET = "datasets/mixed-corpus", "datasets/mixed"
PACKAGES = ("linux-doc", "perl-doc", "dict-wn")
SMALLEST_CHARACTERS, LARGEST_CHARACTERS = 400, 100_000  # of a document
GROUP_CHARACTERS = 3000  # entries of a dictionary that are a document
MARKER = "planted-to-be-dropped"
MAIL_HOST = "mixed-corpus.example"
MAIL_PLACEHOLDERS = ("someone@example.com", "somebody.else@example.org")
BLOCKED_DOMAIN, BLOCKED_URL = "blocked.example", "allowed.example/one/blocked"
KEPT = "kept"
NEAR_SIMILARITY = 0.9  # of planted pairs, at least
Kind = Literal["python", "text", "jsonl", "parquet", "wet"]


@dataclass(frozen=True)
class Source:
    """A source of the run file."""

    name: str
    kind: Kind
    share: float
    """Of the bytes."""
    pool: str
    """Which texts it takes first."""
    files: tuple[str, ...] = ()
    """Of those that hold many documents."""
    text_field: str = "text"
    id_field: str | None = "id"


SOURCES = (
    Source("python", "python", 0.2, "python", id_field=None),
    Source("manuals", "text", 0.1, "manuals", id_field=None),
    Source("kernel", "jsonl", 0.13, "kernel", tuple(f"kernel-{number}.jsonl.gz" for number in range(4))),
    Source("wordnet", "jsonl", 0.14, "wordnet", tuple(f"entries-{number}.jsonl.zst" for number in range(3)), "body", "number"),
    Source("headers", "jsonl", 0.28, "headers", ("headers.jsonl",)),
    Source("stubs", "parquet", 0.1, "stubs", ("stubs-0.parquet", "stubs-1.parquet")),
    Source("web", "wet", 0.05, "web", ("pages-0.warc.wet.gz", "pages-1.warc.wet.gz")),
)
PLACES = {source.name: number for number, source in enumerate(SOURCES)}
LAST_RESORTS = ("headers", "stubs", "manuals", "kernel", "python")  # pools for a source whose own is used up


@dataclass
class Planned:
    """A document, or what stands in its place, and what must become of it."""

    source: Source
    text: str
    file: str = ""
    """Path below the source's folder."""
    pool: str = ""
    content: bytes | None = None
    """The line, file, value or record as it is written, where that is not simply the text."""
    is_null: bool = False
    """A value of parquet that is not there."""
    url: str = ""
    expected: str = KEPT
    stage: Literal["kept", "dropped", "quarantined"] = KEPT
    digest: bytes = b""
    """Of the text after cleaning."""
    name: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    position: int = 0

    @property
    def order(self) -> tuple[int, bytes, int]:
        """Of two documents that are alike, the one with the lower order stays."""
        return PLACES[self.source.name], os.fsencode(self.file), self.position

    @property
    def identity(self) -> str:
        """The document's id in the dataset."""
        return identify_document(self.source.name, self.file, self.position)


# --- a rule of one's own, as configs/data/mixed.yaml names it ------------------------------------------------


def drop_marked(document: Document, *, marker: str) -> Document | str:
    """Drop a document that holds a marker. Reason: planted."""
    return "planted" if marker in document.text else document


# --- the machine's texts ------------------------------------------------------------------------------------


def open_pools(folders: Sequence[str], packages: Mapping[str, Path], chooser: random.Random) -> dict[str, Iterator[str]]:
    """Texts by kind, each in an order of its own; they are read when they are asked for."""
    kernel = [str(path) for name, path in packages.items() if name == "linux-doc"]
    others = [str(path) for name, path in packages.items() if name != "linux-doc"]
    return {
        "python": read_texts(find_files(folders, (".py",), chooser)),
        "manuals": read_texts(find_files([*others, *folders], (".pod", ".txt", ".md", ".rst"), chooser)),
        "kernel": read_texts(find_files(kernel, (".txt", ".rst.gz", ".yaml.gz"), chooser)),
        "wordnet": read_dictionary(find_files(others, (".dict.dz",), chooser)),
        "headers": read_texts(find_files(folders, (".h", ".hpp", ".cuh"), chooser)),
        "stubs": read_texts(find_files(folders, (".pyi",), chooser)),
        "web": read_pages([*find_files(kernel, (".html",), chooser), *find_files(folders, (".html", ".py"), chooser)]),
    }


def find_files(folders: Sequence[str], suffixes: tuple[str, ...], chooser: random.Random) -> list[Path]:
    """Files below the folders, shuffled; installed packages only where their folder is named itself."""
    found: dict[Path, None] = {}
    for folder in folders:
        installed = {"site-packages", "dist-packages"} if folder == sysconfig.get_path("stdlib") else set[str]()
        for parent, below, names in os.walk(folder):
            below[:] = sorted(name for name in below if name not in installed and not name.startswith("."))
            found |= dict.fromkeys(Path(parent, name) for name in names if name.endswith(suffixes))
    paths = sorted(path for path in found if not path.is_symlink())
    chooser.shuffle(paths)
    return paths


def read_texts(paths: Iterable[Path]) -> Iterator[str]:
    """The files' texts; what is no UTF-8, or no text, is left out."""
    for path in paths:
        try:
            if path.stat().st_size > 4 * LARGEST_CHARACTERS:
                continue
            content = path.read_bytes()
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError):
            continue
        if "\0" not in text:
            yield text


def read_pages(paths: Iterable[Path]) -> Iterator[str]:
    """What is to be read on HTML pages and in the docstrings of Python files: paragraphs of prose, of every fifth file all."""
    from benchmarks.data_filters import is_prose, read_prose

    for number, path in enumerate(paths):
        paragraphs = re.split(r"\n\s*\n", read_prose(path))
        if number % 5:
            yield "\n".join(filter(is_prose, (" ".join(paragraph.split()) for paragraph in paragraphs)))
        else:
            yield "\n\n".join(paragraphs).strip()


def read_dictionary(paths: Iterable[Path]) -> Iterator[str]:
    """Entries of a dictionary (dictd's form), as many together as make a document."""
    for path in paths:
        gathered, size = list[str](), 0
        for entry in re.split(r"\n(?=\S)", gzip.decompress(path.read_bytes()).decode("utf-8", "replace")):
            gathered.append(entry)
            size += len(entry) + 1
            if size >= GROUP_CHARACTERS:
                yield "\n".join(gathered)
                gathered, size = [], 0


def draw(pools: Mapping[str, Iterator[str]], first: str) -> Iterator[str]:
    """Texts of one pool, and when that is used up, of others."""
    return chain(*(pools[name] for name in (first, *LAST_RESORTS)))


def fetch_packages(folder: Path) -> dict[str, Path]:
    """Debian packages, unpacked below a folder; what cannot be had is said."""
    packages: dict[str, Path] = {}
    for name in PACKAGES:
        below = folder / name
        below.mkdir()
        try:
            run(below, "apt-get", "download", *resolve_package(name))
            for archive in sorted(below.glob("*.deb")):
                run(below, "dpkg", "-x", str(archive), str(below / "unpacked"))
            packages[name] = below / "unpacked"
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            print(f"the package {name} cannot be had ({reason.strip().splitlines()[-1]}); installed files stand in for it")
    return packages


def resolve_package(name: str) -> list[str]:
    """A package and what of its own name it depends on: linux-doc is empty, linux-doc-6.1 is not."""
    depends = run(Path.cwd(), "apt-cache", "depends", "--important", name)
    return [name, *sorted(set(re.findall(rf"Depends: ({re.escape(name)}-[\w.]+)", depends)))]


def run(folder: Path, *command: str) -> str:
    """A command's standard output. Raises OSError, SubprocessError."""
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300).stdout


# --- what must become of a document -------------------------------------------------------------------------


class Judge:
    """Calls the run file's rules one by one."""

    def __init__(self, run_file: Path) -> None:
        self.data = load_config(run_file).data
        self._rules: list[tuple[tuple[str, ...], Rule]] = []
        for section in self.data.clean:
            sources = section.sources or tuple(PLACES)
            self._rules += [(sources, rule) for _, rule in bind_rules([section], sources[0])]

    def clean(self, source: Source, text: str, url: str = "") -> tuple[str, str]:
        """KEPT or the reason why a text is dropped, and the text as far as it came."""
        document = Document(source.name, "", 0, text, None, {"url": url} if url else {})
        for sources, rule in self._rules:
            if source.name not in sources:
                continue
            verdict = rule(document)
            if isinstance(verdict, str):
                return verdict, document.text
            document = verdict
        return KEPT, document.text

    def judge(self, planned: Planned) -> Planned:
        """Note in a document what must become of it."""
        planned.expected, cleaned = self.clean(planned.source, planned.text, planned.url)
        planned.stage = KEPT if planned.expected == KEPT else "dropped"
        planned.digest = hash_text(cleaned)
        return planned


def hash_text(text: str) -> bytes:
    """128 bits that name a text."""
    return blake2b(text.encode("utf-8"), digest_size=16).digest()


def split_shingles(text: str, num_words: int = 5) -> set[tuple[str, ...]]:
    """The runs of words of a text, written out."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
    return {tuple(words[start : start + num_words]) for start in range(max(1, len(words) - num_words + 1))}


def jaccard(one: set[Any], other: set[Any]) -> float:
    """The share of what both have in what either has."""
    return len(one & other) / max(1, len(one | other))


# --- planting -----------------------------------------------------------------------------------------------


class Garden:
    """The documents so far, those that are still free to be changed, and notes of what was planted."""

    def __init__(self, judge: Judge, chooser: random.Random) -> None:
        self.judge, self.chooser = judge, chooser
        self.all: list[Planned] = []
        self.free: list[Planned] = []
        self.ways: Counter[str] = Counter()
        """What was planted, by kind."""
        self.pairs: list[tuple[Planned, Planned, float]] = []
        """Near duplicates and their exact similarity."""
        self.mails: list[tuple[Planned, int]] = []
        """Documents with addresses, and how many."""
        self.controls: list[Planned] = []
        """Documents that are nearly dropped, and must stay."""
        self._number = 0

    def number(self) -> int:
        """A new number."""
        self._number += 1
        return self._number

    def add(self, planned: Planned, like: Planned | None = None) -> Planned:
        """Put a document into a file of its source: into that of `like`, or any."""
        source = planned.source
        if source.files:
            planned.file = like.file if like else self.chooser.choice(source.files)
        elif not planned.file:
            number = self.number()
            planned.file = f"{number % 50:02d}/{number:06d}{'.py' if source.kind == 'python' else self.chooser.choice(('.txt', '.md', ''))}"
        if source.kind == "wet" and not planned.url:
            planned.url = f"http://site-{self.number() % 97}.example/page/{self._number}"
        self.all.append(planned)
        return planned

    def take(self, suits: Callable[[Planned], bool] = lambda planned: True) -> Planned:
        """A document of the machine's that nothing was done to, and that is kept. Raises SystemExit when there is none left."""
        for place in range(len(self.free) - 1, -1, -1):
            if suits(self.free[place]):
                return self.free.pop(place)
        raise SystemExit("there are too few documents to plant all of it in; ask for more megabytes")

    def change(self, suits: Callable[[Planned], bool], change: Callable[[str], str], expected: str) -> Planned:
        """Change a free document so that this becomes of it."""
        for _ in range(200):
            planned = self.take(suits)
            before, planned.text = planned.text, change(planned.text)
            if self.judge.judge(planned).expected == expected:
                return planned
            planned.text = before  # it stays as it was, and is not tried again
            self.judge.judge(planned)
        raise SystemExit(f"no document could be made {expected}")


def gather(garden: Garden, pools: Mapping[str, Iterator[str]], num_bytes: int) -> None:
    """Distinct documents of the machine for every source. Raises SystemExit when there are not enough."""
    seen: set[bytes] = set()
    for source in SOURCES:
        left = num_bytes * source.share
        for text in draw(pools, source.pool):
            planned = Planned(source, text, pool=source.pool)
            if not SMALLEST_CHARACTERS <= len(text) <= LARGEST_CHARACTERS or not may_stand_in(source, text):
                continue
            if MARKER in text or garden.judge.judge(planned).digest in seen:
                continue
            seen.add(planned.digest)
            garden.add(planned)
            left -= len(text.encode("utf-8"))
            if left <= 0:
                break
        else:
            raise SystemExit(f"this machine has too little distinct text: of {source.name} {left / 1e6:.1f} MB are missing")
    garden.free = [planned for planned in garden.all if planned.expected == KEPT]
    garden.chooser.shuffle(garden.free)


def may_stand_in(source: Source, text: str) -> bool:
    """Whether a text, in UTF-8, comes back out of a file of this source."""
    if source.kind != "python":
        return True
    try:
        return tokenize.detect_encoding(io.BytesIO(text.encode("utf-8")).readline)[0].startswith("utf-8")
    except SyntaxError:
        return False


def plant_exact(garden: Garden, number: int) -> None:
    """A copy of a document: in the same file, another, another source, another format, or equal only after cleaning."""
    ways = ("within a file", "across files", "across sources", "across formats", "after cleaning")
    way = ways[number % len(ways)]
    num_files = {"within a file": range(1, 9), "across files": (0, *range(2, 9))}.get(way, range(9))
    base = garden.take(lambda planned: len(planned.source.files) in num_files)
    for _ in range(2 if number % 10 == 0 else 1):
        for source in garden.chooser.sample(SOURCES, len(SOURCES)):
            copied = Planned(source, base.text, pool=base.pool)
            if not fits(way, base, copied):
                continue
            if way == "after cleaning" and (varied := vary(garden, base)) is not None:
                copied.text = varied
            elif way == "after cleaning":
                continue
            if not may_stand_in(source, copied.text) or garden.judge.judge(copied).expected != KEPT or copied.digest != base.digest:
                continue
            garden.add(copied, base if way == "within a file" else None)
            while way == "across files" and copied.file == base.file:
                copied.file = garden.chooser.choice(source.files)
            garden.ways[f"exact duplicates {way}"] += 1
            break


def fits(way: str, base: Planned, copied: Planned) -> bool:
    """Whether a copy in this source is one of this way."""
    same = base.source is copied.source
    if way == "across sources":
        return not same and (base.source.kind == copied.source.kind or base.source.kind != "jsonl")
    if way == "across formats":
        return base.source.kind != copied.source.kind
    return same or way == "after cleaning"


def vary(garden: Garden, base: Planned) -> str | None:
    """Another text that is the same after cleaning."""
    text = base.text
    variants = {
        "other line ends": text.replace("\n", "\r\n"),
        "trailing blanks": text.replace("\n", " \t\n"),
        "more blank lines": "\n\n" + text.replace("\n\n", "\n\n\n\n") + "\n\n",
        "decomposed": unicodedata.normalize("NFD", text),
        "invisible": text.replace(" ", "\u200b ", 3).replace("e", "e\u00ad", 1),
        "decoded wrongly": text.encode("utf-8").decode("cp1252", "replace"),
    }
    for name in garden.chooser.sample(list(variants), len(variants)):
        varied = variants[name]
        if varied != text and hash_text(garden.judge.clean(base.source, varied)[1]) == base.digest:
            garden.ways[f"exact duplicates by cleaning, {name}"] += 1
            return varied
    return None


def plant_near(garden: Garden, number: int) -> None:
    """A document with a few words changed, beside the document itself."""
    base = garden.take(lambda planned: planned.text.isascii() and len(planned.text) > 1500)
    cleaned = garden.judge.clean(base.source, base.text)[1]
    shingles = split_shingles(cleaned)
    for source in garden.chooser.sample(SOURCES, len(SOURCES)) if number % 2 else (base.source,):
        copied = Planned(source, change_words(base.text, max(1, len(shingles) // 130), garden.chooser), pool=base.pool)
        if not may_stand_in(source, copied.text) or garden.judge.judge(copied).expected != KEPT:
            continue
        similarity = jaccard(shingles, split_shingles(garden.judge.clean(source, copied.text)[1]))
        if NEAR_SIMILARITY <= similarity < 1:
            garden.pairs.append((base, garden.add(copied), similarity))
            garden.ways["near duplicates"] += 1
            return


def change_words(text: str, number: int, chooser: random.Random) -> str:
    """A text in which so many words are others."""
    words = [match.span() for match in re.finditer(r"[A-Za-z]{4,}", text)]
    for start, end in sorted(chooser.sample(words, min(number, len(words))), reverse=True):
        text = text[:start] + "".join(chooser.choices(string.ascii_lowercase, k=9)) + text[end:]
    return text


def insert(text: str, line: str, chooser: random.Random) -> str:
    """A text with one more line, anywhere but at the start."""
    lines = text.split("\n")
    lines.insert(chooser.randrange(1, len(lines) + 1), line)
    return "\n".join(lines)


def plant_for_rules(garden: Garden, questions: Sequence[list[str]], scale: int) -> None:
    """Documents that each rule must drop, some that it nearly must, and addresses that it must redact."""
    chooser = garden.chooser

    def quote(num_words: int) -> Callable[[str], str]:
        words = chooser.choice(questions)
        start = chooser.randrange(len(words) - num_words + 1)
        return lambda text: insert(text, f"({', '.join(words[start : start + num_words]).title()})", chooser)

    def anything(planned: Planned) -> bool:
        return planned.source.kind != "wet"  # whose quality rules are not to be disturbed

    for number in range(2 + scale // 100):
        garden.change(lambda planned: True, lambda text, number=number: insert(text, f"# {MARKER} {number}", chooser), "planted")
        garden.ways["documents with the marker"] += 1
    for _ in range(2 + scale // 200):
        garden.change(lambda planned: True, quote(13), "contaminated")
        garden.ways["documents with 13 words of an evaluation"] += 1
        garden.controls.append(garden.change(anything, quote(12), KEPT))
        garden.ways["documents with 12 words of an evaluation"] += 1
    for number in range(2 + scale // 100):
        num_mails = 1 + number % 3
        lines = [f"Write to planted.{number}.{mail}@{MAIL_HOST} today." for mail in range(num_mails)]
        planned = garden.change(
            lambda planned: anything(planned) and "@" not in planned.text,
            lambda text, lines=lines: insert(text, " ".join(lines), chooser),
            KEPT,
        )
        garden.mails.append((planned, num_mails))
        garden.ways["addresses"] += num_mails
    for number in range(2 + scale // 1000):
        for source in SOURCES:
            for text in (f"short {number} {source.name[0]}", f"\n \t{' ' * number}\n"):
                garden.judge.judge(planned := garden.add(Planned(source, text)))
                assert planned.expected in ("too_short", "empty"), planned
                garden.ways[f"documents that are {planned.expected}"] += 1
    pages = [planned for planned in garden.free if planned.source.kind == "wet"][: 2 + scale // 500]
    for number, planned in enumerate(pages):
        planned.url = f"https://www.{BLOCKED_DOMAIN}/{number}" if number % 2 else f"http://{BLOCKED_URL}"
        garden.free.remove(planned)
        garden.ways[f"pages with a {garden.judge.judge(planned).expected}"] += 1


def plant_broken(garden: Garden, times: int) -> None:
    """Everything that a reader must refuse, for the reason that it must give; and foreign files that it must read."""
    largest = garden.judge.data.largest_document_bytes
    for number in range(times):
        for source in SOURCES:
            for reason, content in broken_contents(source, number, largest):
                planned = garden.add(Planned(source, "", content=content, expected=reason, stage="quarantined"))
                planned.is_null = content is None
                garden.ways[f"{reason}, {source.kind}"] += 1
        for encoding in ("latin-1", "cp1252", "koi8-r", "utf-8-sig"):
            base = garden.take(lambda planned: planned.source.kind == "python" and planned.text.isascii())
            base.text = f"# -*- coding: {encoding} -*-\n{base.text}\n# {foreign(encoding, number)}\n"
            base.content = base.text.encode(encoding)
            garden.judge.judge(base)
            garden.ways["Python files whose declaration is right"] += 1


def foreign(encoding: str, number: int) -> str:
    """A text that an encoding has and UTF-8 spells otherwise."""
    return ("Привет, мир" if encoding == "koi8-r" else "café naïve Ärger") + f" {number} {encoding}"


def broken_contents(source: Source, number: int, largest: int) -> list[tuple[str, bytes | None]]:
    """What must be refused in a source of this kind, with the reason."""
    filler = b"too large %d " % number * (largest // 12 + 1)
    if source.kind == "jsonl":
        return broken_lines(source.text_field, number, filler)
    encoded = [foreign(encoding, number).encode(encoding) for encoding in ("latin-1", "cp1252", "koi8-r")]
    if source.kind == "text":
        encoded.append(f"utf-16 with a mark {number}".encode("utf-16"))
    found: list[tuple[str, bytes | None]] = [("empty", b""), ("too_large", filler)]
    found += [("bad_utf8", b"# a comment\n\nx = 1\n# " + content) for content in encoded]
    if source.kind == "python":
        found += [("bad_utf8", b"# coding: utf-8\n\n\n# " + encoded[0])]
        found += [("bad_encoding", b"# coding: latin-%d9\nx = 1\n" % number), ("bad_encoding", b"# coding: ascii\n\n\n# " + encoded[0])]
    if source.kind == "text":
        found.append(("empty", b"\xef\xbb\xbf"))
    if source.kind == "parquet":
        found.append(("not_text", None))
    return found


def broken_lines(text_field: str, number: int, filler: bytes) -> list[tuple[str, bytes | None]]:
    """Lines of JSON that must be refused."""

    def line(value: Any, name: str = text_field) -> bytes:
        return orjson.dumps({"id": f"broken-{number}", "number": number, name: value})

    def spelled(encoding: str) -> bytes:
        return json.dumps({text_field: foreign(encoding, number)}, ensure_ascii=False).encode(encoding)

    return [
        ("bad_json", line("cut off")[:-3]),
        ("bad_json", line("more behind it") + b" and so on"),
        ("bad_json", b"{'%s': 'no JSON'}" % text_field.encode()),
        ("bad_json", line("utf-16 without a mark").decode().encode("utf-16-le")),
        ("bad_utf8", line("utf-16 with a mark").decode().encode("utf-16")),
        *(("bad_utf8", spelled(encoding)) for encoding in ("latin-1", "cp1252", "koi8-r")),
        ("not_an_object", b"[1, 2, %d]" % number),
        ("not_an_object", b'"a text"'),
        ("not_an_object", b"null"),
        ("missing_field", line("text", "other")),
        ("not_text", line(number)),
        ("not_text", line(None)),
        ("not_text", line(["a", "b"])),
        ("lone_surrogate", b'{"%s": "half a \\ud83d character"}' % text_field.encode()),
        ("empty", line("")),
        ("too_large", line(filler.decode())),
    ]


# --- writing ------------------------------------------------------------------------------------------------


def write_source(folder: Path, source: Source, planned: Sequence[Planned], chooser: random.Random) -> None:
    """Write a source's files, and note in each document where it stands."""
    files: dict[str, list[Planned]] = {}
    for one in planned:
        files.setdefault(one.file, []).append(one)
    for name, documents in sorted(files.items()):
        path = folder / source.name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not source.files:
            (document,) = documents
            path.write_bytes(document.text.encode("utf-8") if document.content is None else document.content)
            continue
        documents.sort(key=lambda one: one.expected != KEPT or one.content is not None)
        first, *others = documents  # the fields of the first row are compared with the run file's
        chooser.shuffle(others)
        WRITERS[source.kind](path, source, [first, *others])


def write_lines(path: Path, source: Source, documents: Sequence[Planned]) -> None:
    """JSON lines, plain or packed; some files with a byte order mark, other line ends, blank lines."""
    number = source.files.index(path.name)
    start = b"\xef\xbb\xbf" if number == 1 else b""
    end = b"\r\n" if number == 2 else b"\n"
    position, lines = 0, list[bytes]()
    for place, document in enumerate(documents):
        document.position = position
        line = start + (dump_row(source, document, place) if document.content is None else document.content) + end
        start = b""
        assert line.count(b"\n") == 1, "a line is one line"
        if place % 50 == 49:
            line += b" " * (place % 3) + end
        lines.append(line)
        position += len(line)
    path.write_bytes(pack(path, b"".join(lines)))


def dump_row(source: Source, document: Planned, place: int) -> bytes:
    """A document as a line of JSON; its name and metadata are noted."""
    fields: dict[str, Any] = {"pool": document.pool, "num_lines": document.text.count("\n")}
    name: str | int = f"{source.name}/{place}" if source.id_field == "id" else place
    document.name = str(name)
    document.metadata = {"kernel": fields, "wordnet": {"pool": document.pool}}.get(source.name, {})
    row = {str(source.id_field): name, source.text_field: document.text, **fields}
    # As most programs write it, and as this one does: one has escapes where the other has UTF-8.
    return json.dumps(row).encode() if place % 2 else orjson.dumps(row)


def pack(path: Path, content: bytes) -> bytes:
    """Content as a file of this name holds it."""
    if path.suffix == ".gz":
        return gzip.compress(content, 6, mtime=0)
    return zstandard.ZstdCompressor(3).compress(content) if path.suffix == ".zst" else content


def write_table(path: Path, source: Source, documents: Sequence[Planned]) -> None:
    """Parquet, in groups of rows, not packed so that it is large enough to be split; text that is no UTF-8 stays as it is."""
    for place, document in enumerate(documents):
        document.position, document.name = place, f"{path.stem}/{place}"
        document.metadata = {"pool": document.pool, "num_lines": document.text.count("\n")}
    texts = [None if one.is_null else one.text.encode("utf-8") if one.content is None else one.content for one in documents]
    raw = pyarrow.array(texts, pyarrow.binary())
    columns = {
        "id": pyarrow.array([one.name for one in documents]),
        "text": pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers()),
        "pool": pyarrow.array([one.pool for one in documents]).dictionary_encode(),
        "num_lines": pyarrow.array([one.metadata["num_lines"] for one in documents]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=100, compression="none")


def write_archive(path: Path, source: Source, documents: Sequence[Planned]) -> None:
    """A WET file: a record about the file, then one for each document, each packed for itself."""
    records = [make_record("warcinfo", b"software: none\r\n", {})]
    for number, document in enumerate(documents, 1):
        content = document.text.encode("utf-8") if document.content is None else document.content
        name = f"urn:uuid:{uuid.UUID(bytes=blake2b(f'{path.name}:{number}'.encode(), digest_size=16).digest())}"
        date = f"2026-01-{1 + number % 28:02d}T00:00:00Z"
        fields = {"WARC-Target-URI": document.url, "WARC-Date": date, "WARC-Record-ID": f"<{name}>"}
        records.append(make_record("conversion", content, {**fields, "WARC-Identified-Content-Language": "eng"}))
        document.position, document.name = number, name
        document.metadata = {"url": document.url, "date": date, "record_id": name, "warc-identified-content-language": "eng"}
    path.write_bytes(b"".join(gzip.compress(record, mtime=0) for record in records))


def make_record(kind: str, content: bytes, fields: Mapping[str, str]) -> bytes:
    """A record of a WARC file."""
    head = {"WARC-Type": kind, **fields, "Content-Type": "text/plain", "Content-Length": str(len(content))}
    return b"WARC/1.0\r\n" + "".join(f"{key}: {value}\r\n" for key, value in head.items()).encode() + b"\r\n" + content + b"\r\n\r\n"


WRITERS: dict[str, Callable[[Path, Source, Sequence[Planned]], None]] = {
    "jsonl": write_lines,
    "parquet": write_table,
    "wet": write_archive,
}


def write_damaged_files(folder: Path, garden: Garden) -> None:
    """Files that are cut off, or whose column is missing or holds no text: of each nothing may enter, and it counts once."""
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a text"] * 100, "id": ["one"] * 100}), table)
    page = make_record("conversion", b"a page that is whole", {})
    row = {"id": "one", "number": 1, "pool": "none", "num_lines": 1}
    lines = {field: orjson.dumps({field: "good " * 100, **row}) + b"\n" for field in ("text", "body")}
    damaged: dict[tuple[str, str, str], bytes] = {
        ("kernel", "damaged.jsonl.gz", "damaged_file"): gzip.compress(lines["text"] * 50, mtime=0)[:-9],
        ("wordnet", "damaged.jsonl.zst", "damaged_file"): zstandard.ZstdCompressor(3).compress(lines["body"] * 50)[:-9],
        ("stubs", "damaged.parquet", "damaged_file"): table.getvalue().to_pybytes()[:-50],
        ("web", "z-damaged.warc.wet.gz", "damaged_file"): gzip.compress(page, mtime=0) + gzip.compress(page, mtime=0)[:-9],
    }
    # Behind the others: the first file of a source tells which fields it has.
    for reason, columns in {"missing_field": {"other": ["a text"] * 10}, "not_text": {"text": list(range(10))}}.items():
        stream = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table(columns), stream)
        damaged["stubs", f"z-{reason}.parquet", reason] = stream.getvalue().to_pybytes()
    by_name = {source.name: source for source in SOURCES}
    for (name, file, reason), content in damaged.items():
        (folder / name / file).write_bytes(content)
        garden.all.append(Planned(by_name[name], "", file, content=content, expected=reason, stage="quarantined"))
        garden.ways[f"{reason}, a whole file"] += 1


def write_lists(folder: Path, chooser: random.Random) -> list[list[str]]:
    """The evaluation texts (gives their words) and the list of blocked places."""
    words = ["".join(chooser.choices(string.ascii_lowercase, k=chooser.randrange(3, 9))) for _ in range(2000)]
    questions = [chooser.choices(words, k=chooser.randrange(14, 40)) for _ in range(200)]
    rows = [json.dumps({"text": " ".join(question).capitalize() + "?", "answer": "none"}) for question in questions]
    (folder / "evaluation.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "blocked.txt").write_text(f"# nobody wants these\n{BLOCKED_DOMAIN}\n\n{BLOCKED_URL}/\n", encoding="utf-8")
    return questions


def write_run_file(folder: Path) -> Path:
    """The run file for a folder: the project's, or for another folder than its own, a copy in it."""
    if folder.resolve() == (ROOT / FOLDER).resolve():
        return ROOT / RUN_FILE
    text = (ROOT / RUN_FILE).read_text(encoding="utf-8")
    path = folder / Path(RUN_FILE).name
    path.write_text(text.replace(FOLDER, str(folder)).replace(f"root: {DATASET}\n", f"root: {folder}/dataset\n"), encoding="utf-8")
    return path


def mark_exact_duplicates(documents: Iterable[Planned]) -> None:
    """Of documents that are equal after cleaning, all but the first are dropped."""
    seen: set[bytes] = set()
    for planned in sorted((one for one in documents if one.expected == KEPT), key=lambda one: one.order):
        if planned.digest in seen:
            planned.expected, planned.stage = "exact_duplicate", "dropped"
        seen.add(planned.digest)


def make_corpus(folder: Path, megabytes: float, folders: Sequence[str] | None = None, with_packages: bool = True, seed: int = 1) -> Path:
    """Make the corpus in a folder that is not there yet; gives the run file to build it with. Raises SystemExit."""
    from benchmarks.corpus import FOLDERS

    if folder.exists():
        raise SystemExit(f"{folder} is there already; remove it, or name another folder")
    folder.mkdir(parents=True)
    chooser = random.Random(seed)
    questions = write_lists(folder, chooser)
    run_file = write_run_file(folder)
    garden = Garden(Judge(run_file), chooser)
    with tempfile.TemporaryDirectory() as temporary:
        packages = fetch_packages(Path(temporary)) if with_packages else {}
        gather(garden, open_pools(folders or FOLDERS, packages, chooser), int(megabytes * 1e6))
    scale = len(garden.all)
    for number in range(10 + scale // 50):
        plant_exact(garden, number)
        plant_near(garden, number)
    plant_for_rules(garden, questions, scale)
    plant_broken(garden, 1 + scale // 2500)
    for source in SOURCES:
        write_source(folder, source, [planned for planned in garden.all if planned.source is source], chooser)
    write_damaged_files(folder, garden)
    mark_exact_duplicates(garden.all)
    write_plan(folder, run_file, garden, {"seed": seed, "megabytes": megabytes, "packages": sorted(packages)})
    return run_file


def write_plan(folder: Path, run_file: Path, garden: Garden, facts: dict[str, Any]) -> None:
    """Write down what must become of every document."""
    documents = sorted(garden.all, key=lambda one: one.order)
    columns: dict[str, list[Any]] = {
        "document_id": [one.identity for one in documents],
        "source": [one.source.name for one in documents],
        "file": [one.file for one in documents],
        "position": [one.position for one in documents],
        "stage": [one.stage for one in documents],
        "reason": [one.expected for one in documents],
        "digest": [one.digest.hex() for one in documents],
        "name": [one.name for one in documents],
        "metadata": [json.dumps(one.metadata) for one in documents],
    }
    assert len(set(columns["document_id"])) == len(documents), "two documents stand in one place"
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "documents.parquet", compression="zstd")
    sources: dict[str, dict[str, Any]] = {}
    for source in SOURCES:
        own = [one for one in documents if one.source is source]
        counted = {stage: Counter(one.expected for one in own if one.stage == stage) for stage in ("dropped", "quarantined")}
        sources[source.name] = {"read": len(own), **{stage: dict(sorted(counts.items())) for stage, counts in counted.items()}}
    pairs = [(sorted(pair[:2], key=lambda one: one.order), pair[2]) for pair in garden.pairs]
    plan = {
        **facts,
        "run_file": os.path.relpath(run_file, folder),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "planted": dict(sorted(garden.ways.items())),
        "sources": sources,
        "near": [
            {"source": later.source.name, "first": first.identity, "later": later.identity, "similarity": round(similarity, 4)}
            for (first, later), similarity in pairs
        ],
        "addresses": {one.identity: number for one, number in garden.mails},
        "controls": [one.identity for one in garden.controls],
    }
    (folder / "planted.json").write_text(json.dumps(plan, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --- comparing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of the comparison."""

    source: str
    what: str
    planted: str
    found: str
    is_equal: bool


@dataclass(frozen=True)
class Stored:
    """A document of the dataset."""

    split: str
    shard: str
    number: int
    name: str | None
    metadata: str | None


class Comparison:
    """A dataset beside the plan of its corpus."""

    def __init__(self, dataset: Path, planted: Path) -> None:
        self.dataset, self.folder = dataset, planted.parent
        self.plan: dict[str, Any] = json.loads(planted.read_bytes())
        self.manifest: Manifest = load_manifest(dataset)
        self.report: dict[str, Any] = json.loads((dataset / "report.json").read_bytes())
        rows = pyarrow.parquet.read_table(planted.parent / "documents.parquet").to_pylist()
        self.planned: dict[str, dict[str, Any]] = {row["document_id"]: row for row in rows}
        self.twice = 0
        self.stored = self._read_sidecars()
        self.missing = {identity for identity, row in self.planned.items() if row["stage"] == KEPT and identity not in self.stored}
        """Documents that nothing of the plan speaks against, and that are not there: near duplicates, or lost."""
        self.own_near = self.missing - {pair["later"] for pair in self.plan["near"]}

    def _read_sidecars(self) -> dict[str, Stored]:
        stored: dict[str, Stored] = {}
        for split in SPLITS:
            for shard in self.manifest.shards(split):
                table = read_spans(self.dataset / shard.name)
                for number, row in enumerate(table.select(["document_id", "name", "metadata"]).to_pylist()):
                    self.twice += row["document_id"] in stored
                    stored[row["document_id"]] = Stored(split, shard.name, number, row["name"], row["metadata"])
        return stored

    def lines(self, num_sampled: int) -> Iterator[Line]:
        """The whole comparison."""
        for source in SOURCES:
            yield from self.compare_counts(source.name)
        yield from self.compare_documents()
        yield from self.compare_near()
        yield from self.compare_texts(num_sampled)
        yield from self.compare_report()

    def compare_counts(self, source: str) -> Iterator[Line]:
        """What the manifest says of a source."""
        wanted, found = self.plan["sources"][source], self.manifest.sources[source]
        yield equal(source, "read", wanted["read"], found.read)
        for stage, counts in (("quarantined", found.quarantined), ("dropped", found.dropped)):
            for reason in sorted(wanted[stage].keys() | counts.keys() - {"near_duplicate"}):
                yield equal(source, f"{stage}: {reason}", wanted[stage].get(reason, 0), counts.get(reason, 0))
        pairs = [pair for pair in self.plan["near"] if pair["source"] == source]
        gone = sum(pair["later"] in self.missing for pair in pairs)
        own = sum(self.planned[identity]["source"] == source for identity in self.own_near)
        num_near = found.dropped.get("near_duplicate", 0)
        yield Line(source, "dropped: near_duplicate", str(len(pairs)), f"{gone} and {own} of its own", num_near == gone + own)
        left = wanted["read"] - sum(sum(wanted[stage].values()) for stage in ("dropped", "quarantined")) - num_near
        yield equal(source, "kept", left, found.kept)

    def compare_documents(self) -> Iterator[Line]:
        """Not only as many, but the same ones."""
        must_stay = {identity for identity, row in self.planned.items() if row["stage"] == KEPT}
        yield equal("all", "documents that were to go and are stored", 0, len(self.stored.keys() - must_stay))
        yield equal("all", "documents that are stored twice, or in both splits", 0, self.twice)
        held_out = {identity for identity, document in self.stored.items() if document.split == "held_out"}
        fraction = self.manifest.configuration["held_out_fraction"]
        yield equal("all", "held-out documents", sum(place_document(identity) < fraction for identity in self.stored), len(held_out))
        wanted = Counter(name_row(row) for row in self.planned.values() if row["stage"] == "quarantined")
        found = Counter(name_row(row) for row in self.read_examples("quarantine.jsonl"))
        yield equal("all", "documents of quarantine by name and reason", wanted.total(), (wanted & found).total())
        yield equal("all", "other documents in quarantine", 0, (found - wanted).total())
        wrong = shown = 0
        for row in self.read_examples("dropped.jsonl"):
            known, reason = self.planned.get(row["document_id"], {}), row["reason"]
            shown += 1
            wrong += row["document_id"] not in self.missing if reason == "near_duplicate" else known.get("reason") != reason
        yield equal("all", f"of {shown} examples of dropped documents, wrong ones", 0, wrong)

    def compare_near(self) -> Iterator[Line]:
        """Planted pairs, and documents that only resemble an evaluation."""
        later = [pair["later"] for pair in self.plan["near"]]
        gone = sum(identity in self.missing for identity in later)
        yield Line("all", "planted near duplicates that are gone, 99 % at least", str(len(later)), str(gone), gone >= 0.99 * len(later))
        controls = [identity for identity in self.plan["controls"] if identity not in self.missing]
        yield equal("all", "documents with 12 words of an evaluation", len(controls), sum(one in self.stored for one in controls))
        counts = self.report["deduplication"]
        exact = sum(row["reason"] == "exact_duplicate" for row in self.planned.values())
        yield equal("all", "exact duplicates that deduplication counted", exact, counts["num_exact_duplicates"])
        yield equal("all", "near duplicates that deduplication counted", len(self.missing), counts["num_near_duplicates"])

    def compare_texts(self, num_sampled: int) -> Iterator[Line]:
        """Decoded tokens beside the texts after cleaning, names and metadata beside what was written."""
        sample = random.Random(1).sample(sorted(self.stored), min(num_sampled, len(self.stored)))
        known = [identity for identity in sample if identity in self.planned]
        mails = {identity: number for identity, number in self.plan["addresses"].items() if identity in self.stored}
        texts = self.decode([*known, *mails])
        same = sum(hash_text(texts[identity]).hex() == self.planned[identity]["digest"] for identity in known)
        yield equal("all", "texts that decode to what cleaning left", len(sample), same)
        same = sum(self.has_fields(identity) for identity in known)
        yield equal("all", "their names and metadata", len(sample), same)
        placeholders = {identity: sum(map(texts[identity].count, MAIL_PLACEHOLDERS)) for identity in mails}
        yield equal("all", f"placeholders in {len(mails)} documents with addresses", sum(mails.values()), sum(placeholders.values()))
        yield equal("all", "such documents with another number of them", 0, sum(mails[one] != placeholders[one] for one in mails))
        yield equal("all", "addresses that are still there", 0, sum(texts[identity].count(MAIL_HOST) for identity in mails))

    def compare_report(self) -> Iterator[Line]:
        """The report beside the manifest, and the manifest beside the files."""
        yield equal("all", "problems that the dataset's own verification finds", 0, len(verify_dataset(self.dataset)))
        yield Line("all", "report and manifest agree", "", "", self.report["documents"] == self.manifest.documents.model_dump())
        for source in SOURCES:
            shards = [
                shard.sources[source.name] for split in SPLITS for shard in self.manifest.shards(split) if source.name in shard.sources
            ]
            wanted = {"num_documents": sum(one.num_documents for one in shards), "num_tokens": sum(one.num_tokens for one in shards)}
            found = {key: self.report["sources"][source.name][key] for key in wanted}
            if wanted != found:
                yield Line(source.name, "report and manifest agree", str(wanted), str(found), False)

    @property
    def run_file(self) -> Path:
        """Where the run file lies."""
        return self.folder / self.plan["run_file"]

    def read_examples(self, name: str) -> Iterator[dict[str, Any]]:
        """The lines that every unit has of a kind."""
        for path in sorted((self.dataset / UNITS).glob(f"*/{name}")):
            yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())

    def has_fields(self, identity: str) -> bool:
        """Whether a document's name and metadata are those that were written."""
        stored, planned = self.stored[identity], self.planned[identity]
        return stored.name == planned["name"] and json.loads(stored.metadata or "{}") == json.loads(planned["metadata"])

    def decode(self, identities: Iterable[str]) -> dict[str, str]:
        """The texts of stored documents, from their tokens."""
        tokenizer = load_tokenizer(self.dataset / "tokenizer.json", self.manifest.end_of_text)
        texts: dict[str, str] = {}
        for identity in sorted(set(identities), key=lambda one: self.stored[one].shard):
            place = self.stored[identity]
            ids = Shard(self.dataset / place.shard).document(place.number).tolist()
            assert ids[-1] == self.manifest.end_of_text_id, "a document has no end"
            texts[identity] = tokenizer.decode(ids[:-1], skip_special_tokens=False)
        return texts

    # --- near duplicates that nobody planted ---

    def compare_own_near(self, num_sampled: int) -> Iterator[Line]:
        """A sample of them, word by word with the document that each resembles most."""
        sample = random.Random(2).sample(sorted(self.own_near), min(num_sampled, len(self.own_near)))
        if not sample:
            return
        similar = self.find_similar(sample)
        settings = load_config(self.run_file).data.deduplicate
        assert settings is not None and settings.near is not None
        wanted = settings.near.similarity
        error = (wanted * (1 - wanted) / settings.near.num_permutations) ** 0.5
        least = wanted - 4 * error
        kept = sorted(similar[identity][True] for identity in sample)
        found = [max(similar[identity].values()) for identity in sample]
        print(f"\nThe text's own near duplicates: {len(self.own_near)}. Of {len(sample)}, the exact similarity to the document that stays")
        print(
            f"and is most alike: {kept[0]:.3f} at least, {kept[len(kept) // 2]:.3f} in the middle, {sum(one >= wanted for one in kept)} at"
        )
        print(f"{wanted} or above, {sum(one < least for one in kept)} below {least:.3f}. To any document, also of those that were")
        print(f"dropped beside it: {min(found):.3f} at least, {sum(one >= wanted for one in found)} at {wanted} or above.\n")
        alike = sum(one >= least for one in found)
        yield equal("all", f"own near duplicates with one at {wanted} less 4 standard errors", len(sample), alike)

    def find_similar(self, sample: Sequence[str]) -> dict[str, dict[bool, float]]:
        """The greatest exact similarity of each document to one that stays (True), and to one that was dropped (False).

        The pipeline's hashes of shingles only choose what is compared.
        """
        texts = dict(self.read_cleaned(set(sample)))
        shingles = {identity: split_shingles(text) for identity, text in texts.items()}
        hashes = np.unique(np.concatenate([hash_all(text) for text in texts.values()]))
        best = {identity: {True: 0.0, False: 0.0} for identity in sample}
        for identity, text in self.read_cleaned(self.stored.keys() | self.missing):
            own = hash_all(text)
            places = np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)
            if np.count_nonzero(hashes[places] == own) < 0.3 * len(own):
                continue
            others = split_shingles(text)
            for one in sample:
                if one != identity:
                    stays = identity in self.stored
                    best[one][stays] = max(best[one][stays], jaccard(shingles[one], others))
        return best

    def read_cleaned(self, identities: Set[str]) -> Iterator[tuple[str, str]]:
        """Documents of the corpus, and their texts after cleaning."""
        data = load_config(self.run_file).data
        mending = bind_rules([section for section in data.clean if section.rule.startswith(("repair", "normalize", "redact"))], "")
        for unit in plan_units(data).units:
            for document in read_unit(unit, data.largest_document_bytes):
                if isinstance(document, Document) and document.document_id in identities:
                    for _, rule in mending:
                        mended = rule(document)
                        assert isinstance(mended, Document)
                        document = mended
                    yield document.document_id, document.text


def equal(source: str, what: str, planted: int, found: int) -> Line:
    """A line of two numbers."""
    return Line(source, what, str(planted), str(found), planted == found)


def name_row(row: Mapping[str, Any]) -> tuple[str, str, int, str]:
    """Where a document stands, and what became of it."""
    return row["source"], row["file"], row["position"], row["reason"]


def hash_all(text: str) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    """The hashes of a text's shingles."""
    return hash_shingles(*hash_words([text]), 5)[0]


def print_lines(lines: Sequence[Line]) -> None:
    """A table."""
    cells = [("source", "what", "planted", "found", "equal")]
    cells += [(line.source, line.what, line.planted, line.found, "yes" if line.is_equal else "NO") for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for (above, *_), row in zip([cells[0], *cells[:-1]], cells, strict=True):
        if row[0] != above:
            print()
        source, what, *numbers, verdict = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(
            "  ".join(
                [source, what, *(number.strip().rjust(width) for number, width in zip(numbers, widths[2:], strict=False)), verdict.strip()]
            )
        )


def print_stages(report: Mapping[str, Any]) -> None:
    """What the build took, by its report."""
    print(f"\n{'stage':<10} {'seconds':>8} {'documents/s':>12} {'MB/s':>8} {'peak of a worker':>17}")
    for stage in report["stages"]:
        rate = stage["per_second"]
        print(
            f"{stage['stage']:<10} {stage['seconds']:>8.1f} {rate['documents']:>12.0f} {rate['megabytes']:>8.2f} "
            f"{stage['peak_worker_bytes'] / 1e6:>14.0f} MB"
        )
    print(f"workers: {report['workers']}; deduplication: {json.dumps(report['deduplication'])}")


def check_dataset(dataset: Path, planted: Path, num_sampled: int = 500, num_own: int = 50) -> bool:
    """Compare and print; whether all is equal."""
    comparison = Comparison(dataset, planted)
    print(f"{dataset} beside {planted} ({comparison.plan['bytes'] / 1e6:.1f} MB on disk, seed {comparison.plan['seed']})")
    print_stages(comparison.report)
    lines = [*comparison.lines(num_sampled), *comparison.compare_own_near(num_own)]
    print_lines(lines)
    different = [line for line in lines if not line.is_equal]
    print(f"\n{len(lines)} lines, {len(different)} differ")
    return not different


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make", help="make the corpus")
    make.add_argument("folder", nargs="?", type=Path, default=Path(FOLDER))
    make.add_argument("--megabytes", type=float, default=200.0, help="of text, before anything is planted")
    make.add_argument("--from-folder", action="append", help="take texts from here instead of from all over the machine; may be repeated")
    make.add_argument("--no-packages", action="store_true", help="download nothing")
    make.add_argument("--seed", type=int, default=1)
    check = verbs.add_parser("check", help="compare a built dataset with what was planted")
    check.add_argument("dataset", nargs="?", type=Path, default=Path(DATASET))
    check.add_argument("--planted", type=Path, default=Path(FOLDER) / "planted.json")
    check.add_argument("--sample", type=int, default=500, help="documents that are decoded")
    options = parser.parse_args(arguments)
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # started as a file, its neighbours are not to be found otherwise
    if options.verb == "check":
        try:
            return 0 if check_dataset(options.dataset, options.planted, options.sample) else 1
        except UserError as error:
            parser.exit(2, f"{error}\n")
    run_file = make_corpus(options.folder, options.megabytes, options.from_folder, not options.no_packages, options.seed)
    plan = json.loads((options.folder / "planted.json").read_bytes())
    total = sum(source["read"] for source in plan["sources"].values())
    print(f"{options.folder}: {total} documents, {plan['bytes'] / 1e6:.1f} MB on disk; planted:")
    for way, number in plan["planted"].items():
        print(f"  {number:>6} {way}")
    print(f"build it with: pretrain data build {os.path.relpath(run_file)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
