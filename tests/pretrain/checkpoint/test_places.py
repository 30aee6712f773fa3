"""The fast place beside the durable one: what is newer counts, what is damaged or lost there costs steps and nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema import CheckpointSection
from pretrain.checkpoint.places import FAST_NAME, name_fast_place, places_of
from pretrain.checkpoint.verify import list_commits
from tests.pretrain.checkpoint.on_ranks import flip_bit
from tests.tiny import write_tiny_dataset


def names(checkpoints: Path) -> list[str]:
    return [path.name for path in reversed(list_commits(checkpoints))]


def test_the_name_is_chosen_once_and_another_run_has_another(tmp_path: Path) -> None:
    section = CheckpointSection(fast_folder=str(tmp_path / "fast"), fast_every_steps=2)
    found = set[Path]()
    for number in range(2):
        run = tmp_path / f"{number}" / "run"
        run.mkdir(parents=True)
        assert len(places_of(section, run)) == 1
        for _ in range(2):
            name_fast_place(section, run)
            durable, fast = places_of(section, run)
            assert (durable.checkpoints, durable.is_local, fast.is_local) == (run / "checkpoints", False, True)
            found.add(fast.checkpoints)
    assert len(found) == 2
    name_fast_place(CheckpointSection(), tmp_path)
    assert not (tmp_path / FAST_NAME).exists()


@pytest.mark.parametrize(("rank", "local_rank", "wanted"), [(0, 0, [True, True]), (8, 0, [False, True]), (9, 1, [False, False])])
def test_who_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, wanted: list[bool]) -> None:
    """Rank 0 for all; in the fast place the first rank of each node."""
    section = CheckpointSection(fast_folder=str(tmp_path), fast_every_steps=2)
    name_fast_place(section, tmp_path)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert [place.has_name_from(rank) for place in places_of(section, tmp_path)] == wanted


@pytest.mark.long
def test_a_run_goes_on_from_the_newest_of_both(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """10 steps, saved fast every 2 and durably every 4: each way to lose something ends with the undisturbed run's bits."""
    dataset, runs = tmp_path / "data", tmp_path / "runs"
    write_tiny_dataset(dataset)
    case = {"checkpoint": f"{{every_steps: 4, fast_folder: {tmp_path / 'fast'}, fast_every_steps: 2, keep: 2}}"}
    here = {"dataset": str(dataset), "runs": str(runs), "cases": {"run": case}}
    whole = run_on_ranks("tests.training:train_runs", 2, here)[0]["run"]
    run = runs / "run"
    (fast,) = [place.checkpoints for place in places_of(CheckpointSection(fast_folder=str(tmp_path / "fast"), fast_every_steps=2), run)[1:]]
    assert names(run / "checkpoints") == ["step-00000008", "step-00000010"]
    assert names(fast) == ["step-00000002", "step-00000006"], "what is saved durably is not saved twice; the newest two"

    def again() -> list[int]:
        shutil.rmtree(run / "checkpoints" / "step-00000010")
        ended = run_on_ranks("tests.training:train_runs", 2, {**here, "attempt": 2})[0]["run"]
        assert (ended["hash"], ended["outcome"]) == (whole["hash"], "done")
        return ended["steps"]

    shutil.rmtree(run / "checkpoints" / "step-00000008")
    assert again() == [6, 10], "the fast one is the newest"
    for path in list_commits(run / "checkpoints")[1:]:
        shutil.rmtree(path)
    flip_bit(fast / "step-00000006" / "rank_00001.safetensors", 9999)
    assert again() == [2, 10], "the damaged one was rejected, the one before it was whole"
    assert [path.name for path in (fast / "rejected").iterdir()] == ["step-00000006"]
    shutil.rmtree(tmp_path / "fast")
    assert again() == [8, 10], "the node is lost: the durable place has what it always has"
