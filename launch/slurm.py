"""Slurm: a LaunchPlan as a batch script that a person can read, and its way into the queue.

In: a plan. Out: `job.sh`, which starts one supervisor on each node, hands on the signal before the time ends, and puts the job back into
the queue where that is what their exit status means; the numbers of the jobs that were submitted. What is said here of Slurm was measured
on 22.05, by `tests/faults/test_slurm.py`.
"""

import shlex
import subprocess
from collections.abc import Callable
from pathlib import PurePosixPath

from configs.cluster import SlurmSection
from configs.errors import UserError
from launch.plan import BAD_NODES_FILE, NODE_SCRIPT, PLAN_FILE, LaunchPlan
from launch.queue import ASK_SECONDS, cancel, write_jobs

JOB_SCRIPT, JOBS_FILE, STATUS_FILE, ENDED_FILE = "job.sh", "jobs.json", "status", "ended"
LAST_SECONDS = 60
"""From the end of the first supervisor to that of the last one, by force: they end together, and one that is left waits for nobody."""
PORTS_PER_JOB, JOBS_APART = 5, 200
"""Jobs that share a node ask for other ports; where one is taken, the supervisor tries those behind it."""
LARGEST_PORT = 65535
REFUSALS = {
    "account": "slurm.account",
    "partition": "slurm.partition",
    "qos": "slurm.qos",
    "feature": "slurm.constraint",
    "reservation": "slurm.reservation",
    "time limit": "slurm.minutes",
    "generic resource": "slurm.gpus_by or hardware.gpus_per_node",
    "gres": "slurm.gpus_by or hardware.gpus_per_node",
    "node name": "slurm.exclude",
    "node count": "nodes (or give another --nodes)",
    "node configuration": "nodes (or give another --nodes), slurm.constraint or slurm.partition",
    "option": "slurm.extra",
}
"""A word in sbatch's refusal -> the key of the cluster file to change. The first that fits counts."""
UNREACHED = ("controller", "configuration file", "munge", "timed out", "connection")
"""Words where it is not about the job."""

_BEGIN = f"""\
stop_asked() {{ [ "$run/STOP" -nt "$folder/{PLAN_FILE}" ]; }} # made since this launch was
if stop_asked; then
    echo "$run/STOP is there: nothing is started. To go on, launch the run again."
    exit 75
fi
"""

_BEGIN_IN_CHAIN = f"""\
if [ -e "$folder/{ENDED_FILE}" ]; then
    echo "A job before this one has ended the run, with status $(cat "$folder/{ENDED_FILE}"): nothing is left to do."
    exit 0
fi
"""

_MEET = """\
# Where the supervisors meet: the first node, by the address that Slurm itself has for it, and a port that is this job's own.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
"""

_SIGNALS = """\
# Before the time ends, Slurm signals this script alone (--signal=B:); srun hands it on to the supervisors of all nodes, which save and end.
trap '[ -z "${step:-}" ] || kill -USR2 "$step"' USR2
# Where a job is cancelled or preempted, Slurm tells the supervisors itself. This script stays to learn how they end.
trap : TERM
"""

_TASK = """
    trap : TERM USR1 USR2
    bash "$0" "$SLURM_NODEID" "$1"
    status=$?
    [ "$SLURM_NODEID" -ne 0 ] || echo "$status" >"${0%/*}/status"
    exit "$status\""""

_WAIT = f"""\
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal ends `wait` too
wait "$step"
status=$?
if [ -s "$folder/{STATUS_FILE}" ]; then status=$(cat "$folder/{STATUS_FILE}"); fi # the first node decides for all
"""

_AGAIN = """\
# 75: stopped early, to be gone on with. Above 128: somebody killed the supervisors; it counts as an attempt if one had begun.
is_unfinished() { [ "$status" -eq 75 ] || { [ "$status" -gt 128 ] && has_begun; }; }
has_begun() { [ "$run/lease.json" -nt "$folder/started" ] || [ "$run/attempts.jsonl" -nt "$folder/started" ]; }
"""

