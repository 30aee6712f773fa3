"""What a built dataset holds: its counts, and real documents with their tokens.

In: a dataset's folder. Out: plain values, ready for JSON; `pretrain/data_view.py` lays them out for people. Nothing is
written. No more is read than is shown: the manifest, and single documents.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from configs.durable import sha256_of_file
from configs.errors import UserError
from data_pipeline.manifest import MANIFEST, SPLITS, TOKENIZER, Manifest, Split, load_manifest
from data_pipeline.records import Counts, ShardRecord
from data_pipeline.report import EXAMPLES_FOLDER, describe_sources, sum_by_source, sum_packings
from data_pipeline.shards import Shard, read_spans
from data_pipeline.tokenizer import load_tokenizer

EXAMPLES = 3  # of a dataset: so many documents, but one at least of each of the first sources
EXAMPLE_SOURCES = 8
EXAMPLE_TOKENS = 80
SHOWN_NAMESAKES = 10  # of documents that have the same name
BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class ShownDocument:
    """A document as the model sees it."""

    document_id: str
    source: str
    split: Split
    shard: str
    number: int
    """Of the document in its shard, from 0."""
    file: str
    position: int
    name: str | None
    metadata: Any
    num_tokens: int
    """Of the whole document, end of text included."""
    num_bytes: int
    ids: list[int]
    """Of its first tokens."""
    pieces: list[str]
    """What each of `ids` stands for; bytes that are no whole character on their own as \\xNN."""
    text: str
    """What `ids` stand for together."""
    last_piece: str
    """The end of the text."""


def show_dataset(folder: Path) -> dict[str, Any]:
    """A dataset's counts, mixture, rules, libraries and some documents' starts. Raises UserError when it is missing or damaged."""
    manifest = load_manifest(folder)
    by_source = {split: sum_by_source(manifest.shards(split)) for split in SPLITS}
    train = manifest.total("train").num_tokens
    return {
        "folder": str(folder),
        "sha256": sha256_of_file(folder / MANIFEST),
        "format_version": manifest.format_version,
        "tokenizer": tokenizer_facts(manifest),
        "documents": manifest.documents.model_dump(),
        "sources": (sources := describe_sources(manifest)),
        "packings": sum_packings(one["packings"] for one in sources.values()),
        "mixture": {name: round(counts.num_tokens / max(1, train), 6) for name, counts in by_source["train"].items()},
        "inputs": {"num_files": len(input_parts(manifest)), "num_bytes": sum(record.bytes for record in manifest.inputs)},
        "total": _summary(manifest.total("train") + manifest.total("held_out")),
        "splits": {
            split: {
                **_summary(manifest.total(split)),
                "num_shards": len(manifest.shards(split)),
                "sources": {name: _summary(counts) for name, counts in by_source[split].items()},
            }
            for split in SPLITS
        },
        "configuration": manifest.configuration,
        "rules": list(manifest.rules),
        "libraries": manifest.libraries,
        "examples": _examples(folder, manifest),
    }


def sample_documents(folder: Path, source: str | None, split: Split, count: int, seed: int, num_tokens: int) -> list[ShownDocument]:
    """Up to `count` documents of a source (None: of all), drawn evenly; the same for the same seed, in the shards' order.

    Of each the first `num_tokens` are decoded. Raises UserError: no such source, none of its documents in this split.
    """
    manifest = load_manifest(folder)
    _refuse_unknown_source(folder, manifest, source)
    shards = [(record, _num_documents(record, source)) for record in manifest.shards(split)]
    total = sum(num_documents for _, num_documents in shards)
    if not total:
        raise UserError(f"{folder}: {source or 'no source'} has no document in {split}; it has {_other_splits(manifest, source, split)}.")
    chosen = sorted(random.Random(seed).sample(range(total), min(count, total)))
    reader = _Reader(folder, manifest, num_tokens)
    documents: list[ShownDocument] = []
    first = 0
    for record, num_documents in shards:
        if ordinals := [ordinal - first for ordinal in chosen if first <= ordinal < first + num_documents]:
            documents += reader.read(split, record, source, ordinals)
        first += num_documents
    return documents


def find_document(folder: Path, wanted: str, source: str | None, num_tokens: int) -> ShownDocument:
    """The document of a source (None: of any) that has this id or, where none has, this name.

    Raises UserError: no such source, no such document, or several of that name, whose ids are listed.
    """
    manifest = load_manifest(folder)
    _refuse_unknown_source(folder, manifest, source)
    by_id = islice(_find_places(folder, manifest, "document_id", wanted, source), 1)  # no id is there twice
    places = list(by_id) or list(_find_places(folder, manifest, "name", wanted, source))
    reader = _Reader(folder, manifest, num_tokens)
    found = [reader.read(split, record, None, [number])[0] for split, record, number in places[:SHOWN_NAMESAKES]]
    if len(places) == 1:
        return found[0]
    if found:
        listed = "".join(f"\n  {one.document_id}  source {one.source}, file {one.file}, position {one.position}" for one in found)
        more = f"\n  ... and {len(places) - len(found)} more" if len(places) > len(found) else ""
        raise UserError(f"{folder}: {len(places)} documents have the name {wanted!r}; give the id of one:{listed}{more}")
    among = manifest.documents if source is None else manifest.sources[source]
    raise UserError(
        f"{folder}: none of {among.kept} documents{f' of {source}' if source else ''} has the id or the name {wanted!r}; names are what "
        f"the field of data.sources id_field holds. If it was left out, {EXAMPLES_FOLDER}/*.jsonl or units/*/quarantine.jsonl may name it."
    )


def split_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token stands for on its own. A byte-level tokenizer's pieces are turned back into text, where a byte that
    belongs to a character of several tokens is written \\xNN; other tokenizers' pieces are given as they are spelled."""
    added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
    byte_level = type(tokenizer.decoder).__name__ == "ByteLevel"
    byte_of = _bytes_of_letters() if byte_level else {}
    pieces: list[str] = []
    for number in ids:
        piece = tokenizer.id_to_token(number) or f"<{number}>"
        if number not in added and byte_level:
            piece = bytes(byte_of[letter] for letter in piece).decode("utf-8", "backslashreplace")
        pieces.append(piece)
    return pieces


