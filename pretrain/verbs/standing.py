"""How a run stands: read from what lies in its folder, and from what Slurm says of the jobs that launches have left there.

In: run folders. Out: a row for each, plain values with units in their names. Nothing of a run is changed by looking at it, and of files
that grow only the ends are read (of `timeline.jsonl` all, for the goodput).
"""

import json
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from launch import queue
from pretrain.verbs.arguments import say
from pretrain.watch.tail import read_tail

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from configs.stall_section import StallSection
    from pretrain.checkpoint.verify import Commit
    from pretrain.run.folder import RunFolder

FRESH_SECONDS = 30.0
"""A lease of another host that was touched within this time, by our clock, is held. Else we look whether it is touched."""
BEAT_SECONDS = 12.0
"""Within which a lease that is held is touched, twice as a rule."""
SILENT_SECONDS, SILENT_STEPS = 60.0, 3
"""A run is stalled when its timeline, which gets a row every ten seconds, is silent for so long, and for so many steps."""
LONG_ACT_SECONDS = {"start": 1800.0, "first_step": 1800.0, "score": 1800.0, "save": 1800.0, "end": 120.0}
"""The same for phases that are one act and say nothing before it is done, unless `stall` does: what the watchdog takes at first."""
GOODPUT_SECONDS, GOODPUT_COSTS = 30.0, 50
"""Where runs are watched, it is computed anew so often, and not before so many times what it took."""
NUM_READERS = 8
RUNNING = ("running", "saving", "evaluating", "stalled")
"""States of a run that somebody works on."""
STATE_OF_PHASE = {"save": "saving", "evaluate": "evaluating", "score": "evaluating"}
TAKEN_AWAY = {"PREEMPTED", "TIMEOUT", "DEADLINE", "NODE_FAIL"}
"""What Slurm says of a job that it ended itself."""
WHY_OF_PHASE = {"start": "is starting", "first_step": "is in its first step", "end": "is ending"}


@dataclass
class Memory:
    """What one look leaves for the next one."""

    abandoned: dict[Path, float] = field(default_factory=dict)
    """Leases that were not touched while we waited for it -> when they were touched last."""
    goodput: dict[Path, tuple[float, int, float | None]] = field(default_factory=dict)
    """Timeline -> until when it holds (monotonic seconds), the file's size, what it was."""


def configuration_of(folder: "RunFolder") -> Path | None:
    """Where the run's configuration stands: a run that was launched for the first time and waits has it in the launch's folder only."""
    launched = launches_of(folder)
    return folder.config_file if folder.config_file.is_file() else (launched[-1] if launched else None)


def launches_of(folder: "RunFolder") -> list[Path]:
    """The run files of all launches, the oldest first."""
    return sorted(folder.path.glob("launches/*/run.yaml"), key=lambda path: path.stat().st_mtime)


def ask_jobs(folders: Sequence["RunFolder"]) -> dict[str, queue.Job]:
    """The jobs of all launches of these runs that Slurm still knows, by number; it is asked once."""
    return queue.ask(sorted({number for folder in folders for number in _job_numbers(folder)}, key=int))


def describe_all(
    folders: Sequence["RunFolder"], jobs: Mapping[str, queue.Job] | None = None, memory: Memory | None = None
) -> list[dict[str, Any]]:
    """`describe` of several at a time. A run whose folder cannot be read has a row that says so, unless it is the only one."""
    known = ask_jobs(folders) if jobs is None else jobs  # first whether they run, then what they have left

    def look(folder: "RunFolder") -> dict[str, Any]:
        try:
            return describe(folder, known, memory)
        except (UserError, OSError) as error:
            if len(folders) == 1:
                raise
            return _row(folder, state="unreadable", why=str(error))

    with ThreadPoolExecutor(NUM_READERS) as readers:  # they wait for file systems, and for signs of life
        return list(readers.map(look, folders))


