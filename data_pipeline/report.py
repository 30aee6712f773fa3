"""What a build did, for people: `report.json`, and for each reason a file of documents that were dropped for it.

In: the manifest, what the stages measured, the units' folders. Out: files beside the manifest that nothing trusts or reads
back: times and memory differ from build to build.
"""

import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.durable import remove_folders, write_file
from data_pipeline.manifest import SPLITS, UNITS, Counts, Manifest, ShardRecord
from data_pipeline.tally import DROPPED, EXAMPLES

REPORT = "report.json"
EXAMPLES_FOLDER = "dropped"

NameSurvivor = Callable[[int, dict[str, Any]], dict[str, Any]]
"""Gets a unit's number and an example of what it dropped; gives the example with what stayed in its place, where that is known."""


@dataclass
class StageReport:
    """What one stage of a build measured."""

    stage: str
    num_units: int = 0
    num_units_kept: int = 0
    """Found whole from an earlier start."""
    num_documents: int = 0
    """Of the units made now."""
    num_bytes: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    """With waiting for workers to start."""
    start_seconds: float = 0.0
    """Until the first unit was done."""
    peak_worker_bytes: int = 0
    """Largest resident memory of a worker process."""


def describe_build(manifest: Manifest, stages: Iterable[StageReport], facts: dict[str, Any]) -> dict[str, Any]:
    """The report, ready for JSON: by source what was read, kept, dropped, quarantined, and what every stage took."""
    return {
        "documents": manifest.documents.model_dump(),
        "sources": describe_sources(manifest),
        "stages": [_rates(stage) for stage in stages],
        **facts,
    }


def describe_sources(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Of every source: documents read and kept, dropped and quarantined by reason, tokens and bytes of both splits."""
    stored = sum_by_source([shard for split in SPLITS for shard in manifest.shards(split)])
    return {name: {**documents.model_dump(), **stored.get(name, Counts()).model_dump()} for name, documents in manifest.sources.items()}


def sum_by_source(shards: Iterable[ShardRecord]) -> dict[str, Counts]:
    """What each source gave to these shards, sorted by its name."""
    sums: dict[str, Counts] = {}
    for shard in shards:
        for name, counts in shard.sources.items():
            sums[name] = sums.get(name, Counts()) + counts
    return dict(sorted(sums.items()))


def write_report(root: Path, report: dict[str, Any], num_units: int, name_survivor: NameSurvivor) -> None:
    """Write `report.json` and `dropped/REASON.jsonl`, up to 100 documents each: those with the lowest ids. Raises OSError.

    Survivors are named here and not in the units, as no unit depends on what is in the others.
    """
    folder = root / EXAMPLES_FOLDER
    remove_folders([folder])
    chosen: dict[str, list[tuple[str, int, str]]] = {}
    for reason, identity, unit, line in _examples(root / UNITS, num_units):
        examples = chosen.setdefault(reason, [])
        examples.append((identity, unit, line))
        if len(examples) > 4 * EXAMPLES:
            chosen[reason] = heapq.nsmallest(EXAMPLES, examples)
    for reason, examples in chosen.items():
        folder.mkdir(exist_ok=True)
        shown = [name_survivor(unit, json.loads(line)) for _, unit, line in heapq.nsmallest(EXAMPLES, examples)]
        # A rule of the user's own names its reasons: the file keeps to letters that are safe everywhere.
        name = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in reason)[:100]
        lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in shown]
        write_file(folder / f"{name}.jsonl", "".join(lines).encode("utf-8"))
    write_file(root / REPORT, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))


def _rates(stage: StageReport) -> dict[str, Any]:
    seconds = max(stage.seconds, 1e-9)
    rates = {"documents": stage.num_documents / seconds, "megabytes": stage.num_bytes / 1e6 / seconds, "tokens": stage.num_tokens / seconds}
    return {**asdict(stage), "per_second": {name: round(rate, 3) for name, rate in rates.items()}}


def _examples(units: Path, num_units: int) -> Iterator[tuple[str, str, int, str]]:
    """Reason, id, unit and line of every example that the units hold."""
    for number in range(num_units):
        path = units / f"{number:05d}" / DROPPED
        if path.exists():
            with path.open(encoding="utf-8") as file:
                for line in file:
                    example = json.loads(line)
                    yield example["reason"], example["document_id"], number, line
