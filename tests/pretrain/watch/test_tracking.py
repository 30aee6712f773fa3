"""Weights & Biases as a view of `metrics.jsonl`: the genuine client, and a server of ours that is well or ill (C10, T23, T24).

The long ones are whole matrices; a case of each kind runs always.
"""

import json
import queue
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from configs.schema import RunConfig
from pretrain.checkpoint.verify import list_commits, read_commit
from pretrain.watch import tracking
from pretrain.watch.metrics import METRICS_FILE, read_rows
from pretrain.watch.replay import read_offline
from pretrain.watch.tracking import end_tracking, start_tracking, track
from pretrain.watch.wandb_run import newest_rows
from tests.faults.trainings import prepare, ranks_of, settings_of, tell, training
from tests.pretrain.watch.tracked import SHORT, attempt, beginning, compare, died, environment_for, pretrain, told_by, wait_until, write_run
from tests.pretrain.watch.wandb_server import Server, StoredRun

SECRET = "sesame-open-12345"
LONGEST_STALL_SECONDS = 1.0
ROW_CPU_SECONDS = 1e-3
"""1 % of a step of 100 ms."""


def only(server: Server) -> StoredRun:
    (run,) = server.runs.values()
    return run


def check_costs(told: dict[str, Any], num_rows: int, end_seconds: float) -> None:
    """What the calls took. The end's margin is for the machine: what waits there waits with a time limit."""
    assert told["start"] < LONGEST_STALL_SECONDS and told["longest"] < LONGEST_STALL_SECONDS, told
    assert told["cpu"] / num_rows < ROW_CPU_SECONDS, told
    assert told["end"] < end_seconds + 15, told


# --- killed at 37, resumed from 30 (T24) ----------------------------------------------------------------------


def run_to_37_and_from_30(folder: Path, server: Server | None, killed: bool = True, **more: str) -> dict[str, Any]:
    """60 steps in two attempts; the second one tells. killed: else the first one has shown all, as if it were killed a little later."""
    environment = environment_for(server, **more)
    row = {"note": "a $PLANTED_TOKEN"}
    with beginning(folder, environment, attempt=1, first=1, last=37, pause_at=37, killed=killed, row=row) as process:
        wait_until((folder / "paused").exists)
        if server is not None and killed:
            wait_until(lambda: server.runs and only(server).rows)  # the client sends every 15 s
        (folder / "paused").unlink()
        told_by(process, killed=killed)
    died(folder, 1, 37, f"rank 0 was killed by SIGKILL {SECRET}")
    commit = folder / "checkpoints" / "step-00000030"
    commit.mkdir(parents=True)
    (commit / "MANIFEST.json").write_text("{}")
    return attempt(folder, environment, attempt=2, first=31, last=60, row=row)


