"""Odd files: every one has a defined outcome, every document is kept or named, none is lost."""

from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.functions import load_function
from data_pipeline.documents import Document
from data_pipeline.formats import read_file
from tests.data_pipeline.reading import IDENTIFIED, LARGEST, describe, outcome, read


@pytest.mark.parametrize(
    ("kind", "content", "wanted"),
    [
        ("text", b"plain", ["plain"]),
        ("text", b"no final newline\r\nCRLF stays\r\n", ["no final newline\r\nCRLF stays\r\n"]),
        ("text", b"\xef\xbb\xbfmark", ["mark"]),
        ("text", b"a\0b", ["a\0b"]),
        ("text", b"", [("empty", 0, 0)]),
        ("text", b"\xef\xbb\xbf", [("empty", 0, 0)]),
        ("text", b" \n", [" \n"]),
        ("text", b"abc\xffd", [("bad_utf8", 0, 3)]),
        ("text", b"\xef\xbb\xbfab\xff", [("bad_utf8", 0, 5)]),
        ("text", b"cut \xf0\x9f\xa6", [("bad_utf8", 0, 4)]),
        ("text", "half \ud800".encode("utf-8", "surrogatepass"), [("bad_utf8", 0, 5)]),
        ("text", b"\xff\xfeU\0T\0F\0", [("bad_utf8", 0, 0)]),
        ("text", b"x" * LARGEST, ["x" * LARGEST]),
        ("text", b"x" * (LARGEST + 1), [("too_large", 0, 0)]),
        ("python", "# coding: koi8-r\ns = 'привет'\n".encode("koi8-r"), ["# coding: koi8-r\ns = 'привет'\n"]),
        ("python", b"#!/usr/bin/python\n# -*- coding: latin-1 -*-\n\xe9", ["#!/usr/bin/python\n# -*- coding: latin-1 -*-\né"]),
        ("python", b"\xef\xbb\xbfx = 1\r\n", ["x = 1\r\n"]),
        ("python", b"# coding: uft-8\n", [("bad_encoding", 0, 0)]),
        ("python", b"\xef\xbb\xbf# coding: latin-1\n", [("bad_encoding", 0, 0)]),
        ("python", b"# coding: ascii\n\n'\xe9'", [("bad_encoding", 0, 18)]),
        ("python", b"x = 1\n\n\n'\xe9'", [("bad_utf8", 0, 9)]),
        ("python", b"'\xe9'", [("bad_utf8", 0, 1)]),
        ("python", b"# coding: utf-7\n# +2AA-\n", [("lone_surrogate", 0, 0)]),
        ("python", b"# coding: unicode_escape\n\\ud800", [("lone_surrogate", 0, 0)]),
        ("python", b"# coding: hex\n61", [("bad_encoding", 0, 0)]),
        ("python", b"", [("empty", 0, 0)]),
        ("python", b"#" * (LARGEST + 1), [("too_large", 0, 0)]),
        ("jsonl", b"", []),
        ("jsonl", b'{"text": "a"}\n{"text": "b"}', ["a", "b"]),
        ("jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b\\r\\n"}\r\n', ["a", "b\r\n"]),
        ("jsonl", b'{"text": "a\xe2\x80\xa8b"}\n{"text": "\\u0000"}\n', ["a\u2028b", "\0"]),
        ("jsonl", b'{"text": ""}\n', [("empty", 0, 0)]),
        ("jsonl", b'{"text": "a"}\n{"text": \n{"text": "c"}\n', ["a", ("bad_json", 14, 14), "c"]),
        ("jsonl", b'{"text": "a"}\n{"text": "b', ["a", ("bad_json", 14, 14)]),
        ("jsonl", b'{"text": "\xff"}\n{"text": "c"}\n', [("bad_utf8", 0, 10), "c"]),
        ("jsonl", b'["text"]\n"text"\nnull\n', [("not_an_object", 0, 0), ("not_an_object", 9, 9), ("not_an_object", 16, 16)]),
        ("jsonl", b'{"body": "a"}\n', [("missing_field", 0, 0)]),
        ("jsonl", b'{"text": null}\n{"text": 3}\n{"text": ["a"]}\n', [("not_text", 0, 0), ("not_text", 15, 15), ("not_text", 27, 27)]),
        ("jsonl", b'{"text": "\\ud800"}\n{"text": "\\ud83e\\udd8a"}\n', [("lone_surrogate", 0, 0), "🦊"]),
        ("jsonl", b"[" * 900 + b"\n" + b'{"text": "b"}\n', [("bad_json", 0, 0), "b"]),
        ("jsonl", b'{"text": "' + b"x" * LARGEST + b'"}\n{"text": "b"}\n', [("too_large", 0, 0), "b"]),
        ("jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 3 * LARGEST, ["a", ("too_large", 14, 14)]),
        ("jsonl", b'{"text": "' + b"x" * (LARGEST - 12) + b'"}\r\n{"text": "b"}', ["x" * (LARGEST - 12), "b"]),
        ("jsonl", b'\xef\xbb\xbf{"text": "\xff"}', [("bad_utf8", 0, 13)]),
        ("jsonl", b'{"text": "a", "n": NaN}\n{"text": "b", "n": -Infinity}\n', ["a", "b"]),
        ("jsonl", b'{"text": "a", "n": "\\ud800"}\n{"text": "b", "\\ud800": 1}\n', ["a", "b"]),
        ("jsonl", b'{"text": "a", "text": "b"}\n{"text": "a", "text": 1}', ["b", ("not_text", 27, 27)]),
        ("jsonl", b'{"text": "a"}\x0b\n\x0b\x0c\n{"text": "c"} ', [("bad_json", 0, 0), "c"]),
        ("jsonl", b'{"text": "a", "n": ' + b"9" * 900 + b'}\n{"text": "b"}\n', ["a", "b"]),
    ],
)  # fmt: skip
def test_odd_files(tmp_path, kind, content, wanted):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert read(path, kind) == wanted


def rows_of_file(path: Path, repeat: int = 1):
    for line in path.read_text().split():
        yield from [{"text": line, "id": len(line), "url": path.suffix}] * repeat
    yield "no mapping"


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    path = tmp_path / "words.odd"
    path.write_text(f"one three {'x' * 1001}")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rows.py").write_text(Path(__file__).read_text())
    _, digest = load_function("my_rows:rows_of_file")
    file = replace(describe(path, "my_rows:rows_of_file", **IDENTIFIED), settings=(("repeat", "2"),), function_sha256=digest)
    items = list(read_file(file, path, LARGEST))
    assert outcome(items) == ["one", "one", "three", "three", ("too_large", 4, None), ("too_large", 5, None), ("not_an_object", 6, None)]
    assert isinstance(items[2], Document) and items[2].name == "5" and items[2].metadata == {"url": ".odd"}
    (tmp_path / "my_rows.py").write_text("rows_of_file = None")
    with pytest.raises(UserError, match="was changed"):
        list(read_file(file, path, LARGEST))
