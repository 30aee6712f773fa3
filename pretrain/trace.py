"""Which documents a model saw when: from a step to its documents, and from a document to its steps (`pretrain data trace`).

In: a run folder, of which `run.yaml` is read and the newest commit's small MANIFEST.json (how far the run is, what it skips),
and the dataset. Out: plain values, ready for JSON, and the same as text. Which sample comes when is a function of the manifest
and the seed, so nothing is replayed: no weights and no torch are loaded, and only shards that the answer lies in are opened.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from configs.errors import UserError
from data_pipeline.manifest import SPLITS, TOKENIZER, Split, load_manifest
from data_pipeline.packing import packs_name, read_packs
from data_pipeline.records import ShardRecord
from data_pipeline.shards import Shard
from data_pipeline.show import SHOWN_NAMESAKES, read_columns
from data_pipeline.tokenizer import load_tokenizer
from pretrain.checkpoint.verify import newest_readable_commit
from pretrain.data.corpus import open_corpus
from pretrain.data.order import DataOrder
from pretrain.data.packs import PackedSource, Piece
from pretrain.data.remote import refuse_remote
from pretrain.page import Page, make_visible
from pretrain.run.folder import RunFolder

READERS = 8  # shards that are read at once
NEAR_CANDIDATES = 1000  # like names that are compared letter by letter
TOKENS_PER_CHARACTER = 4  # at most, where tokens are bytes


@dataclass(frozen=True)
class Part:
    """Neighbouring tokens of one document that a sample is learnt from."""

    document_id: str
    name: str | None
    file: str
    position: int
    """Where the document stands in its file, as in `documents.Document`."""
    first_token: int
    """Of the part, in its document."""
    num_tokens: int
    document_tokens: int
    """Of the whole document, end of text included."""
    is_cut: bool
    """Whether the document has tokens that these do not see: in another sample, or in another sequence of this one."""
    text: str | None = None
    """The beginning of what the tokens stand for, without the end of text; None: not asked for."""


@dataclass(frozen=True)
class Sample:
    """A sample of the order and what it is made of."""

    sample: int
    """Its number in the order."""
    step: int | None
    """The step that learns from it, from 1 on as in metrics.jsonl; None: it is skipped on purpose."""
    row: int | None
    """Its place in the global batch, from 0 on."""
    epoch: int
    """How often its source was seen as a whole before."""
    source: str
    sequence_length: int
    """Shorter than the sample where its stage cuts it into several sequences."""
    documents: list[Part] = field(default_factory=list)


@dataclass(frozen=True)
class Sighting:
    """A sample that learns from tokens of a document."""

    sample: int
    step: int | None
    row: int | None
    epoch: int
    first_token: int
    """Of the document."""
    num_tokens: int
    state: Literal["seen", "to come", "skipped"]
    """seen: before the newest commit; skipped: left out of the order on purpose."""


@dataclass(frozen=True)
class TracedDocument:
    """A document, and when it is seen up to the run's end."""

    document_id: str
    name: str | None
    source: str
    file: str
    position: int
    shard: str
    num_tokens: int
    left_over_tokens: int
    """Tokens that are never learnt from: at the source's end, too few for one more sample."""
    sightings: list[Sighting]


