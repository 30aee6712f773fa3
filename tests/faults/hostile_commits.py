"""Commits made by an enemy: whole by their own hashes, and read without running, following or waiting for anything.

In: a case's chance. Out: what did not end in a refusal that names the file. Each case is read in a process of its own, under a time limit,
which tells of every file that it opens outside the commit.
"""

import json
import multiprocessing
import os
import pickle
import random
import resource
import struct
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from configs.errors import UserError
from pretrain.checkpoint.blocks import BLOCK_BYTES, DamageError, FileRecord, write_blocks
from pretrain.checkpoint.verify import MANIFEST, Commit, read_commit, seal_of, verify_commit, write_manifest
from pretrain.state import TrainState
from tests.faults.campaign import Case, Outcome

TENSORS, ABOUT = "rank_00000.safetensors", "rank_00000.json"
SECONDS = 20
MOST_MEMORY_BYTES = 4 << 30
"""More than torch takes and a tiny commit could need."""


class Payload:
    """Unpickled, it would leave a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def write_commit_files(folder: Path) -> None:
    """A commit of one rank and one parameter, as training writes it."""
    folder.mkdir(parents=True)
    tensors = {"weight|w|0": np.arange(6, dtype=np.float32), "exp_avg|w|0": np.ones(6, dtype=np.float32)}
    about = {
        "parameters": {"w": {"shape": [2, 3], "scalars": {"step": 1.0}}},
        "buffers": {},
        "loss_scale": {},
        "groups": [{"betas": [0.9, 0.95]}],
    }
    content = save(tensors)
    length = struct.unpack("<Q", content[:8])[0]
    (folder / TENSORS).write_bytes(content)
    (folder / ABOUT).write_text(json.dumps(about | {"header_bytes": 8 + length, "tensors": json.loads(content[8 : 8 + length])}))
    seal(folder)


def seal(folder: Path) -> None:
    """A manifest that fits what is there now."""
    files: dict[str, FileRecord] = {}
    for name in (TENSORS, ABOUT):
        content = (folder / name).read_bytes()
        blocks = [content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES)]
        scratch = folder.parent / "scratch"
        files[name] = write_blocks(scratch, blocks)
        scratch.unlink()
    write_manifest(Commit(folder, TrainState(10, 40, 1000, 0), files, {}, {}, 1, 1, 2.5, 1_700_000_000))


def seal_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and make its seal fit again."""
    content = json.loads((folder / MANIFEST).read_bytes())
    del content["manifest_sha256"]
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content | {"manifest_sha256": seal_of(content)}))


# --- what is done to a commit: each gets the commit's folder, one outside, and chance ------------------------


def pickled(name: str) -> Callable[[Path, Path, random.Random], None]:
    def change(folder: Path, outside: Path, chosen: random.Random) -> None:
        (folder / name).write_bytes(pickle.dumps(Payload(outside / "executed"), protocol=chosen.choice((0, 2, 4))))
        if name != MANIFEST:
            seal(folder)

    return change


def linked(name: str, target: str) -> Callable[[Path, Path, random.Random], None]:
    """The file is a link: to the same bytes elsewhere (then every hash fits), to one without an end, to nowhere."""

    def change(folder: Path, outside: Path, chosen: random.Random) -> None:
        copy = outside / name
        copy.write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to(copy if target == "copy" else target)

    return change


def pipe(name: str) -> Callable[[Path, Path, random.Random], None]:
    def change(folder: Path, outside: Path, chosen: random.Random) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)
        if name != MANIFEST:
            seal_manifest(folder, lambda content: content["files"][name].update(bytes=0, sha256=[]))

    return change


def named(name: str) -> Callable[[Path, Path, random.Random], None]:
    """The manifest names a file outside the folder."""

    def change(folder: Path, outside: Path, chosen: random.Random) -> None:
        (outside / "secret").write_text("nobody's business")
        there = name.format(outside=outside)
        seal_manifest(folder, lambda content: content["files"].update({there: {"bytes": 17, "sha256": ["0" * 64]}}))

    return change


def header(length: int) -> Callable[[Path, Path, random.Random], None]:
    """The tensors are said to begin elsewhere."""

    def change(folder: Path, outside: Path, chosen: random.Random) -> None:
        about = json.loads((folder / ABOUT).read_text())
        (folder / ABOUT).write_text(json.dumps(about | {"header_bytes": length}))
        seal(folder)

    return change


def bomb(name: str, text: str) -> Callable[[Path, Path, random.Random], None]:
    """JSON that is nested, or says numbers, beyond all bounds."""

    def change(folder: Path, outside: Path, chosen: random.Random) -> None:
        (folder / name).write_text(text)
        if name != MANIFEST:
            seal(folder)

    return change