def describe(folder: "RunFolder", jobs: Mapping[str, queue.Job] | None = None, memory: Memory | None = None) -> dict[str, Any]:
    """How a run stands: plain values, ready for JSON; what is not known is None. Raises UserError for a folder that holds no run.

    jobs: what Slurm says, by number; None: it is asked.
    """
    path = configuration_of(folder)
    if path is None:
        raise UserError(f"{folder.path} holds no run any more.")
    config = _load_config(path, path.stat().st_mtime_ns)
    # First whether it runs, then what it has left: what is read of a run that ends in between would be too old.
    known, memory = ask_jobs([folder]) if jobs is None else jobs, memory or Memory()
    own = [known[number] for number in _job_numbers(folder) if number in known]
    lease = _lease(folder, own, memory)
    commit = _newest_commit(folder)
    attempts = folder.attempts()
    # An object store is not asked: the attempt said what lay there at its end.
    committed = commit.state.step if commit else (attempts[-1].get("committed") or 0 if attempts else 0)
    steps = config.training.steps
    state, why = _judge(folder, own, lease, is_done=committed >= steps.total_steps)
    logged = [row for row in read_tail(folder.path / "metrics.jsonl") if "tokens_seen" in row]
    losses, rates = [row["loss"] for row in logged if "loss" in row], _rates(logged)
    last = logged[-1] if logged else {}
    tokens = max(commit.state.tokens_seen if commit else 0, last.get("tokens_seen", 0))
    row = _row(
        folder,
        state=state,
        why=why,
        step=max(committed, last.get("step", 0)),
        total_steps=steps.total_steps,
        tokens=tokens,
        total_tokens=steps.total_tokens,
        loss=losses[-1] if losses else None,
        tokens_per_second=rates,
        committed=committed,
        committed_seconds_ago=max(0.0, time.time() - commit.time) if commit else None,
        attempts=len(attempts) + (state == "running" and lease is not None),
        goodput=_goodput(folder, memory),
        jobs=[job._asdict() | {"waits": job.is_waiting} for job in own if job.is_active or job.is_waiting],
    )
    if state == "running" and lease is not None:
        row |= _activity(folder, len(attempts) + 1, logged, config.stall, row["step"])
    if row["state"] in RUNNING and row["state"] != "stalled" and rates:
        row["seconds_left"] = max(0, steps.total_tokens - tokens) / rates
    return row


def _row(folder: "RunFolder", **known: Any) -> dict[str, Any]:
    """A row with every key; None for what is not known."""
    keys = ("state", "phase", "why", "stalled_seconds", "step", "total_steps", "tokens", "total_tokens", "loss", "tokens_per_second")
    keys += ("seconds_left", "committed", "committed_seconds_ago", "attempts", "goodput")
    return {"run": str(folder.path), **dict.fromkeys(keys), "jobs": [], **known}


@lru_cache(maxsize=1024)
def _load_config(path: Path, changed_ns: int) -> "RunConfig":
    """changed_ns: when the file was, so that it is read anew after that."""
    from configs.loader import load_config

    return load_config(path)


def _job_numbers(folder: "RunFolder") -> list[str]:
    """Of all launches, the oldest first."""
    return sorted((number for path in folder.path.glob("launches/*/jobs.json") for number in queue.read_jobs(path)), key=int)


def _newest_commit(folder: "RunFolder") -> "Commit | None":
    """The newest that is whole; older ones are not looked at."""
    from pretrain.checkpoint.verify import list_commits, read_whole_commit

    return next((commit for path in list_commits(folder.checkpoints) if (commit := read_whole_commit(path)) is not None), None)


def _lease(folder: "RunFolder", jobs: Sequence[queue.Job], memory: Memory) -> str | None:
    """What the lease is: "held" by one who lives, "left" by one who is gone, or None."""
    if not folder.lease_file.exists():
        return None
    if any(job.is_active for job in jobs) or is_alive(folder.lease_file, memory):
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
    if last.get("status") != 75:
        return "failed", str(last.get("cause"))
    if jobs and jobs[-1].state in TAKEN_AWAY:
        return "preempted", f"{last.get('cause')} {_fate(jobs)}"
    return "stopped", str(last.get("cause"))


