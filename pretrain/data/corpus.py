"""A dataset, opened for training: its sources as rows of tokens, and what the run must know about them.

In: the run configuration. Out: a `Corpus`, or a `UserError` when the data is unfinished, changed, or does not fit.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path

from configs.data_section import DataSection
from configs.errors import UserError
from configs.schema import RunConfig
from data_pipeline.arriving import Arriving, Shards, load_arrived, load_arriving
from data_pipeline.manifest import SPLITS, Manifest, load_manifest
from data_pipeline.packing import packs_name
from data_pipeline.records import ShardRecord
from pretrain.data.order import SourceSize
from pretrain.data.packs import PackedSource
from pretrain.data.remote import Sums, described_in, finder, open_cache
from pretrain.data.staged_tokens import StagedTokenFiles, wait_unless_closed
from pretrain.data.tokens import TokenFiles, TokenStream


@dataclass(frozen=True)
class HeldOutSource:
    """What of the held-out text is of one source."""

    name: str
    num_tokens: int
    num_bytes: int
    """Of its text, in UTF-8."""


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
    held_out_sources: tuple[HeldOutSource, ...] = ()
    """Those that have held-out text, as they stand one behind the other in it."""

    @property
    def has_begun(self) -> bool:
        """Whether the first unit of each source is there: with it the held-out text stands fast."""
        return all(source.has_begun for source in self.sources)

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
    folder, length = described_in(config.data), config.training.sequence_length
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
    held_out = [shard for source in found.values() for shard in source.held_out]
    closing = threading.Event()
    files, held_out_files = _open_tokens(config.data, folder, described, shards, held_out, closing)
    sizes: list[SourceSize] = []
    streams: list[TokenStream] = []
    packs: list[PackedSource] = []
    first = 0
    for name, source in learnt.items():
        streams.append(TokenStream(files, first, [shard.num_tokens for shard in source.shards]))
        if config.training.packing == "best_fit":
            packs.append(PackedSource(finder(config.data, partial(wait_unless_closed, closing)), source.shards, first, length))
        identities = tuple(hash_segment(segment, length if packs else None) for segment in source.segments)
        segments = _count_samples(source.segments, length, packed=bool(packs))
        sizes.append(SourceSize(name, segments, identities, config.data.train_while_building, source.is_complete))
        first += len(source.shards)
    if all(size.is_complete for size in sizes) and not sum(size.num_samples for size in sizes):
        raise UserError(
            f"{folder} has {sum(map(len, streams))} tokens to learn from in {len(sizes)} sources and one sample needs {length} of one; "
            "add text, or lower training.sequence_length."
        )
    return Corpus(
        tuple(sizes),
        tuple(streams),
        TokenStream(held_out_files, 0, [shard.num_tokens for shard in held_out]),
        sum(shard.num_bytes for shard in held_out),
        described.end_of_text_id,
        described.tokenizer_sha256,
        tuple(packs) or None,
        tuple(_count_held_out(name, source.held_out) for name, source in found.items() if source.held_out),
    )


def _count_held_out(name: str, shards: Sequence[ShardRecord]) -> HeldOutSource:
    return HeldOutSource(name, sum(shard.num_tokens for shard in shards), sum(shard.num_bytes for shard in shards))


def _open_tokens(
    data: DataSection,
    folder: Path,
    described: Manifest | Arriving,
    shards: Sequence[ShardRecord],
    held_out: Sequence[ShardRecord],
    closing: threading.Event,
) -> tuple[TokenFiles, TokenFiles]:
    """The tokens to learn from, and those that are held out."""
    dtype, end_of_text = described.dtype, described.end_of_text_id
    if not data.is_remote:
        return TokenFiles(folder, shards, dtype, end_of_text), TokenFiles(folder, held_out, dtype, end_of_text)
    wait = partial(wait_unless_closed, closing)
    sums = Sums(data, [*shards, *held_out], wait)
    cache = open_cache(data, folder.name, [*shards, *held_out], sums, wait)
    kinds = ((shards, 0), (held_out, len(shards)))
    learnt, kept = (StagedTokenFiles(records, dtype, end_of_text, cache, first, sums.ask, closing) for records, first in kinds)
    return learnt, kept


def hash_segment(shards: Sequence[ShardRecord], packed_length: int | None = None) -> str:
    """SHA-256 over the tokens of shards in their order, and over their packs where they are packed, whatever the files' names."""
    suffixes = [".bin"] if packed_length is None else [".bin", packs_name("", packed_length)]
    return sha256("".join(shard.sha256_of(suffix) for shard in shards for suffix in suffixes).encode()).hexdigest()


def _count_samples(segments: Sequence[Sequence[ShardRecord]], length: int, packed: bool) -> tuple[int, ...]:
    """Samples of each segment. One that begins in a segment's last tokens belongs to the segment that completes it."""
    if packed:
        return tuple(sum(shard.num_packs(length) for shard in segment) for segment in segments)
    ends = accumulate((sum(shard.num_tokens for shard in segment) for segment in segments), initial=0)
    return tuple(behind // length - before // length for before, behind in pairwise(ends))


def _whole(manifest: Manifest) -> dict[str, _Source]:
    """Each source as one segment."""
    train, held_out = (_by_source(manifest.shards(split)) for split in SPLITS)
    return {name: _Source([train.get(name, [])], held_out.get(name, [])) for name in train | held_out}


def _by_source(shards: Iterable[ShardRecord]) -> dict[str, list[ShardRecord]]:
    found: dict[str, list[ShardRecord]] = {}
    for shard in shards:
        found.setdefault(shard.source, []).append(shard)
    return found


def _units_of(manifest: Manifest) -> dict[str, _Source]:
    """Each source in its units, as they came while the dataset was built."""
    units: dict[int, Shards] = {}
    for split in SPLITS:
        for shard in manifest.shards(split):
            unit = units.setdefault(int(shard.name.split("/")[-2]), {})
            unit[split] = (*unit.get(split, ()), shard)
    by_source: dict[str, list[Shards]] = {}
    for _, unit in sorted(units.items()):
        (source,) = {shard.source for shards in unit.values() for shard in shards}
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
