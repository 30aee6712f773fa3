"""Where tasks are done: one after the other in this process, or side by side on Ray.

In: a function and its arguments. Out: each task with its result, or with what became of it, as they come, in any order. Ray
appears in no other file of this room.
"""

import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from configs.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
MAX_RETRIES = 3
OBJECT_STORE_BYTES = 200_000_000  # only records travel; shards go straight to the disk


@dataclass(frozen=True)
class Failed:
    """What became of a task that could not be done."""

    reason: str


class Run(Protocol):
    """Does tasks; gives each with its result. Closed early, it starts no more, and what runs ends with the place."""

    def __call__(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Generator[tuple[Task, Result | Failed], None, None]:
        """Raises UserError as `function` does: it speaks of the whole build. Any other exception becomes a `Failed`."""
        ...


Engine = Callable[[int | None, Path], AbstractContextManager[Run]]
"""Opens a place for tasks: (workers at once or None, one per CPU, private scratch folder) -> Run. Nothing is started before the first
task."""


@contextmanager
def open_here(workers: int | None, scratch: Path) -> Generator[Run, None, None]:
    """One task after the other, in this process; `workers` and `scratch` are not used."""

    def run(function: Callable[[Task], Result], tasks: Sequence[Task]) -> Generator[tuple[Task, Result | Failed], None, None]:
        for task in tasks:
            try:
                result: Any = function(task)
            except (UserError, OSError):
                raise
            except Exception as error:
                result = Failed(f"{type(error).__name__}: {error}")
            yield task, result

    yield run


@contextmanager
def open_ray(workers: int | None, scratch: Path) -> Generator[Run, None, None]:
    """Side by side, `workers` at once, or one on each CPU of all hosts; a task whose worker dies is tried again, at most 3 times, and then
    given up.

    Uses the Ray that is running in this process, else the cluster RAY_ADDRESS names, else one of its own below `scratch`,
    which ends with this. Raises UserError when memory runs out.
    """
    with ExitStack() as stack:
        started: list[bool] = []

        def run(function: Callable[[Task], Result], tasks: Sequence[Task]) -> Generator[tuple[Task, Result | Failed], None, None]:
            if tasks and not started:
                stack.enter_context(_connect(workers, scratch))
                started.append(True)
            yield from _run(function, tasks, workers or _count_cpus())

        yield run


def _run(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, Result | Failed]]:
    import ray

    remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(function)
    waiting = list(reversed(tasks))
    running: dict[Any, Task] = {}
    # Left early, it cancels nothing: Ray 2.60 aborts the whole driver when a task ends in that moment (ray-project/ray#54798 and
    # before it). A Ray that was started here ends with its tasks; elsewhere they find that the folder is no longer theirs.
    while waiting or running:
        # Half as many again as can run: a worker never waits for the next, and an error leaves little behind.
        while waiting and len(running) < workers + (workers + 1) // 2:
            task = waiting.pop()
            running[remote.remote(task)] = task
        done, _ = ray.wait(list(running), num_returns=1)
        task = running.pop(done[0])
        yield task, _result(done[0])


def _count_cpus() -> int:
    """Of all hosts, as Ray counts them. Hosts that join later are not waited for, nor used."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _result(reference: Any) -> Any:
    import ray.exceptions

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        if isinstance(error.cause, OSError):
            raise error.cause from error
        return Failed(f"{type(error.cause).__name__}: {error.cause}")
    except ray.exceptions.OutOfMemoryError:
        return Failed(f"memory ran out {MAX_RETRIES + 1} times; lower data.workers, data.work_unit_bytes or data.shard_tokens")
    except ray.exceptions.WorkerCrashedError:
        return Failed(f"its worker died {MAX_RETRIES + 1} times")


@contextmanager
def _connect(workers: int | None, scratch: Path) -> Generator[None, None, None]:
    import ray

    if ray.is_initialized():
        yield
        return
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONSAFEPATH": "1",  # a `configs` package in the current folder must not stand in for ours
        "RAY_task_oom_retries": str(MAX_RETRIES),
        # One core for each task: the encoders' own threads would fight over the cores that the tasks have.
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    local: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        # Ray would leave a token in ~/.ray; ours goes with `scratch`, which only its owner may enter. Ray opens its own
        # folder to everybody, so that stands one below.
        token = scratch / "token"
        token.touch(0o600)
        token.write_text(_process_token())
        settings["RAY_AUTH_TOKEN_PATH"] = str(token)
        local = {
            "address": "local",
            "num_cpus": workers or count_cores(),
            "num_gpus": 0,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(scratch / "r"),
        }
    else:
        # On a cluster the workers' environment is Ray's to pass on.
        names = ("PYTHONSAFEPATH", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")
        local = {"runtime_env": {"env_vars": {name: settings[name] for name in names}}}
    with _environment(settings):
        try:
            on_stop = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
            except ConnectionError as error:
                raise UserError(
                    f"the Ray cluster that RAY_ADDRESS names ({os.environ.get('RAY_ADDRESS')}) cannot be joined: "
                    f"{str(error).splitlines()[0]} Is it up, and is its token here (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH)? "
                    "Without RAY_ADDRESS this machine's cores do the work."
                ) from None
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_stop)  # Ray takes it, dumps its stack, and ends without a word of ours
            yield
        finally:
            ray.shutdown()


def count_cores() -> int:
    """Cores that this process may use (a container or a batch job may have fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _process_token() -> str:
    """The secret of all Rays that this process starts, one after the other: Ray reads its client's only once."""
    return secrets.token_hex(32)


@contextmanager
def _environment(settings: dict[str, str]) -> Generator[None, None, None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
