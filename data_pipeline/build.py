"""The conductor: sources to a finished dataset, with all that was finished before kept.

In: the `data` section of a run file. Out: `<root>/tokenizer.json`, `<root>/units/00000 ...`, and last of all
`<root>/manifest.json`. Killed at any moment and started again, it ends with the same bytes.
"""

import json
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

from configs.durable import write_file
from configs.errors import UserError
from configs.schema import DataSection
from data_pipeline.changes import check_sizes, describe_configuration, find_changes, write_input_times
from data_pipeline.disk import explain_file_errors
from data_pipeline.documents import place_document
from data_pipeline.execution import run_on_ray
from data_pipeline.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    UNITS,
    DocumentCounts,
    Manifest,
    load_manifest,
    write_manifest,
)
from data_pipeline.ownership import own_folder, scratch_folder
from data_pipeline.sampling import sample_texts
from data_pipeline.shards import token_dtype
from data_pipeline.sources import Plan, plan_units
from data_pipeline.tokenizer import end_of_text_id, load_tokenizer, tokenizer_hash, train_tokenizer, vocabulary_size
from data_pipeline.units import QUARANTINE, UnitRecord, UnitTask, clear_units, load_unit, write_unit

TOKENIZER_ORIGIN = "tokenizer.origin.json"
SHOWN_CHANGES = 5
Stage = Literal["plan", "tokenizer", "tokens", "manifest"]
RunUnits = Callable[[Callable[[UnitTask], UnitRecord], Sequence[UnitTask], int, Path], Generator[UnitRecord, None, None]]


@dataclass(frozen=True)
class Progress:
    """How far a stage has come."""

    stage: Stage
    done: int
    total: int
    """In work units (plan: files; manifest: 1)."""
    detail: str
    """A few words for people."""


@dataclass(frozen=True)
class BuildResult:
    """What a build did."""

    outcome: Literal["built", "unchanged"]
    folder: Path
    manifest: Manifest
    num_units: int
    num_units_kept: int
    """Units that an earlier build of the same input had finished."""
    skipped: dict[str, int]
    """Files that were passed over, by suffix; 'symlink' for links."""


def build_dataset(data: DataSection, report: Callable[[Progress], None], run_units: RunUnits = run_on_ray) -> BuildResult:
    """Build the dataset that `data` describes, continue it, or find that it is there already.

    `run_units` says where units are made (`execution.py`). Raises UserError for whatever the user can mend: unusable
    sources, a dataset that was built from something else, another build in the folder, too much in quarantine, a full
    disk. Committed units stay in all these cases.
    """
    root = Path(data.folder()).absolute()
    with explain_file_errors(root):
        plan = plan_units(data)
        report(Progress("plan", len(plan.files), len(plan.files), f"{len(plan.files)} files in {len(plan.units)} work units"))
        if (root / MANIFEST).exists():
            return _keep_finished(root, data, plan)
        (root / UNITS).mkdir(parents=True, exist_ok=True)
        with own_folder(root) as token:
            if (root / MANIFEST).exists():  # another build ended between the look and the lock
                return _keep_finished(root, data, plan)
            return _build(root, data, plan, token, report, run_units)


def _keep_finished(root: Path, data: DataSection, plan: Plan) -> BuildResult:
    manifest = load_manifest(root)
    changes = find_changes(root, manifest, data, plan)
    if changes:
        shown = "\n  ".join(changes[:SHOWN_CHANGES])
        more = f"\n  ... and {len(changes) - SHOWN_CHANGES} more" if len(changes) > SHOWN_CHANGES else ""
        raise UserError(
            f"{root} was built from something else; choose another data.root, or delete the folder to build it anew. "
            f"What differs:\n  {shown}{more}"
        )
    check_sizes(root, manifest)
    return BuildResult("unchanged", root, manifest, len(plan.units), len(plan.units), plan.skipped)


