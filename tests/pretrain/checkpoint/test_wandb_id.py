"""The W&B id travels with a commit: it is in the manifest, and a run folder that has none takes it from there."""

import json
from dataclasses import replace
from pathlib import Path

from pretrain.checkpoint.verify import Commit, read_commit, write_manifest
from pretrain.checkpoint.wandb_id import FILE, read_wandb_id, restore_wandb_id
from pretrain.state import TrainState
from pretrain.watch.wandb_run import run_id


def test_a_folder_that_has_lost_its_id_goes_on_under_that_of_its_commit(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert read_wandb_id(run) is None
    made = run_id(run)
    assert read_wandb_id(run) == made
    other = tmp_path / "other"
    other.mkdir()
    restore_wandb_id(other, made)
    assert run_id(other) == made
    restore_wandb_id(other, "another1")
    assert run_id(other) == made, "it has one"


def test_an_id_that_is_none_is_not_taken(tmp_path: Path) -> None:
    for wrong in (None, "", "../x", "a b", "x" * 65):
        restore_wandb_id(tmp_path, wrong)
        assert not (tmp_path / FILE).exists()


def test_a_manifest_has_it_and_one_without_is_read(tmp_path: Path) -> None:
    for wandb_id in ("abcd1234", None):
        folder = tmp_path / str(wandb_id)
        folder.mkdir()
        commit = Commit(folder, TrainState(step=3), {}, {}, {}, 1, 1, 1.5, 0)
        write_manifest(replace(commit, wandb_id=wandb_id))
        assert read_commit(folder).wandb_id == wandb_id
        assert ("wandb_id" in json.loads((folder / "MANIFEST.json").read_text())) == (wandb_id is not None)
