"""A built dataset, opened for training: its sources as rows of tokens, and what the run must know about them.

In: the run configuration. Out: a `Corpus`, or a `UserError` when the data is unfinished, changed, or does not fit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from configs.errors import UserError
from configs.schema import RunConfig
from data_pipeline.manifest import ShardRecord, load_manifest
from data_pipeline.packing import packs_name
from pretrain.data.order import SourceSize
from pretrain.data.packs import PackedSource
from pretrain.data.tokens import TokenFiles, TokenStream


@dataclass(frozen=True)
class Corpus:
    """Tokens of both splits, mapped into memory when they are read."""

    sources: tuple[SourceSize, ...]
    streams: tuple[TokenStream, ...]
    """The tokens to learn from, by source."""
    held_out: TokenStream
    held_out_bytes: int
    """Bytes of the held-out text, in UTF-8."""
    end_of_text: int
    tokenizer_sha256: str
    packs: tuple[PackedSource, ...] | None = None
    """By source, what its samples are made of; None where its tokens are chopped."""


def open_corpus(config: RunConfig) -> Corpus:
    """Open the dataset that `config.data` names. Raises UserError."""
    folder, length = Path(config.data.folder()), config.training.sequence_length
    manifest = load_manifest(folder)
    if manifest.vocabulary_size > config.model.vocabulary_size:
        raise UserError(
            f"{folder} has token ids up to {manifest.vocabulary_size - 1} and model.vocabulary_size is "
            f"{config.model.vocabulary_size}; it must be at least {manifest.vocabulary_size}."
        )
    by_source: dict[str, list[ShardRecord]] = {}
    for shard in manifest.shards("train"):
        by_source.setdefault(_source_of(shard), []).append(shard)
    files = TokenFiles(folder, [shard for shards in by_source.values() for shard in shards], manifest.dtype, manifest.end_of_text_id)
    sources: list[SourceSize] = []
    streams: list[TokenStream] = []
    packs: list[PackedSource] = []
    first = 0
    for name, shards in by_source.items():
        streams.append(TokenStream(files, first, [shard.num_tokens for shard in shards]))
        num_samples, suffix = len(streams[-1]) // length, ".bin"
        if config.training.packing == "best_fit":
            packs.append(PackedSource(folder, shards, first, length))
            num_samples, suffix = len(packs[-1]), packs_name("", length)
        sources.append(SourceSize(name, (num_samples,), hash_source(shards, {".bin", suffix})))
        first += len(shards)
    if not sum(source.num_samples for source in sources):
        raise UserError(
            f"{folder} has {sum(map(len, streams))} tokens to learn from in {len(sources)} sources and one sample needs {length} of one; "
            "add text, or lower training.sequence_length."
        )
    held_out = manifest.shards("held_out")
    held_out_files = TokenFiles(folder, held_out, manifest.dtype, manifest.end_of_text_id)
    return Corpus(
        tuple(sources),
        tuple(streams),
        TokenStream(held_out_files, 0, [shard.num_tokens for shard in held_out]),
        sum(shard.num_bytes for shard in held_out),
        manifest.end_of_text_id,
        manifest.tokenizer_sha256,
        tuple(packs) or None,
    )


def hash_source(shards: Sequence[ShardRecord], suffixes: Iterable[str] = (".bin",)) -> str:
    """SHA-256 over the tokens of a source's shards in their order, and what else its samples follow from, whatever the files' names."""
    names = [f"{shard.name}{suffix}" for shard in shards for suffix in sorted(suffixes)]
    files = {name: file for shard in shards for name, file in shard.files.items()}
    return sha256("".join(files[name].sha256 for name in names).encode()).hexdigest()


def _source_of(shard: ShardRecord) -> str:
    (source,) = shard.sources
    return source
