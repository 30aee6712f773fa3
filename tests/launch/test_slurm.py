"""The batch script: as it is written, and what it does where Slurm's programs stand in for themselves; its way into the queue.

`srun`, `scontrol`, `sbatch`, `squeue`, `sacct` and `scancel` are scripts here, which note how they were called. The real ones are asked by
`tests/faults/test_slurm.py`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.cluster import ClusterConfig, ContainerSection, HardwareSection, JobSection, SlurmSection
from configs.errors import UserError
from launch import queue
from launch.plan import Code, LaunchPlan
from launch.slurm import port_of, render, submit

GOLDEN = Path(__file__).parent / "golden"
TIMEOUT_SECONDS = 30
GPUS = HardwareSection(gpu="H100", gpus_per_node=8)
SITE = SlurmSection(
    partition="gpu",
    account="lab",
    qos="high",
    constraint="ib",
    reservation="week",
    gpus_by="gpus-per-node",
    exclude=("n7", "n8"),
    extra=("--mail-type=FAIL", "--comment='two words'"),
)
MOUNTED = JobSection(shared_folders=("/shared",), network_interface="ib0")
SCRIPTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpus": {"slurm": SITE, "hardware": GPUS},
    "chain": {"chain": 3, "slurm": SlurmSection(exclusive=False, exclude=("n7",))},
    "pyxis": {
        "hardware": GPUS,
        "job": MOUNTED,
        "container": ContainerSection(runtime="pyxis", image="site/pretrain:1", mounts=("/a:/b:ro",)),
    },
    "apptainer": {
        "hardware": GPUS,
        "job": MOUNTED,
        "container": ContainerSection(runtime="apptainer", image="image.sif", mounts=("/a:/b",)),
    },
}
SCONTROL = """
case "$*" in
"show hostnames"*) printf 'n3\\nn4\\n' ;;
"show node"*) echo "NodeName=n3 NodeAddr=10.0.0.3 NodeHostName=n3" ;;
"show job"*) echo "JobId=42 JobState=$STATE" ;;
esac
"""
SRUN = """
echo $$ >"$0.pid"
trap 'echo USR2 >>"$0.signals"; exit 75' USR2
while [ "$1" != bash ]; do shift; done
SLURM_NODEID=$NODE "$@"
[ "$STATUS" != wait ] || while :; do sleep 0.05; done
exit "$STATUS"
"""


def make_plan(folder: Path = Path("/shared/runs/tiny"), chain: int = 1, nodes: int = 2, **sections: Any) -> LaunchPlan:
    """A launch of two nodes; sections: of the cluster file."""
    cluster = ClusterConfig(name="site", **{"slurm": SlurmSection(), **sections})
    launched = folder / "launches" / "20260102-030405-abcd"
    return LaunchPlan(
        "slurm",
        "20260102-030405-abcd",
        "tiny",
        str(folder),
        str(launched),
        nodes,
        2,
        cluster,
        Code("/shared/code", None, None),
        chain=chain,
    )


class Programs:
    """A folder of programs that note their arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def add(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(f'#!{shutil.which("bash")}\nprintf \'%s\\0\' "$*" >>"$0.calls"\n{body}')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().split("\0")[:-1] if path.exists() else []


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    made = Programs(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{made.folder}{os.pathsep}{os.environ['PATH']}")
    return made


# --- what is written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_is_the_golden_one(name: str) -> None:
    assert render(make_plan(**SCRIPTS[name])) == {"job.sh": (GOLDEN / f"slurm-{name}.sh").read_text()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_is_clean(name: str) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program, "shellcheck is in the development extra"
    done = subprocess.run([program, "--norc", GOLDEN / f"slurm-{name}.sh"], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_folder_that_slurm_would_read_otherwise() -> None:
    text = render(make_plan(Path("/runs/it's 100%j #1")))["job.sh"]
    assert "#SBATCH --output='/runs/it'\"'\"'s 100%%j #1/launches/20260102-030405-abcd/slurm-%j.log'\n" in text
    with pytest.raises(UserError, match="backslash"):
        render(make_plan(Path("/runs/a\\b")))


def test_what_cannot_be_mounted_is_refused() -> None:
    container = ContainerSection(runtime="pyxis", image="image")
    with pytest.raises(UserError, match="'/a,b' is to be mounted"):
        render(make_plan(job=JobSection(shared_folders=("/a,b",)), container=container))


def test_a_cluster_without_slurm_is_refused() -> None:
    with pytest.raises(UserError, match="no section `slurm`"):
        render(make_plan(slurm=None))


@pytest.mark.parametrize("first", [1024, 29400, 65000, 65535])
def test_every_port_is_one(first: int) -> None:
    command = port_of(make_plan(job=JobSection(rendezvous_port=first)))
    script = f"for ((SLURM_JOB_ID = 0; SLURM_JOB_ID < 1000; SLURM_JOB_ID++)); do echo {command}; done"
    ports = set(map(int, subprocess.check_output(["bash", "-c", script], text=True, timeout=TIMEOUT_SECONDS).split()))
    assert min(ports) == first and max(ports) <= 65535 and max(ports) < first + 1000


# --- what it does ------------------------------------------------------------------------------------------


class Job:
    """The script of a plan, run by bash among programs that stand in."""

    def __init__(self, plan: LaunchPlan, programs: Programs) -> None:
        self.folder, self.run, self.programs = Path(plan.folder), Path(plan.run_folder), programs
        self.folder.mkdir(parents=True)
        for name, text in render(plan).items():
            (self.folder / name).write_text(text)
        (self.folder / "plan.json").write_text("{}")
        (self.folder / "node.sh").write_text('echo "$@" >"$(dirname "$0")/node-was-told"\n')
        programs.add("scontrol", SCONTROL)
        programs.add("srun", SRUN)

    def start(self, status: int | str, state: str = "RUNNING", node: int = 1) -> "subprocess.Popen[str]":
        about = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n[3-4]"}
        environment = {**os.environ, **about, "STATUS": str(status), "STATE": state, "NODE": str(node)}
        command = ["bash", str(self.folder / "job.sh")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, status: int | str, state: str = "RUNNING", node: int = 1) -> int:
        process = self.start(status, state, node)
        self.said, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        return process.returncode

    @property
    def changes(self) -> list[str]:
        """What the controller was asked to change."""
        return [call for call in self.programs.calls("scontrol") if not call.startswith("show")]


@pytest.fixture
def make_job(tmp_path: Path, programs: Programs) -> Callable[..., Job]:
    return lambda **settings: Job(make_plan(tmp_path / "a run's folder", **settings), programs)


def long_ago(path: Path) -> None:
    os.utime(path, (1e9, 1e9))


def test_every_node_is_told_its_number_and_where_to_meet(make_job: Callable[..., Job]) -> None:
    job = make_job()
    assert job.finish(0) == 0
    assert (job.folder / "node-was-told").read_text() == f"1 10.0.0.3:{29400 + 42 * 5}\n"
    assert job.changes == []


@pytest.mark.parametrize(
    ("status", "state", "goes_on"),
    [
        (0, "RUNNING", False),
        (1, "RUNNING", False),
        (2, "RUNNING", False),
        (75, "RUNNING", True),
        (75, "COMPLETING Reason=None", False),
        (75, "COMPLETING Reason=TimeLimit", True),
        (137, "RUNNING", False),
    ],
    ids=["done", "defect", "mistake", "stopped early", "cancelled", "out of time", "killed before it began"],
)
def test_when_the_job_goes_back_into_the_queue(make_job: Callable[..., Job], status: int, state: str, goes_on: bool) -> None:
    job = make_job()
    assert job.finish(status, state) == status
    assert job.changes == (["requeue 42"] if goes_on else [])


@pytest.mark.parametrize(("of_first", "goes_on"), [(75, True), (0, False), (2, False)])
def test_the_first_node_decides(make_job: Callable[..., Job], of_first: int, goes_on: bool) -> None:
    job = make_job()
    (job.folder / "node.sh").write_text(f"exit {of_first}\n")
    assert job.finish(137, node=0) == of_first  # srun's status is the highest of all nodes
    assert job.changes == (["requeue 42"] if goes_on else [])
    assert job.finish(1, node=1) == 1  # what is left of another time does not count


@pytest.mark.parametrize("name", ["lease.json", "attempts.jsonl"])
def test_supervisors_that_were_killed_have_made_an_attempt(make_job: Callable[..., Job], name: str) -> None:
    job = make_job()
    (job.run / name).touch()
    long_ago(job.run / name)
    assert job.finish(137) == 137 and job.changes == []
    job.programs.add("srun", f'sleep 0.1 # a file system\'s clock may stand still for less\ntouch "{job.run / name}"\n{SRUN}')
    assert job.finish(137) == 137 and job.changes == ["requeue 42"]


def test_a_run_that_was_told_to_stop_is_not_gone_on_with(make_job: Callable[..., Job]) -> None:
    job = make_job()
    (job.run / "STOP").touch()
    long_ago(job.run / "STOP")  # of another time: this launch was asked for behind it
    assert job.finish(75) == 75 and job.changes == ["requeue 42"]
    job.programs.add("srun", f'touch "{job.run / "STOP"}"\n{SRUN}')
    time.sleep(0.02)
    assert job.finish(75) == 75 and job.changes == ["requeue 42"]
    starts = len(job.programs.calls("srun"))
    assert job.finish(0) == 75 and "nothing is started" in job.said
    assert len(job.programs.calls("srun")) == starts


def test_the_signal_reaches_the_supervisors(make_job: Callable[..., Job]) -> None:
    job = make_job()
    process = job.start("wait")
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (job.folder / "node-was-told").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)  # told to the supervisors by Slurm itself
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGUSR2)
        process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 75 and job.changes == ["requeue 42"]
    assert (job.programs.folder / "srun.signals").read_text() == "USR2\n"


def test_bad_nodes_are_excluded_behind_the_requeue(make_job: Callable[..., Job]) -> None:
    job = make_job(slurm=SlurmSection(exclude=("n7", "n8")))
    (job.folder / "bad-nodes").write_text("n4.cluster.example\nn3\nn4\n")
    assert job.finish(75) == 75
    assert job.changes == ["requeue 42", "update JobId=42 ExcNodeList=n7,n8,n3,n4"]


@pytest.mark.parametrize(("status", "ends"), [(75, False), (137, False), (0, True), (1, True), (2, True)])
def test_a_chain_leaves_it_to_the_next_job(make_job: Callable[..., Job], status: int, ends: bool) -> None:
    job = make_job(chain=2)
    queue.write_jobs(job.folder / "jobs.json", ["42", "43"])
    (job.folder / "bad-nodes").write_text("n4\n")
    job.programs.add("srun", f'touch "{job.run / "lease.json"}"\n{SRUN}')
    assert job.finish(status) == status
    assert job.changes == ([] if ends else ["update JobId=42 ExcNodeList=n4", "update JobId=43 ExcNodeList=n4"])
    starts = len(job.programs.calls("srun"))
    assert job.finish(0) == 0
    assert len(job.programs.calls("srun")) == starts + (not ends)
    assert ("nothing is left to do" in job.said) == ends


# --- into the queue, and what is in it ---------------------------------------------------------------------


def submitted(tmp_path: Path, chain: int = 1) -> tuple[LaunchPlan, list[str]]:
    plan, lines = make_plan(tmp_path / "run", chain=chain), []
    Path(plan.folder).mkdir(parents=True)
    assert submit(plan, lines.append) == 0
    return plan, lines


COUNTING = 'n=$(($(tr -cd "\\0" <"$0.calls" | wc -c) + 6)); '


def test_a_job_is_submitted(tmp_path: Path, programs: Programs) -> None:
    programs.add("sbatch", 'echo "7;here"')
    plan, lines = submitted(tmp_path)
    assert programs.calls("sbatch") == [f"--parsable {plan.folder}/job.sh"]
    assert queue.read_jobs(Path(plan.folder) / "jobs.json") == ["7"]
    assert lines[0].startswith("job 7: run tiny on 2 nodes")
    assert [line.split(":", 1)[1].strip() for line in lines[1:]] == [
        f"pretrain status {plan.run_folder}",
        f"pretrain stop {plan.run_folder}",
        f"tail -F {plan.folder}/slurm-7.log",
    ]


def test_a_chain_is_submitted(tmp_path: Path, programs: Programs) -> None:
    programs.add("sbatch", COUNTING + "echo $n")
    plan, lines = submitted(tmp_path, chain=3)
    script = f"{plan.folder}/job.sh"
    behind = [f"--parsable --dependency=afterany:{number} {script}" for number in (7, 8)]
    assert programs.calls("sbatch") == [f"--parsable {script}", *behind]
    assert queue.read_jobs(Path(plan.folder) / "jobs.json") == ["7", "8", "9"]
    assert lines[0].startswith("job 7, then 8, then 9:")


def test_where_a_chain_is_refused_nothing_stays(tmp_path: Path, programs: Programs) -> None:
    programs.add("sbatch", COUNTING + "[ $n -lt 9 ] || { echo 'sbatch: error: Job violates accounting/QOS policy' >&2; exit 1; }; echo $n")
    programs.add("scancel", "")
    with pytest.raises(UserError, match="QOS policy"):
        submitted(tmp_path, chain=3)
    assert programs.calls("scancel") == ["7 8"]
    assert not list(tmp_path.rglob("jobs.json"))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("Batch job submission failed: Invalid account or account/partition combination specified", "Change slurm.account"),
        ("invalid partition specified: x", "Change slurm.partition"),
        ("Batch job submission failed: Invalid qos specification", "Change slurm.qos"),
        ("Batch job submission failed: Invalid feature specification", "Change slurm.constraint"),
        ("Batch job submission failed: Requested reservation is invalid", "Change slurm.reservation"),
        ("Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", "Change slurm.minutes"),
        ("Batch job submission failed: Invalid generic resource (gres) specification", "Change slurm.gpus_by"),
        ("Batch job submission failed: Invalid node name specified", "Change slurm.exclude"),
        ("Batch job submission failed: Node count specification invalid", "Change nodes"),
        ("Batch job submission failed: Requested node configuration is not available", "Change nodes"),
        ("unrecognized option '--x'", "Change slurm.extra"),
        ("something else", "Change the section slurm"),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", "Slurm cannot be reached"),
    ],
)
def test_a_refusal_names_the_key(tmp_path: Path, programs: Programs, words: str, wanted: str) -> None:
    programs.add("sbatch", f'echo "sbatch: error: {words}" >&2; exit 1')
    with pytest.raises(UserError) as refused:
        submitted(tmp_path)
    assert words in str(refused.value) and wanted in str(refused.value)