def _fate(jobs: Sequence[queue.Job]) -> str | None:
    """What became of the newest job."""
    return f"job {jobs[-1].number} ended: {jobs[-1].state} ({jobs[-1].reason})" if jobs else None


def is_alive(lease_file: Path, memory: Memory | None = None) -> bool:
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
        if memory is not None and memory.abandoned.get(lease_file) == touched:
            return False
        say(f"{lease_file.parent} was held by {holder['host']}: looking for a sign of life ({BEAT_SECONDS:.0f} s)")
        time.sleep(BEAT_SECONDS)
        if lease_file.stat().st_mtime != touched:  # clocks of two hosts may differ by hours
            return True
        if memory is not None:
            memory.abandoned[lease_file] = touched
        return False
    except (OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):  # gone while we looked, or left half written
        return False


def _activity(folder: "RunFolder", attempt: int, logged: Sequence[Mapping[str, Any]], stall: "StallSection", step: int) -> dict[str, Any]:
    """What a run that is held does at the moment, as the newest row of its timeline tells: state, phase, why, step, and how long ago.

    The clock of another host may be hours off: the file's time is compared with that of the lease, which is touched every few seconds on
    the same file system.
    """
    path = folder.path / "timeline.jsonl"
    rows = [row for row in read_tail(path) if row.get("attempt") == attempt and "phase" in row]
    if not rows:
        return {"phase": "start", "why": WHY_OF_PHASE["start"]} if path.exists() else {}
    last = rows[-1]
    try:
        silent = max(0.0, _newest_sign(folder.lease_file) - path.stat().st_mtime)
    except (OSError, ValueError):  # it ended while we looked
        silent = 0.0
    phase = last["phase"]
    limit = max(SILENT_SECONDS, SILENT_STEPS * _step_seconds(logged))
    if phase in LONG_ACT_SECONDS:
        limit = getattr(stall, f"{'start' if phase == 'first_step' else phase}_seconds") or LONG_ACT_SECONDS[phase]
    known = {"phase": phase, "step": max(step, last.get("step") or 0)}
    if silent > limit:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - silent))
        return known | {"state": "stalled", "stalled_seconds": silent, "why": f"silent since {since}, in phase {phase}"}
    return known | {"state": STATE_OF_PHASE.get(phase, "running"), "why": WHY_OF_PHASE.get(phase)}


def _newest_sign(lease_file: Path) -> float:
    """When the holder was seen alive last, by the clock of the run's file system: now, where it is on this host."""
    holder = json.loads(lease_file.read_text() or "{}")
    return max(lease_file.stat().st_mtime, time.time() if holder.get("host") == socket.gethostname() else 0.0)


def _step_seconds(logged: Sequence[Mapping[str, Any]]) -> float:
    """Of a step, by the newest row that says so; 0 where none does."""
    return next((row["step_seconds"] for row in reversed(logged) if row.get("step_seconds")), 0.0)


def _rates(logged: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens per second: the median of the newest ten rows of the last attempt."""
    rates = [row["tokens_per_second"] for row in logged if "tokens_per_second" in row and row.get("attempt") == logged[-1].get("attempt")]
    return statistics.median(rates[-10:]) if rates else None


def _goodput(folder: "RunFolder", memory: Memory) -> float | None:
    """Productive time as a share of all, where there is a timeline."""
    from pretrain.watch.ledger import read_ledger

    path = folder.path / "timeline.jsonl"
    if not path.is_file():
        return None
    began, size = time.monotonic(), path.stat().st_size
    holds_until, known_size, value = memory.goodput.get(path, (began, -1, None))
    if began >= holds_until and (size != known_size or folder.lease_file.exists()):
        try:
            value = read_ledger(folder.path).goodput
        except (KeyError, TypeError, ValueError):  # rows that somebody else wrote
            value = None
        now = time.monotonic()
        memory.goodput[path] = (now + max(GOODPUT_SECONDS, GOODPUT_COSTS * (now - began)), size, value)
    return value