class _Reader:
    """Reads documents of one dataset; its tokenizer is loaded once."""

    def __init__(self, folder: Path, manifest: Manifest, num_tokens: int) -> None:
        self._folder, self._num_tokens = folder, num_tokens
        self._tokenizer = load_tokenizer(folder / TOKENIZER, manifest.end_of_text)

    def read(self, split: Split, record: ShardRecord, source: str | None, ordinals: Sequence[int]) -> list[ShownDocument]:
        """Documents of a shard by their numbers among those of a source (None: among all)."""
        shard = Shard(self._folder / record.name)
        spans = read_spans(self._folder / record.name)
        numbers = list(ordinals)
        if source is not None:
            places = [place for place, name in enumerate(spans["source"].to_pylist()) if name == source]
            numbers = [places[ordinal] for ordinal in ordinals]
        rows = spans.take(numbers).to_pylist()
        return [self._show(split, record.name, number, shard.document(number), row) for number, row in zip(numbers, rows, strict=True)]

    def _show(self, split: Split, shard: str, number: int, tokens: np.ndarray[Any, Any], row: dict[str, Any]) -> ShownDocument:
        ids = [int(token) for token in tokens[: self._num_tokens]]
        pieces = split_pieces(self._tokenizer, ids)
        facts = {key: row[key] for key in ("document_id", "source", "file", "position", "name", "num_tokens", "num_bytes")}
        return ShownDocument(
            **facts,
            split=split,
            shard=shard,
            number=number,
            metadata=json.loads(row["metadata"]) if row["metadata"] else None,
            ids=ids,
            pieces=pieces,
            text=self._tokenizer.decode(ids, skip_special_tokens=False),
            last_piece=split_pieces(self._tokenizer, [int(tokens[-1])])[0],
        )


