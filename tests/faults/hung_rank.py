"""A rank of a real training that hangs: what the campaign of `hangs.py` starts in place of `pretrain.train`.

In: `HANG` in the environment, a plan as JSON (kind, rank, step, delay). In its first attempt the rank that is named hangs in that way, in
or soon behind that step, and writes down when. Out: as `pretrain.train`.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pretrain import train as loop
from pretrain.checkpoint.arena import Arena
from pretrain.data.batches import Batches
from pretrain.watch import journal

HUNG_FILE = "hung.json"
"""In the run folder: by the monotonic clock, when; and the process that hangs."""


def write_down(pid: int) -> None:
    """That a process hangs from now on."""
    Path(sys.argv[1], HUNG_FILE).write_text(json.dumps({"time": time.monotonic(), "pid": pid}))


def stop_soon(delay: float) -> None:
    """Be stopped, at whatever line this rank is then."""

    def stop() -> None:
        write_down(os.getpid())
        os.kill(os.getpid(), signal.SIGSTOP)

    threading.Timer(delay, stop).start()


def deadlock(delay: float) -> None:
    """Wait for a lock that this rank holds itself."""
    del delay
    lock = threading.Lock()
    write_down(os.getpid())
    with lock:
        lock.acquire()


def plan_in_step(step: int, delay: float, act: Any) -> None:
    """Act once, when the loop begins that step."""
    plain = loop.seed_dropout

    def seed_dropout(seed: int, at_step: int, micro_step: int, data_rank: int) -> None:
        if at_step == step and micro_step == 0:
            act(delay)
        plain(seed, at_step, micro_step, data_rank)

    loop.seed_dropout = seed_dropout


def plan_in_data(step: int, delay: float) -> None:
    """The thread that reads never comes back with a step's tokens."""
    del delay
    plain = Batches._read_step

    def read_for_ever(self: Batches, seen: int) -> Any:
        if seen == self._steps.batch_at(0) * step:
            write_down(os.getpid())
            threading.Event().wait()
        return plain(self, seen)

    Batches._read_step = read_for_ever


def plan_in_save(step: int, delay: float) -> None:
    """The process that writes checkpoints is stopped at the first save from that step on, as one is that waits for a dead disk."""
    del delay
    plain, state = loop.save, {"is_done": False}

    def save(engine: Any, arena: Arena, *others: Any, **about: Any) -> Any:
        if about["state"].step >= step and not state["is_done"]:
            state["is_done"] = True
            arena._process = arena._process or arena._start_writer()
            write_down(arena._process.pid)
            arena._process.send_signal(signal.SIGSTOP)
        return plain(engine, arena, *others, **about)

    loop.save = save


def plan_at_end(step: int, delay: float) -> None:
    """What closes Weights & Biases never returns."""
    del step, delay

    def never_end(*_: Any, **__: Any) -> None:
        write_down(os.getpid())
        threading.Event().wait()

    journal.end_tracking = never_end


PLANS = {
    "stopped": lambda step, delay: plan_in_step(step, delay, stop_soon),
    "deadlock": lambda step, delay: plan_in_step(step, delay, deadlock),
    "data": plan_in_data,
    "save": plan_in_save,
    "end": plan_at_end,
}

if __name__ == "__main__":
    plan = json.loads(os.environ.get("HANG", "{}"))
    if plan and sys.argv[2] == "1" and os.environ["RANK"] == str(plan["rank"]):
        PLANS[plan["kind"]](plan["step"], plan["delay"])
    loop.main()
