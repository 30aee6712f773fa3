"""Commands on other machines by ssh: tried on all at once, and held while they run.

In: hosts, and for each what its shell is to run. Out: which hosts could not do it and why; or, of a launch, one exit status for all. A node
lives as long as its connection: the launcher speaks to it every two seconds, and where the words end (it was killed, a cable was cut) the
host's script ends the node. A host whose connection fell is reached again, and its node is started again.

pdsh is not used: it says only one exit status for all hosts, passes no signal on, and lets its user name the shell's words unquoted.
"""

import asyncio
import contextlib
import os
import queue
import shlex
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import NamedTuple

from configs.cluster import HostsSection, JobSection
from configs.errors import EXIT_MISTAKE, EXIT_RESUMABLE

SSH_FAILED, ENDED_BY_SIGNAL = 255, 128
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SPEAK_SECONDS = 2.0
STEADY_SECONDS = 60.0
"""A connection that held for so long makes the next fall a new one."""
PAUSES_SECONDS = (1.0, 2.0, 5.0, 10.0)
"""Before a host is tried again; then always the last."""
AFTERWARDS_SECONDS = 30.0
"""Nodes that hear from each other how it ended end within this time."""
ANSWER_SECONDS = 60.0
"""What a check may take once a host is reached: file systems that are mounted when somebody looks."""
BLOCK_BYTES, LINES_WAITING = 1 << 16, 10_000


class Remote(NamedTuple):
    """What is run where."""

    hosts: HostsSection
    host: str
    script: str
    """One line for bash, all in it quoted."""

    @property
    def command(self) -> list[str]:
        """The user's options come first, because ssh takes the first of each. Nothing asks for a password.

        ssh gives a silent host up later than the host its launcher (`hostfile.SILENT_SECONDS`): who reconnects finds the old node ended.
        """
        options = [*self.hosts.ssh_options, "BatchMode=yes", f"ConnectTimeout={self.hosts.connect_seconds}"]
        options += ["ServerAliveInterval=5", "ServerAliveCountMax=5", "ClearAllForwardings=yes", "ControlPath=none"]
        words = [word for option in options for word in ("-o", option)]
        words += ["-l", self.hosts.user] if self.hosts.user is not None else []
        words += ["-p", str(self.hosts.ssh_port)] if self.hosts.ssh_port is not None else []
        return ["ssh", "-T", "-a", "-x", *words, "--", self.host, shlex.join(["bash", "-c", self.script])]


async def check_hosts(remotes: Sequence[Remote]) -> dict[str, str]:
    """Run a command on every host at once. Returns, by host, what was wrong: the last line that it or ssh printed."""
    answers = await asyncio.gather(*(_check(remote) for remote in remotes))
    return {remote.host: problem for remote, problem in zip(remotes, answers, strict=True) if problem is not None}


async def _check(remote: Remote) -> str | None:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*remote.command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    seconds = remote.hosts.connect_seconds + ANSWER_SECONDS
    try:
        printed, complaint = await asyncio.wait_for(process.communicate(), seconds)
    except asyncio.TimeoutError:
        return f"did not answer within {seconds:g} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        return None
    lines = (printed + complaint).decode(errors="replace").split("\n")
    why = next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {process.returncode}").rstrip(".")
    return f"cannot be reached by ssh ({why})" if process.returncode == SSH_FAILED else why


class _Teller:
    """Says lines in a thread of its own: a terminal that is held up must not keep the launcher from speaking to its hosts."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._lines = say, queue.Queue[str | None](LINES_WAITING)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self, line: str) -> None:
        with contextlib.suppress(queue.Full):  # the log has it
            self._lines.put_nowait(line)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            self._say(line)

    def close(self) -> None:
        """Say the rest, for a while."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
            self._thread.join(5)