def _examples(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The starts of a few training documents: of each of the first sources, the first ones of its first shard."""
    names = list(sum_by_source(manifest.shards("train")))[:EXAMPLE_SOURCES]
    reader = _Reader(folder, manifest, EXAMPLE_TOKENS)
    examples: list[dict[str, Any]] = []
    for name in names:
        record = next(record for record in manifest.shards("train") if name in record.sources)
        wanted = range(min(max(1, EXAMPLES // len(names)), record.sources[name].num_documents))
        for document in reader.read("train", record, name, wanted):
            text = document.text.rstrip("\ufffd")  # a character that the cut went through
            keys = ("document_id", "source", "file", "position", "name", "num_tokens")
            examples.append({**{key: getattr(document, key) for key in keys}, "text": text})
    return examples


def _summary(counts: Counts) -> dict[str, Any]:
    ratio = round(counts.num_bytes / counts.num_tokens, 4) if counts.num_tokens else None
    return {**counts.model_dump(), "bytes_per_token": ratio}


def tokenizer_facts(manifest: Manifest) -> dict[str, Any]:
    """What the manifest says of the tokenizer."""
    return {
        "sha256": manifest.tokenizer_sha256,
        "vocabulary_size": manifest.vocabulary_size,
        "end_of_text": manifest.end_of_text,
        "end_of_text_id": manifest.end_of_text_id,
        "dtype": manifest.dtype,
    }


def input_parts(manifest: Manifest) -> dict[str, list[tuple[int, str]]]:
    """Every file that was read, by `source:file`, with size and SHA-256 of each of its parts."""
    files: dict[str, list[tuple[int, str]]] = {}
    for record in manifest.inputs:
        files.setdefault(f"{record.source}:{record.file}", []).append((record.bytes, record.sha256))
    return files


def _num_documents(record: ShardRecord, source: str | None) -> int:
    return record.num_documents if source is None else record.sources.get(source, Counts()).num_documents


def _refuse_unknown_source(folder: Path, manifest: Manifest, source: str | None) -> None:
    if source is None or source in manifest.sources:
        return
    near = get_close_matches(source, manifest.sources, 1)
    raise UserError(
        f"{folder} has no source {source!r}; {f'did you mean {near[0]!r}? ' if near else ''}it has: {', '.join(manifest.sources)}."
    )


def _other_splits(manifest: Manifest, source: str | None, split: Split) -> str:
    others: list[Split] = [other for other in SPLITS if other != split]
    return ", ".join(f"{sum(_num_documents(record, source) for record in manifest.shards(other))} in {other}" for other in others)


def _bytes_of_letters() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte (GPT-2's alphabet), the other way round."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(rest)}


def read_columns(prefix: Path, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """Some columns of a sidecar, a batch of rows at a time. Raises UserError when it is missing or damaged."""
    import pyarrow
    import pyarrow.parquet

    path = Path(f"{prefix}.documents.parquet")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                yield tuple(batch.column(name) for name in columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error}); check the dataset with `pretrain data verify`.") from None


def _find_places(
    folder: Path, manifest: Manifest, column: Literal["document_id", "name"], value: str, source: str | None
) -> Iterator[tuple[Split, ShardRecord, int]]:
    """Of each document of a source (None: of all) that has this id or name: its shard, and its number in it."""
    import pyarrow.compute

    for split in SPLITS:
        for record in manifest.shards(split):
            first = 0
            for values, sources in read_columns(folder / record.name, [column, "source"]):
                place = -1
                while (place := pyarrow.compute.index(values, value, place + 1).as_py()) >= 0:
                    if source is None or sources[place].as_py() == source:
                        yield split, record, first + place
                first += len(values)
