"""Where work units are made: one after the other in this process, or side by side as Ray tasks.

In: a function and its arguments. Out: its results as they come, in any order. Ray appears in no other file of this room.
"""

import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
MAX_RETRIES = 3
OBJECT_STORE_BYTES = 200_000_000  # only records travel; shards go straight to the disk


def run_here(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, scratch: Path) -> Generator[Result, None, None]:
    """One after the other, in this process; `workers` and `scratch` are not used."""
    yield from map(function, tasks)


def run_on_ray(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, scratch: Path) -> Generator[Result, None, None]:
    """Side by side, `workers` at once; a task whose worker dies is tried again, at most 3 times.

    Uses the Ray that is running in this process, else the cluster RAY_ADDRESS names, else one of its own below
    `scratch`, which ends with the last result. Raises what the function raises (UserError as it is); UserError when
    memory runs out; RuntimeError naming the task when its worker dies for good.
    """
    with _connect(workers, scratch):
        import ray

        remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(function)
        waiting = list(reversed(tasks))
        running: dict[Any, Task] = {}
        try:
            while waiting or running:
                # Twice as many as can run: a worker never waits for the next, and an error leaves little behind.
                while waiting and len(running) < 2 * workers:
                    task = waiting.pop()
                    running[remote.remote(task)] = task
                done, _ = ray.wait(list(running), num_returns=1)
                task = running.pop(done[0])
                yield _result(done[0], task)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _result(reference: Any, task: object) -> Any:
    import ray.exceptions

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise RuntimeError(f"this task failed: {task}") from error
    except ray.exceptions.OutOfMemoryError:
        raise UserError("memory ran out while making a work unit; lower data.workers or data.largest_document_bytes.") from None
    except ray.exceptions.WorkerCrashedError as error:
        raise RuntimeError(f"the worker of this task died {MAX_RETRIES + 1} times: {task}") from error


@contextmanager
def _connect(workers: int, scratch: Path) -> Generator[None, None, None]:
    import ray

    if ray.is_initialized():
        yield
        return
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONSAFEPATH": "1",  # a `configs` package in the current folder must not stand in for ours
        "RAY_task_oom_retries": str(MAX_RETRIES),
    }
    local: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        # Ray would leave a token in ~/.ray; ours goes with `scratch`, which only its owner may enter. Ray opens its own
        # folder to everybody, so that stands one below.
        token = scratch / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        settings["RAY_AUTH_TOKEN_PATH"] = str(token)
        local = {
            "address": "local",
            "num_cpus": workers,
            "num_gpus": 0,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(scratch / "r"),
        }
    with _environment(settings):
        try:
            on_stop = signal.getsignal(signal.SIGTERM)
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_stop)  # Ray takes it, dumps its stack, and ends without a word of ours
            yield
        finally:
            ray.shutdown()


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
