"""A build that is killed at an exact point, and a disk that is full: every point between two changes to the disk can be tried.

In: a case. Out: whether what stands under a final name is whole, and whether the next start ends with the undisturbed bytes.
"""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.data_section import DataSection
from tests.faults.builds import Ended, build_here, count_committed, differences, snapshot
from tests.faults.campaign import Case, Outcome
from tests.faults.corpora import NEAR, describe_build, write_corpora

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MOST_DRAWS = 20
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
VARIANTS: tuple[dict[str, Any], ...] = ({}, {"deduplicate": NEAR}, {"held_out_fraction": 1e-9})
"""The last one leaves a split empty by chance, so that a unit is made a second time."""


@dataclass(frozen=True)
class Undisturbed:
    """A build that nothing happened to."""

    files: dict[str, str]
    """Its files by their hashes."""
    num_points: int
    """How often it changed something on the disk."""
    whole: frozenset[tuple[str, str]]
    """Names and hashes of all that ever lies under a final name, also of what is replaced or removed again."""
    sizes: dict[str, int]
    """The largest of these of each sort (what a name is without its digits), in bytes."""


@dataclass(frozen=True)
class Prepared:
    """The corpora, and an undisturbed build of each variant."""

    corpora: Path
    undisturbed: tuple[Undisturbed, ...]


def prepare(folder: Path, chosen: random.Random) -> Prepared:
    """Write the corpora, and build each variant as far as its manifest, and to its end."""
    corpora = write_corpora(folder / "corpora", chosen)
    return Prepared(corpora, tuple(_measure(_describe(corpora, folder / f"reference-{n}", n)) for n in range(len(VARIANTS))))


def kill_at_points(case: Case) -> Outcome:
    """Kill a build just before its n-th change to the disk, some a second time, then let it end."""
    variant = case.number % len(VARIANTS)
    undisturbed = case.prepared.undisturbed[variant]
    data = _describe(case.prepared.corpora, case.folder / "d", variant)
    root = Path(data.folder())
    problems: list[str] = []
    points = [case.chosen.randrange(undisturbed.num_points)]
    if case.number % 2:
        points.append(case.chosen.randrange(undisturbed.num_points))
    num_killed = 0
    for point in points:
        ended = build_here(data, before=lambda point=point: kill_at(point))
        if ended.status != -signal.SIGKILL:  # a second start has less to do
            problems += [] if ended.status == 0 else [f"killed at {points}: {ended}"]
            continue
        num_killed += 1
        problems += [f"killed at {points}: {one}" for one in partial_files(root, undisturbed)]
    num_committed = count_committed(root)
    ended = build_here(data)
    problems += [f"killed at {points}: {one}" for one in compare(data, ended, undisturbed.files)]
    if ended.result.get("outcome") == "built" and variant != 2 and ended.result["kept"] < num_committed:
        problems.append(f"killed at {points}: {num_committed} units were committed, {ended.result['kept']} were kept")
    return Outcome(num_killed, problems)


def fill_disk(case: Case) -> Outcome:
    """From some moment on no file may grow beyond a bound: the build says so, leaves nothing partial, and then continues."""
    variant = case.number % len(VARIANTS)
    undisturbed = case.prepared.undisturbed[variant]
    data = _describe(case.prepared.corpora, case.folder / "d", variant)
    root = Path(data.folder())
    for _ in range(MOST_DRAWS):
        bound = case.chosen.randrange(1, case.chosen.choice(sorted(undisturbed.sizes.values())))
        point = case.chosen.choice((0, case.chosen.randrange(undisturbed.num_points)))
        ended = build_here(data, before=lambda bound=bound, point=point: _limit_files_at(point, bound))
        if ended.status != 0:
            break
        shutil.rmtree(root)  # all that was still to be written was smaller
    problems: list[str] = []
    if ended.status != 2 or "no room left to write" not in ended.refusal or "start the same command again" not in ended.refusal:
        problems.append(str(ended))
    if (root / "manifest.json").exists() and "manifest.json" not in dict(final_files(root) & undisturbed.whole):
        problems.append("there is a partial manifest")
    problems += partial_files(root, undisturbed)
    problems += compare(data, build_here(data), undisturbed.files)
    return Outcome(1, [f"from change {point} on at most {bound} bytes: {problem}" for problem in problems])


