"""A dataset in a store, read through a cache: the true bytes whatever happens to either, each block once, never beyond the bound."""

import errno
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import crc32c
import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from configs.errors import UserError
from data_pipeline.checksums import BLOCK_BYTES
from data_pipeline.records import FileRecord
from pretrain.data import staging
from pretrain.data.staging import BLOCKS_AT_ONCE, FETCHES, FOLDER_BYTES, RANGE_BLOCKS, SLOT_BYTES, WAIT_SECONDS, BlockCache, stage_files

ROOT = Path(__file__).parent.parent.parent.parent
URL = "memory://data/set"
SIZES = (3 * BLOCK_BYTES + 100, BLOCK_BYTES, BLOCK_BYTES + 1, 50, 7 * BLOCK_BYTES - 2)
"""Of the usual files: 15 blocks, of which some are short."""
NUM_BLOCKS = 15
ROOMY = 1 << 30

Span = tuple[int, int, int]


class Store:
    """Files behind `memory://data/set/`: says what it was asked for, and answers as `answer` likes."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, int | None, int | None]]] = []
        """The name, first byte and end of each range, by calls."""
        self.answer: Callable[[str, int, bytes | Exception], bytes | Exception] = lambda name, first, content: content

    @property
    def ranges(self) -> list[tuple[str, int | None, int | None]]:
        return [one for call in self.calls for one in call]

    @property
    def num_bytes(self) -> int:
        return sum(end - first for _, first, end in self.ranges if first is not None and end is not None)

    @property
    def blocks(self) -> Counter[tuple[str, int]]:
        """How often each block was asked for."""
        return Counter((name, block) for name, first, end in self.ranges for block in range(first // BLOCK_BYTES, -(-end // BLOCK_BYTES)))

    def put(self, contents: Sequence[bytes]) -> None:
        for number, content in enumerate(contents):
            fsspec.filesystem("memory").pipe_file(f"/data/set/units/{number}.bin", content)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch):
    kept = Store()
    cat_ranges = MemoryFileSystem.cat_ranges

    def record(system, paths, starts, ends, on_error):
        names = [path.removeprefix("/data/set/") for path in paths]
        kept.calls.append(list(zip(names, starts, ends, strict=True)))
        answers = cat_ranges(system, paths, starts, ends, on_error=on_error)
        return [kept.answer(name, start or 0, answer) for name, start, answer in zip(names, starts, answers, strict=True)]

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", record)
    yield kept
    system = fsspec.filesystem("memory")
    for path in system.find("/data/set"):
        system.rm_file(path)


def make_contents(seed: int, sizes: Sequence[int] = SIZES) -> list[bytes]:
    chosen = np.random.default_rng(seed)
    return [chosen.bytes(size) for size in sizes]


def sums_of(content: bytes) -> np.ndarray:
    return np.array([crc32c.crc32c(content[at : at + BLOCK_BYTES]) for at in range(0, len(content), BLOCK_BYTES)], np.uint32)


def bound_of(num_slots: int) -> int:
    return FOLDER_BYTES + num_slots * SLOT_BYTES


def no_waiting(text: str) -> None:
    raise AssertionError(f"nothing should be tried again: {text}")


def open_cache(folder: Path, contents: Sequence[bytes], bound: int = ROOMY, url: str = URL, **more) -> BlockCache:
    sums = [sums_of(content) for content in contents]
    files = [(f"units/{number}.bin", len(content)) for number, content in enumerate(contents)]
    return BlockCache(url, files, sums.__getitem__, folder, "dataset", bound, **{"say": no_waiting, "sleep": no_waiting} | more)


def read(cache: BlockCache, spans: Sequence[Span]) -> bytes:
    file_p, first_byte_p, num_bytes_p = np.array(spans, dtype=np.int64).reshape(-1, 3).T
    return cache.read(file_p, first_byte_p, num_bytes_p).tobytes()


def true_bytes(contents: Sequence[bytes], spans: Sequence[Span]) -> bytes:
    return b"".join(contents[file][first : first + num] for file, first, num in spans)


def all_blocks(contents: Sequence[bytes]) -> list[Span]:
    return [
        (file, first, min(BLOCK_BYTES, len(content) - first))
        for file, content in enumerate(contents)
        for first in range(0, len(content), BLOCK_BYTES)
    ]


def choose_spans(chosen: random.Random, contents: Sequence[bytes], num: int, longest: int = 3 * BLOCK_BYTES) -> list[Span]:
    """Spans of lengths from none to three blocks, often at the edge of a block or of a file."""
    spans: list[Span] = []
    for _ in range(num):
        file = chosen.randrange(len(contents))
        size = len(contents[file])
        near = chosen.randrange(size // BLOCK_BYTES + 1) * BLOCK_BYTES + chosen.randint(-3, 3)
        first = chosen.choice([chosen.randrange(size + 1), min(size, max(0, near))])
        length = chosen.choice([0, 1, 4098, chosen.randrange(longest), size])
        spans.append((file, first, min(length, size - first)))
    return spans


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


# --- the bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [1, 2, 7, NUM_BLOCKS, 10_000])
def test_every_span_is_the_bytes_of_its_file(tmp_path: Path, store: Store, seed: int, num_slots: int) -> None:
    """However few blocks have room; alone, together, over and over, and from a cache that another has filled."""
    chosen, contents = random.Random(seed), make_contents(seed)
    store.put(contents)
    for _ in range(2):
        cache = open_cache(tmp_path, contents, bound_of(num_slots))
        for _ in range(60):
            spans = choose_spans(chosen, contents, chosen.choice([0, 1, 2, 20]))
            assert read(cache, spans) == true_bytes(contents, spans)
    assert (tmp_path / "dataset/blocks").stat().st_size == min(num_slots, NUM_BLOCKS) * BLOCK_BYTES


def test_what_is_read_is_memory_of_its_own(tmp_path: Path, store: Store, seed: int) -> None:
    """Rows of equal length are a view of it, and what is read later does not change it."""
    contents = make_contents(seed)
    store.put(contents)
    cache = open_cache(tmp_path, contents, bound_of(1))
    first = cache.read(np.array([0, 4]), np.array([10, 300_000]), np.array([400, 400]))
    kept = first.view(np.uint16).reshape(2, 200)
    read(cache, all_blocks(contents))
    assert first.flags.writeable
    np.testing.assert_array_equal(kept[0], np.frombuffer(contents[0][10:410], np.uint16))
    np.testing.assert_array_equal(kept[1], np.frombuffer(contents[4][300_000:300_400], np.uint16))


@pytest.mark.parametrize("span", [(0, -1, 5), (0, SIZES[0], 1), (1, BLOCK_BYTES - 4, 5), (3, 0, 51), (4, 10, -1)])
def test_a_span_that_leaves_its_file_is_refused(tmp_path: Path, store: Store, seed: int, span: Span) -> None:
    contents = make_contents(seed)
    store.put(contents)
    cache = open_cache(tmp_path, contents)
    with pytest.raises(IndexError, match=r"memory://data/set is not within its file"):
        read(cache, [(1, 0, 10), span])
    assert store.calls == []


# --- what is fetched ---------------------------------------------------------------------------------------


def test_a_corpus_that_fits_is_fetched_once(tmp_path: Path, store: Store, seed: int) -> None:
    """Each of its bytes, in the requests of whichever process comes first; nothing before it is asked for."""
    chosen, contents = random.Random(seed), make_contents(seed)
    store.put(contents)
    caches = [open_cache(tmp_path, contents) for _ in range(3)]
    assert store.calls == []
    seen: set[tuple[str, int]] = set()
    for _ in range(40):
        spans = choose_spans(chosen, contents, 2)
        touched = {
            (f"units/{file}.bin", block)
            for file, first, num in spans
            for block in range(first // BLOCK_BYTES, -(-(first + num) // BLOCK_BYTES) if num else 0)
        }
        seen |= touched
        assert read(chosen.choice(caches), spans) == true_bytes(contents, spans)
        assert store.blocks == Counter(dict.fromkeys(seen, 1))
    read(caches[0], all_blocks(contents))
    assert set(store.blocks.values()) == {1} and len(store.blocks) == NUM_BLOCKS
    assert store.num_bytes == sum(SIZES) == sum(cache.num_bytes_fetched for cache in caches)
    later = open_cache(tmp_path, contents)
    assert read(later, all_blocks(contents)) == b"".join(contents)
    assert store.num_bytes == sum(SIZES) and later.num_bytes_fetched == 0


def test_a_call_fetches_a_block_once_even_if_it_is_thrown_out_at_once(tmp_path: Path, store: Store, seed: int) -> None:
    chosen, contents = random.Random(seed), make_contents(seed)
    store.put(contents)
    cache = open_cache(tmp_path, contents, bound_of(1))
    spans = 3 * all_blocks(contents)
    chosen.shuffle(spans)
    assert read(cache, spans) == true_bytes(contents, spans)
    assert store.num_bytes == cache.num_bytes_fetched == sum(SIZES)
    assert set(store.blocks.values()) == {1}


def test_neighbours_are_joined_and_little_is_in_flight(tmp_path: Path, store: Store) -> None:
    """At most 16 blocks in a request and 256 at once; the first request is a single block, which shows whether the store cuts files."""
    size = 700 * BLOCK_BYTES - 9
    contents = [bytes(size), b"another file"]
    store.put(contents)
    cache = open_cache(tmp_path, contents)
    read(cache, [(0, 5 * BLOCK_BYTES, BLOCK_BYTES), (0, 9 * BLOCK_BYTES, 1)])
    edges = [[(5, 6)], [(9, 10)]]
    read(cache, [(0, 0, size), (1, 0, 3)])
    first = [(0, 5), (6, 9), (10, 26)] + [(at, at + RANGE_BLOCKS) for at in range(26, 250, RANGE_BLOCKS)] + [(250, 258)]
    second = [(at, min(514, at + RANGE_BLOCKS)) for at in range(258, 514, RANGE_BLOCKS)]
    third = [(at, min(700, at + RANGE_BLOCKS)) for at in range(514, 700, RANGE_BLOCKS)]
    edges += [first, second, third]
    expected = [[("units/0.bin", a * BLOCK_BYTES, min(b * BLOCK_BYTES, size)) for a, b in call] for call in edges]
    expected[-1].append(("units/1.bin", 0, 12))
    assert store.calls == expected
    assert [sum(b - a for a, b in call) for call in edges[2:4]] == [BLOCKS_AT_ONCE] * 2


def test_a_random_reader_finds_its_share(tmp_path: Path, store: Store, seed: int) -> None:
    """With slots for a quarter of the blocks, a quarter of what is read is there: five standard deviations of 2,000 reads."""
    chosen = random.Random(seed)
    contents = make_contents(seed, [40 * BLOCK_BYTES] * 2)
    store.put(contents)
    cache = open_cache(tmp_path, contents, bound_of(20))
    read(cache, all_blocks(contents))
    before = sum(store.blocks.values())
    for _ in range(2000):
        span = (chosen.randrange(2), chosen.randrange(40) * BLOCK_BYTES + 77, 4098)
        assert read(cache, [span]) == true_bytes(contents, [span])
    assert abs(sum(store.blocks.values()) - before - 1500) < 5 * (2000 * 0.25 * 0.75) ** 0.5


# --- the bound ---------------------------------------------------------------------------------------------


def taken_bytes(folder: Path) -> int:
    """What files and folder take on the disk, written out first: until then a file system only estimates."""
    paths = [folder / "dataset", *(folder / "dataset").iterdir()]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return sum(512 * path.stat().st_blocks for path in paths)


@pytest.mark.parametrize("num_slots", [1, 2, 50, 199])
def test_the_bound_holds(tmp_path: Path, store: Store, seed: int, num_slots: int) -> None:
    """At every moment of being filled in any order, and it is used: as many blocks as fit are there in the end."""
    chosen = random.Random(seed)
    contents = [chosen.randbytes(BLOCK_BYTES) * 100] * 2
    store.put(contents)
    bound = bound_of(num_slots + 1) - 1
    cache = open_cache(tmp_path, contents, bound)
    assert taken_bytes(tmp_path) <= FOLDER_BYTES
    spans = all_blocks(contents)
    chosen.shuffle(spans)
    for at in range(0, len(spans), 10):
        assert read(cache, spans[at : at + 10]) == true_bytes(contents, spans[at : at + 10])
        assert taken_bytes(tmp_path) <= bound
    tags = np.fromfile(tmp_path / "dataset/tags", "<u8")
    assert sorted((tags - 1) % num_slots) == list(range(num_slots))
    assert num_slots * BLOCK_BYTES <= taken_bytes(tmp_path) <= bound


def test_another_bound_keeps_what_it_can(tmp_path: Path, store: Store, seed: int) -> None:
    """The files get their new size at once; what lies where it belongs is not fetched again, and nothing else is believed."""
    contents = make_contents(seed)
    store.put(contents)
    for num_slots, num_fetched in ((NUM_BLOCKS, 15), (5, 10), (7, 15), (NUM_BLOCKS, 15), (NUM_BLOCKS, 0)):
        before = sum(store.blocks.values())
        cache = open_cache(tmp_path, contents, bound_of(num_slots))
        assert (tmp_path / "dataset/blocks").stat().st_size == num_slots * BLOCK_BYTES
        assert (tmp_path / "dataset/tags").stat().st_size == num_slots * 8
        tags = np.fromfile(tmp_path / "dataset/tags", "<u8")
        there = sum(int(tags[number % num_slots]) == number + 1 for number in range(NUM_BLOCKS))
        assert read(cache, all_blocks(contents)) == b"".join(contents)
        assert sum(store.blocks.values()) - before == NUM_BLOCKS - there
        if num_slots == NUM_BLOCKS and there in (0, NUM_BLOCKS):
            assert num_fetched == NUM_BLOCKS - there


@pytest.mark.parametrize("bound", [-5, 0, bound_of(1) - 1])
def test_a_bound_for_no_block_is_refused(tmp_path: Path, bound: int) -> None:
    with pytest.raises(UserError, match=f"data.cache_bytes is {bound}; wanted at least {bound_of(1)}, for a block"):
        open_cache(tmp_path, [b"some"], bound)


def test_the_folders_are_for_this_user_alone(tmp_path: Path, store: Store) -> None:
    store.put([b"some"])
    cache = open_cache(tmp_path / "deep/cache", [b"some"])
    read(cache, [(0, 0, 4)])
    (copy,) = stage_files(URL, {"units/0.bin": None}, tmp_path / "deep/copies", no_waiting).values()
    folders = [tmp_path / "deep/cache", tmp_path / "deep/cache/dataset", tmp_path / "deep/copies", copy.parent]
    assert [path.stat().st_mode & 0o777 for path in folders] == [0o700] * 4
    assert [(tmp_path / "deep/cache/dataset" / name).stat().st_mode & 0o777 for name in ("blocks", "tags")] == [0o600] * 2


# --- a disk that is full or broken -------------------------------------------------------------------------


def test_a_disk_without_room_is_refused_at_the_start(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache has taken already is not asked for again."""
    contents = [bytes(10 * BLOCK_BYTES)]
    store.put(contents)
    room = 10
    monkeypatch.setattr(staging.os, "fstatvfs", lambda _: SimpleNamespace(f_bavail=16 * room, f_frsize=4096))
    read(open_cache(tmp_path, contents), all_blocks(contents)[:4])
    assert taken_bytes(tmp_path) >= 4 * BLOCK_BYTES
    room = 6
    open_cache(tmp_path, contents)
    room = 5
    with pytest.raises(UserError) as refusal:
        open_cache(tmp_path, contents)
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path}/dataset: 0.0 GB are free, and blocks of {URL} will take 0.0 GB of 1.1; free some")
    assert "lower data.cache_bytes, or set data.cache to a folder on a larger disk" in message
    open_cache(tmp_path, contents, bound_of(5))


