"""A source's files: which there are, what each is read as, and whether they have the fields that are asked for.

In: a source of the run file. Out: one `InputFile` for each usable file, sorted by name (for hub, one for the data set), and
counts of what was passed over. What cannot be used is refused here, before anything heavy starts.
"""

import inspect
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from configs.data_section import SourceSection
from configs.errors import UserError
from configs.functions import load_function
from data_pipeline.fetch import MAGIC, VERSION_SEPARATOR, check_secrets, describe_local, is_url, list_files, local_copy, open_file
from data_pipeline.formats import call_function, first_fields
from data_pipeline.hub import open_hub
from data_pipeline.input_file import InputFile, index_path
from data_pipeline.manifest import PLAN, UNITS
from data_pipeline.web import first_record_fields

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
JSONL_SUFFIXES = tuple(suffix + packed for suffix in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst"))
JSON_SUFFIXES = tuple(".json" + packed for packed in ("", ".gz", ".zst"))
WARC_SUFFIXES = tuple(suffix + packed for suffix in (".warc", ".wet") for packed in ("", ".gz", ".zst"))
SYMLINK = "symlink"  # beside suffixes in the count of what was skipped
DATASET = "of a dataset"
FIRST_ROW_FILES = 16  # of a source's files so many are tried for a first row


def find_files(source: SourceSection, dataset: Path, skipped: Counter[str]) -> list[InputFile]:
    """The usable files of one source, sorted by name; what is passed over is counted in `skipped`.

    What lies below `dataset`, the folder that is being built, is no input. Raises UserError.
    """
    check_secrets(source)
    if source.format == "hub":
        return [_describe_hub(source)]
    function_sha256 = _check_function(source)
    if is_url(source.path):
        return _find_remote(source, skipped, function_sha256)
    path = _local_path(source)
    if source.format == "megatron" and not path.exists() and path.with_name(f"{path.name}.bin").is_file():
        path = path.with_name(f"{path.name}.bin")
    is_glob = not path.exists() and any(character in str(path) for character in MAGIC)
    if not path.exists() and not is_glob:
        raise UserError(f"data source {source.name!r}: there is no {path}; correct its path (relative ones start at {Path.cwd()}).")
    if path.is_file():
        kind = _kind_of(source, path.name) or _kind_of_single(source)
        return [_describe(source, path.resolve().parent, path.resolve(), kind, function_sha256)]
    root, pattern = _split_glob(path) if is_glob else (path.resolve(), source.pattern)
    if not root.is_dir():
        raise UserError(f"data source {source.name!r}: there is no folder {root}; correct its path {source.path}.")
    if root.is_relative_to(dataset):
        raise UserError(
            f"data source {source.name!r}: its path {source.path} {'is' if root == dataset else 'lies in'} the output folder {dataset}, "
            "of which nothing is read; wanted an output folder that holds no source: set data.root to another one (without it, it "
            "is datasets/ and the first source's name)."
        )
    passed: Counter[str] = Counter()
    found = set(_walk(source, root, root, pattern, dataset, passed))
    if is_glob:  # the folders that it names are searched too
        for folder in _glob(source, root, pattern):
            if folder.is_dir() and not folder.is_symlink():
                found |= set(_walk(source, root, folder, source.pattern, dataset, passed))
    files: list[InputFile] = []
    listed = _listed_arrow_files(source, root) if source.format == "datasets" else []
    for candidate in sorted(found, key=lambda one: os.fsencode(one.relative_to(root).as_posix())):
        kind = _kind_of(source, candidate.name)
        if kind is None or (kind == "arrow" and candidate not in listed):
            if not _is_token_index(source, candidate.name):
                passed[_suffix(candidate.name)] += 1
        else:
            files.append(_describe(source, root, candidate, kind, function_sha256))
    skipped.update(passed)
    if not files:
        apart = f" outside the output folder {dataset} (data.root)" if dataset.is_relative_to(root) and dataset.is_dir() else ""
        raise UserError(_nothing_usable(source, str(root), pattern, passed, apart))
    return files


def check_first_row(source: SourceSection, files: list[InputFile], largest_bytes: int) -> None:
    """Refuse a source of whose fields the first row that can be read lacks one."""
    for file in files[:FIRST_ROW_FILES]:
        try:
            fields = _fields_of(file, largest_bytes)
        except FileNotFoundError:
            raise UserError(f"data source {source.name!r}: {file.location} is gone since it was listed; start again.") from None
        except OSError as error:
            raise UserError(f"data source {source.name!r}: {file.location} cannot be read ({error}); mend that or leave it out.") from None
        if fields is None:
            continue
        have = {field.lower() for field in fields} if file.kind == "warc" else set(fields)
        wanted = {"text_field": None if file.kind == "warc" else source.text_field, "id_field": source.id_field}
        asked = [(key, field) for key, field in wanted.items() if field is not None]
        for key, field in [*asked, *(("metadata_fields", field) for field in source.metadata_fields)]:
            if (field.lower() if file.kind == "warc" else field) not in have:
                raise UserError(
                    f"data source {source.name!r}: the first row of {file.location} has no field {field!r}; "
                    f"set {key} to one of: {', '.join(map(str, fields)) or '(it has none)'}."
                )
        return


def refuse_twice(files: list[InputFile]) -> None:
    """Refuse a file that two sources list."""
    seen: dict[tuple[object, ...], str] = {}
    for file in files:
        # Roots are resolved and links not followed, so equal files have equal paths.
        key = (file.location, file.settings) if file.kind == "hub" else (file.location,)
        if key in seen:
            raise UserError(
                f"{file.location} is listed twice, by the data sources {seen[key]!r} and {file.source!r}; "
                "take it out of one (narrow its path or pattern)."
            )
        seen[key] = file.source


def _describe_hub(source: SourceSection) -> InputFile:
    _, split, size, version = open_hub(source.name, source.path, source.settings)
    return _input_file(source, source.path, split, "hub", size, version, "")


def _check_function(source: SourceSection) -> str:
    """The hash of a user's function, nothing for a format of ours; refused if it does not take a path and the settings."""
    if ":" not in source.format:
        return ""
    function, sha256 = load_function(source.format)
    try:
        inspect.signature(function).bind(Path(), **source.settings)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"data source {source.name!r}: {source.format} cannot be called with a local path and the settings "
            f"{sorted(source.settings) or 'none'} ({error}); correct data.sources settings, or its signature."
        ) from None
    return sha256


