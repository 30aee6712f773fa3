"""Tokens and an order -> the micro-batches of one data rank.

In: a corpus, a `DataOrder`, this rank's place among the data ranks. Out: for each step, the micro-batches that this rank
feeds the engine, read ahead by a thread. A step covers the samples that come next, as many as `Steps.batch_at` says; micro-step m
takes the next `micro_batch_samples x data_size` of them and rank r the r-th part, so the global order is the same for
every number of ranks and every split into micro-steps.

The end-of-text token that closes a document is also what the next one is predicted from, so a document is an end of text
and all that follows up to the next, and its first word is learnt too.

Two things may be done with what was read, each a pure function: documents are rearranged while they are rows of tokens
(`fill_in_the_middle.py`), and labels are chosen when they are a micro-batch (`objective.py`).

Shapes: B sequences, T tokens of one.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from configs.errors import UserError
from configs.schema import TrainingSection
from pretrain.data.corpus import Corpus
from pretrain.data.order import DataOrder, Places
from pretrain.data.pool import Pool
from pretrain.data.samples import IGNORED_LABEL, Numbers, Rows, Spans, locate_samples, read_samples
from pretrain.data.tokens import TokenStream

STEPS_AHEAD = 2
"""Steps that are read while one is learnt from."""
ARRIVAL_POLL_SECONDS = 1.0
PLACES_AT_ONCE = 4096
"""Samples; the order of a few costs ten times as much for each."""

Integers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank feeds the engine once."""

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    """The next token at each place, or `IGNORED_LABEL`."""
    num_valid: int
    """Targets that something is learnt from."""
    documents_BT: torch.Tensor | None = None
    """Another number for each document of a row; None: all of a row see each other."""
    positions_BT: torch.Tensor | None = None
    """Where each place stands in its document; None: positions count from the row's beginning."""
    prefix_BT: torch.Tensor | None = None
    """Places (True) that see each other in both directions within their document; None: every place sees only what is before it."""
    source: int = 0
    """Of held-out text: which source all of its targets are of."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        """With every tensor changed: to a device, to pinned memory."""
        given = (self.documents_BT, self.positions_BT, self.prefix_BT)
        changed = (None if tensor is None else change(tensor) for tensor in given)
        return MicroBatch(change(self.tokens_BT), change(self.labels_BT), self.num_valid, *changed, source=self.source)

    def to(self, device: torch.device) -> "MicroBatch":
        """On a device; from pinned memory the copy runs beside the computation."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


Rearrange: TypeAlias = Callable[[Rows, Numbers, int], None]
"""Changes samples in place, by their rows, their numbers in the run's order, and the length of the sequences they are cut into."""
Objective: TypeAlias = Callable[[MicroBatch], MicroBatch]
"""Chooses what is learnt from a micro-batch; shapes stay."""


def make_batch(rows: Rows, num_valid: int, sequence_length: int, training: TrainingSection, pool: Pool) -> MicroBatch:
    """Samples as tensors of `sequence_length` tokens, of which each begins a document."""
    inputs_BT, labels_BT, is_start_BT = (column.reshape(-1, sequence_length) for column in rows)
    documents_BT = positions_BT = None
    if training.separate_documents or training.restart_positions:
        is_start_BT[:, 0] = True
        starts = np.flatnonzero(is_start_BT)
        ends = np.append(starts[1:], is_start_BT.size)
        first_BT = pool.empty(is_start_BT.shape, np.int32)  # a document's number is the place where it begins
        first_BT.reshape(-1)[:] = np.repeat(starts.astype(np.int32), ends - starts)
        if training.separate_documents:
            documents_BT = torch.from_numpy(first_BT)
        if training.restart_positions:
            found_BT = pool.empty(is_start_BT.shape, np.int32)
            positions_BT = torch.from_numpy(np.subtract(_count_up(is_start_BT.size).reshape(is_start_BT.shape), first_BT, out=found_BT))
    return MicroBatch(torch.from_numpy(inputs_BT), torch.from_numpy(labels_BT), num_valid, documents_BT, positions_BT)


@lru_cache(maxsize=4)
def _count_up(size: int) -> Integers:
    return np.arange(size, dtype=np.int32)


