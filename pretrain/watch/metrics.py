"""Values, and the file that is the truth about them.

In: what the loop saw in a step. Out: rows of `metrics.jsonl`, one JSON object a line, each step exactly once however
often the run was killed: at resume the file is cut back to the checkpoint's step.
"""

import errno
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from configs.durable import write_file

METRICS_FILE = "metrics.jsonl"
"""Its name in the run folder."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line torn by a kill is left out."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def cut_back(path: Path, step: int) -> None:
    """Remove rows after `step` (they will be written again) and a torn last line."""
    if path.is_file():
        kept = [row for row in read_rows(path) if row.get("step", 0) <= step]
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


class MetricsLog:
    """Appends rows to `metrics.jsonl`, one complete line at a time. A full disk delays rows; it never ends the run.

    The file stays open: `cut_back` puts another one in its place, so an attempt that slept through its replacement wakes up with a file
    that has no name any more, and adds nothing to that of the new attempt.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        with suppress(OSError):  # told when there is a row
            self._file = path.open("ab", buffering=0)
        self._waiting: list[str] = []
        self._torn = False

    def write(self, row: dict[str, Any]) -> str | None:
        """Append one row, and those that could not be written before. Returns what went wrong, if anything."""
        self._waiting.append(json.dumps(row) + "\n")
        try:
            self._file = self._file or self._path.open("ab", buffering=0)
            content = (("\n" if self._torn else "") + "".join(self._waiting)).encode()
            if (written := self._file.write(content)) < len(content):
                raise OSError(errno.ENOSPC, f"only {written} of {len(content)} bytes could be written", str(self._path))
        except OSError as error:
            self._torn = True  # a part of a line may be there: the next one begins below it
            return str(error)
        self._waiting, self._torn = [], False
        return None


class Throughput:
    """What happened between two reports, by a monotonic clock."""

    def __init__(self, tokens_seen: int) -> None:
        self._tokens, self._waited, self._time = tokens_seen, 0.0, time.monotonic()

    def since_last(self, tokens_seen: int, seconds_waited: float) -> tuple[float, float]:
        """Tokens per second since the last call (or since the start), over all ranks, and the share of that time that this
        rank waited for data. `seconds_waited`: since the start."""
        now = time.monotonic()
        seconds = max(1e-9, now - self._time)
        rate, share = (tokens_seen - self._tokens) / seconds, (seconds_waited - self._waited) / seconds
        self._tokens, self._waited, self._time = tokens_seen, seconds_waited, now
        return rate, share