def partial_files(root: Path, undisturbed: Undisturbed) -> list[str]:
    """Files under a final name that are not those of the undisturbed build."""
    return [f"{name} is not whole" for name in sorted(dict(final_files(root) - undisturbed.whole))]


def final_files(root: Path) -> frozenset[tuple[str, str]]:
    """Names and hashes of what lies under a final name."""
    return frozenset((name, digest) for name, digest in snapshot(root).items() if not is_temporary(name))


def compare(data: DataSection, ended: Ended, wanted: dict[str, str]) -> list[str]:
    """What is wrong with a build that should have ended well."""
    return [f"it ended with {ended}"] if ended.status != 0 else differences(snapshot(Path(data.folder())), wanted)


def is_temporary(name: str) -> bool:
    """Whether a path lies below a name that is not final."""
    return any(part.startswith(".") for part in Path(name).parts)


def kill_at(point: int) -> None:
    """Kill this process just before its change to the disk of this number; to be called in a child."""
    at_points(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == point else None)


def at_points(reach: Callable[[int], None]) -> None:
    """Call `reach` with 0, 1, 2 ... just before each change of this process to the disk, from now on; there is no way back."""
    number = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        is_change = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING)
        if is_change:
            reach(number)
            number += 1

    sys.addaudithook(hook)


def _limit_files_at(point: int, num_bytes: int) -> None:
    """Let no file of this process grow beyond a size, from its change to the disk of this number on; to be called in a child."""

    def reach(number: int) -> None:
        if number == point:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

    at_points(reach)


def _describe(corpora: Path, root: Path, variant: int) -> DataSection:
    return describe_build(corpora, root, workers=1, **VARIANTS[variant])


def _measure(data: DataSection) -> Undisturbed:
    root = Path(data.folder())
    whole: set[tuple[str, str]] = set()
    sizes: dict[str, int] = {}
    for ending in ("-stale", "/manifest.json"):
        ended = build_here(data, before=lambda ending=ending: stop_before_rename(ending))
        if ended.status == -signal.SIGKILL:
            whole |= final_files(root)
            sizes |= _largest_sizes(root)
        shutil.rmtree(root)
    ended = build_here(data, before=_tell_points)
    assert ended.status == 0 and sizes, f"the undisturbed build failed: {ended}"
    whole |= {(str(Path(line["removed"]).relative_to(root)), line["sha256"]) for line in ended.lines if "removed" in line}
    num_points = sum("point" in line for line in ended.lines)
    return Undisturbed(snapshot(root), num_points, frozenset(whole | final_files(root)), sizes | _largest_sizes(root))


def _largest_sizes(root: Path) -> dict[str, int]:
    """The largest file of each sort that has more than a byte."""
    sizes: dict[str, int] = {}
    for path in root.rglob("*"):
        if path.is_file() and (size := path.stat().st_size) > 1:
            sort = re.sub("[0-9]+", "", path.relative_to(root).as_posix())
            sizes[sort] = max(size, sizes.get(sort, 0))
    return sizes


def _tell_points() -> None:
    """Say a line for every change of this process to the disk, and what is removed on the way; to be called in a child."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = Path(str(arguments[0])) if event == "os.remove" else Path()
        if path.is_absolute() and path.is_file() and not path.name.startswith("."):
            print(json.dumps({"removed": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}), flush=True)

    at_points(lambda number: print(json.dumps({"point": number}), flush=True))
    sys.addaudithook(hook)


def stop_before_rename(ending: str) -> None:
    """Kill this process just before something gets a name that ends so; to be called in a child."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).endswith(ending):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
