"""The commit: whole and verified, or not there; whatever happens to the disk, to a rank, or to the process that writes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as distributed

from configs.errors import UserError
from pretrain.checkpoint.arena import Answer
from pretrain.checkpoint.commit import Saves, reject_commit
from pretrain.checkpoint.places import Place
from pretrain.checkpoint.verify import FORMAT, MANIFEST, check_files, list_commits, read_commit, seal_of, verify_commit
from pretrain.state import TrainState
from tests.pretrain.checkpoint.on_ranks import IDENTITY, KILL_POINTS, flip_bit, newest_verified_commit, rank_files, save, tree

ROOT = Path(__file__).parents[3]
FILES = ("rank_00000.safetensors", "rank_00000.json", "rank_00001.safetensors", "rank_00001.json")


@pytest.fixture(scope="module")
def _alone() -> Iterator[None]:
    """A world of one rank: no sockets, no other process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def write_both(folder: Path, step: int = 10) -> dict[str, Any]:
    return rank_files(folder, step, 0) | rank_files(folder, step, 1)


@pytest.fixture
def commit(tmp_path: Path, _alone: None) -> Path:
    """A commit with the files of two ranks."""
    checkpoints = tmp_path / "checkpoints"
    assert save(checkpoints, 10, write_both) is None
    return checkpoints / "step-00000010"


def test_the_newest_is_the_highest_step(tmp_path: Path) -> None:
    """Not the youngest folder, not the last name; what is no commit is not listed."""
    names = ["step-100000000", "step-00000200", "step-00000100", "step-00000099", "step-00000000"]
    for name in reversed(names):
        (tmp_path / name).mkdir()
    for number, name in enumerate(names):
        os.utime(tmp_path / name, (number, number))
    others = ("rejected", ".tmp-step-00000300-attempt-1", "step-300", "step-00000300.1", "xstep-00000300", "step-0000030x", "step--0000300")
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000400").write_text("a file is no commit")
    assert [path.name for path in list_commits(tmp_path)] == names
    assert list_commits(tmp_path / "nowhere") == []


def test_what_was_committed_is_what_is_read(commit: Path) -> None:
    read = read_commit(commit)
    assert read.state == TrainState(10, 40, 10240, 0)
    assert (read.identity, read.attempt, read.world_size, read.folder) == (IDENTITY, 1, 1, commit)
    assert sorted(read.files) == sorted(FILES)
    assert verify_commit(commit) == []
    assert sorted(path.name for path in commit.iterdir()) == sorted([*FILES, MANIFEST])
    assert [path.name for path in commit.parent.iterdir()] == [commit.name]


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_of_a_file_is_found_and_named(commit: Path, seed: int, name: str) -> None:
    chooser, path = random.Random(seed), commit / name
    last = path.stat().st_size * 8 - 1
    for bit in (0, last, *(chooser.randrange(last) for _ in range(100))):
        flip_bit(path, bit)
        assert verify_commit(commit) == [f"{path}: its SHA-256 is not the manifest's (block 0)"], bit
        flip_bit(path, bit)
    assert verify_commit(commit) == []


def test_every_flipped_bit_of_the_manifest_is_found_and_named(commit: Path) -> None:
    """All of them, one after the other."""
    path = commit / MANIFEST
    whole = path.read_bytes()
    assert len(whole) > 900
    trusted = []
    for bit in range(len(whole) * 8):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            read_commit(commit)
            trusted.append(bit)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
    assert trusted == []
    (problem,) = verify_commit(commit)
    assert problem.startswith(f"{path}: ")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"[1]", b"null", b"7", b'"text"', b"\xff\xfe", b'{"manifest_sha256": null}'], ids=repr
)
def test_a_manifest_that_is_something_else_is_a_problem_not_a_crash(commit: Path, content: bytes) -> None:
    (commit / MANIFEST).write_bytes(content)
    (problem,) = verify_commit(commit)
    assert problem.startswith(f"{commit / MANIFEST}: ")