class Batches:
    """The micro-batches of one data rank, step after step, from any sample on."""

    def __init__(
        self,
        corpus: Corpus,
        order: DataOrder,
        training: TrainingSection,
        data_rank: int,
        data_size: int,
        device: torch.device,
        start: int = 0,
        reopen: Callable[[], Corpus] | None = None,
        rearrange: Rearrange | None = None,
        objective: Objective | None = None,
    ) -> None:
        """`start` is the number of samples seen before the first step; `reopen` looks again at data that is still arriving.

        `rearrange`: None leaves samples as they are; `objective`: None learns the next token everywhere.

        Raises ValueError when the batch does not divide.
        """
        training.accumulation(data_size)
        self._reopen, self._closing = reopen, threading.Event()
        self._rearrange, self._objective = rearrange, objective
        self._corpus, self._training, self._device = corpus, training, device
        self.order = order
        """What has arrived of it may be more than when it was given."""
        self._rank, self._size = data_rank, data_size
        self._seen, self._steps = start, training.steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: list[Future[list[MicroBatch]]] = []
        self._pool = Pool()
        self._places: dict[int, Places] = {}
        self._spans: dict[int, Spans] = {}
        self.awaited_source: str | None = None
        """Of which samples of the step that is being read have not arrived yet."""
        self.seconds_waited = 0.0
        """Time that `is_ready` and `next_step` spent waiting for tokens."""

    def next_step(self) -> list[MicroBatch]:
        """The micro-batches of the next step, in the order they are fed. Raises UserError for data that was changed."""
        self._read_ahead()
        began = time.perf_counter()
        step = self._ahead.pop(0).result()
        self.seconds_waited += time.perf_counter() - began
        return [batch.to(self._device) for batch in step]

    def is_ready(self, timeout_seconds: float) -> bool:
        """Whether the next step is read within a time; only data that is still arriving takes long."""
        self._read_ahead()
        began = time.perf_counter()
        is_read = bool(wait(self._ahead[:1], timeout_seconds).done)
        self.seconds_waited += time.perf_counter() - began
        return is_read

    def close(self) -> None:
        """End the thread; what it read ahead is forgotten."""
        self._closing.set()
        self._corpus.streams[0].files.close()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self) -> None:
        while len(self._ahead) <= STEPS_AHEAD:
            self._ahead.append(self._thread.submit(self._read_step, self._seen))
            self._seen += self._steps.batch_at(self._seen)

    def _await_arrival(self, seen: int) -> None:
        """Look again and again until the samples of a step are there: of all ranks, so that none waits for another in a collective."""
        end = seen + self._steps.batch_at(seen)
        while self._reopen is not None and not self._corpus.is_complete and (missing := self.order.missing(end)):
            self.awaited_source = missing
            if self._closing.wait(ARRIVAL_POLL_SECONDS):
                raise RuntimeError("closed while data was waited for")
            corpus = self._reopen()
            order = self.order.over(corpus.sources)
            if self.order.missing(seen) is None:
                if order.missing(seen) is not None:
                    continue  # a build that starts again puts its units in order
                _refuse_changes(self.order.identity(seen), order.identity(seen))
            self._corpus, self.order = corpus, order
            self._spans.clear()  # files have other numbers now
            self._places.clear()
        self.awaited_source = None

    def _read_step(self, seen: int) -> list[MicroBatch]:
        training = self._training
        self._await_arrival(seen)
        spans = self._spans_of(seen)
        following = seen + self._steps.batch_at(seen)
        if self._corpus.is_complete and self._corpus.streams[0].files.is_mapped:
            with suppress(UserError):  # it is said when that step is asked for
                self._spans_of(following)  # so that its tokens are on their way while these are read
        sequence_length = self.order.mixture.stage_at(int(self.order.numbers(seen, 1)[0])).sequence_length
        num_samples, micro = spans.starts_n.size - 1, training.micro_batch_samples
        rows = Rows.empty(num_samples, training.sequence_length, self._pool)
        batches: list[MicroBatch] = []
        for first in range(0, num_samples, micro):  # one at a time, while it is in the processor's cache
            part = rows.part(first, first + micro)
            num_valid = read_samples(self._corpus, spans.part(first, first + micro), part, self._pool)
            if self._rearrange is not None:
                self._rearrange(part, self._numbers_of(seen)[first : first + micro], sequence_length)
            batch = make_batch(part, num_valid, sequence_length, training, self._pool)
            batches.append(batch if self._objective is None else self._objective(batch))
        del self._spans[seen]
        return [batch.map(torch.Tensor.pin_memory) for batch in batches] if self._device.type == "cuda" else batches

    def _spans_of(self, seen: int) -> Spans:
        """Where this rank's samples of a step lie; announced, so that they are there when they are read."""
        if seen not in self._spans:
            mine = self._own_part(seen)
            places = Places(*(column[mine] for column in self._places_of(seen)))
            self._spans[seen] = spans = locate_samples(self._corpus, places, self._training.sequence_length)
            self._corpus.streams[0].files.announce(spans.file_p, spans.first_token_p, spans.num_tokens_p)
        return self._spans[seen]

    def _numbers_of(self, seen: int) -> Numbers:
        """Of this rank's samples of a step."""
        return self.order.numbers(seen, self._steps.batch_at(seen))[self._own_part(seen)]

    def _own_part(self, seen: int) -> Numbers:
        """Which of a step's samples are this rank's."""
        samples = np.arange(self._steps.batch_at(seen)).reshape(-1, self._size, self._training.micro_batch_samples)
        return samples[:, self._rank].ravel()

    def _places_of(self, seen: int) -> Places:
        """Of all ranks' samples of a step; those of some steps are computed at once, where they are known."""
        if seen not in self._places:
            ends = [seen + self._steps.batch_at(seen)]
            limit = seen + PLACES_AT_ONCE if self._corpus.is_complete else 0
            while (end := ends[-1] + self._steps.batch_at(ends[-1])) <= limit:
                ends.append(end)
            places = self.order.places(self.order.numbers(seen, ends[-1] - seen))
            steps = pairwise([seen, *ends])
            self._places = {first: Places(*(column[first - seen : end - seen] for column in places)) for first, end in steps}
        return self._places[seen]


