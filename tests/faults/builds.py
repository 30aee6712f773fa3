"""Builds in processes of their own: started, watched, killed by their ids, and reaped; and what they left compared.

In: a `data` section. Out: how a build ended and what it said; the files of a dataset by their hashes. A build is the leader of
a session, which all processes of its Ray belong to: so they are found, whoever their parent has become.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from select import select
from typing import Any

import psutil

from configs.data_section import DataSection
from tests.faults.driver import drive

ROOT = Path(__file__).parent.parent.parent
NOT_COMPARED = (".lock", ".owner.json", "report.json", "plan.json", "arriving.json")
"""The lock's, what holds times, and what is there only while a build runs."""
TIMEOUT_SECONDS = 300
SHOWN_DIFFERENCES = 4
QUIET = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class Ended:
    """How a build ended."""

    status: int | None
    """Exit status, or minus the signal's number; None: it was still running when its time ran out, and was killed."""
    lines: list[dict[str, Any]]
    """What it said of itself."""
    rest: str
    """What else it printed."""

    @property
    def result(self) -> dict[str, Any]:
        """The last line of a build that ended well; else empty."""
        return self.lines[-1] if self.lines and "outcome" in self.lines[-1] else {}

    @property
    def refusal(self) -> str:
        """What was refused, in its words; else nothing."""
        return self.lines[-1].get("refused", "") if self.lines else ""

    def __str__(self) -> str:
        shown = self.refusal or self.rest[-1500:] or (json.dumps(self.lines[-1]) if self.lines else "nothing was printed")
        return f"status {self.status}: {shown}"


class Here:
    """A build in a child of this process, without Ray: it starts at once, for all modules are loaded."""

    def __init__(self, data: DataSection, rebuild: bool, before: Callable[[], None]) -> None:
        self._read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(write, lambda: drive(data, "here", rebuild, lambda line: print(json.dumps(line), flush=True)), before)
        os.close(write)

    def wait(self, timeout_seconds: float = TIMEOUT_SECONDS) -> Ended:
        """Wait for its end; kill it when time has run out."""
        deadline = time.monotonic() + timeout_seconds
        printed = b""
        in_time = True
        while in_time:
            ready, _, _ = select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            in_time = bool(ready)
            if in_time and not (block := os.read(self._read, 1 << 16)):
                break
            printed += block if in_time else b""
        if not in_time:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._read)
        return Ended(os.waitstatus_to_exitcode(status) if in_time else None, *_read_lines(printed))


