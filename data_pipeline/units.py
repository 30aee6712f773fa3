"""One work unit: documents in, a committed folder of shards out. Runs anywhere: no Ray in here.

`<root>/units/00000` appears by one rename and holds, for each split that has documents, a shard and its sidecar; the
rejected documents (`quarantine.jsonl`); and `unit.json` with counts, hashes and the fingerprint of what it was made of.
Equal tasks write equal bytes, so a unit that was lost or cut off is simply made again.
"""

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from tokenizers import Tokenizer

from configs.durable import commit_folder, remove_folders, sha256_of_file
from configs.errors import UserError
from data_pipeline.disk import explain_file_errors
from data_pipeline.documents import Document, Rejected, place_document
from data_pipeline.formats import InputFile
from data_pipeline.manifest import FORMAT_VERSION, UNITS, Counts, DocumentCounts, FileRecord, InputRecord, Record, ShardRecord, Split
from data_pipeline.ownership import is_owned_by
from data_pipeline.shards import DocumentSpan, ShardWriter, token_dtype, write_spans
from data_pipeline.sources import WorkUnit, read_unit
from data_pipeline.tokenizer import end_of_text_id, load_tokenizer, vocabulary_size

UNIT = "unit.json"
QUARANTINE = "quarantine.jsonl"
TEMPORARY_PREFIX = ".tmp-"
BATCH_BYTES = 2_000_000  # text that is encoded at once: its tokens take some 50 times as much memory


@dataclass(frozen=True)
class UnitTask:
    """All that making a unit depends on."""

    unit: WorkUnit
    root: Path
    """The dataset's folder, absolute; its tokenizer is there."""
    token: str
    """The build's (see `ownership.py`); it does not go into what is written."""
    tokenizer_path: Path
    tokenizer_sha256: str
    end_of_text: str
    held_out_fraction: float
    largest_document_bytes: int
    moved: tuple[str, ...] = ()
    """Ids of documents that go to the other split than their place says."""

    def __str__(self) -> str:
        names = [str(file.path) for file in self.unit.files]
        return f"work unit {self.unit.index}: {names[0]}" + (f" and {len(names) - 1} more, to {names[-1]}" if len(names) > 1 else "")

    @property
    def folder(self) -> Path:
        """The unit's folder once it is committed."""
        return self.root / UNITS / f"{self.unit.index:05d}"

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the unit's bytes; the files by size and modification time."""
        files = [{key: value for key, value in asdict(file).items() if key != "root"} for file in self.unit.files]
        facts = [
            FORMAT_VERSION,
            files,
            self.tokenizer_sha256,
            self.end_of_text,
            self.held_out_fraction,
            self.largest_document_bytes,
            self.moved,
        ]
        return sha256(json.dumps(facts).encode()).hexdigest()


class UnitRecord(Record):
    """`unit.json`."""

    fingerprint: str
    documents: DocumentCounts
    inputs: tuple[InputRecord, ...]
    """The unit's files; an arrow file's row range counts only where it is the file's first."""
    shards: dict[Split, ShardRecord]
    """The splits that have documents here."""
    quarantine: FileRecord | None
    lowest: tuple[str, ...] = ()
    """The id of the kept document with the lowest place, if any."""
    highest: tuple[str, ...] = ()


def write_unit(task: UnitTask) -> UnitRecord:
    """Make a unit and commit it. Raises UserError: an input changed or cannot be read, the disk is full."""
    with explain_file_errors(task.root):
        return _write_unit(task)


def load_unit(task: UnitTask) -> UnitRecord | None:
    """The record of a committed unit that is whole and made of just this task; None otherwise."""
    try:
        record = UnitRecord.model_validate_json((task.folder / UNIT).read_bytes(), strict=True)
        files = {name: file for shard in record.shards.values() for name, file in shard.files.items()}
        if record.quarantine is not None:
            files[f"{UNITS}/{task.folder.name}/{QUARANTINE}"] = record.quarantine
        whole = all(sha256_of_file(task.root / name) == file.sha256 for name, file in files.items())
    except (OSError, ValidationError):
        return None
    return record if whole and record.fingerprint == task.fingerprint() else None


def clear_units(root: Path, num_units: int) -> None:
    """Remove temporary folders that nobody fills any more, and units beyond those of the plan."""
    folder = root / UNITS
    stale = [path for path in folder.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]
    remove_folders(stale + [path for path in folder.iterdir() if path.name.isdigit() and int(path.name) >= num_units])


def _write_unit(task: UnitTask) -> UnitRecord:
    # The library's own threads would fight with the other units' for the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    temporary = task.root / UNITS / f"{TEMPORARY_PREFIX}{task.unit.index:05d}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        record = _fill(task, temporary)
        (temporary / UNIT).write_text(json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False), encoding="utf-8")
        _commit(task, temporary)
    finally:
        remove_folders([temporary])
    return record


def _commit(task: UnitTask, temporary: Path) -> None:
    if not is_owned_by(task.root, task.token):
        raise UserError(f"{task.root}: another build has taken this folder over.")
    if task.folder.exists():
        if load_unit(task) is not None:  # a retried task, whose first try got further than was known
            return
        stale = temporary.with_name(f"{temporary.name}-stale")
        task.folder.rename(stale)
        remove_folders([stale])
    commit_folder(temporary, task.folder)