@pytest.mark.parametrize(
    ("killed", "rewinds"),
    [
        (False, False),
        *(pytest.param(killed, rewinds, marks=pytest.mark.long) for killed, rewinds in ((True, False), (True, True), (False, True))),
    ],
)
def test_to_37_and_again_from_30_the_server_has_each_step_once(tmp_path: Path, killed: bool, rewinds: bool) -> None:
    """Also: group, tags, alerts and artifacts are there, and a planted secret is in nothing that was sent or kept."""
    folder = write_run(tmp_path / "mine", 60, wandb_tags=["a"], wandb_group="g", wandb_artifacts="files")
    with Server(rewinds) as server:
        told = run_to_37_and_from_30(folder, server, killed, PLANTED_TOKEN=SECRET)
        check_costs(told, 30, tracking.END_SECONDS)
        assert told["said"] == []
        run = only(server)
        assert run.name == (folder / "wandb" / "run-id").read_text()
        assert {row["note"] for row in read_rows(folder / METRICS_FILE)} == {f"a {SECRET}"}
        truth = [{**row, "note": "a [PLANTED_TOKEN]"} for row in read_rows(folder / METRICS_FILE)]
        (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in truth))
        compare(run.rows, folder, range(1, 61))
        begins = {row["segment/attempt"]: row for row in run.rows if "segment/attempt" in row}
        assert [(number, row["segment/from_step"]) for number, row in sorted(begins.items())] == [(1, 0), (2, 30)]
        assert begins[2]["segment/cause"] == "rank 0 was killed by SIGKILL [PLANTED_TOKEN]"
        if rewinds:
            assert max(row["step"] for row in run.rows if row["attempt"] == 1) == 30, "the server has forgotten what does not count"
        assert [alert["title"] for alert in run.alerts] == ["Restarted", "Finished"], "the first attempt was not at the end of the run"
        assert (run.tags, run.described["groupName"], run.exit_code) == (["a"], "g", 0)
        assert {one["artifactTypeName"] for one in run.artifacts} == {"description"}, "the commit was there before"
        assert any(body.startswith(b"/artifact/run.yaml") for body in server.bodies), "files were asked for"
        sent = b"".join(server.bodies)
    assert SECRET.encode() not in sent
    kept = [path for path in (folder / "wandb").rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert kept == []


@pytest.mark.long
def test_killed_twice_offline_its_own_files_have_each_step_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", 60)
    run_to_37_and_from_30(folder, None)
    compare(list(read_offline(folder)), folder, range(1, 61))


@pytest.mark.long
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_training_whose_rank_is_killed_shows_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, seed: int) -> None:
    """The command itself: two ranks, a kill behind step 12, a resume from a commit, to the end; nothing of it is left running."""
    watch = {"watch": "{log_every_steps: 1, wandb: auto}", "checkpoint.every_steps": "5"}
    prepared = prepare(tmp_path, random.Random(seed))
    with Server() as server:
        for name, value in environment_for(server).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WANDB_MODE", mode)
        run = tmp_path / "place" / "runs" / "tiny"
        with training(prepared.dataset, tmp_path / "place", {**settings_of(24), **watch}) as process:
            wait_until(lambda: any(row["step"] >= 12 for row in read_rows(run / METRICS_FILE)), 120)
            tell(ranks_of(process)[:1], signal.SIGKILL)
            assert process.wait(200) == 0, (tmp_path / "place" / "said.txt").read_text()[-3000:]
        truth = read_rows(run / METRICS_FILE)
        history = only(server).rows if mode == "online" else list(read_offline(run))
        counting = newest_rows(history)
        assert [(row["attempt"], row["step"]) for row in counting] == [(row["attempt"], row["step"]) for row in truth]
        assert {row["step"] for row in counting if "loss" in row} == set(range(1, 25)) and max(row["attempt"] for row in counting) == 2
        kept = read_commit(list_commits(run / "checkpoints")[0]).wandb_id
        assert kept == (run / "wandb" / "run-id").read_text()
        if mode == "online":
            assert [alert["title"] for alert in only(server).alerts] == ["Restarted", "Finished"]
            kinds = {one["artifactTypeName"] for one in only(server).artifacts}
            assert kinds == {"description", "dataset", "model"}


# --- a server that is ill (C10, T23) --------------------------------------------------------------------------

ILLS = ("refuse", "black hole", "error", "slow", "bad JSON")


def fall_ill(server: Server, ill: Any) -> None:
    if ill == "refuse":
        server.refuse()
    else:
        server.ill = ill


def recover(server: Server, ill: Any) -> None:
    server.ill = None
    if ill == "refuse":
        server.open()


def long_but(ill: str, when: str) -> Any:
    """One case runs always."""
    return pytest.param(ill, when, marks=() if (ill, when) == ("refuse", "whole") else pytest.mark.long)


@pytest.mark.parametrize(("ill", "when"), [long_but(ill, when) for ill in ILLS for when in ("whole", "middle", "end")])
def test_an_outage_costs_nothing_and_sync_fills_it(tmp_path: Path, ill: str, when: str) -> None:
    folder, num_steps = write_run(tmp_path / "mine", 200), 200
    with Server() as server:
        environment = environment_for(server)
        if when == "whole":
            fall_ill(server, ill)
        asked = {"attempt": 1, "first": 1, "last": num_steps, "limits": SHORT}
        if when != "whole":
            asked["pause_at"] = num_steps // 2 if when == "middle" else num_steps
        with beginning(folder, environment, **asked) as process:
            if when != "whole":
                wait_until(lambda: (folder / "paused").exists() and server.runs and only(server).rows)
                fall_ill(server, ill)
                (folder / "paused").unlink()
            told = told_by(process)
        check_costs(told, num_steps, SHORT["END_SECONDS"])
        assert len(read_rows(folder / METRICS_FILE)) == num_steps
        recover(server, ill)
        done = pretrain(environment, "wandb", "sync", folder)
        assert done.returncode == 0, done.stderr
        assert "200 rows" in done.stdout and ", 0 missing" in done.stdout, done.stdout
        compare(only(server).rows, folder, range(1, num_steps + 1))
        again = pretrain(environment, "wandb", "sync", folder)
        assert "0 of them sent now, 0 missing" in again.stdout, again.stdout + again.stderr
        compare(only(server).rows, folder, range(1, num_steps + 1))