def test_where_there_is_no_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch was not found"):
        submitted(tmp_path)
    assert queue.ask(["1"]) == {}


def test_the_queue_is_asked_and_then_the_books(programs: Programs) -> None:
    programs.add("squeue", "echo '7|PENDING|Priority|'; echo '8|RUNNING|None|n[1-2]'")
    programs.add("sacct", "echo '9|CANCELLED by 1000|0:15|n1'; echo '10|FAILED|75:0|n2'")
    found = queue.ask(["7", "8", "9", "10", "11"])
    assert list(found) == ["7", "8", "9", "10"]
    assert [job.state for job in found.values()] == ["PENDING", "RUNNING", "CANCELLED", "FAILED"]
    assert [job.is_waiting for job in found.values()] == [True, False, False, False]
    assert [job.is_active for job in found.values()] == [False, True, False, False]
    assert "--jobs=7,8,9,10,11" in programs.calls("squeue")[0] and "--jobs=9,10,11" in programs.calls("sacct")[0]


@pytest.mark.parametrize("content", ["", "[]", "{}", "7", '{"kind": "ray", "jobs": ["a"]}', '{"kind": "slurm", "jobs": 7}'])
def test_a_file_of_jobs_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "jobs.json").write_text(content)
    assert queue.read_jobs(tmp_path / "jobs.json") == [] == queue.read_jobs(tmp_path / "absent")
