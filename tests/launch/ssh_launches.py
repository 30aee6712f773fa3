"""Launches over ssh without a network: the launcher in a process of its own, nodes that stand in for a training, and what they left.

In: a folder. Out: a `Launch`, whose hosts `ssh_in_place.py` plays, first on the launcher's PATH. A node lives until a file tells it its
exit status, and starts processes that have left it, as ranks and trackers do.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from configs.cluster import ClusterConfig
from launch.hostfile import AGAIN_SCRIPT, render
from launch.plan import ENVIRONMENT_FILE, NODE_SCRIPT, Code, LaunchPlan, node_environment, render_environment
from tests.pretrain.verbs import hear_ctrl_c

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
GONE_SECONDS = 30
"""Within which nothing may be left."""
TIMEOUT_SECONDS = 60
TOLD = "TOLD_TO_NODES"

NODE = """
import json, os, pathlib, signal, subprocess, sys, time
folder, node, rendezvous = sys.argv[1:]
name = pathlib.Path(folder) / f"node-{node}"
def stop(number, frame):
    print("asked to stop", flush=True)
    time.sleep(0.2)
    sys.exit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN if name.with_suffix(".deaf").exists() else stop)
# As ranks and trackers do: sessions of their own, and one whose parent is gone.
rank = "import subprocess, sys, time; subprocess.Popen(['sleep', '300'], start_new_session=True); time.sleep(300)"
subprocess.Popen([sys.executable, "-S", "-c", rank], start_new_session=True)
print(f"node {node} of {rendezvous}", flush=True)
told = {key: os.environ.get(key) for key in ("TOLD_TO_NODES", "SECRET_OF_SHELL", "TORCH_EXTENSIONS_DIR", "STARTED")}
with name.with_suffix(".starts").open("a") as file:
    file.write(json.dumps(told) + "\\n")
while not name.with_suffix(".end").exists():
    time.sleep(0.02)
sys.exit(int(name.with_suffix(".end").read_text()))
"""
LAUNCHER = """
import sys
from configs.errors import UserError
from launch.hostfile import submit
from tests.launch.ssh_launches import make_plan
try:
    sys.exit(submit(make_plan(*{arguments!r}), lambda line: print(line, flush=True)))
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
"""


def make_plan(
    folder: str, launch_id: str, hosts: tuple[str, ...], environment: dict[str, str], python: str, join_seconds: float
) -> LaunchPlan:
    cluster = ClusterConfig.model_validate(
        {
            "name": "machines",
            "job": {
                "python": python,
                "scratch": f"{folder}/scratch",
                "join_seconds": join_seconds,
                "grace_seconds": 2,
                "setup": ("export LINES=set-up",),
                "environment": environment,
            },
            "hosts": {"hosts": hosts, "connect_seconds": 5},
        }
    )
    return LaunchPlan(
        kind="hostfile",
        launch_id=launch_id,
        run_name="run",
        run_folder=folder,
        folder=f"{folder}/launch",
        nodes=len(hosts),
        processes_per_node=1,
        cluster=cluster,
        code=Code(str(ROOT), None, None),
        environment=environment,
    )


class Launch:
    """A launcher in a process of its own, and all that carries its mark."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.launch_id = folder, f"test-{secrets.token_hex(6)}"
        self.hosts: tuple[str, ...] = ("127.0.0.1", "machine-2", "machine-3")
        self.environment: dict[str, str] = {TOLD: "yes"}
        self.python, self.join_seconds = sys.executable, 20.0
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "launch").mkdir()
        (folder / "scratch").mkdir()
        (folder / "bin").mkdir()
        ssh = folder / "bin" / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {HERE / "ssh_in_place.py"} "$@"\n')
        ssh.chmod(0o755)

    @property
    def plan(self) -> LaunchPlan:
        return make_plan(*self._arguments)

    @property
    def _arguments(self) -> tuple:
        return str(self.folder), self.launch_id, self.hosts, self.environment, self.python, self.join_seconds

    def start(self) -> None:
        command = f"{sys.executable} -S '{self.folder}/node.py' '{self.folder}'"
        node = f"source '{self.folder}/launch/{ENVIRONMENT_FILE}'\nexec {command} \"$@\"\n"
        files = {
            **render(self.plan),
            AGAIN_SCRIPT: f"export STARTED=again\n{node}",
            NODE_SCRIPT: node,
            ENVIRONMENT_FILE: render_environment(node_environment(self.plan)),
        }
        (self.folder / "node.py").write_text(NODE)
        for name, content in files.items():
            (self.folder / "launch" / name).write_text(content)
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SSH_IN_PLACE": str(self.folder),
            "SECRET_OF_SHELL": "secret-value",
            "PYTHONPATH": str(ROOT),
        }
        with (self.folder / "printed").open("wb") as printed:
            self._process = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER.format(arguments=self._arguments)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                start_new_session=True,
                preexec_fn=hear_ctrl_c,
            )

    @property
    def printed(self) -> str:
        return (self.folder / "printed").read_text()

    def starts(self, node: int) -> list[dict]:
        """What every start of a node was told."""
        path = self.folder / f"node-{node}.starts"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def end_node(self, node: int, status: int) -> None:
        path = self.folder / f"node-{node}.end"
        path.with_suffix(".partial").write_text(str(status))
        path.with_suffix(".partial").rename(path)

    def until(self, reached: Callable[[], bool], seconds: float = TIMEOUT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.02)

    def until_all_run(self) -> None:
        self.until(lambda: all(self.starts(node) for node in range(len(self.hosts))))

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> int:
        assert self._process is not None
        return self._process.wait(seconds)

    def cut(self, host: str) -> None:
        """End the connection to a host."""
        os.kill(int((self.folder / f"{host}.pid").read_text()), signal.SIGKILL)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def marked(self) -> list[psutil.Process]:
        """Whatever runs of this launch's nodes, wherever it has gone to."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("PRETRAIN_NODE", "").startswith(self.launch_id):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for process in self.marked():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for path in self.folder.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)
