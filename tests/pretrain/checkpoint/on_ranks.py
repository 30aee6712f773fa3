"""What one rank does in the commit tests: called by `run_on_ranks` (world of 2), or as a parent of ranks that are killed (world of 1).

Arguments and results are JSON.
"""

import atexit
import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as distributed

from configs import durable
from configs.errors import UserError
from configs.schema import CheckpointSection
from pretrain.checkpoint import commit as module
from pretrain.checkpoint import verify
from pretrain.checkpoint.arena import Answer
from pretrain.checkpoint.blocks import DamageError, FileRecord
from pretrain.checkpoint.commit import Saves, newest_that_loads
from pretrain.checkpoint.places import Place
from pretrain.checkpoint.retention import remove_old_commits
from pretrain.checkpoint.verify import Commit, check_files, list_commits, verify_commit
from pretrain.state import TrainState

IDENTITY = {"data": "d" * 64, "tokenizer": "e" * 64}
Files = dict[str, FileRecord]


def content_of(step: int, rank: int, suffix: str) -> bytes:
    """What stands in a rank's file: another content for each step, rank and kind, of equal length."""
    return random.Random(f"{step} {rank} {suffix}").randbytes(5000)


def rank_files(folder: Path, step: int, rank: int, between: Callable[[], None] = lambda: None) -> Files:
    """Write a rank's two synced files, as its writer does."""
    files: Files = {}
    for suffix in ("safetensors", "json"):
        content = content_of(step, rank, suffix)
        path = folder / f"rank_{rank:05d}.{suffix}"
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        files[path.name] = {"bytes": len(content), "sha256": [hashlib.sha256(content).hexdigest()]}
        between()
    return files


def save(checkpoints: Path, step: int, write: Callable[[Path], Files] | None = None, ours: bool = True, attempt: int = 1) -> str | None:
    """Commit a step on every rank of the group."""
    rank = distributed.get_rank()

    def start_writing(folder: Path) -> Callable[[bool], Answer]:
        files = (write or (lambda folder: rank_files(folder, step, rank)))(folder)
        return lambda wait: Answer(files, None)

    place = Place(checkpoints)
    saves = Saves([place], attempt, still_ours=lambda: ours)
    state = TrainState(step, step * 4, step * 1024, 0)
    assert saves.begin(place, start_writing, state=state, identity=IDENTITY, code={}, loss=1.5) is None
    return saves.settle()


