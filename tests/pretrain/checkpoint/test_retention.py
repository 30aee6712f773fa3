"""Retention deletes old commits, whole, and nothing that is not one."""

from pathlib import Path

import pytest

from pretrain.checkpoint import retention
from pretrain.checkpoint.retention import remove_old_commits
from pretrain.checkpoint.verify import list_commits


def make(checkpoints: Path, *steps: int) -> list[str]:
    for step in steps:
        folder = checkpoints / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "rank_00000.safetensors").write_text(str(step))
    return [f"step-{step:08d}" for step in steps]


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


@pytest.mark.parametrize(("keep", "left"), [(2, 2), (3, 3), (5, 5), (6, 5), (1, 2), (0, 2)])
def test_the_newest_are_kept_two_at_least(tmp_path: Path, keep: int, left: int) -> None:
    all_names = make(tmp_path, 9, 10, 99, 100, 100_000_000)
    deleted = remove_old_commits(tmp_path, keep)
    newest = sorted(all_names, key=lambda name: int(name[5:]))[-left:]
    assert names(tmp_path) == sorted(newest)
    assert sorted(path.name for path in deleted) == sorted(set(all_names) - set(newest))
    for name in newest:
        assert (tmp_path / name / "rank_00000.safetensors").read_text() == str(int(name[5:]))
    assert remove_old_commits(tmp_path, keep) == []


def test_what_is_no_commit_stays(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3)
    for name in ("rejected/step-00000000", "notes", ".tmp-step-00000004-attempt-1", "step-7"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "step-00000000").write_text("a file")
    remove_old_commits(tmp_path, 2)
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
    make(tmp_path, 1, 2, 3, 4)

    def killed(paths: list[Path]) -> None:
        assert [path.name for path in paths] == [".tmp-old-step-00000002", ".tmp-old-step-00000001"]
        raise KeyboardInterrupt

    monkeypatch.setattr(retention, "remove_folders", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_old_commits(tmp_path, 2)
    assert [path.name for path in list_commits(tmp_path)] == ["step-00000004", "step-00000003"]


def test_there_may_be_nothing(tmp_path: Path) -> None:
    assert remove_old_commits(tmp_path / "checkpoints", 2) == []
