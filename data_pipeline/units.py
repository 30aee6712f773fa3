"""One work unit: documents in, a committed folder of shards out. Runs anywhere: no Ray in here.

`<root>/units/00000` appears by one rename and holds, for each split that has documents, shards and their sidecars; what was
left out (`quarantine.jsonl`, `dropped.jsonl`); and `unit.json` with counts, hashes and the fingerprint of what it was made of.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from data_pipeline.adopt import IdBytes, adopt_ids, measure_ids
from data_pipeline.arriving import UNIT
from data_pipeline.checksums import SUFFIX as CHECKSUMS
from data_pipeline.checksums import write_checksums
from data_pipeline.committed import CommittedRecord, load_folder, make_folder, process_peak_bytes, read_record, record_file, record_files
from data_pipeline.dedup import REASONS, UnitDuplicates, load_duplicates
from data_pipeline.disk import explain_file_errors
from data_pipeline.documents import Document, Rejected, TokenDocument, place_document
from data_pipeline.encoding import Encoder, UncuttableError, check_ids, encode, open_encoder
from data_pipeline.manifest import SPLITS, UNITS, Split
from data_pipeline.packing import count_best_fit, count_chopped, pack_documents, packs_name, write_packs
from data_pipeline.recipe import Recipe, cleaning_facts, hash_facts, token_facts
from data_pipeline.records import Counts, DocumentCounts, InputRecord, PackingRecord, ShardRecord
from data_pipeline.shards import DocumentSpan, ShardWriter, token_dtype, write_spans
from data_pipeline.sources import WorkUnit
from data_pipeline.survey import RECORD as SURVEY_RECORD
from data_pipeline.survey import SurveyRecord, SurveyTask, dump_metadata, in_batches, read_cleaned, read_surveyed
from data_pipeline.tally import Tally, prepend_examples

BATCH_CHARACTERS = 1_000_000  # text that is encoded at once


@dataclass(frozen=True)
class Surveyed:
    """Where a unit's cleaned documents are, and which of them are dropped."""

    fingerprint: str
    """The survey's."""
    duplicates: Path
    """The folder that deduplication left its lists in."""
    place: int
    """The unit's place in them."""
    duplicates_sha256: str
    """Of the unit's list: what decides the unit's bytes is what is dropped of it, not what is dropped elsewhere."""


@dataclass(frozen=True)
class UnitTask:
    """All that making a unit depends on."""

    recipe: Recipe
    unit: WorkUnit
    moved: tuple[str, ...] = ()
    """Ids of documents that go to the other split than their place says."""
    surveyed: Surveyed | None = None
    """None where the documents come straight from the sources."""

    def __str__(self) -> str:
        return str(self.unit)

    @property
    def folder(self) -> Path:
        """The unit's folder once it is committed."""
        return self.recipe.root / UNITS / f"{self.unit.index:05d}"

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the unit's bytes."""
        surveyed = self.surveyed
        made_of = [surveyed.fingerprint, surveyed.duplicates_sha256] if surveyed else cleaning_facts(self.recipe, self.unit.files)
        return hash_facts([made_of, token_facts(self.recipe), self.moved])


class UnitRecord(CommittedRecord):
    """`unit.json`."""

    source: str
    documents: DocumentCounts
    inputs: tuple[InputRecord, ...]
    shards: dict[Split, tuple[ShardRecord, ...]]
    """The splits that have documents here; names and files relative to the unit's folder."""
    lowest: tuple[str, ...] = ()
    """The least id of a kept document, if any."""
    highest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unit:
    """What a unit's task gives back."""

    record: UnitRecord
    was_there: bool
    peak_bytes: int
    """Largest resident memory of the process that made it."""

    def measure(self) -> tuple[int, int, int]:
        """Documents read, bytes of text and tokens that came out."""
        shards = [shard for shards in self.record.shards.values() for shard in shards]
        return self.record.documents.read, sum(shard.num_bytes for shard in shards), sum(shard.num_tokens for shard in shards)


def write_unit(task: UnitTask) -> Unit:
    """Make a unit and commit it, or find it. Raises UserError: an input changed, two tokenizers disagree, the disk is full."""
    with explain_file_errors(task.recipe.root):
        if (record := load_unit(task)) is not None:
            return Unit(record, True, process_peak_bytes())
        recipe = task.recipe
        record = make_folder(
            recipe.root, recipe.token, task.folder, UNIT, lambda folder: _fill(task, folder), lambda: load_unit(task) is not None
        )
        return Unit(record, False, process_peak_bytes())


def load_unit(task: UnitTask) -> UnitRecord | None:
    """The record of a committed unit that is whole and made of just this task; None otherwise."""
    return load_folder(task.folder, UNIT, UnitRecord, task.fingerprint())