_REQUEUE = """\
# A job that was cancelled is not RUNNING any more, and a requeue would bring it back.
is_wanted() { ! stop_asked && [[ $(scontrol show job --oneliner "$SLURM_JOB_ID") =~ JobState=RUNNING|Reason=TimeLimit ]]; }
if is_unfinished && is_wanted; then
    trap '' TERM # the requeue ends this script, too
    scontrol requeue "$SLURM_JOB_ID"
    exclude "$SLURM_JOB_ID" # not before: Slurm refuses that of a job that runs
fi
"""

_NEXT = f"""\
# What is left to do is left to the jobs behind this one.
if is_unfinished; then
    grep -o '[0-9]*' "$folder/{JOBS_FILE}" | while read -r job; do exclude "$job" 2>/dev/null; done
elif ! stop_asked; then
    echo "$status" >"$folder/{ENDED_FILE}"
fi
"""


def render(plan: LaunchPlan) -> dict[str, str]:
    """The batch script: `{"job.sh": text}`. Raises UserError for a folder that #SBATCH cannot name."""
    slurm = _section(plan)
    script = PurePosixPath(plan.folder) / NODE_SCRIPT
    count = f"{plan.nodes} node{'s' if plan.nodes > 1 else ''}"
    is_chain = plan.chain > 1
    parts = [
        "#!/usr/bin/env bash\n" + "".join(f"#SBATCH {option}\n" for option in options(plan, slurm)),
        f"# Launch {plan.launch_id}: the run {plan.run_name} on {count}, one supervisor on each.\n"
        "# It sees nothing of the shell that submits it; what nodes are told stands in the file `environment`.\n"
        f"set -uo pipefail\nfolder={shlex.quote(plan.folder)}\nrun={shlex.quote(plan.run_folder)}\n",
        _BEGIN + (_BEGIN_IN_CHAIN if is_chain else ""),
        f"{_MEET}port={port_of(plan)}\n",
        f'{_SIGNALS}rm -f "$folder/{STATUS_FILE}"\ntouch "$folder/started"\n# shellcheck disable=SC2016 # each task knows its own number\n'
        f"{srun(plan)} \\\n    bash -c '{_TASK}' {shlex.quote(str(script))} \"$address:$port\" &\nstep=$!\n{_WAIT}",
        _AGAIN,
        _exclude(slurm) + (_NEXT if is_chain else _REQUEUE) + 'exit "$status"\n',
    ]
    return {JOB_SCRIPT: "\n".join(parts)}


def options(plan: LaunchPlan, slurm: SlurmSection) -> list[str]:
    """What sbatch is told, an option each; the user's own stand last and win."""
    job, hardware = plan.cluster.job, plan.cluster.hardware
    gpus = {"gres": f"--gres=gpu:{hardware.gpus_per_node}", "gpus-per-node": f"--gpus-per-node={hardware.gpus_per_node}"}
    named = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "exclude": ",".join(slurm.exclude) or None,
    }
    return [
        f"--job-name={plan.run_name}",
        f"--nodes={plan.nodes}",
        "--ntasks-per-node=1",
        *([gpus[slurm.gpus_by]] if hardware.gpus_per_node and slurm.gpus_by in gpus else []),
        *(["--exclusive", "--mem=0"] if slurm.exclusive else []),
        f"--time={slurm.minutes}",
        *(f"--{name}={value}" for name, value in named.items() if value is not None),
        f"--signal=B:USR2@{job.grace_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={shlex.quote(_pattern(plan, '%j'))}",
        "--export=NONE",
        *slurm.extra,
    ]