def build_here(
    data: DataSection,
    rebuild: bool = False,
    before: Callable[[], None] = lambda: None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Ended:
    """Build in a child of this process; `before` is called in it first."""
    return Here(data, rebuild, before).wait(timeout_seconds)


def reference_of(data: DataSection) -> dict[str, str]:
    """The undisturbed build, in this data's own root: its files by their hashes."""
    ended = build_here(data)
    assert ended.status == 0, f"the undisturbed build failed: {ended}"
    return snapshot(Path(data.folder()))


class Driver:
    """A build that leads a session of its own, with all of Ray below it."""

    def __init__(self, data: DataSection, folder: Path, engine: str, environment: dict[str, str], prefix: Sequence[str] = ()) -> None:
        """`prefix`: a command that becomes the driver, such as one that changes its network."""
        section = folder / "data.json"
        section.write_text(data.model_dump_json())
        self._log = folder / f"driver-{time.monotonic_ns()}.log"
        path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH"))))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "tests.faults.driver", str(section), engine, "continue"],
                cwd=folder,
                env={**os.environ, **QUIET, **environment, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._known: dict[int, psutil.Process] = {}

    @property
    def is_running(self) -> bool:
        """Whether the driver itself is."""
        return self._process.poll() is None

    def lines(self) -> list[dict[str, Any]]:
        """What it has said so far."""
        return _read_lines(self._log.read_bytes())[0]

    def members(self) -> list[psutil.Process]:
        """All processes of its session that run now, the driver among them."""
        self._known |= {one.pid: one for one in members_of(self.pid) if one.pid not in self._known}
        return [one for one in self._known.values() if is_alive(one)]

    def workers(self, is_busy: bool = False) -> list[psutil.Process]:
        """Ray's workers; with `is_busy`, those that are doing a task."""
        found = [(one, name_of(one)) for one in self.members()]
        return [
            one
            for one, name in found
            if name.startswith("ray::") and "Agent" not in name and not (is_busy and name.startswith("ray::IDLE"))
        ]

    def wait(self, timeout_seconds: float = TIMEOUT_SECONDS) -> Ended:
        """Wait for the driver's end; kill it and all it started when time has run out."""
        status: int | None = None
        try:
            status = self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill(whole_session=True)
        return Ended(status, *_read_lines(self._log.read_bytes()))

    def kill(self, whole_session: bool) -> None:
        """SIGKILL the driver alone, or all of its session at once; the driver is reaped."""
        members = self.members()
        os.kill(self.pid, signal.SIGKILL)
        if whole_session:
            kill_all(members)
        self._process.wait()

    def orphans(self, deadline: float) -> list[str]:
        """What still runs of its session at `deadline` (of the monotonic clock), in words.

        Not counted are two idle agents of Ray that try for 60 s to tell a dead server that they end; they touch nothing of ours.
        """
        while (alive := [one for one in self.members() if "Agent" not in name_of(one)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [f"{one.pid} {name_of(one)[:80]}" for one in alive]

    def close(self) -> None:
        """End whatever is left of it."""
        if self.is_running:
            os.kill(self.pid, signal.SIGKILL)
        self._process.wait()
        kill_all(self.members())


@contextmanager
def start_driver(
    data: DataSection, folder: Path, engine: str = "ray", environment: dict[str, str] | None = None, prefix: Sequence[str] = ()
) -> Generator[Driver, None, None]:
    """Start a build; at the end of the `with`, nothing of it is running."""
    driver = Driver(data, folder, engine, environment or {}, prefix)
    try:
        yield driver
    finally:
        driver.close()


def members_of(session: int) -> list[psutil.Process]:
    """All processes of a session, also those that nobody has reaped."""
    members: list[psutil.Process] = []
    for pid in psutil.pids():
        with suppress(OSError, psutil.Error):
            if os.getsid(pid) == session:
                members.append(psutil.Process(pid))
    return members


def kill_all(processes: list[psutil.Process]) -> None:
    """SIGKILL processes, by their ids, and wait until they are gone."""
    for process in processes:
        with suppress(psutil.Error):  # which also compares the time when it was started
            process.kill()
    deadline = time.monotonic() + 10
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that nobody has reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def name_of(process: psutil.Process) -> str:
    """A process's command line; nothing where it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def snapshot(root: Path) -> dict[str, str]:
    """SHA-256 of every file of a dataset that is compared."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name not in NOT_COMPARED)
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differences(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """In which files two datasets differ, in words; at most one line."""
    changes = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    changes += [f"{name} should not be there" for name in found.keys() - wanted.keys()]
    changes += [f"{name} has other bytes" for name in found.keys() & wanted.keys() if found[name] != wanted[name]]
    more = f" (and {len(changes) - SHOWN_DIFFERENCES} more)" if len(changes) > SHOWN_DIFFERENCES else ""
    return ["; ".join(sorted(changes)[:SHOWN_DIFFERENCES]) + more] if changes else []


def count_committed(root: Path, below: str = "units") -> int:
    """Folders under their final names."""
    return len(list((root / below).glob("[0-9]*")))


def _be_child(write: int, build: Callable[[], int], before: Callable[[], None]) -> None:
    """All that the child of a fork does; it never returns."""
    status = 1
    try:
        os.setsid()
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace")
        os.environ.update(QUIET)
        before()
        status = build()
    except BaseException:
        os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
    finally:
        sys.stdout.flush()
        os._exit(status)


def _read_lines(printed: bytes) -> tuple[list[dict[str, Any]], str]:
    """The lines of JSON, and the rest; a last line without its end is not there yet."""
    lines: list[dict[str, Any]] = []
    rest: list[str] = []
    whole, _, _ = printed.rpartition(b"\n")
    for line in whole.decode("utf-8", "replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            rest.append(line)
    return lines, "\n".join(rest)
