"""A file of prompts, and the file of what was written behind them. No torch: what is wrong with a file is said at once.

In: a text file or JSON lines. Out: rows with a `prompt`; rows as JSON lines.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from configs.durable import sync_path
from configs.errors import UserError


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompts of a file, as rows with a `prompt`: one a line of a text file, or the objects of a .jsonl; empty lines are left out.

    Raises UserError for a file that is missing, is not UTF-8, or holds no prompt, and for a line without one.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        number = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {number} is not UTF-8 ({error.reason}); save the file as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{path} holds no prompt; wanted one a line, or a .jsonl whose objects have a prompt.")
    if path.suffix != ".jsonl":
        return [{"prompt": line} for _, line in numbered]
    return [_read_row(path, number, line) for number, line in numbered]


def _read_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}: line {number} is not JSON: {error}.") from None
    if not isinstance(row, dict) or not isinstance(cast("dict[str, Any]", row).get("prompt"), str):
        raise UserError(f'{path}: line {number} has no prompt; wanted an object like {{"prompt": "Once"}}.')
    return cast("dict[str, Any]", row)


def write_rows(rows: Iterator[dict[str, Any]], output: Path) -> None:
    """Write rows as JSON lines; until the last one is there they stand in `partial_of(output)`."""
    partial = partial_of(output)
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
        os.fsync(file.fileno())
    partial.replace(output)
    sync_path(output.parent)


def partial_of(output: Path) -> Path:
    """Where rows stand until the last one is there."""
    return output.with_name(f"{output.name}.partial")
