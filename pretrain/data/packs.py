"""Samples that were packed when the data was built: sample number -> the pieces of documents it is made of.

In: the records of a source's shards and a sequence length. Out: which tokens of which shard are the targets of a sample.
As everywhere, the input of a target is the token before it; before a document's first token stands an end of text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from configs.durable import sha256_of_file
from configs.errors import UserError
from data_pipeline.packing import Packs, packs_name, read_packs
from data_pipeline.records import ShardRecord
from pretrain.data.remote import Find

Numbers = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """Neighbouring tokens of one document that are targets of one sample."""

    file: int
    first_token: int
    num_tokens: int


class PackedSource:
    """The packs of a source's shards, one behind the other."""

    def __init__(self, find: Find, shards: Sequence[ShardRecord], first_file: int, length: int) -> None:
        """find: where a file of the dataset is. first_file: the number of the first shard among `TokenFiles`.

        Raises UserError where no packs of that length were built.
        """
        try:
            num_packs = [shard.num_packs(length) for shard in shards]
        except KeyError:
            missing = next(shard.name for shard in shards if str(length) not in shard.packings)
            raise UserError(
                f"{missing} has no packs of {length} tokens, which training.packing best_fit needs; add {length} to "
                "data.packed_lengths and build the data again, or set training.packing to chop."
            ) from None
        self._find, self._length, self._shards = find, length, tuple(shards)
        self._first = first_file
        self._starts = np.cumsum([0, *num_packs])
        self._packs: dict[int, Packs] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def pieces(self, sample: int) -> list[Piece]:
        """What a sample is made of. Raises UserError for an index that is missing or damaged."""
        index = int(np.searchsorted(self._starts, sample, side="right")) - 1
        if index not in self._packs:
            self._packs[index] = self._open(index)
        packs, number = self._packs[index], sample - int(self._starts[index])
        pieces = slice(int(packs.pack_starts[number]), int(packs.pack_starts[number + 1]))
        spans = zip(packs.first_token[pieces].tolist(), packs.num_tokens[pieces].tolist(), strict=True)
        return [Piece(self._first + index, first, num) for first, num in spans]

    def _open(self, index: int) -> Packs:
        shard = self._shards[index]
        name = packs_name(shard.name, self._length)
        path = self._find(name, shard.files[name])
        packs = read_packs(path)
        if sha256_of_file(path) != shard.files[name].sha256:
            raise UserError(f"{path}: its SHA-256 differs from the manifest's; see `pretrain data verify`.")
        return packs