def _fill(task: UnitTask, folder: Path) -> UnitRecord:
    recipe = task.recipe
    settings = recipe.data.tokenizer
    encoder = open_encoder(recipe.tokenizer_path, recipe.tokenizer_sha256, settings.end_of_text, settings.engine)
    tally, inputs = Tally(folder), list[InputRecord]()
    splits: dict[Split, _OpenSplit] = {split: _OpenSplit(task, folder, split, encoder) for split in SPLITS}
    lowest, highest = "", ""
    for document, ids, num_bytes in _encode_all(task, encoder, tally, _read(task, tally, inputs)):
        identity = document.document_id
        held_out = (place_document(identity) < recipe.data.held_out_fraction) != (identity in task.moved)
        splits["held_out" if held_out else "train"].add(document, identity, ids, num_bytes)
        lowest, highest = min(lowest or identity, identity), max(highest, identity)
        tally.kept += 1
    shards: dict[Split, tuple[ShardRecord, ...]] = {}
    for split, one in splits.items():
        if made := one.finish():
            shards[split] = made
    documents = tally.close()
    if task.surveyed is not None:
        surveyed = read_record(_survey_folder(task) / SURVEY_RECORD, SurveyRecord)
        documents, inputs = _join(surveyed.documents, documents), list(surveyed.inputs)
        prepend_examples(_survey_folder(task), folder)
    return UnitRecord(
        fingerprint=task.fingerprint(),
        files=record_files(folder, {name: file for made in shards.values() for shard in made for name, file in shard.files.items()}),
        source=task.unit.files[0].source,
        documents=documents,
        inputs=tuple(inputs),
        shards=shards,
        lowest=(lowest,) if lowest else (),
        highest=(highest,) if highest else (),
    )


def hash_duplicates(found: UnitDuplicates) -> str:
    """SHA-256 of a unit's list of duplicates."""
    return sha256(found.ordinals.tobytes() + found.reasons.tobytes()).hexdigest()


def _survey_folder(task: UnitTask) -> Path:
    return SurveyTask(task.recipe, task.unit).folder


def _join(surveyed: DocumentCounts, later: DocumentCounts) -> DocumentCounts:
    """What a survey kept is what was read behind it."""
    return surveyed + DocumentCounts(
        read=later.read - surveyed.kept,
        kept=later.kept - surveyed.kept,
        dropped=later.dropped,
        quarantined=later.quarantined,
    )


def _read(task: UnitTask, tally: Tally, inputs: list[InputRecord]) -> Iterator[Document | TokenDocument]:
    if task.surveyed is None:
        return read_cleaned(task.recipe, task.unit, tally, inputs)
    found = load_duplicates(task.surveyed.duplicates, task.surveyed.place)
    if hash_duplicates(found) != task.surveyed.duplicates_sha256:
        raise UserError(f"{task.surveyed.duplicates} was changed while the build read it; start the same command again.")
    dropped = {ordinal: REASONS[code] for ordinal, code in zip(found.ordinals.tolist(), found.reasons.tolist(), strict=True)}
    return read_surveyed(_survey_folder(task), dropped, tally)


def _encode_all(
    task: UnitTask, encoder: Encoder, tally: Tally, documents: Iterable[Document | TokenDocument]
) -> Iterator[tuple[Document | TokenDocument, np.ndarray[Any, Any], int]]:
    """Each document with its ids, end of text included, in the shards' type, and the bytes of its text."""
    dtype, end = token_dtype(encoder.vocabulary_size), encoder.end_of_text_id
    id_bytes: IdBytes | None = None
    unchecked = True
    for batch in in_batches(documents, BATCH_CHARACTERS):
        if isinstance(batch[0], TokenDocument):
            id_bytes = id_bytes if id_bytes is not None else measure_ids(encoder.reference)
            for document in batch:
                assert isinstance(document, TokenDocument), "a source is either text or tokens"
                yield document, *adopt_ids(document, id_bytes, end, dtype)
            continue
        texts = [document.text for document in batch if isinstance(document, Document)]
        try:
            ids, offsets = encode(encoder, texts)
        except UncuttableError as error:
            for document in batch:  # only a text that is alone in its batch is that long
                tally.reject(Rejected(document.source, document.file, document.position, None, "cannot_be_cut", str(error), ""))
            continue
        all_ids = np.empty(ids.size + len(batch), dtype=dtype)  # with room for an end of text behind each
        places = offsets.astype(np.int64)
        keep = np.ones(all_ids.size, dtype=bool)
        ends = places[1:] + np.arange(len(batch))
        keep[ends] = False
        all_ids[keep] = ids
        all_ids[ends] = end
        for number, (document, text) in enumerate(zip(batch, texts, strict=True)):
            first, behind = int(places[number]), int(places[number + 1])
            if unchecked or _is_checked(document.document_id, task.recipe.data.tokenizer.checked_fraction):
                unchecked = False
                _refuse_difference(task, encoder, document, text, ids[first:behind])
            num_bytes = len(text) if text.isascii() else len(text.encode("utf-8"))
            yield document, all_ids[first + number : behind + number + 1], num_bytes


