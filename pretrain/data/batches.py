"""Token shards and an order -> the micro-batches of one data rank.

In: shards, a `DataOrder`, this rank's place among the data ranks. Out: for each step, the micro-batches that
this rank feeds the engine. Step s covers samples [s x G, (s + 1) x G); micro-step m takes the next
`micro_batch_samples x data_size` of them and rank r the r-th part, so the global order is the same for every
number of ranks and every split into micro-steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from configs.schema import TrainingSection
from data_pipeline.shards import Shard
from pretrain.data.order import DataOrder

IGNORED_LABEL = -100
"""A target that nothing is learnt from (torch's `ignore_index`)."""


@dataclass(frozen=True)
class MicroBatch:
    """What one rank feeds the engine once, on its device."""

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    """The next token at each place, or `IGNORED_LABEL`."""
    num_valid: int
    """Targets that something is learnt from."""

    @staticmethod
    def of(tokens_BT: npt.NDArray[np.int64], labels_BT: npt.NDArray[np.int64], device: torch.device) -> "MicroBatch":
        """Put arrays of equal shape on a device; targets are counted before, where it costs no wait."""
        return MicroBatch(
            torch.from_numpy(tokens_BT).to(device), torch.from_numpy(labels_BT).to(device), int((labels_BT != IGNORED_LABEL).sum())
        )


class TokenStream:
    """Shards laid end to end as one long row of tokens, read by position (memory-mapped, nothing is loaded)."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = [shard for shard in shards if shard.num_tokens]
        self._starts = np.cumsum([0] + [shard.num_tokens for shard in self._shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Tokens [start, start + length) as int64. Raises IndexError beyond the end."""
        if start < 0 or start + length > len(self):
            raise IndexError(f"tokens [{start}, {start + length}) of a stream of {len(self)}")
        tokens = np.empty(length, dtype=np.int64)
        filled = 0
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < length:
            offset = start + filled - int(self._starts[index])
            part = self._shards[index].tokens[offset : offset + length - filled]
            tokens[filled : filled + len(part)] = part
            filled += len(part)
            index += 1
        return tokens


class Batches:
    """The micro-batches of one data rank, step after step, from any sample number on."""

    def __init__(
        self,
        stream: TokenStream,
        order: DataOrder,
        training: TrainingSection,
        data_rank: int,
        data_size: int,
        device: torch.device,
        start: int = 0,
    ) -> None:
        """`start` is the number of samples seen before the first step. Raises ValueError when the batch does not divide."""
        training.accumulation(data_size)
        self._stream, self._order, self._device = stream, order, device
        self._global, self._micro = training.global_batch_samples, training.micro_batch_samples
        self._rank, self._size = data_rank, data_size
        self._next_sample = start

    def next_step(self) -> list[MicroBatch]:
        """The micro-batches of the next step, in the order they are fed."""
        windows = self._order.windows(self._next_sample, self._global)
        self._next_sample += self._global
        mine = windows.reshape(-1, self._size, self._micro)[:, self._rank]
        return [self._read(rows) for rows in mine]

    def _read(self, windows: npt.NDArray[np.int64]) -> MicroBatch:
        length = self._order.sequence_length
        rows = [self._stream.read(int(window) * length, length + 1) for window in windows]
        windows_BT1 = np.stack(rows)
        return MicroBatch.of(np.ascontiguousarray(windows_BT1[:, :-1]), np.ascontiguousarray(windows_BT1[:, 1:]), self._device)


def held_out_batches(
    stream: TokenStream,
    end_of_text: int,
    sequence_length: int,
    micro_batch_samples: int,
    data_rank: int,
    data_size: int,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """Every token of the held-out stream exactly once as a target, over all data ranks.

    The first context is one end-of-text token, the last window is padded with ignored targets, and every rank
    yields the same number of micro-batches (whole batches of padding where it has no window left): under ZeRO-3
    a forward is a collective.
    """
    num_windows = -(-len(stream) // sequence_length)
    portion = micro_batch_samples * data_size
    for first in range(0, num_windows, portion):
        tokens_BT = np.full((micro_batch_samples, sequence_length), end_of_text, dtype=np.int64)
        labels_BT = np.full((micro_batch_samples, sequence_length), IGNORED_LABEL, dtype=np.int64)
        for row in range(micro_batch_samples):
            start = (first + data_rank * micro_batch_samples + row) * sequence_length
            length = min(sequence_length, len(stream) - start)
            if length <= 0:
                continue
            targets = stream.read(start, length)
            before = stream.read(start - 1, 1)[0] if start else end_of_text
            tokens_BT[row, :length] = np.concatenate([[before], targets[:-1]])
            labels_BT[row, :length] = targets
        yield MicroBatch.of(tokens_BT, labels_BT, device)
