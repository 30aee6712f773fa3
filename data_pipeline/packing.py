"""A shard's documents packed into samples of T targets, so that only a document longer than T is cut.

In: where the documents of a shard start. Out: packs, in memory or in `<prefix>.packed-<T>.npy`: which tokens stand in which
sample. Best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"): a document longer than T is
cut into pieces of exactly T tokens and a rest, every other document is one piece; the pieces, the longest first, go each into
the pack with the least room that still holds it, or else into a new one. A pack is a sample: its pieces are the targets, one
behind the other, and padding fills it up to T. Every token of the shard is in exactly one piece.

The file is one row of int64, little-endian, for P packs of together N pieces; `numpy.load` reads it:

    T, P, pack_starts [P + 1], first_token [N], num_tokens [N]
"""

import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from configs.errors import UserError

HEADER_BYTES = 128

Numbers = npt.NDArray[np.int64]


class Packs(NamedTuple):
    """The samples that a shard was packed into."""

    length: int
    """T: tokens that a pack has room for."""
    pack_starts: Numbers
    """Where each pack's pieces start in the arrays below, and behind the last one the number of pieces (packs + 1)."""
    first_token: Numbers
    """Of each piece, pack after pack: the token of the shard that it begins with. Inside a pack they ascend."""
    num_tokens: Numbers
    """Of each piece: 1 to T."""

    @property
    def num_packs(self) -> int:
        """Samples that the shard makes."""
        return self.pack_starts.size - 1


class PackingCounts(NamedTuple):
    """What making samples out of a shard does to its documents."""

    num_packs: int
    documents: int
    """All of the shard's, also those without a token."""
    documents_cut: int
    """Those whose tokens are targets in more than one sample."""
    padding_tokens: int
    """Targets that nothing is learnt from."""


def pack_documents(document_starts: Numbers, length: int) -> Packs:
    """Pack documents by best-fit decreasing into packs of `length` tokens.

    document_starts: as `Shard.document_starts`, in tokens (documents + 1). Pieces of equal length are placed in the order of
    the shard, and of packs with equal room the one that was opened first is filled, so the result is a function of the
    arguments; packs are numbered as they were opened. Time O(n log n + T) for n pieces. Raises ValueError for a length below 1.
    """
    if length < 1:
        raise ValueError(f"packs of {length} tokens; wanted at least 1")
    first_token, num_tokens = _cut(document_starts, length)
    longest_first = np.argsort(-num_tokens, kind="stable")
    pack = np.empty(num_tokens.size, dtype=np.int64)
    pack[longest_first] = _place(num_tokens[longest_first].tolist(), length)
    pack_order = np.argsort(pack, kind="stable")
    pack_starts = np.concatenate([[0], np.cumsum(np.bincount(pack))])
    return Packs(length, pack_starts, first_token[pack_order], num_tokens[pack_order])


