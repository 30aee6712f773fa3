"""Which documents are there already: exact copies and near duplicates, over a whole corpus, file by file.

In: for every work unit, in the sources' order, a survey of its documents (`signature_files.py`). Out: for every unit the
documents to drop and why, and counts. A document's number is its place in that order, from 0; of those that are alike the
lowest number stays. Nothing else matters: not how the documents are cut into units, nor how many tasks or machines there
were, nor in which order they finished.

The stage goes over the surveys in steps, whose tasks run anywhere that sees the files and leave their results in files:

1. Many small surveys are merged into a few large ones, of DOCUMENTS_PER_TASK documents at most: otherwise every task would
   open every unit's files.
2. Exact: each task reads one part of the hashes' range out of all surveys, and sorts it.
3. Near: each task does so for one part of one band. Documents whose hash agrees are a bucket, and candidates; two of them
   are near duplicates when the share of equal numbers in their whole signatures is at least `similarity`.
   A bucket of at most ALL_PAIRS documents is compared in all pairs. In a larger one the lowest document is a centre, and
   every document joins the first centre it is alike, or becomes the next centre, up to MOST_CENTRES of them; who is alike
   none of these joins nobody in this band. So a document is compared at most MOST_CENTRES times in a bucket of any size,
   and a bucket of 100,000 costs 6.4 million comparisons at most, instead of 5 billion.
4. The pairs found make clusters, on the driver (`union_find.py`).

Memory, a task: some 100 bytes for each of its DOCUMENTS_PER_TASK entries (or of the largest bucket, where that is larger:
a bucket is never divided), and twice BLOCK_BYTES of signatures. The driver: 4 bytes a document (8 from 2^32 documents on) and a bit, some
21 a dropped document, and one task's pairs: of 10^9 documents 4.1 GB, and 6.3 GB more if 3 of 10 are dropped.
"""

import io
import math
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from configs.data_section import DeduplicationSection, NearDuplicatesSection
from configs.durable import commit_folder, remove_folders, write_file
from data_pipeline.minhash import Signatures
from data_pipeline.signature_files import (
    BANDS,
    EXACT,
    SIGNATURES,
    Array,
    Numbers,
    first_numbers,
    merge_surveys,
    open_array,
    read_signatures,
    rows_at_once,
    slice_of,
)
from data_pipeline.union_find import find_roots, shorten, unite

Task = TypeVar("Task")
Result = TypeVar("Result")

EXACT_DUPLICATE = 1
NEAR_DUPLICATE = 2
REASONS = {EXACT_DUPLICATE: "exact_duplicate", NEAR_DUPLICATE: "near_duplicate"}
"""The codes of `UnitDuplicates.reasons`, and their names in counts."""

# These decide how the work is cut, and so its memory, never what comes out.
DOCUMENTS_PER_TASK = 4_000_000
MOST_SURVEYS = 64
SURVEYS_PER_MERGE = 4096

# These decide what is found.
ALL_PAIRS = 64
MOST_CENTRES = 64

LOSERS = "exact_losers.npy"
ORDINALS, REASON_CODES, SURVIVORS, UNIT_BOUNDS = "ordinals.npy", "reasons.npy", "survivors.npy", "units.npy"


class RunTasks(Protocol):
    """Runs a function of a module over tasks, anywhere and in any order, and gives each task with its result."""

    def __call__(self, function: Callable[[Task], Result], tasks: Sequence[Task], /) -> Iterable[tuple[Task, Result]]: ...


Report = Callable[[str, int, int], None]
"""Gets the step in words, and how many of its tasks are done, of how many."""


class Losers(NamedTuple):
    """What one part of the hashes' range has of exact duplicates."""

    documents: Numbers
    """The numbers of all but the first of equal documents, sorted: int64 [losers]."""
    num_clusters: int
    biggest_cluster: int
    """Documents of it, the one that stays included; 0 where there is none."""


class Edges(NamedTuple):
    """What one part of one band has of near duplicates."""

    pairs: Numbers
    """Document numbers, int64 [pairs, 2]: of each cluster within a bucket, its lowest with each of the others."""
    num_compared: int
    num_refused: int
    """Pairs whose band agrees and whose signatures differ too much."""


