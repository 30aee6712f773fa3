"""Commits in an object store: the manifest, put last, is the commit; what is cut, damaged, stalled or not reached never counts as one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch.distributed as distributed

from configs.errors import UserError
from configs.loader import dump_config
from configs.schema import CheckpointSection
from pretrain.checkpoint import object_store
from pretrain.checkpoint.arena import Answer
from pretrain.checkpoint.commit import Saves
from pretrain.checkpoint.index import state_hash
from pretrain.checkpoint.places import Place, name_store
from pretrain.checkpoint.retention import check_room, remove_old_commits
from pretrain.checkpoint.set_aside import set_aside
from pretrain.checkpoint.store import StorePath, lies_at, path_of
from pretrain.checkpoint.verify import is_committed, list_commits, newest_step, read_commit, verify_commit
from pretrain.run.folder import RunFolder
from pretrain.state import TrainState
from pretrain.write import newest_intact_commit
from tests.pretrain.checkpoint.on_ranks import IDENTITY, flip_bit, newest_verified_commit, save, tree
from tests.pretrain.checkpoint.played_store import PlayedStore, install
from tests.pretrain.checkpoint.store_on_ranks import KILL_POINTS, put_both
from tests.pretrain.verbs import call
from tests.tiny import write_tiny_dataset
from tests.training import tiny_config

ROOT = Path(__file__).parents[3]
FILES = ("rank_00000.json", "rank_00000.safetensors", "rank_00001.json", "rank_00001.safetensors")


@pytest.fixture(scope="module")
def _alone() -> Iterator[None]:
    """A world of one rank: no sockets, no other process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(name="played")
def _played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a store behind `played://`, here and in processes that are started. Nothing waits for it here."""
    install(tmp_path / "installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path / "installed"), str(ROOT))))
    monkeypatch.setenv("PLAYED_STORE", str(tmp_path / "played"))
    monkeypatch.setattr(object_store, "WAIT_SECONDS", (0.0,) * 7)
    fsspec.register_implementation("played", PlayedStore, clobber=True)
    return tmp_path / "played"


@pytest.fixture(name="checkpoints")
def _checkpoints(tmp_path: Path, played: Path, _alone: None) -> Path:
    """That of a run folder whose commits go to the store."""
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    name_store(CheckpointSection(store="played://bucket/runs/"), run)
    return run / "checkpoints"


def objects_of(played: Path, checkpoints: Path) -> Path:
    """The run's own folder in the store's."""
    return played / str(lies_at(checkpoints)).removeprefix("played://")


def commit(checkpoints: Path, step: int, attempt: int = 1) -> None:
    assert save(checkpoints, step, lambda folder: put_both(folder, step), attempt=attempt) is None


def log_of(played: Path) -> list[str]:
    """What was put and removed, in order, below the run's folder."""
    return [f"{line.split()[0]} {'/'.join(line.split('/')[4:])}" for line in played.with_name("played.log").read_text().splitlines()]


def be_down(played: Path, times: int) -> None:
    played.with_name("played.down").write_text(str(times))


def test_a_url_is_put_together_like_a_path() -> None:
    path = path_of("s3://bucket/runs/mine-0") / "step-00000010" / "MANIFEST.json"
    assert isinstance(path, StorePath)
    assert str(path) == "s3://bucket/runs/mine-0/step-00000010/MANIFEST.json"
    assert (path.name, path.parent.name) == ("MANIFEST.json", "step-00000010")
    assert path_of(str(path)) == path
    assert path_of("/runs/mine") == Path("/runs/mine")


def test_the_manifest_is_put_last_and_what_was_put_is_what_is_read(played: Path, checkpoints: Path) -> None:
    assert list_commits(checkpoints) == []
    commit(checkpoints, 10, attempt=3)
    parts = [f"step-00000010/attempt-3/rank_{rank:05d}.{suffix}" for rank in (0, 1) for suffix in ("safetensors", "json")]
    *before, staged, last = log_of(played)
    assert before == [f"put {part}" for part in parts]
    assert (staged, last) == ("put step-00000010/attempt-3/MANIFEST.json", "put step-00000010/MANIFEST.json")
    assert list_commits(checkpoints) == [lies_at(checkpoints) / "step-00000010"]
    assert (verify_commit(list_commits(checkpoints)[0]), newest_step(checkpoints), is_committed(checkpoints, 10)) == ([], 10, True)
    found = read_commit(list_commits(checkpoints)[0])
    assert (found.state, found.identity, found.attempt, tuple(sorted(found.files))) == (TrainState(10, 40, 10240, 0), IDENTITY, 3, FILES)
    assert newest_verified_commit(checkpoints, pytest.fail) == found
    assert not checkpoints.exists(), "the run folder holds none"