def reseal(commit: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write another manifest, whose seal is right: not what chance makes of one, but somebody."""
    content = json.loads((commit / MANIFEST).read_text())
    del content["manifest_sha256"]
    change(content)
    (commit / MANIFEST).write_text(json.dumps(content | {"manifest_sha256": seal_of(content)}))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "rank_0.json", "rank_00000.pt", "rank_00000.json/.."])
def test_a_name_that_no_rank_writes_is_found_though_the_seal_is_right(commit: Path, name: str) -> None:
    reseal(commit, lambda content: content["files"].update({name: content["files"]["rank_00000.json"]}))
    (problem,) = verify_commit(commit)
    assert problem.startswith(f"{commit / MANIFEST}: is not as it is written")
    assert repr(name) in problem


def test_a_manifest_of_another_format_is_not_judged(commit: Path) -> None:
    """It is no damage, so that nothing is moved aside: another version reads it."""
    reseal(commit, lambda content: content.update(format=FORMAT + 1))
    with pytest.raises(UserError, match=rf"written in format {FORMAT + 1}, this version reads {FORMAT}"):
        read_commit(commit)
    with pytest.raises(UserError, match="use the version that wrote it"):
        newest_verified_commit(commit.parent, pytest.fail)
    assert [path.name for path in commit.parent.iterdir()] == [commit.name]


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_truncation_anywhere_growth_and_deletion_are_found_and_named(commit: Path, seed: int, name: str) -> None:
    path, chooser = commit / name, random.Random(seed)
    whole = path.read_bytes()
    for end in (0, 1, len(whole) - 1, *(chooser.randrange(len(whole)) for _ in range(20))):
        path.write_bytes(whole[:end])
        (problem,) = verify_commit(commit)
        assert problem.startswith(f"{path}: ")
        if name != MANIFEST:
            assert problem.endswith(f"{end} bytes, the manifest says 5000")
    path.write_bytes(whole + b"x")
    assert [problem.startswith(f"{path}: ") for problem in verify_commit(commit)] == [True]
    path.unlink()
    (problem,) = verify_commit(commit)
    assert problem.startswith(f"{path}: ")
    assert "missing" in problem or "FileNotFoundError" in problem
    path.mkdir()  # a folder in its place
    assert verify_commit(commit)[0].startswith(f"{path}: ")


def test_a_stray_file_is_found_and_named(commit: Path) -> None:
    for name in ("rank_00002.json", ".hidden"):
        (commit / name).touch()
    (commit / "folder").mkdir()
    assert verify_commit(commit) == [f"{commit / name}: not in the manifest" for name in (".hidden", "folder", "rank_00002.json")]


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_the_swapped_files_of_two_ranks_are_found_and_named(commit: Path, suffix: str) -> None:
    """Of equal size, each intact: only the names are wrong."""
    one, two = commit / f"rank_00000.{suffix}", commit / f"rank_00001.{suffix}"
    assert one.stat().st_size == two.stat().st_size
    one.rename(commit / "aside")
    two.rename(one)
    (commit / "aside").rename(two)
    assert verify_commit(commit) == [f"{path}: its SHA-256 is not the manifest's (block 0)" for path in (one, two)]


def test_the_manifest_of_another_commit_is_found(commit: Path) -> None:
    assert save(commit.parent, 20, lambda folder: write_both(folder, 20)) is None
    shutil.copy(commit.parent / "step-00000020" / MANIFEST, commit / MANIFEST)
    assert [problem.split(": ")[0] for problem in verify_commit(commit)] == [str(commit / name) for name in sorted(FILES)]


def test_each_rank_checks_what_it_is_asked_to(commit: Path) -> None:
    for name in FILES:
        flip_bit(commit / name, 3)
    read = read_commit(commit)
    assert [problem.split(": ")[0] for problem in check_files(read, FILES[1:3])] == [str(commit / name) for name in FILES[1:3]]


def test_a_damaged_newest_gives_way_to_the_older_one(commit: Path) -> None:
    assert save(commit.parent, 20, lambda folder: write_both(folder, 20)) is None
    newest = commit.parent / "step-00000020"
    flip_bit(newest / FILES[2], 999)
    before, said = tree(newest), []
    found = newest_verified_commit(commit.parent, said.append)
    assert found is not None
    assert found.folder == commit
    assert tree(commit.parent / "rejected" / newest.name) == before, "moved aside as it was, never deleted"
    (text,) = said
    assert newest.name in text
    assert FILES[2] in text
    assert "rejected" in text
    assert newest_verified_commit(commit.parent, pytest.fail) == found


def test_what_is_rejected_never_replaces_what_was_rejected_before(commit: Path) -> None:
    checkpoints = commit.parent
    kept = [tree(commit)]
    targets = [reject_commit(commit)]
    for attempt in (2, 3):
        assert save(checkpoints, 10, write_both, attempt=attempt) is None
        kept.append(tree(commit))
        targets.append(reject_commit(commit))
    assert [target.name for target in targets] == ["step-00000010", "step-00000010.1", "step-00000010.2"]
    assert [tree(target) for target in targets] == kept


@pytest.mark.usefixtures("_alone")
def test_the_lease_is_asked_last_when_everything_is_written(tmp_path: Path) -> None:
    """A stalled attempt that wakes up between its files and the rename must still be refused."""
    events: list[str] = []

    def still_ours() -> bool:
        (temporary,) = tmp_path.glob("checkpoints/.tmp-*")
        events.append(f"asked with {len(list(temporary.iterdir()))} files")
        return False

    def start_writing(folder: Path) -> Callable[[bool], Answer]:
        files = write_both(folder)
        return lambda wait: Answer(files, None)

    place = Place(tmp_path / "checkpoints")
    saves = Saves([place], 4, still_ours)
    saves.begin(place, start_writing, state=TrainState(step=10), identity=IDENTITY, code={}, loss=1.5)
    with pytest.raises(UserError, match="attempt 4 no longer holds"):
        saves.settle()
    assert events == ["asked with 5 files"]
    assert tree(tmp_path) == {"checkpoints": "a folder"}


@pytest.mark.usefixtures("_alone")
def test_leftovers_of_killed_attempts_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for name in (".tmp-step-00000005-attempt-1", ".tmp-step-00000010-attempt-1", ".tmp-old-step-00000001", "rejected", "notes"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "file").write_text("x")
    assert save(checkpoints, 10, write_both) is None
    assert sorted(path.name for path in checkpoints.iterdir()) == ["notes", "rejected", "step-00000010"]


@pytest.mark.usefixtures("_alone")
def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file stands where the folder should")
    assert "checkpoints" in (save(tmp_path / "checkpoints", 10, write_both) or "")
    assert (tmp_path / "checkpoints").read_text() == "a file stands where the folder should"


def test_two_ranks_commit_fail_and_recover_together(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    one, two = run_on_ranks("tests.pretrain.checkpoint.on_ranks:commit_together", 2, {"folder": str(tmp_path)})
    for case in one.keys() - {"nothing", "intact"}:
        said = {"said": None}
        assert (one[case] | said if isinstance(one[case], dict) else one[case]) == (
            two[case] | said if isinstance(two[case], dict) else two[case]
        ), f"{case}: the ranks disagree"

    assert one["nothing"] == two["nothing"] == {"name": None, "said": [], "tree": {}}
    assert one["committed"] == [None, None]
    whole = one["after commits"]
    steps = ("step-00000010", "step-00000020")
    assert whole.keys() == {f"checkpoints/{step}/{name}" for step in steps for name in (*FILES, MANIFEST)}
    assert one["intact"] == two["intact"] == {"name": "step-00000020", "said": [], "tree": whole}

    wanted = {
        "rank 1 fails": ["rank 1: [Errno 28] no space on rank 1"],
        "both fail": ["rank 0: [Errno 28] no space on rank 0", "; rank 1: [Errno 28] no space on rank 1"],
        "a real limit": ["rank 1: [Errno 27] File too large"],
        "lease lost": ["attempt 1 no longer holds"],
        "lease lost, as rank 0 sees it": ["attempt 1 no longer holds"],
        "step 20 again": ["step-00000020"],
    }
    for case, words in wanted.items():
        assert all(word in one[case]["problem"] for word in words), (case, one[case]["problem"])
        assert one[case]["tree"] == whole, f"{case}: something was left behind or changed"
    assert "rank 0" not in one["rank 1 fails"]["problem"]
    assert one["lease as rank 1 sees it"]["problem"] is None, "rank 0 asks, once, for all"
    with_30 = one["lease as rank 1 sees it"]["tree"]

    def rejected(files: dict[str, str], *which: str) -> set[str]:
        return {name.replace("checkpoints/", "checkpoints/rejected/") if name.split("/")[1] in which else name for name in files}

    first = one["a bit of rank 1's file"]
    assert first["name"] == "step-00000020"
    assert first["tree"].keys() == rejected(with_30, "step-00000030")
    assert len(first["said"]) == 1
    assert "rank_00001.safetensors" in first["said"][0]
    assert two["a bit of rank 1's file"]["said"] == [], "one voice"
    second = one["no manifest"]
    assert second["name"] == "step-00000010"
    assert second["tree"].keys() == rejected(with_30, "step-00000030", "step-00000020") - {f"checkpoints/rejected/step-00000020/{MANIFEST}"}
    last = one["all damaged"]
    assert last["name"].startswith("UserError: ")
    assert "(3 lie in" in last["name"]
    assert "nothing was deleted" in last["name"]
    assert last["tree"].keys() == {name.replace("/step-00000010", "/rejected/step-00000010") for name in second["tree"]}
    assert one["all damaged, asked again"]["name"] == last["name"], "it does not start from nothing the next time either"
    assert one["all damaged, asked again"]["tree"] == last["tree"]


def run_killed(*arguments: str) -> list[dict[str, Any]]:
    """The rows that a parent of killed ranks printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.pretrain.checkpoint.on_ranks", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_at_each_point_there_is_the_old_commit_or_the_new_one(tmp_path: Path) -> None:
    rows = {row.pop("point"): row for row in run_killed("points", str(tmp_path))}
    assert rows.keys() == KILL_POINTS.keys()
    for point, committed in KILL_POINTS.items():
        row = rows[point]
        assert row["status"] == -signal.SIGKILL, (point, "the kill point was never reached")
        commits = ["step-00000010", "step-00000020"] if committed else ["step-00000010"]
        temporary = [] if committed else [".tmp-step-00000020-attempt-2"]
        assert row["left"] == temporary + commits, point
        assert row["problems"] == {name: [] for name in commits}, point
        assert row["resumed"] == (20 if committed else 10), point
        assert row["after"] == [*commits, "step-00000030"], (point, "the next save clears what the kill left")


def test_killed_at_any_moment_nothing_that_was_promised_is_lost(tmp_path: Path, seed: int) -> None:
    """Commits and retention in a loop, SIGKILL at a random moment, ten times in one folder."""
    *rows, last = run_killed("random", str(tmp_path), str(seed), "10")
    number = 2  # are kept; a kill between a commit and the removal of older ones leaves one more
    for row in rows:
        assert row["damaged"] == []
        assert row["finished"] <= row["newest"] <= row["finished"] + 1, "a commit that was told is there; at most the next one too"
        assert row["number"] <= number + 1
        number = max(2, row["number"])
    assert last == {"rejected": False}
    assert [row["newest"] for row in rows] == sorted(row["newest"] for row in rows)
    assert rows[-1]["newest"] > 2, "hardly anything was committed: the kills came too early"
