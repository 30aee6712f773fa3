"""The fault campaign of checkpoints: what is damaged is found before any of it is used, and a full disk costs a save, not the run.

    python -m tests.faults.damage [--sample SHARE] [--seed N] [--json] [--kind KIND ...] [--case NUMBER ...]

Out: for each kind of fault a line (or an object of JSON) with how many were tried, how many ended as promised, and the seed. Exit status 1
if anything did not. The commits are those of a real run of two ranks; of each kind of file in them, bits flip, ends are cut off, files
vanish and change places.
"""

import functools
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as distributed

from pretrain.checkpoint.commit import newest_that_loads
from pretrain.checkpoint.index import FragmentIndex
from pretrain.checkpoint.places import Place
from pretrain.checkpoint.verify import MANIFEST, Commit, list_commits, read_commit, verify_commit
from tests.conftest import run_on_ranks
from tests.faults.campaign import Case, Kind, Outcome, run_campaign
from tests.faults.flips import flip
from tests.tiny import write_tiny_dataset

FLIPS, CUTS, DELETIONS, SWAPS = 50, 3, 1, 1
"""Of a case."""
DISKS_PER_CASE = 5
LIMIT_SECONDS = 300
OVERRIDES = {
    "training__total_tokens": "2048",
    "checkpoint__every_steps": "2",
    "checkpoint__keep": "9",
    "checkpoint__self_test": "false",
    "evaluate__every_steps": "null",
}
"""Eight steps, four saves."""
Files = dict[str, bytes]
Tensors = dict[tuple[str, str], torch.Tensor]


class Prepared(NamedTuple):
    """A run's commits, and what the newest and the one before it hold."""

    checkpoints: Path
    known: dict[str, Tensors]


@functools.cache
def committed_files() -> Files:
    """The last two commits of a run of two ranks, by path."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_dataset(folder / "data")
        arguments = {"dataset": str(folder / "data"), "runs": str(folder / "runs"), "cases": {"whole": OVERRIDES}}
        run_on_ranks("tests.training:train_runs", 2, arguments, LIMIT_SECONDS, folder)
        checkpoints = folder / "runs" / "whole" / "checkpoints"
        kept = [path for commit in list_commits(checkpoints)[:2] for path in commit.iterdir()]
        return {str(path.relative_to(checkpoints)): path.read_bytes() for path in sorted(kept)}


def prepare(folder: Path, chosen: random.Random) -> Prepared:
    """Lay out the two commits, and join a world of one rank."""
    for name, content in committed_files().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return Prepared(folder, {commit.name: read_all(read_commit(commit)) for commit in list_commits(folder)})


def read_all(commit: Commit) -> Tensors:
    """All that a resumed run takes of a commit, read in the way it does."""
    with FragmentIndex(commit) as index:
        for rank in range(commit.world_size):
            index.description(rank)
        return {(kind, name): index.read_whole(kind, name) for name in index.shapes for kind in sorted(index.kinds(name))}


def damage(case: Case, pattern: str) -> Outcome:
    """Damage files that match, one way after the other."""
    prepared: Prepared = case.prepared
    newest, older = list_commits(prepared.checkpoints)
    ways: list[Callable[[], str]] = [functools.partial(_flip, newest, pattern, case.chosen)] * FLIPS
    ways += [functools.partial(_cut, newest, pattern, case.chosen)] * CUTS
    ways += [functools.partial(_delete, newest, pattern, case.chosen)] * DELETIONS
    ways += [functools.partial(_swap, newest, older, pattern, case.chosen)] * SWAPS
    whole, problems = _content(newest) | _content(older), list[str]()
    for way in ways:
        told = way()
        try:
            problems += [f"{told}: {problem}" for problem in judge(prepared, newest, older)]
        finally:
            for path, content in whole.items():
                if not path.is_file() or path.read_bytes() != content:
                    path.write_bytes(content)
    return Outcome(len(ways), problems, passed=None if not problems else len(ways) - len({one.split(": ")[0] for one in problems}))


def _choose(commit: Path, pattern: str, chosen: random.Random) -> Path:
    return chosen.choice(sorted(commit.glob(pattern)))


def _flip(commit: Path, pattern: str, chosen: random.Random) -> str:
    path = _choose(commit, pattern, chosen)
    content = path.read_bytes()
    place = chosen.randrange(8 * len(content))
    path.write_bytes(flip(content, place))
    return f"bit {place} of {path.name}"


def _cut(commit: Path, pattern: str, chosen: random.Random) -> str:
    path = _choose(commit, pattern, chosen)
    content = path.read_bytes()
    end = chosen.randrange(len(content))
    path.write_bytes(content[:end])
    return f"{path.name} cut to {end} bytes"


def _delete(commit: Path, pattern: str, chosen: random.Random) -> str:
    path = _choose(commit, pattern, chosen)
    path.unlink()
    return f"{path.name} deleted"


def _swap(newest: Path, older: Path, pattern: str, chosen: random.Random) -> str:
    """With another rank's, or with that of the commit before, which stays as it is."""
    path = _choose(newest, pattern, chosen)
    others = [other for other in sorted(newest.glob(pattern)) if other != path]
    other = chosen.choice([older / path.name, *others])
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    if other.parent == newest:
        other.write_bytes(content)
    return f"{path.name} changed for {other.parent.name}/{other.name}"


