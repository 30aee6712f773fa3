"""`TokenFiles` of a dataset in an object store: the same rows, through a cache of this node.

In: what `TokenFiles` is given, and a `BlockCache`. Out: the same. What is announced is fetched at once, for all rows of a step,
and kept until it is read; so a step that is read ahead of use is fetched ahead of use.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.records import ShardRecord
from pretrain.data.staging import BlockCache
from pretrain.data.tokens import Numbers, TokenFiles, Tokens


class StagedTokenFiles(TokenFiles):
    """The `.bin` files of shards that stand one behind the other in a cache's dataset."""

    is_mapped = False

    def __init__(
        self,
        shards: Sequence[ShardRecord],
        dtype: str,
        end_of_text: int,
        cache: BlockCache,
        first_file: int,
        prepare: Callable[[list[int]], None],
        closing: threading.Event,
    ) -> None:
        """first_file: the number of the first shard in the cache. prepare: told which of the cache's files will be read.

        closing: set when nothing is waited for any more.
        """
        super().__init__(Path(), (), dtype, end_of_text)
        self._cache, self._first_file, self._prepare, self._closing = cache, first_file, prepare, closing
        self._sizes = [shard.num_tokens for shard in shards]
        self._announced: dict[tuple[int, int, int], Tokens] = {}

    def announce(self, file_p: Numbers, first_token_p: Numbers, num_tokens_p: Numbers) -> None:
        """Fetch what will be read soon. Raises UserError as `BlockCache.read` does."""
        wanted = dict.fromkeys(zip(file_p.tolist(), first_token_p.tolist(), num_tokens_p.tolist(), strict=True))
        self._announced |= self._fetch([key for key in wanted if key not in self._announced])

    def read_row(self, file: int, offset: int, row: Tokens) -> None:
        """One row, as `TokenFiles.read` does; announced or not."""
        key = (file, offset, row.size - 1)
        found = self._announced.pop(key, None)
        tokens = self._fetch([key])[key] if found is None else found
        row[: row.size - tokens.size] = self.end_of_text  # before a file's first token
        row[row.size - tokens.size :] = tokens

    def close(self) -> None:
        """Wait for no store any more."""
        self._closing.set()

    def _fetch(self, keys: list[tuple[int, int, int]]) -> dict[tuple[int, int, int], Tokens]:
        """By file, first token and number of tokens: those, with the one before them where the file has one."""
        if not keys:  # a rank without held-out text of its own has nothing to ask for
            return {}
        pieces = [list(self._cut(*key)) for key in keys]
        columns = np.array([piece for found in pieces for piece in found], dtype=np.int64).reshape(-1, 3)
        size, file_p = self.dtype.itemsize, self._first_file + columns[:, 0]
        self._prepare(np.unique(file_p).tolist())
        tokens = self._cache.read(file_p, columns[:, 1] * size, columns[:, 2] * size).view(self.dtype)
        ends = np.cumsum([sum(num_tokens for _, _, num_tokens in found) for found in pieces])
        return dict(zip(keys, np.split(tokens, ends[:-1]), strict=True))

    def _cut(self, file: int, first: int, num_tokens: int) -> Iterator[tuple[int, int, int]]:
        """A row as parts of files: one that is longer than what is left of its file goes on in the next."""
        start, left = (first - 1, num_tokens + 1) if first else (0, num_tokens)
        while left:
            part = min(left, self._sizes[file] - start)
            if part:
                yield file, start, part
            left, file, start = left - part, file + 1, 0


def wait_unless_closed(closing: threading.Event, seconds: float) -> None:
    """Sleep. Raises RuntimeError when closing comes first."""
    if closing.wait(seconds):
        raise RuntimeError("closed while an object store was waited for")
