"""Tokens of a built dataset, read in rows from anywhere, each block of a file checked the first time it is touched.

In: a dataset's folder and the records of its shards. Out: rows of token ids. A file is opened when it is first read, mapped
into memory, and only the blocks that a row lies in are looked at; so opening a corpus costs the same for any size.
"""

import mmap
import resource
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from data_pipeline.checksums import BLOCK_BYTES, SUFFIX, block_is_whole, read_checksums
from data_pipeline.records import ShardRecord

PAGE_BYTES = mmap.PAGESIZE

Numbers = npt.NDArray[np.int64]
Tokens = npt.NDArray[Any]


class TokenFiles:
    """The `.bin` files of shards that stand one behind the other."""

    is_mapped = True
    """Whether what is announced comes while something else is done."""

    def __init__(self, folder: Path, shards: Sequence[ShardRecord], dtype: str, end_of_text: int) -> None:
        self.dtype = np.dtype(dtype)
        self.end_of_text = end_of_text
        self._folder, self._shards = folder, tuple(shards)
        self._block_tokens = BLOCK_BYTES // self.dtype.itemsize
        self._maps: dict[int, mmap.mmap] = {}
        self._tokens: list[Tokens | None] = [None] * len(shards)
        self._unchecked: list[bytearray] = [bytearray()] * len(shards)
        """For each block of an opened file 1 until it has been compared with its sum."""
        self._sums: list[npt.NDArray[np.uint32]] = [np.empty(0, np.uint32)] * len(shards)
        _allow_open_files(2 * len(shards))  # with an index of packs beside each

    def read(self, file_n: Numbers, offset_n: Numbers, rows_nT1: Tokens) -> None:
        """Fill each row with the token before offset_n[n] of file file_n[n], and the T tokens from there on.

        A row that is longer than what is left of its file goes on in the next; before a file's first token stands the end of
        a text. Raises UserError for a file that is missing, has another size, or a block with another sum than when it was built.
        """
        for row, file, offset in zip(rows_nT1, file_n.tolist(), offset_n.tolist(), strict=True):
            self.read_row(file, offset, row)

    def read_row(self, file: int, offset: int, row: Tokens) -> None:
        """One row, as `read` does."""
        tokens = self._tokens[file]
        if tokens is None:
            tokens = self._open(file)
        end = offset + row.size - 1
        if offset and end <= tokens.size:
            block, last = (offset - 1) // self._block_tokens, (end - 1) // self._block_tokens + 1
            if 1 in self._unchecked[file][block:last]:
                self._check(file, block, last)
            row[:] = tokens[offset - 1 : end]
        else:
            self._read_across(file, offset, row)

    def announce(self, file_p: Numbers, first_token_p: Numbers, num_tokens_p: Numbers) -> None:
        """Ask the operating system for what will be read soon: whole blocks that are still to be checked, else the rows' own pages."""
        size, grain = self.dtype.itemsize, PAGE_BYTES // self.dtype.itemsize
        start_p, end_p = np.maximum(first_token_p - 1, 0), first_token_p + num_tokens_p
        block_p, last_p = start_p // self._block_tokens, (end_p - 1) // self._block_tokens + 1
        page_p = start_p // grain * PAGE_BYTES
        num_bytes_p = end_p * size - page_p
        columns = (column.tolist() for column in (file_p, block_p, last_p, page_p, num_bytes_p))
        for file, block, last, page, num_bytes in zip(*columns, strict=True):
            tokens = self._tokens[file]
            if tokens is None:
                tokens = self._open(file)
            if 1 in self._unchecked[file][block:last]:
                page, num_bytes = block * BLOCK_BYTES, (last - block) * BLOCK_BYTES
            self._maps[file].madvise(mmap.MADV_WILLNEED, page, min(num_bytes, tokens.nbytes - page))

    def close(self) -> None:
        """Wait for nothing any more."""

    def _read_across(self, file: int, offset: int, row: Tokens) -> None:
        if offset == 0:
            row[0], filled = self.end_of_text, 1
        else:
            offset, filled = offset - 1, 0
        while filled < row.size:
            tokens = self._tokens[file]
            if tokens is None:
                tokens = self._open(file)
            part = tokens[offset : offset + row.size - filled]
            if part.size:
                self._check(file, offset // self._block_tokens, (offset + part.size - 1) // self._block_tokens + 1)
            row[filled : filled + part.size] = part
            filled, file, offset = filled + part.size, file + 1, 0

    def _check(self, file: int, block: int, last: int) -> None:
        tokens, unchecked = self._tokens[file], self._unchecked[file]
        assert tokens is not None, "a file is opened before its blocks are checked"
        for number in range(block, last):
            if unchecked[number]:
                content = tokens[number * self._block_tokens : (number + 1) * self._block_tokens]
                if not block_is_whole(content.data, int(self._sums[file][number])):
                    first = number * BLOCK_BYTES
                    raise UserError(
                        f"{self._path(file)}: bytes {first} to {first + content.nbytes - 1} are not those that were built (their CRC32C "
                        "differs); `pretrain data verify` finds all that changed. Put the file back or build the dataset again, then "
                        "start the same command."
                    )
                unchecked[number] = 0

    def _open(self, file: int) -> Tokens:
        record, path = self._shards[file], self._path(file)
        try:
            found = path.stat().st_size
            if found != record.num_tokens * self.dtype.itemsize:
                raise UserError(f"{path}: found {found} bytes, wanted {record.num_tokens * self.dtype.itemsize}; it is damaged.")
            content = Path(f"{self._folder / record.name}{SUFFIX}").read_bytes()
            with path.open("rb") as opened:
                self._maps[file] = mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: no such file, and the manifest names it; see `pretrain data verify`.") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be opened: {error.strerror}; see `pretrain data verify`.") from None
        if sha256(content).hexdigest() != record.files[f"{record.name}{SUFFIX}"].sha256:
            raise UserError(f"{record.name}{SUFFIX}: its SHA-256 differs from the manifest's; see `pretrain data verify`.")
        # Rows are read from anywhere: reading ahead of each would bring in forty times what is wanted (measured).
        mapped.madvise(mmap.MADV_RANDOM)
        tokens = np.frombuffer(mapped, self.dtype)
        self._sums[file] = read_checksums(content)
        self._unchecked[file] = bytearray(b"\1" * self._sums[file].size)
        self._tokens[file] = tokens
        return tokens

    def _path(self, file: int) -> Path:
        return Path(f"{self._folder / self._shards[file].name}.bin")