def _fill(task: UnitTask, folder: Path) -> UnitRecord:
    tokenizer = load_tokenizer(task.tokenizer_path, task.end_of_text)
    # Of an arrow file's row ranges, the first one hashes the whole file.
    inputs = tuple(_hash_input(file) for file in task.unit.files if not file.rows or file.rows[0] == 0)
    quarantined: dict[str, int] = {}
    kept: list[str] = []
    with ExitStack() as stack:
        splits = _Splits(task, folder, stack, tokenizer)
        for documents in _batches(_keep(task, folder, stack, quarantined)):
            identities = [document.document_id for document in documents]
            encodings = tokenizer.encode_batch_fast([document.text for document in documents], add_special_tokens=False)
            for document, identity, encoding in zip(documents, identities, encodings, strict=True):
                splits.add(document, identity, encoding.ids)
            kept = [min([*kept, *identities], key=_placed), max([*kept, *identities], key=_placed)]
            splits.num_kept += len(documents)
    for file in task.unit.files:
        _refuse_changed(file)
    reasons = dict(sorted(quarantined.items()))
    quarantine = folder / QUARANTINE
    return UnitRecord(
        fingerprint=task.fingerprint(),
        documents=DocumentCounts(read=splits.num_kept + sum(reasons.values()), kept=splits.num_kept, quarantined=reasons),
        inputs=inputs,
        shards=splits.finish(),
        quarantine=_record(quarantine) if quarantine.exists() else None,
        lowest=tuple(kept[:1]),
        highest=tuple(kept[1:]),
    )


def _placed(document_id: str) -> tuple[float, str]:
    return place_document(document_id), document_id


@dataclass
class _OpenShard:
    """A split's shard while it is being written."""

    writer: ShardWriter
    spans: list[DocumentSpan] = field(default_factory=list)
    sources: dict[str, Counts] = field(default_factory=dict)


class _Splits:
    """The shards of one unit; a split's files exist from its first document on."""

    def __init__(self, task: UnitTask, folder: Path, stack: ExitStack, tokenizer: Tokenizer) -> None:
        self._task, self._folder, self._stack = task, folder, stack
        self._dtype = token_dtype(vocabulary_size(tokenizer))
        self._end = end_of_text_id(tokenizer, task.end_of_text)
        self._shards: dict[Split, _OpenShard] = {}
        self.num_kept = 0

    def add(self, document: Document, identity: str, ids: list[int]) -> None:
        """Append a document and the end-of-text token to the shard of its split."""
        held_out = (place_document(identity) < self._task.held_out_fraction) != (identity in self._task.moved)
        split: Split = "held_out" if held_out else "train"
        if split not in self._shards:
            self._shards[split] = _OpenShard(self._stack.enter_context(ShardWriter(self._folder / split, self._dtype)))
        shard = self._shards[split]
        first = shard.writer.num_tokens
        shard.writer.add_document(np.array([*ids, self._end], dtype=np.int64))
        size = len(document.text.encode("utf-8"))
        span = DocumentSpan(identity, document.source, document.file, document.position, first, len(ids) + 1, size)
        shard.spans.append(span)
        added = Counts(num_tokens=span.num_tokens, num_documents=1, num_bytes=size)
        shard.sources[document.source] = shard.sources.get(document.source, Counts()) + added

    def finish(self) -> dict[Split, ShardRecord]:
        """Write the sidecars (the shards are closed by now) and describe everything."""
        records: dict[Split, ShardRecord] = {}
        for split, shard in sorted(self._shards.items()):
            write_spans(self._folder / split, shard.spans)
            prefix = f"{UNITS}/{self._task.folder.name}"
            names = [f"{split}.bin", f"{split}.idx", f"{split}.documents.parquet"]
            total = sum(shard.sources.values(), Counts())
            records[split] = ShardRecord(
                name=f"{prefix}/{split}",
                files={f"{prefix}/{name}": _record(self._folder / name) for name in names},
                sources=dict(sorted(shard.sources.items())),
                **total.model_dump(),
            )
        return records


def _keep(task: UnitTask, folder: Path, stack: ExitStack, quarantined: dict[str, int]) -> Iterator[Document]:
    """The unit's documents; the rejected ones go to `quarantine.jsonl` on the way, and are counted by reason."""
    file: Any = None
    for item in read_unit(task.unit, task.largest_document_bytes):
        if isinstance(item, Rejected):
            if file is None:
                file = stack.enter_context((folder / QUARANTINE).open("w", encoding="utf-8"))
            file.write(json.dumps(asdict(item), ensure_ascii=True) + "\n")
            quarantined[item.reason] = quarantined.get(item.reason, 0) + 1
        else:
            yield item


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in batches of about `BATCH_BYTES` of text."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _hash_input(file: InputFile) -> InputRecord:
    _refuse_changed(file)
    return InputRecord(source=file.source, file=file.name, bytes=file.num_bytes, sha256=sha256_of_file(file.path))


def _refuse_changed(file: InputFile) -> None:
    status = file.path.stat()
    if (status.st_size, status.st_mtime_ns) != (file.num_bytes, file.mtime_ns):
        raise UserError(f"{file.path} was changed while the build read it; start the same command again when it is at rest.")


def _record(path: Path) -> FileRecord:
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_of_file(path))
