"""Retention deletes old commits, whole, and nothing that is not one; the rest says why it stays."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import UserError
from configs.loader import dump_config
from configs.schema import CheckpointSection, RunConfig
from pretrain.checkpoint import retention
from pretrain.checkpoint.blocks import FileRecord
from pretrain.checkpoint.parent import FORKS_FILE
from pretrain.checkpoint.retention import check_room, reasons_to_stay, remove_old_commits, whole_commits
from pretrain.checkpoint.verify import MANIFEST, Commit, commit_name, list_commits, write_manifest
from pretrain.checkpoint_view import list_checkpoints, tell_checkpoints
from pretrain.page import Page
from pretrain.run.folder import RunFolder
from pretrain.state import TrainState

HOUR = 3600.0


def make(checkpoints: Path, steps: Sequence[int], hours: Sequence[float] | None = None) -> list[str]:
    """Commits of a file each; `hours`: when they were made."""
    for place, step in enumerate(steps):
        folder = checkpoints / commit_name(step)
        folder.mkdir(parents=True)
        (folder / "rank_00000.safetensors").write_text(str(step))
        files: dict[str, FileRecord] = {"rank_00000.safetensors": {"bytes": len(str(step)), "sha256": ["0" * 64]}}
        made = int(HOUR * (hours[place] if hours else place))
        write_manifest(Commit(folder, TrainState(step, 4 * step, 1024 * step), files, {}, {}, 1, 1, 2.5, made))
    return [commit_name(step) for step in steps]


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


def steps_of(checkpoints: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_commits(checkpoints)]


@pytest.mark.parametrize(("keep", "left"), [(2, 2), (3, 3), (5, 5), (6, 5)])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: int) -> None:
    all_names = make(tmp_path, [9, 10, 99, 100, 100_000_000])
    deleted = remove_old_commits(tmp_path, CheckpointSection(keep=keep))
    newest = sorted(all_names, key=lambda name: int(name[5:]))[-left:]
    assert names(tmp_path) == sorted(newest)
    assert sorted(path.name for path in deleted) == sorted(set(all_names) - set(newest))
    for name in newest:
        assert (tmp_path / name / "rank_00000.safetensors").read_text() == str(int(name[5:]))
    assert remove_old_commits(tmp_path, CheckpointSection(keep=keep)) == []


def test_some_stay_for_ever_by_step_and_by_time(tmp_path: Path) -> None:
    """Saved every 10 steps, half an hour each; the answer is the same whether retention ran at each save or once."""
    section = CheckpointSection(keep=2, keep_every_steps=100, keep_every_hours=4)
    at_each_save, once = tmp_path / "each", tmp_path / "once"
    steps, hours = range(10, 310, 10), [0.5 * place for place in range(30)]
    for step, hour in zip(steps, hours, strict=True):
        make(at_each_save, [step], [hour])
        remove_old_commits(at_each_save, section)
    make(once, steps, hours)
    remove_old_commits(once, section)
    # Every 4 hours from the first on: steps 10, 90, 170, 250; every 100 steps; and the newest two.
    assert steps_of(at_each_save) == steps_of(once) == [300, 290, 250, 200, 170, 100, 90, 10]
    reasons = reasons_to_stay(whole_commits(once), section)
    assert reasons == ["one of the newest 2"] * 2 + [
        "every 4 hours", "every 100 steps", "every 4 hours", "every 100 steps", "every 4 hours", "every 4 hours",
    ]  # fmt: skip


def test_the_beginning_of_another_run_stays(tmp_path: Path) -> None:
    """As long as the list says so; a torn last line is a child that has not begun."""
    run = RunFolder(tmp_path / "mine")
    make(run.checkpoints, [1, 2, 3, 4, 5])
    rows = [{"child": "/runs/one", "step": 2}, {"child": "/runs/two", "step": 2}, {"child": "/runs/three", "step": 5}]
    (run.path / FORKS_FILE).write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"child": "/runs/four", "st')
    section = CheckpointSection(keep=2)
    reasons = ["the beginning of /runs/three", "one of the newest 2", None, "the beginning of /runs/one, /runs/two", None]
    assert reasons_to_stay(whole_commits(run.checkpoints), section) == reasons
    remove_old_commits(run.checkpoints, section)
    assert steps_of(run.checkpoints) == [5, 4, 2]
    (run.path / FORKS_FILE).unlink()
    remove_old_commits(run.checkpoints, section)
    assert steps_of(run.checkpoints) == [5, 4]


@pytest.mark.parametrize("damage", ["manifest", "size", "missing"])
def test_what_is_damaged_neither_goes_nor_counts(tmp_path: Path, damage: str) -> None:
    """With the two newest damaged the newest whole ones are older; nothing that could be needed is deleted."""
    make(tmp_path, [1, 2, 3, 4, 5])
    for step in (2, 4, 5):
        file = tmp_path / commit_name(step) / ("rank_00000.safetensors" if damage != "manifest" else MANIFEST)
        if damage == "missing":
            file.unlink()
        else:
            file.write_text("damaged")
    assert remove_old_commits(tmp_path, CheckpointSection(keep=2)) == []
    make(tmp_path, [6])
    assert [path.name for path in remove_old_commits(tmp_path, CheckpointSection(keep=2))] == [commit_name(1)]
    assert steps_of(tmp_path) == [6, 5, 4, 3, 2]


def test_what_is_no_commit_stays(tmp_path: Path) -> None:
    make(tmp_path, [1, 2, 3])
    for name in ("rejected/step-00000000", "notes", ".tmp-step-00000004-attempt-1", "step-7"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "step-00000000").write_text("a file")
    remove_old_commits(tmp_path, CheckpointSection(keep=2))
    assert names(tmp_path) == [
        ".tmp-step-00000004-attempt-1",
        "notes",
        "rejected",
        "step-00000000",
        "step-00000002",
        "step-00000003",
        "step-7",
    ]
    assert (tmp_path / "rejected/step-00000000").is_dir()


def test_a_deletion_cut_short_leaves_no_half_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the first file is gone: what was doomed no longer has a commit's name."""
    make(tmp_path, [1, 2, 3, 4])

    def killed(paths: list[Path]) -> None:
        assert [path.name for path in paths] == [".tmp-old-step-00000002", ".tmp-old-step-00000001"]
        raise KeyboardInterrupt

    monkeypatch.setattr(retention, "remove_folders", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_old_commits(tmp_path, CheckpointSection(keep=2))
    assert [path.name for path in list_commits(tmp_path)] == ["step-00000004", "step-00000003"]


def test_there_may_be_nothing(tmp_path: Path) -> None:
    assert remove_old_commits(tmp_path / "checkpoints", CheckpointSection(keep=2)) == []


@pytest.mark.parametrize(
    ("existing", "num_saves", "missing"), [(0, 9, 4), (1, 9, 3), (3, 9, 1), (9, 9, 1), (0, 1, 1), (0, 2, 2), (9, 0, 1)]
)
def test_room_is_wanted_for_what_is_still_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: int, num_saves: int, missing: int
) -> None:
    """12 bytes a parameter, one more than is kept, a tenth to spare."""
    make(tmp_path / "checkpoints", range(1, existing + 1))
    usage, wanted = shutil.disk_usage(tmp_path), 1.1 * missing * 12e9
    for free, enough in ((wanted + 1, True), (wanted - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if enough:
            check_room(tmp_path / "checkpoints", CheckpointSection(keep=3), 10**9, num_saves)
        else:
            with pytest.raises(
                UserError, match=rf"{missing} more checkpoints of 12.0 GB want {wanted / 1e9:.1f} GB.*lower checkpoint.keep"
            ):
                check_room(tmp_path / "checkpoints", CheckpointSection(keep=3), 10**9, num_saves)


def test_the_list_says_what_the_next_save_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path / "mine")
    make(run.checkpoints, [10, 20, 30, 40])
    (run.checkpoints / commit_name(30) / "rank_00000.safetensors").write_text("damaged")
    (run.checkpoints / "rejected" / commit_name(35)).mkdir(parents=True)
    run.config_file.write_text(dump_config(RunConfig(checkpoint=CheckpointSection(keep=2, keep_every_steps=20))))
    rows = list_checkpoints(run)
    assert [(row["name"], row["state"], row["stays"]) for row in rows] == [
        ("step-00000040", "whole", "one of the newest 2"),
        ("step-00000030", "damaged", "nothing damaged is deleted"),
        ("step-00000020", "whole", "every 20 steps"),
        ("step-00000010", "whole", None),
        ("rejected/step-00000035", "rejected", "nothing damaged is deleted"),
    ]
    assert (rows[0]["loss"], rows[0]["tokens_seen"], rows[0]["bytes"]) == (2.5, 40960, 2)
    said: list[str] = []
    tell_checkpoints(rows, run.checkpoints, Page(Console(force_terminal=False), said.append))
    assert said[1].split() == ["step-00000040", "40,960", "2.5000", "0.0", "1", "1970-01-01", "03:00:00", "whole", "stays:", "one", "of",
                               "the", "newest", "2"]  # fmt: skip
    assert said[4].endswith("whole     goes")
    said.clear()
    run.config_file.write_text(dump_config(RunConfig(start_from="/runs/base@1000", checkpoint=CheckpointSection(keep=2))))
    rows = list_checkpoints(run)
    assert rows[-1] == {"name": "/runs/base@1000", "state": "parent", "with": "weights", "stays": "the beginning of this run"}
    tell_checkpoints(rows, run.checkpoints, Page(Console(force_terminal=False), said.append))
    assert said[-1].split() == ["/runs/base@1000", "parent", "stays:", "the", "beginning", "of", "this", "run"]
    said.clear()
    tell_checkpoints([], run.checkpoints, Page(Console(force_terminal=False), said.append))
    assert said == [f"{run.checkpoints}: no commits yet"]