def _refuse_changes(before: dict[str, str], now: dict[str, str]) -> None:
    """While it is waited for data, the identity of what was seen stays what it was."""
    if changed := sorted(key for key in before | now if before.get(key) != now.get(key)):
        raise UserError(
            f"what this run has learnt from was built anew with other content while it waited for more: {', '.join(changed)} differ. Put "
            "the data back as it was, or start another run with run.name=NAME."
        )


def held_out_batches(
    stream: TokenStream,
    training: TrainingSection,
    micro_batch_samples: int,
    data_rank: int,
    data_size: int,
    device: torch.device,
    objective: Objective | None = None,
    source_tokens: Sequence[int] | None = None,
) -> Iterator[MicroBatch]:
    """Every token of the held-out stream exactly once as a target, over all data ranks.

    The first context is one end-of-text token, the last window is padded with ignored targets, and every rank
    yields the same number of micro-batches (whole batches of padding where it has no window left): under ZeRO-3
    a forward is a collective.

    source_tokens: how many of the stream's tokens are of each source, one behind the other; None: there is one. All targets of a
    micro-batch are of one source. A window in which one source ends and the next begins is there once for each, with the same tokens
    and the other's targets ignored; windows lie as if there were one source, so what is found of all of them together is the same.

    With an `objective`, windows hold whole documents, as far as these fit, so that a continuation stands behind what it continues,
    and every token is in one window, whether it is a target or not. Documents are never rearranged.
    """
    length, end_of_text = training.sequence_length, stream.files.end_of_text
    window_starts = list(range(0, len(stream), length)) if objective is None else _start_at_documents(stream, length)
    windows = list(pairwise([*window_starts, len(stream)]))
    portions = _portions_by_source(windows, source_tokens or [len(stream)], micro_batch_samples)
    pool = Pool()
    for first in range(0, len(portions), data_size):
        here = portions[first + data_rank] if first + data_rank < len(portions) else _Portion(0, [], 0, 0)
        inputs_BT = np.full((micro_batch_samples, length), end_of_text, dtype=np.int32)
        labels_BT = np.full((micro_batch_samples, length), IGNORED_LABEL, dtype=np.int32)
        is_own_BT = np.ones((micro_batch_samples, length), dtype=bool)
        starts, sizes = [start for start, _ in here.windows], [end - start for start, end in here.windows]
        stream.files.announce(*stream.locate(np.array(starts, np.int64)), np.array(sizes, np.int64))
        for row, (start, num_tokens) in enumerate(zip(starts, sizes, strict=True)):
            tokens = stream.read(start, num_tokens)
            inputs_BT[row, :num_tokens], labels_BT[row, :num_tokens] = tokens[:-1], tokens[1:]
            places = np.arange(start, start + num_tokens)
            is_own_BT[row, :num_tokens] = (places >= here.first_token) & (places < here.end_token)
        rows = Rows(inputs_BT, labels_BT, inputs_BT == end_of_text)
        batch = replace(make_batch(rows, sum(sizes), length, training, pool), source=here.source)
        batch = batch if objective is None else objective(batch)
        yield (batch if is_own_BT.all() else _ignore_others(batch, torch.from_numpy(is_own_BT))).to(device)


@dataclass(frozen=True)
class _Portion:
    """A micro-batch of held-out windows."""

    source: int
    windows: Sequence[tuple[int, int]]
    """First token and end of each, in the stream."""
    first_token: int
    end_token: int
    """Of its source, in the stream."""


def _portions_by_source(windows: Sequence[tuple[int, int]], source_tokens: Sequence[int], micro_batch_samples: int) -> list[_Portion]:
    portions: list[_Portion] = []
    for source, (first, end) in enumerate(pairwise(accumulate(source_tokens, initial=0))):
        mine = [window for window in windows if window[0] < end and first < window[1]]
        for start in range(0, len(mine), micro_batch_samples):
            portions.append(_Portion(source, mine[start : start + micro_batch_samples], first, end))
    return portions


def _ignore_others(batch: MicroBatch, is_own_BT: torch.Tensor) -> MicroBatch:
    labels_BT = batch.labels_BT.masked_fill(~is_own_BT, IGNORED_LABEL)
    return replace(batch, labels_BT=labels_BT, num_valid=int((labels_BT != IGNORED_LABEL).sum()))


def _start_at_documents(stream: TokenStream, length: int) -> list[int]:
    """Where windows of at most `length` tokens begin, each with as many whole documents as it holds; a longer document is cut."""
    starts: list[int] = []
    start = 0
    while start < len(stream):
        starts.append(start)
        tokens = stream.read(start, min(length, len(stream) - start))[1:]
        ends = np.flatnonzero(tokens == stream.files.end_of_text)
        start += int(ends[-1]) + 1 if ends.size else tokens.size
    return starts