def _content(commit: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(commit.iterdir())}


def judge(prepared: Prepared, newest: Path, older: Path) -> list[str]:
    """What is not as promised of a newest commit that is damaged. It stands under its own name again afterwards."""
    whole = {path.name: committed_files()[f"{newest.name}/{path.name}"] for path in map(Path, _names(newest))}
    damaged = _content(newest)
    wrong = [name for name, content in whole.items() if damaged.get(newest / name) != content]
    problems, said, given = list[str](), list[str](), list[str]()
    found = verify_commit(newest)
    # Of another commit's manifest the seal is right: then it is the files that are not its own.
    blamed = sorted(set(whole) - {MANIFEST}) if wrong == [MANIFEST] and _is_older_manifest(damaged, newest, older) else wrong
    if [problem.split(": ")[0] for problem in found] != [str(newest / name) for name in blamed]:
        problems.append(f"verification says {found}, wanted {blamed}")

    def load(commit: Commit) -> None:
        for key, tensor in read_all(commit).items():
            if not torch.equal(tensor.view(torch.uint8), prepared.known[commit.folder.name][key].view(torch.uint8)):
                given.append(f"{commit.folder.name} gives out another {key[0]} of {key[1]}")

    chosen = newest_that_loads([Place(prepared.checkpoints)], load, said.append)
    problems += given
    if chosen is None or chosen.folder != older:
        problems.append(f"taken was {chosen and chosen.folder.name}")
    aside = prepared.checkpoints / "rejected" / newest.name
    if not aside.is_dir():
        return [*problems, "it was not moved aside"]
    if {path.name: content for path, content in _content(aside).items()} != {path.name: content for path, content in damaged.items()}:
        problems.append("moved aside it is not what it was")
    if len(said) != 1 or not any(name in said[0] for name in blamed) or newest.name not in said[0]:
        problems.append(f"said was {said}, wanted one of {blamed}")
    aside.rename(newest)
    return problems


def _names(commit: Path) -> list[str]:
    return [name for name in committed_files() if name.startswith(f"{commit.name}/")]


def _is_older_manifest(damaged: dict[Path, bytes], newest: Path, older: Path) -> bool:
    return damaged.get(newest / MANIFEST) == committed_files()[f"{older.name}/{MANIFEST}"]


def write_dataset(folder: Path, chosen: random.Random) -> Path:
    """What the trainings learn from."""
    write_tiny_dataset(folder / "data", seed=chosen.randrange(2**31))
    return folder / "data"


