"""Commits as they lie on the disk: found, read, compared with their hashes. No torch: a login node asks here too.

In: a run's `checkpoints/` folder. Out: its commits, what their manifests say, and what is wrong with their files.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from configs.errors import UserError
from pretrain.checkpoint.blocks import DamageError, FileRecord, VerifiedFiles
from pretrain.checkpoint.store import MANIFEST, files_of, is_commit, lies_at, names_in, read_file, size_of, write_file
from pretrain.state import TrainState

FORMAT = 6
COMMIT_NAME = re.compile(r"step-(\d{8,})")
FILE_NAME = re.compile(r"rank_\d{5,}\.(json|safetensors)")


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint: its folder and what its manifest says."""

    folder: PurePath
    state: TrainState
    files: dict[str, FileRecord]
    """Size and SHA-256 of the blocks of each file, by name."""
    identity: dict[str, str]
    """SHA-256 of what decided the steps so far: the mixture, each source that was seen, the tokenizer."""
    code: dict[str, str]
    """SHA-256 of the sources of the user's own classes and functions, by import path."""
    world_size: int
    attempt: int
    loss: float
    """Of its step, in nats per target."""
    time: int
    """When it was committed, in seconds since 1970, by rank 0's clock."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Stage, precision, optimizer and micro-batch that it was written under (`layouts.py`); empty where it does not say."""
    wandb_id: str | None = None
    """Under which id Weights & Biases shows its run; None where it does not say."""

    @property
    def files_folder(self) -> PurePath:
        """Where its files lie: in its folder, but for an object store."""
        return files_of(self.folder, self.attempt)

    def changed_code(self, code: dict[str, str]) -> list[str]:
        """A warning for each source of the user's own that is not what it was (`code`: as it is now)."""
        changed = sorted(path for path in self.code | code if self.code.get(path) != code.get(path))
        return [f"WARNING: the source of {path} is not what it was when {self.folder.name} was saved" for path in changed]


def commit_name(step: int) -> str:
    """Folder name of a step's commit."""
    return f"step-{step:08d}"


def commit_folder_of(checkpoints: Path, step: int) -> PurePath:
    """Where the commit of a step is, or would be."""
    return lies_at(checkpoints) / commit_name(step)


def list_commits(checkpoints: Path) -> list[PurePath]:
    """Folders of commits, newest step first. Order is by step, never by time stamps. Raises UserError where a store is not reached."""
    place = lies_at(checkpoints)
    found = [
        (int(match[1]), place / name) for name in names_in(place) if (match := COMMIT_NAME.fullmatch(name)) and is_commit(place / name)
    ]
    return [path for _, path in sorted(found, reverse=True)]


def read_commit(folder: PurePath) -> Commit:
    """The commit's manifest. Raises DamageError, naming the file, when it is missing or was changed.

    Raises UserError for a format of another version: nothing is wrong with it, it is not ours to judge.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(read_file(path))
        seal = content.pop("manifest_sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamageError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    if seal != seal_of(content):
        raise DamageError(f"{path}: its content does not match its own SHA-256")
    if content["format"] != FORMAT:
        raise UserError(f"{path}: written in format {content['format']}, this version reads {FORMAT}; use the version that wrote it.")
    try:
        if stray := sorted(name for name in content["files"] if not FILE_NAME.fullmatch(name)):  # a name is no way out of the folder
            raise ValueError(f"it names {stray[:3]}, which no rank writes")
        if wrong := [name for name, known in content["files"].items() if not _is_record(known)]:
            raise ValueError(f"it has no size and sums of {wrong[:3]}")
        known = (content[key] for key in ("files", "identity", "code", "world_size", "attempt"))
        if not type(content["world_size"]) is type(content["attempt"]) is type(content["time"]) is int:
            raise ValueError("world_size, attempt and time are whole numbers")
        facts = {
            "loss": float.fromhex(content["loss"]),
            "time": content["time"],
            "layout": content["layout"],
            "wandb_id": content.get("wandb_id"),
        }
        return Commit(folder, TrainState.from_json(content["state"]), *known, **facts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{path}: is not as it is written ({type(error).__name__}: {error})") from None


def _is_record(known: Any) -> bool:
    """Whether a manifest's entry of a file is one, of JSON that anybody may have written."""
    return type(known["bytes"]) is int and isinstance(known["sha256"], list) and all(isinstance(sum_, str) for sum_ in known["sha256"])


def write_manifest(commit: Commit) -> None:
    """Say in a folder what it holds, synced. Raises OSError. The commit is not one before its folder has its final name."""
    content = {
        "format": FORMAT,
        "state": commit.state.to_json(),
        "attempt": commit.attempt,
        "world_size": commit.world_size,
        "identity": commit.identity,
        "code": commit.code,
        "loss": commit.loss.hex(),  # two decimal texts may be the same number, and then a flipped bit is not seen
        "time": commit.time,
        "layout": commit.layout,
        "files": commit.files,
        **({"wandb_id": commit.wandb_id} if commit.wandb_id is not None else {}),
    }
    write_file(commit.folder / MANIFEST, json.dumps(content | {"manifest_sha256": seal_of(content)}, indent=1).encode())


def newest_step(checkpoints: Path) -> int:
    """The newest step whose commit has an intact manifest and files of the right sizes; 0 for none."""
    return next((commit.state.step for folder in list_commits(checkpoints) if (commit := read_whole_commit(folder)) is not None), 0)


def newest_readable_commit(checkpoints: Path) -> Commit | None:
    """The newest commit whose manifest is whole; its other files are not looked at. None where there is none."""
    for folder in list_commits(checkpoints):
        try:
            return read_commit(folder)
        except ValueError:
            continue  # training falls back to an older one, too
    return None


def read_whole_commit(folder: PurePath) -> Commit | None:
    """The commit, if its manifest is intact and every file is there with its size; the files are not read."""
    try:
        commit = read_commit(folder)
        return commit if all(size_of(commit.files_folder / name) == known["bytes"] for name, known in commit.files.items()) else None
    except (ValueError, OSError):
        return None


def check_files(commit: Commit, names: Sequence[str]) -> list[str]:
    """Problems of some of a commit's files (missing, unreadable, size, SHA-256), each naming the file."""
    with VerifiedFiles(commit.files_folder, commit.files) as files:
        return files.problems(names)


def verify_commit(folder: PurePath) -> list[str]:
    """Every problem of one commit; empty when each byte is as it was committed. Reads every file; unpickles nothing."""
    try:
        commit = read_commit(folder)
    except ValueError as error:
        return [str(error)]
    stray = sorted(set(names_in(commit.files_folder)) - set(commit.files) - {MANIFEST})
    return check_files(commit, sorted(commit.files)) + [f"{commit.files_folder / name}: not in the manifest" for name in stray]


def is_committed(checkpoints: Path, step: int) -> bool:
    """Whether a step is committed and every byte of it verifies."""
    folder = commit_folder_of(checkpoints, step)
    return is_commit(folder) and not verify_commit(folder)


def seal_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