def test_a_disk_that_fills_up_is_named_with_what_to_change(tmp_path: Path, store: Store, seed: int) -> None:
    """No file may grow beyond a bound: a stand-in for a full disk, which takes a part of a block and refuses the rest."""
    contents = make_contents(seed)
    store.put(contents)
    cache = open_cache(tmp_path, contents)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9 * BLOCK_BYTES + 1000, hard))
        for spans in (all_blocks(contents), all_blocks(contents)[9:10]):
            with pytest.raises(UserError) as refusal:
                read(cache, spans)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path}/dataset: no room left to write (File too large), and blocks of {URL} may take 0.0 GB; free some")
    assert "lower data.cache_bytes, or set data.cache" in message
    before = sum(store.blocks.values())
    assert read(cache, all_blocks(contents)) == b"".join(contents)
    assert sum(store.blocks.values()) - before == NUM_BLOCKS - 9  # the block that was cut is not believed


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no room left to write (No space left on device)"),
        (errno.EDQUOT, "no room left to write (Disk quota exceeded)"),
        (errno.EIO, "cannot be used as a cache (Input/output error)"),
    ],
)
def test_what_the_disk_says_is_said(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    contents = [bytes(1000)]
    store.put(contents)
    cache = open_cache(tmp_path, contents)

    def refuse(*_) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(staging.os, "pwrite", refuse)
    with pytest.raises(UserError) as refusal:
        read(cache, [(0, 0, 5)])
    assert str(refusal.value).startswith(f"{tmp_path}/dataset: {words}") and "set data.cache to" in str(refusal.value)


def test_a_file_in_the_folders_place_is_named(tmp_path: Path, store: Store) -> None:
    store.put([b"some"])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file/dataset: cannot be used as a cache \(.*\); mend that, or set data.cache to another folder"):
        open_cache(tmp_path / "file", [b"some"])
    with pytest.raises(UserError, match=r"/file: cannot be written to \(.*\); mend that, or set data.cache to another folder"):
        stage_files(URL, {"units/0.bin": None}, tmp_path / "file", no_waiting)


# --- what is damaged ---------------------------------------------------------------------------------------


def test_flipped_bits_in_the_cache_are_fetched_again(tmp_path: Path, store: Store, seed: int) -> None:
    """Those blocks and no others, whether the bit was of the block or of its tag; and then they are right again."""
    chosen, contents = random.Random(seed), make_contents(seed)
    store.put(contents)
    cache = open_cache(tmp_path, contents)
    spans = all_blocks(contents)
    read(cache, spans)
    for _ in range(40):
        flipped = chosen.sample(range(NUM_BLOCKS), chosen.randint(1, 4))
        for number in flipped:
            if chosen.random() < 0.5:
                flip(tmp_path / "dataset/blocks", 8 * BLOCK_BYTES * number + chosen.randrange(8 * spans[number][2]))
            else:
                flip(tmp_path / "dataset/tags", 64 * number + chosen.randrange(64))
        before = store.blocks
        assert read(cache, spans) == b"".join(contents)
        expected = Counter((f"units/{spans[number][0]}.bin", spans[number][1] // BLOCK_BYTES) for number in flipped)
        assert store.blocks - before == expected
        assert read(cache, spans) == b"".join(contents)
        assert store.blocks - before == expected


@pytest.mark.parametrize("change", ["swapped", "cut", "emptied", "zeroed", "noise", "noise under right tags", "tags of others"])
def test_a_cache_of_anything_reads_right(tmp_path: Path, store: Store, seed: int, change: str) -> None:
    chosen, contents = random.Random(seed), make_contents(seed)
    store.put(contents)
    cache = open_cache(tmp_path, contents)
    read(cache, all_blocks(contents))
    blocks, tags = tmp_path / "dataset/blocks", tmp_path / "dataset/tags"
    content, tag = bytearray(blocks.read_bytes()), bytearray(tags.read_bytes())
    size = len(content)
    if change == "swapped":
        content[:BLOCK_BYTES], content[BLOCK_BYTES : 2 * BLOCK_BYTES] = content[BLOCK_BYTES : 2 * BLOCK_BYTES], content[:BLOCK_BYTES]
    elif change in ("cut", "emptied"):
        content = content[: chosen.randrange(size) if change == "cut" else 0]
        tag = tag[: chosen.randrange(len(tag)) if change == "cut" else 0]
    elif change == "tags of others":
        tag = bytearray(np.random.default_rng(seed).permutation(np.frombuffer(tag, "<u8")).tobytes())
    else:
        content = bytearray(size if change == "zeroed" else chosen.randbytes(size))
        tag = bytearray(chosen.randbytes(len(tag))) if change == "noise" else tag
    # Into the same files, which other processes have open.
    for path, new in ((blocks, content), (tags, tag)):
        with path.open("r+b") as file:
            file.write(new)
            file.truncate()
    assert read(cache, all_blocks(contents)) == b"".join(contents)
    again = open_cache(tmp_path, contents)
    assert read(again, all_blocks(contents)) == b"".join(contents)
    assert again.num_bytes_fetched == 0


def test_a_cache_that_is_deleted_meanwhile_goes_on(tmp_path: Path, store: Store, seed: int) -> None:
    contents = make_contents(seed)
    store.put(contents)
    cache = open_cache(tmp_path, contents)
    read(cache, all_blocks(contents)[:7])
    for name in ("blocks", "tags"):
        (tmp_path / "dataset" / name).unlink()
    for one in (cache, cache, open_cache(tmp_path, contents)):
        assert read(one, all_blocks(contents)) == b"".join(contents)
    assert store.num_bytes == 2 * sum(SIZES)


def test_flipped_bits_in_the_store_are_refused_with_their_place(tmp_path: Path, store: Store, seed: int) -> None:
    """After three fetches; the blocks beside it are read, nothing of it is kept, and the mended file is read."""
    chosen, contents = random.Random(seed), make_contents(seed)
    for number, (file, first, num) in enumerate(all_blocks(contents)):
        damaged = [bytearray(content) for content in contents]
        damaged[file][first + chosen.randrange(num)] ^= 1 << chosen.randrange(8)
        store.put([bytes(content) for content in damaged])
        store.calls.clear()
        folder = tmp_path / f"{file}-{first}"
        cache = open_cache(folder, contents)
        for spans in ([(file, first, 1)], all_blocks(contents)):
            with pytest.raises(UserError) as refusal:
                read(cache, spans)
            assert str(refusal.value).startswith(
                f"{URL}/units/{file}.bin: bytes {first} to {first + num - 1} are not those that were built (their CRC32C differs"
            )
        assert store.blocks == Counter(
            {
                (f"units/{other}.bin", at // BLOCK_BYTES): 2 * FETCHES if (other, at) == (file, first) else 1
                for other, at, _ in all_blocks(contents)
            }
        )
        others = [span for span in all_blocks(contents) if span != (file, first, num)]
        assert read(cache, others) == true_bytes(contents, others)
        assert np.fromfile(folder / "dataset/tags", "<u8").tolist() == [0 if one == number else one + 1 for one in range(NUM_BLOCKS)]
        store.put(contents)
        assert read(cache, all_blocks(contents)) == b"".join(contents)


@pytest.mark.parametrize("damage", ["flip", "cut", "nothing", "other"])
@pytest.mark.parametrize("num_damaged", [1, FETCHES - 1])
def test_bytes_that_are_damaged_on_their_way_are_fetched_again(
    tmp_path: Path, store: Store, seed: int, damage: str, num_damaged: int
) -> None:
    chosen, contents = random.Random(seed), make_contents(seed)
    store.put(contents)
    times: Counter[tuple[str, int]] = Counter()

    def answer(name: str, first: int, content: bytes) -> bytes:
        times[name, first] += 1
        if times[name, first] > num_damaged:
            return content
        changed = bytearray(content)
        changed[chosen.randrange(len(content))] ^= 1
        return {"flip": bytes(changed), "cut": content[:-1], "nothing": b"", "other": bytes(len(content))}[damage]

    store.answer = answer
    cache = open_cache(tmp_path, contents, bound_of(4))
    for span in all_blocks(contents):
        assert read(cache, [span]) == true_bytes(contents, [span])
    assert set(store.blocks.values()) == {num_damaged + 1} and len(store.blocks) == NUM_BLOCKS


# --- a store that is not reached ---------------------------------------------------------------------------


class Line:
    """Breaks as often as it is told to; waits are written down."""

    def __init__(self, errors: Sequence[Exception | None]) -> None:
        self.errors = list(errors)
        self.said: list[str] = []
        self.slept: list[float] = []

    def answer(self, name: str, first: int, content: bytes | Exception) -> bytes | Exception:
        return (self.errors.pop(0) if self.errors else None) or content


def with_line(folder: Path, store: Store, contents: Sequence[bytes], errors: Sequence[Exception | None]) -> tuple[BlockCache, Line]:
    line = Line(errors)
    store.put(contents)
    store.answer = line.answer
    return open_cache(folder, contents, say=line.said.append, sleep=line.slept.append), line


def check_waits(slept: Sequence[float]) -> None:
    """The first waits of a store that gives nothing, each give or take a half, and no two alike."""
    assert all(wanted / 2 <= found <= 1.5 * wanted for found, wanted in zip(slept, WAIT_SECONDS, strict=False))
    assert len({found / wanted for found, wanted in zip(slept, WAIT_SECONDS, strict=False)}) == len(slept)


@pytest.mark.parametrize("error", [OSError("reset"), TimeoutError(), RuntimeError("SlowDown"), ValueError("a transport's own")], ids=repr)
def test_a_broken_line_is_tried_again(tmp_path: Path, store: Store, seed: int, error: Exception) -> None:
    """At growing intervals, and said each time; what came in the meantime is not asked for again."""
    contents = make_contents(seed)
    cache, line = with_line(tmp_path, store, contents, [error] * 6)
    assert read(cache, [(4, 70_000, 1000)]) == contents[4][70_000:71_000]
    assert len(store.calls) == 7 and len(line.slept) == len(line.said) == 6
    check_waits(line.slept)
    for text, seconds in zip(line.said, line.slept, strict=True):
        assert text == f"{URL}/units/4.bin: {type(error).__name__}: {error}; 1 of 1 requests are tried again in {seconds:.1f} s"
    # The others, of which every second request fails.
    store.calls.clear()
    line.errors = [None, error] * 5
    assert read(cache, all_blocks(contents)) == b"".join(contents)
    numbers = [[0, 1, 2, 3, 4, 4], [1, 3, 4], [3], [3]]
    assert [[name for name, _, _ in call] for call in store.calls] == [[f"units/{number}.bin" for number in call] for call in numbers]


def test_errors_that_are_raised_are_tried_again_too(tmp_path: Path, store: Store, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = make_contents(seed)
    cache, line = with_line(tmp_path, store, contents, [])
    cat_ranges, times = MemoryFileSystem.cat_ranges, iter(range(100))

    def fail(*arguments, **more):
        if next(times) < 3:
            raise TypeError("a transport's own mistake")
        return cat_ranges(*arguments, **more)

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", fail)
    assert read(cache, all_blocks(contents)) == b"".join(contents)
    assert len(line.slept) == 3


def test_a_store_that_is_gone_is_given_up_after_five_minutes(tmp_path: Path, store: Store, seed: int) -> None:
    contents = make_contents(seed)
    cache, line = with_line(tmp_path, store, contents, [ConnectionError("no route")] * 1000)
    with pytest.raises(UserError) as refusal:
        read(cache, [(1, 5, 10)])
    assert str(refusal.value) == (
        f"{URL}/units/1.bin: ConnectionError: no route (tried 11 times in five minutes); check the network, the URL and the credentials "
        "in the environment, then start the same command again."
    )
    assert len(store.calls) == 11 and len(line.slept) == len(WAIT_SECONDS) == 10
    check_waits(line.slept)
    assert 290 < sum(WAIT_SECONDS) < 310
    line.errors.clear()
    assert read(cache, [(1, 5, 10)]) == contents[1][5:15]


def test_a_store_that_gives_little_is_not_given_up(tmp_path: Path, store: Store, seed: int) -> None:
    """Of 40 requests one is answered each time: every wait is the first one."""
    contents = make_contents(seed, [3] * 41)
    cache, line = with_line(tmp_path, store, contents, [])
    read(cache, [(0, 0, 3)])
    line.errors = [error for left in range(40, 0, -1) for error in [OSError("busy")] * (left - 1) + [None]]
    assert read(cache, [(file, 0, 3) for file in range(41)]) == b"".join(contents)
    assert len(line.slept) == 39 and max(line.slept) <= 1.5
    assert [len(call) for call in store.calls[1:]] == list(range(40, 0, -1))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError("x"), "there is no such file; correct the URL, or copy the whole dataset there"),
        (PermissionError("Forbidden"), "may not be read (Forbidden); check the credentials in the environment"),
    ],
    ids=repr,
)
def test_a_refusal_is_not_tried_again(tmp_path: Path, store: Store, seed: int, error: Exception, words: str) -> None:
    contents = make_contents(seed)
    cache, line = with_line(tmp_path, store, contents, [None, error])
    with pytest.raises(UserError, match=re.escape(f"{URL}/units/1.bin: {words}")):
        read(cache, [(0, 0, 5), (1, 0, 5)])
    line.errors = [error]
    with pytest.raises(UserError, match=re.escape(f"{URL}/units/1.bin: {words}")):
        stage_files(URL, {"units/1.bin": None}, tmp_path, line.said.append, line.slept.append)
    assert line.slept == [] and line.said == []


def test_a_missing_file_is_named(tmp_path: Path, store: Store, seed: int) -> None:
    contents = make_contents(seed)
    store.put(contents[:4])
    with pytest.raises(UserError, match=r"memory://data/set/units/4.bin: there is no such file"):
        read(open_cache(tmp_path, contents), all_blocks(contents))


def test_a_wait_can_be_ended(tmp_path: Path, store: Store, seed: int) -> None:
    """By a sleep that raises: whoever closes a run does not wait for a store."""
    contents = make_contents(seed)
    store.put(contents)
    store.answer = lambda name, first, content: OSError("gone")

    def end(seconds: float) -> None:
        raise RuntimeError("closed")

    with pytest.raises(RuntimeError, match="closed"):
        read(open_cache(tmp_path, contents, say=lambda _: None, sleep=end), [(0, 0, 1)])


def test_waiting_leaves_the_runs_random_numbers_alone(tmp_path: Path, store: Store, seed: int) -> None:
    random.seed(seed)
    state = random.getstate(), np.random.get_state()[1].tolist()
    contents = make_contents(seed)
    cache, line = with_line(tmp_path, store, contents, [OSError("reset")] * 5)
    read(cache, all_blocks(contents))
    assert len(line.slept) == 5
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "s3x://y"])
def test_an_unknown_url_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match=f"{url} cannot be used .*; correct the URL"):
        read(open_cache(tmp_path, [b"some"], url=url), [(0, 0, 1)])


