"""Processes of one node, one for each device: started, seen to their end, asked for what they found.

In: a meeting, and how many processes each node has. Out: the node's report with its devices and links. A process that dies, is stuck,
or has a broken device is a finding; none is left behind. What such a process does stands in `devices.py`.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple

from launch.preflight.meeting import LOOK_SECONDS, Meeting
from launch.preflight.report import Device, Finding, Link, NodeReport, from_json, to_json
from launch.preflight.site import Site

MEASURE_SECONDS = 80.0
"""For all that processes do, from their start on."""


@dataclass(frozen=True)
class Orders:
    """What such a process is told on its command line."""

    host: str
    port: int
    """Of the store that the nodes meet in."""
    prefix: str
    """Of all keys of this meeting."""
    node: int
    num_nodes: int
    local_rank: int
    processes: int
    """Of each node."""
    parent: int
    """Process id: this one ends with it."""

    @property
    def name(self) -> str:
        """As part of a key."""
        return f"{self.node}/{self.local_rank}"

    def to_text(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


class _Process(NamedTuple):
    orders: Orders
    popen: "subprocess.Popen[bytes]"
    log: IO[bytes]

    @property
    def key(self) -> str:
        return f"alone/{self.orders.name}"

    def last_words(self) -> str:
        """How it ended, and the last line that it wrote."""
        self.log.seek(0)
        written = self.log.read().decode(errors="replace").splitlines()
        lines = [line.strip() for line in written if line.strip() and not line.startswith("[W")]  # warnings of torch
        status = self.popen.poll()
        how = f"not within {MEASURE_SECONDS:g} s" if status in (None, -9) else f"exit status {status}"
        return f"{how}: {lines[-1]}" if lines else how


def measure(site: Site, meeting: Meeting, own: NodeReport, processes: list[int], say: Callable[[str], object]) -> NodeReport:
    """Start this node's processes and see them to their end. processes: of every node."""
    num_own, num_all = processes[site.node], sum(processes)
    say(f"measuring {num_own} device{'s' if num_own > 1 else ''}" + (f", and the ways between {num_all}" if num_all > 1 else ""))
    host, environment = "127.0.0.1" if site.node == 0 else site.host, _environment(site, num_own)
    with contextlib.ExitStack() as logs:
        started: list[_Process] = []
        try:
            for rank in range(num_own):
                orders = Orders(host, meeting.port, meeting.prefix, site.node, site.num_nodes, rank, num_own, os.getpid())
                log = logs.enter_context(tempfile.TemporaryFile())
                started.append(_Process(orders, _start(orders, environment, log), log))
            _watch(meeting, started, processes, is_first=site.node == 0)
        finally:
            for process in started:
                process.popen.kill()
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: nobody waits for it
                    process.popen.wait(5)
        return _gather(meeting, own, started)


def _gather(meeting: Meeting, own: NodeReport, started: Sequence[_Process]) -> NodeReport:
    """The node's report with what its processes told, and what became of those that did not."""
    devices = tuple(from_json(Device, meeting.hear(process.key)) for process in started)
    keys = [f"links/{process.orders.name}" for process in started]
    links = tuple(from_json(Link, row) for key in keys if meeting.is_told(key) for row in meeting.hear(key))
    findings: list[Finding] = []
    for process, device in zip(started, devices, strict=True):
        name = f"process {device.local_rank}"
        if device.error is not None:
            advice = "see with its words what is wrong with the device or its driver; exclude the node if it is broken"
            findings.append(Finding("device", own.node, own.host, f"{name}: {device.error}", "a matrix product and a copy", advice))
        elif process.popen.poll():
            advice = (
                "see whether another process died first; else job.network_interface in the cluster file, a firewall, or NCCL_DEBUG=INFO"
            )
            found = f"{name} came to no end: {process.last_words()}"
            findings.append(Finding("all-reduce", own.node, own.host, found, "sums with all others", advice))
    return replace(own, findings=(*own.findings, *findings), devices=devices, links=links)


def _start(orders: Orders, environment: dict[str, str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "launch.preflight", orders.to_text()]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdin=null, stdout=null, stderr=log, start_new_session=True)


def _environment(site: Site, processes: int) -> dict[str, str]:
    """That of the training's ranks, as far as it decides how fast they are and by which way they meet."""
    wanted = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    is_here = site.num_nodes == 1 or site.host.startswith("127.") or site.host == "localhost"
    if (interface := site.job.network_interface or ("lo" if is_here else None)) is not None:
        wanted |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    source = str(Path(__file__).parents[2])
    found = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return wanted | dict(os.environ) | {"PYTHONPATH": found, "PYTHONSAFEPATH": "1"}


def _watch(meeting: Meeting, started: Sequence[_Process], processes: list[int], is_first: bool) -> None:
    """Until all have ended, or time is up. is_first: on node 0, which decides whether all processes of all nodes sum together."""
    deadline, is_decided = time.monotonic() + MEASURE_SECONDS, not is_first
    everybody = [f"alone/{node}/{rank}" for node, ranks in enumerate(processes) for rank in range(ranks)]
    while (not is_decided or any(process.popen.poll() is None for process in started)) and time.monotonic() < deadline:
        for process in started:
            if process.popen.poll() and not meeting.is_told(process.key):
                _tell_error(meeting, process, process.last_words())
        if not is_decided and not meeting.wait(everybody, 0):
            are_alike = len(set(processes)) == 1 < len(everybody)
            meeting.tell("together", are_alike and not any(meeting.hear(key)["error"] for key in everybody))
            is_decided = True
        time.sleep(LOOK_SECONDS)
    for process in started:
        if not meeting.is_told(process.key):
            _tell_error(meeting, process, f"nothing measured: {process.last_words()}")


def _tell_error(meeting: Meeting, process: _Process, why: str) -> None:
    meeting.tell(process.key, to_json(Device(process.orders.local_rank, error=why)))
