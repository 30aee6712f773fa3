"""The verbs `status` and `stop`: how runs stand, wherever they run, and their polite end.

In: run folders; what Slurm says of the jobs that launches have left there. Out: a row for each run, as JSON or as a table; a run that was
told to stop, and has. Nothing of a run is changed by looking at it.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.errors import UserError
from launch import kubernetes, queue
from pretrain.verbs.arguments import AsJson, RunArgument, find_run, say

if TYPE_CHECKING:
    from pretrain.run.folder import RunFolder

RUNS = Path("runs")
FRESH_SECONDS = 30.0
"""A lease of another host that was touched within this time, by our clock, is held. Else we look whether it is touched."""
BEAT_SECONDS = 12.0
"""Within which a lease that is held is touched, twice as a rule."""
TAIL_BYTES = 1 << 16
"""The last rows of `metrics.jsonl`, which may be gigabytes."""
LOOK_SECONDS, SAY_SECONDS = 1.0, 10.0
COLUMNS = ("run", "state", "step", "of", "tokens", "loss", "committed", "attempts", "jobs", "why")

Runs = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN]...", help="Run folders, names below runs/, or run files; else all below runs/.")
]


def status(runs: Runs = None, as_json: AsJson = False) -> None:
    """Print how runs stand: running, queued, stopped, done, failed, vanished; step, loss, tokens, last commit, attempts, jobs.

    Example: pretrain status runs/demo --json
    """
    from pretrain.page import open_page

    folders = [find(text) for text in runs] if runs else find_all(RUNS)
    if not folders and not as_json:
        say(f"{RUNS}/ holds no run.")
    rows = [describe(folder) for folder in folders]
    if as_json:
        typer.echo(json.dumps(rows))
    elif rows:
        open_page().table(COLUMNS, [_cells(row) for row in rows])


def stop(
    run: RunArgument,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it has stopped; else only tell it to.")] = True,
) -> None:
    """End a run politely, wherever it runs: the step that is running ends, the state is saved, and no job goes on with it.

    A job that waits in Slurm's queue is cancelled, and so is the rest of a chain; what Kubernetes would make pods of again is deleted,
    by kubectl. To go on, start the run again.

    Example: pretrain stop runs/demo
    """
    folder = find(run)
    row = describe(folder)
    waiting = [job["number"] for job in row["jobs"] if job["waits"]]
    deleted = _delete_pods(folder) if row["state"] != "done" else None
    if deleted is not None:
        say(deleted or "Kubernetes has nothing of this launch.")
    elif row["state"] == "running":
        folder.stop_file.touch()  # first: a job that ends now does not go back into the queue
        say(f"{folder.stop_file} is made; the run stops after the step that is running, and is saved.")
    if waiting:
        queue.cancel(waiting)
        say(f"job {', '.join(waiting)} had not begun and is cancelled.")
    if row["state"] != "running":
        say(f"{folder.path} is not running ({_state_of(row)})." + ("" if waiting else " There is nothing to stop."))
    elif wait:
        row = _wait_for_the_end(folder, by_file=deleted is None)
        say(f"{folder.path}: {_state_of(row)}; step {row['committed']:,} of {row['total_steps']:,} is committed.")


def _delete_pods(folder: "RunFolder") -> str | None:
    """What Kubernetes says of the newest launch's end, or None where the run is not there."""
    launches = _launches(folder)
    return kubernetes.delete(launches[-1].parent) if launches else None


def _wait_for_the_end(folder: "RunFolder", by_file: bool) -> dict[str, Any]:
    """Until nothing of the run is running. Returns how it stands then. by_file: it was told by the file STOP."""
    began = told = time.monotonic()
    while (row := describe(folder))["state"] == "running":
        if by_file and not folder.stop_file.exists():  # a start removes one that is there, and this one had just begun
            folder.stop_file.touch()
        if time.monotonic() - told > SAY_SECONDS:
            told = time.monotonic()
            say(f"still running, at step {row['step']:,} ({told - began:.0f} s); Ctrl-C ends the waiting only")
        time.sleep(LOOK_SECONDS)
    return row


def find(text: str) -> "RunFolder":
    """A run that has begun, or that was launched and is still to begin. Raises UserError."""
    from configs.loader import load_config
    from pretrain.run.folder import RunFolder

    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        folder = RunFolder.of(load_config(path))
    else:
        folder = RunFolder((path if path.exists() or len(path.parts) > 1 else RUNS / text).resolve())
    return folder if _configuration(folder) is not None else find_run(text)


def find_all(root: Path) -> list["RunFolder"]:
    """All runs below a folder, by their names."""
    from pretrain.run.folder import RunFolder

    folders = [RunFolder(path.resolve()) for path in sorted(root.glob("*")) if path.is_dir()]
    return [folder for folder in folders if _configuration(folder) is not None]


def _configuration(folder: "RunFolder") -> Path | None:
    """Where the run's configuration stands: a run that was launched for the first time and waits has it in the launch's folder only."""
    launched = _launches(folder)
    return folder.config_file if folder.config_file.is_file() else (launched[-1] if launched else None)


