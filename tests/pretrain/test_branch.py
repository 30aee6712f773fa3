"""A run that begins with another: weights only, or everything; on the same data and on other data; through a resume of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import run_on_ranks
from tests.tiny import tiny_texts, write_shard, write_tiny_dataset

STAGES = ("1", "3")


def names(kind: str) -> list[str]:
    return [f"{kind}-{stage}" for stage in STAGES]


def cases(kind: str, **overrides: str) -> dict[str, dict[str, str]]:
    return {name: {"parallel__zero_stage": stage, **overrides} for name, stage in zip(names(kind), STAGES, strict=True)}


def write_other_dataset(folder: Path, like: Path) -> None:
    """The same tokenizer and held-out text, other words to learn from."""
    from data_pipeline.manifest import load_manifest, write_manifest
    from data_pipeline.tokenizer import load_tokenizer

    shutil.copytree(like, folder)
    manifest, texts = load_manifest(like), tiny_texts(100, seed=8)
    tokenizer = load_tokenizer(like / "tokenizer.json", manifest.end_of_text)
    tokens = [np.array([*tokenizer.encode(text).ids, manifest.end_of_text_id]) for text in texts]
    shard = write_shard(folder, "units/00000/train", "sums", tokens, num_bytes=[len(text.encode()) for text in texts])
    splits = manifest.splits | {"train": (shard, *manifest.splits["train"][1:])}
    write_manifest(folder, manifest.model_copy(update={"splits": splits}))


@pytest.fixture(scope="module", name="place")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets, and runs that were stopped at step 5."""
    root = tmp_path_factory.mktemp("branches")
    write_tiny_dataset(root / "data")
    write_other_dataset(root / "other", like=root / "data")
    arguments = {"dataset": str(root / "data"), "runs": str(root), "cases": cases("base"), "stop_at": 5}
    run_on_ranks("tests.training:train_runs", 2, arguments, 100, tmp_path_factory.mktemp("ranks"))
    return root


@pytest.fixture(scope="module", name="whole")
def _whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of the runs that were never left."""
    arguments = {"dataset": str(place / "data"), "runs": str(place), "cases": cases("whole")}
    return run_on_ranks("tests.training:train_runs", 2, arguments, 100, tmp_path_factory.mktemp("ranks"))[0]


@pytest.fixture(name="train")
def _train(place: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Trains runs in a folder that has parents of its own."""
    for name in names("base"):
        shutil.copytree(place / name, tmp_path / name)

    def train(cases: dict[str, dict[str, str]], stop_at: int | None = None, attempt: int = 1, dataset: str = "data") -> dict[str, Any]:
        arguments = {"dataset": str(place / dataset), "runs": str(tmp_path), "cases": cases, "stop_at": stop_at, "attempt": attempt}
        return run_on_ranks("tests.training:train_runs", 2, arguments, 100, tmp_path_factory.mktemp("ranks"))[0]

    return train


def of_base(kind: str, tmp_path: Path, **overrides: str) -> dict[str, dict[str, str]]:
    """Cases that begin with step 5 of the run of their stage."""
    begun = zip(cases(kind, **overrides).items(), names("base"), strict=True)
    return {name: {**given, "start_from": f"{tmp_path / parent}@5"} for (name, given), parent in begun}


def test_a_branch_of_everything_is_its_parent_going_on(train: Callable[..., dict[str, Any]], whole: dict[str, Any], tmp_path: Path) -> None:
    """ZeRO 1 and 3: the branch of step 5 ends with the bits of the run that was never left, over a stop and a resume of its own, and
    does not need its parent for that any more."""
    branch = of_base("branch", tmp_path, start_with="everything")
    first = train(branch, stop_at=2)  # steps of this attempt
    for name, parent in zip(names("branch"), names("base"), strict=True):
        assert (first[name]["outcome"], first[name]["steps"]) == ("stopped", [5, 7])
        (row,) = [json.loads(line) for line in (tmp_path / parent / "forks.jsonl").read_text().splitlines()]
        assert (row["child"], row["step"], row["with"]) == (str(tmp_path / name), 5, "everything")
        shutil.rmtree(tmp_path / parent)
    second = train(branch, attempt=2)
    for name, origin in zip(names("branch"), names("whole"), strict=True):
        assert second[name]["steps"] == [7, 10]
        assert second[name]["hash"] == whole[origin]["hash"]
        assert second[name]["losses"] == [row for row in whole[origin]["losses"] if row[0] > 5]