def newest_verified_commit(checkpoints: Path, say: Callable[[str], None]) -> Commit | None:
    """The newest commit whose every file is intact; each rank looks at its share."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()

    def check(commit: Commit) -> None:
        if problems := check_files(commit, sorted(commit.files)[rank::world_size]):
            raise DamageError("; ".join(problems))

    return newest_that_loads([Place(checkpoints)], check, say)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its SHA-256, and every empty folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "a folder"
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


def flip_bit(path: Path, bit: int) -> None:
    """Change one bit of a file; twice is as it was."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def commit_together(folder: str) -> dict[str, Any]:
    """Everything that takes two ranks, one case after the other."""
    checkpoints, rank = Path(folder, "checkpoints"), distributed.get_rank()
    result: dict[str, Any] = {}

    def seen() -> dict[str, str]:
        distributed.barrier()
        found = tree(Path(folder))
        distributed.barrier()
        return found

    def newest() -> dict[str, Any]:
        said: list[str] = []
        try:
            found = newest_verified_commit(checkpoints, said.append)
            name = None if found is None else found.folder.name
        except UserError as error:
            name = f"UserError: {error}"
        return {"name": name, "said": said, "tree": seen()}

    result["nothing"] = newest()
    result["committed"] = [save(checkpoints, 10), save(checkpoints, 20, attempt=7)]
    result["after commits"] = seen()
    result["intact"] = newest()

    def fails_on(*bad: int) -> Callable[[Path], Files]:
        def write(temporary: Path) -> Files:
            files = rank_files(temporary, 30, rank)
            if rank in bad:
                raise OSError(28, f"no space on rank {rank}", "rank_file")
            return files

        return write

    def over_the_limit(temporary: Path) -> Files:
        """The kernel refuses the 1001st byte of a file on rank 1."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            return rank_files(temporary, 30, rank)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    for name, write, ours in (
        ("rank 1 fails", fails_on(1), True),
        ("both fail", fails_on(0, 1), True),
        ("a real limit", over_the_limit, True),
        ("lease lost", None, False),
        ("lease lost, as rank 0 sees it", None, rank == 1),
    ):
        try:
            problem = save(checkpoints, 30, write, ours)
        except UserError as error:  # the run is another attempt's: both ranks end
            problem = str(error)
        result[name] = {"problem": problem, "tree": seen()}
    result["step 20 again"] = {"problem": save(checkpoints, 20), "tree": seen()}
    result["lease as rank 1 sees it"] = {"problem": save(checkpoints, 30, None, rank == 0), "tree": seen()}

    distributed.barrier()
    if rank == 0:
        flip_bit(checkpoints / "step-00000030" / "rank_00001.safetensors", 12345)
    distributed.barrier()
    result["a bit of rank 1's file"] = newest()
    if rank == 0:
        (checkpoints / "step-00000020" / "MANIFEST.json").unlink()
    distributed.barrier()
    result["no manifest"] = newest()
    if rank == 0:
        flip_bit(checkpoints / "step-00000010" / "MANIFEST.json", 777)
    distributed.barrier()
    result["all damaged"] = newest()
    result["all damaged, asked again"] = newest()
    # Nothing is left to do: without it the interpreter's end aborts now and then (a thread of torch that nobody joined).
    atexit.register(os._exit, 0)
    return result


def kill_writers(folder: Path) -> None:
    """A parent that forks a rank (world of 1) per kill point; prints one JSON object a line: what the rank left."""
    for point in KILL_POINTS:
        checkpoints = folder / point / "checkpoints"
        checkpoints.parent.mkdir()
        assert _fork(lambda checkpoints=checkpoints: _save_once(checkpoints, 10)) == 0
        status = _fork(lambda checkpoints=checkpoints, point=point: _save_and_die(checkpoints, point))
        left = sorted(path.name for path in checkpoints.iterdir())
        problems = {path.name: verify_commit(path) for path in list_commits(checkpoints)}
        after = _fork(lambda checkpoints=checkpoints: _resume_and_save(checkpoints))
        _say(point=point, status=status, left=left, problems=problems, resumed=after, after=sorted(p.name for p in checkpoints.iterdir()))


def kill_at_random(folder: Path, seed: int, rounds: int) -> None:
    """A rank commits as fast as it can, with retention, and is killed at some moment; again and again in one folder."""
    chooser, checkpoints = random.Random(seed), folder / "checkpoints"
    for _ in range(rounds):
        receive, send = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(receive)
            _in_child(lambda send=send: _commit_for_ever(checkpoints, send))
        os.close(send)
        first = os.read(receive, 1)  # it has begun
        time.sleep(chooser.random() * 0.06)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        told = first
        while part := os.read(receive, 65536):
            told += part
        os.close(receive)
        finished = [int(line) for line in told.decode().split("\n")[:-1]]
        commits = list_commits(checkpoints)
        damaged = [problem for path in commits for problem in verify_commit(path)]
        _say(finished=max(finished), newest=int(commits[0].name[5:]) if commits else 0, number=len(commits), damaged=damaged)
    _say(rejected=(checkpoints / "rejected").exists())


def _commit_for_ever(checkpoints: Path, pipe: int) -> NoReturn:
    found = newest_verified_commit(checkpoints, print)
    step = found.state.step if found else 0
    while True:
        os.write(pipe, f"{step}\n".encode())
        step += 1
        assert save(checkpoints, step) is None
        remove_old_commits(checkpoints, CheckpointSection(keep=2))


def _save_once(checkpoints: Path, step: int) -> int:
    return 0 if save(checkpoints, step) is None else 1


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def _dying(function: Callable[..., Any], when: str, where: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    """`function`, and the end of the process before or after it, the first time its arguments are the right ones."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        if when == "before" and where(*arguments):
            _die()
        result = function(*arguments, **keywords)
        if where(*arguments):
            _die()
        return result

    return call


KILL_POINTS = {
    # name -> whether step 20 is then committed
    "before files": False,
    "after its first file": False,
    "after its files": False,
    "before the manifest": False,
    "manifest half written": False,
    "after the manifest": False,
    "before the rename": False,
    "after the rename": True,
    "after the parent was synced": True,
}


def _save_and_die(checkpoints: Path, point: str) -> int:
    def write(temporary: Path) -> Files:
        if point == "before files":
            _die()
        files = rank_files(temporary, 20, 0, _die if point == "after its first file" else lambda: None)
        if point == "after its files":
            _die()
        return files

    def half(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        _die()

    def write_file(when: str) -> Callable[..., Any]:
        return half if when == "half" else _dying(durable.write_file, when)

    if point in ("before the manifest", "manifest half written", "after the manifest"):
        verify.write_file = write_file({"before": "before", "manifest": "half", "after": "after"}[point.split()[0]])
    if point == "before the rename":
        Path.rename = _dying(Path.rename, "before", lambda path, *_: path.name.startswith(".tmp-"))
    if point == "after the rename":
        Path.rename = _dying(Path.rename, "after", lambda path, *_: path.name.startswith(".tmp-"))
    if point == "after the parent was synced":
        module.commit_folder = _dying(durable.commit_folder, "after")
    save(checkpoints, 20, write, attempt=2)
    return 1


def _resume_and_save(checkpoints: Path) -> int:
    """As the next attempt would: exit code = the step that was found; then step 30 is committed."""
    found = newest_verified_commit(checkpoints, lambda text: sys.exit(f"nothing is damaged: {text}"))
    assert found is not None
    assert verify_commit(found.folder) == []
    for name, known in found.files.items():
        content = content_of(found.state.step, 0, name.rpartition(".")[2])
        assert known["sha256"] == [hashlib.sha256(content).hexdigest()]
    assert save(checkpoints, 30, attempt=3) is None
    return found.state.step


def _fork(act: Callable[[], int]) -> int:
    """Run in a child that is a world of one rank; its exit code, negative: the signal. A minute at most."""
    process = os.fork()
    if process == 0:
        signal.alarm(60)
        _in_child(act)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _in_child(act: Callable[[], int]) -> NoReturn:
    status = 99
    try:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        status = act()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "points":
        kill_writers(Path(sys.argv[2]))
    else:
        kill_at_random(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
