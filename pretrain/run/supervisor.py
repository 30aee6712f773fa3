"""Attempts of a run, until it is done, stopped, or fails for a reason that would come again.

In: a resolved configuration; where the run has several nodes, this one's place among them. Out: an exit status (0 done, 2 a mistake,
75 resumable, else a defect), one line in `attempts.jsonl` for each attempt, and no process left behind. A rank that was killed or crashed
is no reason to give up: the next attempt goes on from the newest commit. Attempts that end without a new one are bounded; those of a launch
also where its job was begun again in between.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from configs.errors import EXIT_DEFECT, EXIT_DONE, EXIT_MISTAKE, EXIT_RESUMABLE, UserError
from configs.schema import RunConfig
from pretrain.run.attempt import about_node, check_processes, run_team
from pretrain.run.folder import RunFolder
from pretrain.run.lease import Lease, read_lease
from pretrain.run.nodes import NodePlace
from pretrain.run.outcome import Outcome, Verdict
from pretrain.run.rollback import record_rollback
from pretrain.run.team import JOIN_SECONDS, Alone, Leader

PAUSES_SECONDS = (0.0, 5.0, 30.0)
"""Before an attempt: behind one that made a commit none, behind the first in vain the second, and so on."""


def supervise(
    config: RunConfig,
    dataset: Path,
    say: Callable[[str], None],
    is_committed: Callable[[Path, int], bool],
    newest_step: Callable[[Path], int],
    launch: str | None = None,
    place: NodePlace | None = None,
    join_seconds: float = JOIN_SECONDS,
) -> int:
    """Run attempts until there is nothing to go on with. Raises UserError before anything was started.

    is_committed: whether a step of a `checkpoints/` folder is committed, intact; newest_step: the newest that is committed there, 0 for
    none (the checkpoint room's answers). launch: what its launcher calls it. place: of this node; None: there is one. join_seconds: until
    all nodes have to be there. Where there are several, the first one calls this; `follow` is for the others.
    """
    folder = RunFolder.of(config)
    num_processes = check_processes(config, place)
    team = Leader(place, about_node(config, num_processes), join_seconds) if place is not None and place.nodes > 1 else Alone()
    status, message = EXIT_DEFECT, "the first node's supervisor failed."
    last_words: list[str] = []

    def say_and_keep(text: str) -> None:
        last_words[:] = [text]
        say(text)

    try:
        status = _supervise(config, folder, dataset, num_processes, say_and_keep, is_committed, newest_step, launch, team)
        message = last_words[0] if last_words else ""
    except UserError as error:
        status, message = EXIT_MISTAKE, f"error: {error}"
        raise
    finally:
        team.end(status, message)
    return status


def _supervise(
    config: RunConfig,
    folder: RunFolder,
    dataset: Path,
    num_processes: int,
    say: Callable[[str], None],
    is_committed: Callable[[Path, int], bool],
    newest_step: Callable[[Path], int],
    launch: str | None,
    team: Alone | Leader,
) -> int:
    os.umask(0o027 if config.run.readable_by == "group" else 0o077)
    temporary = Path(tempfile.gettempdir())  # the ranks get one of their own in it, which goes with each attempt
    in_vain = attempts_in_vain(folder, launch, newest_step(folder.checkpoints))
    cause, is_first = "", True
    if in_vain >= config.run.attempts_in_vain:
        with Lease(folder):  # which writes down the one that vanished
            pass
        say(f"{in_vain} attempts of launch {launch} ended without a new checkpoint (run.attempts_in_vain): no other one is made.")
        return EXIT_DEFECT
    while True:
        before = newest_step(folder.checkpoints)
        verdict = _attempt(config, folder, dataset, num_processes, temporary, say, is_committed, newest_step, is_first, launch, team)
        is_first = False
        say(f"error: {verdict.message}" if verdict.status == EXIT_MISTAKE else verdict.message)
        if not verdict.is_fault:
            return verdict.status
        if verdict.rollback is not None:  # at most guard.rollbacks times
            cause = ""
            continue
        in_vain = 0 if newest_step(folder.checkpoints) > before else in_vain + 1
        if in_vain and verdict.status == EXIT_DEFECT and _cause(verdict.message) == cause:
            say("it failed twice in the same way, without a new checkpoint: no other attempt is made.")
            return verdict.status
        cause = _cause(verdict.message)
        if in_vain >= config.run.attempts_in_vain:
            if in_vain > 1:
                say(f"{in_vain} attempts in a row ended without a new checkpoint (run.attempts_in_vain): no other one is made.")
            return EXIT_DEFECT if launch is not None else verdict.status  # 75 would have the launcher begin again
        pause = PAUSES_SECONDS[min(in_vain, len(PAUSES_SECONDS) - 1)]
        say(f"the next attempt begins {f'in {pause:g} s' if pause else 'now'} ({in_vain} of {config.run.attempts_in_vain} in vain)")
        time.sleep(pause)


def _attempt(
    config: RunConfig,
    folder: RunFolder,
    dataset: Path,
    num_processes: int,
    temporary: Path,
    say: Callable[[str], None],
    is_committed: Callable[[Path, int], bool],
    newest_step: Callable[[Path], int],
    is_first: bool,
    launch: str | None,
    team: Alone | Leader,
) -> Verdict:
    """One attempt, with the folder's lease in hand, recorded."""
    existed = folder.prepare(config, newest_step(folder.checkpoints))
    of_launch = {"launch": launch, "from_commit": newest_step(folder.checkpoints)} if launch is not None else {}
    began = _unix_seconds()
    with Lease(folder, began=began, **of_launch) as lease:
        if existed and is_committed(folder.checkpoints, config.training.total_steps):
            message = f"{folder.path} is done: all {config.training.total_steps} steps are committed. Nothing was changed."
            return Verdict(EXIT_DONE, message, is_fault=False)
        for change in folder.take_changes(config, newest_step(folder.checkpoints)):
            say(change)
        folder.write_description(config, dataset)
        if folder.stop_file.exists() and not is_first:  # made while the attempt before was ending
            return Verdict(EXIT_RESUMABLE, f"{folder.stop_file} is there: no other attempt is made.", is_fault=False)
        if folder.stop_file.exists():
            folder.stop_file.unlink()
            say(f"{folder.stop_file} was there and is removed: this start is asked for. Make it again to stop the run.")
        history = f"continued, attempt {lease.attempt}" if existed else "new"
        where = f"{num_processes} process{'es' if num_processes > 1 else ''}{f' on each of {team.nodes} nodes' if team.nodes > 1 else ''}"
        say(f"run folder {folder.path} ({history}), {where}")
        records: dict[int, Outcome] = {}
        if (missing := team.assemble(say)) is not None:
            verdict = Verdict(missing[1], missing[0], is_fault=missing[1] == EXIT_RESUMABLE)
        else:
            verdict, records = run_team(folder, lease.attempt, num_processes, temporary, team)
        if verdict.rollback is not None:
            record_rollback(folder.path, verdict.rollback)
        first_step, last_step = _steps(folder, lease.attempt, records)
        folder.record_attempt(
            {
                "attempt": lease.attempt,
                "host": os.uname().nodename,
                "pid": os.getpid(),
                "started": lease.started,
                "began": began,
                "end": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "ended": _unix_seconds(),
                "status": verdict.status,
                "cause": _cause(verdict.message),
                "first_step": first_step,
                "last_step": last_step,
                "num_processes": num_processes * team.nodes,
                **({"nodes": [team.name(number) for number in range(team.nodes)]} if isinstance(team, Leader) else {}),
                **of_launch,
                **({"stopped": True} if verdict.status == EXIT_RESUMABLE and not verdict.is_fault else {}),
                **({"rollback": verdict.rollback} if verdict.rollback is not None else {}),
                "committed": newest_step(folder.checkpoints),
                **({"parent": config.start_from} if config.start_from is not None else {}),
            }
        )
    return verdict


def attempts_in_vain(folder: RunFolder, launch: str | None, newest: int) -> int:
    """How many attempts of this launch, the last ones of the run, have failed without a checkpoint newer than the one they began from."""
    count, rows = 0, folder.attempts() if launch is not None else []
    vanished = read_lease(folder.lease_file) if launch is not None else None
    if vanished is not None and vanished.get("attempt") == len(rows) + 1:
        rows.append(vanished)  # it is written down when its lease is taken
    for row in reversed(rows):
        if row.get("launch") != launch or row.get("from_commit") != newest or row.get("stopped"):
            break
        count += 1
    return count


def _unix_seconds() -> float:
    return round(datetime.now(timezone.utc).timestamp(), 3)


def _cause(message: str) -> str:
    """A line for `attempts.jsonl`: the first; of a traceback also the last, which names the exception."""
    lines = [line for line in message.splitlines() if line.strip()] or [""]
    return f"{lines[0]} {lines[-1]}" if "Traceback" in message else lines[0]


def _steps(folder: RunFolder, attempt: int, records: dict[int, Outcome]) -> tuple[int | None, int | None]:
    """The first and the last step of an attempt, as a rank wrote them down."""
    told = [(record.first_step, record.last_step) for record in records.values() if record.last_step is not None]
    return told[0] if told else _logged_steps(folder, attempt)


def _logged_steps(folder: RunFolder, attempt: int) -> tuple[int | None, int | None]:
    """The first and last step that an attempt logged, where it could not say itself how far it came."""
    steps: list[int] = []
    path = folder.path / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if row["attempt"] == attempt:
                steps.append(int(row["step"]))
    return (min(steps), max(steps)) if steps else (None, None)
