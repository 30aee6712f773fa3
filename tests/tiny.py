"""A tiny dataset of real text, made without Ray: what training tests learn from. And tokens of one's own as a corpus."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from configs.durable import sha256_of_file
from data_pipeline.checksums import write_checksums
from data_pipeline.manifest import FORMAT_VERSION, Manifest, write_manifest
from data_pipeline.records import Counts, DocumentCounts, FileRecord, ShardRecord
from data_pipeline.shards import DocumentSpan, ShardWriter, write_spans
from data_pipeline.tokenizer import end_of_text_id, tokenizer_hash, train_tokenizer, vocabulary_size
from pretrain.data.corpus import Corpus, hash_segment
from pretrain.data.order import SourceSize
from pretrain.data.tokens import TokenFiles, TokenStream

END_OF_TEXT = "<|endoftext|>"


def tiny_texts(num_documents: int, seed: int) -> list[str]:
    """Documents a small model can learn: sums, spelt out."""
    chooser = random.Random(seed)
    return [
        "\n".join(
            f"{a} plus {b} is {a + b}."
            for a, b in ((chooser.randrange(50), chooser.randrange(50)) for _ in range(chooser.randrange(3, 12)))
        )
        for _ in range(num_documents)
    ]


def write_tiny_dataset(folder: Path, num_documents: int = 300, seed: int = 7) -> Manifest:
    """Two training shards and a held-out one, with a tokenizer of 300 entries."""
    folder.mkdir(parents=True)
    texts = tiny_texts(num_documents, seed)
    tokenizer = train_tokenizer(texts, 300, END_OF_TEXT)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = end_of_text_id(tokenizer, END_OF_TEXT)
    third = num_documents // 3
    parts = {"units/00000/train": texts[:third], "units/00001/train": texts[third : 2 * third], "units/00001/held_out": texts[2 * third :]}
    records: dict[str, list[ShardRecord]] = {"train": [], "held_out": []}
    for name, documents in parts.items():
        tokens = [np.array([*tokenizer.encode(text).ids, end]) for text in documents]
        records[name.rpartition("/")[2]].append(
            write_shard(folder, name, "sums", tokens, num_bytes=[len(text.encode()) for text in documents])
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_sha256=tokenizer_hash(folder / "tokenizer.json"),
        vocabulary_size=vocabulary_size(tokenizer),
        end_of_text=END_OF_TEXT,
        end_of_text_id=end,
        dtype="uint16",
        configuration={},
        rules=(),
        libraries={},
        sources={"sums": DocumentCounts(read=num_documents, kept=num_documents)},
        inputs=(),
        splits={"train": tuple(records["train"]), "held_out": tuple(records["held_out"])},
    )
    write_manifest(folder, manifest)
    return manifest


def write_shard(
    folder: Path, name: str, source: str, documents: Sequence[np.ndarray], dtype: str = "uint16", num_bytes: Sequence[int] | None = None
) -> ShardRecord:
    """A shard as the pipeline would write it, of documents that end with their end of text; `num_bytes` of each one's text."""
    prefix = folder / name
    prefix.parent.mkdir(parents=True, exist_ok=True)
    spans: list[DocumentSpan] = []
    with ShardWriter(prefix, np.dtype(dtype)) as writer:
        for number, (tokens, size) in enumerate(zip(documents, num_bytes or [1] * len(documents), strict=True)):
            spans.append(DocumentSpan(f"{number:012x}", source, f"{source}.txt", number, writer.num_tokens, len(tokens), size))
            writer.add_document(tokens)
    write_checksums(prefix)
    tokenizer = folder / "tokenizer.json"
    write_spans(prefix, spans, {"tokenizer_sha256": tokenizer_hash(tokenizer)} if tokenizer.exists() else {})
    counts = Counts(num_tokens=writer.num_tokens, num_documents=len(spans), num_bytes=sum(span.num_bytes for span in spans))
    files = {
        f"{name}{suffix}": FileRecord(bytes=Path(f"{prefix}{suffix}").stat().st_size, sha256=sha256_of_file(Path(f"{prefix}{suffix}")))
        for suffix in (".bin", ".idx", ".crc32c", ".documents.parquet")
    }
    return ShardRecord(name=name, files=files, sources={source: counts}, **counts.model_dump())


def write_corpus(
    folder: Path, sources: Mapping[str, Sequence[np.ndarray]], sequence_length: int, end_of_text: int, dtype: str = "int32"
) -> Corpus:
    """Tokens of one's own as an opened corpus: of each source the tokens of each of its files; nothing is held out."""
    records = {
        name: [write_shard(folder, f"{name}-{number}", name, [tokens], dtype) for number, tokens in enumerate(files)]
        for name, files in sources.items()
    }
    files = TokenFiles(folder, [record for shards in records.values() for record in shards], dtype, end_of_text)
    sizes, streams, first = [], [], 0
    for name, shards in records.items():
        streams.append(TokenStream(files, first, [shard.num_tokens for shard in shards]))
        sizes.append(SourceSize(name, (len(streams[-1]) // sequence_length,), (hash_segment(shards),)))
        first += len(shards)
    held_out = TokenStream(TokenFiles(folder, (), dtype, end_of_text), 0, [])
    return Corpus(tuple(sizes), tuple(streams), held_out, 0, end_of_text, "no tokenizer")
