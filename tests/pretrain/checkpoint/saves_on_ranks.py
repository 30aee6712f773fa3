"""What one rank does in the tests of saves in flight: called by `run_on_ranks`; arguments and results are JSON."""

import atexit
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as distributed

from configs.errors import UserError
from pretrain.checkpoint.arena import Answer
from pretrain.checkpoint.commit import Saves
from pretrain.checkpoint.places import Place
from pretrain.checkpoint.verify import list_commits, verify_commit
from pretrain.state import TrainState
from tests.pretrain.checkpoint.on_ranks import rank_files


class Writing:
    """Stands in for a rank's writer: it has written when it is told to, or when it is waited for."""

    def __init__(self, step: int, problem: str | None = None) -> None:
        self.step, self.problem, self.may_end, self.waited = step, problem, False, False

    def start(self, folder: Path) -> Callable[[bool], Answer | None]:
        def answer(wait: bool) -> Answer | None:
            self.waited = self.waited or wait
            if not (wait or self.may_end):
                return None
            return Answer({} if self.problem else rank_files(folder, self.step, distributed.get_rank()), self.problem)

        return answer


def in_flight(folder: str) -> dict[str, Any]:
    """One story after the other, in one attempt."""
    checkpoints, rank, committed = Path(folder, "checkpoints"), distributed.get_rank(), list[int]()
    place = Place(checkpoints, keep=lambda folder: committed.append(len(list_commits(folder))))
    saves = Saves([place], 1, lambda: True)
    result: dict[str, Any] = {}

    def begin(writing: Writing) -> str | None:
        return saves.begin(place, writing.start, state=TrainState(writing.step, writing.step * 4), identity={}, code={}, loss=1.5)

    def after_step(step: int) -> int:
        """As the loop: what each rank says at the end of a step is told to all a step later."""
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, saves.is_written)
        saves.advance(step, sum(gathered))
        return sum(gathered)

    def commits() -> list[str]:
        distributed.barrier()
        return [path.name for path in reversed(list_commits(checkpoints))]

    first = Writing(10)
    result["nothing in flight"] = [saves.is_written, saves.settle()]
    result["begun"] = begin(first)
    told = [after_step(11)]
    first.may_end = rank == 1
    told += [after_step(12)]
    result["one has written"] = commits()
    first.may_end = True
    told += [after_step(13)]
    result["told"] = told
    result["settled"] = saves.settle()
    result["waited"] = first.waited
    result["both have written"] = commits()

    second, third = Writing(20), Writing(30)
    begin(second)
    saves.advance(20, 2)  # a verdict of the step that was saved speaks of the save before
    result["an old verdict"] = commits()
    result["a save behind one in flight"] = begin(third)
    result["the one before was waited for"] = second.waited
    result["then it is there"] = commits()
    result["third"] = saves.settle()

    result["failed"] = [begin(Writing(40, "no space on rank 1" if rank == 1 else None)), begin(Writing(50))]
    result["fifth"] = saves.settle()
    result["after a failure"] = commits()
    for step in (60, 70):
        begin(Writing(step, "no space"))
        saves.settle()
    begin(Writing(80, "no space"))
    try:
        saves.settle()
    except UserError as error:
        result["three in a row"] = str(error)
    result["left"] = sorted(path.name for path in checkpoints.iterdir()) if commits() else []
    result["verified"] = [verify_commit(path) for path in list_commits(checkpoints)]
    result["after commits"] = committed
    atexit.register(os._exit, 0)  # as in on_ranks.py
    return result
