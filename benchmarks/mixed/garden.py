"""Planting: the machine's documents, made distinct, and among them duplicates, documents for every rule, broken content.

In: texts, and the run file's rules. Out: a `Garden` of documents, each with what must become of it, which the rules' functions
said one by one, and of what was planted its construction.
"""

import io
import json
import random
import re
import string
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from benchmarks.mixed.documents import (
    BLOCKED_DOMAIN,
    BLOCKED_URL,
    KEPT,
    MAIL_HOST,
    MARKER,
    PLACES,
    SOURCES,
    Planned,
    Source,
    hash_text,
    jaccard,
    split_shingles,
)
from benchmarks.mixed.texts import LARGEST_CHARACTERS, SMALLEST_CHARACTERS, draw
from configs.loader import load_config
from data_pipeline.cleaning import bind_rules
from data_pipeline.documents import Document, Rule

NEAR_SIMILARITY = 0.9  # of planted pairs, at least


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


def insert(text: str, line: str, chooser: random.Random) -> str:
    """A text with one more line, anywhere but at the start."""
    lines = text.split("\n")
    lines.insert(chooser.randrange(1, len(lines) + 1), line)
    return "\n".join(lines)


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


def mark_exact_duplicates(documents: Iterable[Planned]) -> None:
    """Of documents that are equal after cleaning, all but the first are dropped."""
    seen: set[bytes] = set()
    for planned in sorted((one for one in documents if one.expected == KEPT), key=lambda one: one.order):
        if planned.digest in seen:
            planned.expected, planned.stage = "exact_duplicate", "dropped"
        seen.add(planned.digest)