def _local_path(source: SourceSection) -> Path:
    path = source.path
    if path.startswith(("file://", "local://")):
        path = unquote(urlsplit(path).path)
    return Path(path.replace("{stdlib}", sysconfig.get_path("stdlib"))).expanduser()


def _split_glob(path: Path) -> tuple[Path, str]:
    """The folder in front of a glob's first wildcard, and the rest."""
    parts = path.parts
    first = next(index for index, part in enumerate(parts) if any(character in part for character in MAGIC))
    return Path(*parts[:first]).resolve(), "/".join(parts[first:])


def _find_remote(source: SourceSection, skipped: Counter[str], function_sha256: str) -> list[InputFile]:
    root, listed = list_files(source)
    names = {file.name: file for file in listed}
    passed: Counter[str] = Counter()
    files: list[InputFile] = []
    arrows = _listed_remote_arrow_files(source, root, list(names)) if source.format == "datasets" else set[str]()
    for name, found in names.items():
        if any(part.startswith(".") for part in name.split("/")):
            continue
        plain = name.partition("?")[0]
        kind = _kind_of(source, plain) or (_kind_of_single(source) if len(listed) == 1 and source.path.endswith(name) else None)
        if kind is None or (kind == "arrow" and name not in arrows):
            if not _is_token_index(source, plain):
                passed[_suffix(plain)] += 1
            continue
        size, version = found.num_bytes, found.version
        if kind == "megatron":
            index = names.get(name.removesuffix(".bin") + ".idx")
            if index is None:
                raise UserError(_no_index(source, f"{root}/{name}"))
            size, version = size + index.num_bytes, f"{version}{VERSION_SEPARATOR}{index.version}"
        files.append(_input_file(source, root, name, kind, size, version, function_sha256))
    skipped.update(passed)
    if not files:
        raise UserError(_nothing_usable(source, root, source.pattern, passed))
    return files


