"""A launch on this machine: what a node of a cluster would run, run here, in the foreground.

In: a plan whose files are written. Out: the exit status of the supervisor, which this process becomes, so every signal reaches it. The
rehearsal for a cluster: same files, same script. Only the shell's environment is there as a whole, beneath what the plan sets.
"""

import os
import shutil
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

from configs.errors import UserError
from launch.plan import NODE_SCRIPT, LaunchPlan

HOST = "127.0.0.1"
MOST_PORTS = 100
"""That are tried, one after the other."""


def render(plan: LaunchPlan) -> dict[str, str]:
    """Nothing beside what every launch has."""
    return {}


def submit(plan: LaunchPlan, say: Callable[[str], None]) -> NoReturn:
    """Become the node script. Raises UserError where there is no bash, or no port."""
    bash = shutil.which("bash")
    if bash is None:
        raise UserError("there is no bash on this machine, and nodes are started by it; install it, or use pretrain train RUN.yaml.")
    rendezvous = f"{HOST}:{find_port(plan.cluster.job.rendezvous_port)}"
    say(f"one node, here, with {plan.processes_per_node} processes; it meets itself at {rendezvous}")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(bash, ["bash", f"{plan.folder}/{NODE_SCRIPT}", "0", rendezvous])


def find_port(first: int) -> int:
    """The first port from `first` on that nobody listens on. Raises UserError where there is none among the next hundred."""
    for port in range(first, min(first + MOST_PORTS, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise UserError(f"no port from {first} to {first + MOST_PORTS - 1} is free on {HOST}; set another job.rendezvous_port.")
