"""What became of a unit's documents: counted, and written down for people to read.

In: every rejected, dropped and kept document. Out: counts that add up; `quarantine.jsonl` with each document that cannot be
read; `dropped.jsonl` with a fair sample of what rules and deduplication decided against.
"""

import heapq
import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from data_pipeline.documents import Dropped, Rejected
from data_pipeline.records import DocumentCounts

QUARANTINE = "quarantine.jsonl"
DROPPED = "dropped.jsonl"
EXAMPLES = 100  # of dropped documents, for each reason
EXAMPLE_CHARACTERS = 500


class Tally:
    """Counts documents, and keeps the examples; `close` writes them into `folder`."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written before there is something to write."""
        self.kept = 0
        """To be set by whoever keeps documents."""
        self._folder = folder
        self._quarantined: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._examples: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self._quarantine: TextIO | None = None

    def reject(self, rejected: Rejected) -> None:
        """Count a document that cannot be read, and write down all that is known of it. Raises OSError."""
        if self._quarantine is None:
            self._quarantine = (self._folder / QUARANTINE).open("w", encoding="utf-8")
        self._quarantine.write(json.dumps(asdict(rejected), ensure_ascii=True) + "\n")
        self._quarantined[rejected.reason] += 1

    def drop(self, dropped: Dropped) -> None:
        """Count a document that is left out; those with the lowest ids are kept as examples."""
        self._dropped[dropped.reason] += 1
        examples = self._examples.setdefault(dropped.reason, [])
        key = -int(dropped.document.document_id, 16)  # a heap's first is its least: here the highest id
        if len(examples) < EXAMPLES:
            heapq.heappush(examples, (key, _show(dropped)))
        elif key > examples[0][0]:
            heapq.heapreplace(examples, (key, _show(dropped)))

    def close(self) -> DocumentCounts:
        """Write the examples and give the counts. Raises OSError."""
        if self._quarantine is not None:
            self._quarantine.close()
        if self._examples:
            lines = [
                json.dumps(example, ensure_ascii=False)
                for _, examples in sorted(self._examples.items())
                for _, example in sorted(examples, key=lambda one: one[0], reverse=True)
            ]
            (self._folder / DROPPED).write_text("\n".join(lines) + "\n", encoding="utf-8")
        dropped, quarantined = dict(sorted(self._dropped.items())), dict(sorted(self._quarantined.items()))
        read = self.kept + sum(dropped.values()) + sum(quarantined.values())
        return DocumentCounts(read=read, kept=self.kept, dropped=dropped, quarantined=quarantined)


def prepend_examples(earlier: Path, folder: Path) -> None:
    """Put what an earlier tally of the same unit wrote in front of what this one did. Raises OSError."""
    for name in (QUARANTINE, DROPPED):
        if (earlier / name).exists():
            later = folder / name
            with (folder / f"{name}.joined").open("wb") as joined:
                for path in (earlier / name, later):
                    if path.exists():
                        with path.open("rb") as part:
                            shutil.copyfileobj(part, joined)
            (folder / f"{name}.joined").replace(later)


def _show(dropped: Dropped) -> dict[str, Any]:
    document = dropped.document
    return {
        "reason": dropped.reason,
        "document_id": document.document_id,
        "source": document.source,
        "file": document.file,
        "position": document.position,
        "name": document.name,
        "num_characters": len(document.text),
        "text": document.text[:EXAMPLE_CHARACTERS],
    }
