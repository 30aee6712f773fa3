"""What a build did, for people: `report.json`, and for each reason a file of documents that were dropped for it.

In: the manifest, what the stages measured, the units' folders. Out: files beside the manifest that nothing trusts or reads
back: times and memory differ from build to build.
"""

import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.durable import remove_folders, write_file
from data_pipeline.manifest import SPLITS, UNITS, Manifest
from data_pipeline.records import Counts, ShardRecord
from data_pipeline.tally import DROPPED, EXAMPLES

REPORT = "report.json"
EXAMPLES_FOLDER = "dropped"

Packings = dict[str, dict[str, dict[str, Any]]]
"""By sequence length, then by packing ("best_fit", "chop"): what `describe_packing` gives."""

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
    """The report, ready for JSON: by source what was read, kept, dropped, quarantined and cut, and what every stage took."""
    sources = describe_sources(manifest)
    return {
        "documents": manifest.documents.model_dump(),
        "sources": sources,
        "packings": sum_packings(one["packings"] for one in sources.values()),
        "stages": [_rates(stage) for stage in stages],
        **facts,
    }


def describe_sources(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Of every source: documents read and kept, dropped and quarantined by reason, tokens and bytes of both splits, and what
    each packing does to what is trained on."""
    stored = sum_by_source([shard for split in SPLITS for shard in manifest.shards(split)])
    trained: dict[str, list[ShardRecord]] = {}
    for shard in manifest.shards("train"):
        (name,) = shard.sources
        trained.setdefault(name, []).append(shard)
    return {
        name: {
            **documents.model_dump(),
            **stored.get(name, Counts()).model_dump(),
            "packings": _describe_packings(trained.get(name, [])),
        }
        for name, documents in manifest.sources.items()
    }


def sum_by_source(shards: Iterable[ShardRecord]) -> dict[str, Counts]:
    """What each source gave to these shards, sorted by its name."""
    sums: dict[str, Counts] = {}
    for shard in shards:
        for name, counts in shard.sources.items():
            sums[name] = sums.get(name, Counts()) + counts
    return dict(sorted(sums.items()))


def describe_packing(length: int, num_samples: int, num_documents: int, documents_cut: int, padding_tokens: int) -> dict[str, Any]:
    """What making samples of `length` tokens does to documents: counts, the share of the documents that are cut, of the tokens
    that are padding."""
    return {
        "num_samples": num_samples,
        "num_documents": num_documents,
        "documents_cut": documents_cut,
        "padding_tokens": padding_tokens,
        "share_of_documents_cut": documents_cut / max(1, num_documents),
        "share_of_padding": padding_tokens / max(1, length * num_samples),
    }


def sum_packing(length: int, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `describe_packing` gives of all parts together: counts are added, shares follow from the sums."""
    counts = ("num_samples", "num_documents", "documents_cut", "padding_tokens")
    return describe_packing(length, *(sum(part[key] for part in parts) for key in counts))


def sum_packings(parts: Iterable[Packings]) -> Packings:
    """As `sum_packing`, for each length and packing."""
    gathered: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for part in parts:
        for length, packings in part.items():
            for packing, one in packings.items():
                gathered.setdefault(length, {}).setdefault(packing, []).append(one)
    return {
        length: {packing: sum_packing(int(length), found) for packing, found in packings.items()} for length, packings in gathered.items()
    }


def _describe_packings(shards: list[ShardRecord]) -> Packings:
    """Of a source's training shards, for each of `data.packed_lengths`: packed, and as they would be if they were chopped instead.

    A chopped shard is counted as if a sample began with it. In a run that is so for a source's first shard only
    (`pretrain data mixture` counts as the run chops); of many documents the share is the same.
    """
    num_tokens, num_documents = sum(shard.num_tokens for shard in shards), sum(shard.num_documents for shard in shards)
    found: Packings = {}
    for length in shards[0].packings if shards else ():
        records = [shard.packings[length] for shard in shards]
        num_packs, padding_tokens = sum(one.num_packs for one in records), sum(one.padding_tokens for one in records)
        cut, cut_when_chopped = sum(one.documents_cut for one in records), sum(one.documents_cut_when_chopped for one in records)
        found[length] = {
            "best_fit": describe_packing(int(length), num_packs, num_documents, cut, padding_tokens),
            "chop": describe_packing(int(length), num_tokens // int(length), num_documents, cut_when_chopped, 0),
        }
    return found


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
