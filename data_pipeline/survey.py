"""Before deduplication: what each unit holds after cleaning, and the signatures by which documents are compared.

In: a unit's sources. Out: `<root>/survey/00000` with the cleaned texts (`texts.arrow`), what was left out, and the files of
`signature_files.py`. The tokens are made from these texts, so that no rule runs twice; the folder goes when the dataset is
finished.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
import pyarrow.ipc

from data_pipeline.cleaning import RuleError, apply_rules, bind_rules
from data_pipeline.committed import CommittedRecord, load_folder, make_folder, process_peak_bytes, record_files
from data_pipeline.disk import explain_file_errors
from data_pipeline.documents import Document, Dropped, Rejected, TokenDocument
from data_pipeline.input_file import InputFile
from data_pipeline.minhash import signature_version
from data_pipeline.recipe import Recipe, cleaning_facts, hash_facts
from data_pipeline.records import DocumentCounts, InputRecord
from data_pipeline.signature_files import Survey
from data_pipeline.sources import WorkUnit, read_unit
from data_pipeline.tally import Tally

SURVEY = "survey"
RECORD = "survey.json"
TEXTS = "texts.arrow"
BATCH_CHARACTERS = 2_000_000
SCHEMA = pyarrow.schema(
    [
        ("source", pyarrow.string()),
        ("file", pyarrow.string()),
        ("position", pyarrow.int64()),
        ("text", pyarrow.large_string()),
        ("name", pyarrow.string()),
        ("metadata", pyarrow.string()),
    ]
)
Item = TypeVar("Item", Document, Document | TokenDocument)


@dataclass(frozen=True)
class SurveyTask:
    """All that a unit's survey depends on."""

    recipe: Recipe
    unit: WorkUnit

    def __str__(self) -> str:
        return f"the survey of {self.unit}"

    @property
    def folder(self) -> Path:
        """The survey's folder once it is committed."""
        return self.recipe.root / SURVEY / f"{self.unit.index:05d}"

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the survey's bytes."""
        deduplicate = self.recipe.data.deduplicate
        settings = deduplicate and deduplicate.model_dump(mode="json")
        return hash_facts([cleaning_facts(self.recipe, self.unit.files), settings, signature_version()])


class SurveyRecord(CommittedRecord):
    """`survey.json`."""

    documents: DocumentCounts
    inputs: tuple[InputRecord, ...]
    num_bytes: int
    """Of the kept texts, in UTF-8."""


@dataclass(frozen=True)
class SurveyDone:
    """What a survey task gives back."""

    record: SurveyRecord
    was_there: bool
    peak_bytes: int
    """Largest resident memory of the process that did it."""

    def measure(self) -> tuple[int, int, int]:
        """Documents read, bytes of text that came out, no tokens."""
        return self.record.documents.read, self.record.num_bytes, 0


def write_survey(task: SurveyTask) -> SurveyDone:
    """Make a unit's survey and commit it, or find it. Raises UserError: an input changed, the disk is full."""
    with explain_file_errors(task.recipe.root):
        if (record := load_folder(task.folder, RECORD, SurveyRecord, task.fingerprint())) is not None:
            return SurveyDone(record, True, process_peak_bytes())
        record = make_folder(
            task.recipe.root,
            task.recipe.token,
            task.folder,
            RECORD,
            lambda folder: _fill(task, folder),
            lambda: load_folder(task.folder, RECORD, SurveyRecord, task.fingerprint()) is not None,
        )
        return SurveyDone(record, False, process_peak_bytes())


def read_cleaned(recipe: Recipe, unit: WorkUnit, tally: Tally, inputs: list[InputRecord]) -> Iterator[Document | TokenDocument]:
    """A unit's documents after cleaning; what is left out goes to `tally`, what was read to `inputs`. Raises OSError, UserError."""
    rules = bind_rules(recipe.data.clean, unit.files[0].source)

    def note(file: InputFile, sha256: str, num_bytes: int) -> None:
        inputs.append(InputRecord(source=file.source, file=file.name, bytes=num_bytes, sha256=sha256))

    with closing(read_unit(unit, recipe.data.largest_document_bytes, on_input=note)) as items:
        for item in items:
            if isinstance(item, Rejected):
                tally.reject(item)
            elif isinstance(item, TokenDocument):
                yield item  # tokenised elsewhere: there is no text for a rule to look at
            elif isinstance(cleaned := apply_rules(rules, item), Dropped):
                tally.drop(cleaned)
            else:
                yield cleaned


