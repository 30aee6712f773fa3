"""Files in blocks of 16 MiB, each with its SHA-256: hashed while they are written, compared while they are read.

In: bytes, or a file and its record. Out: the record, or bytes that are the ones that were hashed: what a reader is given was compared
with its sum in memory and is not read again. A range is trusted without reading the rest of its file. No torch: the writer and a login
node run this too.
"""

import functools
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import IO, TypedDict

from pretrain.checkpoint.object_store import write_object
from pretrain.checkpoint.store import StorePath, read_part, size_of

BLOCK_BYTES = 1 << 24
THREADS = 2
"""A core hashes 1 to 2 GB/s, a fast disk moves more; both are waited for outside of Python's lock."""
AHEAD = 2
"""Blocks that are read while one is given out."""
KEPT_BLOCKS = AHEAD + 2
"""Their memory is used again: to take new memory for each would cost as much as to hash it."""


class FileRecord(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    sha256: list[str]
    """Of each block, in order; the last one may be short. An empty file has none."""


class DamageError(ValueError):
    """A file of a checkpoint that is not what was committed; the message names it."""


@functools.singledispatch
def write_blocks(path: Path, blocks: Iterable[memoryview | bytes]) -> FileRecord:
    """Write blocks of BLOCK_BYTES (the last may be shorter) to a new file, synced. Raises OSError.

    Blocks are hashed in threads while the one before is written, so they must not change until this returns.
    """
    size, digests = 0, list[Future[str]]()
    with ThreadPoolExecutor(THREADS) as threads, path.open("wb", buffering=0) as file:
        for block in blocks:
            digests.append(threads.submit(_digest, block))
            _write_all(file, block)
            size += len(block)
        os.fsync(file.fileno())
        return {"bytes": size, "sha256": [digest.result() for digest in digests]}


@write_blocks.register
def _(path: StorePath, blocks: Iterable[memoryview | bytes]) -> FileRecord:
    kept = list(blocks)  # views of them: what fails is sent again
    with ThreadPoolExecutor(THREADS) as threads:
        digests = list(threads.map(_digest, kept))
    write_object(str(path), kept)
    return {"bytes": sum(map(len, kept)), "sha256": digests}


def _write_all(file: IO[bytes], block: memoryview | bytes) -> None:
    """The kernel may take a part at a time."""
    written, view = 0, memoryview(block)
    while written < len(view):
        written += file.write(view[written:])


def _digest(block: memoryview | bytes) -> str:
    return hashlib.sha256(block).hexdigest()


def in_blocks(content: memoryview | bytes) -> Iterator[memoryview]:
    """The blocks of what lies in memory."""
    view = memoryview(content)
    return (view[first : first + BLOCK_BYTES] for first in range(0, len(view), BLOCK_BYTES))


class VerifiedFiles:
    """Ranges of the files of one folder. Every block is hashed when it is read, and given out only if it is the recorded one."""

    def __init__(self, folder: PurePath, records: Mapping[str, FileRecord]) -> None:
        self.folder, self.records = folder, records
        self._threads = ThreadPoolExecutor(THREADS)
        self._blocks: OrderedDict[tuple[str, int], tuple[bytearray, Future[memoryview]]] = OrderedDict()

    def read(self, name: str) -> bytes:
        """A whole file. Raises DamageError, naming it."""
        content = bytearray(self._size(name))
        self.read_into(name, 0, memoryview(content))
        return bytes(content)

    def read_into(self, name: str, first: int, target: memoryview) -> None:
        """Fill `target` (bytes) from position `first` on. Raises DamageError, naming the file; `target` may then be partly filled."""
        position, end = first, first + len(target)
        if end > self._size(name):
            raise DamageError(f"{self.folder / name}: has {self._size(name)} bytes, wanted those up to {end}")
        while position < end:
            number = position // BLOCK_BYTES
            block = self._block(name, number)[position - number * BLOCK_BYTES :][: end - position]
            target[position - first : position - first + len(block)] = block
            position += len(block)

    def problems(self, names: Iterable[str]) -> list[str]:
        """What is wrong with some of the files, each named; every byte of them is read."""
        found: list[str] = []
        for name in names:
            try:
                for number in range(len(self.records[name]["sha256"])):
                    self._block(name, number)
                self._size(name)
            except DamageError as error:
                found.append(str(error))
        return found

    def _size(self, name: str) -> int:
        """The recorded size, if it is the real one and of as many blocks as it should be."""
        path, record = self.folder / name, self.records.get(name)
        if record is None:
            raise DamageError(f"{path}: not in the manifest")
        try:
            size = size_of(path)
        except FileNotFoundError:
            raise DamageError(f"{path}: missing") from None
        except OSError as error:
            raise DamageError(f"{path}: cannot be read ({error})") from None
        if size != record["bytes"]:
            raise DamageError(f"{path}: {size} bytes, the manifest says {record['bytes']}")
        if len(record["sha256"]) != -(-size // BLOCK_BYTES):
            raise DamageError(f"{path}: the manifest has {len(record['sha256'])} sums for {size} bytes")
        return size

    def _block(self, name: str, number: int) -> memoryview:
        """One block, compared with its sum, until the next one is asked for; those behind it are read ahead."""
        for wanted in (number, *range(number + 1, min(number + 1 + AHEAD, len(self.records[name]["sha256"])))):
            if (name, wanted) not in self._blocks:
                memory = self._memory_for_one_more()
                self._blocks[name, wanted] = memory, self._threads.submit(self._read_block, name, wanted, memory)
            self._blocks.move_to_end((name, wanted))
        return self._blocks[name, number][1].result()

    def _memory_for_one_more(self) -> bytearray:
        if len(self._blocks) < KEPT_BLOCKS:
            return bytearray(BLOCK_BYTES)
        _, (memory, reading) = self._blocks.popitem(last=False)
        reading.exception()  # until nobody writes into it
        return memory

    def _read_block(self, name: str, number: int, memory: bytearray) -> memoryview:
        size, path = self._size(name), self.folder / name
        block = memoryview(memory)[: min(BLOCK_BYTES, size - number * BLOCK_BYTES)]
        try:
            num_read = read_part(path, number * BLOCK_BYTES, block)
        except OSError as error:
            raise DamageError(f"{path}: cannot be read ({error})") from None
        if num_read != len(block) or _digest(block) != self.records[name]["sha256"][number]:
            raise DamageError(f"{path}: its SHA-256 is not the manifest's (block {number})")
        return block

    def close(self) -> None:
        """Forget what was read ahead."""
        self._threads.shutdown(cancel_futures=True)
        self._blocks.clear()

    def __enter__(self) -> "VerifiedFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
