"""Folders that are made whole or not at all, and known again by what they were made of.

In: a task's folder, its fingerprint, and a function that fills a folder. Out: the folder under its final name, with a
record (`<name>.json`) of counts and hashes in it, written last. Equal tasks write equal bytes, so a folder that was lost,
cut off or damaged is simply made again.
"""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from configs.durable import commit_folder, remove_folders, sha256_of_file
from configs.errors import UserError
from configs.sealed import seal, unseal
from data_pipeline.ownership import is_owned_by
from data_pipeline.records import FileRecord, Record

TEMPORARY_PREFIX = ".tmp-"


class CommittedRecord(Record):
    """What the record of every committed folder holds."""

    fingerprint: str
    """SHA-256 over everything that decides the folder's bytes."""
    files: dict[str, FileRecord]
    """Every file beside the record, by name."""


Made = TypeVar("Made", bound=CommittedRecord)


def load_folder(folder: Path, record_name: str, kind: type[Made], fingerprint: str) -> Made | None:
    """The record of a folder that is whole, bit for bit, and made of just this; None otherwise."""
    try:
        record = read_record(folder / record_name, kind)
        if record.fingerprint != fingerprint:
            return None
        whole = all(sha256_of_file(folder / name) == file.sha256 for name, file in record.files.items())
    except (OSError, ValueError):
        return None
    return record if whole else None


def read_record(path: Path, kind: type[Made]) -> Made:
    """A record as it was written. Raises OSError; ValueError (a ValidationError is one) for what is not, or not whole."""
    return kind.model_validate_json(json.dumps(unseal(path.read_bytes())), strict=True)


def make_folder(root: Path, token: str, folder: Path, record_name: str, fill: Callable[[Path], Made], is_there: Callable[[], bool]) -> Made:
    """Fill a temporary folder and give it its final name. Raises OSError; UserError when another build (not `token`) took over.

    A folder of that name that does not hold this task's work is replaced.
    """
    temporary = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        record = fill(temporary)
        (temporary / record_name).write_bytes(seal(record.model_dump(mode="json")))
        if not is_owned_by(root, token):
            raise UserError(f"{root}: another build has taken this folder over.")
        if folder.exists():
            if is_there():  # a retried task, whose first try got further than was known
                return record
            stale = temporary.with_name(f"{temporary.name}-stale")
            folder.rename(stale)
            remove_folders([stale])
        commit_folder(temporary, folder)
        return record
    finally:
        remove_folders([temporary])


def record_files(folder: Path, known: Mapping[str, FileRecord] | None = None) -> dict[str, FileRecord]:
    """Sizes and hashes of everything in a folder, by name; those that are `known` are not read again. Raises OSError."""
    known = known or {}
    return {path.name: known.get(path.name) or record_file(path) for path in sorted(folder.iterdir())}


def record_file(path: Path) -> FileRecord:
    """Size and hash of a file. Raises OSError."""
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_of_file(path))


def settle_folders(parent: Path, record_name: str, fingerprints: list[str]) -> None:
    """Bring folders that earlier builds made to the numbers they have now, by fingerprint, and remove the rest.

    A kill in between leaves every folder under some name that the next start looks at too.
    """
    if not parent.is_dir():
        return
    names = {fingerprint: f"{number:05d}" for number, fingerprint in enumerate(fingerprints)}
    found: dict[str, Path] = {}
    for entry in sorted(parent.iterdir()):
        fingerprint = None if entry.name.startswith(TEMPORARY_PREFIX) else _read_fingerprint(entry / record_name)
        if fingerprint in names and fingerprint not in found:
            found[fingerprint] = entry
        else:
            remove_folders([entry])
    moved = {fingerprint: path for fingerprint, path in found.items() if path.name != names[fingerprint]}
    for fingerprint, path in moved.items():  # first all away, then all home: the names are those of one another
        path.rename(parent / f"moved-{fingerprint}")
    for fingerprint in moved:
        (parent / f"moved-{fingerprint}").rename(parent / names[fingerprint])


def _read_fingerprint(path: Path) -> str | None:
    try:
        return str(unseal(path.read_bytes())["fingerprint"])
    except (OSError, ValueError, KeyError):
        return None


def process_peak_bytes() -> int:
    """The largest resident memory of this process so far, bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
