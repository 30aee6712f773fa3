"""Commits that a run went back behind: where they are then, and that doing it again changes nothing."""

import json
from pathlib import Path

from pretrain.checkpoint.set_aside import ROLLED_BACK, set_aside
from pretrain.checkpoint.verify import Commit, commit_name, list_commits, write_manifest
from pretrain.state import TrainState


def write_commit_of(checkpoints: Path, step: int, attempt: int) -> None:
    folder = checkpoints / commit_name(step)
    folder.mkdir()
    write_manifest(Commit(folder, TrainState(step), {}, {}, {}, world_size=1, attempt=attempt, loss=1.0, time=0))


def test_newer_ones_of_that_attempt_are_moved_and_nothing_else(tmp_path: Path) -> None:
    for step, attempt in ((10, 1), (20, 1), (30, 2), (40, 2)):
        write_commit_of(tmp_path, step, attempt)
    content = {path.name: (path / "MANIFEST.json").read_bytes() for path in list_commits(tmp_path)}
    moved = set_aside(tmp_path, to_step=20, attempt=2)
    assert [path.name for path in list_commits(tmp_path)] == [commit_name(20), commit_name(10)]
    assert sorted(path.name for path in moved) == [f"{commit_name(step)}-attempt-2" for step in (30, 40)]
    assert {path.name.removesuffix("-attempt-2"): (path / "MANIFEST.json").read_bytes() for path in moved}.items() <= content.items()
    write_commit_of(tmp_path, 30, 3)
    assert set_aside(tmp_path, to_step=20, attempt=2) == [], "what the next attempt made stays"
    assert [path.name for path in list_commits(tmp_path)] == [commit_name(step) for step in (30, 20, 10)]


def test_a_move_that_was_cut_short_is_ended(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_commit_of(tmp_path, step, 1)
    (tmp_path / ROLLED_BACK).mkdir()
    (tmp_path / commit_name(30)).rename(tmp_path / ROLLED_BACK / f"{commit_name(30)}-attempt-1")
    assert [path.name for path in set_aside(tmp_path, to_step=0, attempt=1)] == [f"{commit_name(step)}-attempt-1" for step in (20, 10)]
    assert list_commits(tmp_path) == []


def test_what_cannot_be_read_stays_for_the_verification(tmp_path: Path) -> None:
    write_commit_of(tmp_path, 30, 1)
    manifest = tmp_path / commit_name(30) / "MANIFEST.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"attempt": 7}))
    assert set_aside(tmp_path, to_step=20, attempt=9) == []
    assert len(list_commits(tmp_path)) == 1