def _is_checked(identity: str, fraction: float) -> bool:
    return int(identity[13:], 16) < fraction * 16.0 ** (len(identity) - 13)  # digits that do not decide the document's split


def _refuse_difference(task: UnitTask, encoder: Encoder, document: Document | TokenDocument, text: str, ids: np.ndarray[Any, Any]) -> None:
    if not check_ids(encoder, text, ids):
        raise UserError(
            f"fastokens and tokenizers give different ids for the document at position {document.position} of {document.file} "
            f"(source {document.source}, id {document.document_id}); set data.tokenizer.engine to tokenizers, and start again."
        )


class _OpenSplit:
    """The shards of one split of a unit: documents are gathered up to a shard's size, then written in shuffled order."""

    def __init__(self, task: UnitTask, folder: Path, split: Split, encoder: Encoder) -> None:
        self._folder, self._split = folder, split
        self._facts = {"tokenizer_sha256": task.recipe.tokenizer_sha256, "vocabulary_size": str(encoder.vocabulary_size)}
        self._dtype = token_dtype(encoder.vocabulary_size)
        self._seed = f"{task.recipe.data.seed}\0".encode()
        self._limit = task.recipe.data.shard_tokens
        self._packed_lengths = task.recipe.data.packed_lengths
        self._gathered: list[tuple[bytes, np.ndarray[Any, Any], DocumentSpan]] = []
        self._num_tokens = 0
        self._shards: list[ShardRecord] = []

    def add(self, document: Document | TokenDocument, identity: str, ids: np.ndarray[Any, Any], num_bytes: int) -> None:
        """Put a document into the shard that is being gathered."""
        text = isinstance(document, Document)
        name, metadata = (document.name, dump_metadata(document)) if text else (None, None)
        span = DocumentSpan(identity, document.source, document.file, document.position, 0, ids.size, num_bytes, name, metadata)
        if self._gathered and self._num_tokens + ids.size > self._limit:
            self._write()
        self._gathered.append((blake2b(self._seed + identity.encode(), digest_size=8).digest(), ids, span))
        self._num_tokens += ids.size

    def finish(self) -> tuple[ShardRecord, ...]:
        """Write what is left; all shards of the split."""
        if self._gathered:
            self._write()
        return tuple(self._shards)

    def _write(self) -> None:
        name = f"{self._split}-{len(self._shards):05d}"
        prefix = self._folder / name
        self._gathered.sort(key=lambda one: (one[0], one[2].document_id))
        with ShardWriter(prefix, self._dtype) as writer:
            writer.add_documents([ids for _, ids, _ in self._gathered])
        first, spans, sources = 0, list[DocumentSpan](), dict[str, Counts]()
        for _, _, span in self._gathered:
            spans.append(span._replace(first_token=first))
            first += span.num_tokens
        total = Counts(num_tokens=first, num_documents=len(spans), num_bytes=sum(span.num_bytes for span in spans))
        sources[spans[0].source] = total
        write_spans(prefix, spans, self._facts)
        write_checksums(prefix)
        packings = self._pack(prefix, np.array([0, *(span.first_token + span.num_tokens for span in spans)]))
        files = [f"{name}{suffix}" for suffix in (".bin", ".idx", CHECKSUMS, ".documents.parquet")]
        files += [packs_name(name, int(length)) for length in packings]
        records = {file: record_file(self._folder / file) for file in files}
        self._shards.append(ShardRecord(name=name, files=records, sources=sources, packings=packings, **total.model_dump()))
        self._gathered, self._num_tokens = [], 0

    def _pack(self, prefix: Path, document_starts: np.ndarray[Any, Any]) -> dict[str, PackingRecord]:
        """Write an index of best-fit packing for each length that training data is wanted in."""
        packings: dict[str, PackingRecord] = {}
        for length in self._packed_lengths if self._split == "train" else ():
            packs = pack_documents(document_starts, length)
            write_packs(Path(packs_name(prefix, length)), packs)
            packed, chopped = count_best_fit(packs, document_starts), count_chopped(document_starts, length)
            packings[str(length)] = PackingRecord(
                num_packs=packed.num_packs,
                documents_cut=packed.documents_cut,
                padding_tokens=packed.padding_tokens,
                documents_cut_when_chopped=chopped.documents_cut,
            )
        return packings
