"""Which commit a run begins with: found, pinned, checked, written down; and refused in words that help."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.loader import dump_config, load_config
from configs.schema import RunConfig
from configs.start_section import parse_start
from pretrain.checkpoint.parent import FORKS_FILE, children_of, parent_commit, pin_parent, record_child
from pretrain.checkpoint.verify import MANIFEST, Commit, commit_name, write_manifest
from pretrain.state import TrainState

STEP = 4 * 64
TRAINING = {"total_tokens": 100 * STEP, "sequence_length": 64, "global_batch_samples": 4, "micro_batch_samples": 1}


def config(root: Path, name: str, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"run": {"root": str(root), "name": name}, "training": TRAINING, **sections})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of runs: `base` with commits of steps 10 and 20, `empty` with none."""
    for name in ("base", "empty"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text(dump_config(config(tmp_path, name)))
    for step in (10, 20):
        folder = tmp_path / "base" / "checkpoints" / commit_name(step)
        folder.mkdir(parents=True)
        state = TrainState(step, 4 * step, STEP * step)
        write_manifest(Commit(folder, state, {}, {"tokenizer": "T"}, {}, 1, 1, 2.5, 0))
    return tmp_path


def pin(root: Path, start_from: str | None, **sections: Any) -> tuple[str | None, list[str]]:
    """What `start_from` becomes for the run `child`, and what was said."""
    said: list[str] = []
    tokenizer = sections.pop("tokenizer", "T")
    mine = config(root, "child", start_from=start_from, **sections)
    return pin_parent(mine, (root / "child").resolve(), tokenizer, said.append).start_from, said


@pytest.mark.parametrize(
    ("text", "path", "step"),
    [("runs/base@1000", "runs/base", 1000), ("base", "base", None), ("/a@b/base@0", "/a@b/base", 0), ("/a@b/base", "/a@b/base", None)],
)
def test_a_start_is_a_path_and_a_step(text: str, path: str, step: int | None) -> None:
    assert parse_start(text) == (Path(path), step)
    assert str(parse_start(text)) == text


@pytest.mark.parametrize("text", ["", "@5", "runs/@5", "base@", "base@newest", "base@-1", "base@1.5", "base@5@6", "base@" + "9" * 19])
def test_what_is_no_start_is_refused_by_the_schema(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="wanted"):
        config(tmp_path, "child", start_from=text)


def test_what_cannot_go_together_is_refused_by_the_schema(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="start_with says what is taken of another run, and start_from names none"):
        config(tmp_path, "child", start_with="everything")
    with pytest.raises(ValueError, match=r"start_from and model\.initial_weights both say which weights"):
        config(tmp_path, "child", start_from="base", model={"initial_weights": "gpt2"})


def test_the_newest_is_pinned_by_path_or_by_name(root: Path) -> None:
    """A resumed child does not look at its parent again: not for a newer commit, not whether it is there."""
    base = (root / "base").resolve()
    for text in (str(base), "base", f"{base}@20", "base@20"):
        assert pin(root, text) == (f"{base}@20", [])
    assert pin(root, "base@10") == (f"{base}@10", [])
    assert pin(root, None) == (None, [])
    (root / "child").mkdir()
    (root / "child" / "run.yaml").write_text(dump_config(config(root, "child", start_from=f"{base}@10")))
    base.rename(root / "gone")
    for text in ("base", str(base), "base@10"):
        assert pin(root, text) == (f"{base}@10", [])
    with pytest.raises(UserError, match=r"start_from=base@20: base holds no run \(no run\.yaml\)\. Runs there: child, empty, gone\."):
        pin(root, "base@20")


@pytest.mark.parametrize(
    ("start_from", "words"),
    [
        ("child", "start_from=child is this run itself"),
        ("child@10", "start_from=child@10 is this run itself"),
        ("bsae@10", r"start_from=bsae@10: bsae holds no run \(no run\.yaml\)\. Runs there: base, empty\."),
        ("base@15", r"has no checkpoint of step 15; it has 20, 10\."),
        ("empty", "holds no checkpoint yet"),
    ],
)
def test_a_parent_that_is_not_there_is_refused_with_what_is(root: Path, start_from: str, words: str) -> None:
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError, match=words):
        pin(root, start_from)
    assert sorted(root.rglob("*")) == before