class Trace:
    """The order of a run's samples, and the documents they are made of."""

    def __init__(self, run: RunFolder) -> None:
        """Raises UserError: the dataset is gone, or is another than the run has learnt from."""
        config = run.load_config()
        refuse_remote(config.data, "`pretrain data trace`")
        self.run, self.training, self._folder = run, config.training, Path(config.data.folder())
        if not self._folder.exists():
            raise UserError(
                f"{self._folder}: no such folder, and {run.config_file} learns from the dataset there. Put it back or build it again, or "
                "give this command where the training was started: relative paths begin there."
            )
        self._manifest = load_manifest(self._folder)
        corpus = open_corpus(config)
        self.progress = newest_readable_commit(run.checkpoints)
        skipped = self.progress.state.skipped_samples if self.progress else ()
        self.order = DataOrder(corpus.sources, config.mixture, self.training, config.run.seed, skipped)
        self._refuse_other_data(corpus.tokenizer_sha256)
        self._shards: list[ShardRecord] = []
        self._layouts: list[_Chopped | _BestFit] = []
        for index, source in enumerate(self.order.sources):
            shards = [shard for shard in self._manifest.shards("train") if source.name in shard.sources]
            first, length = len(self._shards), self.training.sequence_length
            packed = corpus.packs[index] if corpus.packs else None
            self._layouts.append(_BestFit(packed, self._folder, shards, first, length) if packed else _Chopped(shards, first, length))
            self._shards += shards

    @property
    def samples_seen(self) -> int | None:
        """Samples that the newest commit has learnt from; None: there is no commit."""
        return self.progress.state.samples_seen if self.progress else None

    @cached_property
    def end(self) -> int:
        """The number behind the run's last sample."""
        return int(self.order.numbers(self.training.steps.total_samples - 1, 1)[0]) + 1

    # --- forward --------------------------------------------------------------------------------------------

    def steps(self, first: int, last: int, source: str | None = None, num_characters: int = 0) -> list[Sample]:
        """What the steps `first` to `last` learn from, of a source (None: of all). Raises UserError for steps that there are not."""
        if not 1 <= first <= last <= self.training.total_steps:
            asked = f"step {first}" if first == last else f"steps {first} to {last}"
            raise UserError(f"{self.run.path} has the steps 1 to {self.training.total_steps}, the first update being 1; asked for {asked}.")
        begin, end = (self.training.steps.samples_before(step) for step in (first - 1, last))
        return self._samples(self.order.numbers(begin, end - begin), source, num_characters)

    def sample(self, number: int, num_characters: int = 0) -> Sample:
        """What one sample of the order is made of. Raises UserError for a number beyond the run's end."""
        if not 0 <= number < self.end:
            raise UserError(f"{self.run.path} has the samples 0 to {self.end - 1}, asked for {number}.")
        return self._samples(np.array([number], dtype=np.int64), None, num_characters)[0]

    def _samples(self, number_n: np.ndarray[Any, Any], source: str | None, num_characters: int) -> list[Sample]:
        self._refuse_unknown_source(source)
        samples: list[Sample] = []
        by_file: dict[int, list[_Target]] = {}
        columns = (number_n, *self.order.places(number_n))
        for number, index, epoch, place in zip(*(column.tolist() for column in columns), strict=True):
            name = self.order.sources[index].name
            if source in (None, name):
                samples.append(Sample(number, *self._place(number), epoch, name, self.order.mixture.stage_at(number).sequence_length))
                at = 0
                for piece in self._layouts[index].pieces(place):
                    by_file.setdefault(piece.file, []).append(_Target(samples[-1], at, piece))
                    at += piece.num_tokens
        # Each shard is opened once; a sample's pieces stand in the order of the shards.
        limit = TOKENS_PER_CHARACTER * num_characters
        with ThreadPoolExecutor(READERS) as pool:
            found = list(chain.from_iterable(pool.map(lambda file: self._find_parts(file, by_file[file], limit), sorted(by_file))))
        texts = self._tokenizer.decode_batch([ids for *_, ids in found], skip_special_tokens=False) if num_characters else None
        for number, (sample, part, _) in enumerate(found):
            sample.documents.append(replace(part, text=texts[number][:num_characters]) if texts else part)
        return samples

    def _place(self, number: int) -> tuple[int | None, int | None]:
        """Step and row of a sample."""
        seen = self.order.seen_before(number)
        if seen is None:
            return None, None
        step = self.training.steps.step_of(seen)
        return step + 1, seen - self.training.steps.samples_before(step)

    def _find_parts(self, file: int, targets: Sequence["_Target"], limit: int) -> list[tuple[Sample, Part, list[int]]]:
        """The documents that pieces in a shard are made of, each with its first tokens, `limit` at most, but for the end of text."""
        shard = Shard(self._folder / self._shards[file].name)
        starts = shard.document_starts
        found: list[tuple[_Target, int, int, int]] = []
        for target in targets:
            begin, end = target.piece.first_token, target.piece.first_token + target.piece.num_tokens
            for number in range(int(np.searchsorted(starts, begin, "right")) - 1, int(np.searchsorted(starts, end))):
                first, last = max(begin, int(starts[number])), min(end, int(starts[number + 1]))
                if first < last:
                    found.append((target, number, first, last))
        rows = _read_rows(shard.prefix, sorted({number for _, number, _, _ in found}))
        parts: list[tuple[Sample, Part, list[int]]] = []
        for (sample, at, piece), number, first, last in found:
            start, num_tokens, length = int(starts[number]), int(starts[number + 1] - starts[number]), sample.sequence_length
            at += first - piece.first_token
            is_cut = last - first < num_tokens or at // length < (at + num_tokens - 1) // length
            ids: list[int] = shard.tokens[first : min(last, first + limit)].tolist()
            if ids and ids[-1] == self._manifest.end_of_text_id:
                ids.pop()
            parts.append((sample, Part(*rows[number], first - start, last - first, num_tokens, is_cut), ids))
        return parts

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._folder / TOKENIZER, self._manifest.end_of_text)

    # --- back -----------------------------------------------------------------------------------------------

    def document(self, wanted: str, source: str | None = None) -> TracedDocument:
        """When the document of this id or, where none has, of this name is seen.

        The id is looked for in the sidecars, shard after shard. Raises UserError: there is no such document, there are several of
        that name, or it is held out.
        """
        self._refuse_unknown_source(source)
        split, record, number = self._find(wanted, source)
        if split == "held_out":
            raise UserError(f"{wanted!r} is a document of {record.name}: held out, never trained on. Held-out documents measure the loss.")
        file = self._shards.index(record)
        (index,) = (index for index, one in enumerate(self.order.sources) if one.name in record.sources)
        (row,) = _read_rows(self._folder / record.name, [number]).values()
        start, end = Shard(self._folder / record.name).document_starts[number : number + 2].tolist()
        sightings, left_over = self._sightings(index, self._layouts[index].find(Piece(file, start, end - start)))
        document_id, name, path, position = row
        place = self.order.sources[index].name, path, position, record.name
        return TracedDocument(document_id, name, *place, end - start, left_over, sightings)

    def _sightings(self, index: int, parts: Sequence[tuple[int, int, int]]) -> tuple[list[Sighting], int]:
        """When parts (sample of the source, first token of the document, tokens) are seen; and how many tokens never are."""
        source = self.order.sources[index]
        num_epochs = -(-self.order.mixture.cursors(self.end)[source.name] // max(1, source.num_samples))
        sightings: list[Sighting] = []
        for epoch in range(num_epochs):
            for place, first, num_tokens in parts:
                number = self.order.find(source.name, place, epoch) if place < source.num_samples else None
                if number is not None and number < self.end:
                    step, row = self._place(number)
                    behind = step is not None and self.progress is not None and step <= self.progress.state.step
                    state = "skipped" if step is None else "seen" if behind else "to come"
                    sightings.append(Sighting(number, step, row, epoch, first, num_tokens, state))
        left_over = sum(num_tokens for place, _, num_tokens in parts if place >= source.num_samples)
        return sorted(sightings, key=lambda one: one.sample), left_over

    def _find(self, wanted: str, source: str | None) -> tuple[Split, ShardRecord, int]:
        """Split, shard, and number in it of a document."""
        shards: list[tuple[Split, ShardRecord]] = [(split, record) for split in SPLITS for record in self._manifest.shards(split)]
        shards = [(split, record) for split, record in shards if source is None or source in record.sources]
        named: list[tuple[Split, ShardRecord, int, str]] = []
        near: list[str] = []
        with ThreadPoolExecutor(READERS) as pool:
            hits = pool.map(lambda shard: _search(self._folder / shard[1].name, wanted), shards)
            for (split, record), found in zip(shards, hits, strict=True):
                if found.number is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                    return split, record, found.number
                named.extend((split, record, number, document_id) for number, document_id in found.named)
                near += found.near[: NEAR_CANDIDATES - len(near)]
        if len(named) == 1:
            return named[0][:3]
        if named:
            listed = "".join(f"\n  {document_id}" for *_, document_id in named[:SHOWN_NAMESAKES])
            raise UserError(f"{self._folder}: {len(named)} documents have the name {wanted!r}; give the id of one:{listed}")
        among = f"{self._folder}: no document{f' of {source}' if source else ''} has the id or the name {wanted!r}"
        if nearest := get_close_matches(wanted, near, 3, 0.3):
            raise UserError(f"{among}; the nearest: {', '.join(nearest)}.")
        raise UserError(f"{among}. Names are what the field of data.sources id_field holds; `pretrain data sample` shows both.")

    # --- refusals -------------------------------------------------------------------------------------------

    def _refuse_unknown_source(self, source: str | None) -> None:
        names = [one.name for one in self.order.sources]
        if source is not None and source not in names:
            near = get_close_matches(source, names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"{self._folder} has no source {source!r} to learn from; {hint}it has: {', '.join(names)}.")

    def _refuse_other_data(self, tokenizer_sha256: str) -> None:
        if self.progress is None:
            return
        state, known = self.progress.state, self.progress.identity
        found = self.order.identity(state.samples_seen) | {"tokenizer": tokenizer_sha256}
        if changed := sorted(key for key in known | found if known.get(key) != found.get(key)):
            raise UserError(
                f"{self.run.path} has learnt from other samples than {self.run.config_file.name} and {self._folder} now give: "
                f"{', '.join(changed)} differ from what its commit of step {state.step} holds, so a trace would name other documents. "
                "Put them back as they were."
            )


class _Chopped:
    """A source laid end to end and cut every T tokens."""

    def __init__(self, shards: Sequence[ShardRecord], first_file: int, length: int) -> None:
        self._first, self._length = first_file, length
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in shards)])

    def pieces(self, sample: int) -> list[Piece]:
        """The tokens of a sample, shard by shard."""
        first, end = sample * self._length, (sample + 1) * self._length
        files = range(int(np.searchsorted(self._starts, first, "right")) - 1, int(np.searchsorted(self._starts, end)))
        bounds = [(file, max(first, int(self._starts[file])), min(end, int(self._starts[file + 1]))) for file in files]
        return [Piece(self._first + file, start - int(self._starts[file]), stop - start) for file, start, stop in bounds]

    def find(self, document: Piece) -> list[tuple[int, int, int]]:
        """The samples that a document lies in, each with the first of its tokens there and how many."""
        start = int(self._starts[document.file - self._first]) + document.first_token
        end, length = start + document.num_tokens, self._length
        samples = range(start // length, -(-end // length))
        bounds = [(sample, max(start, sample * length), min(end, (sample + 1) * length)) for sample in samples]
        return [(sample, first - start, last - first) for sample, first, last in bounds]


class _BestFit:
    """A source whose shards were packed when they were built."""

    def __init__(self, packed: PackedSource, folder: Path, shards: Sequence[ShardRecord], first_file: int, length: int) -> None:
        self.pieces, self._first = packed.pieces, first_file
        self._paths = [Path(packs_name(folder / shard.name, length)) for shard in shards]
        self._starts = np.cumsum([0, *(shard.packings[str(length)].num_packs for shard in shards)])

    def find(self, document: Piece) -> list[tuple[int, int, int]]:
        """As `_Chopped.find`; no piece holds tokens of two documents."""
        packs = read_packs(self._paths[document.file - self._first])
        inside = (packs.first_token >= document.first_token) & (packs.first_token < document.first_token + document.num_tokens)
        pieces = np.flatnonzero(inside)
        samples = int(self._starts[document.file - self._first]) + np.searchsorted(packs.pack_starts, pieces, "right") - 1
        columns = samples, packs.first_token[pieces] - document.first_token, packs.num_tokens[pieces]
        return sorted(zip(*(column.tolist() for column in columns), strict=True), key=lambda part: part[1])


class _Target(NamedTuple):
    """A piece of a sample."""

    sample: Sample
    at: int
    """Tokens of the sample before it."""
    piece: Piece


class _Search(NamedTuple):
    """What a shard has that could be meant by an id or a name: documents by their numbers in it."""

    number: int | None
    """The one of that id."""
    named: list[tuple[int, str]]
    """Those of that name, with their ids."""
    near: list[str]
    """Ids and names that begin alike."""


def _search(prefix: Path, wanted: str) -> _Search:
    from pyarrow import compute

    found = _Search(None, [], [])
    like = compute.MatchSubstringOptions(wanted[: max(6, len(wanted) // 2)])
    before = 0
    for ids, names in read_columns(prefix, ["document_id", "name"]):
        if (place := compute.index(ids, wanted).as_py()) >= 0:
            return found._replace(number=before + place)
        while (place := compute.index(names, wanted, place + 1).as_py()) >= 0:
            found.named.append((before + place, ids[place].as_py()))
        for column in (ids, names) if len(found.near) < NEAR_CANDIDATES else ():
            found.near.extend(column.filter(compute.call_function("starts_with", [column], like)).to_pylist())
        before += len(ids)
    return found


def _read_rows(prefix: Path, numbers: Sequence[int]) -> dict[int, tuple[str, str | None, str, int]]:
    """Id, name, file and position of documents of a shard, by their numbers, which ascend."""
    rows: dict[int, tuple[str, str | None, str, int]] = {}
    before = 0
    for columns in read_columns(prefix, ["document_id", "name", "file", "position"]):
        here = [number for number in numbers if before <= number < before + len(columns[0])]
        values = zip(*(column.take([number - before for number in here]).to_pylist() for column in columns), strict=True)
        rows |= dict(zip(here, values, strict=True))
        before += len(columns[0])
    return rows


# --- as text ------------------------------------------------------------------------------------------------


def describe_run(trace: Trace) -> dict[str, Any]:
    """What every answer begins with."""
    return {
        "run": str(trace.run.path),
        "total_steps": trace.training.total_steps,
        "global_batch_samples": trace.training.global_batch_samples,
        "batch_ramp": [section.model_dump() for section in trace.training.batch_ramp],
        "samples_seen": trace.samples_seen,
    }


def tell_samples(trace: Trace, samples: Sequence[Sample], page: Page) -> None:
    """Samples, each with its documents and how they begin."""
    _tell_run(trace, page)
    for sample in samples:
        place = "skipped on purpose, no step learns from it" if sample.step is None else f"step {sample.step}, row {sample.row}"
        short = sample.sequence_length
        cut = f", sequences of {short}" if short < trace.training.sequence_length else ""
        page.say(f"\nsample {sample.sample}  {place}, epoch {sample.epoch}, source {sample.source}{cut}")
        for part in sample.documents:
            name = "" if part.name is None else f", name {part.name}"
            behind = f", after its first {part.first_token:,}" if part.first_token else ""
            tokens = f"{part.num_tokens:,} of {part.document_tokens:,} tokens{behind}{' (cut)' if part.is_cut else ''}"
            page.say(make_visible(f"  {part.document_id}  {tokens}; file {part.file}, position {part.position}{name}"))
            if part.text:
                page.say(f"      {make_visible(part.text)}")


def tell_traced_document(trace: Trace, document: TracedDocument, page: Page) -> None:
    """A document and a table of its sightings."""
    _tell_run(trace, page)
    page.say(f"document  {document.document_id}, {document.num_tokens:,} tokens in {document.shard}")
    page.say(make_visible(f"source    {document.source}, file {document.file}, position {document.position}"))
    if document.name is not None:
        page.say(make_visible(f"name      {document.name}"))
    if document.left_over_tokens:
        page.say(f"never     {document.left_over_tokens:,} tokens, at the source's end: too few for one more sample")
    if not document.sightings:
        page.say("The run ends before it comes to this document.")
        return
    page.say("")
    page.table(("epoch", "step", "row", "sample", "tokens of the document", "state"), [_sighting_row(one) for one in document.sightings])


def _sighting_row(one: Sighting) -> list[str]:
    numbers = ("-" if value is None else f"{value:,}" for value in (one.epoch, one.step, one.row, one.sample))
    return [*numbers, f"{one.first_token:,} to {one.first_token + one.num_tokens - 1:,}", one.state]


def _tell_run(trace: Trace, page: Page) -> None:
    training, progress = trace.training, trace.progress
    newest = "no commit yet" if progress is None else f"its newest commit is of step {progress.state.step:,}"
    page.say(f"{trace.run.path}: {training.total_steps:,} steps of {training.steps.spell_sizes()} samples; {newest}")
