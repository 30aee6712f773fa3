"""What does not lie on this machine: files behind an fsspec URL.

In: a source whose path is a URL, or an `InputFile` of one. Out: the list of its files as they are now, or a local copy of one
for as long as it is read (of a part, only its bytes). A local file is its own copy, and is checked not to change meanwhile.
Credentials come from the environment and are written nowhere.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast
from urllib.parse import parse_qsl, urlsplit

import fsspec
import fsspec.core
import pyarrow
import pyarrow.parquet

from configs.data_section import SourceSection
from configs.errors import UserError
from data_pipeline.input_file import InputFile, index_path
from data_pipeline.json_lines import find_line_start, reading_from

T = TypeVar("T")

WAIT_SECONDS = (1.0, 4.0, 16.0)  # before the second, third and fourth try of a transfer
COPY_BYTES = 16 << 20
REQUESTS = 16  # at once, where each of many files is asked for
MAGIC = "*?["
SECRETS = ("key", "secret", "token", "password", "signature", "sig", "credential", "credentials")
# What servers and stores call the thing that changes with a file's content, the best first.
VERSION_FIELDS = (
    "ETag", "etag", "Content-MD5", "Digest", "md5Hash", "blob_id", "content_hash", "mtime", "LastModified", "last_modified",
    "Last-Modified", "updated", "created",
)  # fmt: skip
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "abfs": "adlfs",
    "az": "adlfs",
}
VERSION_SEPARATOR = "|"  # between the versions of a megatron pair


class RemoteFile(NamedTuple):
    """A file as its store lists it."""

    name: str
    """Below the listing's root, with `/`."""
    num_bytes: int
    version: str


def is_url(path: str) -> bool:
    """Whether a source's path is for fsspec; `file://` and `local://` are local paths."""
    return "://" in path and not path.startswith(("file://", "local://"))


def check_secrets(source: SourceSection) -> None:
    """Raises UserError where settings or a URL hold what looks like a secret: they are written into the manifest."""
    url = urlsplit(source.path) if "://" in source.path else urlsplit("")
    found = [*_secret_keys(source.settings), *(key for key, _ in parse_qsl(url.query) if _is_secret(key))]
    if url.password or (url.username and url.scheme in PACKAGES):
        found.append("a password in its path")
    if found:
        raise UserError(
            f"data source {source.name!r}: {', '.join(found)} looks like a secret, and settings and paths are written into the "
            "dataset's manifest; take it out and give it in the environment (as AWS_*, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN), "
            "or rename the argument if it is none."
        )


def list_files(source: SourceSection) -> tuple[str, list[RemoteFile]]:
    """The root and the files of a URL: one file, those a glob matches, or those below a folder that match `pattern`.

    Folders that a glob matches are searched too; on a web server, a path that ends with a slash is a folder.
    Raises UserError: the transport is not installed, cannot be reached, or has nothing there.
    """
    settings = {} if ":" in source.format else source.settings  # those are the function's
    system, path = _connect(source.path, settings, source.name)

    def told(action: Callable[[], T]) -> T:
        try:
            return _try_again(action, source.path)
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"data source {source.name!r}: {source.path} cannot be listed ({error}); correct its path.") from None
        except OSError as error:
            raise UserError(
                f"data source {source.name!r}: {source.path} cannot be reached ({error}); check the network, the name and "
                "the credentials in the environment."
            ) from None

    def list_them() -> tuple[str, dict[str, dict[str, Any]]]:
        # In the address of a page a question mark is no wildcard.
        if any(character in path for character in (MAGIC.replace("?", "") if path.startswith("http") else MAGIC)):
            found = cast("dict[str, dict[str, Any]]", system.glob(path, detail=True))
            return _fixed_part(path), found
        if not source.path.endswith("/") and system.isfile(path):  # to a web server all are files
            return system._parent(path), {path: system.info(path)}
        return path.rstrip("/"), {path.rstrip("/"): {"type": "directory"}}

    root, found = told(list_them)
    files: dict[str, dict[str, Any]] = {}
    for one, info in found.items():
        if info["type"] == "directory":
            below = told(lambda one=one: cast("dict[str, dict[str, Any]]", system.glob(f"{one.rstrip('/')}/{source.pattern}", detail=True)))
            files |= {path: more for path, more in below.items() if more["type"] == "file"}
        else:
            files[one] = info
    if not files and source.format == "megatron" and told(lambda: system.isfile(f"{path}.bin")):
        root = system._parent(path)
        files = {f"{path}{end}": system.info(f"{path}{end}") for end in (".bin", ".idx") if system.isfile(f"{path}{end}")}
    if not files and not told(lambda: system.exists(root or path)):
        raise UserError(f"data source {source.name!r}: there is no {source.path}; correct its path.")
    files = _complete(files, lambda one: told(lambda: system.info(one)))
    listed: list[RemoteFile] = []
    for one, info in files.items():
        if info.get("size") is None:
            raise UserError(f"data source {source.name!r}: the server does not tell the size of {one}; download it and name the copy.")
        listed.append(RemoteFile(one.removeprefix(root).lstrip("/"), int(info["size"]), _version(system, one, info)))
    url = system.unstrip_protocol(root).rstrip("/")
    return url if "://" in url else f"{url}//", sorted(listed, key=lambda file: file.name.encode())