def test_a_damaged_parent_is_refused_and_stays_where_it_is(root: Path) -> None:
    manifest = root / "base" / "checkpoints" / commit_name(20) / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"step": 20', b'"step": 21'))
    before = manifest.read_bytes()
    for text in ("base", "base@20"):
        with pytest.raises(UserError, match=r"step-00000020 is damaged or cannot be read .*take another step of 20, 10\."):
            pin(root, text)
    assert manifest.read_bytes() == before
    assert pin(root, "base@10")[1] == []
    with pytest.raises(UserError, match="damaged or not there any more"):
        parent_commit(config(root, "child", start_from=f"{root / 'base'}@20"))


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"model": {"num_layers": 13}}, "model.num_layers: it has 12, asked for 13"),
    ({"model": {"dropout": 0.1}}, "model.dropout: it has 0.0, asked for 0.1"),
    ({"optimizer": {"kind": "own:optimizer"}}, "optimizer.kind: it has 'adamw', asked for 'own:optimizer'"),
    ({"training": TRAINING | {"sequence_length": 32}}, "training.sequence_length: it has 64, asked for 32"),
    ({"training": TRAINING | {"global_batch_samples": 8}}, "training.global_batch_samples: it has 4, asked for 8"),
]


@pytest.mark.parametrize(("sections", "row"), OTHERS, ids=[row for _, row in OTHERS])
def test_everything_goes_on_with_the_same_model_optimizer_and_steps(root: Path, sections: dict[str, Any], row: str) -> None:
    with pytest.raises(UserError) as refusal:
        pin(root, "base", start_with="everything", **sections)
    assert str(refusal.value).splitlines()[1:-1] == [f"  {row}"]
    assert pin(root, "base", **sections)[1] == [], "weights alone: their shapes are compared when they are read"


def test_a_branch_may_have_another_rate_schedule_data_and_place(root: Path) -> None:
    sections: dict[str, Any] = {
        "optimizer": {"peak_lr": 1.0, "weight_decay": 0.0},
        "schedule": {"decay_tokens": 20 * STEP},
        "data": {"root": "elsewhere", "seed": 5},
        "mixture": {"stages": ({}, {"from_tokens": 20 * STEP, "weights": {"a": 1.0}})},
        "parallel": {"zero_stage": 3},
        "objective": {"z_loss": 1e-4},
    }
    assert pin(root, "base", start_with="everything", **sections)[1] == []


def test_a_branch_counts_its_parent_s_steps(root: Path) -> None:
    for steps, ends in ((20, True), (21, False)):
        training = TRAINING | {"total_tokens": steps * STEP}
        assert pin(root, "base", training=training)[1] == []
        if ends:
            with pytest.raises(UserError, match=rf"begins at step 20, and training.total_tokens={20 * STEP} ends at step 20"):
                pin(root, "base", start_with="everything", training=training)
        else:
            assert pin(root, "base", start_with="everything", training=training)[1] == []


def test_another_tokenizer_is_a_warning_for_weights_and_refused_for_everything(root: Path) -> None:
    start, (warning,) = pin(root, "base", tokenizer="U")
    assert start is not None and warning.startswith("WARNING: start_from=base: its tokenizer is another one")
    with pytest.raises(UserError, match="its tokenizer is another one than the data's; take start_with=weights"):
        pin(root, "base", tokenizer="U", start_with="everything")


def test_a_child_is_written_down_once(root: Path) -> None:
    base = root / "base"
    for name, step in (("one", 10), ("two", 10), ("one", 10), ("three", 20)):
        record_child(config(root, name, start_from=f"{base}@{step}"), root / name)
    assert children_of(base) == {10: [str(root / "one"), str(root / "two")], 20: [str(root / "three")]}
    rows = [json.loads(line) for line in (base / FORKS_FILE).read_text().splitlines()]
    assert [(row["step"], row["with"]) for row in rows] == [(10, "weights"), (10, "weights"), (20, "weights")]
    with (base / FORKS_FILE).open("a") as file:
        file.write('{"child": "/x", "st')
    record_child(config(root, "four", start_from=f"{base}@10"), root / "four")
    assert children_of(base)[10][-1] == str(root / "four")
    assert children_of(root / "nowhere") == {}


def test_the_folder_says_what_the_run_began_with(root: Path) -> None:
    """`run.yaml` and, as its copy, the configuration in Weights & Biases."""
    pinned = pin(root, "base")[0]
    path = root / "child.yaml"
    path.write_text(dump_config(config(root, "child", start_from=pinned, start_with="everything")))
    found = load_config(path)
    assert (found.start_from, found.start_with) == (f"{(root / 'base').resolve()}@20", "everything")