def test_a_missing_transport_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(
        UserError, match=r"s3://b/x cannot be read because a package is missing \(Install s3fs.*`pip install s3fs` for s3://"
    ):
        read(open_cache(tmp_path, [b"some"], url="s3://b/x"), [(0, 0, 1)])


# --- many at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["pread", "preadv", "pwrite"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_another_may_come_in_between_at_every_point(
    tmp_path: Path, store: Store, seed: int, monkeypatch: pytest.MonkeyPatch, call: str, when: str
) -> None:
    """Before and after each access to the files, a second process reads a block that belongs in the same slot, or the same block."""
    chosen, contents = random.Random(seed), make_contents(seed)
    store.put(contents)
    mine, other = (open_cache(tmp_path, contents, bound_of(2)) for _ in range(2))
    original = getattr(os, call)
    num_between, is_between = 0, False

    def come_between() -> None:
        nonlocal num_between, is_between
        if not is_between:
            is_between, num_between = True, num_between + 1
            span = chosen.choice(all_blocks(contents))
            assert read(other, [span]) == true_bytes(contents, [span])
            is_between = False

    def access(*arguments):
        if when == "before":
            come_between()
        result = original(*arguments)
        if when == "after":
            come_between()
        return result

    monkeypatch.setattr(staging.os, call, access)
    for _ in range(150):
        spans = chosen.sample(all_blocks(contents), 4)
        assert read(mine, spans) == true_bytes(contents, spans)
    assert num_between >= 30


