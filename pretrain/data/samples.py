"""Places of samples -> their tokens: inputs, targets, and where documents begin.

In: a corpus and what `DataOrder.places` says. Out: first where the samples lie, so that the tokens can be asked for ahead of
use, then rows of them. A sample is T targets and, as inputs, the token before each. Chopped, sample number s of a source has
its tokens [s T, (s + 1) T) as targets; packed, those of the pieces that were put together when the data was built, and
padding behind them.

Shapes: n samples, T tokens of one, p pieces of all of them.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.corpus import Corpus
from pretrain.data.order import Places
from pretrain.data.pool import Pool

IGNORED_LABEL = -100
"""A target that nothing is learnt from (torch's `ignore_index`)."""

Numbers = npt.NDArray[np.int64]


class Spans(NamedTuple):
    """The neighbouring tokens of a file that are targets of one sample; piece after piece, sample after sample."""

    file_p: Numbers
    first_token_p: Numbers
    num_tokens_p: Numbers
    starts_n: Numbers
    """The first piece of each sample, and behind the last one the number of pieces (n + 1)."""

    def part(self, first: int, end: int) -> "Spans":
        """Those of samples first .. end - 1."""
        pieces = slice(int(self.starts_n[first]), int(self.starts_n[end]))
        starts_n = self.starts_n[first : end + 1] - self.starts_n[first]
        return Spans(self.file_p[pieces], self.first_token_p[pieces], self.num_tokens_p[pieces], starts_n)


class Rows(NamedTuple):
    """Samples, one per row."""

    inputs_nT: npt.NDArray[np.int32]
    labels_nT: npt.NDArray[np.int32]
    """The next token at each place, or `IGNORED_LABEL`."""
    is_start_nT: npt.NDArray[np.bool_]
    """Where a document begins, or goes on in another piece."""

    @classmethod
    def empty(cls, num_samples: int, length: int, pool: Pool) -> "Rows":
        """Rows to be filled."""
        inputs_nT, labels_nT, is_start_nT = (pool.empty((num_samples, length), kind) for kind in (np.int32, np.int32, np.bool_))
        return cls(inputs_nT, labels_nT, is_start_nT)

    def part(self, first: int, end: int) -> "Rows":
        """Rows first .. end - 1."""
        return Rows(self.inputs_nT[first:end], self.labels_nT[first:end], self.is_start_nT[first:end])


def locate_samples(corpus: Corpus, places: Places, length: int) -> Spans:
    """Where the samples at `places`, of `length` tokens, lie. Raises UserError for an index of packs that is missing or was changed."""
    if corpus.packs is not None:
        wanted = zip(places.source_n.tolist(), places.sample_n.tolist(), strict=True)
        found = [corpus.packs[source].pieces(sample) for source, sample in wanted]
        pieces_p3 = np.array([piece for pieces in found for piece in pieces], dtype=np.int64).reshape(-1, 3)
        return Spans(pieces_p3[:, 0], pieces_p3[:, 1], pieces_p3[:, 2], np.cumsum([0, *map(len, found)]))
    file_n, first_token_n = np.empty_like(places.sample_n), np.empty_like(places.sample_n)
    for source in np.unique(places.source_n):
        here = places.source_n == source
        file_n[here], first_token_n[here] = corpus.streams[source].locate(places.sample_n[here] * length)
    return Spans(file_n, first_token_n, np.full_like(file_n, length), np.arange(file_n.size + 1))


def read_samples(corpus: Corpus, spans: Spans, rows: Rows, pool: Pool) -> int:
    """Fill rows with the samples that lie there; gives the number of targets that something is learnt from.

    Raises UserError for data that is missing or was changed.
    """
    return _read_chopped(corpus, spans, rows, pool) if corpus.packs is None else _read_packed(corpus, spans, rows)


def _read_chopped(corpus: Corpus, spans: Spans, rows: Rows, pool: Pool) -> int:
    files, (num_samples, length) = corpus.streams[0].files, rows.inputs_nT.shape
    tokens_nT1 = pool.empty((num_samples, length + 1), files.dtype)
    files.read(spans.file_p, spans.first_token_p, tokens_nT1)
    np.copyto(rows.inputs_nT, tokens_nT1[:, :-1])
    np.copyto(rows.labels_nT, tokens_nT1[:, 1:])
    np.equal(tokens_nT1[:, :-1], files.dtype.type(corpus.end_of_text), out=rows.is_start_nT)
    return rows.labels_nT.size


def _read_packed(corpus: Corpus, spans: Spans, rows: Rows) -> int:
    files, num_valid = corpus.streams[0].files, 0
    for column, filling in zip(rows, (corpus.end_of_text, IGNORED_LABEL, False), strict=True):
        column.fill(filling)
    pieces = list(zip(spans.file_p.tolist(), spans.first_token_p.tolist(), spans.num_tokens_p.tolist(), strict=True))
    for row, (first_piece, end_piece) in enumerate(pairwise(spans.starts_n.tolist())):
        at = 0
        for file, first, num_tokens in pieces[first_piece:end_piece]:
            piece_n1 = np.empty(num_tokens + 1, dtype=files.dtype)
            files.read_row(file, first, piece_n1)
            rows.inputs_nT[row, at : at + num_tokens] = piece_n1[:-1]
            rows.labels_nT[row, at : at + num_tokens] = piece_n1[1:]
            rows.is_start_nT[row, at] = True
            at += num_tokens
        rows.is_start_nT[row, at : at + 1] = True  # padding is a document of its own
        num_valid += at
    return num_valid