def _launches(folder: "RunFolder") -> list[Path]:
    """The run files of all launches, the oldest first."""
    return sorted(folder.path.glob("launches/*/run.yaml"), key=lambda path: path.stat().st_mtime)


def describe(folder: "RunFolder") -> dict[str, Any]:
    """How a run stands: plain values, ready for JSON."""
    from configs.loader import load_config
    from pretrain.checkpoint.retention import whole_commits

    path = _configuration(folder)
    if path is None:
        raise UserError(f"{folder.path} holds no run any more.")
    total_steps = load_config(path).training.total_steps
    # First whether it runs, then what it has left: what is read of a run that ends in between would be too old.
    jobs = _jobs(folder)
    lease = _lease(folder, jobs)
    commits = whole_commits(folder.checkpoints)
    attempts = folder.attempts()
    # An object store is not asked: the attempt said what lay there at its end.
    committed = commits[0].state.step if commits else (attempts[-1].get("committed") or 0 if attempts else 0)
    last = _last_loss(folder.path / "metrics.jsonl")
    state, why = _judge(folder, jobs, lease, is_done=committed >= total_steps)
    return {
        "run": str(folder.path),
        "state": state,
        "why": why,
        "step": max(committed, last.get("step", 0)),
        "total_steps": total_steps,
        "loss": last.get("loss"),
        "tokens": max(commits[0].state.tokens_seen if commits else 0, last.get("tokens_seen", 0)),
        "committed": committed,
        "attempts": len(attempts) + (state == "running" and lease is not None),
        "jobs": [job._asdict() | {"waits": job.is_waiting} for job in jobs if job.is_active or job.is_waiting],
    }


def _lease(folder: "RunFolder", jobs: Sequence[queue.Job]) -> str | None:
    """What the lease is: "held" by one who lives, "left" by one who is gone, or None."""
    if not folder.lease_file.exists():
        return None
    if any(job.is_active for job in jobs) or is_alive(folder.lease_file):
        return "held"
    return "left" if folder.lease_file.exists() else None  # it ended while we looked


def _judge(folder: "RunFolder", jobs: Sequence[queue.Job], lease: str | None, is_done: bool) -> tuple[str, str | None]:
    """One word for how the run stands, and why."""
    active = [job for job in jobs if job.is_active]
    if lease == "held" or (active and not is_done):
        return "running", None if lease == "held" else f"job {active[0].number} is {active[0].state.lower()}"
    if is_done:
        return "done", None
    for job in jobs:
        if job.is_waiting:
            return "queued", f"job {job.number} waits: {job.reason}"
    if lease == "left":
        return "vanished", "the attempt that held the lease is gone without a word; start the run again"
    attempts = folder.attempts()
    if not attempts:
        return "not begun", _fate(jobs)
    last = attempts[-1]
    if last.get("end") is None:
        return "vanished", str(last.get("cause"))
    return "stopped" if last.get("status") == 75 else "failed", str(last.get("cause"))


def _fate(jobs: Sequence[queue.Job]) -> str | None:
    """What became of the newest job of a run that never began."""
    return f"job {jobs[-1].number} ended: {jobs[-1].state} ({jobs[-1].reason})" if jobs else None


def is_alive(lease_file: Path) -> bool:
    """Whether who holds a lease lives: by its process where it is on this host, else by the touch that it gets every few seconds."""
    import psutil

    try:
        holder = json.loads(lease_file.read_text())
        if holder["host"] == socket.gethostname():
            process = psutil.Process(int(holder["pid"]))
            return abs(process.create_time() - float(holder["process_started"])) <= 2 and process.status() != psutil.STATUS_ZOMBIE
        touched = lease_file.stat().st_mtime
        if abs(time.time() - touched) < FRESH_SECONDS:
            return True
        say(f"{lease_file.parent} was held by {holder['host']}: looking for a sign of life ({BEAT_SECONDS:.0f} s)")
        time.sleep(BEAT_SECONDS)
        return lease_file.stat().st_mtime != touched  # clocks of two hosts may differ by hours
    except (OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):  # gone while we looked, or left half written
        return False


def _jobs(folder: "RunFolder") -> list[queue.Job]:
    """The jobs of all launches that Slurm still knows, the oldest first."""
    numbers = [number for path in folder.path.glob("launches/*/jobs.json") for number in queue.read_jobs(path)]
    return list(queue.ask(sorted(numbers, key=int)).values())


def _last_loss(path: Path) -> dict[str, Any]:
    """The last row with a loss."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # torn, or cut by our own seek
            continue
        if isinstance(row, dict) and "loss" in row:
            return row
    return {}


def _cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    from pretrain.page import make_visible

    jobs = ", ".join(f"{job['number']} {job['state'].lower()}" for job in row["jobs"])
    loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
    counts = [f"{row[key]:,}" for key in ("step", "total_steps", "tokens")]
    rest = [f"{row['committed']:,}", f"{row['attempts']}", jobs, make_visible(row["why"] or "")]
    return [Path(row["run"]).name, row["state"], *counts, loss, *rest]


def _state_of(row: dict[str, Any]) -> str:
    return row["state"] + (f": {row['why']}" if row["why"] else "")
