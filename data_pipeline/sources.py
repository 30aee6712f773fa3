"""Sources to work units: which files are read, in which order, and who reads which together.

In: the run file's sources. Out: a `Plan` of `WorkUnit`s that depends on nothing but the files' names and sizes, and
from a unit its documents. What cannot be used is refused here, before anything heavy starts.
"""

import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pyarrow

from configs.errors import UserError
from configs.schema import DataSection, SourceSection
from data_pipeline.documents import Document, Rejected
from data_pipeline.formats import InputFile, Kind, count_arrow_rows, first_fields, read_file

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
JSONL_SUFFIXES = tuple(suffix + packed for suffix in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst"))
SYMLINK = "symlink"  # beside suffixes in the count of what was skipped


@dataclass(frozen=True)
class WorkUnit:
    """Files that are read together and become one shard per split."""

    index: int
    files: tuple[InputFile, ...]


@dataclass(frozen=True)
class Plan:
    """What a build will read."""

    files: tuple[InputFile, ...]
    """Every input file once, in order."""
    units: tuple[WorkUnit, ...]
    skipped: dict[str, int]
    """Files that are not read, counted by suffix ('symlink' for links, which are never followed)."""


def plan_units(data: DataSection) -> Plan:
    """Find the files of every source and gather them into units of about `work_unit_bytes`.

    Raises UserError: no source, a path that is missing or holds nothing usable, a file that two sources list, a text
    field that the first row of a source does not have.
    """
    if not data.sources:
        raise UserError("data.sources is empty; give at least one, for example `sources: [{name: mine, path: texts/}]`.")
    dataset = Path(data.folder()).resolve()
    files: list[InputFile] = []
    skipped: Counter[str] = Counter()
    for source in data.sources:
        found = find_files(source, dataset, skipped)
        _check_first_row(source, found, data.largest_document_bytes)
        files += found
    _refuse_twice(files)
    if not any(file.num_bytes for file in files):
        raise UserError(f"all {len(files)} files of data.sources are empty; wanted text, for example a .txt or a .jsonl file.")
    portions = [portion for file in files for portion in _split_rows(file, data.work_unit_bytes)]
    return Plan(tuple(files), tuple(pack_units(portions, data.work_unit_bytes)), dict(sorted(skipped.items())))


def read_unit(unit: WorkUnit, largest_document_bytes: int) -> Iterator[Document | Rejected]:
    """Every document of a unit, in the order of its files. Raises OSError when a file is gone or may not be read."""
    for file in unit.files:
        yield from read_file(file, largest_document_bytes)


def pack_units(files: Sequence[InputFile], work_unit_bytes: int) -> Iterator[WorkUnit]:
    """Gather consecutive files until the next would exceed `work_unit_bytes`; a file above it (or a range of its rows) is
    a unit of its own."""
    index, gathered, size = 0, [], 0
    for file in files:
        if gathered and size + file.num_bytes > work_unit_bytes:
            yield WorkUnit(index, tuple(gathered))
            index, gathered, size = index + 1, [], 0
        gathered.append(file)
        size += file.num_bytes
    if gathered:
        yield WorkUnit(index, tuple(gathered))


def find_files(source: SourceSection, dataset: Path, skipped: Counter[str]) -> list[InputFile]:
    """The usable files of one source, sorted by name; what is passed over is counted in `skipped`.

    What lies below `dataset`, the folder that is being built, is no input. Raises UserError.
    """
    path = Path(source.path.replace("{stdlib}", sysconfig.get_path("stdlib"))).expanduser()
    if not path.exists():
        raise UserError(f"data source {source.name!r}: there is no {path}; correct its path (relative ones start at {Path.cwd()}).")
    if path.is_file():
        kind = _kind_of(source, path.name) or _kind_of_single(source)
        return [_describe(source, path.resolve().parent, path.resolve(), kind)]
    root = path.resolve()
    files: list[InputFile] = []
    passed: Counter[str] = Counter()
    listed = _listed_arrow_files(source, root) if source.format == "datasets" else []
    for candidate in sorted(_walk(source, root, dataset, passed), key=lambda one: os.fsencode(one.relative_to(root).as_posix())):
        kind = _kind_of(source, candidate.name)
        if kind is None or (kind == "arrow" and candidate not in listed):
            passed[_suffix(candidate.name)] += 1
        else:
            files.append(_describe(source, root, candidate, kind))
    skipped.update(passed)
    if not files:
        raise UserError(_nothing_usable(source, root, passed))
    return files


def _walk(source: SourceSection, root: Path, dataset: Path, passed: Counter[str]) -> Iterator[Path]:
    """Files below the root that match the pattern. Links are counted, not followed: they may leave the root or lead to a
    file that is found anyway."""
    installed = {"site-packages", "dist-packages"} if "{stdlib}" in source.path else set[str]()

    @lru_cache(maxsize=1024)
    def through_link(folder: Path) -> bool:
        return folder != root and (folder.is_symlink() or through_link(folder.parent))

    try:
        for path in root.glob(source.pattern):
            parts = path.relative_to(root).parts
            if any(part.startswith(".") for part in parts) or installed.intersection(parts) or path.is_relative_to(dataset):
                continue
            if path.is_symlink() or through_link(path.parent):
                passed[SYMLINK] += 1
            elif path.is_file():
                yield path
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"data source {source.name!r}: the pattern {source.pattern!r} cannot be used ({error}); try '**/*.txt'.") from None


