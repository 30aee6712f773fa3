"""A tiny dataset of real text, made without Ray: what training tests learn from."""

import random
from pathlib import Path

import numpy as np

from configs.durable import sha256_of_file
from data_pipeline.manifest import FORMAT_VERSION, Counts, DocumentCounts, FileRecord, Manifest, ShardRecord, write_manifest
from data_pipeline.shards import DocumentSpan, ShardWriter, write_spans
from data_pipeline.tokenizer import end_of_text_id, tokenizer_hash, train_tokenizer, vocabulary_size

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
        prefix = folder / name
        prefix.parent.mkdir(parents=True, exist_ok=True)
        spans = []
        with ShardWriter(prefix, np.dtype(np.uint16)) as writer:
            for number, text in enumerate(documents):
                tokens = np.array([*tokenizer.encode(text).ids, end])
                spans.append(DocumentSpan(f"{number:012x}", "sums", "sums.txt", number, writer.num_tokens, len(tokens), len(text.encode())))
                writer.add_document(tokens)
        write_spans(prefix, spans, {"tokenizer_sha256": tokenizer_hash(folder / "tokenizer.json")})
        counts = {
            "num_tokens": writer.num_tokens,
            "num_documents": len(documents),
            "num_bytes": sum(len(text.encode()) for text in documents),
        }
        files = {
            f"{name}{suffix}": FileRecord(bytes=Path(f"{prefix}{suffix}").stat().st_size, sha256=sha256_of_file(Path(f"{prefix}{suffix}")))
            for suffix in (".bin", ".idx", ".documents.parquet")
        }
        records[name.rpartition("/")[2]].append(ShardRecord(name=name, files=files, sources={"sums": Counts(**counts)}, **counts))
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