def _glob(source: SourceSection, folder: Path, pattern: str) -> Iterator[Path]:
    try:
        yield from folder.glob(pattern)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"data source {source.name!r}: the pattern {pattern!r} cannot be used ({error}); try '**/*.txt'.") from None


def _walk(source: SourceSection, root: Path, folder: Path, pattern: str, dataset: Path, passed: Counter[str]) -> Iterator[Path]:
    """Files below a folder of the root that match the pattern. Links are counted, not followed: they may leave the root or
    lead to a file that is found anyway."""
    installed = {"site-packages", "dist-packages"} if "{stdlib}" in source.path else set[str]()

    @lru_cache(maxsize=1024)
    def through_link(folder: Path) -> bool:
        return folder != root and (folder.is_symlink() or through_link(folder.parent))

    @lru_cache(maxsize=1024)
    def in_dataset(folder: Path) -> bool:
        return folder != root and (((folder / UNITS).is_dir() and (folder / PLAN).is_file()) or in_dataset(folder.parent))

    for path in _glob(source, folder, pattern):
        parts = path.relative_to(root).parts
        if any(part.startswith(".") for part in parts) or installed.intersection(parts) or path.is_relative_to(dataset):
            continue
        if path.is_symlink() or through_link(path.parent):
            passed[SYMLINK] += 1
        elif in_dataset(path.parent):  # what another build made, examples of dropped documents among it, is no text of the user's
            passed[DATASET] += 1
        elif path.is_file():
            yield path


def _kind_of(source: SourceSection, name: str) -> str | None:
    """What a file of this name is read as under the source's format; None: not at all."""
    lower = name.lower()
    text = "python" if lower.endswith(".py") else "text"
    if ":" in source.format:
        return source.format
    if source.format == "text":
        return text
    by_suffix = {
        "jsonl": (*JSONL_SUFFIXES, *JSON_SUFFIXES),
        "parquet": (".parquet",),
        "warc": WARC_SUFFIXES,
        "datasets": (".arrow",),
        "megatron": (".bin",),
    }
    if source.format in by_suffix:
        kind = "arrow" if source.format == "datasets" else source.format
        return kind if lower.endswith(by_suffix[source.format]) else None
    if lower.endswith(JSONL_SUFFIXES):
        return "jsonl"
    if lower.endswith(".parquet"):
        return "parquet"
    if lower.endswith(WARC_SUFFIXES):
        return "warc"
    return text if lower.endswith((*TEXT_SUFFIXES, ".py")) else None


def _kind_of_single(source: SourceSection) -> str:
    """A file that is named outright is taken at its format's word, whatever its suffix."""
    if source.format in ("jsonl", "parquet", "warc"):
        return source.format
    if source.format == "datasets":
        raise UserError(
            f"data source {source.name!r}: format datasets wants the folder that save_to_disk wrote, found the file {source.path}."
        )
    if source.format == "megatron":
        raise UserError(f"data source {source.name!r}: format megatron wants a .bin with its .idx beside it, found {source.path}.")
    raise UserError(f"data source {source.name!r}: cannot tell what {source.path} holds; set its format to text, jsonl, parquet or warc.")


def _describe(source: SourceSection, root: Path, path: Path, kind: str, function_sha256: str) -> InputFile:
    name = path.relative_to(root).as_posix()
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"data source {source.name!r}: the file name {os.fsencode(name)!r} is not UTF-8; rename it.") from None
    if kind == "megatron" and (index_path(path).is_symlink() or not index_path(path).is_file()):
        raise UserError(_no_index(source, str(path)))
    return _input_file(source, str(root), name, kind, *describe_local(path, kind), function_sha256)


def _input_file(source: SourceSection, root: str, name: str, kind: str, num_bytes: int, version: str, function_sha256: str) -> InputFile:
    return InputFile(
        source=source.name,
        root=root,
        name=name,
        kind=kind,
        num_bytes=num_bytes,
        version=version,
        text_field=source.text_field,
        id_field=source.id_field,
        metadata_fields=source.metadata_fields,
        part=None,
        part_bytes=num_bytes,
        settings=tuple((key, json.dumps(value, sort_keys=True, default=str)) for key, value in sorted(source.settings.items())),
        function_sha256=function_sha256,
    )