def _build(root: Path, data: DataSection, plan: Plan, token: str, report: Callable[[Progress], None], run_units: RunUnits) -> BuildResult:
    clear_units(root, len(plan.units))
    _prepare_tokenizer(root, data, plan, report)
    tasks = _plan_tasks(root, data, plan, token)
    records = {task.unit.index: record for task in tasks if (record := load_unit(task)) is not None}
    num_kept = len(records)
    _make_units(tasks, records, root, data, report, run_units)
    _check_quarantine(root, data, records)
    moved = _choose_moved(data, records)
    tasks = [replace(task, moved=moved.get(task.unit.index, ())) for task in tasks]
    _make_units(tasks, records, root, data, report, run_units)  # nearly always nothing was moved, and nothing is left to make
    report(Progress("manifest", 0, 1, "writing the manifest"))
    manifest = _describe(root, data, [records[task.unit.index] for task in tasks])
    write_input_times(root, plan)
    write_manifest(root, manifest)
    report(Progress("manifest", 1, 1, f"{manifest.total('train').num_tokens} tokens to train on"))
    return BuildResult("built", root, manifest, len(plan.units), num_kept, plan.skipped)


def _prepare_tokenizer(root: Path, data: DataSection, plan: Plan, report: Callable[[Progress], None]) -> None:
    """Put `tokenizer.json` into the dataset: the given one, the one that an earlier start trained, or a new one."""
    path, origin = root / TOKENIZER, root / TOKENIZER_ORIGIN
    settings = data.tokenizer
    if settings.path is not None:
        load_tokenizer(Path(settings.path), settings.end_of_text)
        write_file(path, Path(settings.path).read_bytes())
        return
    files = [{key: value for key, value in asdict(file).items() if key != "root"} for unit in plan.units for file in unit.files]
    facts = [FORMAT_VERSION, settings.model_dump(mode="json"), data.largest_document_bytes, [len(unit.files) for unit in plan.units], files]
    fingerprint = sha256(json.dumps(facts).encode()).hexdigest()
    if origin.exists() and path.exists() and json.loads(origin.read_bytes()) == {"made_of": fingerprint, "sha256": tokenizer_hash(path)}:
        return
    total = len(plan.units)

    def tell(done: int, num_bytes: int) -> None:
        nonlocal sampled
        sampled = num_bytes
        report(Progress("tokenizer", min(done, total - 1), total, f"{num_bytes} bytes sampled, training"))

    sampled = 0
    texts = sample_texts(plan.units, settings.training_bytes, data.largest_document_bytes, tell)
    tokenizer = train_tokenizer(texts, settings.vocabulary_size, settings.end_of_text)
    if not sampled:
        raise UserError(
            f"{len(plan.files)} files of data.sources hold no usable text (all empty or not readable as text); check their paths."
        )
    write_file(path, tokenizer.to_str().encode("utf-8"))
    # Behind the tokenizer: where both agree, a start that continues need not train again.
    write_file(origin, json.dumps({"made_of": fingerprint, "sha256": tokenizer_hash(path)}).encode())
    report(Progress("tokenizer", total, total, f"{vocabulary_size(tokenizer)} entries from {sampled} bytes"))


def _plan_tasks(root: Path, data: DataSection, plan: Plan, token: str) -> list[UnitTask]:
    return [
        UnitTask(
            unit=unit,
            root=root,
            token=token,
            tokenizer_path=root / TOKENIZER,
            tokenizer_sha256=tokenizer_hash(root / TOKENIZER),
            end_of_text=data.tokenizer.end_of_text,
            held_out_fraction=data.held_out_fraction,
            largest_document_bytes=data.largest_document_bytes,
        )
        for unit in plan.units
    ]


def _make_units(
    tasks: list[UnitTask],
    records: dict[int, UnitRecord],
    root: Path,
    data: DataSection,
    report: Callable[[Progress], None],
    run_units: RunUnits,
) -> None:
    """Make the units whose records are missing or of another task, and put their records in."""
    index_of = {task.fingerprint(): task.unit.index for task in tasks}
    known = {record.fingerprint for record in records.values()}
    todo = [task for task in tasks if task.fingerprint() not in known]
    if not todo:
        return
    for task in todo:
        records.pop(task.unit.index, None)
    num_tokens = sum(shard.num_tokens for record in records.values() for shard in record.shards.values())
    finished = len(tasks) - len(todo)
    report(Progress("tokens", finished, len(tasks), f"{finished} units were finished before" if finished else "starting the workers"))
    with (
        scratch_folder(root, todo[0].token) as scratch,
        closing(run_units(write_unit, todo, data.workers or count_cores(), scratch)) as made,
    ):
        for done, record in enumerate(made, finished + 1):
            records[index_of[record.fingerprint]] = record
            num_tokens += sum(shard.num_tokens for shard in record.shards.values())
            report(Progress("tokens", done, len(tasks), f"{num_tokens} tokens"))


