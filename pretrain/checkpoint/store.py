"""Where commits lie: a folder, or an object store. Each verb stands here twice, and nowhere else is it asked which of the two it is.

In: paths of a disk (`Path`) or of a store (`StorePath`). Out: what lies there, and the acts of a commit's life. No torch.

    a folder                                       an object store, URL/RUN_NAME-ID/
    .tmp-step-00000100-attempt-3/                  step-00000100/attempt-3/                 not committed
    the rename to step-00000100/                   step-00000100/MANIFEST.json, made last   the commit
    rejected/step-00000100/ (renamed)              rejected/step-00000100/MANIFEST.json     set aside; the files stay where they are
    .tmp-old-step-00000100/ (renamed)              no manifest any more                     to be deleted

Files of a store are apart by attempt: one that was given up and wakes again writes beside what another has committed. What reads or tidies
raises UserError where a store is not reached: that must never look like damage. What writes a save raises OSError, as a full disk does.
"""

import functools
import re
from collections.abc import Generator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path, PurePath, PurePosixPath
from typing import cast

from configs import durable
from configs.durable import open_plain, sync_path
from configs.errors import UserError
from pretrain.checkpoint.object_store import (
    StoreError,
    create_object,
    names_below,
    read_object,
    remove_below,
    remove_object,
    size_of_object,
    write_object,
)

MANIFEST = "MANIFEST.json"
URL_FILE = "checkpoints-url"
"""In the run folder, where `checkpoints/` is elsewhere: the URL."""
ASIDE = ("rejected", "rolled-back")
_STEP = re.compile(r"step-\d{8,}")
SELF_TEST = "self-test"
"""What it writes is never committed."""


class StorePath(PurePosixPath):
    """A URL of an object store, put together like a path."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)


def path_of(text: str) -> PurePath:
    """What `str` made of a path."""
    return StorePath(text) if "://" in text else Path(text)


def lies_at(checkpoints: Path) -> PurePath:
    """Where the commits of a run folder's `checkpoints/` are: in it, or at the URL that stands beside it."""
    url = checkpoints.with_name(URL_FILE)
    return StorePath(url.read_text().strip()) if url.is_file() else checkpoints


@contextmanager
def _reached() -> Generator[None]:
    try:
        yield
    except StoreError as error:
        raise UserError(f"{error}. Then start the same command again; nothing was changed.") from None


# --- reading -----------------------------------------------------------------------------------------------


@functools.singledispatch
def names_in(folder: Path) -> list[str]:
    """What lies directly in a folder; nothing where there is none."""
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


@names_in.register
def _(folder: StorePath) -> list[str]:
    with _reached():
        return names_below(str(folder))


@functools.singledispatch
def is_commit(folder: Path) -> bool:
    """Whether a folder of a commit's name is one, perhaps damaged."""
    return folder.is_dir()


@is_commit.register
def _(folder: StorePath) -> bool:
    return MANIFEST in names_in(folder)


@functools.singledispatch
def files_of(folder: Path, attempt: int) -> PurePath:
    """Where the ranks' files of a commit lie, or of one that is still written."""
    return folder


@files_of.register
def _(folder: StorePath, attempt: int) -> PurePath:
    return folder if folder.name == f"attempt-{attempt}" else folder / f"attempt-{attempt}"


@functools.singledispatch
def size_of(file: Path) -> int:
    """In bytes. Raises OSError."""
    return file.stat().st_size


@size_of.register
def _(file: StorePath) -> int:
    with _reached():
        return size_of_object(str(file))


@functools.singledispatch
def read_file(path: Path) -> bytes:
    """All of it. Raises OSError."""
    with open_plain(path) as file:
        return file.read()


@read_file.register
def _(path: StorePath) -> bytes:
    with _reached():
        return read_object(str(path))


@functools.singledispatch
def read_part(path: Path, first: int, target: memoryview) -> int:
    """Fill `target` with the bytes from `first` on; returns how many there were. Raises OSError."""
    with open_plain(path) as file:
        file.seek(first)
        return cast(BufferedReader, file).readinto(target)


