"""The files of a mixed corpus: of every source in its format, of damaged ones, of lists that rules read.

In: documents. Out: files, and in each document the place where it stands, its name and its metadata.
"""

import gzip
import json
import random
import string
import uuid
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet
import zstandard

from benchmarks.mixed.documents import BLOCKED_DOMAIN, BLOCKED_URL, KEPT, SOURCES, Planned, Source
from benchmarks.mixed.garden import Garden


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