@pytest.mark.long
def test_a_branch_with_another_rate_differs_from_its_first_step_on_and_only_in_what_it_was_told(
    train: Callable[..., dict[str, Any]], whole: dict[str, Any], tmp_path: Path
) -> None:
    found = train(of_base("branch", tmp_path, start_with="everything", optimizer__peak_lr="5e-3"))
    for name, origin in zip(names("branch"), names("whole"), strict=True):
        (step, loss, _, rate), *_ = found[name]["losses"]
        (_, same_loss, _, twice), *_ = [row for row in whole[origin]["losses"] if row[0] == 6]
        assert (step, loss) == (6, same_loss)  # before its first update it has the parent's weights and data
        assert rate == pytest.approx(twice / 2)
        assert found[name]["hash"] != whole[origin]["hash"]


@pytest.mark.long
def test_a_branch_on_other_data_reads_it_from_its_beginning_and_counts_on(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Its first batches are those of a run that begins on that data, and its rate is that of its place in the run; it resumes."""
    branch = of_base("branch", tmp_path, start_with="everything")
    straight = train({f"straight-{name}": given for name, given in branch.items()}, dataset="other")
    train(branch, stop_at=3, dataset="other")
    resumed = train(branch, attempt=2, dataset="other")
    for name in names("branch"):
        assert resumed[name]["steps"] == [8, 10]
        assert resumed[name]["hash"] == straight[f"straight-{name}"]["hash"]
        assert [row[0] for row in resumed[name]["losses"]] == [6, 7, 8, 9, 10]
        newest = sorted((tmp_path / name / "checkpoints").glob("step-*"))[-1]
        state = json.loads((newest / "MANIFEST.json").read_text())["state"]
        assert (state["step"], state["samples_seen"], state["tokens_seen"]) == (10, 80, 2560)
        assert state["skipped_samples"] == [[0, -40]]


@pytest.mark.long
def test_weights_alone_are_a_new_run_with_those_weights(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Step 0, fresh moments, the first sample: with a rate of nearly nothing the weights stay what they were, and the first loss is
    that of the parent's weights on the first batch."""
    found = train(of_base("child", tmp_path, optimizer__peak_lr="1e-30", optimizer__weight_decay="0.0"), stop_at=2)
    again = train(of_base("again", tmp_path, optimizer__peak_lr="1e-30", optimizer__weight_decay="0.0"), stop_at=2)
    for name, other, parent in zip(names("child"), names("again"), names("base"), strict=True):
        assert found[name]["steps"] == [0, 2]
        assert found[name]["losses"] == again[other]["losses"]
        weights, moments = (
            read(tmp_path / parent / "checkpoints" / "step-00000005"),
            read(tmp_path / name / "checkpoints" / "step-00000002"),
        )
        assert weights["weights"] == moments["weights"]
        assert moments["steps"] == {2.0} and weights["steps"] == {5.0}  # Adam's own count began anew
        rows = [json.loads(line) for line in (tmp_path / parent / "forks.jsonl").read_text().splitlines()]
        assert [(row["step"], row["with"]) for row in rows] == [(5, "weights")] * 2


def read(folder: Path) -> dict[str, Any]:
    """Weights of a commit as bytes, and the steps that its optimizer counted."""
    from pretrain.checkpoint.index import FragmentIndex
    from pretrain.checkpoint.verify import read_commit

    with FragmentIndex(read_commit(folder)) as index:
        weights = {name: value.numpy().tobytes() for name, value in index.weights().items()}
        return {"weights": weights, "steps": {scalars["step"] for scalars in index.scalars.values()}}
