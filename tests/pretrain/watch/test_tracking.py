"""Weights & Biases as a view: its mode, its id, and that nothing it does reaches the run."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from configs.schema import RunConfig
from pretrain.state import TrainState
from pretrain.watch import tracking
from pretrain.watch.journal import Journal
from pretrain.watch.metrics import read_rows
from pretrain.watch.tracking import choose_mode, end_tracking, has_api_key, run_id, start_tracking, track


def config(**watch: Any) -> RunConfig:
    return RunConfig.model_validate({"run": {"name": "mine"}, "watch": watch})


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
    assert choose_mode(config(wandb=named)) == expected


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


def test_an_offline_run_needs_no_network_and_no_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real wandb. Its server's address leads to a door of ours, at which nobody may knock."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    said: list[str] = []
    folder = tmp_path / "run"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.setblocking(False)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{door.getsockname()[1]}")
        run = start_tracking(config(), folder, said.append)
        assert run is not None
        assert run.id == run_id(folder)
        assert run.name == "mine"
        track(run, {"step": 1, "tokens_seen": 10, "loss": 2.5, "gradient_norm": None})
        end_tracking(run, failed=False)
        with pytest.raises(BlockingIOError):
            door.accept()
    assert said == []
    (recorded,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert run.id in recorded.name
    deadline = time.monotonic() + 30
    while b"gradient_norm" not in recorded.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)  # its own process writes
    assert b"gradient_norm" in recorded.read_bytes()


def test_disabled_makes_nothing(tmp_path: Path) -> None:
    assert start_tracking(config(wandb="disabled"), tmp_path, pytest.fail) is None
    assert not (tmp_path / "wandb").exists()


class Broken:
    """A W&B run all of whose methods raise."""

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"wandb {name} is broken")

        return fail


def test_a_wandb_that_cannot_start_is_said_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    modes: list[str] = []

    def init(**settings: Any) -> None:
        modes.append(settings["mode"])
        raise RuntimeError("no service")

    monkeypatch.setattr(tracking.wandb, "init", init)
    assert start_tracking(config(), tmp_path, said.append) is None
    assert modes == ["offline"]
    assert said == ["Weights & Biases could not be started (no service); metrics.jsonl holds every value."]
    said.clear()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert start_tracking(config(), tmp_path, said.append) is None
    assert modes == ["offline", "online", "offline"]
    assert len(said) == 3
    assert "could not be reached (no service); this attempt is recorded offline" in said[1]
    monkeypatch.setattr(tracking.wandb, "init", lambda **_: Broken())  # starts, but nothing works after
    assert start_tracking(config(), tmp_path, said.append) is None


def test_the_run_it_began_with_is_part_of_the_configuration_that_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        def define_metric(self, *_: Any, **__: Any) -> None: ...

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(tracking.wandb, "init", lambda **settings: (asked.append(settings), Run())[1])
    branch = config(wandb="offline").model_copy(update={"start_from": "/runs/base@1000", "start_with": "everything"})
    start_tracking(branch, tmp_path, lambda _: None)
    assert {key: asked[0]["config"][key] for key in ("start_from", "start_with")} == {
        "start_from": "/runs/base@1000",
        "start_with": "everything",
    }


def test_a_service_that_is_away_leaves_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        def define_metric(self, *_: Any, **__: Any) -> None: ...

    asked: list[tuple[str, Any]] = []

    def init(**settings: Any) -> Run:
        asked.append((settings["mode"], settings["id"]))
        if settings["mode"] == "online":
            raise TimeoutError("30 s")
        return Run()

    monkeypatch.setattr(tracking.wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert isinstance(start_tracking(config(), tmp_path, lambda _: None), Run)
    assert asked == [("online", run_id(tmp_path)), ("offline", run_id(tmp_path))], "the same curves, whichever way"


@pytest.mark.parametrize("error", [None, ValueError])
def test_a_broken_wandb_reaches_neither_the_loop_nor_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None
) -> None:
    monkeypatch.setattr("pretrain.watch.journal.start_tracking", lambda *_: Broken())
    state = TrainState(step=1, tokens_seen=10)

    def loop() -> None:
        with Journal(config(), tmp_path, 1, TrainState(), is_writer=True) as journal:
            journal.step(state, 2.5, 1e-3, None, 0.0)
            if error is not None:
                raise error("the loop's own")

    if error is None:
        loop()
    else:
        with pytest.raises(error, match="the loop's own"):
            loop()
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert (row["step"], row["loss"], row["attempt"]) == (1, 2.5, 1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["tokens_seen"] == 10


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("pretrain.watch.journal.start_tracking", lambda *_: pytest.fail("a second tracker"))
    before = set(tmp_path.iterdir())
    with Journal(config(), tmp_path, 1, TrainState(), is_writer=False) as journal:
        journal.step(TrainState(step=1), 2.5, 1e-3, None, 0.0)
        journal.say("a word")
    assert set(tmp_path.iterdir()) == before
    assert capsys.readouterr() == ("", "")
