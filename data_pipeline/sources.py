"""Sources to work units: which files are read, in which order, and who reads which together.

In: the run file's sources. Out: a `Plan` of `WorkUnit`s that depends on nothing but the listing (names, sizes, and where
large files may be cut), and from a unit its documents. What cannot be used is refused before anything heavy starts.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from configs.data_section import DataSection
from configs.errors import UserError
from data_pipeline.documents import Document, Rejected, TokenDocument
from data_pipeline.fetch import REQUESTS, can_read_ranges, local_copy, open_file
from data_pipeline.find import check_first_row, find_files, refuse_twice
from data_pipeline.formats import hash_input, read_file
from data_pipeline.hub import open_hub, read_hub
from data_pipeline.input_file import InputFile
from data_pipeline.json_lines import split_jsonl
from data_pipeline.shards import Shard
from data_pipeline.tables import split_arrow, split_parquet
from data_pipeline.web import read_warc


@dataclass(frozen=True)
class WorkUnit:
    """Files, or parts of files, of one source that are read together and become the shards of one folder."""

    index: int
    files: tuple[InputFile, ...]

    def __str__(self) -> str:
        names = [file.location for file in self.files]
        return f"work unit {self.index}: {names[0]}" + (f" and {len(names) - 1} more, to {names[-1]}" if len(names) > 1 else "")


@dataclass(frozen=True)
class Plan:
    """What a build will read."""

    files: tuple[InputFile, ...]
    """Every input file once, whole, in order."""
    units: tuple[WorkUnit, ...]
    skipped: dict[str, int]
    """Files that are not read, counted by suffix ('symlink' for links, which are never followed)."""


def plan_units(data: DataSection) -> Plan:
    """Find the files of every source and gather them into units of about `work_unit_bytes`.

    Raises UserError: no source, a path that is missing, cannot be reached or holds nothing usable, a file that two sources
    list, a field that the first row of a source does not have, settings that look like a secret.
    """
    if not data.sources:
        raise UserError("data.sources is empty; give at least one, for example `sources: [{name: mine, path: texts/}]`.")
    dataset = Path(data.folder()).resolve()
    files: list[InputFile] = []
    skipped: Counter[str] = Counter()
    for source in data.sources:
        found = find_files(source, dataset, skipped)
        check_first_row(source, found, data.largest_document_bytes)
        files += found
    refuse_twice(files)
    if not any(file.num_bytes or file.kind == "hub" for file in files):
        raise UserError(f"all {len(files)} files of data.sources are empty; wanted text, for example a .txt or a .jsonl file.")
    parts = split_files(files, data.work_unit_bytes)
    return Plan(tuple(files), tuple(pack_units(parts, data.work_unit_bytes)), dict(sorted(skipped.items())))


def read_unit(
    unit: WorkUnit,
    largest_document_bytes: int,
    scratch: Path | None = None,
    on_input: Callable[[InputFile, str, int], None] | None = None,
) -> Generator[Document | TokenDocument | Rejected, None, None]:
    """Every document of a unit, in the order of its files; copies of remote files lie below `scratch` for as long as they are read.

    `on_input(file, sha256, num_bytes)` is called before a file's first document, with the hash of what `hash_input` says.
    Raises OSError when a file is gone, may not be read or cannot be fetched; UserError when one was changed since the plan
    was made, or is a damaged token shard.
    """
    for file in unit.files:
        if file.kind == "hub":
            yield from read_hub(file, largest_document_bytes)
            continue
        with local_copy(file, scratch) as path:
            if on_input is not None and (hashed := hash_input(file, path)) is not None:
                on_input(file, *hashed)
            if file.kind == "megatron":
                yield from read_tokens(file, path)
            elif file.kind == "warc":
                yield from read_warc(file, path, largest_document_bytes)
            else:
                yield from read_file(file, path, largest_document_bytes)


def read_tokens(file: InputFile, path: Path) -> Iterator[TokenDocument]:
    """Every document of a megatron pair. Raises UserError when it is damaged: a shard is no place for single rejections."""
    shard = Shard(path.with_name(path.name.removesuffix(".bin")))
    for number in range(shard.num_documents):
        yield TokenDocument(file.source, file.name, number, shard.document(number))


def pack_units(parts: Sequence[InputFile], work_unit_bytes: int) -> Iterator[WorkUnit]:
    """Gather consecutive parts of one source until the next would exceed `work_unit_bytes`; a larger one is a unit of its own.

    From half of `work_unit_bytes` on a unit also ends where a hash of the next part's name says so, with a chance that
    makes this happen about twice on the way. Such ends do not depend on what stands before, so that a file that is added,
    removed or grown changes the units around it and not all behind it.
    """
    index, gathered, size = 0, list[InputFile](), 0
    for part in parts:
        is_full = size + part.part_bytes > work_unit_bytes
        may_end = 2 * size >= work_unit_bytes and _ends_before(part, work_unit_bytes)
        if gathered and (is_full or may_end or part.source != gathered[0].source):
            yield WorkUnit(index, tuple(gathered))
            index, gathered, size = index + 1, [], 0
        gathered.append(part)
        size += part.part_bytes
    if gathered:
        yield WorkUnit(index, tuple(gathered))


def split_files(files: Sequence[InputFile], work_unit_bytes: int) -> list[InputFile]:
    """The parts of all files, in order. Raises UserError: the footer of a remote file cannot be read."""

    def split(file: InputFile) -> list[InputFile]:
        try:
            return _split(file, work_unit_bytes)
        except OSError as error:
            raise UserError(f"data source {file.source!r}: {file.location} cannot be read ({error}); mend that or leave it out.") from None

    if not any(file.is_remote for file in files):
        return [part for file in files for part in split(file)]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return [part for parts in pool.map(split, files) for part in parts]


def _ends_before(part: InputFile, work_unit_bytes: int) -> bool:
    # The chance grows with the part: parts of a thousandth of a unit would else end every unit right at its half, and two
    # sequences of units that are out of step would hardly meet again.
    digest = hashlib.sha256(f"{part.source}\0{part.name}\0{part.part}".encode()).digest()
    return int.from_bytes(digest[:8], "big") * work_unit_bytes < 4 * part.part_bytes * 2**64


def _split(file: InputFile, work_unit_bytes: int) -> list[InputFile]:
    if file.kind == "hub":
        return _split_hub(file, work_unit_bytes)
    if file.num_bytes <= work_unit_bytes:
        return [file]
    if file.kind == "arrow":
        return [file] if file.is_remote else split_arrow(file, file.path, work_unit_bytes)
    if file.kind not in ("jsonl", "parquet") or file.packed or not can_read_ranges(file):
        return [file]
    if file.kind == "jsonl":
        return split_jsonl(file, work_unit_bytes)
    with open_file(file) as stream:
        return split_parquet(file, stream, work_unit_bytes)


def _split_hub(file: InputFile, work_unit_bytes: int) -> list[InputFile]:
    dataset, *_ = open_hub(file.source, file.root, {key: json.loads(value) for key, value in file.settings})
    num_shards = int(dataset.n_shards)
    # Where its size is not known, each shard is a unit of its own: there may be much in it.
    size = file.num_bytes // num_shards or work_unit_bytes
    return [replace(file, part=(shard, num_shards), part_bytes=size) for shard in range(num_shards)]