def _allow_open_files(num_files: int) -> None:
    """Python keeps a descriptor for each map, and the usual limit of 1,024 is fewer than a large corpus has files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        with suppress(OSError, ValueError):  # where it may not be raised, the files are opened as far as it reaches
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (soft + num_files if hard == resource.RLIM_INFINITY else min(hard, soft + num_files), hard)
            )


class TokenStream:
    """Some neighbouring files as one long row of tokens."""

    def __init__(self, files: TokenFiles, first_file: int, num_tokens: Sequence[int]) -> None:
        """num_tokens: of each file, from `first_file` on."""
        self.files = files
        self._first = first_file
        self._starts = np.cumsum([0, *num_tokens])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, token_n: Numbers) -> tuple[Numbers, Numbers]:
        """File and offset in it of tokens of the stream."""
        index_n = np.searchsorted(self._starts, token_n, side="right") - 1
        return self._first + index_n, token_n - self._starts[index_n]

    def read(self, first: int, length: int) -> Tokens:
        """The token before `first` (at the very beginning, the end of a text) and `length` tokens from there on.

        Raises IndexError beyond the end; UserError as `TokenFiles.read` does.
        """
        if first < 0 or length < 1 or first + length > len(self):
            raise IndexError(f"tokens [{first}, {first + length}) of a stream of {len(self)}")
        row_1T1 = np.empty((1, length + 1), dtype=self.files.dtype)
        self.files.read(*self.locate(np.array([first])), row_1T1)
        return row_1T1[0]
