"""A dataset in an object store, read through a cache of bounded size on this node's disk that all its processes share.

In: the URL of a dataset's folder (whatever fsspec reads), its shards' sizes and the sums of their blocks. Out: the bytes of any
spans of them. A block of 64 KiB is believed only when the copy that was made of it has the sum that the dataset gives, wherever
it came from.

Slot g % N of the file `blocks` may hold block g of the dataset, and entry g % N of `tags` says which one does. With a slot for
each block a corpus is fetched once; with fewer, a reader of random places finds N of all blocks whatever is thrown out, and this
way nothing is listed, locked or ordered. Two that write one slot at once, one that is killed while it writes, or a bit that flips
leave a block with another sum, which is fetched again.
"""

import errno
import os
import random
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast
from uuid import uuid4

import fsspec
import fsspec.core
import numpy as np
import numpy.typing as npt

from configs.durable import sha256_of_file
from configs.errors import UserError
from data_pipeline.checksums import BLOCK_BYTES, block_is_whole
from data_pipeline.records import FileRecord

BLOCKS_AT_ONCE = 256
"""Fetched together: 16 MiB of memory, and as many requests as a store answers at once."""
RANGE_BLOCKS = 16
"""The most of one request: where it takes longer than its way, it is faster to have several."""
FETCHES = 3
"""Of content with another sum than the dataset's, before the store's copy is called damaged."""
WAIT_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0)
"""Before each further try of what failed: five minutes in which nothing at all comes."""
SLOT_BYTES = BLOCK_BYTES + 64
"""With its tag, and what a file system notes of where it lies (ext4, filled at random: 10 to 40 bytes)."""
FOLDER_BYTES = 1 << 14
"""Of pages that are not full."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Numbers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Say = Callable[[str], object]
Sleep = Callable[[float], object]

# Of its own: a run's random numbers do not depend on its network.
_chance = random.Random()


class _Range(NamedTuple):
    """Bytes of a file of the store; without bounds, all of it."""

    name: str
    first: int | None = None
    end: int | None = None


class _Block(NamedTuple):
    file: int
    block: int


class BlockCache:
    """The shards of a dataset. Any number of processes use one folder; in each, any number of threads."""

    def __init__(
        self,
        url: str,
        files: Sequence[tuple[str, int]],
        sums: Callable[[int], npt.NDArray[np.uint32]],
        folder: Path,
        identity: str,
        bound_bytes: int,
        say: Say,
        sleep: Sleep = time.sleep,
    ) -> None:
        """Nothing is fetched yet.

        files: path below `url` and size in bytes of each file; its number is its place here. sums: the CRC32C of each block of a
        file, by its number. identity: names the dataset and the order of its files; the cache is `folder` / identity. bound_bytes:
        what that may take on the disk, of which no more is taken than was read. `say` is told of what is tried again, after a
        `sleep` of some seconds (that may raise, to end a wait early).

        Raises UserError: a bound that holds no block, a folder that cannot be written to, a disk without room for the bound.
        """
        self._url, self._files, self._sums, self._say, self._sleep = url, tuple(files), sums, say, sleep
        self._size_f = np.array([size for _, size in files], dtype=np.int64)
        *self._first_f, num_blocks = accumulate((-(-size // BLOCK_BYTES) for _, size in files), initial=0)
        self._num_slots = min(max(1, num_blocks), (bound_bytes - FOLDER_BYTES) // SLOT_BYTES)
        if self._num_slots < 1:
            raise UserError(f"data.cache_bytes is {bound_bytes}; wanted at least {FOLDER_BYTES + SLOT_BYTES}, for a block of the dataset.")
        self._folder = folder / identity
        try:
            _make_folder(self._folder)
            self._blocks = self._open("blocks", BLOCK_BYTES)
            self._tags = self._open("tags", 8)
            free = os.fstatvfs(self._blocks)
            growth = self._num_slots * BLOCK_BYTES - 512 * os.fstat(self._blocks).st_blocks
        except OSError as error:
            raise self._explain(error) from None
        if growth > free.f_bavail * free.f_frsize:
            raise UserError(
                f"{self._folder}: {free.f_bavail * free.f_frsize / 1e9:.1f} GB are free, and blocks of {url} will take {growth / 1e9:.1f} "
                f"GB of {bound_bytes / 1e9:.1f}; free some (each folder in {folder} belongs to one dataset), lower data.cache_bytes, or "
                "set data.cache to a folder on a larger disk."
            )
        self._cuts_ranges = False
        self.num_bytes_fetched = 0
        """What came from the store so far."""

    def read(self, file_p: Numbers, first_byte_p: Numbers, num_bytes_p: Numbers) -> Bytes:
        """The bytes of spans, one behind the other: num_bytes_p[p] of file file_p[p] from first_byte_p[p] on, in new memory.

        What is not in the cache is fetched at once for all spans, each block one time, with 16 MiB in flight.
        Raises IndexError for a span that is not within its file. Raises UserError: the store has no such file, refuses it, has
        another content than was built, or is not reached for five minutes; the disk of the cache is full or broken.
        """
        if ((first_byte_p < 0) | (num_bytes_p < 0) | (first_byte_p + num_bytes_p > self._size_f[file_p])).any():
            raise IndexError(f"a span of {self._url} is not within its file")
        bytes_N = np.empty(int(num_bytes_p.sum()), dtype=np.uint8)
        pieces: dict[_Block, list[tuple[slice, slice]]] = {}
        filled = 0
        for file, first, num_bytes in zip(file_p.tolist(), first_byte_p.tolist(), num_bytes_p.tolist(), strict=True):
            end = first + num_bytes
            while first < end:
                block, start = divmod(first, BLOCK_BYTES)
                stop = min(BLOCK_BYTES, start + end - first)
                piece = slice(start, stop), slice(filled, filled + stop - start)
                pieces.setdefault(_Block(file, block), []).append(piece)
                filled, first = filled + stop - start, first + stop - start
        target = bytes_N.data
        try:
            for block, content in self._read_blocks(sorted(pieces)):
                for place, goal in pieces[block]:
                    target[goal] = content[place]
        except OSError as error:  # of the cache: those of the store are explained where they occur
            raise self._explain(error) from None
        return bytes_N

    def _read_blocks(self, blocks: list[_Block]) -> Iterator[tuple[_Block, memoryview]]:
        """Each block once, those in the cache first. The content is good until the next one is asked for."""
        missing: list[_Block] = []
        memory = memoryview(bytearray(BLOCK_BYTES))
        for block in blocks:
            content = memory[: self._num_bytes(block)]
            if self._load(block, content):
                yield block, content
            else:
                missing.append(block)
        while missing:
            # A web server that knows no ranges sends whole files: it is found out with one, not with 256.
            size = BLOCKS_AT_ONCE if self._cuts_ranges else 1
            yield from self._fetch(missing[:size])
            missing = missing[size:]

    def _load(self, block: _Block, content: memoryview) -> bool:
        """Copy a block out of its slot. The copy is checked, not the slot, which others may write to meanwhile."""
        tag, slot = self._place(block)
        return (
            os.pread(self._tags, 8, 8 * slot) == tag
            and os.preadv(self._blocks, [content], BLOCK_BYTES * slot) == content.nbytes
            and self._is_whole(block, content)
        )

    def _store(self, block: _Block, content: memoryview) -> None:
        """Written, never mapped: a mapped page for which a full disk has no room kills the process (SIGBUS)."""
        tag, slot = self._place(block)
        _write(self._tags, bytes(8), 8 * slot)
        _write(self._blocks, content, BLOCK_BYTES * slot)
        _write(self._tags, tag, 8 * slot)

    def _fetch(self, blocks: list[_Block]) -> Iterator[tuple[_Block, memoryview]]:
        for _ in range(FETCHES):
            runs = _join(blocks)
            ranges = [self._range(run[0], run[-1]) for run in runs]
            damaged: list[_Block] = []
            for run, wanted, content in zip(runs, ranges, _fetch_ranges(self._url, ranges, self._say, self._sleep), strict=True):
                self.num_bytes_fetched += len(content)
                num_bytes = sum(map(self._num_bytes, run))
                if len(content) > num_bytes:
                    raise UserError(
                        f"{self._url}/{wanted.name}: asked for {num_bytes} bytes, got {len(content)}: its server sends no "
                        "parts of files (HTTP ranges); copy the dataset to one that does, to an object store, or to a disk."
                    )
                self._cuts_ranges = True
                view, at = memoryview(content), 0
                for block in run:
                    part = view[at : at + self._num_bytes(block)]
                    at += BLOCK_BYTES
                    if part.nbytes == self._num_bytes(block) and self._is_whole(block, part):
                        self._store(block, part)
                        yield block, part
                    else:
                        damaged.append(block)
            if not damaged:
                return
            blocks = damaged
        file, block = blocks[0]
        first = BLOCK_BYTES * block
        raise UserError(
            f"{self._url}/{self._files[file][0]}: bytes {first} to {first + self._num_bytes(blocks[0]) - 1} are not those that were built "
            "(their CRC32C differs, as often as they were fetched). Copy the file there again or build the dataset again, then start the "
            "same command."
        )

    def _num_bytes(self, block: _Block) -> int:
        return min(BLOCK_BYTES, self._files[block.file][1] - BLOCK_BYTES * block.block)

    def _range(self, first: _Block, last: _Block) -> _Range:
        return _Range(self._files[first.file][0], BLOCK_BYTES * first.block, BLOCK_BYTES * last.block + self._num_bytes(last))

    def _is_whole(self, block: _Block, content: memoryview) -> bool:
        return block_is_whole(content, int(self._sums(block.file)[block.block]))

    def _place(self, block: _Block) -> tuple[bytes, int]:
        """Its tag, and the slot that is its own."""
        number = self._first_f[block.file] + block.block
        return (number + 1).to_bytes(8, "little"), number % self._num_slots

    def _open(self, name: str, entry_bytes: int) -> int:
        """A file with holes where nothing was written, of as many entries as there are slots. Raises OSError."""
        descriptor = os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        weakref.finalize(self, os.close, descriptor)
        if os.fstat(descriptor).st_size != self._num_slots * entry_bytes:  # of another bound: its tags say what is still right
            os.ftruncate(descriptor, self._num_slots * entry_bytes)
        return descriptor

    def _explain(self, error: OSError) -> UserError:
        if error.errno in FULL_DISK:
            return UserError(
                f"{self._folder}: no room left to write ({error.strerror}), and blocks of {self._url} may take "
                f"{self._num_slots * SLOT_BYTES / 1e9:.1f} GB; free some, lower data.cache_bytes, or set data.cache to a folder on a "
                "larger disk, then start the same command again."
            )
        return UserError(
            f"{self._folder}: cannot be used as a cache ({error.strerror}); mend that, or set data.cache to another folder on this node."
        )


def stage_files(url: str, files: Mapping[str, FileRecord | None], folder: Path, say: Say, sleep: Sleep = time.sleep) -> dict[str, Path]:
    """Copies of small files of a dataset, whole, as `folder` / SHA-256 / name: those that are there are used, the others fetched.

    files: by path below `url`, what the manifest says; None for the manifest itself, which is fetched each time.
    Raises UserError as `BlockCache.read` does.
    """
    paths: dict[str, Path] = {}
    missing: dict[str, FileRecord | None] = {}
    for name, record in files.items():
        path = None if record is None else _copy_path(folder, name, record.sha256)
        try:
            if path is not None and record is not None and sha256_of_file(path) == record.sha256:
                paths[name] = path
                continue
        except OSError:  # if it cannot be mended, writing it anew will tell
            pass
        missing[name] = record
    for names in _batches(missing):
        for _ in range(FETCHES):
            damaged: list[str] = []
            for name, content in zip(names, _fetch_ranges(url, [_Range(name) for name in names], say, sleep), strict=True):
                record, found = missing[name], sha256(content).hexdigest()
                if record is None or record.sha256 == found:
                    paths[name] = _write_copy(_copy_path(folder, name, found), content)
                else:
                    damaged.append(name)
            names = damaged
            if not names:
                break
        else:
            raise UserError(
                f"{url}/{names[0]}: its SHA-256 differs from the manifest's, as often as it was fetched. Copy the file there again or "
                "build the dataset again, then start the same command."
            )
    return {name: paths[name] for name in files}


def _batches(files: Mapping[str, FileRecord | None]) -> Iterator[list[str]]:
    """The names in parts of 16 MiB, or of one file that is larger, and at most 256."""
    batch: list[str] = []
    num_bytes = 0
    for name, record in files.items():
        size = record.bytes if record is not None else 0
        if batch and (num_bytes + size > BLOCKS_AT_ONCE * BLOCK_BYTES or len(batch) == BLOCKS_AT_ONCE):
            yield batch
            batch, num_bytes = [], 0
        batch.append(name)
        num_bytes += size
    if batch:
        yield batch


def _copy_path(folder: Path, name: str, digest: str) -> Path:
    return folder / digest / PurePosixPath(name).name


def _write_copy(path: Path, content: bytes) -> Path:
    """Under its name whole or not at all; whether it reaches the disk does not matter (`durable`), as it is compared when it is used."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")
    try:
        _make_folder(path.parent)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{path.parent.parent}: cannot be written to ({error.strerror}); mend that, or set data.cache to another folder on this node."
        ) from None
    return path