def can_read_ranges(file: InputFile) -> bool:
    """Whether parts of a file can be fetched: stores can always, of web servers only some. Raises UserError, OSError."""
    if not file.location.startswith(("http://", "https://")):
        return True
    system, path = connect_to(file)

    def read_second_byte() -> bool:
        try:
            with system.open(path, "rb") as stream:
                stream.seek(1)
                return len(stream.read(1)) == 1
        except ValueError:  # the server's answer was the whole file
            return False

    return _try_again(read_second_byte, file.location)


@contextmanager
def open_file(file: InputFile) -> Generator[BinaryIO, None, None]:
    """A file, or as much of it as is read, without a copy. Raises UserError, OSError."""
    if not file.is_remote:
        with file.path.open("rb") as stream:
            yield stream
        return
    system, path = connect_to(file)
    with _try_again(lambda: system.open(path, "rb"), file.location) as stream:
        yield cast(BinaryIO, stream)


@contextmanager
def local_copy(file: InputFile, scratch: Path | None = None) -> Generator[Path, None, None]:
    """A local path of a file: the file itself, or a copy below `scratch` (the system's folder for temporary files) until the end.

    The copy of a part has the part's bytes where the file has them; the rest of it is a hole or is not there.
    Raises UserError when the file is not the one that was planned with, or changes; OSError when it is gone, or cannot be
    fetched in four tries.
    """
    if not file.is_remote:
        check_unchanged(file)
        yield file.path
        check_unchanged(file)
        return
    system, path = connect_to(file)
    check_unchanged(file)
    with tempfile.TemporaryDirectory(prefix="fetched-", dir=scratch) as folder:
        copy = Path(folder) / PurePosixPath(file.name.partition("?")[0]).name
        if file.kind == "jsonl" and file.part is not None:
            _copy_lines(system, path, file, copy)
        elif file.kind == "parquet" and file.part is not None and file.part[0] > 0:
            _copy_row_groups(system, path, file, copy)
        else:
            _copy_whole(system, path, file, copy)
        check_unchanged(file)
        yield copy


def check_unchanged(file: InputFile) -> None:
    """Raises UserError when a file has another size or version than when the build was planned; OSError when it is gone."""
    if file.is_remote:
        system, path = connect_to(file)
        system.invalidate_cache()
        paths = [path, path.removesuffix(".bin") + ".idx"] if file.kind == "megatron" else [path]
        infos = [_try_again(lambda one=one: system.info(one), file.location) for one in paths]
        planned = file.version.split(VERSION_SEPARATOR)
        versions = [_version(system, one, info, was.partition("=")[0]) for one, info, was in zip(paths, infos, planned, strict=True)]
        found = sum(int(info["size"]) for info in infos), VERSION_SEPARATOR.join(versions)
    else:
        found = describe_local(file.path, file.kind)
    if found != (file.num_bytes, file.version):
        raise UserError(
            f"{file.location} was changed while the build read it (found {found[0]} bytes, planned with {file.num_bytes}); "
            "start the same command again when nothing writes to it."
        )


def describe_local(path: Path, kind: str) -> tuple[int, str]:
    """Size in bytes and version of a local file; of a megatron pair, of both files together. Raises OSError."""
    states = [one.stat() for one in ([path, index_path(path)] if kind == "megatron" else [path])]
    return sum(state.st_size for state in states), VERSION_SEPARATOR.join(str(state.st_mtime_ns) for state in states)


def connect_to(file: InputFile) -> tuple[Any, str]:
    """The filesystem and the path within it of a remote file. Raises UserError when its transport is not installed."""
    settings = {} if ":" in file.kind else {key: json.loads(value) for key, value in file.settings}
    return _connect(file.location, settings, file.source)


def _connect(url: str, settings: Mapping[str, Any], source: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    if "::" in url:
        raise UserError(f"data source {source!r}: {url} is a URL within a URL, which is not read here; unpack it first.")
    try:
        system, path = cast("tuple[Any, str]", fsspec.core.url_to_fs(url, **settings))
    except ImportError as error:
        wanted = PACKAGES.get(protocol)
        remedy = f"`pip install {wanted}`" if wanted else "install what it asks for"
        raise UserError(f"data source {source!r}: {url} cannot be read because a package is missing ({error}); {remedy}.") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"data source {source!r}: {url} cannot be used ({error}); correct its path or its settings.") from None
    except Exception as error:  # some transports connect at once, and raise what they please
        raise UserError(f"data source {source!r}: {url} cannot be reached ({type(error).__name__}: {error}).") from None
    return system, path