def _kind_of(source: SourceSection, name: str) -> Kind | None:
    lower = name.lower()
    python: Kind | None = "python" if lower.endswith(".py") else None
    if source.format == "text":
        return python or "text"
    if source.format == "jsonl":
        return "jsonl" if lower.endswith((*JSONL_SUFFIXES, ".json", ".json.gz", ".json.zst")) else None
    if source.format == "parquet":
        return "parquet" if lower.endswith(".parquet") else None
    if source.format == "datasets":
        return "arrow" if lower.endswith(".arrow") else None
    if lower.endswith(JSONL_SUFFIXES):
        return "jsonl"
    if lower.endswith(".parquet"):
        return "parquet"
    return python or ("text" if lower.endswith(TEXT_SUFFIXES) else None)


def _kind_of_single(source: SourceSection) -> Kind:
    """A file that is named outright is taken at its format's word, whatever its suffix."""
    if source.format in ("jsonl", "parquet"):
        return source.format
    if source.format == "datasets":
        raise UserError(
            f"data source {source.name!r}: format datasets wants the folder that save_to_disk wrote, found the file {source.path}."
        )
    raise UserError(f"data source {source.name!r}: cannot tell what {source.path} holds; set its format to text, jsonl or parquet.")


def _describe(source: SourceSection, root: Path, path: Path, kind: Kind) -> InputFile:
    status = path.stat()
    name = path.relative_to(root).as_posix()
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"data source {source.name!r}: the file name {os.fsencode(name)!r} is not UTF-8; rename it.") from None
    return InputFile(source.name, str(root), name, kind, status.st_size, status.st_mtime_ns, source.text_field)


def _suffix(name: str) -> str:
    path = Path(name.lower())
    return "".join(path.suffixes[-2:]) if path.suffix in (".gz", ".zst") else path.suffix or "(none)"


def _nothing_usable(source: SourceSection, root: Path, passed: Counter[str]) -> str:
    wanted = {
        "jsonl": ".jsonl (.gz, .zst)",
        "parquet": ".parquet",
        "datasets": "the .arrow files of a save_to_disk folder",
        "text": "files",
    }.get(source.format, ".txt, .md, .rst, .py, .jsonl (.gz, .zst) or .parquet")
    if not passed:
        return f"data source {source.name!r}: {root} has no file that matches {source.pattern!r}; wanted {wanted}."
    found = ", ".join(f"{count} {suffix}" for suffix, count in passed.most_common(5))
    hint = ""
    if passed[SYMLINK]:
        hint = " (links are not followed; name the folder they lead to)"
    elif passed[".arrow"]:
        hint = " (for a Hugging Face save_to_disk folder set format: datasets)"
    return f"data source {source.name!r}: {root} has no usable file: found {found}, wanted {wanted}; correct the path or the format{hint}."


def _check_first_row(source: SourceSection, files: list[InputFile], largest_bytes: int) -> None:
    for file in files:
        fields = first_fields(file, largest_bytes)
        if fields is None:
            continue
        if source.text_field not in fields:
            raise UserError(
                f"data source {source.name!r}: the first row of {file.path} has no field {source.text_field!r}; "
                f"set text_field to one of: {', '.join(map(str, fields)) or '(it has none)'}."
            )
        return


def _refuse_twice(files: list[InputFile]) -> None:
    seen: dict[Path, str] = {}
    for file in files:
        if file.path in seen:  # roots are resolved and links not followed, so equal files have equal paths
            raise UserError(
                f"{file.path} is listed twice, by the data sources {seen[file.path]!r} and {file.source!r}; "
                "take it out of one (narrow its path or pattern)."
            )
        seen[file.path] = file.source


def _split_rows(file: InputFile, work_unit_bytes: int) -> list[InputFile]:
    """An arrow file in ranges of rows of about `work_unit_bytes`: its rows can be reached without reading those before."""
    if file.kind != "arrow" or file.num_bytes <= work_unit_bytes:
        return [file]
    try:
        num_rows = count_arrow_rows(file.path)
    except (pyarrow.ArrowException, OSError, EOFError):
        return [file]  # the reader will reject it, with its reason
    step = max(1, num_rows * work_unit_bytes // file.num_bytes)
    return [replace(file, rows=(start, min(start + step, num_rows))) for start in range(0, num_rows, step)]


def _listed_arrow_files(source: SourceSection, root: Path) -> list[Path]:
    """The files that make up the datasets below a folder; others may be caches of `map`, which hold rows a second time."""
    files: list[Path] = []
    for state in root.rglob("state.json"):
        try:
            files += [state.parent / entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"data source {source.name!r}: {state} is not the state.json of a Hugging Face save_to_disk folder.") from None
    for file in files:
        if not file.is_file() or not file.resolve().is_relative_to(root):
            raise UserError(f"data source {source.name!r}: {file} is listed in its state.json, but is not a file below {root}.")
    return files