def test_threads_share_a_cache(tmp_path: Path, seed: int) -> None:
    contents = write_files(tmp_path / "store", seed, SIZES)
    cache = open_cache(tmp_path / "cache", contents, bound_of(3), url=f"file://{tmp_path}/store")

    def work(number: int) -> int:
        chosen = random.Random(seed + number)
        for _ in range(60):
            spans = choose_spans(chosen, contents, 3)
            assert read(cache, spans) == true_bytes(contents, spans)
        return number

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(work, range(4))) == [0, 1, 2, 3]


def write_files(folder: Path, seed: int, sizes: Sequence[int]) -> list[bytes]:
    """The files of `make_contents`, for processes that have no memory in common."""
    contents = make_contents(seed, sizes)
    (folder / "units").mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(contents):
        (folder / f"units/{number}.bin").write_bytes(content)
    return contents


def run_processes(function: str, arguments: Sequence[tuple], limit_seconds: float) -> list[str]:
    """Call a function of this file in processes of their own, which start together; what each prints. None is left behind."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"from tests.pretrain.data.test_staging import {function}; input(); {function}(*{one!r})"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        for one in arguments
    ]  # fmt: skip
    try:
        ends = time.monotonic() + limit_seconds
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=ends - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(error for _, error in answers)
    return [output for output, _ in answers]


def read_at_random(folder: str, seed: int, reader_seed: int, num_slots: int, seconds: float) -> None:
    """Read and compare; prints how many blocks were read, and how many had another's bytes under their tag."""
    chosen, contents = random.Random(reader_seed), make_contents(seed)
    cache = open_cache(Path(folder) / "cache", contents, bound_of(num_slots), url=f"file://{folder}/store")
    is_whole, num_read, num_torn = cache._is_whole, 0, 0

    def count(block, content):
        nonlocal num_torn
        num_torn += not is_whole(block, content)
        return is_whole(block, content)

    cache._is_whole = count
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        spans = chosen.sample(all_blocks(contents), 3)
        assert read(cache, spans) == true_bytes(contents, spans), f"wrong bytes, TEST_SEED={seed}, reader {reader_seed}"
        num_read += 3
    print(num_read, num_torn)


