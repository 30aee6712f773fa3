"""Whether a finished dataset is still what its manifest says, byte for byte.

In: a dataset's folder. Out: a sentence for each thing that is wrong with it.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from configs.durable import sha256_of_file
from configs.errors import UserError
from data_pipeline.manifest import MANIFEST, SPLITS, TOKENIZER, Manifest, load_manifest
from data_pipeline.records import ShardRecord
from data_pipeline.shards import Shard

BLOCK_TOKENS = 1 << 22


def verify_dataset(folder: Path, progress: Callable[[int], None] | None = None) -> list[str]:
    """Read every byte of a dataset and say what is wrong with it, a sentence per problem; an empty list: nothing.

    `progress` is called with the bytes checked since its last call. Raises UserError as `load_manifest` does.
    """
    manifest = load_manifest(folder)
    problems: list[str] = []
    tell = progress or (lambda _: None)
    problems += _verify_file(folder, TOKENIZER, None, manifest.tokenizer_sha256, tell)
    for split in SPLITS:
        for shard in manifest.shards(split):
            damaged = [
                problem for name, record in shard.files.items() for problem in _verify_file(folder, name, record.bytes, record.sha256, tell)
            ]
            # The tokens of damaged files would only say once more that these are damaged.
            problems += damaged or _verify_tokens(folder, shard, manifest)
    kept = sum(manifest.total(split).num_documents for split in SPLITS)
    counts = manifest.documents
    if counts.kept != kept or not counts.adds_up:
        problems.append(f"{MANIFEST}: its counts of documents do not add up")
    return problems


def dataset_bytes(manifest: Manifest) -> int:
    """Bytes of all shard files: what `verify_dataset` will read, but for the tokenizer."""
    return sum(record.bytes for split in SPLITS for shard in manifest.shards(split) for record in shard.files.values())


def _verify_file(folder: Path, name: str, size: int | None, sha256: str, tell: Callable[[int], None]) -> list[str]:
    path = folder / name
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            return [f"{name}: {found} bytes, the manifest has {size}"]
        digest = sha256_of_file(path)
    except FileNotFoundError:
        return [f"{name}: missing"]
    except OSError as error:
        return [f"{name}: cannot be read: {error}"]
    tell(found)
    return [] if digest == sha256 else [f"{name}: its SHA-256 differs from the manifest's; at least one bit has changed"]


def _verify_tokens(folder: Path, record: ShardRecord, manifest: Manifest) -> list[str]:
    try:
        shard = Shard(folder / record.name)
    except UserError as error:
        return [str(error)]
    problems: list[str] = []
    if str(shard.tokens.dtype) != manifest.dtype:
        problems.append(f"{record.name}: its tokens are {shard.tokens.dtype}, the manifest has {manifest.dtype}")
    if (shard.num_tokens, shard.num_documents) != (record.num_tokens, record.num_documents):
        problems.append(f"{record.name}: {shard.num_tokens} tokens in {shard.num_documents} documents; the manifest has others")
    blocks = (shard.tokens[start : start + BLOCK_TOKENS] for start in range(0, shard.num_tokens, BLOCK_TOKENS))
    if any(int(block.max()) >= manifest.vocabulary_size or int(block.min()) < 0 for block in blocks):
        problems.append(f"{record.name}.bin: holds token ids outside the vocabulary of {manifest.vocabulary_size}")
    ends = shard.document_starts[1:] - 1
    if shard.num_documents and not np.all(shard.tokens[ends] == manifest.end_of_text_id):
        problems.append(f"{record.name}.bin: a document does not end with the end-of-text token")
    return problems