def srun(plan: LaunchPlan) -> str:
    """What starts a command once on each node.

    No supervisor is killed because another one has failed (--kill-on-bad-exit=0): they end one another, after what is to be saved is.
    """
    words = ["srun", "--export=ALL", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0", f"--wait={LAST_SECONDS}", "--label"]
    container = plan.cluster.container
    if container is None:
        return shlex.join(words)
    shared = plan.cluster.job.shared_folders
    if strange := next((path for path in shared if "," in path or ":" in path), None):
        raise UserError(f"{strange!r} is to be mounted into the container, and ',' and ':' separate mounts; give a folder without them.")
    mounts = [*(f"{path}:{path}" for path in dict.fromkeys(shared)), *container.mounts]
    if container.runtime == "pyxis":
        return shlex.join([*words, f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"])
    gpus = ["--nv"] if plan.cluster.hardware.gpus_per_node else []
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return f"{shlex.join(words)} \\\n    {shlex.join(['apptainer', 'exec', *gpus, *binds, container.image])}"


def port_of(plan: LaunchPlan) -> str:
    """The rendezvous port, as bash computes it: one of its own for each job, within 1,000 from `job.rendezvous_port` on."""
    first = plan.cluster.job.rendezvous_port
    apart = max(1, min(JOBS_APART, (LARGEST_PORT - first) // PORTS_PER_JOB))
    return f"$(({first} + SLURM_JOB_ID % {apart} * {PORTS_PER_JOB}))"


def submit(plan: LaunchPlan, say: Callable[[str], None]) -> int:
    """Put the job, or the chain of jobs, into the queue; the plan's files are written. Returns 0.

    Raises UserError where sbatch is not there or refuses; then nothing stays in the queue.
    """
    jobs: list[str] = []
    try:
        for _ in range(plan.chain):
            jobs.append(_sbatch(plan, jobs[-1] if jobs else None))
    except UserError:
        cancel(jobs)
        raise
    write_jobs(PurePosixPath(plan.folder) / JOBS_FILE, jobs)
    say(f"job {', then '.join(jobs)}: run {plan.run_name} on {plan.nodes} node{'s' if plan.nodes > 1 else ''}; launch {plan.launch_id}")
    run = shlex.quote(plan.run_folder)
    for what, command in {
        "how it stands": f"pretrain status {run}",
        "to stop it, saved": f"pretrain stop {run}",
        "what it prints": f"tail -F {shlex.quote(_log(plan, jobs[0]))}",
    }.items():
        say(f"  {what + ':':19}{command}")
    return 0


def _sbatch(plan: LaunchPlan, behind: str | None) -> str:
    """Submit the job script, behind another job. Returns the job's number."""
    after = [] if behind is None else [f"--dependency=afterany:{behind}"]
    script = str(PurePosixPath(plan.folder) / JOB_SCRIPT)
    try:
        ended = subprocess.run(["sbatch", "--parsable", *after, script], capture_output=True, text=True, timeout=ASK_SECONDS)
    except FileNotFoundError:
        raise UserError("sbatch was not found; launch from a login node of the Slurm cluster, or load the module that has it.") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"sbatch did not answer within {ASK_SECONDS} s; look with `squeue --me` whether the job is there.") from None
    if ended.returncode:
        words = " ".join(ended.stderr.split()) or f"status {ended.returncode}"
        if any(word in words.lower() for word in UNREACHED):
            raise UserError(
                f"Slurm cannot be reached from here: {words}. Launch from a login node of the cluster, or when it answers again."
            )
        key = next((key for word, key in REFUSALS.items() if word in words.lower()), "the section slurm")
        raise UserError(f"sbatch refused the job: {words}. Change {key} in the cluster file of {plan.cluster.name}.")
    return ended.stdout.strip().split(";")[0]  # behind it, the cluster's name where there are several


def _section(plan: LaunchPlan) -> SlurmSection:
    if plan.cluster.slurm is None:
        raise UserError(f"cluster {plan.cluster.name} has no section `slurm`; add it (`slurm: {{}}` where all defaults are right).")
    return plan.cluster.slurm


def _log(plan: LaunchPlan, job: str) -> str:
    return str(PurePosixPath(plan.folder) / f"slurm-{job}.log")


def _pattern(plan: LaunchPlan, job: str) -> str:
    """A file's name as Slurm reads it: %% is a %; with a backslash in it, nothing is replaced."""
    if "\\" in plan.folder or "\n" in plan.folder:
        raise UserError(
            f"{plan.folder!r} holds a backslash or a line break, which Slurm does not take in a file's name; choose another run.root."
        )
    return _log(plan, "\0").replace("%", "%%").replace("\0", job)


def _exclude(slurm: SlurmSection) -> str:
    """A function of the script: nodes that were found to be bad are not given to a job again, nor those that the cluster file excludes."""
    unwanted = "".join(f"{name}," for name in slurm.exclude)
    return f"""\
exclude() {{ # from a job that waits, what the supervisors have found to be bad
    [ -s "$folder/{BAD_NODES_FILE}" ] || return 0
    scontrol update JobId="$1" ExcNodeList="{unwanted}$(cut -d. -f1 "$folder/{BAD_NODES_FILE}" | sort -u | paste -sd,)"
}}
"""