def test_a_name_of_its_own_is_chosen_once_and_anew_for_another_store(tmp_path: Path) -> None:
    (first, second) = (CheckpointSection(store=url) for url in ("s3://bucket/runs", "gs://bucket"))
    name_store(first, tmp_path)
    url = str(lies_at(tmp_path / "checkpoints"))
    assert url.startswith(f"s3://bucket/runs/{tmp_path.name}-")
    name_store(first, tmp_path)
    assert str(lies_at(tmp_path / "checkpoints")) == url
    name_store(second, tmp_path)
    assert str(lies_at(tmp_path / "checkpoints")).startswith(f"gs://bucket/{tmp_path.name}-")
    name_store(CheckpointSection(), tmp_path)
    assert lies_at(tmp_path / "checkpoints") == tmp_path / "checkpoints"


def test_killed_at_each_point_there_is_the_old_commit_or_the_new_one(played: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.pretrain.checkpoint.store_on_ranks", str(tmp_path / "runs")]
    done = subprocess.run(command, env={**os.environ}, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["point"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert rows.keys() == KILL_POINTS.keys()
    for point, is_there in KILL_POINTS.items():
        row, commits = rows[point], ["step-00000010", *(["step-00000020"] if is_there else [])]
        assert row["status"] == -signal.SIGKILL, (point, "the kill point was never reached")
        assert (row["left"], row["problems"]) == (commits[::-1], []), point
        assert row["resumed"] == (20 if is_there else 10), point
        attempts = {"step-00000010": 1, "step-00000020": 2, "step-00000030": 3}
        wanted = [f"{name}/{part}" for name in [*commits, "step-00000030"] for part in ("MANIFEST.json", f"attempt-{attempts[name]}")]
        assert row["after"] == wanted, (point, "the next attempt clears what the kill left")


def test_a_flipped_bit_is_found_and_the_older_commit_is_used_and_nothing_is_deleted(played: Path, checkpoints: Path) -> None:
    for step in (10, 20):
        commit(checkpoints, step)
    objects = objects_of(played, checkpoints)
    flip_bit(objects / "step-00000020" / "attempt-1" / FILES[3], 12345)
    before, said = tree(objects), list[str]()
    (problem,) = verify_commit(list_commits(checkpoints)[0])
    assert problem.endswith(f"/step-00000020/attempt-1/{FILES[3]}: its SHA-256 is not the manifest's (block 0)")
    found = newest_verified_commit(checkpoints, said.append)
    assert found is not None
    assert found.state.step == 10
    assert len(said) == 1
    assert f"{lies_at(checkpoints)}/rejected/step-00000020" in said[0]
    moved = before.keys() - {"step-00000020/MANIFEST.json"} | {"rejected/step-00000020/MANIFEST.json"}
    assert tree(objects).keys() == moved
    assert tree(objects)["rejected/step-00000020/MANIFEST.json"] == before["step-00000020/MANIFEST.json"]
    assert (checkpoints / "rejected" / "step-00000020").read_text() == f"{lies_at(checkpoints)}/rejected/step-00000020\n"

    commit(checkpoints, 20, attempt=2)  # its start clears nothing of what was rejected, and neither does retention
    assert newest_step(checkpoints) == 20
    for step in (30, 40):
        commit(checkpoints, step, attempt=2)
    assert [path.name for path in remove_old_commits(checkpoints, CheckpointSection(keep=2))] == ["step-00000020", "step-00000010"]
    assert {name for name in tree(objects) if "00020" in name} == {name for name in moved if "00020" in name}


def test_when_all_are_damaged_the_run_does_not_begin_anew(played: Path, checkpoints: Path) -> None:
    commit(checkpoints, 10)
    manifest = objects_of(played, checkpoints) / "step-00000010" / "MANIFEST.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint verifies \(1 lie in"):
            newest_verified_commit(checkpoints, lambda text: None)


def test_an_attempt_that_wakes_up_overwrites_nothing(played: Path, checkpoints: Path) -> None:
    """It began step 20, another attempt took over and committed that step; whatever it then asks, or forgets to ask."""
    place, answers, folders = Place(checkpoints), list[bool](), list[Any]()

    def start_writing(folder: Any) -> Callable[[bool], Answer]:
        folders.append(folder)
        return lambda wait: Answer(put_both(folder, 20), None)  # when it is waited for: after the other one

    for still_ours, problem in ((False, "no longer holds"), (True, "never overwritten")):
        saves = Saves([place], 1, lambda still_ours=still_ours: answers.append(still_ours) or still_ours)
        saves.begin(place, start_writing, state=TrainState(20, 80, 20480), identity=IDENTITY, code={}, loss=2.5)
        if not answers:
            commit(checkpoints, 20, attempt=2)
        before = {name: sum_ for name, sum_ in tree(objects_of(played, checkpoints)).items() if "attempt-1" not in name}
        try:
            said = saves.settle()
        except UserError as error:
            said = str(error)
        assert problem in (said or "")
        now = tree(objects_of(played, checkpoints))
        assert {name: now[name] for name in before} == before
        assert {name for name in now if name not in before} <= {f"step-00000020/attempt-1/{name}" for name in (*FILES, "MANIFEST.json")}
    assert answers == [False, True]
    assert {folder.name for folder in folders} == {"attempt-1"}
    assert verify_commit(list_commits(checkpoints)[0]) == []


def test_retention_removes_the_manifest_first(played: Path, checkpoints: Path) -> None:
    for step in (10, 20, 30, 40):
        commit(checkpoints, step)
    played.with_name("played.log").unlink()
    remove_old_commits(checkpoints, CheckpointSection(keep=2))
    assert log_of(played) == [
        "remove step-00000020/MANIFEST.json", "remove step-00000010/MANIFEST.json",
        "remove step-00000020/attempt-1", "remove step-00000010/attempt-1",
    ]  # fmt: skip
    assert [path.name for path in list_commits(checkpoints)] == ["step-00000040", "step-00000030"]
    check_room(checkpoints, CheckpointSection(), 10**18, 1)  # nobody knows how much a store holds


def test_a_rollback_sets_manifests_aside(played: Path, checkpoints: Path) -> None:
    for step in (10, 20):
        commit(checkpoints, step)
    (moved,) = set_aside(checkpoints, 10, 1)
    assert str(moved) == f"{lies_at(checkpoints)}/rolled-back/step-00000020-attempt-1"
    assert set_aside(checkpoints, 10, 1) == []
    commit(checkpoints, 20, attempt=2)
    objects = objects_of(played, checkpoints) / "step-00000020"
    assert {path.name for path in objects.iterdir()} == {"MANIFEST.json", "attempt-1", "attempt-2"}
    assert set_aside(checkpoints, 10, 1) == [], "what a later attempt committed stays"


def test_a_store_that_is_away_for_a_while_is_waited_for(played: Path, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(checkpoints, 10)
    pauses: list[float] = []
    monkeypatch.setattr(object_store, "WAIT_SECONDS", (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 32.0))
    monkeypatch.setattr("time.sleep", pauses.append)
    be_down(played, 7)
    commit(checkpoints, 20)
    assert len(pauses) == 7
    assert all(0.75 * 2**number <= pause <= 1.25 * 2**number for number, pause in enumerate(pauses[:6]))
    assert 60 < sum(pauses) < 120
    be_down(played, 7)
    assert newest_step(checkpoints) == 20


def test_a_store_that_is_gone_fails_a_save_as_a_full_disk_does(played: Path, checkpoints: Path) -> None:
    commit(checkpoints, 10)
    before = tree(played)
    place, saves = Place(checkpoints), Saves([Place(checkpoints)], 2, lambda: True)

    def attempt_at(step: int) -> str | None:
        def start_writing(folder: Any) -> Callable[[bool], Answer]:
            def answer(wait: bool) -> Answer:
                try:
                    return Answer(put_both(folder, step), None)
                except OSError as error:  # as the writer does
                    return Answer({}, str(error))

            return answer

        saves.begin(place, start_writing, state=TrainState(step), identity=IDENTITY, code={}, loss=1.5)
        return saves.settle()

    be_down(played, 1000)
    problem = attempt_at(20)
    assert problem is not None
    assert problem.startswith("step 20 could not be saved: rank 0: played://bucket/runs/mine-")
    assert "ConnectionError: no route to the store, however often it was tried; check the network" in problem
    assert tree(played) == before
    be_down(played, 0)
    assert attempt_at(30) is None, "training went on"
    be_down(played, 1000)
    assert [attempt_at(40) is None, attempt_at(50) is None] == [False, False]
    with pytest.raises(UserError, match="3 saves in a row failed"):
        attempt_at(60)


def test_a_commit_whose_answer_was_lost_is_one(played: Path, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, then_down = PlayedStore.pipe_file, 0

    def pipe_file(store: PlayedStore, path: str, value: bytes, mode: str) -> None:
        plain(store, path, value, mode)
        be_down(played, then_down)
        raise ConnectionError("no route to the store")

    monkeypatch.setattr(PlayedStore, "pipe_file", pipe_file)
    commit(checkpoints, 10)  # tried again, it is found to be there
    then_down = 1000
    assert "no route to the store" in (save(checkpoints, 20, lambda folder: put_both(folder, 20)) or "")
    be_down(played, 0)
    assert [(path.name, verify_commit(path)) for path in list_commits(checkpoints)] == [("step-00000020", []), ("step-00000010", [])]


def test_a_store_that_is_gone_is_never_taken_for_damage(played: Path, checkpoints: Path) -> None:
    commit(checkpoints, 10)
    before = tree(played)
    for times in (1000, 0):
        be_down(played, times)
        if times:
            for ask in (list_commits, newest_step, lambda place: newest_verified_commit(place, pytest.fail)):
                with pytest.raises(UserError, match="no route to the store, however often it was tried"):
                    ask(checkpoints)
    folder = list_commits(checkpoints)[0]
    be_down(played, 1000)
    with pytest.raises(UserError, match="no route to the store"):
        read_commit(folder)
    be_down(played, 0)
    found = read_commit(folder)
    be_down(played, 1000)
    with pytest.raises(UserError, match="no route to the store"):
        verify_commit(found.folder)
    assert tree(played) == before


def test_two_ranks_save_to_a_store_and_go_on_from_it_with_equal_bits(
    run_on_ranks: Callable[..., list[Any]], played: Path, tmp_path: Path
) -> None:
    """The real loop and its writers: ten steps into a folder; five into a store, and five more."""
    dataset, runs = tmp_path / "data", tmp_path / "runs"
    write_tiny_dataset(dataset)
    run_file = {"dataset": str(dataset), "runs": str(runs)}
    stored = {"stored": {"checkpoint__store": "played://bucket/runs", "checkpoint__every_steps": "2", "checkpoint__keep": "2"}}
    first = run_on_ranks("tests.training:train_runs", 2, {**run_file, "cases": stored, "stop_at": 5})[0]["stored"]
    ended = run_on_ranks("tests.training:train_runs", 2, {**run_file, "cases": stored | {"whole": {}}, "attempt": 2})[0]
    second, whole = ended["stored"], ended["whole"]
    assert (first["outcome"], first["steps"], second["outcome"], second["steps"]) == ("stopped", [0, 5], "done", [5, 10])
    assert second["losses"] == whole["losses"]
    assert second["hash"] == whole["hash"] != first["hash"]
    run = RunFolder(runs / "stored")
    kept = ["step-00000010", "step-00000008"]
    left = [path.parts for path in objects_of(played, run.checkpoints).rglob("*") if path.is_file()]
    assert {name for parts in left for name in parts if name.startswith("step-")} == set(kept)
    assert not any("self-test" in parts for parts in left)
    assert list(run.checkpoints.glob("*")) == []
    for step, attempt in ((2, 1), (4, 1), (5, 1), (6, 2), (8, 2), (10, 2)):
        *files, staged, last = [
            line.partition("step-")[2] for line in log_of(played) if line.startswith("put") and f"step-{step:08d}" in line
        ]
        assert sorted(files) == [f"{step:08d}/attempt-{attempt}/{name}" for name in FILES]
        assert (staged, last) == (f"{step:08d}/attempt-{attempt}/MANIFEST.json", f"{step:08d}/MANIFEST.json")

    run.config_file.write_text(dump_config(tiny_config(dataset, runs, run__name="stored", **stored["stored"])))
    assert state_hash(newest_intact_commit(run, pytest.fail)) == whole["hash"], "what generate and export read"
    rows = json.loads(call("checkpoints", "list", run.path, "--json").out)
    assert [(row["name"], row["state"], row["ranks"]) for row in rows] == [(name, "whole", 2) for name in kept]
    assert call("checkpoints", "verify", run.path).status == 0
    flip_bit(objects_of(played, run.checkpoints) / "step-00000010" / "attempt-2" / FILES[1], 999)
    found = call("checkpoints", "verify", run.path, "--json")
    assert (found.status, len(json.loads(found.out)["problems"])) == (2, 1)
    assert f"step-00000010/attempt-2/{FILES[1]}" in found.out