def fill_disks(case: Case) -> Outcome:
    """Saves of five runs find the disk full at some byte."""
    runs = {f"full-{number}": choose_disk(case.chosen, number) for number in range(DISKS_PER_CASE)}
    arguments = {"dataset": str(case.prepared), "runs": str(case.folder / "runs"), "overrides": OVERRIDES, "cases": runs}
    try:
        ranks = run_on_ranks("tests.faults.full_disk:train_on_full_disks", 2, arguments, LIMIT_SECONDS, case.folder)
    except pytest.fail.Exception as failure:
        return Outcome(DISKS_PER_CASE, [str(failure)], passed=0)
    problems = {name: judge_disk(one, [rank[name] for rank in ranks], ranks[0]["undisturbed"]) for name, one in runs.items()}
    told = [f"{name}: {'; '.join(found)} ({runs[name]})" for name, found in problems.items() if found]
    return Outcome(len(runs), told, passed=len(runs) - len(told))


def choose_disk(chosen: random.Random, number: int) -> dict[str, Any]:
    """Which saves fail, on which ranks, at which part of which file. The first of five is full for three saves in a row."""
    saves = [1, 2, 3] if number == 0 else chosen.choice(([1], [2], [3], [1, 2], [2, 3], [1, 3]))
    of = MANIFEST if number == 1 else "tensors"
    return {"saves": saves, "ranks": [0] if of == MANIFEST else chosen.choice(([0], [1], [0, 1])), "of": of, "share": chosen.random()}


def judge_disk(tried: dict[str, Any], ranks: list[dict[str, Any]], undisturbed: dict[str, Any]) -> list[str]:
    """What is not as promised."""
    first, problems, three = ranks[0], list[str](), tried["saves"] == [1, 2, 3]
    whole = {f"step-0000000{2 * save}": [] for save in (1, 2, 3, 4)}
    commits = [{name: [] for name in whole if int(name[-1]) // 2 not in tried["saves"] and not three}, *([whole] if three else [])]
    if undisturbed["ended"] != ["done"] or undisturbed["commits"] != [whole] or any("WARNING" in text for text in undisturbed["said"]):
        problems.append(f"the undisturbed run: {undisturbed}")
    if first["hash"] != undisturbed["hash"]:
        problems.append("it ends with other bits than the undisturbed run")
    if any(rank["commits"] != commits or rank["left"] for rank in ranks):
        problems.append(f"commits are {[(rank['commits'], rank['left']) for rank in ranks]}, wanted {commits}")
    for rank in ranks:
        warned = [text for text in rank["said"] if "could not be saved" in text and "File too large" in text and "WARNING" in text]
        failed = [f"step {2 * save} could not be saved" for save in tried["saves"][: 2 if three else None]]
        if len(warned) != len(failed) or not all(words in text for words, text in zip(failed, warned, strict=False)):
            problems.append(f"said {rank['said']}, wanted {failed}")
        if rank["ended"][-1] != "done" or len(rank["ended"]) != (2 if three else 1):
            problems.append(f"ended {rank['ended']}")
        if three and "3 saves in a row failed" not in rank["ended"][0]:
            problems.append(f"ended {rank['ended']}")
    return problems


FAULTS = FLIPS + CUTS + DELETIONS + SWAPS
KINDS = {
    kind.name: kind
    for kind in (
        Kind("damaged_tensors", 20, FAULTS, prepare, functools.partial(damage, pattern="rank_*.safetensors")),
        Kind("damaged_descriptions", 20, FAULTS, prepare, functools.partial(damage, pattern="rank_*.json")),
        Kind("damaged_manifests", 20, FAULTS, prepare, functools.partial(damage, pattern=MANIFEST)),
        Kind("full_disks", 10, DISKS_PER_CASE, write_dataset, fill_disks),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kinds that are asked for; the exit status."""
    return run_campaign("damage", __doc__, KINDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