def read_for_sampling(recipe: Recipe, unit: WorkUnit, failures: list[RuleError]) -> Iterator[Document]:
    """A unit's documents after cleaning, to train a tokenizer on; nothing is counted. Raises OSError, UserError.

    A document on which a rule fails is passed over and noted: the unit that meets it again will be named with it.
    """
    rules = bind_rules(recipe.data.clean, unit.files[0].source)
    with closing(read_unit(unit, recipe.data.largest_document_bytes)) as items:
        for item in items:
            try:
                if isinstance(item, Document) and isinstance(cleaned := apply_rules(rules, item), Document):
                    yield cleaned
            except RuleError as error:
                failures.append(error)


def read_surveyed(folder: Path, dropped: dict[int, str], tally: Tally) -> Iterator[Document]:
    """A survey's documents but those that deduplication dropped (ordinal -> reason), which go to `tally`. Raises OSError."""
    ordinal = 0
    with pyarrow.OSFile(str(folder / TEXTS)) as file, pyarrow.ipc.open_stream(file) as stream:
        for batch in stream:
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                source, name, position, text, identity, metadata = row
                document = Document(source, name, position, text, identity, json.loads(metadata) if metadata else {})
                if ordinal in dropped:
                    tally.drop(Dropped(document, dropped[ordinal]))
                else:
                    yield document
                ordinal += 1


def read_origins(folder: Path) -> pyarrow.Table:
    """Where each document of a survey came from (source, file, position), in its order; no text is read. Raises OSError."""
    options = pyarrow.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index(name) for name in ("source", "file", "position")])
    with pyarrow.memory_map(str(folder / TEXTS)) as file, pyarrow.ipc.open_stream(file, options=options) as stream:
        return stream.read_all()


def in_batches(documents: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Documents in batches of about `size` characters (tokens, where there is no text)."""
    batch: list[Item] = []
    gathered = 0
    for document in documents:
        length = len(document.tokens if isinstance(document, TokenDocument) else document.text)
        if batch and gathered + length > size:
            yield batch
            batch, gathered = [], 0
        batch.append(document)
        gathered += length
    if batch:
        yield batch


def dump_metadata(document: Document) -> str | None:
    """A document's metadata as JSON, None where there is none."""
    return json.dumps(dict(document.metadata), ensure_ascii=False, default=str) if document.metadata else None


def _fill(task: SurveyTask, folder: Path) -> SurveyRecord:
    settings = task.recipe.data.deduplicate
    assert settings is not None, "a survey is made for deduplication"
    tally, inputs, num_bytes = Tally(folder), list[InputRecord](), 0
    survey = Survey(settings)
    options = pyarrow.ipc.IpcWriteOptions(compression=pyarrow.Codec("zstd", 1), use_threads=False)
    # Through Python's own file, so that a full disk is an OSError with its number.
    with (folder / TEXTS).open("wb") as file, pyarrow.ipc.new_stream(file, SCHEMA, options=options) as stream:
        for documents in in_batches(_texts(read_cleaned(task.recipe, task.unit, tally, inputs)), BATCH_CHARACTERS):
            texts = [document.text for document in documents]
            survey.add(texts)
            num_bytes += sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts)
            rows: list[tuple[Any, ...]] = [(d.source, d.file, d.position, d.text, d.name, dump_metadata(d)) for d in documents]
            columns = [pyarrow.array(column, one.type) for column, one in zip(zip(*rows, strict=True), SCHEMA, strict=True)]
            stream.write_batch(pyarrow.record_batch(columns, schema=SCHEMA))
            tally.kept += len(documents)
    survey.write(folder)
    documents = tally.close()
    return SurveyRecord(
        fingerprint=task.fingerprint(), files=record_files(folder), documents=documents, inputs=tuple(inputs), num_bytes=num_bytes
    )


def _texts(documents: Iterable[Document | TokenDocument]) -> Iterator[Document]:
    for document in documents:
        assert isinstance(document, Document), "units of tokens are not surveyed"
        yield document
