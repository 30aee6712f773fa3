"""What one rank does in the campaign of resharding: the real loop, leg after leg, with a ledger of what it was fed.

Called by `run_on_ranks`.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as distributed
from deepspeed import DeepSpeedEngine

from configs.steps import Steps
from pretrain import start
from pretrain import train as loop
from pretrain.checkpoint.verify import Commit, list_commits
from pretrain.data.batches import Batches, MicroBatch
from pretrain.run.folder import RunFolder
from tests.pretrain.checkpoint.deepspeed_on_ranks import bits_of
from tests.training import StopAfter, hold_lease, this_rank, tiny_config, write


def move(dataset: str, runs: str, legs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each leg trains (or goes on with) a run until a step; `copy_of` begins it with another run as it stands.

    Returns of each: what was said of resharding, whether what the engine then held was the commit, and of every step its loss and, over
    all ranks, (epoch, sample, hash of its tokens).
    """
    layout, results = this_rank(), []
    plain_step, plain_verify = Batches.next_step, start.verify_resharding
    for leg in legs:
        config = tiny_config(dataset, runs, run__name=leg["name"], **leg["settings"])
        run = RunFolder.of(config)
        if layout.rank == 0:
            if "copy_of" in leg:
                shutil.copytree(run.path.with_name(leg["copy_of"]), run.path)
            hold_lease(run, leg["attempt"])
        distributed.barrier()
        first = int(list_commits(run.checkpoints)[0].name.removeprefix("step-")) if list_commits(run.checkpoints) else 0
        fed: list[list[Any]] = []
        handed_over: list[bool] = []

        def watched(
            self: Batches, fed: list[list[Any]] = fed, first: int = first, steps: Steps = config.training.steps
        ) -> list[MicroBatch]:
            batches = plain_step(self)
            numbers = self._numbers_of(steps.samples_before(first + len(fed)))  # what this rank is to have
            places = self.order.places(numbers)
            rows = [row.numpy().tobytes() for batch in batches for row in batch.tokens_BT]
            assert len(rows) == len(numbers)
            sums = (hashlib.sha256(row).hexdigest()[:16] for row in rows)
            fed.append([list(one) for one in zip(places.epoch_n.tolist(), places.sample_n.tolist(), sums, strict=True)])
            return batches

        def verified(engine: DeepSpeedEngine, commit: Commit, handed: list[bool] = handed_over, **how: Any) -> str:
            line = plain_verify(engine, commit, **how)
            folder = layout.gather(tempfile.mkdtemp())[0]
            handed.append(bits_of(write(engine, Path(folder), layout, commit.state)) == bits_of(commit))
            return line

        Batches.next_step, start.verify_resharding = watched, verified  # type: ignore[method-assign]
        try:
            outcome = loop.train(config, run, leg["attempt"], layout, StopAfter(leg["until"], first))
        finally:
            Batches.next_step, start.verify_resharding = plain_step, plain_verify  # type: ignore[method-assign]
        rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        steps = [sorted(one for rank in layout.gather(mine) for one in rank) for mine in fed]
        results.append(
            {
                "kind": outcome.kind,
                "handed_over": handed_over,
                "fed": {str(first + number + 1): step for number, step in enumerate(steps)},
                "losses": {str(row["step"]): row["loss"] for row in rows if "loss" in row and row["attempt"] == leg["attempt"]},
            }
        )
        distributed.barrier()
    return results
