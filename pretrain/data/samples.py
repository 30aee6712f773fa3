"""Places of samples -> their tokens: inputs, targets, and where documents begin.

In: a corpus and what `DataOrder.places` says. Out: rows of a step. A sample is T targets and, as inputs, the token before
each. Chopped, sample number s of a source has its tokens [s T, (s + 1) T) as targets; packed, those of the pieces that
were put together when the data was built, and padding behind them.

Shapes: n samples, T tokens of one.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.corpus import Corpus
from pretrain.data.order import Places

IGNORED_LABEL = -100
"""A target that nothing is learnt from (torch's `ignore_index`)."""


class Rows(NamedTuple):
    """Samples, one per row. Views where nothing had to be copied."""

    inputs_nT: npt.NDArray[Any]
    labels_nT: npt.NDArray[Any]
    """The next token at each place, or `IGNORED_LABEL`."""
    is_start_nT: npt.NDArray[np.bool_]
    """Where a document begins, or goes on in another piece."""


def read_samples(corpus: Corpus, places: Places, length: int) -> Rows:
    """The samples at `places`, of `length` tokens. Raises UserError for data that is missing or was changed."""
    return _read_chopped(corpus, places, length) if corpus.packs is None else _read_packed(corpus, places, length)


def _read_chopped(corpus: Corpus, places: Places, length: int) -> Rows:
    files = corpus.streams[0].files
    file_n, offset_n = np.empty_like(places.sample_n), np.empty_like(places.sample_n)
    for source in np.unique(places.source_n):
        here = places.source_n == source
        file_n[here], offset_n[here] = corpus.streams[source].locate(places.sample_n[here] * length)
    rows_nT1 = np.empty((places.sample_n.size, length + 1), dtype=files.dtype)
    files.announce(file_n, offset_n, length)
    files.read(file_n, offset_n, rows_nT1)
    inputs_nT = rows_nT1[:, :-1]
    return Rows(inputs_nT, rows_nT1[:, 1:], inputs_nT == corpus.end_of_text)


def _read_packed(corpus: Corpus, places: Places, length: int) -> Rows:
    assert corpus.packs is not None, "only a packed corpus has packs"
    files, shape = corpus.streams[0].files, (places.sample_n.size, length)
    rows = Rows(np.full(shape, corpus.end_of_text, np.int32), np.full(shape, IGNORED_LABEL, np.int32), np.zeros(shape, np.bool_))
    for row, (source, sample) in enumerate(zip(places.source_n.tolist(), places.sample_n.tolist(), strict=True)):
        at = 0
        for file, first, num_tokens in corpus.packs[source].pieces(sample):
            piece_n1 = np.empty(num_tokens + 1, dtype=files.dtype)
            files.read_row(file, first, piece_n1)
            rows.inputs_nT[row, at : at + num_tokens] = piece_n1[:-1]
            rows.labels_nT[row, at : at + num_tokens] = piece_n1[1:]
            rows.is_start_nT[row, at] = True
            at += num_tokens
        rows.is_start_nT[row, at : at + 1] = True  # padding is a document of its own
    return rows
