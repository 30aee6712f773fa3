"""Files that exist whole under their final name or not at all.

In: bytes, or a temporary folder that somebody filled. Out: the final name, after everything under it has
reached the disk. The order is the promise: files, then their folder, then the rename, then the parent
(a rename may otherwise survive a power cut that its bytes did not).
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from configs.errors import UserError

BLOCK_BYTES = 1 << 22


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in blocks of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def open_plain(path: Path) -> BinaryIO:
    """Open a file to read, if it is one itself: a link would lead out of its folder, a pipe would be waited for, a device never end.

    Raises OSError.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    return file


def sync_path(path: Path) -> None:
    """Flush a file or a folder to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a crash leaves the old file or the new one, never a part.

    Raises OSError (a full disk, no permission); what stood under the name before still stands there then.
    """
    # Not the process id: two nodes of one shared file system may have the same (containers count from 1).
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(path.parent)


def commit_folder(temporary: Path, final: Path) -> None:
    """Give a filled folder its final name: sync every file and folder in it, itself, rename, sync the parent.

    Raises OSError if `final` exists and is not empty: a commit is never overwritten.
    """
    for path in sorted(temporary.rglob("*"), reverse=True):  # what is in a folder before the folder
        sync_path(path)
    sync_path(temporary)
    temporary.rename(final)
    sync_path(final.parent)


@contextlib.contextmanager
def new_folder(out: Path) -> Generator[Path]:
    """A temporary folder beside `out` that becomes it at the end, or vanishes. Raises UserError where `out` is there already."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already and not empty; choose another folder, or remove it.")
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.filename}: {error.strerror}; choose another folder.") from None
    try:
        yield temporary
        commit_folder(temporary, out)
    finally:
        remove_folders([temporary])


def remove_folders(paths: list[Path]) -> None:
    """Delete folders that nobody trusts any more (temporary ones of an attempt that is gone)."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