@dataclass(frozen=True)
class UnitDuplicates:
    """What is dropped of one work unit."""

    ordinals: Array
    """Places among the documents that were surveyed, sorted: uint32 [dropped]."""
    reasons: Array
    """A key of REASONS for each: uint8 [dropped]."""
    survivors: Array
    """The number of the document that stayed in place of each near duplicate: uint32 or int64 [dropped]. Of an exact one its
    own: the tasks tell only that it goes."""


@dataclass(frozen=True)
class DuplicateCounts:
    """The whole stage in numbers."""

    num_documents: int
    num_exact_duplicates: int
    num_exact_clusters: int
    biggest_exact_cluster: int
    """Documents of it, the one that stays included; 0 where there is none. So below."""
    num_near_duplicates: int
    num_near_clusters: int
    biggest_near_cluster: int
    num_compared: int
    """Pairs of documents whose signatures were compared; a pair counts once for every band that it shares."""
    num_refused: int
    """Those that differed too much."""


@dataclass(frozen=True)
class Duplicates:
    """What `find_duplicates` found; the arrays are views of files, and cost memory only when they are read."""

    units: list[UnitDuplicates]
    counts: DuplicateCounts


@dataclass(frozen=True)
class MergeTask:
    """Surveys that become one."""

    folders: tuple[Path, ...]
    target: Path

    def __str__(self) -> str:
        return f"merging {len(self.folders)} surveys into {self.target.name}"


@dataclass(frozen=True)
class ExactTask:
    """One part of the hashes' range."""

    folders: tuple[Path, ...]
    partition: int
    num_partitions: int
    target: Path

    def __str__(self) -> str:
        return f"exact duplicates, part {self.partition + 1} of {self.num_partitions}"


@dataclass(frozen=True)
class NearTask:
    """One part of one band."""

    folders: tuple[Path, ...]
    band: int
    partition: int
    num_partitions: int
    losers: Path | None
    settings: NearDuplicatesSection
    target: Path

    def __str__(self) -> str:
        return f"near duplicates, band {self.band + 1}, part {self.partition + 1} of {self.num_partitions}"


def exact_partition(folders: Sequence[Path], partition: int, num_partitions: int) -> Losers:
    """The exact duplicates among the documents whose hash is in one of `num_partitions` equal parts of the hashes' range.

    Raises OSError.
    """
    parts: list[Array] = []
    for folder, first in zip(folders, first_numbers(folders)[:-1], strict=True):
        survey = open_array(folder / EXACT)
        part = np.array(survey[:, slice_of(survey[0], partition, num_partitions)])
        part[2] += np.uint64(first)
        parts.append(part)
    high, low, documents = np.concatenate([np.zeros((3, 0), dtype=np.uint64), *parts], axis=1)
    del parts
    # The sort keeps the order of equals, and the numbers rise from survey to survey and within each.
    order = np.lexsort((low, high))
    high, low, documents = high[order], low[order], documents[order].astype(np.int64)
    starts = np.flatnonzero(_differs(high) | _differs(low))
    sizes = np.diff(starts, append=len(high))
    loses = np.ones(len(high), dtype=np.bool_)
    loses[starts] = False
    biggest = int(sizes.max(initial=0))
    return Losers(np.sort(documents[loses]), int(np.count_nonzero(sizes > 1)), biggest if biggest > 1 else 0)


