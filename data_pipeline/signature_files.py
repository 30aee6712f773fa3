"""What documents are compared by, in files: the hash of each text, and where near duplicates are wanted its signature.

In: a unit's texts after cleaning. Out: its survey, a folder of three arrays, made to be read in slices without reading the
rest; many such folders merged into one; and those slices. A document's ordinal is its place in the survey, from 0.

    exact.npy       uint64 [3, documents]       upper and lower half of the content's hash, and the ordinal, in this order
    bands.npy       uint64 [bands, 2, worded]   for each band, sorted: its hash and the ordinal; documents without words lack
    signatures.npy  uint32 [documents, permutations]

the latter two only where near duplicates are wanted. That is 24 + 16 * bands + 4 * permutations bytes a document: 792 as
configured.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from configs.data_section import DeduplicationSection, NearDuplicatesSection
from data_pipeline.minhash import Signatures, band_hashes, has_words, signatures

Array: TypeAlias = np.ndarray[Any, Any]
Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

EXACT = "exact.npy"
BANDS = "bands.npy"
SIGNATURES = "signatures.npy"

# These decide how the work is cut, and so its memory, never what comes out.
BLOCK_BYTES = 1 << 25
OPENED_AT_ONCE = 16

HASH_RANGE = 1 << 64


class Survey:
    """Gathers what is to be known of a unit's documents, batch by batch: 16 + 4 * permutations bytes of memory for each."""

    def __init__(self, settings: DeduplicationSection) -> None:
        self._near = settings.near
        self._hashes: list[Array] = []
        self._signatures: list[Signatures] = []

    def add(self, texts: Sequence[str]) -> None:
        """Note the next documents, by their text after cleaning."""
        self._hashes.append(np.frombuffer(b"".join(map(content_hash, texts)), dtype="<u8").reshape(-1, 2))
        if self._near is not None:
            self._signatures.append(signatures(texts, self._near))

    def write(self, folder: Path) -> None:
        """Write the survey's files into a folder that is there. Raises OSError; to make them durable is the caller's part."""
        hashes = np.concatenate([np.zeros((0, 2), dtype=np.uint64), *self._hashes])
        if self._near is None:
            write_survey(folder, hashes)
        else:
            write_survey(folder, hashes, self._signatures, self._near)


def content_hash(text: str) -> bytes:
    """128 bits of BLAKE2b over the text's UTF-8.

    Two of 10^12 texts agree by chance with a probability of 10^-15; unlike faster hashes, nobody who writes web pages can
    make two agree, and thus have another's page dropped. At some 1 GB/s it is a twentieth of the time of a signature.
    """
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def write_survey(
    folder: Path, hashes: Array, signature_blocks: Sequence[Signatures] = (), settings: NearDuplicatesSection | None = None
) -> None:
    """Write a survey into a folder that is there, from the content hashes, uint64 [documents, 2], upper half first.

    With `settings` also from the signatures, uint32 [.., num_permutations], whose blocks together have as many rows.
    Raises OSError, and ValueError where the rows differ in number.
    """
    ordinals = np.arange(len(hashes), dtype=np.uint64)
    _write_rows(folder / EXACT, np.uint64, (3, len(hashes)), [_sort_exact(hashes[:, 0], hashes[:, 1], ordinals)])
    if settings is None:
        return
    if sum(map(len, signature_blocks)) != len(hashes):
        raise ValueError(f"{sum(map(len, signature_blocks))} signatures for {len(hashes)} documents")
    _write_rows(folder / SIGNATURES, np.uint32, (len(hashes), settings.num_permutations), signature_blocks)
    worded = np.concatenate([np.zeros(0, dtype=np.bool_), *(has_words(block) for block in signature_blocks)])
    found = [band_hashes(block, settings.num_bands) for block in signature_blocks]
    bands = np.concatenate([np.zeros((0, settings.num_bands), dtype=np.uint64), *found])[worded]
    rows = (_sort_band(bands[:, band], ordinals[worded]) for band in range(settings.num_bands))
    _write_rows(folder / BANDS, np.uint64, (settings.num_bands, 2, len(bands)), rows)