@pytest.mark.long
def test_a_server_that_never_answers_keeps_the_end_for_a_minute_at_most(tmp_path: Path) -> None:
    """With the limits as they are."""
    folder = write_run(tmp_path / "mine", 100)
    with Server() as server, beginning(folder, environment_for(server), attempt=1, first=1, last=100, pause_at=50) as process:
        wait_until(lambda: (folder / "paused").exists() and server.runs and only(server).rows)
        server.ill = "black hole"
        (folder / "paused").unlink()
        told = told_by(process)
    check_costs(told, 100, 60.0)
    assert told["end"] > 10, "it was given time to answer"


# --- the thread and its queue, without a client ---------------------------------------------------------------


class Broken:
    """A W&B run all of whose methods raise."""

    starting_step = 0

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"wandb {name} is broken")

        return fail


def config(**watch: Any) -> RunConfig:
    return RunConfig.model_validate({"run": {"name": "mine"}, "watch": watch})


def test_disabled_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    assert start_tracking(config(wandb="disabled"), tmp_path, 1, 0, pytest.fail) is None
    track(None, {"step": 1})
    end_tracking(None, failed=False)
    assert not (tmp_path / "wandb").exists()


def test_a_client_that_cannot_start_or_do_anything_is_said_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE")
    modes: list[str] = []

    def fail(config: RunConfig, folder: Path, mode: str, *_: Any) -> None:
        modes.append(mode)
        raise RuntimeError("no service")

    for open_run, opened in ((fail, ["online", "offline"]), (lambda *_: Broken(), [])):
        modes.clear()
        said: list[str] = []
        monkeypatch.setattr(tracking, "open_run", open_run)
        monkeypatch.setattr(tracking, "watch_stop_tag", lambda *_: None)
        tracker = start_tracking(config(), tmp_path, 1, 0, said.append)
        for step in range(1, 4):
            track(tracker, {"step": step, "attempt": 1})
        end_tracking(tracker, failed=True)
        assert modes == opened
        assert len(said) == 2 and "could not be reached" in said[0] and "could not be started" in said[1], said


def test_rows_beyond_the_bound_are_dropped_and_counted_and_the_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracking, "ROWS_WAITING", 10)
    monkeypatch.setattr(tracking, "END_SECONDS", 0.2)
    never = threading.Event()
    monkeypatch.setattr(tracking, "open_run", lambda *_: never.wait(60))
    said: list[str] = []
    tracker = start_tracking(config(), tmp_path, 1, 0, said.append)
    assert tracker is not None
    for step in range(1, 31):
        track(tracker, {"step": step, "attempt": 1})
    began = time.monotonic()
    end_tracking(tracker, failed=False)
    assert time.monotonic() - began < 10
    never.set()
    assert len(said) == 1 and "pretrain wandb sync" in said[0]
    assert tracker._num_dropped == 20 and isinstance(tracker._queue, queue.Queue)


def test_findings_become_alerts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        starting_step = 0

        def __init__(self) -> None:
            self.alerts: list[str] = []
            self.rows: list[tuple[int, dict[str, Any]]] = []

        def log(self, row: dict[str, Any], step: int) -> None:
            self.rows.append((step, row))

        def alert(self, title: str, text: str, level: str) -> None:
            self.alerts.append(f"{title}: {text}")

        def finish(self, exit_code: int) -> None: ...

    run = Run()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracking, "open_run", lambda *_: run)
    monkeypatch.setattr(tracking, "log_description", lambda *_: None)
    died(tmp_path, 1, 5, "rank 1 did not arrive: silent for 300 s in phase step")
    tracker = start_tracking(config(), tmp_path, 2, 5, pytest.fail)
    track(tracker, {"step": 6, "attempt": 2, "spike/step": 6, "spike/loss": 9.0, "spike/z": 12.3})
    track(tracker, {"step": 7, "attempt": 2, "skip/step": 7, "skip/is_scale_search": False})
    track(tracker, {"step": 8, "attempt": 2, "skip/step": 8, "skip/is_scale_search": True})
    end_tracking(tracker, failed=True)
    assert [alert.split(":")[0] for alert in run.alerts] == ["Stalled, and restarted", "Loss spike", "Not finite (NaN)"]
    assert [(step, row["row"]) for step, row in run.rows if "row" in row] == [(1, 0), (2, 1), (3, 2)]
