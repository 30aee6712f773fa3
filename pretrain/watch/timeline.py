"""What a run did when: `timeline.jsonl`, from which the ledger reckons where its time went (`ledger.py`).

In: from the loop, the phase that it enters. Out: the same as a heartbeat for the supervisor (`pretrain/run/heartbeat.py`), and on rank 0 a
row of `timeline.jsonl`, at every change of phase and otherwise every ten seconds:
`{"attempt", "time" (Unix seconds), "phase", "step" (steps done), "waited" (seconds that this attempt has waited for data)}`.
The file is never cut back: what was done in vain took its time, too.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from pretrain.run.heartbeat import Pulse
from pretrain.watch.metrics import MetricsLog

TIMELINE_FILE = "timeline.jsonl"
"""Its name in the run folder."""
ROW_EVERY_SECONDS = 10.0

RunPhase: TypeAlias = Literal["start", "first_step", "step", "evaluate", "score", "save", "end"]
"""As the heartbeat has them, and `first_step`, in which layers are compiled; to the supervisor that is still `start`."""
T = TypeVar("T")


class Timeline:
    """This rank's phases. It begins in `start`."""

    def __init__(self, folder: Path, attempt: int, step: int, pulse: Pulse, seconds_waited: Callable[[], float], is_writer: bool) -> None:
        """folder: of the run. step: steps done so far. seconds_waited: for data, in this attempt."""
        self._attempt, self._pulse, self._seconds_waited = attempt, pulse, seconds_waited
        self._log = MetricsLog(folder / TIMELINE_FILE) if is_writer else None
        self._phase: RunPhase = "start"
        self._step = step
        self._write()

    def beat(self, phase: RunPhase | None = None, step: int | None = None) -> None:
        """An act is done; from here on it is another phase or step, if one is named."""
        self._pulse.beat("start" if phase == "first_step" else phase, step)
        is_new = phase is not None and phase != self._phase
        self._phase = self._phase if phase is None else phase
        self._step = self._step if step is None else step
        self._write_if(is_new)

    def wait(self) -> None:
        """Nothing is done, and that is no stall: what is waited for comes from elsewhere."""
        self._pulse.wait()
        self._write_if(False)

    def each(self, phase: RunPhase, step: int, things: Iterable[T]) -> Iterator[T]:
        """The same things, with a beat before each."""
        for thing in things:
            self.beat(phase, step)
            yield thing

    def _write_if(self, is_new: bool) -> None:
        if self._log is not None and (is_new or time.monotonic() - self._written >= ROW_EVERY_SECONDS):
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._log is not None:
            now, waited = round(time.time(), 3), round(self._seconds_waited(), 3)
            self._log.write({"attempt": self._attempt, "time": now, "phase": self._phase, "step": self._step, "waited": waited})
