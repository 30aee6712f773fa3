"""What a report says of packings: counts are added over sources and shards, and shares follow from the sums."""

import json

from data_pipeline.manifest import FORMAT_VERSION, Manifest
from data_pipeline.records import Counts, DocumentCounts, PackingRecord, ShardRecord
from data_pipeline.report import describe_build, describe_sources


def shard(source: str, num_tokens: int, num_documents: int, packings: dict[int, tuple[int, int, int, int]]) -> ShardRecord:
    """packings: by length the numbers of a `PackingRecord`, in its order."""
    counts = Counts(num_tokens=num_tokens, num_documents=num_documents, num_bytes=num_tokens)
    records = {str(length): dict(zip(PackingRecord.model_fields, numbers, strict=True)) for length, numbers in packings.items()}
    packed = {length: PackingRecord.model_validate(record) for length, record in records.items()}
    return ShardRecord(name="any", files={}, sources={source: counts}, packings=packed, **counts.model_dump())


def manifest(*train: ShardRecord) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_sha256="0" * 64,
        vocabulary_size=300,
        end_of_text="",
        end_of_text_id=0,
        dtype="uint16",
        configuration={},
        rules=(),
        libraries={},
        sources={name: DocumentCounts() for name in ("web", "code", "none")},
        inputs=(),
        splits={"train": train, "held_out": (shard("web", 1000, 10, {}),)},
    )


def test_shares_of_packings_are_of_sums():
    """A large source and a small one: the mean of their shares would be another number. What is held out does not count."""
    described = describe_build(
        manifest(
            shard("web", 798, 80, {10: (80, 8, 2, 40), 100: (9, 0, 102, 5)}),
            shard("web", 209, 20, {10: (21, 4, 1, 10), 100: (3, 0, 91, 2)}),
            shard("code", 15, 1, {10: (2, 1, 5, 1), 100: (1, 0, 85, 0)}),
        ),
        [],
        {},
    )
    assert described == json.loads(json.dumps(described))
    assert described["packings"]["10"] == {
        "best_fit": {
            "num_samples": 103,
            "num_documents": 101,
            "documents_cut": 13,
            "padding_tokens": 8,
            "share_of_documents_cut": 13 / 101,
            "share_of_padding": 8 / 1030,
        },
        "chop": {
            "num_samples": 100 + 1,  # the tokens of a source's shards stand one behind the other
            "num_documents": 101,
            "documents_cut": 51,
            "padding_tokens": 0,
            "share_of_documents_cut": 51 / 101,
            "share_of_padding": 0.0,
        },
    }
    assert described["packings"]["100"]["best_fit"]["share_of_padding"] == 278 / 1300
    assert described["packings"]["100"]["chop"]["num_samples"] == 10
    assert described["sources"]["web"]["packings"]["10"]["best_fit"]["share_of_documents_cut"] == 12 / 100
    assert described["sources"]["code"]["packings"]["100"]["chop"]["num_samples"] == 0
    assert described["sources"]["none"]["packings"] == {}


def test_without_packed_lengths_nothing_is_said():
    bare = manifest(shard("web", 15, 1, {}))
    assert describe_build(bare, [], {})["packings"] == {}
    assert [one["packings"] for one in describe_sources(bare).values()] == [{}, {}, {}]