def near_partition(
    folders: Sequence[Path],
    band: int,
    partition: int,
    num_partitions: int,
    losers: Array | None,
    settings: NearDuplicatesSection,
) -> Edges:
    """The near duplicates among the documents whose hash of `band` is in one of `num_partitions` parts of the range.

    `losers` is a bit for each document (uint8, as `mark_documents` makes it) that is left out, as it is dropped already.
    Raises OSError.
    """
    firsts = first_numbers(folders)
    parts: list[Array] = []
    for folder, first in zip(folders, firsts[:-1], strict=True):
        survey = open_array(folder / BANDS)[band]
        part = np.array(survey[:, slice_of(survey[0], partition, num_partitions)])
        part[1] += np.uint64(first)
        parts.append(part)
    hashes, documents = np.concatenate([np.zeros((2, 0), dtype=np.uint64), *parts], axis=1)
    del parts
    documents = documents.astype(np.int64)
    if losers is not None:
        stays = ~are_marked(losers, documents)
        hashes, documents = hashes[stays], documents[stays]
    order = np.argsort(hashes, kind="stable")
    hashes, documents = hashes[order], documents[order]
    starts = np.flatnonzero(_differs(hashes))
    sizes = np.diff(starts, append=len(hashes))
    del hashes, order

    surveys = [open_array(folder / SIGNATURES) for folder in folders]
    read = partial(read_signatures, surveys, firsts)
    needed = needed_matches(settings)
    found: list[Numbers] = [np.zeros((0, 2), dtype=np.int64)]
    num_compared = num_alike = 0
    for size in np.unique(sizes[(sizes > 1) & (sizes <= ALL_PAIRS)]):
        buckets = starts[sizes == size]
        num_buckets = max(1, _rows_of_a_block(settings.num_permutations) // int(size))
        for first in range(0, len(buckets), num_buckets):
            members = documents[buckets[first : first + num_buckets, None] + np.arange(size)]
            pairs = _compare_all(members, read, needed)
            num_compared += len(members) * math.comb(int(size), 2)
            num_alike += len(pairs)
            found.append(shorten(pairs))
    for bucket in np.flatnonzero(sizes > ALL_PAIRS):
        pairs, compared = _compare_with_centres(documents[starts[bucket] : starts[bucket] + sizes[bucket]], read, settings)
        num_compared += compared
        num_alike += len(pairs)
        found.append(pairs)
    return Edges(np.concatenate(found), num_compared, num_compared - num_alike)


def needed_matches(settings: NearDuplicatesSection) -> int:
    """How many numbers of two signatures must agree: the least whose share is `similarity` or more."""
    return math.ceil(settings.similarity * settings.num_permutations - 1e-9)  # 0.07 * 100 is a little more than 7


def count_matches(first: Array, second: Array) -> Array:
    """How many numbers of two signatures agree: int64 [..] from uint32 [.., permutations] each (or what broadcasts to it)."""
    return np.bitwise_count(np.packbits(first == second, axis=-1)).sum(axis=-1, dtype=np.int64)


def mark_documents(bits: Array, documents: Numbers) -> None:
    """Set the documents' bits in uint8 [documents / 8, rounded up], in place."""
    np.bitwise_or.at(bits, documents >> 3, (1 << (documents & 7)).astype(np.uint8))


def are_marked(bits: Array, documents: Numbers) -> Array:
    """Which documents' bits are set: bool, shaped like `documents`."""
    return (bits[documents >> 3] >> (documents & 7).astype(np.uint8) & 1).astype(np.bool_)


def find_duplicates(folders: Sequence[Path], settings: DeduplicationSection, work: Path, run: RunTasks, report: Report) -> Duplicates:
    """The whole stage: surveys of the units, in the sources' order, to the documents that are dropped of each.

    `work` is a folder for this stage alone, which every task sees: what is in it is deleted, and the result is left there
    for `load_duplicates`. `run` runs one of this module's functions over tasks, as often and wherever it likes. Raises
    OSError, and what `run` raises.
    """
    remove_folders([work])
    work.mkdir(parents=True)
    firsts = first_numbers(folders)
    num_documents = int(firsts[-1])
    num_partitions = max(1, math.ceil(num_documents / DOCUMENTS_PER_TASK))
    surveys = _merge_all(tuple(folders), firsts, work, run, report)

    exact_clusters = biggest_exact = 0
    losers = np.zeros(-(-num_documents // 8), dtype=np.uint8)
    if settings.exact:
        tasks = [ExactTask(surveys, part, num_partitions, work / f"exact-{part:05d}.npy") for part in range(num_partitions)]
        for done, (task, (num_clusters, biggest)) in enumerate(run(run_exact, tasks)):
            mark_documents(losers, np.load(task.target))
            task.target.unlink()
            exact_clusters += num_clusters
            biggest_exact = max(biggest_exact, biggest)
            report("exact duplicates", done + 1, len(tasks))
        _save(work / LOSERS, losers)

    num_compared = num_refused = 0
    parents = np.arange(num_documents if settings.near else 0, dtype=np.uint32 if num_documents < 1 << 32 else np.int64)
    if settings.near:
        left_out = work / LOSERS if settings.exact else None
        tasks = [
            NearTask(surveys, band, part, num_partitions, left_out, settings.near, work / f"near-{band:03d}-{part:05d}.npy")
            for band in range(settings.near.num_bands)
            for part in range(num_partitions)
        ]
        for done, (task, (compared, refused)) in enumerate(run(run_near, tasks)):
            unite(parents, np.load(task.target).astype(parents.dtype))
            task.target.unlink()
            num_compared += compared
            num_refused += refused
            report("near duplicates", done + 1, len(tasks))

    num_dropped, near_roots = _write_duplicates(work, firsts, losers, parents)
    near_sizes = np.unique(near_roots, return_counts=True)[1]
    counts = DuplicateCounts(
        num_documents=num_documents,
        num_exact_duplicates=num_dropped - len(near_roots),
        num_exact_clusters=exact_clusters,
        biggest_exact_cluster=biggest_exact,
        num_near_duplicates=len(near_roots),
        num_near_clusters=len(near_sizes),
        biggest_near_cluster=int(near_sizes.max()) + 1 if len(near_sizes) else 0,
        num_compared=num_compared,
        num_refused=num_refused,
    )
    ordinals, reasons, survivors = (open_array(work / name) for name in (ORDINALS, REASON_CODES, SURVIVORS))
    bounds = pairwise(np.load(work / UNIT_BOUNDS))
    units = [UnitDuplicates(ordinals[first:end], reasons[first:end], survivors[first:end]) for first, end in bounds]
    if surveys != tuple(folders):
        remove_folders(list(surveys))
    return Duplicates(units, counts)


def load_duplicates(work: Path, unit: int) -> UnitDuplicates:
    """What is dropped of the unit at this place of `find_duplicates`' folders, as it left it in `work`. Raises OSError."""
    first, end = (int(bound) for bound in open_array(work / UNIT_BOUNDS)[unit : unit + 2])
    return UnitDuplicates(*(np.array(open_array(work / name)[first:end]) for name in (ORDINALS, REASON_CODES, SURVIVORS)))


def run_merge(task: MergeTask) -> None:
    """Merge a task's surveys into its target, a folder that is there whole or not at all. Raises OSError."""
    temporary = task.target.with_name(f".{task.target.name}.{secrets.token_hex(6)}.tmp")
    temporary.mkdir()
    try:
        merge_surveys(task.folders, temporary)
        if not task.target.exists():
            commit_folder(temporary, task.target)
    except OSError:
        if not task.target.exists():  # else another attempt at the same task was quicker, with the same bytes
            raise
    finally:
        remove_folders([temporary])


def run_exact(task: ExactTask) -> tuple[int, int]:
    """Write a task's exact duplicates (int64 [losers]) to its target; gives the number of clusters and the biggest's size."""
    losers = exact_partition(task.folders, task.partition, task.num_partitions)
    _save(task.target, losers.documents)
    return losers.num_clusters, losers.biggest_cluster


def run_near(task: NearTask) -> tuple[int, int]:
    """Write a task's pairs (int64 [pairs, 2]) to its target; gives how many pairs were compared, and how many refused."""
    losers = open_array(task.losers) if task.losers else None
    edges = near_partition(task.folders, task.band, task.partition, task.num_partitions, losers, task.settings)
    _save(task.target, edges.pairs)
    return edges.num_compared, edges.num_refused


def _merge_all(folders: tuple[Path, ...], firsts: Numbers, work: Path, run: RunTasks, report: Report) -> tuple[Path, ...]:
    """The surveys, merged where there are many of them: runs of at most DOCUMENTS_PER_TASK documents (or of one survey)."""
    if len(folders) <= MOST_SURVEYS:
        return folders
    runs: list[list[Path]] = []
    documents = 0
    for folder, count in zip(folders, np.diff(firsts).tolist(), strict=True):
        if not runs or documents + count > DOCUMENTS_PER_TASK or len(runs[-1]) == SURVEYS_PER_MERGE:
            runs.append([])
            documents = 0
        runs[-1].append(folder)
        documents += count
    tasks = [MergeTask(tuple(part), work / f"survey-{index:05d}") for index, part in enumerate(runs)]
    for done, _ in enumerate(run(run_merge, tasks)):
        report("merging surveys", done + 1, len(tasks))
    return tuple(task.target for task in tasks)


def _write_duplicates(work: Path, firsts: Numbers, losers: Array, parents: Array) -> tuple[int, Array]:
    """Write what `load_duplicates` reads; gives how many documents are dropped, and the survivor of each near duplicate."""
    ordinals: list[Array] = [np.zeros(0, dtype=np.uint32)]
    reasons: list[Array] = [np.zeros(0, dtype=np.uint8)]
    survivors: list[Array] = [np.zeros(0, dtype=parents.dtype)]
    dropped_of_units = np.zeros(len(firsts) - 1, dtype=np.int64)
    for first in range(0, int(firsts[-1]), DOCUMENTS_PER_TASK):
        documents = np.arange(first, min(first + DOCUMENTS_PER_TASK, int(firsts[-1])))
        codes = are_marked(losers, documents).astype(np.uint8) * np.uint8(EXACT_DUPLICATE)
        # Lower ones are done already, so this takes one step.
        stays = find_roots(parents, documents) if len(parents) else documents.astype(parents.dtype)
        codes[stays != documents] = NEAR_DUPLICATE
        dropped = documents[codes > 0]
        units = np.searchsorted(firsts, dropped, side="right") - 1
        dropped_of_units += np.bincount(units, minlength=len(dropped_of_units))
        ordinals.append((dropped - firsts[units]).astype(np.uint32))
        reasons.append(codes[codes > 0])
        survivors.append(stays[codes > 0])
    bounds = np.concatenate([[0], np.cumsum(dropped_of_units)]).astype(np.int64)
    _save(work / ORDINALS, np.concatenate(ordinals))
    all_reasons, all_survivors = np.concatenate(reasons), np.concatenate(survivors)
    _save(work / REASON_CODES, all_reasons)
    _save(work / SURVIVORS, all_survivors)
    _save(work / UNIT_BOUNDS, bounds)
    return int(bounds[-1]), all_survivors[all_reasons == NEAR_DUPLICATE]


def _compare_all(members: Numbers, read: Callable[[Numbers], Signatures], needed: int) -> Numbers:
    """The alike pairs within each bucket of one size: int64 [pairs, 2] from documents [buckets, size]."""
    size = members.shape[1]
    rows = read(members.ravel()).reshape(*members.shape, -1)
    pairs: list[Numbers] = []
    for place in range(size - 1):
        bucket, behind = np.nonzero(count_matches(rows[:, place, None], rows[:, place + 1 :]) >= needed)
        pairs.append(np.stack([members[bucket, place], members[bucket, place + 1 + behind]], axis=1))
    return np.concatenate(pairs)


def _compare_with_centres(members: Numbers, read: Callable[[Numbers], Signatures], settings: NearDuplicatesSection) -> tuple[Numbers, int]:
    """One large bucket's documents [size], each with the first centre it is alike, and how many pairs were compared."""
    needed = needed_matches(settings)
    centres: list[tuple[int, Array]] = []
    pairs: list[Numbers] = [np.zeros((0, 2), dtype=np.int64)]
    num_compared = 0
    rows_of_a_block = _rows_of_a_block(settings.num_permutations)
    for first in range(0, len(members), rows_of_a_block):
        documents = members[first : first + rows_of_a_block]
        rows = read(documents)
        for index in range(MOST_CENTRES):
            if not len(documents):
                break
            if index == len(centres):
                centres.append((int(documents[0]), rows[0].copy()))
                documents, rows = documents[1:], rows[1:]
            centre, signature = centres[index]
            alike = count_matches(rows, signature) >= needed
            num_compared += len(documents)
            joined = documents[alike]
            pairs.append(np.stack([np.full(len(joined), centre), joined], axis=1))
            if len(joined):
                documents, rows = documents[~alike], rows[~alike]
    return np.concatenate(pairs), num_compared


def _differs(values: Array) -> Array:
    """Which values differ from the one before them (the first does)."""
    return np.concatenate([np.ones(min(1, len(values)), dtype=np.bool_), values[1:] != values[:-1]])


def _rows_of_a_block(num_permutations: int) -> int:
    return max(ALL_PAIRS, rows_at_once(num_permutations))


def _save(path: Path, array: Array) -> None:
    """Write an array so that it is there whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_file(path, buffer.getvalue())
