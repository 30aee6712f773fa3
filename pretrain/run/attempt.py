"""One attempt's ranks, on one node or on several: run, waited for, judged.

In: a run folder, this node's place, what a `Team` says. Out: on the first node what is to be made of the attempt; on the others the exit
status that the first one ordered.
"""

import os
import re
import tempfile
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path

from configs.errors import EXIT_DEFECT, EXIT_MISTAKE, EXIT_RESUMABLE, UserError
from configs.redaction import redact
from configs.schema import RunConfig
from pretrain.run.environment import describe_environment
from pretrain.run.folder import RunFolder
from pretrain.run.nodes import NodePlace
from pretrain.run.outcome import Outcome, Verdict, decide
from pretrain.run.ranks import run_ranks
from pretrain.run.team import JOIN_SECONDS, Alone, Follower, Leader, NodeResult
from pretrain.run.watchdog import decide_stalled, spell


def run_team(
    folder: RunFolder, attempt: int, num_processes: int, temporary: Path, team: Alone | Leader
) -> tuple[Verdict, dict[int, Outcome]]:
    """Run an attempt on all nodes to its end. Returns what is to be made of it, and what each rank wrote down of how it ended.

    num_processes: of each node. temporary: where this node's ranks get a folder of their own. Nothing is left running.
    """
    team.begin(attempt, folder.path)
    results, lost = team.gather(_ranks_of_node(folder, attempt, num_processes, temporary, team))
    records = {rank: record for result in results.values() for rank, record in result.records.items()}
    total_steps, stacks = folder.load_config().training.total_steps, folder.path / "stacks" / f"attempt-{attempt}"
    return decide_attempt(results, lost, partial(name_of_rank, num_processes, team), total_steps, stacks), records


def follow(config: RunConfig, say: Callable[[str], None], place: NodePlace, join_seconds: float = JOIN_SECONDS) -> int:
    """Run this node's ranks in the attempts that the first node orders, until it orders the end. Returns the exit status."""
    num_processes = check_processes(config, place)
    os.umask(0o027 if config.run.readable_by == "group" else 0o077)
    temporary, team = Path(tempfile.gettempdir()), Follower(place, about_node(config, num_processes), join_seconds)

    def run(folder: Path, attempt: int) -> NodeResult:
        say(f"node {place.node} of {place.nodes}: attempt {attempt}, {num_processes} processes")
        return _ranks_of_node(RunFolder(folder), attempt, num_processes, temporary, team)

    return team.follow(run, say)


def check_processes(config: RunConfig, place: NodePlace | None = None) -> int:
    """Ranks of this node. Raises UserError where those of all nodes do not divide the batch."""
    num_processes = count_processes(config)
    try:
        config.training.accumulation(num_processes * (place.nodes if place is not None else 1))
    except ValueError as error:
        raise UserError(f"{error}.") from None
    return num_processes


def about_node(config: RunConfig, num_processes: int) -> dict[str, str]:
    """What has to be equal on all nodes of a run, by what it is called."""
    environment = describe_environment()
    versions = {name: str(version) for name, version in environment["versions"].items()}
    code = f"{environment['git_commit']}{' with changes' if environment['git_changes'] else ''}"
    described = sha256(config.model_dump_json().encode()).hexdigest()[:12]
    return {"processes": str(num_processes), "configuration": described, "python": environment["python"], "code": code, **versions}


def _ranks_of_node(folder: RunFolder, attempt: int, num_processes: int, temporary: Path, team: Alone | Leader | Follower) -> NodeResult:
    with tempfile.TemporaryDirectory(prefix="pretrain-", dir=temporary) as scratch:
        try:
            return run_ranks(folder, attempt, num_processes, Path(scratch), team)
        except Exception:  # the launcher itself failed: an attempt all the same
            return NodeResult(problem=f"the ranks could not be started:\n{redact(traceback.format_exc())}")


def name_of_rank(num_processes: int, team: Alone | Leader, rank: int) -> str:
    """A rank with its node, as messages name it."""
    return f"rank {rank} on {team.name(rank // num_processes)}"


def decide_attempt(
    results: Mapping[int, NodeResult], lost: Mapping[int, str], name: Callable[[int], str], total_steps: int, stacks: Path
) -> Verdict:
    """What is to be made of an attempt. results: of each node that told; lost: why, of each that did not. stacks: where they lie."""
    records = {rank: record for result in results.values() for rank, record in result.records.items()}
    exit_codes = {rank: code for result in results.values() for rank, code in result.exit_codes.items()}
    places = {rank: place for result in results.values() for rank, place in result.places.items()}
    late = [one for result in results.values() for one in result.late]
    several = len(results) + len(lost) > 1
    if problem := next((result for result in results.values() if result.problem is not None), None):
        status = EXIT_MISTAKE if problem.is_mistake else EXIT_DEFECT
        return Verdict(status, str(problem.problem), is_fault=several and not problem.is_mistake)
    if late:
        stalled = f"{spell(late, places, name)}. The stacks of all ranks are in {stacks}."
        verdict = decide_stalled(late, stalled, records, total_steps)
    else:
        verdict = decide(records, exit_codes, *([name] if several else []))
    if lost and verdict.status != EXIT_MISTAKE:
        verdict = Verdict(EXIT_RESUMABLE, f"{'; '.join(lost.values())}. The run can be resumed.", is_fault=True)
    asked = sum(result.signals for result in results.values())  # who asks three times wants it to end, not to begin again
    message = re.sub(r"\n{3,}", "\n\n", verdict.message.strip())
    return verdict._replace(message=message, is_fault=verdict.is_fault and not asked)


def count_processes(config: RunConfig) -> int:
    """Ranks to start on this machine: as configured, or one per GPU, or `cpu_processes`."""
    import torch

    devices = torch.cuda.device_count()
    if devices and (config.parallel.processes or 0) > devices:
        raise UserError(
            f"parallel.processes is {config.parallel.processes} and this machine has {devices} GPUs; a rank needs one of its own."
        )
    return config.parallel.processes or devices or config.parallel.cpu_processes