def _cut(document_starts: Numbers, length: int) -> tuple[Numbers, Numbers]:
    """First token and number of tokens of every piece, in the order of the shard."""
    starts, ends = document_starts[:-1], document_starts[1:]
    pieces_of_document = -(-(ends - starts) // length)
    first_piece = np.cumsum(pieces_of_document) - pieces_of_document
    piece_in_document = np.arange(pieces_of_document.sum()) - np.repeat(first_piece, pieces_of_document)
    first_token = np.repeat(starts, pieces_of_document) + piece_in_document * length
    return first_token, np.minimum(length, np.repeat(ends, pieces_of_document) - first_token)


def _place(longest_first: list[int], length: int) -> list[int]:
    """The pack of each piece, the pieces given by their tokens in descending order.

    No search is needed, since what a piece asks for only ever falls. The packs that hold the next piece are a stack with the
    least room on top: it was filled to leave less room than any below it, or so little that it waits. Those that wait come
    back on top when the pieces have become short enough, and had less room than any that stayed.
    """
    room: list[int] = []
    """Of each pack."""
    fitting: list[int] = []
    """Packs that hold the next piece: by descending room, and where that is equal the one opened first last."""
    waiting: list[list[int]] = [[] for _ in range(length)]
    """The other packs, by their room."""
    packs: list[int] = []
    shortest = length
    for num_tokens in longest_first:
        for enough in range(shortest - 1, num_tokens - 1, -1):
            fitting.extend(sorted(waiting[enough], reverse=True))
        shortest = num_tokens
        if fitting:
            pack = fitting.pop()
        else:
            pack = len(room)
            room.append(length)
        room[pack] -= num_tokens
        (fitting if room[pack] >= num_tokens else waiting[room[pack]]).append(pack)
        packs.append(pack)
    return packs


def count_best_fit(packs: Packs, document_starts: Numbers) -> PackingCounts:
    """What the packs of a shard did to its documents, counted piece by piece."""
    document_of_piece = np.searchsorted(document_starts, packs.first_token, side="right") - 1
    return PackingCounts(
        num_packs=packs.num_packs,
        documents=document_starts.size - 1,
        documents_cut=int(np.count_nonzero(np.bincount(document_of_piece) > 1)),
        padding_tokens=packs.num_packs * packs.length - int(packs.num_tokens.sum()),
    )


def count_chopped(document_starts: Numbers, length: int) -> PackingCounts:
    """What it would do to them to concatenate them, from the shard's first token on, and chop every `length` tokens.

    The last sample goes on in the next shard, so there is no padding.
    """
    bounds = document_starts - document_starts[0]
    first_sample, last_sample = bounds[:-1] // length, (bounds[1:] - 1) // length
    return PackingCounts(
        num_packs=-(-int(bounds[-1]) // length),
        documents=bounds.size - 1,
        documents_cut=int(np.count_nonzero(first_sample < last_sample)),
        padding_tokens=0,
    )


def packs_name(prefix: Path | str, length: int) -> str:
    """The file with a shard's packs of `length` tokens."""
    return f"{prefix}.packed-{length}.npy"


def write_packs(path: Path, packs: Packs) -> None:
    """Write packs to a file.

    It promises nothing about crashes, as `ShardWriter`: write into a temporary folder and commit that. Raises OSError.
    """
    values = np.concatenate([[packs.length, packs.num_packs], packs.pack_starts, packs.first_token, packs.num_tokens])
    path.write_bytes(_header(values.size) + values.astype("<i8").tobytes())


def read_packs(path: Path) -> Packs:
    """Packs of a file, mapped into memory: opening reads none of the pieces.

    Raises UserError where the file is missing, or its size or header says that it is damaged (a changed number inside is found
    by the hash in the manifest); OSError.
    """
    try:
        with path.open("rb") as file:
            header, num_bytes = file.read(HEADER_BYTES), path.stat().st_size
            num_values, left_over = divmod(num_bytes - HEADER_BYTES, 8)
            if num_values < 3 or left_over or header != _header(num_values):
                raise UserError(
                    f"{path}: found {num_bytes} bytes with another beginning than a file of packs of that size has; it is cut off "
                    "or damaged, see `pretrain data verify`."
                )
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it says which documents make a sample, and stands beside a packed shard.") from None
    values = np.frombuffer(mapped, "<i8", num_values, HEADER_BYTES)
    length, num_packs = values[:2].tolist()
    num_pieces, left_over = divmod(num_values - 3 - num_packs, 2)
    if length < 1 or num_packs < 0 or num_pieces < 0 or left_over or values[2] != 0 or values[2 + num_packs] != num_pieces:
        raise UserError(
            f"{path}: its {num_values} numbers cannot be {num_packs} packs of {length} tokens; it is damaged, see `pretrain data verify`."
        )
    pack_starts, first_token, num_tokens = np.split(values[2:], [num_packs + 1, num_packs + 1 + num_pieces])
    return Packs(length, pack_starts, first_token, num_tokens)


def _header(num_values: int) -> bytes:
    """What `numpy.save` writes before a row of int64 (format 1.0).

    Compared as a whole: numpy's own reading of a damaged header ends in errors of many kinds, or in another type.
    """
    description = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({num_values},), }}"
    return b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + description.ljust(HEADER_BYTES - 11).encode() + b"\n"
