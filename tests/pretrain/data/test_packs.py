"""Samples that were packed: which pieces they are made of, over many shards; and no index that was changed is believed."""

import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from configs.durable import sha256_of_file
from configs.errors import UserError
from data_pipeline.packing import pack_documents, packs_name, write_packs
from data_pipeline.records import Counts, FileRecord, PackingRecord, ShardRecord
from pretrain.data.packs import PackedSource, Piece
from pretrain.data.remote import Find

T = 8


def write_index(folder: Path, name: str, document_lengths: list[int], lengths: tuple[int, ...] = (T,)) -> ShardRecord:
    """The packs of a shard, of which only the record is there besides."""
    starts = np.cumsum([0, *document_lengths])
    files, packings = {}, {}
    for length in lengths:
        packs, path = pack_documents(starts, length), Path(packs_name(folder / name, length))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_packs(path, packs)
        files[packs_name(name, length)] = FileRecord(bytes=path.stat().st_size, sha256=sha256_of_file(path))
        packings[str(length)] = PackingRecord(num_packs=packs.num_packs, documents_cut=0, padding_tokens=0, documents_cut_when_chopped=0)
    counts = Counts(num_tokens=int(starts[-1]), num_documents=len(document_lengths), num_bytes=1)
    return ShardRecord(name=name, files=files, sources={"web": counts}, packings=packings, **counts.model_dump())


def draw_indices(folder: Path, seed: int, num_shards: int = 4, lengths: tuple[int, ...] = (T,)) -> list[ShardRecord]:
    chosen = random.Random(seed)
    documents = [[chosen.randint(1, 3 * T) for _ in range(chosen.randint(1, 30))] for _ in range(num_shards)]
    return [write_index(folder, f"units/{number:05d}/train-00000", one, lengths) for number, one in enumerate(documents)]


def found_in(folder: Path) -> Find:
    return lambda name, record: folder / name


def samples_of(folder: Path, shard: ShardRecord, file: int, length: int = T) -> list[list[Piece]]:
    """As numpy reads them: the samples of a shard."""
    _, num_packs, *rest = np.load(packs_name(folder / shard.name, length)).tolist()
    starts, pieces = rest[: num_packs + 1], rest[num_packs + 1 :]
    firsts, counts = pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]
    return [[Piece(file, firsts[place], counts[place]) for place in range(first, end)] for first, end in pairwise(starts)]


def test_samples_are_those_of_the_shards_one_behind_the_other(tmp_path: Path, seed: int) -> None:
    """In any order of asking; files are counted from the source's first, and each length has packs of its own."""
    shards = draw_indices(tmp_path, seed, lengths=(T, 3))
    for length in (T, 3):
        expected = [sample for number, shard in enumerate(shards) for sample in samples_of(tmp_path, shard, 5 + number, length)]
        source = PackedSource(found_in(tmp_path), shards, 5, length)
        assert len(source) == len(expected) == sum(shard.packings[str(length)].num_packs for shard in shards)
        for number in random.Random(seed).choices(range(len(expected)), k=200):
            assert source.pieces(number) == expected[number]
        assert [source.pieces(number) for number in range(len(source))] == expected


def test_every_token_is_in_one_piece_and_no_sample_is_empty_or_too_long(tmp_path: Path, seed: int) -> None:
    shards = draw_indices(tmp_path, seed)
    source = PackedSource(found_in(tmp_path), shards, 0, T)
    pieces = [source.pieces(number) for number in range(len(source))]
    assert all(1 <= sum(piece.num_tokens for piece in sample) <= T for sample in pieces)
    found = sorted((file, token) for sample in pieces for file, first, count in sample for token in range(first, first + count))
    assert found == [(file, token) for file, shard in enumerate(shards) for token in range(shard.num_tokens)]


def test_a_source_without_shards_has_no_samples(tmp_path: Path) -> None:
    """As one of which nothing has arrived yet."""
    assert len(PackedSource(found_in(tmp_path), [], 3, T)) == 0


def test_only_the_index_that_is_asked_for_is_opened(tmp_path: Path, seed: int) -> None:
    """So opening a corpus costs the same for any size; and it is opened once."""
    shards = draw_indices(tmp_path, seed)
    expected = samples_of(tmp_path, shards[2], 2)
    for shard in (shards[0], shards[1], shards[3]):
        Path(packs_name(tmp_path / shard.name, T)).unlink()
    source = PackedSource(found_in(tmp_path), shards, 0, T)
    before = sum(shard.packings[str(T)].num_packs for shard in shards[:2])
    assert source.pieces(before) == expected[0]
    Path(packs_name(tmp_path / shards[2].name, T)).unlink()
    assert [source.pieces(before + number) for number in range(len(expected))] == expected
    with pytest.raises(UserError, match=r"units/00001/train-00000\.packed-8\.npy: no such file"):
        source.pieces(before - 1)


def test_a_length_that_was_not_packed_is_refused_before_anything_is_read(tmp_path: Path, seed: int) -> None:
    shards = draw_indices(tmp_path, seed)
    shards[2] = shards[2].model_copy(update={"packings": {"16": shards[2].packings[str(T)]}})
    with pytest.raises(UserError) as caught:
        PackedSource(found_in(tmp_path), shards, 0, T)
    assert str(caught.value) == (
        "units/00002/train-00000 has no packs of 8 tokens, which training.packing best_fit needs; add 8 to "
        "data.packed_lengths and build the data again, or set training.packing to chop."
    )


def test_no_changed_index_is_believed(tmp_path: Path, seed: int) -> None:
    """A flipped bit anywhere, a cut, more behind it, the packs of another shard or of another length."""
    shards = draw_indices(tmp_path, seed, num_shards=2, lengths=(T, 3))
    path = Path(packs_name(tmp_path / shards[0].name, T))
    whole = path.read_bytes()
    chosen = random.Random(seed)
    changed = [Path(packs_name(tmp_path / shards[1].name, T)).read_bytes(), Path(packs_name(tmp_path / shards[0].name, 3)).read_bytes()]
    changed += [whole[:size] for size in (0, 1, 127, 128, len(whole) - 8, len(whole) - 1)] + [whole + bytes(8)]
    for place in range(len(whole)) if len(whole) < 300 else chosen.sample(range(len(whole)), 300):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chosen.randrange(8)
        changed.append(bytes(flipped))
    for content in changed:
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: "):
            PackedSource(found_in(tmp_path), shards, 0, T).pieces(0)
    path.write_bytes(whole)
    assert PackedSource(found_in(tmp_path), shards, 0, T).pieces(0) == samples_of(tmp_path, shards[0], 0)[0]
