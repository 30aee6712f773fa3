"""Bare machines over ssh: which hosts a launch takes, what each has to have, and the launch itself, in the foreground.

In: a LaunchPlan; DeepSpeed's hostfile (a line `HOST slots=N` each) or the names in the cluster file. Out: the files of the launch's folder
that ssh needs, and the exit status of all nodes together. A hostfile that is missing or wrong is refused with its line: DeepSpeed's own
launcher goes on without it, on this machine alone.
"""

import asyncio
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from configs.cluster import HOST_PATTERN, HostsSection
from configs.errors import UserError
from launch.plan import ENVIRONMENT_FILE, NODE_SCRIPT, LaunchPlan, render_node_script
from launch.ssh import Remote, check_hosts, hold_hosts

HOSTS_FILE, CHECK_SCRIPT, HOST_SCRIPT, AGAIN_SCRIPT = "hosts", "check.sh", "host.sh", "node-again.sh"
SLOTS = re.compile(r"slots=([0-9]{1,5})")
SILENT_SECONDS = 20
"""A host that hears nothing of its launcher for so long ends its node; the launcher says something every two seconds."""


class Host(NamedTuple):
    """A machine that ssh reaches."""

    name: str
    slots: int
    """Processes that may be started there, which is its GPUs."""


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a hostfile, in its order.

    The syntax is DeepSpeed's (`deepspeed/launcher/runner.py`): `HOST slots=N`, empty lines, `#` for comments, here also behind an entry.
    What that one passes over (other words on the line, no slots, strange names) is refused. Raises UserError with the line's number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text; wanted a hostfile with a line `HOST slots=N` for each host.") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; wanted a hostfile (hosts.hostfile of the cluster file).") from None
    hosts: dict[str, tuple[int, Host]] = {}
    for number, line in enumerate(lines, 1):
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if not words:
            continue
        host = _read_entry(words, f"{path}, line {number}")
        if host.name.lower() in hosts:
            first = hosts[host.name.lower()][0]
            raise UserError(f"{path}, line {number}: {host.name} stands in line {first} already; give every host one line.")
        hosts[host.name.lower()] = (number, host)
    if not hosts:
        raise UserError(f"{path} names no host; wanted a line `HOST slots=N` for each.")
    return tuple(host for _, host in hosts.values())


def _read_entry(words: Sequence[str], where: str) -> Host:
    found = SLOTS.fullmatch(words[1]) if len(words) == 2 else None
    if not HOST_PATTERN.fullmatch(words[0]):
        raise UserError(f"{where}: found {words[0]!r}, wanted a host name or an IPv4 address.")
    if found is None or not int(found[1]):
        raise UserError(f"{where}: found {' '.join(words)!r}, wanted `{words[0]} slots=N` with a number from 1 on.")
    return Host(words[0], int(found[1]))