class _Node:
    """One node, over as many connections as it takes."""

    def __init__(self, remote: Remote, again: Remote, log: Path, join_seconds: float, say: Callable[[str], None]) -> None:
        self._remote, self._again, self._log, self._join_seconds, self._say = remote, again, log, join_seconds, say
        self._process: asyncio.subprocess.Process | None = None
        self._is_over = asyncio.Event()

    async def run(self) -> int | None:
        """Until the node has ended, or its host did not come back. Returns its exit status; None where it was ended, or left alone."""
        fell, pauses = 0.0, iter(PAUSES_SECONDS)
        while True:
            began = time.monotonic()
            status = await self._connect()
            self._remote = self._again
            if status < ENDED_BY_SIGNAL:
                return status
            if self._is_over.is_set():  # asked before it listened, ended by force, or lost when nobody waited for it
                return None
            what = "the connection fell" if status == SSH_FAILED else f"its node was ended by signal {status - ENDED_BY_SIGNAL}"
            if not fell or time.monotonic() - began > STEADY_SECONDS:
                fell, pauses = time.monotonic(), iter(PAUSES_SECONDS)
            left = self._join_seconds - (time.monotonic() - fell)
            if left <= 0:
                self._say(f"{self._remote.host}: {what}, for {self._join_seconds:.0f} s now: it is not tried again.")
                return EXIT_RESUMABLE
            pause = next(pauses, PAUSES_SECONDS[-1])
            self._say(f"{self._remote.host}: {what}; it is tried again in {pause:g} s (job.join_seconds: {left:.0f} s are left)")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._is_over.wait(), pause)
                return None

    async def _connect(self) -> int:
        """One connection to its end. Returns ssh's exit status, which is the node's, or 255."""
        pipe = asyncio.subprocess.PIPE
        self._process = process = await asyncio.create_subprocess_exec(
            *self._remote.command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT, start_new_session=True
        )  # a session of its own: Ctrl-C is for us alone
        speaking = asyncio.create_task(self._speak())
        try:
            await self._listen(process)
            status = await process.wait()
            return status if status >= 0 else SSH_FAILED  # ssh itself was killed
        finally:
            speaking.cancel()
            self._process = None

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        rest = b""
        with os.fdopen(os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb", 0) as log:
            while block := await process.stdout.read(BLOCK_BYTES):
                with contextlib.suppress(OSError):  # a full disk is no reason to stop
                    log.write(block)
                *lines, rest = (rest + block).replace(b"\r", b"\n").split(b"\n")
                if len(rest) > BLOCK_BYTES:
                    lines, rest = [*lines, rest], b""
                self._repeat(lines)
        self._repeat([rest])

    def _repeat(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            if line.strip():
                self._say(f"{self._remote.host}: {line.decode(errors='replace')}")

    async def _speak(self) -> None:
        while True:
            self.tell("")
            await asyncio.sleep(SPEAK_SECONDS)

    def tell(self, word: str) -> None:
        """A word for the host's script: `stop`, or an empty one to be heard."""
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(f"{word}\n".encode())

    def stop(self) -> None:
        """Ask it to save and end; where there is no connection, none is made."""
        self.leave()
        self.tell("stop")

    def leave(self) -> None:
        """Let it end; nobody waits for it any more, so no other connection is made."""
        self._is_over.set()

    def release(self) -> None:
        """End it at once."""
        self.leave()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            asyncio.get_running_loop().call_later(AFTERWARDS_SECONDS, _kill, self._process)


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


async def hold_hosts(remotes: Sequence[Remote], again: Sequence[Remote], logs: Path, job: JobSection, say: Callable[[str], None]) -> int:
    """Run all nodes, the first of which decides, to their ends. Returns one exit status: see `join_statuses`.

    The first signal asks every node to save and end, within job.grace_seconds; the third ends all at once. A host whose connection falls is
    tried again for job.join_seconds. again: what is run then. logs: a folder, for node-I.log.
    """
    teller = _Teller(say)
    pairs = enumerate(zip(remotes, again, strict=True))
    nodes = [_Node(remote, back, logs / f"node-{number}.log", job.join_seconds, teller) for number, (remote, back) in pairs]
    tasks = [asyncio.create_task(node.run()) for node in nodes]
    try:
        with _passing_on(nodes, job.grace_seconds, teller):
            running = set(tasks)
            while running:
                ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                if tasks[0] in ended:  # it decides: there is nothing to come back to
                    _let_end(nodes, job.grace_seconds)
                elif any(task.result() not in (0, None, EXIT_RESUMABLE) for task in ended):
                    _let_end(nodes, AFTERWARDS_SECONDS)
    finally:
        for task in tasks:
            task.cancel()
        teller.close()
    return join_statuses([task.result() for task in tasks])


def _let_end(nodes: Sequence[_Node], grace_seconds: float) -> None:
    """Nodes tell each other how it ended. One that does not hear of it is asked, and then ended."""
    loop = asyncio.get_running_loop()
    for node in nodes:
        node.leave()
        loop.call_later(AFTERWARDS_SECONDS, node.stop)
        loop.call_later(AFTERWARDS_SECONDS + grace_seconds, node.release)


def join_statuses(statuses: Sequence[int | None]) -> int:
    """All 0: 0. Any 2: 2, the user's mistake. Else 75 if any: it can be resumed. Else the first other, a defect.

    What the first node says holds for those that have no status; where it has none itself, the run can be resumed.
    """
    first = EXIT_RESUMABLE if statuses[0] is None else statuses[0]
    bad = [first, *(status for status in statuses[1:] if status is not None)]
    return next((status for status in (EXIT_MISTAKE, EXIT_RESUMABLE) if status in bad), next(filter(None, bad), 0))


@contextlib.contextmanager
def _passing_on(nodes: Sequence[_Node], grace_seconds: float, say: Callable[[str], None]) -> Generator[None, None, None]:
    """While active, stop signals go to every node; and Ctrl-Z does nothing, for a launcher that sleeps is one that died."""
    loop, count = asyncio.get_running_loop(), 0

    def ask(number: signal.Signals) -> None:
        nonlocal count
        count += 1
        say(f"{number.name}: {'all nodes are asked to save and end' if count < 3 else 'all nodes are ended at once'}")
        for node in nodes:
            node.stop()
            if count == 1:
                loop.call_later(grace_seconds, node.release)
            elif count > 2:
                node.release()

    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGTSTP)}
    taken = [number for number in STOP_SIGNALS if before[number] != signal.SIG_IGN]  # `nohup` and `&` of a shell ask for that
    for number in taken:
        loop.add_signal_handler(number, ask, number)
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number in taken:
            loop.remove_signal_handler(number)
        for number, handler in before.items():
            signal.signal(number, handler)
