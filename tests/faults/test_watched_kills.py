"""What is written down of a run that is killed: each step once in its metrics, and each second of it in one part of its ledger."""

import random
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pretrain.watch.ledger import read_ledger
from pretrain.watch.metrics import METRICS_FILE, read_rows, read_run
from pretrain.watch.timeline import TIMELINE_FILE
from tests.faults.trainings import RUN_SECONDS, attempts_of, family_of, prepare, ranks_of, settings_of, tell, training, wait_until

STEPS, EVALUATED_EVERY = 80, 10


@pytest.mark.long
def test_a_run_that_is_killed_has_each_step_once_and_its_ledger_adds_up(tmp_path: Path, seed: int) -> None:
    """A rank killed, the command and all ranks killed, a polite stop, each at a random step; wall time measured from outside."""
    chosen = random.Random(seed)
    prepared, run = prepare(tmp_path, chosen), tmp_path / "watched" / "runs" / "tiny"
    settings = settings_of(
        STEPS, evaluate__every_steps=str(EVALUATED_EVERY), watch="{log_every_steps: 1, norms_every_steps: 4, wandb: disabled}"
    )
    began = 0.0
    idle: list[float] = []

    def newest_step() -> int:
        return max((row["step"] for row in read_rows(run / METRICS_FILE)), default=0)

    def wait_for(process: subprocess.Popen[bytes], step: int) -> None:
        assert wait_until(lambda: newest_step() >= step or process.poll() is not None, RUN_SECONDS)
        assert process.poll() is None, (tmp_path / "watched" / "said.txt").read_text()[-2000:]

    with training(prepared.dataset, tmp_path / "watched", settings) as process:
        assert wait_until((run / "lease.json").exists, 120)
        began = time.time()
        wait_for(process, chosen.randrange(6, 20))
        tell(chosen.sample(ranks_of(process), 1), signal.SIGKILL)
        assert wait_until(lambda: len(attempts_of(run)) == 1, RUN_SECONDS)
        wait_for(process, chosen.randrange(25, 40))
        idle.append(time.time())
        tell(family_of(process), signal.SIGKILL)
        process.wait(60)
    with training(prepared.dataset, tmp_path / "watched", settings) as process:
        assert wait_until(lambda: len(attempts_of(run)) == 2, 120)  # the one that vanished is written down when the next begins
        idle[-1] = time.time() - idle[-1]
        wait_for(process, chosen.randrange(45, 60))
        process.send_signal(signal.SIGTERM)
        assert process.wait(RUN_SECONDS) == 75
        idle.append(attempts_of(run)[-1]["ended"])
    running = read_ledger(run)
    with training(prepared.dataset, tmp_path / "watched", settings) as process:
        assert wait_until((run / "lease.json").exists, 120)
        idle[-1] = time.time() - idle[-1]
        assert process.wait(RUN_SECONDS) == 0
    wall_seconds = (run / "attempts.jsonl").stat().st_mtime - began

    rows = read_rows(run / METRICS_FILE)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "parameter_norm" in row] == list(range(4, STEPS + 1, 4))
    assert [row["step"] for row in rows if "held_out/sums/nats_per_token" in row] == list(
        range(EVALUATED_EVERY, STEPS + 1, EVALUATED_EVERY)
    )
    check_table(run)

    ledger = read_ledger(run)
    print({name: round(seconds, 2) for name, seconds in ledger.parts.items()}, f"of {wall_seconds:.2f} s")
    assert sum(ledger.parts.values()) == pytest.approx(ledger.wall_seconds, rel=1e-6)
    assert ledger.wall_seconds == pytest.approx(wall_seconds, rel=0.01)
    assert ledger.wall_seconds > running.wall_seconds
    assert [one.attempt for one in ledger.attempts] == [1, 2, 3, 4]
    assert (ledger.attempts[0].first_step, ledger.attempts[-1].last_step) == (0, STEPS)
    assert ledger.parts["idle"] == pytest.approx(sum(idle), abs=max(2.0, 0.05 * wall_seconds))
    assert ledger.parts["queue"] == 0.0
    for one, following in pairwise(ledger.attempts):  # a supervisor that vanished took what it did behind its last row along
        if (one.last_step or 0) > (following.first_step or 0):
            assert one.parts["recomputed"] > 0
    assert ledger.attempts[0].parts["recomputed"] < 10.0, "five steps, and what it took to see that a rank was gone"
    assert all(one.parts["recomputed"] == 0 for one in ledger.attempts[2:]), "stopped politely, done"
    assert all(one.parts["compile"] > 0 and one.parts["start_up"] > 0 for one in ledger.attempts)
    times = [row["time"] for row in read_rows(run / TIMELINE_FILE)]
    assert times == sorted(times)


def check_table(run: Path) -> None:
    """One row for each step, with what every logged step has; parts of a step add up."""
    columns: dict[str, list[Any]] = read_run(run).to_pydict()
    assert columns["step"] == list(range(1, STEPS + 1))
    for name in ("loss", "learning_rate", "tokens_per_second", "tokens_per_second_per_device", "step_seconds", "memory/host_bytes", "time"):
        assert all(value is not None and value > 0 for value in columns[name]), name
    parts = zip(*(columns[f"seconds/{part}"] for part in ("data_wait", "forward", "backward", "optimizer", "other")), strict=True)
    assert [sum(seconds) for seconds in parts] == pytest.approx(columns["step_seconds"])
    saves = {step: kind for step, kind in zip(columns["step"], columns["checkpoint/kind"], strict=True) if kind is not None}
    assert set(saves.values()) == {"durable"} and STEPS in saves
    assert "mfu/palm" not in columns, "of a CPU no peak is known"
