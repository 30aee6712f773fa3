"""Commits as they lie on the disk: found, read, compared with their hashes. No torch: a login node asks here too.

In: a run's `checkpoints/` folder. Out: its commits, what their manifests say, and what is wrong with their files.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.durable import sha256_of_file
from configs.errors import UserError
from pretrain.state import TrainState

MANIFEST = "MANIFEST.json"
FORMAT = 2
COMMIT_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint: its folder and what its manifest says."""

    folder: Path
    state: TrainState
    files: dict[str, dict[str, Any]]
    """File name -> {bytes, sha256}."""
    identity: dict[str, str]
    """SHA-256 of what decided the steps so far: the mixture, each source that was seen, the tokenizer."""
    world_size: int
    attempt: int


def commit_name(step: int) -> str:
    """Folder name of a step's commit."""
    return f"step-{step:08d}"


def list_commits(checkpoints: Path) -> list[Path]:
    """Folders of commits, newest step first. Order is by step, never by time stamps."""
    if not checkpoints.is_dir():
        return []
    found = [(int(match[1]), path) for path in checkpoints.iterdir() if (match := COMMIT_NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def read_commit(folder: Path) -> Commit:
    """The commit's manifest. Raises ValueError, naming the file, when it is missing or was changed.

    Raises UserError for a format of another version: nothing is wrong with it, it is not ours to judge.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        seal = content.pop("manifest_sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    if seal != seal_of(content):
        raise ValueError(f"{path}: its content does not match its own SHA-256")
    if content["format"] != FORMAT:
        raise UserError(f"{path}: written in format {content['format']}, this version reads {FORMAT}; use the version that wrote it.")
    return Commit(
        folder, TrainState.from_json(content["state"]), content["files"], content["identity"], content["world_size"], content["attempt"]
    )


def newest_readable_commit(checkpoints: Path) -> Commit | None:
    """The newest commit whose manifest is whole; its other files are not looked at. None where there is none."""
    for folder in list_commits(checkpoints):
        try:
            return read_commit(folder)
        except ValueError:
            continue  # training falls back to an older one, too
    return None


def check_files(commit: Commit, names: Sequence[str]) -> list[str]:
    """Problems of some of a commit's files (missing, unreadable, size, SHA-256), each naming the file."""
    return [f"{commit.folder / name}: {problem}" for name in names if (problem := _compare(commit.folder / name, commit.files[name]))]


def _compare(path: Path, known: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != known["bytes"]:
            return f"{size} bytes, the manifest says {known['bytes']}"
        return None if sha256_of_file(path) == known["sha256"] else "its SHA-256 is not the manifest's"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error})"


def verify_commit(folder: Path) -> list[str]:
    """Every problem of one commit; empty when each byte is as it was committed. Reads every file; unpickles nothing."""
    try:
        commit = read_commit(folder)
    except ValueError as error:
        return [str(error)]
    stray = sorted({path.name for path in folder.iterdir()} - set(commit.files) - {MANIFEST})
    return check_files(commit, sorted(commit.files)) + [f"{folder / name}: not in the manifest" for name in stray]


def is_committed(checkpoints: Path, step: int) -> bool:
    """Whether a step is committed and every byte of it verifies."""
    folder = checkpoints / commit_name(step)
    return folder.is_dir() and not verify_commit(folder)


def seal_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