@read_part.register
def _(path: StorePath, first: int, target: memoryview) -> int:
    with _reached():
        content = read_object(str(path), first, first + len(target))
    target[: len(content)] = content
    return len(content)


# --- a save ------------------------------------------------------------------------------------------------


@functools.singledispatch
def unfinished(checkpoints: Path, name: str, attempt: int) -> PurePath:
    """Where an attempt writes what will be the commit `name`."""
    return checkpoints / f".tmp-{name}-attempt-{attempt}"


@unfinished.register
def _(checkpoints: StorePath, name: str, attempt: int) -> PurePath:
    return checkpoints / name / f"attempt-{attempt}"


@functools.singledispatch
def make_folder(folder: Path) -> None:
    """So that files can be written into it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)


@functools.singledispatch
def sync_folder(folder: Path) -> None:
    """Its names reach the disk. Raises OSError."""
    sync_path(folder)


@functools.singledispatch
def write_file(path: Path, content: bytes) -> None:
    """Whole or not at all, synced. Raises OSError."""
    durable.write_file(path, content)


@functools.singledispatch
def commit_folder(folder: Path, final: Path) -> None:
    """The commit: what lies in `folder`, its manifest too, counts from here on as `final`. Raises OSError where that is there already."""
    durable.commit_folder(folder, final)


@make_folder.register
@sync_folder.register
def _(folder: StorePath) -> None:
    """A store has no folders, and what it has answered for is there."""


@write_file.register
def _(path: StorePath, content: bytes) -> None:
    write_object(str(path), [content])


@commit_folder.register
def _(folder: StorePath, final: StorePath) -> None:
    create_object(str(final / MANIFEST), read_object(str(folder / MANIFEST)))


# --- what is given up --------------------------------------------------------------------------------------


def remove_folders(folders: list[PurePath]) -> None:
    """Delete what is no commit (any more)."""
    for folder in folders:
        _remove(folder)


@functools.singledispatch
def _remove(folder: Path) -> None:
    durable.remove_folders([folder])


@_remove.register
def _(folder: StorePath) -> None:
    remove_below(str(folder))


@functools.singledispatch
def give_up(folder: Path) -> None:
    """Of a save that could not be committed."""
    durable.remove_folders([folder])


@give_up.register
def _(folder: StorePath) -> None:
    """The manifest may have come to the store, and only the answer was lost: then it is one. Else the next attempt clears it."""


@functools.singledispatch
def uncommit(folder: Path, attempt: int) -> PurePath:
    """Make a commit none, at once and whole; returns what is to be removed of it."""
    return folder.rename(folder.with_name(f".tmp-old-{folder.name}"))


@uncommit.register
def _(folder: StorePath, attempt: int) -> PurePath:
    with _reached():
        remove_object(str(folder / MANIFEST))
    return files_of(folder, attempt)


@functools.singledispatch
def remove_unfinished(checkpoints: Path) -> None:
    """Delete what attempts that are gone were writing, or deleting."""
    remove_folders([*checkpoints.glob(".tmp-*")])


@remove_unfinished.register
def _(checkpoints: StorePath) -> None:
    """Files of a step without a manifest, unless that was set aside: then they are its own."""
    kept = {match[0] for aside in ASIDE for name in names_in(checkpoints / aside) if (match := _STEP.match(name))}
    steps = {name for name in names_in(checkpoints) if name == SELF_TEST or _STEP.fullmatch(name)} - kept
    remove_folders([checkpoints / name for name in sorted(steps) if not is_commit(checkpoints / name)])


@functools.singledispatch
def move_commit(folder: Path, target: Path, notes: Path) -> None:
    """Set a commit aside under another name. notes: the run folder's `checkpoints/`, where a person looks for it. Raises OSError."""
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)


@move_commit.register
def _(folder: StorePath, target: StorePath, notes: Path) -> None:
    note = notes / target.parent.name / target.name
    note.parent.mkdir(parents=True, exist_ok=True)
    durable.write_file(note, f"{target}\n".encode())  # first: a run whose commits were all set aside never begins from nothing
    with _reached():
        if is_commit(folder):
            write_object(str(target / MANIFEST), [read_object(str(folder / MANIFEST))])
            remove_object(str(folder / MANIFEST))