def _no_index(source: SourceSection, location: str) -> str:
    return f"data source {source.name!r}: {location} has no .idx of the same name beside it; a token shard is both."


def _is_token_index(source: SourceSection, name: str) -> bool:
    return source.format == "megatron" and name.endswith(".idx")


def _suffix(name: str) -> str:
    path = Path(name.lower())
    return "".join(path.suffixes[-2:]) if path.suffix in (".gz", ".zst") else path.suffix or "(none)"


def _nothing_usable(source: SourceSection, root: str, pattern: str, passed: Counter[str], apart: str = "") -> str:
    wanted = {
        "jsonl": ".jsonl (.gz, .zst)",
        "parquet": ".parquet",
        "warc": ".warc or .wet (.gz, .zst)",
        "datasets": "the .arrow files of a save_to_disk folder",
        "megatron": ".bin with its .idx",
        "text": "files",
    }.get(source.format, "files" if ":" in source.format else ".txt, .md, .rst, .py, .jsonl (.gz, .zst), .parquet, .warc or .wet")
    if not passed:
        return f"data source {source.name!r}: {root} has no file that matches {pattern!r}{apart}; wanted {wanted}."
    found = ", ".join(f"{count} {suffix}" for suffix, count in passed.most_common(5))
    hint = ""
    if passed[SYMLINK]:
        hint = " (links are not followed; name the folder they lead to)"
    elif passed[".arrow"]:
        hint = " (for a Hugging Face save_to_disk folder set format: datasets)"
    elif passed[".bin"] and passed[".idx"]:
        hint = " (for token shards set format: megatron)"
    return f"data source {source.name!r}: {root} has no usable file: found {found}, wanted {wanted}; correct the path or the format{hint}."


def _fields_of(file: InputFile, largest_bytes: int) -> list[str] | None:
    if file.kind in ("text", "python", "megatron"):
        return None
    if file.kind == "hub":
        dataset, *_ = open_hub(file.source, file.root, {key: json.loads(value) for key, value in file.settings})
        row = None if dataset.column_names else next(iter(dataset), None)
        return list(dataset.column_names or row or []) or None
    if ":" in file.kind:
        with local_copy(file) as path:
            try:
                row = next(iter(call_function(file, path)), None)
            except UserError:
                raise
            except Exception as error:  # whatever the user's function raises
                said = f"{type(error).__name__}: {error}"
                raise UserError(
                    f"data source {file.source!r}: {file.kind} failed on {file.location}: {said}; mend that function."
                ) from error
        return list(row) if isinstance(row, dict) else None
    with open_file(file) as stream:
        return first_record_fields(file, stream) if file.kind == "warc" else first_fields(file, stream, largest_bytes)


def _listed_arrow_files(source: SourceSection, root: Path) -> list[Path]:
    """The files that make up the datasets below a folder; others may be caches of `map`, which hold rows a second time."""
    files: list[Path] = []
    for state in root.rglob("state.json"):
        files += [state.parent / name for name in _listed_in_state(source, str(state), state.read_bytes())]
    for file in files:
        if not file.is_file() or not file.resolve().is_relative_to(root):
            raise UserError(f"data source {source.name!r}: {file} is listed in its state.json, but is not a file below {root}.")
    return files


def _listed_remote_arrow_files(source: SourceSection, root: str, names: list[str]) -> set[str]:
    files: set[str] = set()
    for name in names:
        if name.rpartition("/")[2] == "state.json":
            with open_file(_input_file(source, root, name, "jsonl", 0, "", "")) as stream:
                content = stream.read()
            folder = name.removesuffix("state.json")
            files |= {folder + one for one in _listed_in_state(source, f"{root}/{name}", content)}
    if missing := sorted(files - set(names)):
        raise UserError(f"data source {source.name!r}: {root}/{missing[0]} is listed in its state.json, but is not there.")
    return files


def _listed_in_state(source: SourceSection, state: str, content: bytes) -> list[str]:
    try:
        return [str(entry["filename"]) for entry in json.loads(content)["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"data source {source.name!r}: {state} is not the state.json of a Hugging Face save_to_disk folder.") from None