def _check_quarantine(root: Path, data: DataSection, records: dict[int, UnitRecord]) -> None:
    """Refuse a corpus of which too much cannot be read. Empty documents are counted, but nothing of them is lost."""
    documents = sum((record.documents for record in records.values()), DocumentCounts())
    unreadable = {index: _num_unreadable(record.documents) for index, record in records.items()}
    num_unreadable = sum(unreadable.values())
    worst = max(sorted(unreadable), key=lambda index: unreadable[index])
    reasons = ", ".join(f"{count} {reason}" for reason, count in documents.quarantined.items())
    if num_unreadable > data.quarantine_limit * documents.read:
        raise UserError(
            f"{num_unreadable} of {documents.read} documents cannot be used ({reasons}), more than data.quarantine_limit "
            f"{data.quarantine_limit} allows; each is named in {root / UNITS}/*/{QUARANTINE}, most of them in "
            f"{root / UNITS / f'{worst:05d}' / QUARANTINE}. Mend them or raise the limit; the finished units are kept."
        )
    if not documents.kept:
        raise UserError(f"the data sources hold no usable text: {documents.read} documents were read, none was kept ({reasons or 'none'}).")


def _num_unreadable(documents: DocumentCounts) -> int:
    return sum(count for reason, count in documents.quarantined.items() if reason != "empty")


def _choose_moved(data: DataSection, records: dict[int, UnitRecord]) -> dict[int, tuple[str, ...]]:
    """Which document changes its split, where chance left a split empty: by unit, its id.

    The document with the lowest place is held out if none is, and the one with the highest is trained on if none is;
    a document that is alone is trained on.
    """
    num_documents = {split: sum(r.shards[split].num_documents for r in records.values() if split in r.shards) for split in SPLITS}
    if num_documents["train"] == 0:
        candidates = [(_place(record.highest), index, record.highest) for index, record in records.items() if record.highest]
        _, index, moved = max(candidates)
        return {index: moved}
    if num_documents["held_out"] == 0 and data.held_out_fraction > 0 and num_documents["train"] > 1:
        candidates = [(_place(record.lowest), index, record.lowest) for index, record in records.items() if record.lowest]
        _, index, moved = min(candidates)
        return {index: moved}
    return {}


def _place(identity: tuple[str, ...]) -> float:
    return place_document(identity[0])


def _describe(root: Path, data: DataSection, records: list[UnitRecord]) -> Manifest:
    tokenizer = load_tokenizer(root / TOKENIZER, data.tokenizer.end_of_text)
    size = vocabulary_size(tokenizer)
    documents = sum((record.documents for record in records), DocumentCounts())
    assert documents.read == documents.kept + sum(documents.quarantined.values()), "documents were lost or counted twice"
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_sha256=tokenizer_hash(root / TOKENIZER),
        vocabulary_size=size,
        end_of_text=data.tokenizer.end_of_text,
        end_of_text_id=end_of_text_id(tokenizer, data.tokenizer.end_of_text),
        dtype=str(token_dtype(size)),
        configuration=describe_configuration(data),
        documents=documents,
        inputs=tuple(entry for record in records for entry in record.inputs),
        splits={split: tuple(record.shards[split] for record in records if split in record.shards) for split in SPLITS},
    )
    stored = sum(manifest.total(split).num_documents for split in SPLITS)
    assert stored == documents.kept, f"{documents.kept} documents were kept, {stored} are in shards"
    return manifest


def count_cores() -> int:
    """Cores that this process may use (a container or a batch job may have fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