HOSTILE_VALUES = (None, True, -1, 0, 10**30, 1e308, "x", "../../x", [], {}, [[]], {"shape": None}, [-2, -3], "\0", float("nan"))


def wrong_value(name: str) -> Callable[[Path, Path, random.Random], None]:
    """One value of the JSON, somewhere, is another one."""

    def change(folder: Path, outside: Path, chosen: random.Random) -> None:
        def replace(content: Any) -> None:
            here = content
            while True:
                key = chosen.choice(list(here) if isinstance(here, dict) else range(len(here)))
                if not isinstance(here[key], dict | list) or not here[key] or chosen.random() < 0.3:
                    break
                here = here[key]
            here[key] = chosen.choice(HOSTILE_VALUES)

        if name == MANIFEST:
            seal_manifest(folder, replace)
            return
        about = json.loads((folder / name).read_bytes())
        replace(about)
        (folder / name).write_text(json.dumps(about))
        seal(folder)

    return change


NESTED, LONG = "[" * 200_000, '{"a": ' + "9" * 6000 + "}"
REFUSED: tuple[Callable[[Path, Path, random.Random], None], ...] = (
    *(pickled(name) for name in (TENSORS, ABOUT, MANIFEST)),
    *(linked(name, target) for name in (TENSORS, ABOUT, MANIFEST) for target in ("copy", "/dev/zero", "/nowhere", "/")),
    *(pipe(name) for name in (TENSORS, ABOUT, MANIFEST)),
    *(named(name) for name in ("../secret", "{outside}/secret", "rank_00000.json/../../secret", "..", "", "rank_00001.json\n")),
    *(header(length) for length in (2**64 - 1, 2**63, 10**9, -1)),
    *(bomb(name, text) for name in (ABOUT, MANIFEST) for text in (NESTED, LONG, "{}", "[]", "null")),
)
TAKEN_OR_REFUSED = tuple(wrong_value(name) for name in (ABOUT, MANIFEST) for _ in range(30))
"""Some of these values say what is possible."""
NUM_CASES = len(REFUSED) + len(TAKEN_OR_REFUSED)


def prepare_nothing(folder: Path, chosen: random.Random) -> None:
    """Every case has a commit of its own."""


def check_commit(case: Case) -> Outcome:
    """Write a commit, change it, read it in a process of its own."""
    folder, outside = case.folder / "step-00000010", case.folder / "outside"
    outside.mkdir()
    write_commit_files(folder)
    change = (*REFUSED, *TAKEN_OR_REFUSED)[case.number]
    change(folder, outside, case.chosen)
    context = multiprocessing.get_context("fork")
    told, telling = context.Pipe(duplex=False)
    reader = context.Process(target=_read, args=(folder, outside, telling))
    reader.start()
    answer = told.recv() if told.poll(SECONDS) else {"problems": [f"it was still being read after {SECONDS} s"]}
    reader.kill()
    reader.join(SECONDS)
    problems = list(answer["problems"])
    if case.number < len(REFUSED) and "refused" not in answer and not problems:
        problems.append("it was taken")
    if (outside / "executed").exists():
        problems.append("the pickle was executed")
    return Outcome(1, [f"{change.__qualname__.partition('.')[0]}: {problem}" for problem in problems])


def _read(folder: Path, outside: Path, telling: Connection) -> None:
    """In a child: verify the commit, open it, read it; tell what came of it."""
    from pretrain.checkpoint.index import FragmentIndex

    opened: list[str] = []
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[0])
            real = os.path.realpath(path)
            nofollow = isinstance(arguments[2], int) and arguments[2] & os.O_NOFOLLOW
            if (real == "/dev/zero" or Path(real).is_relative_to(outside)) and not nofollow:
                opened.append(path)

    sys.addaudithook(hook)
    answer: dict[str, Any] = {"problems": []}
    try:
        found = verify_commit(folder)
        if found:
            answer["refused"] = found[0]
        with FragmentIndex(read_commit(folder)) as index:
            for kind in sorted(index.kinds("w")):
                index.read(kind, "w", 0, 6)
    except (DamageError, UserError) as error:
        answer["refused"] = str(error)
    except BaseException as error:
        answer["problems"].append(f"{type(error).__name__}: {traceback.format_exc()[-600:]}")
    if "refused" in answer and str(folder) not in answer["refused"]:
        answer["problems"].append(f"the refusal names no file: {answer['refused']}")
    if opened:
        answer["problems"].append(f"files outside were opened: {sorted(set(opened))}")
    telling.send(answer)
    telling.close()
    os._exit(0)
