"""What was written down of a run that was killed again and again: its rows, what Weights & Biases recorded, where its time went.

In: a case. Out: whether each step stands once in `metrics.jsonl` and in what the genuine client wrote (offline, read back with its own
tool), with equal values, and whether the ledger's parts are the wall time, measured from outside, within 1 %.
"""

import signal
import time
from pathlib import Path

from pretrain.watch.ledger import read_ledger
from pretrain.watch.metrics import METRICS_FILE, read_rows, read_run
from pretrain.watch.replay import read_offline
from pretrain.watch.wandb_run import newest_rows
from tests.faults.campaign import Case, Outcome
from tests.faults.trainings import RUN_SECONDS, family_of, ranks_of, settings_of, tell, training, wait_until

MOST_STARTS, NORMS_EVERY, EVALUATED_EVERY = 40, 10, 40
WATCH = f"{{log_every_steps: 1, norms_every_steps: {NORMS_EVERY}, wandb: offline}}"


def check_watched(kills: int, steps: int, case: Case) -> Outcome:
    """One run, a rank or everything of it killed so many times, each some steps behind the one before; started again where it ended."""
    settings, run = settings_of(steps, watch=WATCH), case.folder / "runs" / "tiny"
    said, told, began, code = case.folder / "said.txt", list[str](), 0.0, None
    for _ in range(MOST_STARTS):
        with training(case.prepared.dataset, case.folder, settings) as process:
            if not began:
                wait_until((run / "lease.json").exists, RUN_SECONDS)
                began = time.time()
            while len(told) < kills:
                step = newest_step(run) + case.chosen.randrange(1, max(2, 2 * steps // kills))
                wait_until(lambda step=step: process.poll() is not None or newest_step(run) >= min(step, steps - 1), RUN_SECONDS)
                ranks = ranks_of(process)
                if process.poll() is not None:
                    break
                if not ranks:  # between two attempts
                    continue
                is_all = case.chosen.random() < 0.5
                told.append(f"{'all' if is_all else 'a rank'} at step {newest_step(run)}")
                tell(family_of(process) if is_all else [case.chosen.choice(ranks)], signal.SIGKILL)
                before = newest_attempt(run)
                if is_all:
                    break
                wait_until(lambda before=before: process.poll() is not None or newest_attempt(run) > before, RUN_SECONDS)
            code = process.wait(RUN_SECONDS)
        if code not in (75, -signal.SIGKILL):
            break
    ended = time.time()
    if code:
        return Outcome(len(told), [f"the command ended with {code}: {said.read_text()[-1500:]}"])
    problems = [*rows_that_lack(run, steps), *what_wandb_lacks(run), *ledger_that_is_off(run, ended - began)]
    return Outcome(len(told), [f"{', '.join(told)}: {problem}" for problem in problems])


def rows_that_lack(run: Path, steps: int) -> list[str]:
    """Steps that do not stand once where they should."""
    rows = read_rows(run / METRICS_FILE)
    every = {"loss": 1, "parameter_norm": NORMS_EVERY, "held_out/nats_per_token": EVALUATED_EVERY}
    problems: list[str] = []
    for name, spacing in every.items():
        found = [row["step"] for row in rows if name in row]
        if found != (wanted := [step for step in range(1, steps + 1) if step % spacing == 0]):
            problems.append(f"{name}: missing {sorted(set(wanted) - set(found))}, {len(found)} rows for {len(wanted)} steps")
    if (numbers := read_run(run)["step"].to_pylist()) != list(range(1, steps + 1)):
        problems.append(f"read_run has {len(numbers)} rows for {steps} steps")
    return problems


def what_wandb_lacks(run: Path) -> list[str]:
    """Rows that the client did not record, recorded twice, or with other values."""
    truth, history = read_rows(run / METRICS_FILE), list(read_offline(run))
    names = [(row["attempt"], row["row"]) for row in history if "row" in row]
    counting = newest_rows(history)
    problems = [f"{len(names) - len(set(names))} rows are recorded twice"] if len(names) != len(set(names)) else []
    if [row["row"] for row in counting] != list(range(len(truth))):
        return [*problems, f"W&B has {len(counting)} rows that count, metrics.jsonl {len(truth)}"]
    differing = sum(any(row.get(key) != value for key, value in one.items()) for row, one in zip(counting, truth, strict=True))
    return [*problems, f"{differing} rows have other values in W&B"] if differing else problems


def ledger_that_is_off(run: Path, wall_seconds: float) -> list[str]:
    """Where its sum is not the time that passed outside."""
    ledger = read_ledger(run)
    total = sum(ledger.parts.values())
    print({name: round(seconds, 1) for name, seconds in ledger.parts.items()}, f"of {wall_seconds:.1f} s", flush=True)
    return [] if abs(total - wall_seconds) <= 0.01 * wall_seconds else [f"the ledger has {total:.1f} s of {wall_seconds:.1f} s"]


def newest_step(run: Path) -> int:
    """Of the rows so far."""
    return max((row["step"] for row in read_rows(run / METRICS_FILE)), default=0)


def newest_attempt(run: Path) -> int:
    """That has a row."""
    return max((row["attempt"] for row in read_rows(run / METRICS_FILE)), default=0)
