"""A real Slurm on this machine: a controller, two nodes with ports of their own, and what jobs are asked by.

In: nothing but root and the programs of slurm-wlm and munge, which `install` fetches where they are missing. Out: a `SlurmCluster` whose
environment makes `sbatch`, `squeue` and `scontrol` talk to it. Its folders, its processes and those of its jobs are gone at its end.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "munged", "mungekey", "shellcheck")
PACKAGES = ("slurm-wlm", "munge", "shellcheck")
NODES = ("n1", "n2")
START_SECONDS, END_SECONDS, ASK_SECONDS = 60, 30, 30
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldTimeout=30
SlurmdTimeout=15
InactiveLimit=0
MinJobAge=3600
KillWait=15
MessageTimeout=20
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@dataclass
class SlurmCluster:
    """A controller and two nodes."""

    folder: Path
    """Of the cluster's own: configuration, state, logs."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to find this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        """What a command of Slurm answers. Raises AssertionError where it fails."""
        ended = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=ASK_SECONDS)
        assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
        return ended.stdout.strip()

    def job(self, number: int) -> dict[str, str]:
        """What the controller knows of a job: `JobState`, `Reason`, `Restarts`, `ExitCode`, `NodeList`, ..."""
        words = self.ask("scontrol", "show", "job", "--oneliner", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self._start(name, "slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf"))

    def lose_node(self, name: str) -> None:
        """Kill a node's daemon and all that runs there, as when its power goes."""
        self.processes[name].kill()
        self.processes[name].wait()
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == name:
                    keeper = process.parent()
                    process.kill()
                    if keeper is not None and keeper.name().startswith("slurmstepd"):
                        keeper.kill()

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.said").open("ab") as said:
            self.processes[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )

    def start(self) -> None:
        """Start all daemons; returns when both nodes are idle. Raises AssertionError where that takes too long."""
        key = self.folder / "munge.key"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True, timeout=ASK_SECONDS)
        files = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", *options)
        wait_until(lambda: (self.folder / "munge.socket").exists(), START_SECONDS, "munged does not answer")
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for name in NODES:
            self.start_node(name)
        wait_until(lambda: self._states() == {"idle"}, START_SECONDS, f"the nodes are not idle; see {self.folder}")

    def _states(self) -> set[str]:
        with contextlib.suppress(AssertionError):
            return set(self.ask("sinfo", "--noheader", "--Node", "--format=%t").split())
        return set()

    def stop(self) -> None:
        """Cancel what runs, end the daemons by their ids, and what is left of jobs."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.ask("scancel", "--user=root")
            wait_until(lambda: not self.ask("squeue", "--noheader"), END_SECONDS, "")
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in reversed(self.processes.values()):
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for process in self.left():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def left(self) -> list[psutil.Process]:
        """Processes that jobs of this cluster have left."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == str(self.folder / "slurm.conf") and process.pid != os.getpid():
                    found.append(process)
        return found


@contextlib.contextmanager
def slurm_cluster() -> Generator[SlurmCluster, None, None]:
    """A cluster while the context lasts."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a short path: sockets stand in it
    (folder / "state").mkdir()
    for name in NODES:
        (folder / f"spool.{name}").mkdir()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=socket.gethostname(), ports=_free_ports(3)))
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def install() -> str:
    """Fetch the programs where they are missing. Returns why that cannot be, or nothing."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root"
    if not all(map(shutil.which, PROGRAMS)):
        if shutil.which("apt-get") is None:
            return f"needs {', '.join(PROGRAMS)}, and there is no apt-get"
        command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        if ended.returncode or not all(map(shutil.which, PROGRAMS)):
            return f"apt-get cannot install {', '.join(PACKAGES)}: {ended.stderr.strip()[-300:]}"
    return ""


def wait_until(is_so: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Wait until something is so. Raises AssertionError, with these words, where it does not come to be."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