def merge_surveys(folders: Sequence[Path], target: Path) -> None:
    """Write into the folder `target`, which is there, the survey of all documents of these surveys, in this order.

    Memory: some 100 bytes a document, and BLOCK_BYTES. Raises OSError.
    """
    firsts = first_numbers(folders)
    exact = [open_array(folder / EXACT) for folder in folders]
    high, low = (np.concatenate([part[row] for part in exact]) for row in (0, 1))
    ordinals = np.concatenate([part[2] + np.uint64(first) for part, first in zip(exact, firsts[:-1], strict=True)])
    _write_rows(target / EXACT, np.uint64, (3, len(high)), [_sort_exact(high, low, ordinals)])
    del exact, high, low, ordinals
    if not (folders[0] / BANDS).exists():
        return
    bands = [open_array(folder / BANDS) for folder in folders]

    def merge_bands() -> Iterator[Array]:
        for band in range(bands[0].shape[0]):
            hashes = np.concatenate([part[band, 0] for part in bands])
            yield _sort_band(
                hashes, np.concatenate([part[band, 1] + np.uint64(first) for part, first in zip(bands, firsts[:-1], strict=True)])
            )

    _write_rows(target / BANDS, np.uint64, (bands[0].shape[0], 2, sum(part.shape[2] for part in bands)), merge_bands())

    def read_signatures() -> Iterator[Array]:
        for folder in folders:
            part = open_array(folder / SIGNATURES)
            rows = rows_at_once(part.shape[1])
            yield from (part[first : first + rows] for first in range(0, len(part), rows))

    _write_rows(target / SIGNATURES, np.uint32, (int(firsts[-1]), open_array(folders[0] / SIGNATURES).shape[1]), read_signatures())


def first_numbers(folders: Sequence[Path]) -> Numbers:
    """The number of each survey's first document, and behind them that of all: int64 [surveys + 1]. Raises OSError."""
    with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:  # over a network each file is a wait, and there are many
        counts = list(threads.map(_count_documents, folders))
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def slice_of(hashes: Array, partition: int, num_partitions: int) -> slice:
    """Where a part of the hashes' range lies in the sorted hashes."""
    first, end = (-(-HASH_RANGE * part // num_partitions) for part in (partition, partition + 1))
    return slice(
        int(np.searchsorted(hashes, np.uint64(first))),
        len(hashes) if end == HASH_RANGE else int(np.searchsorted(hashes, np.uint64(end))),
    )


def read_signatures(surveys: Sequence[Array], firsts: Numbers, documents: Numbers) -> Signatures:
    """The documents' signatures, wherever they lie: uint32 [documents, permutations]."""
    result = np.empty((len(documents), surveys[0].shape[1]), dtype=np.uint32)
    homes = np.searchsorted(firsts, documents, side="right") - 1
    for home in np.unique(homes):
        here = homes == home
        result[here] = surveys[home][documents[here] - firsts[home]]
    return result


def rows_at_once(num_permutations: int) -> int:
    """How many signatures are read at once: BLOCK_BYTES of them."""
    return max(1, BLOCK_BYTES // (4 * num_permutations))


def open_array(path: Path) -> Array:
    """An array of a file, of which only what is looked at is read."""
    return np.load(path, mmap_mode="r")


def _sort_exact(high: Array, low: Array, ordinals: Array) -> Array:
    order = np.lexsort((low, high))
    return np.stack([high[order], low[order], ordinals[order]])


def _sort_band(hashes: Array, ordinals: Array) -> Array:
    order = np.argsort(hashes, kind="stable")  # which merges runs that are sorted already, instead of sorting them again
    return np.stack([hashes[order], ordinals[order]])


def _count_documents(folder: Path) -> int:
    return int(open_array(folder / EXACT).shape[1])


def _write_rows(path: Path, dtype: type[np.generic], shape: tuple[int, ...], blocks: Iterable[Array]) -> None:
    """Write an array of a known shape, block by block, as `numpy.save` would write the whole."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        )
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype=dtype).data)
