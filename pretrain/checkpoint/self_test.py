"""Before the first step: can what is about to be trained be saved, and does it come back?

In: an engine, the arena, the run's `checkpoints/` folder. Out: nothing, or a refusal. The real state is written to the real disk, the
engine's own is overwritten, and filled from the files; every bit must be as it was. A DeepSpeed whose insides mean something else than we
take them for, a disk that is full or forgets, are found here and not after a day.
"""

from pathlib import Path

import deepspeed
import torch
import torch.distributed as distributed
from deepspeed import DeepSpeedEngine

from configs.errors import UserError
from pretrain.checkpoint.arena import Answer, Arena
from pretrain.checkpoint.fragments import check_slices, image_of, owned_slices, prepare_weights, read_fragments, refresh_weights
from pretrain.checkpoint.index import FragmentIndex
from pretrain.checkpoint.store import SELF_TEST, lies_at, remove_folders, unfinished
from pretrain.checkpoint.verify import Commit
from pretrain.state import TrainState


@torch.no_grad()
def save_and_load(engine: DeepSpeedEngine, arena: Arena, checkpoints: Path, attempt: int) -> None:
    """Save, overwrite, load, compare. Collective. Nothing is committed, and nothing is left in the folder.

    Raises UserError where the disk refuses, RuntimeError where something comes back as it was not.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    check_slices(engine)
    folder = unfinished(lies_at(checkpoints), SELF_TEST, attempt)
    try:
        arena.start(folder, image_of(engine, rank, world_size, {}))
        answer = arena.answer(wait=True)
    except OSError as error:
        answer = Answer({}, str(error))
    assert answer is not None
    answers: list[Answer] = [answer] * world_size
    distributed.all_gather_object(answers, answer)
    try:
        if problem := next((answer.problem for answer in answers if answer.problem is not None), None):
            raise UserError(f"a checkpoint cannot be written below {lies_at(checkpoints)}: {problem}. Nothing was trained yet.")
        files = {name: record for answer in answers for name, record in answer.files.items()}
        for piece in owned_slices(engine):
            piece.of(piece.flat).fill_(float("nan"))
        prepare_weights(engine)
        with FragmentIndex(Commit(folder, TrainState(), files, {}, {}, world_size, attempt, 0.0, 0)) as index:
            read_fragments(engine, index)
        refresh_weights(engine)
        check_slices(engine)
        if different := arena.differences(image_of(engine, rank, world_size, {})):
            raise RuntimeError(
                f"what was saved does not come back as it was with DeepSpeed {deepspeed.__version__}, stage "
                f"{engine.zero_optimization_stage()}: {', '.join(different[:3])}. Nothing was trained yet; is a setting in the section "
                "`deepspeed:` the cause?"
            )
    finally:
        distributed.barrier()
        if rank == 0:
            remove_folders([folder])
