"""One build at a time in a dataset's folder.

In: the folder. Out: a token that names this build; a second build is refused, naming the first. The lock is the
operating system's, so it ends with its process, however that ended; the file beside it is for people, and for clearing
up what a killed build left elsewhere. (On a shared file system without `flock` between nodes it holds on one node only.)
"""

import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from configs.durable import write_file
from configs.errors import UserError

OWNER = ".owner.json"
LOCK = ".lock"
SCRATCH_PREFIX = "pretrain-"
OWNER_SECONDS = 2


@contextmanager
def own_folder(folder: Path) -> Generator[str, None, None]:
    """Hold a folder for one build; gives the token that `is_owned_by` knows. Raises UserError when another build holds it."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = _await_owner(folder)
        raise UserError(
            f"{folder}: another build is at work there (process {owner.get('pid', '?')} on {owner.get('host', '?')}); "
            "wait until it is done, or choose another data.root."
        ) from None
    try:
        left = _scratch_left(_read_owner(folder))
        _remove_all(left)
        token = secrets.token_hex(8)
        _write_owner(folder, token, None, left)
        yield token
        _remove_all(left)  # again: what a killed build's Ray left may have made its folder anew before it noticed
        (folder / OWNER).unlink(missing_ok=True)
    finally:
        lock.release()


@contextmanager
def scratch_folder(folder: Path, token: str) -> Generator[Path, None, None]:
    """A private temporary folder (0700) outside `folder`, removed at the end, or by the next build if this one is killed.

    Its path is short: Ray puts sockets below it, and the path of a socket has at most 107 bytes.
    """
    below = tempfile.gettempdir()
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=below if len(os.fsencode(below)) <= 18 else "/tmp"))
    try:
        _write_owner(folder, token, scratch, _scratch_left(_read_owner(folder)))
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_owned_by(folder: Path, token: str) -> bool:
    """Whether the build `token` still holds the folder: a worker that outlived its build must not commit anything."""
    return _read_owner(folder).get("token") == token


def _write_owner(folder: Path, token: str, scratch: Path | None, left: list[Path]) -> None:
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "token": token,
        "scratch": scratch and str(scratch),
        "left": [str(path) for path in left],
    }
    write_file(folder / OWNER, json.dumps(owner).encode())


def _await_owner(folder: Path) -> dict[str, Any]:
    """Who holds the lock: it writes its name right after it has it, so a name of nobody who is alive is an older one's."""
    deadline = time.monotonic() + OWNER_SECONDS
    while True:
        owner = _read_owner(folder)
        here = owner.get("host") == socket.gethostname()
        if owner and (not here or psutil.pid_exists(int(owner.get("pid", -1)))):
            return owner
        if time.monotonic() > deadline:
            return {}
        time.sleep(0.02)


def _read_owner(folder: Path) -> dict[str, Any]:
    try:
        owner = json.loads((folder / OWNER).read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _scratch_left(owner: dict[str, Any]) -> list[Path]:
    """Temporary folders on this host of builds that were killed: whoever reads this holds their lock, so they are gone."""
    if owner.get("host") != socket.gethostname():
        return []
    named = [owner.get("scratch"), *owner.get("left", [])]
    paths = [Path(name) for name in named if isinstance(name, str)]
    return [path for path in paths if path.name.startswith(SCRATCH_PREFIX)]


def _remove_all(paths: list[Path]) -> None:
    ours = [path for path in paths if path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.getuid()]
    if ours:
        _end_orphans(ours)
    for path in ours:
        shutil.rmtree(path, ignore_errors=True)


def _end_orphans(scratches: list[Path]) -> None:
    """End what a killed build left running: processes to which it gave a file of its temporary folder. Some would try for a
    minute to reach it, and make the folder anew."""
    ended: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            values = process.environ().values() if process.pid != os.getpid() else ()
            if any(value.startswith(f"{scratch}/") for value in values for scratch in scratches):
                process.kill()
                ended.append(process)
    psutil.wait_procs(ended, timeout=5)
