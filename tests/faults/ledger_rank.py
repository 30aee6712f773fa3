"""A rank of a real training that writes down what each step learns from: what campaigns on whole runs start instead of `pretrain.train`.

In: `POISON` in the environment, a plan as JSON (rank, steps, how); empty: none. A rank that is named falls when it begins one of the steps,
in every attempt. Out: as `pretrain.train`, and in the run folder `ledger/attempt-N-rank-R.jsonl` with a line for each step that was begun:
the samples seen before it, their numbers in the run's order, a hash of the tokens, the time by the monotonic clock.
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from pretrain import train as loop
from pretrain.data.batches import Batches

LEDGER = "ledger"
"""The folder's name."""


def keep_ledger(folder: Path, attempt: str, rank: str) -> None:
    """Write a line whenever the loop takes the batches of a step. They are read ahead, in the same order."""
    read, next_step, lines = Batches._read_step, Batches.next_step, deque[dict[str, Any]]()
    folder.mkdir(exist_ok=True)
    file = (folder / f"attempt-{attempt}-rank-{rank}.jsonl").open("a", buffering=1)

    def read_and_remember(self: Batches, seen: int) -> Any:
        batches, digest = read(self, seen), hashlib.sha256()
        for batch in batches:
            digest.update(batch.tokens_BT.numpy().tobytes() + batch.labels_BT.numpy().tobytes())
        lines.append({"seen": seen, "numbers": self._numbers_of(seen).tolist(), "tokens": digest.hexdigest()})
        return batches

    def take(self: Batches) -> Any:
        batches = next_step(self)
        file.write(json.dumps({**lines.popleft(), "time": time.monotonic()}) + "\n")
        return batches

    Batches._read_step, Batches.next_step = read_and_remember, take


def fall_in(steps: list[int], how: str) -> None:
    """Be killed, or raise, when the loop begins one of these steps (counted from 0)."""
    plain = loop.seed_dropout

    def seed_dropout(seed: int, step: int, micro_step: int, data_rank: int) -> None:
        if step in steps and micro_step == 0:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError(f"the batch of step {step} is poison")
        plain(seed, step, micro_step, data_rank)

    loop.seed_dropout = seed_dropout


if __name__ == "__main__":
    keep_ledger(Path(sys.argv[1]) / LEDGER, sys.argv[2], os.environ["RANK"])
    plan = json.loads(os.environ.get("POISON") or "{}")
    if plan and os.environ["RANK"] == str(plan["rank"]):
        fall_in(plan["steps"], plan["how"])
    loop.main()
