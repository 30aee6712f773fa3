"""Small corpora of every format, with duplicates and with documents that cannot be used.

In: a folder and a source of chance. Out: files, and the `data` section that reads them in some 30 work units.
"""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

from configs.data_section import DataSection, DeduplicationSection, NearDuplicatesSection, RuleSection, SourceSection, TokenizerSection

WORDS = (
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "naïve", "東京", "emoji", "🦊", "and", "NUL\x00",
    "come\r\n", "along", "12", "345", "times",
)  # fmt: skip
BAD_LINES = [b'{"text": "cut', b'{"text": "\xff"}', b'{"body": "b"}', b'{"text": 3}', b'{"text": "\\ud800"}', b'{"text": ""}', b"[1]"]
RULES = (RuleSection(rule="length", settings={"min_characters": 40}), RuleSection(rule="tests.faults.rules:pause"))
NEAR = DeduplicationSection(near=NearDuplicatesSection(num_permutations=32, num_bands=8))


def write_corpora(folder: Path, chosen: random.Random) -> Path:
    """Some 600 documents, 0.9 MB: lines (plain, .gz, .zst), texts, and a table; a fifth of them are there twice, or nearly."""
    documents = make_documents(chosen, 600)
    packed = [write_lines(part, chosen) for part in (documents[:60], documents[60:120], documents[120:150], documents[150:330])]
    (folder / "lines").mkdir(parents=True)
    (folder / "lines" / "a.jsonl.zst").write_bytes(zstandard.compress(packed[0]))
    (folder / "lines" / "b.jsonl.zst").write_bytes(zstandard.compress(packed[1]))
    (folder / "lines" / "c.jsonl.gz").write_bytes(gzip.compress(packed[2], mtime=0))
    (folder / "lines" / "cut.jsonl.gz").write_bytes(gzip.compress(packed[2], mtime=0)[:-20])
    (folder / "lines" / "d.jsonl").write_bytes(packed[3])
    for number, text in enumerate(documents[330:430]):
        path = folder / "texts" / f"{number % 3}" / f"{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (folder / "table").mkdir()
    table = pyarrow.table({"text": documents[430:], "number": list(range(len(documents) - 430))})
    pyarrow.parquet.write_table(table, folder / "table" / "rows.parquet", row_group_size=20)
    return folder


def make_documents(chosen: random.Random, num_documents: int) -> list[str]:
    """Texts of 4 to 500 words; every tenth is a copy of an earlier one, every other tenth nearly so."""
    documents: list[str] = []
    for number in range(num_documents):
        words = chosen.choices(WORDS, k=chosen.choice((4, 200, 300, 500)))
        if number % 10 == 7:
            words = chosen.choice(documents).split(" ")
        if number % 10 == 9:
            words = chosen.choice(documents).split(" ")
            words[chosen.randrange(len(words))] = f"changed{number}"
        documents.append(" ".join(words))
    return documents


def write_lines(documents: list[str], chosen: random.Random) -> bytes:
    """JSON lines of the documents, with a bad line among every ten or so."""
    lines = [json.dumps({"text": text, "url": f"https://example.org/{number}"}).encode() for number, text in enumerate(documents)]
    for _ in range(len(documents) // 10):
        lines.insert(chosen.randrange(1, len(lines)), chosen.choice(BAD_LINES))
    return b"\n".join(lines) + b"\n"


def describe_build(corpora: Path, root: Path, **changes: Any) -> DataSection:
    """The `data` section of a build of `write_corpora`'s folder into `root`."""
    settings: dict[str, Any] = {
        "root": str(root),
        "sources": tuple(SourceSection(name=name, path=str(corpora / name)) for name in ("lines", "texts", "table")),
        "clean": RULES,
        "tokenizer": TokenizerSection(vocabulary_size=400, training_bytes=60_000),
        "held_out_fraction": 0.1,
        "work_unit_bytes": 30_000,
        "shard_tokens": 8_000,
        "quarantine_limit": 0.5,
        "workers": 2,
    }
    return DataSection(**{**settings, **changes})
