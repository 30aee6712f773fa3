"""Who works in a run folder now: one attempt at a time.

It holds `lease.json`, created exclusively (locks may be local to a node on shared file systems), and touches it every few
seconds. In: a run folder. Out: the lease, with the attempt's number, or a refusal that names the holder.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Generator
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from configs.errors import UserError
from pretrain.run.folder import RunFolder

BEAT_SECONDS = 5.0
# A lease from another host counts as abandoned when nobody touched it for this long, by our own clock.
ABANDONED_AFTER_SECONDS = 60.0
# Between a lease's creation and its content; one that is still empty after it was left so by a kill.
HALF_WRITTEN_SECONDS = 1.0


class Lease:
    """The right to work in a run folder: held by one attempt, renewed while it lives, given back at the end.

    Use as a context manager. Raises UserError on entry when another living attempt holds the folder.
    """

    def __init__(self, folder: RunFolder, **about: Any) -> None:
        """about: what is said of the attempt, in `lease.json` and, should it vanish, in `attempts.jsonl` (JSON)."""
        self._folder, self._about = folder, about
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self.attempt = 0
        self.started = ""

    def __enter__(self) -> "Lease":
        with _alone_on_this_host(self._folder.path):
            self._acquire()
        self._thread.start()
        return self

    def _acquire(self) -> None:
        while not self._take():
            holder = read_lease(self._folder.lease_file)
            if holder is not None and holder.get("pid") is None and _is_being_written(self._folder.lease_file):
                continue
            if holder is not None and not _is_abandoned(self._folder.lease_file, holder):
                raise UserError(
                    f"{self._folder.path} is in use by process {holder.get('pid')} on {holder.get('host')} (attempt "
                    f"{holder.get('attempt')}, since {holder.get('started')}); wait for it, stop it, or start another run "
                    "with run.name=NAME."
                )
            if holder is not None:
                self._remove_abandoned(holder)

    def _remove_abandoned(self, holder: dict[str, Any]) -> None:
        """Record the attempt of a holder that is gone and remove its lease, unless another attempt was quicker."""
        vanished = {**holder, "end": None, "cause": "vanished without a word"}
        if vanished not in self._folder.attempts():  # before the folder is free: the next attempt's number counts it
            self._folder.record_attempt(vanished)
        aside = self._folder.lease_file.with_name(f".lease.{uuid.uuid4().hex[:12]}")
        try:
            self._folder.lease_file.rename(aside)
        except FileNotFoundError:
            return
        if read_lease(aside) != holder:  # somebody took it over between our look and the rename: it is theirs
            with contextlib.suppress(FileExistsError):
                os.link(aside, self._folder.lease_file)
        aside.unlink()

    def _take(self) -> bool:
        try:
            descriptor = os.open(self._folder.lease_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640)
        except FileExistsError:
            return False
        self.attempt = len(self._folder.attempts()) + 1  # counted with the lease in hand: nobody else gets this number
        self.started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        content = {
            "attempt": self.attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "started": self.started,
            **self._about,
        }
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file)
        return True

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a file system that stumbles must not end the heartbeat
                if holds_lease(self._folder, self.attempt):
                    os.utime(self._folder.lease_file)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        if holds_lease(self._folder, self.attempt):
            self._folder.lease_file.unlink(missing_ok=True)


def holds_lease(folder: RunFolder, attempt: int) -> bool:
    """Whether this attempt still holds the folder (another host may have taken it over while we were stopped)."""
    holder = read_lease(folder.lease_file)
    return holder is not None and holder.get("attempt") == attempt


def read_lease(path: Path) -> dict[str, Any] | None:
    """What the holder of a run folder said of itself; None where nobody holds it."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:  # killed while writing it: nobody can be holding it
        return {"attempt": None, "pid": None, "host": None}
    return content if isinstance(content, dict) else {"attempt": None, "pid": None, "host": None}


@contextlib.contextmanager
def _alone_on_this_host(path: Path) -> Generator[None, None, None]:
    """Let one process of this host at a time look at the lease and take it over.

    A lock may not reach other hosts, or not exist on a shared file system: then the exclusive creation decides, and a
    take-over checks what it took away.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_being_written(path: Path) -> bool:
    """Whether a lease without content gets one or goes: another process may have created it at this moment."""
    try:
        before = path.stat()
        time.sleep(HALF_WRITTEN_SECONDS)
        after = path.stat()
    except FileNotFoundError:
        return True
    holder = read_lease(path)
    return (before.st_ino, before.st_mtime_ns) != (after.st_ino, after.st_mtime_ns) or holder is None or holder.get("pid") is not None


def _is_abandoned(path: Path, holder: dict[str, Any]) -> bool:
    if holder.get("pid") is None:
        return True
    if holder.get("host") == socket.gethostname():
        try:
            process = psutil.Process(int(holder["pid"]))
            return abs(process.create_time() - float(holder.get("process_started", 0))) > 2 or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
    # Clocks of two hosts may differ by hours: watch whether the file is touched, never compare its time with ours.
    deadline = time.monotonic() + ABANDONED_AFTER_SECONDS
    try:
        before = path.stat().st_mtime_ns
        while time.monotonic() < deadline:
            time.sleep(1)
            if path.stat().st_mtime_ns != before:
                return False
    except FileNotFoundError:
        return True
    return True