def _try_again(action: Callable[[], T], url: str) -> T:
    """Up to four times. Raises FileNotFoundError or PermissionError at once, OSError naming the URL after the last try."""
    for wait in (*WAIT_SECONDS, None):
        try:
            return action()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # transports raise exceptions of their own, of no common kind
            if wait is None:
                raise OSError(f"{url}: {type(error).__name__}: {error} (tried {len(WAIT_SECONDS) + 1} times)") from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _version(system: Any, path: str, info: Mapping[str, Any], field: str | None = None) -> str:
    """What tells a change, as `field=value`; by the field that is given, as a listing may have others than the file itself."""
    for one in VERSION_FIELDS if field is None else (field,):
        if (value := info.get(one)) is not None:
            return f"{one}={value.timestamp() if isinstance(value, datetime) else value}"
    return f"ukey={system.ukey(path)}"


def _complete(files: dict[str, dict[str, Any]], ask: Callable[[str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is known of files, by asking for each where the listing told less than that (a web server lists names alone)."""
    for one, info in files.items():
        asked = ask(one)
        if info.get("size") is not None and all(info.get(field) == asked.get(field) for field in VERSION_FIELDS):
            return files  # as the first is, so are all
        break
    with ThreadPoolExecutor(REQUESTS) as pool:
        return dict(zip(files, pool.map(ask, files), strict=True))


def _fixed_part(path: str) -> str:
    """The folder in front of a glob's first wildcard."""
    at = min(path.find(character) for character in MAGIC if character in path)
    return path[:at].rpartition("/")[0]


def _copy_whole(system: Any, path: str, file: InputFile, copy: Path) -> None:
    pairs = [(path, copy)]
    if file.kind == "megatron":
        pairs.append((path.removesuffix(".bin") + ".idx", index_path(copy)))

    def transfer() -> None:
        for there, here in pairs:
            system.get_file(there, str(here))
        if (found := sum(here.stat().st_size for _, here in pairs)) != file.num_bytes:
            raise OSError(f"{found} of {file.num_bytes} bytes came over")

    _try_again(transfer, file.location)


def _copy_range(system: Any, path: str, url: str, start: int, stop: int, copy: Path) -> None:
    """Fetch bytes to where they stand in the file."""
    with os.fdopen(os.open(copy, os.O_RDWR | os.O_CREAT, 0o600), "rb+") as stream:
        for at in range(start, stop, COPY_BYTES):
            stream.seek(at)
            stream.write(_read_range(system, path, url, at, min(at + COPY_BYTES, stop)))


def _read_range(system: Any, path: str, url: str, start: int, stop: int) -> bytes:
    def transfer() -> bytes:
        content = cast(bytes, system.cat_file(path, start=start, end=stop))
        if len(content) != stop - start:
            raise OSError(f"asked for {stop - start} bytes from {start} on, got {len(content)}")
        return content

    return _try_again(transfer, url)


def _copy_lines(system: Any, path: str, file: InputFile, copy: Path) -> None:
    """The bytes of a part of a jsonl file, the byte before it (does a line start here?) and the rest of its last line."""
    assert file.part is not None
    start, stop = file.part
    _copy_range(system, path, file.location, max(start - 1, 0), stop, copy)
    with copy.open("rb") as stream:
        if find_line_start(start, stop, reading_from(stream)) >= stop:
            return  # no line starts here
    behind = find_line_start(stop, file.num_bytes, lambda first, last: _read_range(system, path, file.location, first, last))
    _copy_range(system, path, file.location, stop, behind, copy)


def _copy_row_groups(system: Any, path: str, file: InputFile, copy: Path) -> None:
    """The footer and the row groups of a part of a parquet file."""
    assert file.part is not None

    def read_footer() -> pyarrow.parquet.FileMetaData:
        with system.open(path, "rb") as stream:
            return pyarrow.parquet.read_metadata(stream)

    footer = _try_again(read_footer, file.location)
    starts: list[int] = []
    ends: list[int] = []
    for group in range(*file.part):
        for column in range(footer.num_columns):
            chunk = footer.row_group(group).column(column)
            pages = [chunk.data_page_offset, *([chunk.dictionary_page_offset] if chunk.has_dictionary_page else [])]
            starts.append(min(pages))
            ends.append(min(pages) + chunk.total_compressed_size)
    _copy_range(system, path, file.location, min(starts), max(ends), copy)
    _copy_range(system, path, file.location, file.num_bytes - footer.serialized_size - 8, file.num_bytes, copy)
    with copy.open("rb+") as stream:
        stream.write(_read_range(system, path, file.location, 0, 4))  # the magic


def _secret_keys(settings: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for key, value in settings.items():
        if _is_secret(key):
            found.append(f"settings.{key}")
        elif isinstance(value, Mapping):
            found += _secret_keys(cast("Mapping[str, Any]", value))
    return found


def _is_secret(key: str) -> bool:
    return key.lower().replace("-", "_").rpartition("_")[2] in SECRETS or key.lower().startswith(("secret", "password"))
