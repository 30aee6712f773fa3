"""A dataset, opened for training: its sources as rows of tokens, and what the run must know about them.

In: the run configuration. Out: a `Corpus`, or a `UserError` when the data is unfinished, changed, or does not fit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path

from configs.errors import UserError
from configs.schema import RunConfig
from data_pipeline.arriving import Arriving, Shards, load_arrived, load_arriving
from data_pipeline.manifest import SPLITS, Manifest, ShardRecord, load_manifest
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

    @property
    def has_begun(self) -> bool:
        """Whether the first unit of each source is there: with it the held-out text stands fast."""
        return all(source.is_complete or source.segments for source in self.sources)

    @property
    def is_complete(self) -> bool:
        """Whether everything is there that a build will give."""
        return all(source.is_complete for source in self.sources)


@dataclass
class _Source:
    """The shards of a source, in segments that are shuffled each on its own."""

    segments: list[list[ShardRecord]]
    held_out: list[ShardRecord]
    is_complete: bool = True

    @property
    def shards(self) -> list[ShardRecord]:
        return [shard for segment in self.segments for shard in segment]


def open_corpus(config: RunConfig) -> Corpus:
    """Open the dataset that `config.data` names. Raises UserError."""
    folder, length = Path(config.data.folder()), config.training.sequence_length
    arriving = load_arriving(folder) if config.data.train_while_building else None
    described = arriving or load_manifest(folder)
    if described.vocabulary_size > config.model.vocabulary_size:
        raise UserError(
            f"{folder} has token ids up to {described.vocabulary_size - 1} and model.vocabulary_size is "
            f"{config.model.vocabulary_size}; it must be at least {described.vocabulary_size}."
        )
    if isinstance(described, Arriving):
        found = _arrived(folder, described)
    else:
        found = _units_of(described) if config.data.train_while_building else _whole(described)
    learnt = {name: source for name, source in found.items() if source.shards or not source.is_complete}
    shards = [shard for source in learnt.values() for shard in source.shards]
    files = TokenFiles(folder, shards, described.dtype, described.end_of_text_id)
    sizes: list[SourceSize] = []
    streams: list[TokenStream] = []
    packs: list[PackedSource] = []
    first = 0
    for name, source in learnt.items():
        streams.append(TokenStream(files, first, [shard.num_tokens for shard in source.shards]))
        if config.training.packing == "best_fit":
            packs.append(PackedSource(folder, source.shards, first, length))
        identities = tuple(hash_segment(segment, length if packs else None) for segment in source.segments)
        segments = _count_samples(source.segments, length, packed=bool(packs))
        sizes.append(SourceSize(name, segments, identities, config.data.train_while_building, source.is_complete))
        first += len(source.shards)
    if all(size.is_complete for size in sizes) and not sum(size.num_samples for size in sizes):
        raise UserError(
            f"{folder} has {sum(map(len, streams))} tokens to learn from in {len(sizes)} sources and one sample needs {length} of one; "
            "add text, or lower training.sequence_length."
        )
    held_out = [shard for source in found.values() for shard in source.held_out]
    held_out_files = TokenFiles(folder, held_out, described.dtype, described.end_of_text_id)
    return Corpus(
        tuple(sizes),
        tuple(streams),
        TokenStream(held_out_files, 0, [shard.num_tokens for shard in held_out]),
        sum(shard.num_bytes for shard in held_out),
        described.end_of_text_id,
        described.tokenizer_sha256,
        tuple(packs) or None,
    )


def hash_segment(shards: Sequence[ShardRecord], packed_length: int | None = None) -> str:
    """SHA-256 over the tokens of shards in their order, and over their packs where they are packed, whatever the files' names."""
    suffixes = [".bin"] if packed_length is None else [".bin", packs_name("", packed_length)]
    return sha256("".join(shard.files[shard.name + suffix].sha256 for shard in shards for suffix in suffixes).encode()).hexdigest()


def _count_samples(segments: Sequence[Sequence[ShardRecord]], length: int, packed: bool) -> tuple[int, ...]:
    """Samples of each segment. One that begins in a segment's last tokens belongs to the segment that completes it."""
    if packed:
        return tuple(sum(shard.packings[str(length)].num_packs for shard in segment) for segment in segments)
    ends = accumulate((sum(shard.num_tokens for shard in segment) for segment in segments), initial=0)
    return tuple(behind // length - before // length for before, behind in pairwise(ends))


def _whole(manifest: Manifest) -> dict[str, _Source]:
    """Each source as one segment."""
    found: dict[str, _Source] = {}
    for shard in manifest.shards("train"):
        found.setdefault(_source_of(shard), _Source([[]], [])).segments[0].append(shard)
    for shard in manifest.shards("held_out"):
        found.setdefault(_source_of(shard), _Source([[]], [])).held_out.append(shard)
    return found


def _units_of(manifest: Manifest) -> dict[str, _Source]:
    """Each source in its units, as they came while the dataset was built."""
    units: dict[int, Shards] = {}
    for split in SPLITS:
        for shard in manifest.shards(split):
            unit = units.setdefault(int(Path(shard.name).parent.name), {})
            unit[split] = (*unit.get(split, ()), shard)
    by_source: dict[str, list[Shards]] = {}
    for _, unit in sorted(units.items()):
        (source,) = {_source_of(shard) for shards in unit.values() for shard in shards}
        by_source.setdefault(source, []).append(unit)
    return {name: _in_units(of_source) for name, of_source in by_source.items()}


def _arrived(folder: Path, arriving: Arriving) -> dict[str, _Source]:
    """Each source up to its first unit that is not there."""
    found: dict[str, _Source] = {}
    for name in dict.fromkeys(unit.source for unit in arriving.units):
        numbers = [number for number, unit in enumerate(arriving.units) if unit.source == name]
        units: list[Shards] = []
        for number in numbers:
            unit = load_arrived(folder, arriving, number)
            if unit is None:
                break
            units.append(unit)
        found[name] = _in_units([unit for unit in units if unit], len(units) == len(numbers))
    return found


def _in_units(units: Iterable[Shards], is_complete: bool = True) -> _Source:
    units = list(units)
    held_out = [shard for unit in units[:1] for shard in unit.get("held_out", ())]
    return _Source([list(unit.get("train", ())) for unit in units], held_out, is_complete)


def _source_of(shard: ShardRecord) -> str:
    (source,) = shard.sources
    return source