def hosts_of(plan: LaunchPlan) -> tuple[Host, ...]:
    """The hosts that this launch takes: the first ones, as many as it has nodes. Raises UserError where they do not suffice."""
    section = _section(plan)
    if bool(section.hostfile) == bool(section.hosts):
        raise UserError(f"cluster {plan.cluster.name}: wanted either hosts.hostfile or hosts.hosts; give one of them.")
    if section.hostfile:
        hosts, where = read_hostfile(Path(section.hostfile)), section.hostfile
    else:
        hosts, where = tuple(Host(name, plan.processes_per_node) for name in section.hosts), f"cluster {plan.cluster.name}"
        names = [name.lower() for name in section.hosts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{where}: hosts.hosts names {', '.join(twice)} more than once; give every host one place.")
    if len(hosts) < plan.nodes:
        raise UserError(
            f"{where} has {len(hosts)} hosts and {plan.nodes} nodes are wanted; add hosts, or launch with --nodes {len(hosts)}."
        )
    hosts = hosts[: plan.nodes]
    if small := [f"{host.name} (slots={host.slots})" for host in hosts if host.slots < plan.processes_per_node]:
        raise UserError(f"{where}: {plan.processes_per_node} processes are wanted on each node; there is no room on {', '.join(small)}.")
    return hosts


def _section(plan: LaunchPlan) -> HostsSection:
    if plan.cluster.hosts is None:
        raise UserError(f"cluster {plan.cluster.name} has no section `hosts`, which names the machines that ssh reaches; add it.")
    if plan.builds_data or plan.chain > 1:
        raise UserError("over ssh a training is launched, now: no data build and no chain of jobs; leave --data and --chain out.")
    return plan.cluster.hosts


def render(plan: LaunchPlan) -> dict[str, str]:
    """What stands in the launch's folder beside the plan's own files: name -> content. Raises UserError for a wrong hostfile."""
    lines = [f"# Launch {plan.launch_id}: node 0 first.", *(f"{host.name} slots={host.slots}" for host in hosts_of(plan))]
    again = _render_again(plan)
    return {HOSTS_FILE: "\n".join(lines) + "\n", CHECK_SCRIPT: _render_check(plan), HOST_SCRIPT: _render_host(plan), AGAIN_SCRIPT: again}


def _render_again(plan: LaunchPlan) -> str:
    """A node whose host was lost comes back without the doctor: the others are beyond it, and would not meet it there."""
    job = plan.cluster.job.model_copy(update={"doctor": False})
    return render_node_script(replace(plan, cluster=plan.cluster.model_copy(update={"job": job})))


_LACKS = """
import importlib.util, ipaddress, socket, sys
lacks = [name for name in ("pretrain", "torch", "deepspeed") if importlib.util.find_spec(name) is None]
if lacks:
    sys.exit(f"{sys.executable} has no {', '.join(lacks)}; install the project there, or name another job.python")
first, node = sys.argv[1:]
try:
    address = socket.gethostbyname(first)
except OSError as error:
    sys.exit(f"does not know the first host by its name, {first} ({error}); put it into /etc/hosts, or use its address")
if node != "0" and address != first and ipaddress.ip_address(address).is_loopback:
    sys.exit(f"takes the first host, {first}, for itself ({address}); use its name in the network, or its address")
"""


def _render_check(plan: LaunchPlan) -> str:
    job, quote = plan.cluster.job, shlex.quote
    no_scratch = f"cannot write to {job.scratch}; name another folder of each node as job.scratch"
    no_python = f"found no {job.python}; job.python and job.setup of the cluster file say where it is"
    no_source = f"does not see {plan.code.source}, which holds the code; put it on a path that all hosts share"
    lines = [
        "#!/usr/bin/env bash",
        f"# Whether a host can run a node of launch {plan.launch_id}: bash {CHECK_SCRIPT} FIRST_HOST NODE. What it lacks is the last line.",
        "set -eo pipefail",
        f"[[ -w {quote(job.scratch)} ]] || {{ echo {quote(no_scratch)} >&2; exit 1; }}",
        *job.setup,
        f"source {quote(str(PurePosixPath(plan.folder) / ENVIRONMENT_FILE))}",
        f"command -v {quote(job.python)} >/dev/null || {{ echo {quote(no_python)} >&2; exit 1; }}",
        f"cd {quote(plan.code.source)} || {{ echo {quote(no_source)} >&2; exit 1; }}",
        f'exec {quote(job.python)} -c {quote(_LACKS)} "$1" "$2"',
    ]
    return "\n".join(lines) + "\n"


_HOLD = r"""
# Processes are found by what stands in their environment: ranks and trackers have sessions of their own, and parents that are gone.
end_all() {
  local -a found
  for _ in {1..50}; do
    mapfile -t found < <(grep -slzFx "$1" /proc/[0-9]*/environ | cut -d / -f 3)
    ((${#found[@]})) || return 0
    kill -KILL "${found[@]}" 2>/dev/null
    sleep 0.2
  done
  echo "processes ${found[*]} do not end" >&2
}

end_all "$mark" # what a connection of this node that was cut off left
# What is compiled is this connection's alone: a lock that a kill left there would hold up all who come after.
builds=$(mktemp -d "$scratch/pretrain-$launch-XXXXXXXXXX") || exit 1
trap 'end_all "PRETRAIN_SESSION=$builds"; rm -rf -- "$builds"' EXIT
exec 3<&0 </dev/null
env "$mark" PRETRAIN_SESSION="$builds" TORCH_EXTENSIONS_DIR="$builds" bash "$3" "$1" "$2" 3<&- &
node=$!
{
  while read -r -t "$silent_seconds" word <&3; do
    [[ $word != stop ]] || kill -TERM "$node"
  done
  kill -KILL "$node"
} 2>/dev/null &
listener=$!
exec 3<&-
wait "$node" 2>/dev/null
status=$?
kill "$listener"
exit "$status"
"""


def _render_host(plan: LaunchPlan) -> str:
    quote = shlex.quote
    lines = [
        "#!/usr/bin/env bash",
        f"# One host of launch {plan.launch_id}, from ssh: bash {HOST_SCRIPT} NODE HOST:PORT NODE_SCRIPT. It reads what the launcher says:",
        "# `stop` asks the node to save and end; the end of it, or silence, ends it at once. Its exit status is the node's.",
        "set -uo pipefail",
        f"launch={quote(plan.launch_id)}",
        'mark="PRETRAIN_NODE=$launch/$1"',
        f"scratch={quote(plan.cluster.job.scratch)}",
        f"silent_seconds={SILENT_SECONDS}",
    ]
    return "\n".join(lines) + _HOLD


def submit(plan: LaunchPlan, say: Callable[[str], None]) -> int:
    """Check all hosts, start every node, stay until the last has ended. Returns the exit status.

    The plan's folder holds what `render` and the plan wrote. Raises UserError, before anything starts, that names every host that is not
    reached or lacks something. What nodes print comes with their host's name, and is kept in node-I.log. Stop signals are passed on.
    """
    folder, job = PurePosixPath(plan.folder), plan.cluster.job
    hosts = [host.name for host in read_hostfile(Path(plan.folder) / HOSTS_FILE)]
    section = _section(plan)
    unseen = f"does not see {folder}; put the run's root on a path that all hosts share (job.shared_folders), where they can write"
    look = f"[ -w {shlex.quote(str(folder))} ] || {{ echo {shlex.quote(unseen)} >&2; exit 1; }}; exec bash "
    checks = [look + shlex.join([str(folder / CHECK_SCRIPT), hosts[0], str(node)]) for node in range(len(hosts))]
    place = f"{hosts[0]}:{job.rendezvous_port}"
    if shutil.which("ssh") is None:
        raise UserError("found no ssh on this machine, which hosts are reached by; install OpenSSH's client.")
    say(f"looking at {len(hosts)} hosts")
    problems = asyncio.run(check_hosts([Remote(section, host, script) for host, script in zip(hosts, checks, strict=True)]))
    if problems:
        named = "; ".join(f"{host}: {problem}" for host, problem in problems.items())
        raise UserError(f"{len(problems)} of {len(hosts)} hosts cannot take part, so nothing was started. {named}.")
    say(f"starting {len(hosts)} nodes: {', '.join(hosts)}")

    def starts(script: str) -> list[Remote]:
        words = [["bash", str(folder / HOST_SCRIPT), str(node), place, str(folder / script)] for node in range(len(hosts))]
        return [Remote(section, host, shlex.join(start)) for host, start in zip(hosts, words, strict=True)]

    return asyncio.run(hold_hosts(starts(NODE_SCRIPT), starts(AGAIN_SCRIPT), Path(plan.folder), job, say))
