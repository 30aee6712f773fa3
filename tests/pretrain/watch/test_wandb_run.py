"""How a run folder becomes a W&B run: its mode, its id, where its attempts began, and which rows count."""

import random
from pathlib import Path
from typing import Any

import pytest

from configs.schema import RunConfig
from pretrain.watch.wandb_run import (
    SEGMENTS,
    add_segment,
    choose_mode,
    has_api_key,
    newest_rows,
    read_segments,
    run_id,
    wandb_step_of,
    without_secrets,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without keys."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.mark.parametrize("has_key", [False, True])
@pytest.mark.parametrize("named", ["auto", "online", "offline", "disabled"])
@pytest.mark.parametrize("variable", [None, "", "online", "offline", "disabled"])
def test_the_mode(monkeypatch: pytest.MonkeyPatch, variable: str | None, named: str, has_key: bool) -> None:
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    if has_key:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    wanted = variable or named
    expected = wanted if wanted in ("offline", "disabled") else ("online" if has_key else "offline")
    assert choose_mode(RunConfig.model_validate({"watch": {"wandb": named}})) == expected


def test_a_key_in_the_netrc_counts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_api_key()
    netrc = home / ".netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password kkkk\n")
    netrc.chmod(0o600)
    assert has_api_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080/some/path")
    assert not has_api_key()
    netrc.write_text("machine wandb.example.org login user password kkkk\n")
    assert has_api_key()
    netrc.write_text("this is { no netrc")
    assert not has_api_key()


def test_the_id_is_made_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = run_id(tmp_path / "a")
    assert len(first) == 8
    assert [run_id(tmp_path / "a") for _ in range(3)] == [first] * 3
    assert run_id(tmp_path / "b") != first


def test_a_row_is_found_at_the_step_that_it_was_shown_under(tmp_path: Path) -> None:
    run_id(tmp_path)
    add_segment(tmp_path, attempt=1, from_row=0, wandb_step=1, mode="online")
    add_segment(tmp_path, attempt=2, from_row=30, wandb_step=45, mode="online")
    add_segment(tmp_path, attempt=3, from_row=50, wandb_step=1, mode="offline")
    with (tmp_path / SEGMENTS).open("a") as file:
        file.write('{"attempt": 4, "fro')
    segments = read_segments(tmp_path)
    assert [wandb_step_of(segments, attempt, row) for attempt, row in ((1, 0), (1, 29), (2, 30), (2, 49))] == [1, 30, 45, 64]
    assert wandb_step_of(segments, 3, 50) is None, "no server has it"
    assert wandb_step_of(segments, 4, 60) is None
    assert wandb_step_of(segments, 2, 29) is None, "that was another attempt's"


def test_of_a_run_that_was_killed_at_random_each_row_counts_once(seed: int) -> None:
    """What an attempt began again is not what counts, in whatever order the rows come, and also where they come twice."""
    chosen = random.Random(seed)
    truth: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    for attempt in range(1, 21):
        from_step = chosen.randint(0, truth[-1]["step"]) if truth else 0
        truth = [row for row in truth if row["step"] <= from_step]
        shown.append({"step": from_step, "segment/attempt": attempt, "segment/from_step": from_step, "attempt": attempt})
        for step in range(from_step + 1, from_step + chosen.randint(1, 40)):
            for _ in range(chosen.choice([1, 1, 2])):
                truth.append({"step": step, "attempt": attempt, "row": len(truth)})
        shown += truth[len(truth) - sum(row["attempt"] == attempt for row in truth) :]
    shown += chosen.sample(shown, 50)
    chosen.shuffle(shown)
    assert newest_rows(shown) == truth


def test_a_secret_is_in_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_TOKEN", "sesame-open-12345")
    value = {"a": ["x sesame-open-12345", 12345, None, True], "b": {"c": ("sesame-open-12345",)}}
    assert without_secrets(value) == {"a": ["x [PLANTED_TOKEN]", 12345, None, True], "b": {"c": ["[PLANTED_TOKEN]"]}}
