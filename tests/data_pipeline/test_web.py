"""Archives of the web: which records become documents, and that a damaged archive enters whole or not at all."""

import gzip
import random
import sys
from pathlib import Path

import pytest
import zstandard

from configs.data_section import DataSection, SourceSection
from configs.errors import UserError
from data_pipeline import packed
from data_pipeline.documents import Document, Rejected
from data_pipeline.sources import plan_units, read_unit
from data_pipeline.web import split_records

LARGEST = 5000


def record(kind: str, content: bytes, number: int = 0, media: str = "text/plain", **headers: str) -> bytes:
    named = {
        "WARC-Type": kind,
        "WARC-Record-ID": f"<urn:uuid:{number}>",
        "WARC-Date": "2024-02-29T00:00:00Z",
        "WARC-Target-URI": f"https://host/{number}",
        "Content-Type": media,
        **{name.replace("_", "-"): value for name, value in headers.items()},
        "Content-Length": str(len(content)),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"WARC/1.0\r\n{head}\r\n".encode() + content + b"\r\n\r\n"


def page(body: bytes, number: int = 0, media: str = "text/html; charset=utf-8", more: bytes = b"") -> bytes:
    http = b"HTTP/1.1 200 OK\r\nContent-Type: " + media.encode() + b"\r\n" + more + b"\r\n" + body
    return record("response", http, number, "application/http; msgtype=response")


WET = [
    record("warcinfo", b"software: mine\r\n", media="application/warc-fields"),
    record("conversion", "naïve\r\ntext".encode(), 1, WARC_Identified_Content_Language="fra"),
    record("conversion", b"bad \xff", 2, WARC_Identified_Content_Language="eng"),
    record("conversion", b"", 3),
    record("metadata", b"a: b", 4),
    record("conversion", b"x" * (LARGEST + 1), 5),
    record("conversion", b"WARC/1.0\r\n\r\n" + b"last" * 100, 6),
]
PACKERS = {
    ".warc": b"".join,
    ".wet.gz": lambda records: b"".join(map(gzip.compress, records)),
    ".warc.gz": lambda records: gzip.compress(b"".join(records)),
    ".warc.zst": lambda records: b"".join(map(zstandard.ZstdCompressor(write_checksum=True).compress, records)),
}


def read(path: Path, **keys):
    plan = plan_units(DataSection(root="/nowhere", sources=(SourceSection(name="mine", path=str(path), **keys),)))
    return [item for unit in plan.units for item in read_unit(unit, LARGEST)]


def outcome(items):
    return [item.text if isinstance(item, Document) else (item.reason, item.position) for item in items]


WET_OUTCOME = ["naïve\r\ntext", ("bad_utf8", 2), ("empty", 3), ("too_large", 5), "WARC/1.0\r\n\r\n" + "last" * 100]


@pytest.mark.parametrize("suffix", PACKERS)
def test_conversion_records_give_their_text(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACKERS[suffix](WET))
    items = read(path)
    assert outcome(items) == WET_OUTCOME
    assert items[0].position == 1 and items[0].name is None
    assert dict(items[0].metadata) == {"url": "https://host/1", "date": "2024-02-29T00:00:00Z", "record_id": "urn:uuid:1"}
    monkeypatch.setattr(packed, "KEPT_BYTES", 100)
    assert read(path) == items


def test_what_is_asked_for_beside(tmp_path):
    (tmp_path / "a.wet").write_bytes(b"".join(WET))
    items = read(tmp_path, id_field="url", metadata_fields=("WARC-Identified-Content-Language", "date"))
    assert items[0].name == "https://host/1" and items[0].metadata["WARC-Identified-Content-Language"] == "fra"
    assert "WARC-Identified-Content-Language" not in items[-1].metadata
    with pytest.raises(UserError, match="no field 'language'; set metadata_fields to one of: url, date, record_id, warc-type"):
        read(tmp_path, metadata_fields=("language",))


@pytest.mark.parametrize("suffix", PACKERS)
def test_an_archive_that_is_cut_enters_whole_or_not_at_all(tmp_path, suffix, seed):
    """At a border between records, where nothing can be noticed, its records so far; elsewhere one rejection and nothing else."""
    chosen = random.Random(seed)
    path = tmp_path / f"a{suffix}"
    whole = PACKERS[suffix](WET)
    borders = {len(PACKERS[suffix](WET[:number])) for number in range(1, len(WET) + 1)}
    noticed = 0
    for size in {0, 1, len(whole) - 5, *chosen.sample(range(len(whole)), 100)}:
        path.write_bytes(whole[:size])
        found = outcome(read(path)) if size else []
        if found == [("damaged_file", 0)]:
            noticed += 1
        else:
            nearest = min(borders, key=lambda border: abs(border - size)) if size else 0
            assert abs(size - nearest) <= 4, size  # the empty lines behind a record hold nothing
            assert found == WET_OUTCOME[: len(found)]
    assert noticed > 85


@pytest.mark.parametrize(
    "content",
    [
        b"garbage",
        WET[0] + b"garbage\r\n" + WET[1],
        WET[1].replace(b"Content-Length: 12", b"Content-Length: 9"),
        WET[1].replace(b"Content-Length: 12", b"Content-Length: -1"),
        WET[1].replace(b"Content-Length", b"Content-Lxngth"),
        WET[1].replace(b"Content-Length: 12", b"Content-Length: 99999999999"),
        b"WARC/1.0\r\n" + b"a: b\r\n" * 200_000,
        b"WARC/1.0" + b"a" * 2_000_000,
    ],
)
def test_what_is_no_archive_is_damaged(tmp_path, content):
    (tmp_path / "a.warc").write_bytes(content)
    assert outcome(read(tmp_path)) == [("damaged_file", 0)]


def test_lines_of_any_end_and_folded_headers():
    content = b"\r\nWARC/1.1\nWARC-Type: conversion\nA:  b\n\tc\nContent-Length: 3\n\nabc\n\nWARC/1.0\r\ncontent-length:0\r\n\r\n"
    first, second = split_records((content[at : at + 7] for at in range(0, len(content), 7)), 100)
    assert (first.offset, first.content, first.headers["a"], first.kind) == (2, b"abc", "b c", "conversion")
    assert content[second.offset :].startswith(b"WARC/1.0") and second.num_bytes == 0


def test_pages_want_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.warc").write_bytes(page(b"<p>text</p>"))
    monkeypatch.setitem(sys.modules, "resiliparse.extract.html2text", None)
    with pytest.raises(UserError, match=r"the extra `web`"):
        read(tmp_path)


def test_pages_give_their_text(tmp_path):
    pytest.importorskip("resiliparse", reason="needs resiliparse, which pretrain[web] brings")
    main = "<html><head><title>t</title><script>no()</script></head><body><p>{}</p></body></html>"
    chunked = b"5\r\n<p>ab\r\n6\r\nc</p>\n\r\n0\r\n\r\n"
    records = [
        page(main.format("naïve").encode(), 0),
        page(main.format("привет").encode("koi8-r"), 1, "text/html; charset=koi8-r"),
        page(b"<meta charset=windows-1251>" + main.format("привет, как дела").encode("cp1251"), 2, "text/html"),
        page(gzip.compress(main.format("packed").encode()), 3, more=b"Content-Encoding: gzip\r\n"),
        page(chunked, 4, more=b"Transfer-Encoding: chunked\r\n"),
        page(b"not packed", 5, more=b"Content-Encoding: gzip\r\n"),
        page(b"{}", 6, "application/json"),
        page(b"<p>  </p>", 7),
        record("response", b"no http at all", 8, "application/http; msgtype=response"),
        record("response", b"1.2.3.4", 9, "text/dns"),
        record("request", b"GET / HTTP/1.1\r\n\r\n", 10, "application/http; msgtype=request"),
        page(gzip.compress(b"<p>" + b"x" * 2 * LARGEST), 11, more=b"Content-Encoding: gzip\r\n"),
        page(main.format("last").encode(), 12),
    ]
    (tmp_path / "a.warc.gz").write_bytes(b"".join(map(gzip.compress, records)))
    items = read(tmp_path)
    assert outcome(items) == [
        "naïve", "привет", "привет, как дела", "packed", "abc", ("bad_encoding", 5), ("empty", 7), ("too_large", 11), "last",
    ]  # fmt: skip
    assert isinstance(items[-1], Document) and items[-1].metadata["url"] == "https://host/12"
    assert all(isinstance(item, Document | Rejected) for item in items)


@pytest.mark.parametrize(
    ("charset", "body", "wanted"),
    [
        ("punycode", b"<p>plain \xe2\x82\xac</p>", "plain €"),
        ("undefined", b"<p>plain</p>", "plain"),
        ("a\0b", b"<p>plain</p>", "plain"),
        ("utf-7", b"<p>half +2AA- </p>", ("lone_surrogate", 0)),
    ],
)
def test_a_servers_odd_charset_fails_no_unit(tmp_path, charset, body, wanted):
    pytest.importorskip("resiliparse", reason="needs resiliparse, which pretrain[web] brings")
    (tmp_path / "a.warc").write_bytes(page(body, media=f"text/html; charset={charset}"))
    assert outcome(read(tmp_path)) == [wanted]
