"""`pretrain wandb sync`: rows that were not shown are, once; with the genuine client."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.errors import UserError
from pretrain.watch.metrics import METRICS_FILE
from pretrain.watch.replay import missing_rows, read_offline
from pretrain.watch.wandb_run import newest_rows
from tests.pretrain.verbs import call, hear_ctrl_c
from tests.pretrain.watch.tracked import ROOT, attempt, compare, environment_for, pretrain, wait_until, write_run
from tests.pretrain.watch.wandb_server import Server


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(*spans: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Of attempts, each with its first and last step."""
    return [
        {"step": step, "tokens_seen": 10 * step, "attempt": number, "loss": 1 / step}
        for number, first, last in spans
        for step in range(first, last + 1)
    ]


def test_what_is_missing_is_what_the_server_lacks_whatever_that_is(seed: int) -> None:
    chosen = random.Random(seed)
    rows = rows_of((1, 1, 30), (2, 31, 50), (4, 51, 90))
    for _ in range(50):
        whole = missing_rows(rows, [])
        there = [row for row in whole if chosen.random() < chosen.choice([0.0, 0.1, 0.9, 1.0])]
        missing = missing_rows(rows, there)
        assert sorted(map(str, there + missing)) == sorted(map(str, whole)), "nothing twice, nothing left out"
        assert newest_rows(there + missing) == [{**row, "row": number} for number, row in enumerate(rows)]
    assert missing_rows(rows, whole) == []
    void = [{**row, "row": row["step"] - 1} for row in rows_of((1, 31, 37), (3, 51, 70))]
    assert newest_rows(void + missing_rows(rows, void)) == [{**row, "row": number} for number, row in enumerate(rows)]


def test_offline_one_fresh_folder_holds_each_row_once(tmp_path: Path) -> None:
    """Read back with the client's own tool; an older folder, of an attempt, is left as it is."""
    folder = write_run(tmp_path / "mine", 60)
    rows = rows_of((1, 1, 30), (2, 31, 60))
    write_rows(folder, [*rows[:45], {"step": 45, "attempt": 2, "tokens_seen": 45, "held_out/nats_per_token": 3.0}, *rows[45:]])
    done = pretrain(environment_for(None), "wandb", "sync", folder, "--offline")
    assert done.returncode == 0, done.stderr
    place = Path(done.stdout.split()[-1])
    assert place.parent == folder / "wandb" and place.name.startswith("offline-run-")
    history = list(read_offline(folder))
    assert [row["step"] for row in newest_rows(history)] == [*range(1, 46), *range(45, 61)]
    assert sum("row" in row for row in history) == 61
    assert [row["segment/from_step"] for row in history if "segment/attempt" in row] == [0, 30]


def test_what_cannot_be_done_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_run(tmp_path / "mine", 10)
    with pytest.raises(UserError, match="has not logged a step yet"):
        call("wandb", "sync", folder)
    write_rows(folder, rows_of((1, 1, 10)))
    with pytest.raises(UserError, match="no API key"):
        call("wandb", "sync", folder)
    started = psutil.Process().create_time()
    lease = {"host": socket.gethostname(), "pid": os.getpid(), "process_started": started, "attempt": 1}
    (folder / "lease.json").write_text(json.dumps(lease))
    with pytest.raises(UserError, match="is running"):
        call("wandb", "sync", folder)


@pytest.mark.long
@pytest.mark.parametrize("ill", ["error", "bad JSON", "refuse"])
def test_a_server_that_is_ill_is_said_and_nothing_is_lost(tmp_path: Path, ill: Any) -> None:
    folder = write_run(tmp_path / "mine", 20)
    write_rows(folder, rows_of((1, 1, 20)))
    with Server() as server:
        environment = environment_for(server)
        if ill == "refuse":
            server.refuse()
        else:
            server.ill = ill
        done = pretrain(environment, "wandb", "sync", folder)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) <= 3 and "the same command goes on" in done.stderr, done.stderr
        server.ill = None
        if ill == "refuse":
            server.open()
        assert pretrain(environment, "wandb", "sync", folder).returncode == 0
        (run,) = server.runs.values()
        compare(run.rows, folder, range(1, 21))


@pytest.mark.long
def test_an_interrupted_call_leaves_things_whole_and_the_next_one_goes_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", 3000)
    with Server() as server:
        environment = environment_for(server)
        attempt(folder, environment, attempt=1, first=1, last=100)
        write_rows(folder, rows_of((1, 1, 100), (2, 101, 3000)))
        server.ill = "slow"
        command = [sys.executable, "-m", "pretrain.cli", "wandb", "sync", str(folder)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear_ctrl_c)
        try:
            num_asked = len(server.asked)
            wait_until(lambda: "UpsertBucket" in server.asked[num_asked:])
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=60)[1]
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 75 and "goes on where this one was" in error, error
        server.ill = None
        done = pretrain(environment, "wandb", "sync", folder)
        assert done.returncode == 0, done.stderr
        (run,) = server.runs.values()
        compare(run.rows, folder, range(1, 3001))