def test_processes_that_fight_for_slots_read_right(tmp_path: Path, seed: int) -> None:
    """Three of them with two slots for 15 blocks."""
    write_files(tmp_path / "store", seed, SIZES)
    answers = run_processes("read_at_random", [(str(tmp_path), seed, seed + 1 + rank, 2, 2.5) for rank in range(3)], 40)
    reads, torn = zip(*(map(int, answer.split()) for answer in answers), strict=True)
    print(f"blocks read: {reads}, with another's bytes under their tag: {torn}")
    assert min(reads) > 100


def die_at_any_moment(folder: str, seed: int) -> None:
    """Processes that die in each write to the cache after a part of it, then some that are killed whenever; what is left reads right."""
    chosen, contents = random.Random(seed), make_contents(seed)
    url, spans = f"file://{folder}/store", all_blocks(contents)
    num_wrong, pwrite = Counter(), os.pwrite

    def open_here() -> BlockCache:
        return open_cache(Path(folder) / "cache", contents, bound_of(4), url=url)

    def live_and_die(last_write: int | None) -> None:
        """In a process of its own: reads until it is killed, or kills itself in its n-th write."""
        number = 0

        def write_part(descriptor: int, content: memoryview, at: int) -> int:
            nonlocal number
            number += 1
            if number == last_write:
                pwrite(descriptor, bytes(content)[: chosen.randint(0, len(content))], at)
                os.kill(os.getpid(), signal.SIGKILL)
            return pwrite(descriptor, content, at)

        if last_write is not None:
            os.pwrite = write_part
        cache = open_here()
        while True:
            part = chosen.sample(spans, 4)
            assert read(cache, part) == true_bytes(contents, part)

    def count_wrong() -> None:
        """Slots whose content is not what their tag says, as they were left."""
        tags = np.fromfile(Path(folder) / "cache/dataset/tags", "<u8").tolist()
        left = (Path(folder) / "cache/dataset/blocks").read_bytes()
        for slot, tag in enumerate(tags):
            if tag == 0:
                num_wrong["empty"] += 1
            elif 1 <= tag <= NUM_BLOCKS:
                num = spans[tag - 1][2]
                is_right = left[slot * BLOCK_BYTES :][:num] == true_bytes(contents, [spans[tag - 1]])
                num_wrong["right" if is_right else "another's bytes"] += 1
            else:
                num_wrong["nonsense"] += 1

    moments = [*range(1, 37), *[None] * 40]
    for moment in moments:
        child = os.fork()
        if child == 0:
            try:
                chosen.seed(f"{seed} {moment}")
                live_and_die(moment)
            finally:
                os._exit(1)
        if moment is None:
            time.sleep(chosen.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"it failed before it was killed: {status}"
        if (Path(folder) / "cache/dataset/tags").exists():
            count_wrong()
        chosen.shuffle(spans_now := list(spans))
        assert read(open_here(), spans_now) == true_bytes(contents, spans_now), f"wrong bytes after {moment}, TEST_SEED={seed}"
    print(dict(num_wrong))


def test_whoever_is_killed_leaves_a_cache_that_reads_right(tmp_path: Path, seed: int) -> None:
    write_files(tmp_path / "store", seed, SIZES)
    (answer,) = run_processes("die_at_any_moment", [(str(tmp_path), seed)], 60)
    print(f"slots that the killed left: {answer}")
    assert "'empty'" in answer and "another" not in answer and "nonsense" not in answer


# --- small files, whole ------------------------------------------------------------------------------------


def record_of(content: bytes) -> FileRecord:
    return FileRecord(bytes=len(content), sha256=sha256(content).hexdigest())


def test_small_files_are_copied_under_their_hash_and_used_again(tmp_path: Path, store: Store, seed: int) -> None:
    contents = [*make_contents(seed, [0, 1, 1000, 200_000]), b"a manifest"]
    store.put(contents)
    names = [f"units/{number}.bin" for number in range(5)]
    files = {name: record_of(content) for name, content in zip(names, contents, strict=True)} | {names[4]: None}
    for asked in (names, names[4:], names[4:]):
        store.calls.clear()
        paths = stage_files(URL, files, tmp_path, no_waiting)
        assert list(paths) == names
        assert [path.relative_to(tmp_path) for path in paths.values()] == [
            Path(sha256(content).hexdigest(), f"{number}.bin") for number, content in enumerate(contents)
        ]
        assert [path.read_bytes() for path in paths.values()] == contents
        assert store.calls == [[(name, None, None) for name in asked]]
    assert sorted(tmp_path.rglob("*.bin")) == sorted(paths.values()) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("change", ["flip", "cut", "longer", "empty"])
def test_a_copy_that_was_changed_is_fetched_again(tmp_path: Path, store: Store, seed: int, change: str) -> None:
    contents = make_contents(seed, [500, 600])
    store.put(contents)
    files = {f"units/{number}.bin": record_of(content) for number, content in enumerate(contents)}
    path = stage_files(URL, files, tmp_path, no_waiting)["units/1.bin"]
    if change == "flip":
        flip(path, random.Random(seed).randrange(4800))
    else:
        path.write_bytes({"cut": contents[1][:-1], "longer": contents[1] + b"x", "empty": b""}[change])
    store.calls.clear()
    assert stage_files(URL, files, tmp_path, no_waiting)["units/1.bin"].read_bytes() == contents[1]
    assert store.calls == [[("units/1.bin", None, None)]]


def test_small_files_that_were_changed_in_the_store_are_refused(tmp_path: Path, store: Store, seed: int) -> None:
    """After three fetches, of which one would have been enough; nothing of them is left."""
    contents = make_contents(seed, [500, 600, 700])
    store.put(contents)
    files = {f"units/{number}.bin": record_of(content) for number, content in enumerate(contents)}
    answers = iter([b"", contents[0], contents[2]])
    store.answer = lambda name, first, content: next(answers) if name == "units/1.bin" else content
    with pytest.raises(UserError, match=r"memory://data/set/units/1.bin: its SHA-256 differs from the manifest's, as often as it was"):
        stage_files(URL, files, tmp_path, no_waiting)
    assert [len(call) for call in store.calls] == [3, 1, 1]
    assert sorted(path.read_bytes() for path in tmp_path.rglob("*.bin")) == sorted([contents[0], contents[2]])
    answers = iter([b"", contents[0], contents[1]])
    assert stage_files(URL, files, tmp_path, no_waiting)["units/1.bin"].read_bytes() == contents[1]


def test_small_files_are_fetched_together_but_not_all(tmp_path: Path, store: Store) -> None:
    """At most 256, and at most 16 MiB unless it is one file."""
    million = 1 << 20
    contents = [b"x"] * 300 + [bytes(10 * million), bytes(6 * million), b"", bytes(20 * million), b"y"]
    store.put(contents)
    files = {f"units/{number}.bin": record_of(content) for number, content in enumerate(contents)}
    paths = stage_files(URL, files, tmp_path, no_waiting)
    assert [len(call) for call in store.calls] == [256, 45, 2, 1, 1]
    assert [paths[name].stat().st_size for name in files] == [len(content) for content in contents]


def test_a_broken_line_is_tried_again_for_small_files(tmp_path: Path, store: Store, seed: int) -> None:
    contents = make_contents(seed, [500, 600])
    store.put(contents)
    line = Line([OSError("reset")] * 4)
    store.answer = line.answer
    files = {f"units/{number}.bin": record_of(content) for number, content in enumerate(contents)}
    paths = stage_files(URL, files, tmp_path, line.said.append, line.slept.append)
    assert [path.read_bytes() for path in paths.values()] == contents
    check_waits(line.slept)
    assert len(line.slept) == len(line.said) == 2


# --- a real server -----------------------------------------------------------------------------------------


class Serving:
    """A web server on this machine for a folder, with ranges or without; the first requests are answered with 503."""

    def __init__(self, folder: Path, num_busy: int, knows_ranges: bool) -> None:
        serving = self
        self.asked: Counter[str] = Counter()

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(folder))

            def do_GET(self):
                wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                serving.asked["ranges" if wanted else "files"] += 1
                path = Path(self.translate_path(self.path))
                if sum(serving.asked.values()) <= num_busy:
                    return self.send_error(503)
                if not wanted or not knows_ranges or not path.is_file():
                    return super().do_GET()
                first, last = map(int, wanted.groups())
                part = path.read_bytes()[first : last + 1]
                self.send_response(206)
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                return self.wfile.write(part)

            def log_message(self, format, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}/store"

    def __enter__(self) -> "Serving":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def test_a_web_server(tmp_path: Path, seed: int) -> None:
    """At the same time, in ranges, past its busy moments; a file that is not there is named, and so is a server that is gone."""
    pytest.importorskip("aiohttp", reason="needs aiohttp, which pretrain[remote] brings")
    chosen, contents = random.Random(seed), write_files(tmp_path / "store", seed, SIZES)
    said: list[str] = []
    slept: list[float] = []
    with Serving(tmp_path, num_busy=2, knows_ranges=True) as server:
        cache = open_cache(tmp_path / "cache", contents, url=server.url, say=said.append, sleep=slept.append)
        for _ in range(20):
            spans = choose_spans(chosen, contents, 5)
            assert read(cache, spans) == true_bytes(contents, spans)
        assert read(cache, all_blocks(contents)) == b"".join(contents)
        assert cache.num_bytes_fetched == sum(SIZES)
        assert len(slept) == 2 and all("503" in text for text in said)
        assert server.asked.keys() == {"ranges"}
        paths = stage_files(server.url, {"units/3.bin": record_of(contents[3]), "units/1.bin": None}, tmp_path / "copies", no_waiting)
        assert [path.read_bytes() for path in paths.values()] == [contents[3], contents[1]]
        with pytest.raises(UserError, match=f"{server.url}/units/5.bin: there is no such file"):
            stage_files(server.url, {"units/5.bin": None}, tmp_path / "copies", no_waiting)
        (tmp_path / "store/units/2.bin").unlink()
        with pytest.raises(UserError, match=f"{server.url}/units/2.bin: there is no such file"):
            read(open_cache(tmp_path / "other", contents, url=server.url), [(2, 0, 1)])
    assert read(cache, all_blocks(contents)) == b"".join(contents)
    slept.clear()
    with pytest.raises(UserError, match=rf"{server.url}/units/0.bin: Client\w+Error: .* \(tried 11 times in five minutes\)"):
        read(open_cache(tmp_path / "third", contents, url=server.url, say=said.append, sleep=slept.append), [(0, 0, 1)])
    check_waits(slept)


def test_a_web_server_that_knows_no_ranges_is_found_out_with_one_request(tmp_path: Path, seed: int) -> None:
    pytest.importorskip("aiohttp", reason="needs aiohttp, which pretrain[remote] brings")
    contents = write_files(tmp_path / "store", seed, SIZES)
    with Serving(tmp_path, num_busy=0, knows_ranges=False) as server:
        cache = open_cache(tmp_path / "cache", contents, url=server.url)
        for number in (1, 2):
            with pytest.raises(UserError) as refusal:
                read(cache, all_blocks(contents))
            assert str(refusal.value).startswith(
                f"{server.url}/units/0.bin: asked for {BLOCK_BYTES} bytes, got {SIZES[0]}: its server sends no parts of files"
            )
            assert server.asked == {"ranges": number}
