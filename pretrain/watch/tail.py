"""The end of a file of JSON lines that may be gigabytes: `metrics.jsonl`, `timeline.jsonl`."""

import json
import os
from pathlib import Path
from typing import Any

TAIL_BYTES = 1 << 16


def read_tail(path: Path, num_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The rows in the last `num_bytes`, in order; one that is torn, or cut by where we began to read, is left out. Of no file: none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - num_bytes))
            lines = file.read().splitlines()
    except OSError:
        return []
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