def _make_folder(path: Path) -> None:
    """With the one above it, for this user alone. Raises OSError."""
    for folder in (path.parent, path):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _write(descriptor: int, content: bytes | memoryview, at: int) -> None:
    """All of it; a disk that fills up takes a part first, and refuses the rest. Raises OSError."""
    rest = memoryview(content)
    while rest.nbytes:
        num_bytes = os.pwrite(descriptor, rest, at)
        rest, at = rest[num_bytes:], at + num_bytes


def _join(blocks: list[_Block]) -> list[list[_Block]]:
    """Neighbours, given in order, in runs of at most 16."""
    runs: list[list[_Block]] = []
    for block in blocks:
        if runs and len(runs[-1]) < RANGE_BLOCKS and runs[-1][-1] == (block.file, block.block - 1):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _fetch_ranges(url: str, ranges: list[_Range], say: Say, sleep: Sleep) -> list[bytes]:
    """The content of ranges, fetched at the same time, as the store gives it. Raises UserError."""
    system, root = _connect(url)
    contents: dict[int, bytes] = {}
    num_failures = 0
    while missing := [number for number in range(len(ranges)) if number not in contents]:
        paths = [f"{root.rstrip('/')}/{ranges[number].name}" for number in missing]
        firsts, ends = [ranges[number].first for number in missing], [ranges[number].end for number in missing]
        try:
            answers = cast("list[bytes | Exception]", system.cat_ranges(paths, firsts, ends, on_error="return"))
        except Exception as error:  # transports raise exceptions of their own, of no common kind
            answers = [error] * len(missing)
        failed: dict[int, Exception] = {}
        for number, answer in zip(missing, answers, strict=True):
            if isinstance(answer, FileNotFoundError):
                raise UserError(f"{url}/{ranges[number].name}: there is no such file; correct the URL, or copy the whole dataset there.")
            if isinstance(answer, PermissionError):
                raise UserError(f"{url}/{ranges[number].name}: may not be read ({answer}); check the credentials in the environment.")
            if isinstance(answer, Exception):
                failed[number] = answer
            else:
                contents[number] = answer
        if not failed:
            break
        num_failures = 1 if len(failed) < len(missing) else num_failures + 1  # as long as something comes, the store is there
        number, error = next(iter(failed.items()))
        problem = f"{url}/{ranges[number].name}: {type(error).__name__}: {error}"
        if num_failures > len(WAIT_SECONDS):
            raise UserError(
                f"{problem} (tried {num_failures} times in five minutes); check the network, the URL and the credentials in the "
                "environment, then start the same command again."
            ) from error
        seconds = WAIT_SECONDS[num_failures - 1] * _chance.uniform(0.5, 1.5)  # not all ranks at once
        say(f"{problem}; {len(failed)} of {len(ranges)} requests are tried again in {seconds:.1f} s")
        sleep(seconds)
    return [contents[number] for number in range(len(ranges))]


def _connect(url: str) -> tuple[Any, str]:
    """The filesystem (fsspec keeps it) and the path in it. Raises UserError."""
    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(url))
    except ImportError as error:
        raise UserError(
            f"{url} cannot be read because a package is missing ({error}); `pip install s3fs` for s3://, gcsfs for gs://, aiohttp for http://."
        ) from None
    except Exception as error:  # some transports connect at once, and raise what they please
        raise UserError(f"{url} cannot be used ({type(error).__name__}: {error}); correct the URL.") from None
